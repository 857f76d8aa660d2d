"""Picture folders as batches; the one place where pixels become numbers in [-1, 1] and pictures again."""

import hashlib
import json
import os
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vavae_tools.data.folders import PICTURE_EXTENSIONS, labels_of, list_folders
from vavae_tools.data.order import OrderedDataModule
from vavae_tools.data.split import read_split_info
from vavae_tools.errors import UserError
from vavae_tools.files import written_whole

_HANDFUL = 32  # pictures whose headers say what all are like

MEMORY_LIMIT = 4 * 2**30
"""Decoded pictures up to this many bytes are kept in memory: 21,000 of 256×256, a seventh of what Kaggle has."""


def to_unit(pixels: Tensor) -> Tensor:
    """Pixels uint8 0…255 → float32 in [-1, 1], any shape."""
    return pixels.float().div_(127.5).sub_(1.0)


def to_pixels(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] (what lies outside is clipped) → uint8 0…255, rounded, any shape."""
    return pictures.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def is_grey(picture: Image.Image) -> bool:
    """Whether a Pillow picture is stored in grey: black and white, 8, 16 or 32 bits, with or without alpha."""
    return Image.getmodebase(picture.mode) == "L"


def in_channels(picture: Image.Image, channels: int) -> Image.Image:
    """A Pillow picture with 3 channels (RGB) or 1 (grey, mode L), 8 bits each.

    Of 16 bits, 65,535 becomes white, and what lies above it in 32 bits too. Alpha is dropped: a transparent pixel keeps
    the colour that it is stored with.
    """
    if picture.mode.startswith("I"):  # integers of 16 or 32 bits, of which Pillow's own conversion makes 255 white
        array = (np.asarray(picture).clip(0, 65535).astype(np.uint32) + 128) // 257
        picture = Image.fromarray(array.astype(np.uint8))
    return picture.convert("RGB" if channels == 3 else "L")


def channels_of(pictures: str | Path | Sequence[Path], extensions: Collection[str] = PICTURE_EXTENSIONS) -> int:
    """1 where pictures are stored in grey, else 3: what the headers of a few, spread over the folders, say.

    Grey and coloured ones together have 3 channels, and so have pictures with a palette.

    Args:
        pictures: a folder that holds `ID_1/ ID_2/ …`, or files.
        extensions: which files of a folder are pictures.

    Raises:
        UserError: no such folder, no pictures in it, or a file that is none.
    """
    where = pictures
    if isinstance(pictures, str | Path):
        pictures = [path for paths in list_folders(pictures, extensions).values() for path in paths]
    _check_any(pictures, where, extensions)
    some = pictures[:: max(1, len(pictures) // _HANDFUL)]
    return 1 if all(map(_file_is_grey, some)) else 3


def _file_is_grey(path: Path) -> bool:
    with _naming(path), Image.open(path) as picture:
        return is_grey(picture)


def _check_any(paths: Sequence[Path], folder: object, extensions: Collection[str]) -> None:
    if not paths:
        raise UserError(f"No pictures ({', '.join(extensions)}) in the folders of {folder}")


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(
            f"{path} cannot be read as a picture ({error}). data_split.py names such files and leaves them out"
        ) from None


def read_picture(path: Path, size: tuple[int, int], channels: int = 3) -> np.ndarray:
    """Read one picture as uint8 (height, width, channels), resized as a whole: nothing is cropped off its axes.

    Args:
        size: (height, width) in pixels.
        channels: 3, or 1 for grey; see `in_channels`.

    Raises:
        UserError: the file cannot be decoded.
    """
    with _naming(path), Image.open(path) as picture:
        picture = in_channels(picture, channels)
    if picture.size != (size[1], size[0]):
        picture = picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)
    return np.asarray(picture).reshape(*size, channels)


def save_picture(pixels: Tensor, path: Path) -> None:
    """Write one picture, uint8 (C, H, W), under `path` (its ending names the format); it is whole or not there."""
    array = pixels.permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)
    with written_whole(path) as partial:
        picture.save(partial, format=Image.registered_extensions()[path.suffix.lower()], quality=95)


class PictureFolder(Dataset):
    """Pictures of one folder per person; decoded once and kept in memory where they fit.

    Args:
        folder: holds `ID_1/ ID_2/ …` (one side of a split).
        image_size: pixels, one number or (height, width); pictures of other sizes are resized.
        labels: folder name → label; by default from the names in `folder`.
        channels: 3, or 1 for grey.
        extensions: which files are pictures.

    Attributes:
        along: further tensors with a row for each picture, in the order of `paths`, such as cached features; empty at
            first. Memory-mapped ones stay on the disk: only the rows of a batch are read.

    A batch is {"pictures": uint8 (B, C, H, W), "labels": int64 (B,), "index": int64 (B,)}, and the rows of `along`
    under their own names.

    Raises:
        UserError: no such folder, no pictures in it, or a picture that cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: int | tuple[int, int],
        labels: dict[str, int] | None = None,
        channels: int = 3,
        progress: bool = True,
        extensions: Collection[str] = PICTURE_EXTENSIONS,
    ) -> None:
        self.folder = Path(folder)
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        self.channels = channels
        people = list_folders(self.folder, extensions)
        labels = labels or labels_of(list(people))
        self.paths = [path for name in people for path in people[name]]
        self.names = [f"{path.parent.name}/{path.name}" for path in self.paths]
        self.labels = torch.tensor([labels[path.parent.name] for path in self.paths], dtype=torch.int64)
        _check_any(self.paths, self.folder, extensions)
        self.along: dict[str, Tensor] = {}
        self._progress = progress
        self._memory: Tensor | None = None

    def __len__(self) -> int:
        return len(self.paths)

    def in_memory(self) -> Tensor:
        """All pictures, uint8 (N, C, H, W), decoded by several threads on the first call."""
        if self._memory is None:
            memory = np.empty((len(self), *self.image_size, self.channels), dtype=np.uint8)

            def decode(i: int) -> None:
                memory[i] = read_picture(self.paths[i], self.image_size, self.channels)

            with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow decodes without the interpreter's lock
                done = pool.map(decode, range(len(self)))
                description = f"reading {self.folder.name}"
                hidden = True if not self._progress or len(self) < 500 else None
                for _ in tqdm(done, description, total=len(self), unit="picture", disable=hidden):
                    pass
            self._memory = torch.from_numpy(memory).permute(0, 3, 1, 2)  # (N, C, H, W)
        return self._memory

    def fingerprint(self) -> str:
        """A hash of the pictures' names and lengths, and of the size and channels they are read with."""
        files = [(name, path.stat().st_size) for name, path in zip(self.names, self.paths, strict=True)]
        return hashlib.sha256(json.dumps([files, self.image_size, self.channels]).encode()).hexdigest()

    def fits_memory(self) -> bool:
        return len(self) * self.image_size[0] * self.image_size[1] * self.channels <= MEMORY_LIMIT

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        index = torch.as_tensor(indices, dtype=torch.int64)
        if self.fits_memory():
            pictures = self.in_memory()[index]
        else:
            decoded = [read_picture(self.paths[i], self.image_size, self.channels) for i in indices]
            pictures = torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2)
        along = {name: rows[index] for name, rows in self.along.items()}
        return {"pictures": pictures, "labels": self.labels[index], "index": index, **along}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def few_of_each(self, count: int) -> dict[str, Tensor]:
        """A batch of the first `count` pictures when taken from one person after the other: for previews."""
        rows: dict[int, list[int]] = {}
        for place, label in enumerate(self.labels.tolist()):
            rows.setdefault(label, []).append(place)
        in_turn = [row for turn in zip_longest(*rows.values()) for row in turn if row is not None]
        return self.__getitems__(in_turn[:count])


