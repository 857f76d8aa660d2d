"""Latents: every picture encoded once, kept as safetensors shards, read memory-mapped.

A folder of latents holds `train-00000.safetensors … val-00000.safetensors` with LightningDiT's keys (`latents`,
`latents_flip` where flips were asked for, `labels`) and `latents.json`: the cache key, the pictures' names, and per
channel mean and standard deviation of the training side. Each shard says in its header which key it belongs to, so that
an encoding that was interrupted goes on with what lacks. Several processes make a share of the shards each.
"""

import functools
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from vavae_tools.data.encoded import (
    _ALONE,
    INDEX,
    SHARD_BYTES,
    SHARD_SIZE,
    _cut,
    _digest_of_names,
    _make_room,
    _mapped,
    _Together,
    _Whole,
    _whole_shards,
)
from vavae_tools.data.images import to_unit
from vavae_tools.data.loader import OrderedDataModule, _as_it_is, _leave_interrupts
from vavae_tools.runtime.console import tell
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import disk_errors, weights_digest, write_json, written_whole
from vavae_tools.runtime.machine import at_work
from vavae_tools.runtime.precision import PRECISIONS, Computing, for_inference, trying_convolutions
from vavae_tools.runtime.ranks import Ranks

_FORM = 2  # of the files; another form is another cache key
_DTYPES = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True)
class LatentFolder:
    """A folder of latents and what its index says.

    Attributes:
        key, weights: hashes of all that the latents follow from, and of the autoencoder's weights alone.
        mean, std: per channel, of the training side's plain latents (std with n − 1).
        shape: (C, h, w) of one latent.
        image_size: (height, width) in pixels of the pictures they were made of.
        people: name of a person or class → label.
        dtype: of the latents on the disk and on their way to the device, "float32" or "float16".
    """

    path: Path
    key: str
    weights: str
    mean: list[float]
    std: list[float]
    shape: tuple[int, int, int]
    image_size: tuple[int, int]
    flips: bool
    people: dict[str, int]
    names: dict[str, list[str]]
    shards: dict[str, list[str]]
    dtype: str = "float32"

    @property
    def num_classes(self) -> int:
        """One more than the largest label."""
        return max(self.people.values()) + 1

    @classmethod
    def read(cls, path: str | Path) -> "LatentFolder":
        """Read the index of a folder that `encode_latents` wrote.

        Raises:
            UserError: there are no latents, or their index is damaged.
        """
        index = Path(path) / INDEX
        if not index.is_file():
            raise UserError(f"No latents in {path} ({INDEX} is missing): encode the pictures first")
        try:
            entries = json.loads(index.read_text(encoding="utf-8"))
            entries["shape"], entries["image_size"] = tuple(entries["shape"]), tuple(entries["image_size"])
            return cls(path=Path(path), **entries)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{index} is damaged ({error!r}): delete it and encode the pictures again") from None

    def __str__(self) -> str:
        counts = ", ".join(f"{side} {len(names):,}" for side, names in self.names.items())
        shape = "×".join(map(str, self.shape))
        return f"Latents {shape} of pictures {self.image_size[0]}×{self.image_size[1]}: {counts} ({self.path})"


