"""Pictures that no split was made of, as batches: a folder per class, train/ and val/, or a Hugging Face dataset."""

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Sampler

from vavae_tools.data import hugging_face
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
        num_workers: loading processes per device; by default 0 where the pictures fit into memory, else 4 at most.
        seed: of the order.
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
        if num_workers is None:
            num_workers = 0 if train_data.fits_memory() else min(4, os.cpu_count() or 1)
        super().__init__(batch_size, num_workers, seed)
        self.train_data, self.val_data, self.labels = train_data, val_data, labels
        self.num_classes = max(labels.values()) + 1

    def fingerprint(self) -> str:
        """A hash of both sides and their labels."""
        sides = [side.fingerprint() for side in (self.train_data, self.val_data) if side is not None]
        return hashlib.sha256(json.dumps([sides, self.labels]).encode()).hexdigest()

    def _loader(self, data: DecodedPictures, order: Sampler | None, batch_size: int) -> DataLoader:
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
    - a split of `data_split.py`, whose labels are kept;
    - a dataset of Hugging Face's `datasets`, as `save_to_disk` writes it, alone or with the same sides.

    Classes are numbered by `folders.labels_of`, those of a Hugging Face ClassLabel as it says.

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
    if not data_dir.is_dir():
        raise UserError(no_such_folder(data_dir))
    is_dataset = hugging_face.is_dataset(data_dir)
    if use_hf_dataset and not is_dataset:
        raise UserError(
            f"{data_dir} is no Hugging Face dataset; it holds {contents(data_dir)}. Expected what save_to_disk writes "
            f"({hugging_face.MARKS}); with use_hf_dataset=false a folder per class is read"
        )
    crop = crop or ("none" if (data_dir / INFO_NAME).is_file() else "adm")
    options = {"image_size": image_size, "crop": crop, "channels": channels, "progress": progress}
    if is_dataset and use_hf_dataset is not False:
        labels, train, val = hugging_face.read_sides(data_dir, train_split, VALIDATION_SIDES, **options)
    else:
        labels, train, val = _read_folders(data_dir, train_split, options)
    if val is None:
        train, val = hold_out(train, val_share, seed)
    return PictureSetDataModule(train, val, labels, batch_size, num_workers, seed)


def hold_out(data: DecodedPictures, share: float, seed: int = 0) -> tuple[DecodedPictures, DecodedPictures | None]:
    """What trains, and what validates: `share` of each class, chosen by seed and name.

    As in a split (`sides.choose_sides`): a class with two pictures or more has at least one on each side, equal files
    stand on one side, and another picture more moves few others.
    """
    if not share:
        return data, None
    contents = _equal_files(data.paths) if isinstance(data, PictureFiles) else {}
    pictures = [
        Picture(str(label), name, path="", bytes=0, mtime_ns=0, sha256=contents.get(place))
        for place, (label, name) in enumerate(zip(data.labels.tolist(), data.names, strict=True))
    ]
    side_of = choose_sides(pictures, share, seed)
    held = [place for place, picture in enumerate(pictures) if side_of[picture.key] == "val"]
    if not held:
        return data, None
    held_out = set(held)
    return data.part([place for place in range(len(data)) if place not in held_out]), data.part(held)


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
