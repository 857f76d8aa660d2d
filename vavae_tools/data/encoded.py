"""What is encoded once: latents, text states, features of frozen encoders, as safetensors shards.

Each key, of the encoder's weights, samples and settings, has a folder of its own, which is locked while it is written.
A shard's header holds its key and rows: only what is missing is made.
"""

import json
import math
import os
import shutil
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain, pairwise
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from vavae_tools.data.loader import identity_collate, ignore_interrupts, in_batches
from vavae_tools.runtime.errors import UserError, in_home, join_first
from vavae_tools.runtime.files import atomic_write, free_bytes, write_json
from vavae_tools.runtime.machine import Computing
from vavae_tools.runtime.ranks import Ranks

SHARD_SIZE, SHARD_BYTES = 10_000, 2**30  # of a shard at most: one is in memory, and lost when the process is killed
MIN_SHARDS = 8  # of a subset where it has as many batches: for several processes to share, and to resume with
READ_AT_ONCE = 2**28  # bytes: smaller data are read into memory
PATIENCE = 120.0  # seconds until another machine's files must be visible: network disks cache that there was nothing

Tensors = dict[str, Tensor]
Fields = Callable[[str, Any], Tensors]  # encodes a batch of a subset, on any device


@dataclass(frozen=True)
class Shard:
    """Rows of a subset, and the key and size of what is made of them."""

    rows: range
    key: str
    nbytes: int


def subfolder(key: str) -> str:
    return key[:16]


