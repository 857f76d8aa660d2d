"""Images as batches, wherever they are: a split, a folder per class, a Hugging Face dataset; with captions."""

import hashlib
import os
from collections import Counter
from collections.abc import Collection
from itertools import chain
from pathlib import Path
from typing import Any
from unicodedata import normalize

import numpy as np
import torch

from vavae_tools.data import folders
from vavae_tools.data.captions import CaptionedDataModule
from vavae_tools.data.demo.shapes import captioned_shape_data, shape_data
from vavae_tools.data.folders import contents, count_of, no_such_folder
from vavae_tools.data.images import DecodedImages, ImageFiles, ImageSetDataModule
from vavae_tools.data.sources import captioned, hugging_face
from vavae_tools.data.sources.shards import refuse_shards
from vavae_tools.data.split import choose_subsets
from vavae_tools.data.split_report import INFO_NAME, ImageEntry, read_split_info
from vavae_tools.runtime.errors import UserError, check_known, in_home, join_first


class ImageDataModule(ImageSetDataModule):
    """The images in `data_dir` as batches, which is one of

    - a folder per class, with any names, which owns the images at any depth in it;
    - such folders in `train/`, and in `validation/ valid/ val/ dev/ test/` (the first one there) what validates, also
      as `Training/`, `test_set/` and the like (`folders.subset_named`); `test/` beside another one is `test_data`;
    - a split of `data_split.py`, whose labels are kept;
    - a dataset of Hugging Face's `datasets`, as `save_to_disk` writes it, alone or with the same subsets.

    Classes are numbered by `folders.labels_of`, those of a Hugging Face ClassLabel as it says.

    Args:
        image_size: pixels, one number or (height, width).
        seed: of the order, and of what is held out.
        use_hf_dataset: whether it is a Hugging Face dataset; None: look.
        train_split: the name of the training subset, or the share of it that trains while the rest validates.
        val_share: where nothing validates, this share of each class is held out; by default 0.05, and 0 for a split.
        crop: "adm", the centre, or "none", the whole image resized; by default "adm", and "none" for a split.
        channels: 3, or 1 for grey; by default what the training subset's images have.
    """

    def __init__(
        self,
        data_dir: str | Path,
        image_size: int | tuple[int, int] = 256,
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
        channels: int | None = None,
        use_hf_dataset: bool | None = None,
        train_split: str | float = "train",
        val_share: float | None = None,
        crop: str | None = None,
        progress: bool = True,
    ) -> None:
        data_dir = in_home(data_dir)
        if not folders.is_utf8(data_dir.absolute()):
            raise UserError(f"data_dir {str(data_dir)!a} has a name that is no UTF-8: rename it")
        is_split = (data_dir / INFO_NAME).is_file()
        share = None if (data_dir / str(train_split)).is_dir() else training_share(train_split)
        if share is not None:
            if val_share not in (None, round(1 - share, 9)):
                found = f"train_split {share:g} and val_share {val_share:g} do not add up to 1"
                raise UserError(f"{found}: leave one of them out")
            train_split, val_share = "train", round(1 - share, 9)
        elif val_share is None:
            val_share = 0 if is_split else 0.05
        options = {"image_size": image_size, "crop": crop or ("none" if is_split else "adm"), "progress": progress}
        labels, train, *others = _read_subsets(data_dir, use_hf_dataset, train_split, options)
        set_white(train, *others[:1])
        for subset in (train, *others):
            subset.channels = channels = channels or train.stored_channels()
            subset.white = train.white
        own = others and share in (None, 1)
        subsets = (train, others[0]) if own else hold_out(train, val_share, seed)
        super().__init__(*subsets, labels, batch_size, num_workers, seed)
        self.test_data = others[1] if others[1:] else None
        self.notes = [note for subset in (train, *others) for note in subset.notes]
        self.notes += _in_both(*subsets) if own and not is_split else []


image_data = ImageDataModule


def class_data(
    data_dir: str | Path, image_size: Any = None, num_images: int = 1024, num_classes: int = 4, **options: Any
) -> ImageSetDataModule:
    """Return `ImageDataModule(data_dir, …)`, or for "shapes" `num_images` made-up ones of 32×32 (`shape_data`)."""
    if str(data_dir) != "shapes":
        return ImageDataModule(data_dir, image_size or 256, **options)
    names = ("batch_size", "num_workers", "seed", "channels", "val_share")
    own = {name: options[name] for name in names if options.get(name) is not None}
    if share := training_share(options.get("train_split", "train")):
        own["val_share"] = 1 / share - 1  # of the images that train
    return shape_data(num_images, num_classes, image_size or 32, **own)


def _read_subsets(data_dir: Path, use_hf_dataset: bool | None, train_split: str, options: dict[str, Any]) -> tuple:
    """Return class name → label, the subset that trains and, where they are there, those that validate and test."""
    if not data_dir.is_dir():
        refuse_shards(data_dir)
        raise UserError(no_such_folder(data_dir))
    is_dataset = hugging_face.is_dataset(data_dir)
    if is_dataset and use_hf_dataset is not False:
        return hugging_face.read_subsets(data_dir, train_split, **options)
    if use_hf_dataset:
        refuse_shards(data_dir)
        found = f"{data_dir} is no Hugging Face dataset; it holds {contents(data_dir)}"
        expected = f"{hugging_face.SAVED_DATASET_FILES}; use_hf_dataset=false reads a folder per class"
        raise UserError(f"{found}. Expected {expected}")
    return _read_folders(data_dir, train_split, options)


