"""Pictures that no split was made of, as batches: a folder per class, tar shards, or a Hugging Face dataset."""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from vavae_tools.data import hugging_face, tar_shards
from vavae_tools.data.decoded import DecodedPictures
from vavae_tools.data.folders import (
    PICTURE_EXTENSIONS,
    contents,
    extension_of,
    labels_of,
    listed,
    natural_key,
    no_pictures,
    no_such_folder,
    person_folders,
)
from vavae_tools.data.images import PictureFiles
from vavae_tools.data.loading import loading_workers
from vavae_tools.data.order import OrderedDataModule
from vavae_tools.data.sides import choose_sides
from vavae_tools.data.split_report import INFO_NAME, Picture, read_split_info
from vavae_tools.errors import UserError

VALIDATION_SIDES = ("validation", "valid", "val", "dev", "test")
"""What the side that validates may be called; the first one there is taken."""
EXTENSIONS = (*PICTURE_EXTENSIONS, "bmp", "webp", "tif", "tiff", "ppm", "pgm")


class PictureSetDataModule(OrderedDataModule):
    """Two sides as batches, wherever their pictures come from.

    Args:
        train_data, val_data: the sides; None where nothing validates.
        labels: class name → label.
        batch_size: pictures per device and step.
        num_workers: loading processes per device; by default 0 where the pictures fit into memory, else what
            `loading_workers` finds.
        seed: of the order.

    Attributes:
        remark: a line that says why there are fewer loading processes than cores; mostly empty.
    """

    def __init__(
        self,
        train_data: DecodedPictures,
        val_data: DecodedPictures | None,
        labels: dict[str, int],
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        self.remark = ""
        self._finds_workers = num_workers is None
        super().__init__(batch_size, num_workers or 0, seed)
        self.train_data, self.val_data, self.labels = train_data, val_data, labels
        self.num_classes = max(labels.values()) + 1
        self._find_workers()

    def _find_workers(self) -> None:
        if self._finds_workers and not self.train_data.fits_memory():
            self.num_workers, self.remark = loading_workers(self.batch_size * self.train_data.row_bytes())

    def fingerprint(self) -> str:
        """A hash of both sides and their labels."""
        sides = [side.fingerprint() for side in (self.train_data, self.val_data) if side is not None]
        return hashlib.sha256(json.dumps([sides, self.labels]).encode()).hexdigest()

    def _loader(self, data: DecodedPictures, order: Sampler | None, batch_size: int) -> DataLoader:
        self._find_workers()  # again, for what has come `along` since then
        if self.num_workers and data.fits_memory():
            data.in_memory()  # now, once, and not in each worker
        return super()._loader(data, order, batch_size)


def picture_data(
    data_dir: str | Path,
    image_size: int | tuple[int, int] = 256,
    batch_size: int = 16,
    num_workers: int | None = None,
    seed: int = 0,
    use_hf_dataset: bool | None = None,
    train_split: str = "train",
    val_share: float = 0.05,
    crop: str | None = None,
    channels: int = 3,
    progress: bool = True,
) -> PictureSetDataModule:
    """The pictures in `data_dir` as a data module.

    `data_dir` is one of

    - a folder per class, with any names; pictures in folders below a class's own belong to it, as in torchvision's
      ImageFolder;
    - such folders in `train/`, and in `validation/ valid/ val/ dev/ test/` (the first one there) what validates;
    - tar files (WebDataset shards), in it or in folders of the same names, or with these words in the files' names;
      or the tar files themselves, as `data/train-{000..099}.tar` or `data/*.tar`: see `tar_shards`;
    - a split of `data_split.py`, whose labels are kept;
    - a dataset of Hugging Face's `datasets`, as `save_to_disk` writes it, alone or with the same sides.

    Classes are numbered by `folders.labels_of`, those of a Hugging Face ClassLabel or a tar's numbers as they say.

    Args:
        image_size: pixels, one number or (height, width).
        batch_size, num_workers: see `PictureSetDataModule`.
        seed: of the order, and of what is held out.
        use_hf_dataset: whether it is a Hugging Face dataset; None: see what is there.
        train_split: what the training side is called.
        val_share: where nothing validates, this share of each class is held out, chosen by seed and name: at least one
            picture of a class with two; 0 for none.
        crop: "adm", the centre (`crops.centre_crop`), or "none", the whole picture resized. By default "adm", but
            "none" for a split of `data_split.py`, since a spectrogram's axes must stay whole.
        channels: 3, or 1 for grey.

    Raises:
        UserError: nothing there, nothing that can be read, or settings that cannot be.
    """
    data_dir = Path(data_dir).expanduser()
    if not 0 <= val_share < 1:
        raise UserError(f"val_share {val_share:g}: expected a share from 0 to below 1, such as 0.05")
    names_shards = tar_shards.is_pattern(data_dir)
    if not names_shards and not data_dir.is_dir():
        raise UserError(no_such_folder(data_dir))
    is_dataset = hugging_face.is_dataset(data_dir)
    if use_hf_dataset and not is_dataset:
        there = "it names tar files" if names_shards else f"it holds {contents(data_dir)}"
        raise UserError(
            f"{data_dir} is no Hugging Face dataset; {there}. Expected what save_to_disk writes "
            f"({hugging_face.MARKS}); with use_hf_dataset=false tar files or a folder per class are read"
        )
    crop = crop or ("none" if (data_dir / INFO_NAME).is_file() else "adm")
    options = {"image_size": image_size, "crop": crop, "channels": channels, "progress": progress}
    if is_dataset and use_hf_dataset is not False:
        labels, train, val = hugging_face.read_sides(data_dir, train_split, VALIDATION_SIDES, **options)
    elif names_shards or _holds_shards_alone(data_dir, train_split):
        labels, train, val = tar_shards.read_sides(data_dir, train_split, VALIDATION_SIDES, EXTENSIONS, **options)
    else:
        labels, train, val = _read_folders(data_dir, train_split, options)
    if val is None:
        train, val = hold_out(train, val_share, seed)
    return PictureSetDataModule(train, val, labels, batch_size, num_workers, seed)


def _holds_shards_alone(data_dir: Path, train_split: str) -> bool:
    """Tar files; not beside folders of pictures, which they may have been unpacked to, nor in a split."""
    if (data_dir / INFO_NAME).is_file() or not tar_shards.holds_shards(data_dir, train_split):
        return False
    return not any(
        _files_by_class(folder, EXTENSIONS) for folder in (data_dir / train_split, data_dir) if folder.is_dir()
    )


def hold_out(data: DecodedPictures, share: float, seed: int = 0) -> tuple[DecodedPictures, DecodedPictures | None]:
    """What trains, and what validates: `share` of each class, chosen by seed and name.

    As in a split (`sides.choose_sides`): a class with two pictures or more has at least one on each side, and another
    picture more moves few others. Equal files stand on one side; pictures in tar files and Hugging Face datasets are
    not compared with each other, which would read all of them.
    """
    if not share:
        return data, None
    held = np.zeros(len(data), dtype=bool)
    for pictures in _held_apart(data):
        side_of = choose_sides(list(pictures.values()), share, seed)
        held[[place for place, picture in pictures.items() if side_of[picture.key] == "val"]] = True
    if not held.any():
        return data, None
    return data.part(np.flatnonzero(~held)), data.part(np.flatnonzero(held))


def _held_apart(data: DecodedPictures) -> Iterator[dict[int, Picture]]:
    """Place → picture, of those whose sides depend on each other: class by class where none equals another's.

    So a million are never described at once, which would be more memory than a process has.
    """
    contents = _equal_files(data.paths) if isinstance(data, PictureFiles) else {}
    of_each = [np.arange(len(data))] if contents else _places_by_label(data.labels.numpy())
    for places in of_each:
        yield {
            place: Picture(str(label), data.names[place], path="", bytes=0, mtime_ns=0, sha256=contents.get(place))
            for place, label in zip(places.tolist(), data.labels[places].tolist(), strict=True)
        }


def _places_by_label(labels: np.ndarray) -> list[np.ndarray]:
    order = np.argsort(labels, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(labels[order])) + 1)


