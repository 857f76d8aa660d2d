"""Latents: every image encoded once, kept as safetensors shards, read memory-mapped.

In a folder of each key, `train-00000.safetensors … val-00000.safetensors` have LightningDiT's keys (`latents`,
`latents_flip` where flips were asked for, `labels`); `latents.json` is what `LatentFolder` holds.
"""

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler

from vavae_tools.data.encoded import EncodedFolder, Rows, Store, Tensors, agree, cut, encode, open_shard, subfolder
from vavae_tools.data.images import to_unit
from vavae_tools.data.loader import Batched, OrderedDataModule
from vavae_tools.runtime.console import print_beside_bars
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import weights_digest
from vavae_tools.runtime.machine import PRECISIONS, Computing, for_inference, on_device, trying_convolutions
from vavae_tools.runtime.ranks import Ranks

INDEX = "latents.json"
FIRST_SHARD = "train-00000.safetensors"
_FORM = 2  # of the files; another form is another cache key
Statistics = tuple[list[float], list[float]]  # mean and standard deviation per channel


@dataclass(frozen=True)
class LatentFolder(EncodedFolder):
    INDEX, CONTENTS = INDEX, "latents"
    weights: str  # a hash of those of the autoencoder
    mean: list[float]  # per channel, of the training subset's latents
    std: list[float]  # with n − 1
    shape: tuple[int, int, int]  # (C, h, w) of one latent
    image_size: tuple[int, int]
    flips: bool
    people: dict[str, int]  # name of a person or class → label
    names: dict[str, list[str]]
    shards: dict[str, list[str]]
    dtype: str = "float32"  # or "float16", on the disk and on the way to the device

    def __post_init__(self) -> None:
        for name in ("shape", "image_size"):  # lists in JSON
            object.__setattr__(self, name, tuple(getattr(self, name)))

    def files(self) -> list[str]:
        return [name for of_subset in self.shards.values() for name in of_subset]

    def __str__(self) -> str:
        counts = ", ".join(f"{subset} {len(names):,}" for subset, names in self.names.items())
        shape = "×".join(map(str, self.shape))
        return f"Latents {shape} of images {self.image_size[0]}×{self.image_size[1]}: {counts} ({self.path})"


def encode_latents(
    autoencoder: nn.Module,
    images: OrderedDataModule,
    output_dir: str | Path,
    flips: bool = False,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = True,
    dtype: str = "float32",
    statistics: Statistics | None = None,
    precision: str | None = None,
    ranks: Ranks | None = None,
    log: Callable[[str], None] = print_beside_bars,
    attached: Sequence[Path] = (),
    check: Callable[[str], None] = lambda key: None,
) -> LatentFolder:
    """Encode both subsets once; latents of these weights and images that are there already are kept.

    Of several encodings with one `output_dir` each has a folder of its own in it, by its key.

    Args:
        autoencoder: has `encode_images(images, labels, normal)` and `has_own_statistics`. Each latent of a VAVAE is one
            sample of the posterior, as in LightningDiT, with the image's own person's vector.
        images: any data module with `train_data`, `val_data` and `labels`.
        flips: also encode the mirrored images. A time–frequency image is not its mirror, so not by default.
        dtype: "float32", or "float16", half as large on the disk.
        statistics: such as published ones, in place of those of the training subset.
        precision: "32", "16" or "bf16"; None: "16" on a GPU, "32" on a CPU, and existing latents of any are kept.
        ranks: those that all call this and share the work, each on its own GPU where `device` is "cuda", on one disk.
        attached: folders of latents that are only read: whole ones are taken as they are, of others their shards.
        check: called with the latents' key before anything is encoded.

    Raises:
        UserError: no space on the disk, latents that are not finite or that float16 cannot hold, statistics of another
            number of channels, or a process with other weights or images than the first.
    """
    path, ranks, held = Path(output_dir), ranks or Ranks(), ExitStack()
    subsets = {"train": images.train_data, "val": images.val_data}
    subsets = {subset: data for subset, data in subsets.items() if data is not None and len(data)}
    size, names = images.train_data.image_size, {subset: list(data.names) for subset, data in subsets.items()}
    if ranks.size > 1 and str(device) == "cuda":
        device = f"cuda:{ranks.local_rank}"
    computing = Computing(precision, device, f"Latents of this {type(autoencoder).__name__}", log)
    weights = latents_digest(autoencoder)
    # the key of what is made comes first; those after it are as good where it was not said how to encode
    precisions = dict.fromkeys([computing.precision, *(PRECISIONS if precision is None else ())])
    extras = [{"dtype": dtype, "statistics": statistics, "precision": one} for one in precisions]

    def look() -> tuple[str, str | None]:
        keys = _cache_keys(autoencoder, subsets, f"form {_FORM}, flips {flips}, seed {seed}, {weights}", extras)
        found = next(filter(None, (LatentFolder.find(place, keys) for place in attached)), None)
        found = found or LatentFolder.find_or_lock(path, keys, held, log)
        check(found.key if found else keys[0])
        if found is None:
            return keys[0], None
        own = found.path.is_relative_to(path)  # which is elsewhere on another machine
        return keys[0], str(found.path.relative_to(path) if own else found.path.absolute())

    named = [[subset, names[subset], data.labels.tolist()] for subset, data in subsets.items()]
    identity = hashlib.sha256(f"{weights} {json.dumps(named)}".encode()).hexdigest()
    with held:
        key, complete = agree(ranks, look, identity)
        folder = path / (complete or subfolder(key))
        if complete is None:
            encoder = _Encoder(autoencoder.eval(), subsets, flips, seed, getattr(torch, dtype), computing)
            options = {"num_workers": images.num_workers, "ranks": ranks, "progress": progress, "others": attached}
            with on_device(autoencoder, device):
                shape, shards = encoder.write(folder, key, statistics, batch_size, **options)

            def write_index() -> None:
                own = ([0.0] * shape[0], [1.0] * shape[0]) if autoencoder.has_own_statistics else None
                made = (open_shard(folder / name)["latents"] for name in shards["train"])
                mean, std = statistics or own or channel_statistics(made)
                of = (weights, mean, std, shape, size, flips, images.labels, names, shards, dtype)
                LatentFolder(folder, key, *of).write()

            agree(ranks, write_index)
    Store(folder).wait_for([INDEX], ranks)
    return LatentFolder.read(folder)