def training_share(train_split: str | float) -> float | None:
    """Return the share of the data that trains, if `train_split` is one and no name."""
    try:
        share = float(train_split)
    except ValueError:
        return None
    if not 0 < share <= 1:
        raise UserError(f"train_split {train_split}: expected a subset's name, or a share above 0 to 1, such as 0.95")
    return share


def set_white(*subsets: DecodedImages) -> None:
    """Give images of more than 8 bits one white in all subsets."""
    whites = [white for subset in subsets if (white := subset.stored_white())]
    for subset in subsets:
        subset.white = max(whites, default=None)


def hold_out(data: DecodedImages, share: float, seed: int = 0) -> tuple[DecodedImages, DecodedImages | None]:
    """Return what trains, and what validates: `share` of each class, chosen by seed and name as in a split.

    Equal images are in one subset: by their pixels where all fit into memory, else by their files' contents.
    """
    if not 0 <= share < 1:
        raise UserError(f"val_share {share:g}: expected a share from 0 to below 1, such as 0.05")
    if not share:
        return data, None
    counts = Counter(data.sizes()) if isinstance(data, ImageFiles) else {}
    hashes = _file_hashes(data, {length for length, count in counts.items() if count > 1})
    pixels = data.pixel_hashes() if data.fits_memory() else [None] * len(data)
    rows = enumerate(zip(data.labels.tolist(), data.names, pixels, strict=True))
    images = [ImageEntry(str(a), name, "", 0, sha256=hashes.get(place), pixels=b) for place, (a, name, b) in rows]
    subset_of = choose_subsets(images, share, seed)
    held = np.array([subset_of[image.key] == "val" for image in images])
    if not held.any():
        return data, None
    return data.part(np.flatnonzero(~held)), data.part(np.flatnonzero(held))


def _file_hashes(data: DecodedImages, lengths: Collection[int]) -> dict[int, str]:
    """Return a hash of each file that has one of these lengths, by its place: others are not read."""
    files = enumerate(zip(data.paths, data.sizes(), strict=True)) if lengths else ()
    return {n: hashlib.sha256(path.read_bytes()).hexdigest() for n, (path, length) in files if length in lengths}


def _in_both(train: DecodedImages, val: DecodedImages) -> list[str]:
    """Return a line to say where files of somebody's own two subsets are the same, as far as all fit into memory."""
    if not (isinstance(train, ImageFiles) and isinstance(val, ImageFiles) and train.fits_memory()):
        return []
    lengths = set(train.sizes()) & set(val.sizes())
    trained = {digest: place for place, digest in _file_hashes(train, lengths).items()}
    same = [(place, trained[digest]) for place, digest in _file_hashes(val, lengths).items() if digest in trained]
    if not same:
        return []
    found = f"{count_of(len(same), 'image')} of {val.folder} also in {train.folder}"
    pair = f"{val.names[same[0][0]]} = {train.names[same[0][1]]}"
    return [f"warning: {found}, such as {pair}: what validates is to be new to the training; leave them out there"]


def _read_folders(data_dir: Path, train_split: str, options: dict[str, Any]) -> tuple:
    is_split, extensions, labels = (data_dir / INFO_NAME).is_file(), folders.EXTENSIONS, None
    if is_split:
        info = read_split_info(data_dir)
        extensions, labels = info["image_extensions"], {name: int(label) for name, label in info["labels"].items()}
    subsets = []
    for root in _subset_folders(data_dir, train_split, is_split, extensions):
        homes = {name: [name] for name in folders.person_folders(root)} if is_split else folders.persons(root)
        passed = None if is_split else folders.passed_over(root)
        below = {
            person: [p for name in names for p in folders.files_below(root / name, extensions, root, passed=passed)]
            for person, names in homes.items()
        }
        files = {person: of_person for person, of_person in below.items() if of_person}
        if not files and not subsets:
            refuse_shards(data_dir)
            raise UserError(folders.explain_no_images(root, extensions, "data_dir"))
        labels = labels or folders.labels_of(files)
        composed = {normalize("NFC", name): label for name, label in labels.items()}
        label_of = {person: labels.get(person, composed.get(normalize("NFC", person))) for person in files}
        if unknown := [person for person, label in label_of.items() if label is None]:
            first = f"{subsets[0].folder if subsets else INFO_NAME}: expected the same folders in both"
            raise UserError(f"{root} holds {join_first(unknown)}, which is no class of {first}")
        if files:
            names = [path.relative_to(root).as_posix() for path in chain.from_iterable(files.values())]
            of_names = torch.tensor([label_of[person] for person, of_person in files.items() for _ in of_person])
            subsets.append(ImageFiles(root, names, of_names, of_split=is_split, **options))
            subsets[-1].notes = folders.note_of_passed(passed or [], data_dir)
    return labels, *subsets