class PictureDataModule(OrderedDataModule):
    """The two sides of a split as batches.

    Args:
        data_dir: what `data_split.py` wrote: `train/`, `val/`, `split_info.json`.
        image_size: pixels, one number or (height, width).
        batch_size: pictures per device and step.
        num_workers: loading processes per device; by default 0 where the pictures fit into memory, else 4 at most.
        channels: 3, or 1 for grey; by default what the training side's pictures have.

    Raises:
        UserError: the folder holds no split.
    """

    def __init__(
        self,
        data_dir: str | Path,
        image_size: int | tuple[int, int],
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
        channels: int | None = None,
    ) -> None:
        info = read_split_info(data_dir)
        labels = {name: int(label) for name, label in info["labels"].items()}
        channels = channels or channels_of(Path(data_dir) / "train", info["image_extensions"])
        options = {"labels": labels, "channels": channels, "extensions": info["image_extensions"]}
        self.train_data = PictureFolder(Path(data_dir) / "train", image_size, **options)
        val_folder = Path(data_dir) / "val"
        has_validation = val_folder.is_dir() and any(list_folders(val_folder, info["image_extensions"]).values())
        self.val_data = PictureFolder(val_folder, image_size, **options) if has_validation else None
        if num_workers is None:
            num_workers = 0 if self.train_data.fits_memory() else min(4, os.cpu_count() or 1)
        super().__init__(batch_size, num_workers, seed)
        self.labels = labels
        self.num_classes = max(labels.values()) + 1

    def fingerprint(self) -> str:
        """A hash of both sides (`PictureFolder.fingerprint`) and their labels."""
        sides = [side.fingerprint() for side in (self.train_data, self.val_data) if side is not None]
        return hashlib.sha256(json.dumps([sides, self.labels]).encode()).hexdigest()