@dataclass
class _Encoder:
    autoencoder: nn.Module
    subsets: dict[str, Dataset]
    flips: bool
    seed: int
    dtype: torch.dtype
    computing: Computing

    def fields(self, subset: str, batch: Tensors) -> Tensors:
        x, labels, index = (batch[name].to(self.computing.device) for name in ("images", "labels", "index"))
        x, draws = to_unit(x), Draws(self.seed + list(self.subsets).index(subset), 0, index)
        encode = self.autoencoder.encode_images
        made = {"latents": encode(x, labels, partial(draws.normal, "posterior"))}
        if self.flips:
            normal = partial(draws.normal, "posterior of the mirrored picture")
            made["latents_flip"] = encode(x.flip(3), labels, normal)
        return {**made, "labels": batch["labels"]}

    def write(
        self,
        folder: Path,
        key: str,
        statistics: Statistics | None,
        batch_size: int,
        others: Sequence[Path],
        **options: Any,
    ) -> tuple[list[int], dict[str, list[str]]]:
        """Make all shards; return the shape of a latent, and the names of each subset's shards; `options`: `encode`."""
        with torch.inference_mode():  # one image, for the shape
            one = self.subsets["train"].part([0]).get_batch([0])
            shape = list(self.computing(lambda: self.fields("train", one))["latents"].shape[1:])
        if statistics and any(len(values) != shape[0] for values in statistics):
            count = " and ".join(str(len(values)) for values in statistics)
            raise UserError(f"The statistics have {count} numbers, latents of this autoencoder {shape[0]} channels")
        row_bytes = math.prod(shape) * self.dtype.itemsize * (1 + self.flips) + 8  # 8 for the label
        shards = {name: cut(name, len(data), row_bytes, batch_size, key) for name, data in self.subsets.items()}
        for_inference(self.autoencoder, self.computing.device)
        store = Store(folder, others=[folder.parent, *folder.parent.glob("*/"), *others])
        with trying_convolutions():
            encode(store, shards, self.subsets, self.fields, self.computing, batch_size, self.dtype, **options)
        return shape, {subset: list(of_subset) for subset, of_subset in shards.items()}


def channel_statistics(parts: Iterable[Tensor]) -> Statistics:
    """Return mean and standard deviation per channel over all latents (N, C, h, w), in float64."""
    count, total, squares = 0, torch.zeros(()), torch.zeros(())
    for values in (values.double() for part in parts for values in part.split(64)):  # a part may be a gigabyte
        count += values[:, 0].numel()
        total = total + values.sum((0, 2, 3))
        squares = squares + values.square().sum((0, 2, 3))
    mean = total / count
    variance = (squares - count * mean.square()) / max(count - 1, 1)
    return mean.tolist(), variance.clamp_min(1e-12).sqrt().tolist()


