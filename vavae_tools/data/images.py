"""Picture folders as batches."""

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from vavae_tools.data.decoded import DecodedPictures
from vavae_tools.data.folders import PICTURE_EXTENSIONS, labels_of, list_folders
from vavae_tools.data.loading import loading_workers
from vavae_tools.data.order import OrderedDataModule
from vavae_tools.data.pixels import is_grey, readable
from vavae_tools.data.split import read_split_info
from vavae_tools.errors import UserError

_HANDFUL = 32  # pictures whose headers say what all are like


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
    with readable(path), Image.open(path) as picture:
        return is_grey(picture)


def _check_any(paths: Sequence[Path], folder: object, extensions: Collection[str]) -> None:
    if not paths:
        raise UserError(f"No pictures ({', '.join(extensions)}) in the folders of {folder}")


class PictureFiles(DecodedPictures):
    """Pictures in files; further arguments are those of `DecodedPictures`."""

    def __init__(self, paths: Sequence[Path], names: Sequence[str], labels: Tensor, **options: Any) -> None:
        super().__init__(names, labels, **options)
        self.paths = list(paths)

    def stored(self, places: Sequence[int]) -> list[Path]:
        return [self.paths[place] for place in places]

    def opened(self, stored: Path) -> Image.Image:
        return Image.open(stored)

    def what_is_stored(self) -> list:
        return [(name, path.stat().st_size) for name, path in zip(self.names, self.paths, strict=True)]

    def where(self, place: int) -> str:
        return str(self.paths[place])

    def part(self, places: Sequence[int]) -> Self:
        part = super().part(places)
        part.paths = [self.paths[place] for place in places]
        return part


class PictureFolder(PictureFiles):
    """Pictures of one folder per person, resized as a whole: nothing is cropped off their axes.

    Args:
        folder: holds `ID_1/ ID_2/ …` (one side of a split).
        image_size: pixels, one number or (height, width); pictures of other sizes are resized.
        labels: folder name → label; by default from the names in `folder`.
        channels: 3, or 1 for grey.
        extensions: which files are pictures.

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
        people = list_folders(self.folder, extensions)
        labels = labels or labels_of(list(people))
        paths = [path for name in people for path in people[name]]
        _check_any(paths, self.folder, extensions)
        names = [f"{path.parent.name}/{path.name}" for path in paths]
        of_each = torch.tensor([labels[path.parent.name] for path in paths], dtype=torch.int64)
        options = {"image_size": image_size, "channels": channels, "title": self.folder.name, "progress": progress}
        super().__init__(paths, names, of_each, **options)

    def fingerprint(self) -> str:
        """A hash of the pictures' names and lengths, and of the size and channels they are read with."""
        settings = [self.what_is_stored(), self.image_size, self.channels]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()


class PictureDataModule(OrderedDataModule):
    """The two sides of a split as batches.

    Args:
        data_dir: what `data_split.py` wrote: `train/`, `val/`, `split_info.json`.
        image_size: pixels, one number or (height, width).
        batch_size: pictures per device and step.
        num_workers: loading processes per device; by default 0 where the pictures fit into memory, else 4 at most.
        channels: 3, or 1 for grey; by default what the training side's pictures have.

    Attributes:
        remark: a line that says why there are fewer loading processes than cores; mostly empty.

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
        self.remark = ""
        if num_workers is None and not self.train_data.fits_memory():
            num_workers, self.remark = loading_workers(batch_size * self.train_data.row_bytes())
        super().__init__(batch_size, num_workers or 0, seed)
        self.labels = labels
        self.num_classes = max(labels.values()) + 1

    def fingerprint(self) -> str:
        """A hash of both sides (`PictureFolder.fingerprint`) and their labels."""
        sides = [side.fingerprint() for side in (self.train_data, self.val_data) if side is not None]
        return hashlib.sha256(json.dumps([sides, self.labels]).encode()).hexdigest()
