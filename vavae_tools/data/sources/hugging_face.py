"""Datasets of Hugging Face's `datasets` on the disk as subsets."""

import hashlib
from collections.abc import Iterator, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from vavae_tools.data.captions import clean_captions
from vavae_tools.data.folders import choose_subset_names, either, labels_of
from vavae_tools.data.images import DecodedImages
from vavae_tools.runtime.errors import UserError, join_first, one_line

if TYPE_CHECKING:
    from datasets import Dataset

CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "texts", "sentence", "sentences", "description")
_IMAGE_COLUMNS = ("image", "img", "picture", "pixel_values")
SAVED_DATASET_FILES = "dataset_dict.json or state.json"


def is_dataset(folder: Path) -> bool:
    """Return whether `save_to_disk` wrote it."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


class DatasetImages(DecodedImages):
    """Images in a column of a dataset; further arguments are those of `DecodedImages`."""

    def __init__(self, dataset: "Dataset", column: str, *args: Any, **options: Any) -> None:
        from datasets import Image as ImageFeature

        super().__init__(*args, **options)
        self._column, self._source = column, dataset._fingerprint
        dataset = dataset.select_columns([column]).with_format(None)
        if isinstance(dataset.features[column], ImageFeature):
            dataset = dataset.cast_column(column, ImageFeature(decode=False))  # threads decode them here
        self._dataset = dataset

    def opened(self, places: Sequence[int]) -> Iterator[Image.Image]:
        for stored in self._dataset[self.rows[torch.as_tensor(places)].tolist()][self._column]:
            if isinstance(stored, dict):
                stored = stored["bytes"] if stored.get("bytes") is not None else stored.get("path")
            if not isinstance(stored, bytes | str):
                raise ValueError("it is empty" if stored is None else "expected a column of type Image, bytes or paths")
            yield Image.open(BytesIO(stored) if isinstance(stored, bytes) else stored)

    def stored_key(self) -> list:
        rows = hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()
        return [self._source, len(self._dataset), rows]


def read_subsets(data_dir: Path, train_split: str, **options: Any) -> tuple[dict[str, int], *tuple[DatasetImages, ...]]:
    """Return class name → label, the training subset, and what validates if there is such a subset."""
    datasets = read_datasets(data_dir, train_split)
    train_split, first = next(iter(datasets.items()))
    image = _column(first, data_dir, "images", "Image", _IMAGE_COLUMNS)
    label = _column(first, data_dir, "labels", "ClassLabel", ("label", "labels", "fine_label", "class"))
    for name, dataset in datasets.items():
        if missing := {image, label} - set(dataset.column_names):
            raise UserError(f"The subset {name} of {data_dir} lacks the column {', '.join(missing)} of {train_split}")
        types = [(one.features[image], getattr(one.features[label], "names", None)) for one in (dataset, first)]
        if types[0] != types[1]:
            found = f"The columns {image} and {label} of {data_dir} have other types or class names in {name}"
            raise UserError(f"{found} than in {train_split}: cast one to the other's features and save it again")
    labels, of_rows = _numbered(datasets, label)
    name_of, subsets = {number: name for name, number in labels.items()}, []
    for name, dataset in datasets.items():
        names = [f"{name_of[number]}/{row:06d}" for row, number in enumerate(of_rows[name].tolist())]
        title = f"{data_dir.name}, {name}"
        subsets.append(DatasetImages(dataset, image, names, of_rows[name], title=title, **options))
    return labels, *subsets


def captioned_subsets(path: Path, skip_missing: bool, notes: list[str], options: dict[str, Any]) -> list[DatasetImages]:
    subsets = []
    for name, dataset in read_datasets(path).items():
        image = _column(dataset, path, "images", "Image", _IMAGE_COLUMNS)
        caption = _column(dataset, path, "captions", "", CAPTION_COLUMNS)
        values = enumerate(column_values(dataset, caption))
        given = {f"{row:06d}": value if isinstance(value, list) else [value] for row, value in values}
        clean = clean_captions(given, path / name, skip_missing, notes)
        labels, captions = torch.zeros(len(given), dtype=torch.int64), [clean.get(row, ()) for row in given]
        own = {"title": f"{path.name}, {name}", "captions": captions, **options}
        subsets.append(DatasetImages(dataset, image, given, labels, **own).part(list(map(int, clean))))
    return subsets


def load_folder(data_dir: Path) -> Any:
    datasets = datasets_library(f"{data_dir} is a Hugging Face dataset")
    try:
        return datasets.load_from_disk(str(data_dir))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise UserError(f"The dataset {data_dir} cannot be read ({one_line(error)}): copy or save it again") from None


def datasets_library(what: str) -> Any:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{what}, which `datasets` reads: pip install datasets") from None
    return datasets


def read_datasets(data_dir: Path, train_split: str = "train") -> "dict[str, Dataset]":
    found = load_folder(data_dir)
    if not isinstance(found, dict):  # a DatasetDict is one
        found = {train_split: found}
    names = choose_subset_names(found, train_split)
    if not names:
        raise UserError(f"No subset {train_split!r} in {data_dir}; there are {', '.join(found)}: set train_split")
    if not len(found[names[0]]):
        raise UserError(f"The subset {names[0]} of {data_dir} is empty")
    others = [name for name in names[1:] if len(found[name])]
    return {name: found[name] for name in (names[0], *others[:1])}


def _column(dataset: "Dataset", data_dir: Path, what: str, kind: str, names: Sequence[str]) -> str:
    """Return the column of that type, best with one of the names, else the one with the first of the names."""
    typed = [name for name, feature in dataset.features.items() if type(feature).__name__ == kind]
    named = [name for name in names if name in dataset.column_names]
    found = [*(name for name in named if name in typed), *typed, *named]
    if not found:
        of_type = f"of type {kind} or " if kind else ""
        columns = f"the columns {', '.join(dataset.column_names)}: expected one {of_type}called {either(names)}"
        raise UserError(f"No {what} in {data_dir}, which has {columns}. Rename yours with dataset.rename_column")
    return found[0]


def column_values(dataset: "Dataset", column: str) -> list:
    return dataset.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()


def _numbered(datasets: "dict[str, Dataset]", column: str) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Return class name → label as the first subset has them, and the labels int64 (N,) of each subset's rows.

    Whole numbers are labels as they stand; words are numbered by `labels_of`.
    """
    values = {name: column_values(dataset, column) for name, dataset in datasets.items()}
    (train, *_), (first, *_) = values.values(), datasets.values()
    if class_names := getattr(first.features[column], "names", None):
        labels = {name: number for number, name in enumerate(class_names)}
    elif all(isinstance(value, str) for value in train):
        labels = labels_of(set(train))
        values = {subset: [labels.get(value, value) for value in of_subset] for subset, of_subset in values.items()}
    else:
        labels = {str(value): value for value in sorted({v for v in train if isinstance(v, int) and v >= 0})}
    known = set(labels.values())
    for subset, of_subset in values.items():
        if unknown := {value for value in of_subset if not isinstance(value, int) or value not in known}:
            expected = f"the classes {join_first(labels)} of the training subset, as names or whole numbers from 0 on"
            found = f"The column {column} of the subset {subset} holds {join_first(sorted(map(repr, unknown)))}"
            raise UserError(f"{found}; expected {expected}")
    return labels, {subset: torch.tensor(of_subset, dtype=torch.int64) for subset, of_subset in values.items()}