def encode_latents(
    autoencoder: nn.Module,
    pictures: OrderedDataModule,
    output_dir: str | Path,
    flips: bool = False,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = True,
    dtype: str = "float32",
    statistics: tuple[Tensor | Sequence[float], Tensor | Sequence[float]] | None = None,
    precision: str | None = None,
    ranks: Ranks | None = None,
    say: Callable[[str], None] = tell,
) -> LatentFolder:
    """Encode both sides once; latents that are there already and belong to these weights and pictures are kept.

    That holds for the whole shards of an encoding that was interrupted, too. Afterwards the autoencoder is on the
    device where it was, and what encoding took of a card's memory is given back.

    Args:
        autoencoder: has `encode_pictures(pictures, labels, normal)`, `downsampling`, `has_own_statistics`, and
            `picture_size` where it takes one size only. Each latent of a VAVAE is one sample of the posterior, as in
            LightningDiT, with the picture's own person's vector.
        pictures: any data module with `train_data`, `val_data` and `labels`, such as `datasets.PictureDataModule`.
        flips: also encode the mirrored pictures. A time–frequency picture is not its mirror, so not by default.
        seed: of the posterior samples.
        dtype: "float32", or "float16", half as large on the disk.
        statistics: mean and standard deviation per channel, such as published ones, in place of those of the training
            side. An autoencoder with statistics of its own needs none: its latents have mean 0 and deviation 1.
        precision: "32", "16" or "bf16"; None: "16" on a GPU, where a frozen encoder computes faster and about as
            exactly, and "32" on a CPU. What is not finite in half precision is encoded again in float32. With None
            latents that are there already are kept whatever their precision.
        ranks: those that all call this, with the same arguments, and share the work: each encodes its shards, on its
            own GPU where `device` is "cuda"; they hold the latents that one process alone would make. The folder must
            be on a disk that all of them see. By default this process works alone.

    Raises:
        UserError: the picture size does not fit the autoencoder, there is no space on the disk, latents that are not
            finite or that float16 cannot hold, settings that cannot be, or a process of several that has other weights
            or pictures than the first, or another disk.
    """
    output_dir = Path(output_dir)
    sides = {"train": pictures.train_data, "val": pictures.val_data}
    sides = {side: data for side, data in sides.items() if data is not None and len(data)}
    _check_fit(autoencoder, pictures.train_data.image_size)
    if dtype not in _DTYPES:
        raise UserError(f"dtype {dtype!r} of latents: expected one of {', '.join(_DTYPES)}")
    given = _flat(statistics) if statistics is not None else None
    together = _Together(ranks or Ranks())
    if together.size > 1 and str(device) == "cuda":
        device = f"cuda:{together.ranks.local_rank}"
    computing = Computing(precision, device, f"Latents of this {type(autoencoder).__name__}", say)
    weights = latents_digest(autoencoder)
    # the key of what is made comes first; those after it are as good where it was not said how to encode
    precisions = dict.fromkeys([computing.precision, *(PRECISIONS if precision is None else ())])
    extras = [{"dtype": dtype, "statistics": given, "precision": one} for one in precisions]
    keys = together.agree("keys", lambda: _cache_keys(autoencoder, weights, sides, flips, seed, extras))
    key = keys[0]
    together.check_equal("weights", weights)
    together.check_equal("pictures", _digest_of_names(sides))
    there = _complete(output_dir, keys)
    if together.count("complete", there is not None) == together.size:
        return there
    together.check_disk(output_dir)

    measured = _ChannelStatistics() if given is None and not autoencoder.has_own_statistics else None
    on_the_way = measured if together.size == 1 else None
    with at_work(autoencoder, device), trying_convolutions():
        model = for_inference(autoencoder.eval(), device)
        encoder = _Encoder(model, sides, flips, batch_size, device, seed, dtype, computing)
        encoder.shares = together.size > 1
        plan = _Plan(**together.agree("plan", lambda: asdict(_planned(encoder, output_dir, key, together.size, given))))
        _write_shards(encoder, plan, output_dir, key, on_the_way, pictures.num_workers, together, progress)

    def finish() -> None:
        if measured and not on_the_way:
            for name in plan.of_side("train"):
                measured.add(_mapped(output_dir / name)["latents"])
        channels = plan.shape[0]
        mean, std = given or (measured.mean_and_std() if measured else ([0.0] * channels, [1.0] * channels))
        index = {
            "key": key,
            "weights": weights,
            "mean": mean,
            "std": std,
            "shape": list(plan.shape),
            "image_size": list(pictures.train_data.image_size),
            "flips": flips,
            "people": pictures.labels,
            "names": {side: list(data.names) for side, data in sides.items()},
            "shards": {side: plan.of_side(side) for side in sides},
            "dtype": dtype,
        }
        write_json(output_dir / INDEX, index)

    together.agree("index", finish)
    until = time.monotonic() + 120
    while together.size > 1 and _complete(output_dir, keys) is None and time.monotonic() < until:
        time.sleep(0.5)  # another machine may remember for a while that nothing was there
    return LatentFolder.read(output_dir)


def _complete(folder: Path, keys: Sequence[str]) -> LatentFolder | None:
    """The latents of one of these keys, where all of them are there."""
    with suppress(UserError):  # no latents, or an index that is damaged: they are made anew
        there = LatentFolder.read(folder)
        if there.key in keys and all((folder / name).is_file() for names in there.shards.values() for name in names):
            return there
    return None


