"""Latents: every picture encoded once, kept as safetensors shards, read memory-mapped.

A folder of latents holds `train-00000.safetensors … val-00000.safetensors` with LightningDiT's keys (`latents`,
`latents_flip` where flips were asked for, `labels`) and `latents.json`: the cache key, the pictures' names, and per
channel mean and standard deviation of the training side.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vavae_tools.data.images import PictureDataModule, PictureFolder, to_unit
from vavae_tools.data.order import OrderedDataModule
from vavae_tools.draws import Draws
from vavae_tools.errors import UserError
from vavae_tools.files import disk_errors, write_json, written_whole

SHARD_SIZE = 10_000
INDEX = "latents.json"
_FORM = 2  # of the files; another form is another cache key


@dataclass(frozen=True)
class LatentFolder:
    """A folder of latents and what its index says.

    Attributes:
        key, weights: hashes of all that the latents follow from, and of the autoencoder's weights alone.
        mean, std: per channel, of the training side's plain latents (std with n − 1).
        shape: (C, h, w) of one latent.
        image_size: (height, width) in pixels of the pictures they were made of.
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
    pictures: PictureDataModule,
    output_dir: str | Path,
    flips: bool = False,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    progress: bool = True,
) -> LatentFolder:
    """Encode both sides of a split once; latents that are there already and belong to these weights are kept.

    Args:
        autoencoder: a VAVAE: `encode(x, condition=…)`, `condition_vectors`, `config`. Each latent is one sample of
            the posterior, as in LightningDiT.
        pictures: the split; each picture is encoded with its own person's vector.
        flips: also encode the mirrored pictures. A time–frequency picture is not its mirror, so not by default.
        seed: of the posterior samples.

    Raises:
        UserError: the picture size does not fit the autoencoder.
    """
    output_dir = Path(output_dir)
    sides = {"train": pictures.train_data, "val": pictures.val_data}
    sides = {side: data for side, data in sides.items() if data is not None and len(data)}
    factor = autoencoder.downsampling
    if any(length % factor for length in pictures.train_data.image_size):
        height, width = pictures.train_data.image_size
        raise UserError(f"Pictures of {height}×{width} do not fit this VA-VAE: both must be divisible by {factor}")
    key = _cache_key(autoencoder, sides, flips, seed)
    with suppress(UserError):  # no latents, or an index that is damaged: they are made anew
        there = LatentFolder.read(output_dir)
        if there.key == key and all((output_dir / name).is_file() for names in there.shards.values() for name in names):
            return there
    autoencoder = autoencoder.to(device).eval()
    (output_dir / INDEX).unlink(missing_ok=True)  # what follows belongs to other weights or pictures: no mixture
    for old in [*output_dir.glob("train-*.safetensors"), *output_dir.glob("val-*.safetensors")]:
        old.unlink()
    shards: dict[str, list[str]] = {}
    statistics = _ChannelStatistics()
    total = sum(len(data) for data in sides.values())
    with tqdm(total=total, desc="encoding", unit="picture", disable=None if progress else True) as bar:
        for number, (side, data) in enumerate(sides.items()):
            shards[side] = []
            for start in range(0, len(data), SHARD_SIZE):
                rows = range(start, min(start + SHARD_SIZE, len(data)))
                shard = _encode_rows(autoencoder, data, rows, flips, batch_size, device, seed + number, bar)
                if side == "train":
                    statistics.add(shard["latents"])
                name = f"{side}-{start // SHARD_SIZE:05d}.safetensors"
                with written_whole(output_dir / name) as partial, disk_errors():
                    save_file(shard, partial)
                shards[side].append(name)
    mean, std = statistics.mean_and_std()
    index = {
        "key": key,
        "weights": weights_digest(autoencoder),
        "mean": mean,
        "std": std,
        "shape": list(shard["latents"].shape[1:]),
        "image_size": list(pictures.train_data.image_size),
        "flips": flips,
        "people": pictures.labels,
        "names": {side: data.names for side, data in sides.items()},
        "shards": shards,
    }
    write_json(output_dir / INDEX, index)
    return LatentFolder.read(output_dir)