def _equal_files(paths: Sequence[Path]) -> dict[int, str]:
    """Place → a hash of its contents, of those files alone that are as long as another one."""
    of_length: dict[int, list[int]] = {}
    for place, path in enumerate(paths):
        of_length.setdefault(path.stat().st_size, []).append(place)
    alike = [place for places in of_length.values() if len(places) > 1 for place in places]
    return {place: hashlib.sha256(paths[place].read_bytes()).hexdigest() for place in alike}


# ---- folders


def _read_folders(
    data_dir: Path, train_split: str, options: dict
) -> tuple[dict[str, int], PictureFiles, PictureFiles | None]:
    if (data_dir / INFO_NAME).is_file():
        info = read_split_info(data_dir)
        extensions, labels = info["image_extensions"], {name: int(label) for name, label in info["labels"].items()}
    else:
        extensions, labels = EXTENSIONS, None
    folder, val_folder = data_dir, None
    if _holds_folders(data_dir / train_split):
        folder = data_dir / train_split
        named = [data_dir / name for name in VALIDATION_SIDES if name != train_split]
        val_folder = next((side for side in named if _holds_folders(side)), None)
    elif train_split != "train" or labels is not None:
        raise UserError(f"No folders of pictures in {data_dir / train_split}; {data_dir} holds {contents(data_dir)}")
    train, val = _files_by_class(folder, extensions), _files_by_class(val_folder, extensions) if val_folder else {}
    if not train:
        raise UserError(no_pictures(folder, extensions, "data_dir"))
    labels = labels or labels_of(train)
    sides = []
    for side, files in ((folder, train), (val_folder, val)):
        unknown = files.keys() - labels.keys()
        if unknown:
            raise UserError(
                f"{side} holds {listed(sorted(unknown, key=natural_key))}, which is no class of {folder}: expected the "
                "same folders on both sides. Rename or move it"
            )
        paths = list(chain.from_iterable(files.values()))
        if paths:
            names = [path.relative_to(side).as_posix() for path in paths]
            of_paths = torch.tensor([labels[name] for name, of_class in files.items() for _ in of_class])
            sides.append(PictureFiles(paths, names, of_paths, title=side.name, **options))
    return labels, sides[0], sides[1] if len(sides) > 1 else None


def _holds_folders(folder: Path) -> bool:
    return folder.is_dir() and bool(person_folders(folder))


def _files_by_class(folder: Path, extensions: Collection[str]) -> dict[str, list[Path]]:
    """The classes with pictures, and their files at any depth, in natural order."""
    files = {name: list(_files_below(folder / name, extensions)) for name in person_folders(folder)}
    return {name: paths for name, paths in files.items() if paths}


def _files_below(folder: Path, extensions: Collection[str]) -> Iterable[Path]:
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_key)
        for name in sorted(names, key=natural_key):
            if extension_of(name) in extensions:
                yield Path(place, name)