def _check_fit(autoencoder: nn.Module, image_size: tuple[int, int]) -> None:
    factor, wanted = autoencoder.downsampling, getattr(autoencoder, "picture_size", None)
    wanted = (wanted, wanted) if isinstance(wanted, int) else wanted
    if wanted is not None and tuple(image_size) != tuple(wanted):
        expected = f"it takes {wanted[0]}×{wanted[1]}"
    elif any(length % factor for length in image_size):
        expected = f"both must be divisible by {factor}"
    else:
        return
    name = type(autoencoder).__name__.replace("VAVAE", "VA-VAE")
    raise UserError(f"Pictures of {image_size[0]}×{image_size[1]} do not fit this {name}: {expected}")


def _flat(statistics: tuple[Tensor | Sequence[float], Tensor | Sequence[float]]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, in any shape such as (1, C, 1, 1), as numbers."""
    mean, std = (torch.as_tensor(values).double().flatten().tolist() for values in statistics)
    if not all(map(math.isfinite, mean + std)) or min(std, default=0) <= 0:
        raise UserError(
            "The statistics given for latents hold a number that is not finite, or a deviation of 0 or less"
        )
    return mean, std


@dataclass(frozen=True)
class _Plan:
    """What is made, in plain values.

    Attributes:
        shape: (C, h, w) of one latent.
        shards: name → first row on its side, and the one after its last.
        cuts: side → what it was cut for, see `_cut`.
        lacking: names of the shards that are not there yet.
    """

    shape: Sequence[int]
    shards: dict[str, Sequence[int]]
    cuts: dict[str, Sequence[int]]
    lacking: Sequence[str]

    def rows(self, name: str) -> range:
        return range(*self.shards[name])

    def of_side(self, side: str) -> list[str]:
        return [name for name in self.shards if name.startswith(side)]


def _planned(
    encoder: "_Encoder",
    folder: Path,
    key: str,
    processes: int,
    statistics: tuple[list[float], list[float]] | None,
) -> _Plan:
    """See what is there already, and delete what is stale."""
    whole = _whole_shards(folder, key)
    shape = next(iter(whole.values())).shape if whole else encoder.latent_shape()  # (C, h, w)
    if statistics and any(len(values) != shape[0] for values in statistics):
        count = " and ".join(str(len(values)) for values in statistics)
        raise UserError(f"The statistics have {count} numbers, latents of this autoencoder {shape[0]} channels")
    row_bytes = math.prod(shape) * encoder.dtype.itemsize * (1 + encoder.flips) + 8  # 8 for the label
    most = max(1, min(SHARD_SIZE, SHARD_BYTES // row_bytes))
    shards, cuts, kept = {}, {}, set()
    for side, data in encoder.sides.items():
        begun = next((shard.cut for name, shard in whole.items() if name.startswith(side)), None)
        cuts[side] = begun or ((processes, encoder.batch_size) if processes > 1 else _ALONE)
        for number, rows in enumerate(_cut(len(data), most, *cuts[side])):
            name = f"{side}-{number:05d}.safetensors"
            shards[name] = rows.start, rows.stop
            if whole.get(name) == _Whole(len(rows), shape, cuts[side]):
                kept.add(name)
    lacking = [name for name in shards if name not in kept]
    _make_room(folder, sum(len(range(*shards[name])) for name in lacking), row_bytes, kept)
    return _Plan(shape, shards, cuts, lacking)


def _write_shards(
    encoder: "_Encoder",
    plan: _Plan,
    folder: Path,
    key: str,
    measured: "_ChannelStatistics | None",
    num_workers: int,
    together: _Together,
    progress: bool,
) -> None:
    """Make this process's share of what lacks, a shard at a time, and wait for the others.

    `measured` sees all of the training side, as it is stored.
    """
    mine = set(plan.lacking[together.ranks.rank :: together.size])
    there = sum(len(plan.rows(name)) for name in plan.shards if name not in plan.lacking)
    hidden = None if progress and together.is_first else True
    total = sum(len(plan.rows(name)) for name in plan.shards)
    with tqdm(total=total, initial=there, desc="encoding", unit="picture", disable=hidden) as bar:

        def advance(count: int = 0) -> None:
            bar.update(there + together.add("encoded", count) - bar.n)

        for side, data in encoder.sides.items():
            names = plan.of_side(side)
            batches = encoder.batches(side, [plan.rows(name) for name in names if name in mine], num_workers)
            says = {"key": key} if tuple(plan.cuts[side]) == _ALONE else {"key": key, "cut": str([*plan.cuts[side]])}
            for name in names:
                rows = plan.rows(name)
                if name in mine:
                    shard = encoder.shard(rows, plan.shape, batches, advance)
                    shard["labels"] = data.labels[rows.start : rows.stop].clone()
                    with written_whole(folder / name) as partial, disk_errors():
                        save_file(shard, partial, metadata=says)
                elif measured:
                    shard = _mapped(folder / name)
                if measured and side == "train":
                    measured.add(shard["latents"])
                shard = None  # before the next one is made
        together.wait("encoded", meanwhile=advance)


class _Encoder:
    """Batches of pictures → latents as they are stored."""

    def __init__(
        self,
        autoencoder: nn.Module,
        sides: dict[str, Dataset],
        flips: bool,
        batch_size: int,
        device: str | torch.device,
        seed: int,
        dtype: str,
        computing: Computing,
    ) -> None:
        self.autoencoder, self.sides, self.flips = autoencoder, sides, flips
        self.batch_size, self.device, self.seed = batch_size, torch.device(device), seed
        self.dtype, self.computing = _DTYPES[dtype], computing
        self.shares = False
        """whether others encode some of the pictures, so that this process decodes its own alone"""
        self._first: tuple[list[int], dict[str, Tensor]] | None = None

    def latent_shape(self) -> tuple[int, ...]:
        """(C, h, w), of a first batch, which is then not encoded again."""
        data = self.sides["train"]
        rows = range(min(self.batch_size, SHARD_SIZE, len(data)))
        data = data.part(rows) if self.shares and hasattr(data, "part") else data
        latents = self._finished(self._begun(data.__getitems__(rows), "train"))
        self._first = (list(rows), latents)
        return tuple(latents["latents"].shape[1:])

    def batches(self, side: str, parts: list[range], num_workers: int) -> Iterator[dict[str, Tensor]]:
        """The latents of the rows of all parts; no batch has rows of two."""
        rows = [list(part[k : k + self.batch_size]) for part in parts for k in range(0, len(part), self.batch_size)]
        if side == "train" and self._first and rows[:1] == [self._first[0]]:
            yield self._first[1]
            rows = rows[1:]
        self._first = None
        data, places = self.sides[side], None
        if self.shares and rows and hasattr(data, "part"):
            places = torch.tensor([place for batch in rows for place in batch])
            data = data.part(places.tolist())
            rows = [part.tolist() for part in torch.arange(len(places)).split([len(batch) for batch in rows])]
            if num_workers and data.fits_memory():
                data.in_memory()  # now, once, and not in each worker
        loader = DataLoader(
            data,
            batch_sampler=rows,
            num_workers=num_workers if len(rows) > num_workers else 0,
            collate_fn=_as_it_is,
            worker_init_fn=_leave_interrupts,
        )
        begun = None
        for batch in loader:  # loaded while the device computes the one before, which is stored during this one
            if places is not None:
                batch["index"] = places[batch["index"]]
            latents = self._finished(begun) if begun else None
            begun = self._begun(batch, side)
            if latents:
                yield latents
        if begun:
            yield self._finished(begun)

    def shard(
        self,
        rows: range,
        shape: Sequence[int],
        batches: Iterator[dict[str, Tensor]],
        advance: Callable[[int], object],
    ) -> dict[str, Tensor]:
        """The latents of these rows, taken from `batches`; `advance` hears how many pictures each has."""
        names = ("latents", "latents_flip") if self.flips else ("latents",)
        shard = {name: torch.empty(len(rows), *shape, dtype=self.dtype) for name in names}
        done = 0
        while done < len(rows):
            latents = next(batches)
            count = len(latents["latents"])
            for name in names:
                shard[name][done : done + count] = latents[name]
            done += count
            advance(count)
        return shard

    @torch.inference_mode()
    def _begun(self, batch: dict[str, Tensor], side: str) -> dict[str, "_Begun"]:
        x, labels, index = (batch[name].to(self.device) for name in ("pictures", "labels", "index"))
        x, draws = to_unit(x), Draws(self.seed + list(self.sides).index(side), 0, index)

        def begin(x: Tensor, noise: str) -> _Begun:
            def encode() -> Tensor:
                return self.autoencoder.encode_pictures(x, labels, functools.partial(draws.normal, noise))

            latents = self.computing(encode)
            return _Begun(encode, latents, latents.abs().max())

        begun = {"latents": begin(x, "posterior")}
        if self.flips:
            begun["latents_flip"] = begin(x.flip(3), "posterior of the mirrored picture")
        return begun

    @torch.inference_mode()
    def _finished(self, begun: dict[str, "_Begun"]) -> dict[str, Tensor]:
        """Wait for the device; the latents as they are stored, on the CPU."""
        return {name: self._checked(*one) for name, one in begun.items()}

    def _checked(self, encode: Callable[[], Tensor], latents: Tensor, largest: Tensor) -> Tensor:
        largest = largest.item()
        if self.computing.in_half and not math.isfinite(largest):
            latents = self.computing.again(encode)
            largest = latents.abs().max().item()
        if not math.isfinite(largest):
            raise UserError(
                f"Latents of this {type(self.autoencoder).__name__} are not finite: its weights are damaged"
            )
        if largest > torch.finfo(self.dtype).max:
            raise UserError(f"Latents up to {largest:,.0f} are more than float16 holds (65,504): use float32")
        return latents.to(self.dtype).cpu()


class _Begun(NamedTuple):
    """A batch that the device may still be encoding: what encodes it, its latents and the largest number in them."""

    encode: Callable[[], Tensor]
    latents: Tensor
    largest: Tensor


class _ChannelStatistics:
    """Mean and standard deviation per channel over pictures, height and width, part by part in float64."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, latents: Tensor) -> None:
        for part in latents.split(64):  # a gigabyte of float16 would be four of float64
            values = part.double()  # (N, C, h, w)
            self.count += values[:, 0].numel()
            self.sum = self.sum + values.sum((0, 2, 3))
            self.squares = self.squares + values.square().sum((0, 2, 3))

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        mean = self.sum / self.count
        variance = (self.squares - self.count * mean.square()) / max(self.count - 1, 1)
        return mean.tolist(), variance.clamp_min(1e-12).sqrt().tolist()


def latents_digest(autoencoder: nn.Module) -> str:
    """A hash of the weights that the latents follow from, by which latents know the autoencoder that made them."""
    return weights_digest(autoencoder, getattr(autoencoder, "decoding_alone", ()))


def _cache_keys(
    autoencoder: nn.Module,
    weights: str,
    sides: dict[str, Dataset],
    flips: bool,
    seed: int,
    extras: Sequence[dict[str, Any]],
) -> list[str]:
    """The key for each of several settings; pictures are read once for all of them."""
    usual = {"dtype": "float32", "statistics": None, "precision": "32"}
    begin = hashlib.sha256(f"form {_FORM}, flips {flips}, seed {seed}, {weights}".encode())
    digests = [begin.copy() for _ in extras]
    for digest, extra in zip(digests, extras, strict=True):
        if extra != usual:  # so that what was encoded before there were such settings is kept
            digest.update(json.dumps(extra, sort_keys=True).encode())

    def update(content: bytes) -> None:
        for digest in digests:
            digest.update(content)

    if hasattr(autoencoder, "picture_size"):  # how it reads pictures is not among its weights
        config = {name: value for name, value in getattr(autoencoder, "config", {}).items() if name[0] != "_"}
        config = {name: value for name, value in config.items() if name not in ("latents_mean", "latents_std")}
        update(json.dumps(config, sort_keys=True).encode())
    for side, data in sides.items():
        update(f"{side} {data.image_size} {data.channels} {data.labels.tolist()}".encode())
        for part in data.contents():
            update(part)
    return [digest.hexdigest() for digest in digests]


class LatentDataset(Dataset):
    """One side's latents, memory-mapped: only the rows of a batch are read.

    A batch is {"latents": float32 (B, C, h, w) normalised by the training side's mean and std, "labels", "index"},
    and "latents_flip" where flips were encoded. `stored` gives the latents as they are on the disk.
    """

    def __init__(self, folder: LatentFolder, side: str) -> None:
        self._shards: list[dict[str, Tensor]] = []
        self.statistics = tuple(torch.tensor(values).view(-1, 1, 1) for values in (folder.mean, folder.std))
        """Mean and standard deviation, float32 (C, 1, 1) both."""
        for name in folder.shards.get(side, []):
            try:
                self._shards.append(_mapped(folder.path / name))
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{folder.path / name} cannot be read ({error}): delete {INDEX} and encode again"
                ) from None
        self.labels = torch.cat([torch.empty(0, dtype=torch.int64), *(shard["labels"] for shard in self._shards)])
        lengths = torch.tensor([len(shard["labels"]) for shard in self._shards], dtype=torch.int64)
        self._ends = lengths.cumsum(0)  # (shards,), each shard's first row and those before it make its end
        self._starts = self._ends - lengths

    def __len__(self) -> int:
        return len(self.labels)

    def _rows(self, key: str, index: Tensor) -> Tensor:
        if len(self._shards) == 1:
            return self._shards[0][key][index]
        shards = torch.searchsorted(self._ends, index, right=True)  # (B,)
        rows = self._shards[0][key].new_empty(len(index), *self._shards[0][key].shape[1:])
        for shard in shards.unique().tolist():
            here = shards == shard
            rows[here] = self._shards[shard][key][index[here] - self._starts[shard]]
        return rows  # (B, C, h, w)

    def stored(self, indices: Sequence[int]) -> dict[str, Tensor]:
        """Return a batch with its latents as they are stored: float16 or float32, not normalised."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        batch = {"latents": self._rows("latents", index), "labels": self.labels[index], "index": index}
        if self._shards and "latents_flip" in self._shards[0]:
            batch["latents_flip"] = self._rows("latents_flip", index)
        return batch

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        return normalised(self.stored(indices), *self.statistics)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}


def normalised(batch: dict[str, Tensor], mean: Tensor, std: Tensor) -> dict[str, Tensor]:
    """Return a batch with all float16 numbers as float32 and its latents normalised, on the device where they are.

    Args:
        batch: with "latents" as they are stored, and perhaps "latents_flip", (B, C, h, w); it is changed in place.
        mean, std: float32 (C, 1, 1), on the same device.
    """

    def value_of(name: str, value: Any) -> Any:
        value = value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value
        return value.sub_(mean).div_(std) if name in ("latents", "latents_flip") else value

    return {name: value_of(name, value) for name, value in batch.items()}


class StoredDataModule(OrderedDataModule):
    """A data module whose batches travel as they are stored and are normalised on the device.

    With float16 that is half the bytes to pin and to copy, and no arithmetic beside the training. What the module sees
    is what the data sets give: those have `stored` and `statistics` (see `LatentDataset`).
    """

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__(batch_size, num_workers, seed)
        self._statistics: dict[torch.device, tuple[Tensor, ...]] = {}

    def _loader(self, data: Dataset, order: Sampler | list[list[int]], batch_size: int) -> DataLoader:
        return super()._loader(_Stored(data), order, batch_size)

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, dataloader_idx: int) -> Any:
        """Copy a batch as it is stored, and normalise it there.

        Here and not in `on_after_batch_transfer`, which a module may have for itself: of that one Lightning calls the
        data module's alone.
        """
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        here = batch["latents"].device
        if here not in self._statistics:  # once: each copy makes the processor wait
            self._statistics[here] = tuple(values.to(here) for values in self.train_data.statistics)
        return normalised(batch, *self._statistics[here])


class _Stored(Dataset):
    """The batches of a data set as they are stored."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: Sequence[Any]) -> dict[str, Tensor]:
        return self.data.stored(indices)


class LatentDataModule(StoredDataModule):
    """Both sides of a folder of latents as batches for the denoiser.

    Args:
        folder: what `encode_latents` wrote.
        batch_size: latents per device and step.
    """

    def __init__(self, folder: str | Path | LatentFolder, batch_size: int = 64, num_workers: int = 0, seed: int = 0):
        super().__init__(batch_size, num_workers, seed)
        self.folder = folder if isinstance(folder, LatentFolder) else LatentFolder.read(folder)
        self.train_data = LatentDataset(self.folder, "train")
        self.val_data = LatentDataset(self.folder, "val")
        self.num_classes = self.folder.num_classes
