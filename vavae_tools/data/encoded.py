"""Latents: every picture encoded once, kept as safetensors shards, read memory-mapped.

A folder of latents holds `train-00000.safetensors … val-00000.safetensors` with LightningDiT's keys (`latents`,
`latents_flip` where flips were asked for, `labels`) and `latents.json`: the cache key, the pictures' names, and per
channel mean and standard deviation of the training side. Each shard says in its header which key it belongs to, so that
an encoding that was interrupted goes on with what lacks. Several processes make a share of the shards each.
"""

import hashlib
import itertools
import json
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import Dataset

from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.ranks import Ranks

SHARD_SIZE = 10_000
SHARD_BYTES = 2**30
"""A shard holds at most so many pictures and bytes: one is in memory while it is made, and is lost with a kill."""
INDEX = "latents.json"


_NAMES_OF_SHARDS = (("", ""), (".", ".*.partial"))
_ALONE = (1, 1)
"""What a side is cut for by one process: nothing."""


class _Together:
    """Those that encode together; what they tell each other goes under names of this encoding alone."""

    def __init__(self, ranks: Ranks) -> None:
        self.ranks, self.size, self.is_first = ranks, ranks.size, ranks.rank == 0
        number = ranks.counts["encodings"] = ranks.counts.get("encodings", 0) + 1  # each process counts for itself
        self._name = f"encoding {number}"

    def agree(self, what: str, make: Callable[[], Any]) -> Any:
        """What the first process makes, plain values, for all; the others wait for it."""
        return self.ranks.share(f"{self._name} {what}", make() if self.is_first else None)

    def add(self, what: str, count: int) -> int:
        """Add to what all count together → the sum so far."""
        return self.ranks.add(f"{self._name} {what}", count)

    def count(self, what: str, yes: bool) -> int:
        """How many of them say yes."""
        self.add(what, int(yes))
        self.wait(what)
        return self.agree(f"{what}, of all", lambda: self.add(what, 0))

    def wait(self, what: str, meanwhile: Callable[[], object] = lambda: None) -> None:
        """Until all have come here."""
        self.add(f"{what}, here", 1)
        while self.is_first and self.add(f"{what}, here", 0) < self.size:
            meanwhile()
            time.sleep(0.05)
        self.agree(f"{what}, all here", lambda: True)

    def check_equal(self, what: str, digest: str) -> None:
        """Raises a UserError where this process has something else than the first."""
        if self.agree(what, lambda: digest) != digest:
            raise UserError(
                f"Process {self.ranks.rank + 1} of {self.size} has other {what} than the first: give all machines the "
                "same, then start again"
            )

    def check_disk(self, folder: Path) -> None:
        """Raises a UserError where this process does not see the folder that the first sees."""
        if self.size == 1:
            return
        mark = folder / ".train-together.safetensors.mark.partial"  # after a kill it goes as half-written shards do
        if self.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            mark.touch()
        self.agree("mark", lambda: True)
        if not mark.is_file():
            raise UserError(
                f"Process {self.ranks.rank + 1} of {self.size} does not see {folder.absolute()} of the first one: name "
                "a folder on a disk that all machines share, or encode the pictures on each machine first"
            )
        self.wait("mark")
        if self.is_first:
            mark.unlink()


def _cut(length: int, most: int, processes: int, batch_size: int) -> list[range]:
    """The rows of each shard of a side, so that each of some processes can make as many as any other.

    One process makes shards of `most` rows. Of these several processes take a whole one each as long as there are
    enough for all; the rest is cut between its batches, so that these stay those of one process, and with them every
    bit of what an encoder makes.
    """
    shards = [range(start, min(start + most, length)) for start in range(0, length, most)]
    as_they_are = length // most // processes * processes
    parts = shards[:as_they_are]
    for rows in shards[as_they_are:]:
        batches = -(-len(rows) // batch_size)
        count = min(processes, batches)
        starts = [rows.start + batches * part // count * batch_size for part in range(count)]
        parts += [range(start, end) for start, end in itertools.pairwise([*starts, rows.stop])]
    return parts


def _shard_files(folder: Path) -> list[Path]:
    """Also what a killed process left half written: a folder belongs to one encoding at a time."""
    patterns = [f"{start}{side}-*.safetensors{end}" for side in ("train", "val") for start, end in _NAMES_OF_SHARDS]
    return [path for pattern in patterns for path in folder.glob(pattern)]


@dataclass(frozen=True)
class _Whole:
    """A shard that is there: how many latents of which shape (C, h, w), and what its side was cut for."""

    count: int
    shape: tuple[int, ...]
    cut: tuple[int, ...]


def _whole_shards(folder: Path, key: str) -> dict[str, _Whole]:
    """The shards that an encoding of this key wrote."""
    found = {}
    for path in _shard_files(folder):
        with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
            says = file.metadata() or {}
            if says.get("key") == key:
                count, *shape = file.get_slice("latents").get_shape()
                found[path.name] = _Whole(count, tuple(shape), tuple(json.loads(says.get("cut", str([*_ALONE])))))
    return found


def _mapped(path: Path) -> dict[str, Tensor]:
    """A shard's tensors, which stay in the file until their rows are used."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _make_room(folder: Path, count: int, row_bytes: int, kept: set[str]) -> None:
    """Delete what belongs to other weights or pictures, if after that the disk has room for `count` latents more."""
    stale = [path for path in _shard_files(folder) if path.name not in kept]
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free + sum(path.stat().st_size for path in stale)
    if count * row_bytes > free:
        raise UserError(
            f"No space for the latents of {count:,} pictures: {count * row_bytes / 1e9:,.3f} GB needed, "
            f"{free / 1e9:,.3f} GB free in {there}. Free some space, choose another folder, or store them as float16"
        )
    (folder / INDEX).unlink(missing_ok=True)  # first: whatever has an index is whole
    for path in stale:
        path.unlink(missing_ok=True)


def _digest_of_names(sides: dict[str, Dataset]) -> str:
    named = {side: [list(data.names), data.labels.tolist()] for side, data in sides.items()}
    return hashlib.sha256(json.dumps(named).encode()).hexdigest()