@torch.inference_mode()
def _encode_rows(
    autoencoder: nn.Module,
    data: PictureFolder,
    rows: range,
    flips: bool,
    batch_size: int,
    device: str | torch.device,
    seed: int,
    bar: tqdm,
) -> dict[str, Tensor]:
    latents, latents_flip = [], []
    for start in range(rows.start, rows.stop, batch_size):
        batch = data.__getitems__(range(start, min(start + batch_size, rows.stop)))
        x = to_unit(batch["pictures"].to(device))
        labels, draws = batch["labels"].to(device), Draws(seed, 0, batch["index"].to(device))

        def encode(x: Tensor, name: str, labels: Tensor = labels, draws: Draws = draws) -> Tensor:
            return (
                autoencoder.encode_pictures(x, labels, functools.partial(draws.normal, name)).float().cpu().contiguous()
            )

        latents.append(encode(x, "posterior"))
        if flips:
            latents_flip.append(encode(x.flip(3), "posterior of the mirrored picture"))
        bar.update(len(x))
    shard = {"latents": torch.cat(latents), "labels": data.labels[rows.start : rows.stop].clone()}
    if flips:
        shard["latents_flip"] = torch.cat(latents_flip)
    return shard


class _ChannelStatistics:
    """Mean and standard deviation per channel over pictures, height and width, shard by shard in float64."""

    def __init__(self) -> None:
        self.count, self.sum, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, latents: Tensor) -> None:
        values = latents.double().transpose(0, 1).flatten(1)  # (C, N·h·w)
        self.count += values.shape[1]
        self.sum = self.sum + values.sum(1)
        self.squares = self.squares + values.square().sum(1)

    def mean_and_std(self) -> tuple[list[float], list[float]]:
        mean = self.sum / self.count
        variance = (self.squares - self.count * mean.square()) / max(self.count - 1, 1)
        return mean.tolist(), variance.clamp_min(1e-12).sqrt().tolist()


def weights_digest(autoencoder: nn.Module) -> str:
    """A hash of all weights, by which latents know the autoencoder that made them."""
    digest = hashlib.sha256()
    for name, tensor in sorted(autoencoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def _cache_key(autoencoder: nn.Module, sides: dict[str, PictureFolder], flips: bool, seed: int) -> str:
    digest = hashlib.sha256(f"form {_FORM}, flips {flips}, seed {seed}, {weights_digest(autoencoder)}".encode())
    for side, data in sides.items():
        digest.update(f"{side} {data.image_size} {data.channels} {data.labels.tolist()}".encode())
        for name, path in zip(data.names, data.paths, strict=True):
            digest.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


class LatentDataset(Dataset):
    """One side's latents, memory-mapped: only the rows of a batch are read.

    A batch is {"latents": float32 (B, C, h, w) normalised by the training side's mean and std, "labels", "index"},
    and "latents_flip" where flips were encoded.
    """

    def __init__(self, folder: LatentFolder, side: str) -> None:
        self.labels = torch.empty(0, dtype=torch.int64)
        self._shards: list[dict[str, Tensor]] = []
        self._starts: list[int] = []
        self._mean, self._std = (torch.tensor(values).view(-1, 1, 1) for values in (folder.mean, folder.std))
        for name in folder.shards.get(side, []):
            self._starts.append(len(self.labels))
            try:
                with safe_open(folder.path / name, framework="pt") as file:
                    self._shards.append({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{folder.path / name} cannot be read ({error}): delete {INDEX} and encode again"
                ) from None
            self.labels = torch.cat([self.labels, self._shards[-1]["labels"]])

    def __len__(self) -> int:
        return len(self.labels)

    def _rows(self, key: str, indices: Sequence[int]) -> Tensor:
        if len(self._shards) == 1:
            rows = self._shards[0][key][torch.as_tensor(indices)]
        else:
            shards = [max(k for k, start in enumerate(self._starts) if start <= i) for i in indices]
            rows = torch.stack(
                [self._shards[k][key][i - self._starts[k]] for k, i in zip(shards, indices, strict=True)]
            )
        return (rows - self._mean) / self._std

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        index = torch.as_tensor(indices, dtype=torch.int64)
        batch = {"latents": self._rows("latents", indices), "labels": self.labels[index], "index": index}
        if self._shards and "latents_flip" in self._shards[0]:
            batch["latents_flip"] = self._rows("latents_flip", indices)
        return batch

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}


class LatentDataModule(OrderedDataModule):
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
        self.num_classes = max(self.folder.people.values()) + 1