def cut(subset: str, length: int, row_bytes: int, batch_size: int, key: str) -> dict[str, Shard]:
    """Return the shards of a subset by their file names: whole batches, the same for any number of processes."""
    most = max(1, min(SHARD_SIZE, SHARD_BYTES // row_bytes))
    size = min(most, -(-length // (MIN_SHARDS * batch_size)) * batch_size)
    parts = [range(length)[start : start + size] for start in range(0, length, size or 1)]
    shards = [Shard(rows, f"{key} {rows.start}:{rows.stop}", len(rows) * row_bytes) for rows in parts]
    return {f"{subset}-{number:05d}.safetensors": shard for number, shard in enumerate(shards)}


@dataclass(frozen=True)
class EncodedFolder:
    """A folder of shards and what its index says, which is written last: whatever has an index is whole."""

    INDEX: ClassVar[str]
    CONTENTS: ClassVar[str]
    path: Path
    key: str

    @classmethod
    def read(cls, path: str | Path) -> Self:
        path = in_home(path)
        return cls.only(path, cls.read_all(path))

    @classmethod
    def read_all(cls, path: str | Path) -> list[Self]:
        """Read all encodings in a folder: those in its subfolders, and a former version's, which lies in it itself."""
        return list(map(cls._read, [*Path(path).glob(cls.INDEX), *sorted(Path(path).glob(f"*/{cls.INDEX}"))]))

    @classmethod
    def only(cls, path: str | Path, found: Sequence[Self]) -> Self:
        if not found:
            raise UserError(f"No {cls.CONTENTS} in {path} ({cls.INDEX} is missing): encode them first")
        if len(found) > 1:
            folders = join_first([str(one.path) for one in found])
            raise UserError(f"{path} holds {cls.CONTENTS} of {len(found)} encodings, expected one: name {folders}")
        return found[0]

    @classmethod
    def _read(cls, index: Path) -> Self:
        try:
            return cls(path=index.parent, **json.loads(index.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{index} is damaged ({error!r}): delete it and encode again") from None

    @classmethod
    def find(cls, path: Path, keys: Collection[str]) -> Self | None:
        """Return the encoding of one of these keys in a folder, if there is one that is whole."""
        for place in (path, *(path / subfolder(key) for key in keys)):
            with suppress(UserError, OSError):
                found = cls._read(place / cls.INDEX)
                if found.key in keys and all((place / name).is_file() for name in found.files()):
                    return found
        return None

    @classmethod
    def find_or_lock(cls, path: Path, keys: Sequence[str], held: ExitStack, log: Callable[[str], None]) -> Self | None:
        """Return what `find` does; None: the first key's folder is locked, until `held` closes, to be written."""
        if found := cls.find(path, keys):
            return found
        path.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path / f".{subfolder(keys[0])}.lock")
        try:
            held.enter_context(lock.acquire(blocking=False))
        except Timeout:
            log(f"Another process encodes into {path / subfolder(keys[0])}: waiting for it")
            held.enter_context(lock.acquire())
        if (found := cls.find(path, keys)) is None:
            (path / subfolder(keys[0]) / cls.INDEX).unlink(missing_ok=True)  # what has an index is whole
        return found

    def check(self, keys: Mapping[str, str]) -> None:
        """Raise where a file's key begins otherwise than here; foreign ones and those of former versions have none."""
        for name, expected in keys.items():
            key = key_of(self.path / name)
            if key is not None and key.split()[0] != expected:
                found = f"{self.path / name} is of another encoding than {self.INDEX} beside it"
                raise UserError(f"{found}: delete both and encode again")

    def write(self) -> None:
        write_json(self.path / self.INDEX, {name: value for name, value in asdict(self).items() if name != "path"})


class Store:
    """A folder of shards whose names begin with `name`; those that one of `others` holds are taken over from there."""

    def __init__(self, folder: str | Path, name: str = "*", others: Sequence[Path] = ()) -> None:
        self.folder, self.name, self.others = Path(folder), name, others

    def missing(self, shards: Mapping[str, Shard]) -> list[str]:
        """Return the names of the shards that are not there, or are damaged or of another key."""
        return [name for name, shard in shards.items() if self._find(name, shard.key) is None]

    def _find(self, name: str, key: str) -> Path | None:
        places = (folder / name for folder in (self.folder, *self.others))
        return next((place for place in places if key_of(place) == key), None)

    def take_over(self, shards: Mapping[str, Shard]) -> None:
        """Link what lies in other folders, or copy it where the disk knows no links: these files never change."""
        for name, shard in shards.items():
            found = self._find(name, shard.key)
            if found is not None and found.parent != self.folder:
                with atomic_write(self.folder / name) as partial:
                    try:
                        os.link(found, partial)
                    except OSError:
                        shutil.copyfile(found, partial)

    def clear(self, shards: Mapping[str, Shard]) -> int:
        """Delete all shards but these; return how many bytes those will take that are missing."""
        missing = self.missing(shards)
        patterns = f"{self.name}-*.safetensors", f".{self.name}-*.partial"
        for path in chain.from_iterable(map(self.folder.glob, patterns)):
            if path.name not in shards.keys() - missing:
                path.unlink(missing_ok=True)
        return sum(shards[name].nbytes for name in missing)

    def make_room(self, shards: Mapping[str, Shard], what: str) -> None:
        """Delete all shards but these, and raise where the disk has no room for those that are missing."""
        if (needed := self.clear(shards)) > (free := free_bytes(self.folder)):
            problem = f"{what} need {needed / 1e9:,.3f} GB, {free / 1e9:,.3f} GB are free for {self.folder.absolute()}"
            others = [path for path in self.others if path != self.folder and any(path.glob("*.safetensors"))]
            hint = f" (other encodings are in {join_first(others)})" if others else ""
            raise UserError(f"No space: {problem}. Free some space{hint}, or choose another folder")

    def wait_for(self, names: Collection[str], ranks: Ranks) -> None:
        """Wait until files that other processes have written are visible to this one, at most for `PATIENCE`."""
        until = time.monotonic() + PATIENCE
        while hidden := [name for name in names if not (self.folder / name).is_file()]:
            if ranks.size == 1 or time.monotonic() > until:
                hint = "name a folder on a disk that all machines share, or encode on each machine first"
                file = (self.folder / hidden[0]).absolute()
                raise UserError(f"Process {ranks.rank + 1} of {ranks.size} does not see {file} of another one: {hint}")
            time.sleep(0.2)


def agree(ranks: Ranks, make: Callable[[], Any], identity: str = "") -> Any:
    """Return what the first process makes, plain values; the others wait for it, and must have its `identity`."""
    number = ranks.counts["agreed"] = ranks.counts.get("agreed", 0) + 1  # each process counts for itself
    first, made = ranks.share(f"agreed {number}", [identity, make()] if ranks.rank == 0 else None)
    if first != identity:
        place = f"Process {ranks.rank + 1} of {ranks.size}"
        raise UserError(f"{place} has other weights or images than the first: give all machines the same")
    return made


def encode(
    store: Store,
    shards: Mapping[str, Mapping[str, Shard]],
    samples: Mapping[str, Any],
    fields: Fields,
    computing: Computing,
    batch_size: int = 32,
    dtype: torch.dtype = torch.float16,
    finish: Callable[[Tensors], Tensors] = dict,
    num_workers: int = 0,
    ranks: Ranks | None = None,
    unit: str = "image",
    progress: bool = True,
) -> None:
    """Make the shards that are missing; return when all processes have made theirs.

    Args:
        shards: subset → its shards.
        samples: subset → a data set whose `get_batch` gives a batch, or a sequence.
        dtype: of the floats that are stored.
        finish: makes a shard's tensors of the concatenated ones of its batches.

    Raises:
        UserError: no space on the disk; or numbers that are not finite, or too large for `dtype`.
    """
    ranks, files = ranks or Ranks(), {name: shard for of_subset in shards.values() for name, shard in of_subset.items()}

    def plan() -> list[str]:
        missing = store.missing(files)
        store.make_room(files, computing.what)
        store.take_over(files)
        return missing

    missing = agree(ranks, plan)
    mine, this = set(missing[ranks.rank :: ranks.size]), f"encoding {ranks.counts['agreed']}"
    total = sum(len(shard.rows) for shard in files.values())
    there = total - sum(len(files[name].rows) for name in missing)
    hidden = None if progress and ranks.rank == 0 else True
    with tqdm(total=total, initial=there, desc="encoding", unit=unit, disable=hidden) as bar:

        def advance(count: int = 0) -> None:
            bar.update(there + ranks.add(f"{this} samples", count) - bar.n)

        for subset, of_subset in shards.items():
            own = {name: shard for name, shard in of_subset.items() if name in mine}
            batches = _batches(samples[subset], [s.rows for s in own.values()], batch_size, num_workers)
            encoded = _encoded(subset, batches, fields, computing, dtype)
            for name, shard in own.items():
                tensors = finish(_concatenated(encoded, shard.rows, batch_size, advance))
                with atomic_write(store.folder / name) as file:
                    save_file(tensors, file, metadata={"key": shard.key})
        finished = ranks.add(f"{this} finished", 1)
        while finished < ranks.size:
            time.sleep(0.05)
            advance()
            finished = ranks.add(f"{this} finished", 0)
    store.wait_for(files, ranks)


def _batches(data: Any, parts: Sequence[range], batch_size: int, num_workers: int) -> Iterator[Any]:
    """Yield the batches of some rows, of which alone images are decoded; no batch has rows of two parts."""
    rows = [list(part[k : k + batch_size]) for part in parts for k in range(0, len(part), batch_size)]
    if not rows:
        return
    places = torch.tensor([row for batch in rows for row in batch])
    renumbered = hasattr(data, "part") and len(places) < len(data)
    if renumbered:
        data = data.part(places.tolist())
        rows = [part.tolist() for part in torch.arange(len(places)).split([len(batch) for batch in rows])]
    if num_workers and hasattr(data, "fits_memory") and data.fits_memory():
        data.in_memory()  # now, once, and not in each worker
    loader = DataLoader(
        in_batches(data),
        batch_sampler=rows,
        num_workers=num_workers if len(rows) > num_workers else 0,
        collate_fn=identity_collate,
        worker_init_fn=ignore_interrupts,
    )
    for batch in loader:
        if renumbered:
            batch["index"] = places[batch["index"]]
        yield batch


def _encoded(
    subset: str, batches: Iterator[Any], fields: Fields, computing: Computing, dtype: torch.dtype
) -> Iterator[Tensors]:
    """Yield encoded batches on the CPU. The next one is begun before: it is loaded while the device computes."""
    begun = ((batch, *_begun(partial(fields, subset, batch), computing)) for batch in batches)
    for (batch, made, maximum), _ in pairwise(chain(begun, [None])):
        largest = maximum.item()  # the device is waited for here alone
        if computing.in_half and not math.isfinite(largest):
            made, maximum = _begun(partial(fields, subset, batch), computing.again)
            largest = maximum.item()
        if not math.isfinite(largest):
            raise UserError(f"{computing.what} are not finite: its weights are damaged")
        if largest > torch.finfo(dtype).max:
            limit = "float16 holds up to 65,504: store them as float32, or take another model"
            raise UserError(f"{computing.what} reach {largest:,.0f}, and {limit}")
        yield {name: (v.to(dtype) if v.is_floating_point() else v).cpu() for name, v in made.items()}


@torch.inference_mode()
def _begun(call: Callable[[], Tensors], computing: Callable[..., Tensors]) -> tuple[Tensors, Tensor]:
    """Return what the device may still be computing, and its largest absolute value."""
    made = computing(call)
    floats = [values for values in made.values() if values.is_floating_point()]
    return made, torch.stack([values.abs().max().float() for values in floats]).max()


def _concatenated(encoded: Iterator[Tensors], rows: range, batch_size: int, advance: Callable[[int], None]) -> Tensors:
    parts = defaultdict(list)
    for start in range(0, len(rows), batch_size):
        for name, values in next(encoded).items():
            parts[name].append(values)
        advance(len(rows[start : start + batch_size]))
    return {name: torch.cat(parts.pop(name)).contiguous() for name in list(parts)}


def key_of(shard: Path) -> str | None:
    with suppress(SafetensorError, OSError), safe_open(shard, framework="pt") as file:
        return (file.metadata() or {}).get("key")
    return None


def open_shard(path: Path) -> Tensors:
    """Return the tensors of a shard, memory-mapped: they stay in the file until their rows are used."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete it and encode again") from None


class Rows:
    """The rows of a field over all shards of a subset: `rows[index]` copies those of an int64 (B,) alone."""

    def __init__(self, shards: Sequence[Tensor]) -> None:
        is_small = len(shards) > 1 and sum(shard.nbytes for shard in shards) <= READ_AT_ONCE
        self.shards = [torch.cat(list(shards))] if is_small else list(shards)
        lengths = torch.tensor(list(map(len, self.shards)), dtype=torch.int64)
        self._ends = lengths.cumsum(0)
        self._starts = self._ends - lengths

    def __getitem__(self, index: Tensor) -> Tensor:
        if len(self.shards) == 1 or not len(index):
            return self.shards[0][index]
        numbers = torch.searchsorted(self._ends, index, right=True)
        places = index - self._starts[numbers]
        return torch.stack([self.shards[n][place] for n, place in zip(numbers.tolist(), places.tolist(), strict=True)])