def latents_digest(autoencoder: nn.Module) -> str:
    """Return a hash of the weights that the latents follow from, by which latents know their autoencoder."""
    return weights_digest(autoencoder, getattr(autoencoder, "decoding_alone", ()))


def _cache_keys(
    autoencoder: nn.Module, subsets: dict[str, Dataset], settings: str, extras: Sequence[dict[str, Any]]
) -> list[str]:
    """Return a key for each of several further settings; images are read once for all of them."""
    content = b""
    if hasattr(autoencoder, "image_size"):  # how it reads images is not among its weights
        config = {name: value for name, value in getattr(autoencoder, "config", {}).items() if name[0] != "_"}
        config = {name: value for name, value in config.items() if name not in ("latents_mean", "latents_std")}
        content = json.dumps(config, sort_keys=True).encode()
    for subset, data in subsets.items():
        about = f"{subset} {data.image_size} {data.channels} {data.labels.tolist()}"
        content = b"".join([content, about.encode(), *data.contents()])
    # nothing for these, so that what was encoded before there were such settings is kept
    usual = {"dtype": "float32", "statistics": None, "precision": "32"}
    added = ["" if extra == usual else json.dumps(extra, sort_keys=True) for extra in extras]
    return [hashlib.sha256((settings + extra).encode() + content).hexdigest() for extra in added]


class LatentDataset(Batched):
    """One subset's latents, memory-mapped: only the rows of a batch are read.

    A batch is {"latents": float32 (B, C, h, w) normalised by the training subset's mean and std, "labels", "index"},
    and "latents_flip" where flips were encoded; with `as_stored` the latents are as they are on the disk.
    """

    as_stored = False

    def __init__(self, folder: LatentFolder, subset: str) -> None:
        self.statistics = tuple(torch.tensor(values).view(-1, 1, 1) for values in (folder.mean, folder.std))
        """Mean and standard deviation, float32 (C, 1, 1) both."""
        files = folder.shards.get(subset, [])
        shards = [open_shard(folder.path / name) for name in files]
        folder.check(dict.fromkeys(files, folder.key))
        names = [name for name in ("latents", "latents_flip") if shards and name in shards[0]]
        self._rows = {name: Rows([shard[name] for shard in shards]) for name in names}
        self.labels = torch.cat([torch.empty(0, dtype=torch.int64), *(shard["labels"] for shard in shards)])

    def __len__(self) -> int:
        return len(self.labels)

    def stored(self, indices: Sequence[Any]) -> Tensors:
        """Return a batch with its latents as they are stored: float16 or float32, not normalised."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        rows = {name: rows[index] for name, rows in self._rows.items()}
        return {**rows, "labels": self.labels[index], "index": index}

    def get_batch(self, indices: Sequence[Any]) -> Tensors:
        batch = self.stored(indices)
        return batch if self.as_stored else normalised(batch, *self.statistics)


def normalised(batch: Tensors, mean: Tensor, std: Tensor) -> Tensors:
    """Return a batch with float32 in place of float16, and its latents normalised in place; mean, std: (C, 1, 1)."""
    batch = {name: value.float() if value.dtype == torch.float16 else value for name, value in batch.items()}
    for name in batch.keys() & {"latents", "latents_flip"}:
        batch[name] = batch[name].sub_(mean).div_(std)
    return batch


class LatentDataModule(OrderedDataModule):
    """Both subsets of a folder of latents as batches for the denoiser.

    Batches travel as they are stored and are normalised on the device: with float16 that is half the bytes to pin and
    to copy, and no arithmetic beside the training.
    """

    def __init__(self, folder: str | Path | LatentFolder, batch_size: int = 64, num_workers: int = 0, seed: int = 0):
        super().__init__(batch_size, num_workers, seed)
        self.folder = folder if isinstance(folder, LatentFolder) else LatentFolder.read(folder)
        self.train_data, self.val_data = (LatentDataset(self.folder, subset) for subset in ("train", "val"))
        self.num_classes = max(self.folder.people.values()) + 1
        self._statistics: dict[torch.device, tuple[Tensor, ...]] = {}

    def _loader(self, data: LatentDataset, order: Sampler | list[list[int]], batch_size: int) -> DataLoader:
        data = copy.copy(data)
        data.as_stored = True
        return super()._loader(data, order, batch_size)

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, dataloader_idx: int) -> Any:
        """Copy a batch, and normalise it there: `on_after_batch_transfer` of a data module would hide the module's."""
        batch = super().transfer_batch_to_device(batch, device, dataloader_idx)
        here = batch["latents"].device
        if here not in self._statistics:  # once: each copy makes the processor wait
            self._statistics[here] = tuple(values.to(here) for values in self.train_data.statistics)
        return normalised(batch, *self._statistics[here])