def _subset_folders(data_dir: Path, train_split: str, is_split: bool, extensions: Collection[str]) -> list[Path]:
    """Return the folder that trains and, if they are there, those that validate and test, with a folder per class."""
    people = folders.person_folders(data_dir)
    names = folders.choose_subset_names(people, train_split)
    holding = [data_dir / name for name in names if folders.person_folders(data_dir / name)]
    if holding and holding[0].name == names[0]:
        return holding[:2] + [folder for folder in holding[2:] if folders.subset_named(folder.name) == "test"][:1]
    if train_split != "train" or is_split:
        found = f"No folders of images in {data_dir / train_split}; {data_dir} holds {contents(data_dir)}"
        raise UserError(f"{found}: train_split is one of them, or a share such as 0.95")
    flat = any(folders.image_entries(data_dir / name, extensions) for name in people)
    folders.refuse_subsets_as_persons(data_dir, people, hold_folders=not flat)
    for name in filter(folders.subset_named, people):
        if same := sorted(set(folders.person_folders(data_dir / name)) & set(people)):
            found = f"{data_dir / name} holds the folders {join_first(same)} as {data_dir} does"
            raise UserError(f"{found}: put those of {data_dir} that train into {data_dir / 'train'}")
    return [data_dir]


DATASETS = ("coco", "cub", "custom", "shapes")


def caption_data(
    dataset_name: str,
    dataset_path: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_samples: int | None = None,
    batch_size: int = 16,
    num_workers: int | None = None,
    seed: int = 0,
    val_share: float = 0.05,
    skip_missing: bool = False,
    crop: str = "adm",
    annotations: str | Path | None = None,
    images: str | Path | None = None,
    channels: int = 3,
    progress: bool = True,
    train_split: float | None = None,
) -> CaptionedDataModule:
    """Return captioned images as a data module; `dataset_name` tells what `dataset_path` is.

    - coco: `annotations/captions_train2017.json` (or another year) and the images in `train2017/` or `images/`; where
      val's are there as well, they validate;
    - cub: CUB-200-2011, with captions in `text_c10/` or `text/`, a sentence a line, or else with sentences made from
      class names and attributes; its test subset validates;
    - custom: a folder with `metadata.jsonl` or `.csv` (a file name and one caption or a list of them), or with a .txt
      beside each image, a caption a line, or with `train/` and `validation/` that are such; the table itself; or a
      Hugging Face dataset;
    - shapes: made up here; no path.

    Args:
        image_size: pixels, one number or (height, width); by default 256, of shapes 32.
        num_samples: at most so many images of each subset, chosen by seed and name (of shapes: how many there are).
        val_share: of the images, held out where nothing validates.
        skip_missing: leave out images that are named but not there, or have no caption, instead of refusing them.
        annotations, images: of coco, the file with the captions and the folder with the images, if elsewhere.
        train_split: the share that trains while the rest validates, in place of `val_share`.
    """
    name = str(dataset_name).lower()
    check_known("data set", name, DATASETS)
    if num_samples is not None and num_samples < 1:
        raise UserError(f"num_samples {num_samples}: expected at least 1")
    share = None if train_split is None else training_share(train_split)
    if name == "shapes":
        of_training = 1 / share - 1 if share else val_share
        loading = (batch_size, num_workers or 0, seed, of_training)
        return captioned_shape_data(num_samples or 10_000, image_size or 32, *loading)
    val_share = round(1 - share, 9) if share else val_share
    if dataset_path is None:
        raise UserError(f"The data set {name} needs dataset_path, the folder where it lies")
    path = in_home(dataset_path)
    if not path.is_dir() and not (name == "custom" and path.is_file()):
        refuse_shards(path)
        raise UserError(f"{path} is a file, expected a folder" if path.is_file() else no_such_folder(path))
    options = {"image_size": image_size or 256, "crop": crop, "channels": channels, "progress": progress}
    notes: list[str] = []
    if name == "custom" and hugging_face.is_dataset(path):
        subsets = hugging_face.captioned_subsets(path, skip_missing, notes, options)
    else:
        if name == "coco":
            found = captioned.coco_subsets(path, annotations, images, notes)
        else:
            found = (captioned.cub_subsets if name == "cub" else captioned.own_subsets)(path, notes)
        subsets = [one.subset(skip_missing, notes, options) for one in found]
    set_white(*subsets)
    if num_samples is not None:
        subsets = [_some(subset, num_samples, seed) for subset in subsets]
    own = len(subsets) > 1 and share in (None, 1)
    train, val = subsets if own else hold_out(subsets[0], val_share, seed)
    return CaptionedDataModule(train, val, batch_size, num_workers, seed, notes=notes)


def _some(subset: DecodedImages, count: int, seed: int) -> DecodedImages:
    ranks = [hashlib.blake2b(os.fsencode(f"samples {seed}/{name}")).digest() for name in subset.names]
    return subset.part(sorted(sorted(range(len(subset)), key=ranks.__getitem__)[:count]))
