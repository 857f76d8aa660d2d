"""Datasets of Hugging Face's `datasets` on the disk as sides of a data module."""

import hashlib
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vavae_tools.data.folders import either, labels_of, listed
from vavae_tools.data.images import DecodedPictures, Names
from vavae_tools.runtime.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset


PICTURE_COLUMNS = ("image", "img", "picture", "pixel_values")
LABEL_COLUMNS = ("label", "labels", "fine_label", "class")
MARKS = "dataset_dict.json, or state.json and dataset_info.json"


def is_dataset(folder: Path) -> bool:
    """Whether `save_to_disk` wrote it."""
    marks = (folder / "state.json", folder / "dataset_info.json")
    return (folder / "dataset_dict.json").is_file() or all(mark.is_file() for mark in marks)


class DatasetPictures(DecodedPictures):
    """Rows of a dataset; further arguments are those of `DecodedPictures`.

    Args:
        dataset: only its picture column is read.
        rows: int64 (N,), which of its rows.
    """

    def __init__(
        self, dataset: "Dataset", column: str, rows: Tensor, names: Sequence[str], labels: Tensor, **options: object
    ) -> None:
        from datasets import Image as ImageFeature

        super().__init__(names, labels, **options)
        self.rows, self._column, self._source = rows, column, dataset._fingerprint
        dataset = dataset.select_columns([column]).with_format(None)
        if isinstance(dataset.features[column], ImageFeature):
            dataset = dataset.cast_column(column, ImageFeature(decode=False))  # threads decode them here
        elif getattr(dataset.features[column], "dtype", None) not in ("binary", "large_binary", "string"):
            dataset = dataset.with_format("numpy")
        self._dataset = dataset

    def stored(self, places: Sequence[int]) -> Sequence[Any]:
        return self._dataset[self.rows[torch.as_tensor(places)].tolist()][self._column]

    def opened(self, stored: Any) -> Image.Image:
        if isinstance(stored, dict):
            stored = stored["bytes"] if stored.get("bytes") is not None else stored.get("path")
        if stored is None:
            raise ValueError("it is empty")
        if isinstance(stored, np.ndarray):
            return _picture_of(stored)
        return Image.open(BytesIO(stored) if isinstance(stored, bytes) else stored)

    def what_is_stored(self) -> list:
        rows = hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()
        return [self._source, len(self._dataset), rows]

    def part(self, places: Sequence[int]) -> Self:
        part = super().part(places)
        part.rows = self.rows[torch.as_tensor(places)]
        return part


def _picture_of(array: np.ndarray) -> Image.Image:
    """Numbers 0…255, (H, W), (H, W, C) or (C, H, W) with 1 or 3 channels."""
    if array.ndim == 3 and array.shape[2] not in (1, 3) and array.shape[0] in (1, 3):
        array = array.transpose(1, 2, 0)  # (H, W, C)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    fits = array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)
    if not fits or not np.issubdtype(array.dtype, np.integer) or array.size == 0:
        raise ValueError(f"{array.dtype} {array.shape}, expected whole numbers (H, W), (H, W, 3) or (3, H, W)")
    if array.min() < 0 or array.max() > 255:
        raise ValueError(f"numbers {array.min()} … {array.max()}, expected 0 … 255")
    return Image.fromarray(np.ascontiguousarray(array, dtype=np.uint8))


def read_sides(
    data_dir: Path, train_split: str, validation_sides: Sequence[str], **options: object
) -> tuple[dict[str, int], DatasetPictures, DatasetPictures | None]:
    """Class name → label, the training side, and what validates if there is such a side.

    Args:
        data_dir: what `Dataset.save_to_disk` or `DatasetDict.save_to_disk` wrote.
        train_split: the training side of a DatasetDict.
        validation_sides: how the other one may be called, the first one there is taken.
        options: of `DecodedPictures`.

    Raises:
        UserError: `datasets` is not installed, the dataset is damaged, or a side, the pictures or the labels are not
            found in it.
    """
    found = load_folder(data_dir)
    if isinstance(found, dict):  # a DatasetDict
        if train_split not in found:
            raise UserError(f"No side {train_split!r} in {data_dir}; there are {', '.join(found)}: set train_split")
        others = (name for name in validation_sides if name != train_split and name in found and len(found[name]))
        datasets = {name: found[name] for name in (train_split, *list(others)[:1])}
    else:
        datasets = {train_split: found}
    first = datasets[train_split]
    if not len(first):
        raise UserError(f"The side {train_split} of {data_dir} is empty")
    picture, label = _picture_column(first, data_dir), _label_column(first, data_dir)
    for name, dataset in datasets.items():
        if missing := {picture, label} - set(dataset.column_names):
            raise UserError(f"The side {name} of {data_dir} lacks the column {', '.join(missing)} of {train_split}")
        own, firsts = (_types(side, picture, label) for side in (dataset, first))
        if own != firsts:
            raise UserError(
                f"The columns {picture} and {label} of {data_dir} have other types or class names in {name} than in "
                f"{train_split}: cast one side to the other's features and save it again"
            )
    labels, of_rows = _numbered({name: _values(dataset, label) for name, dataset in datasets.items()}, first, label)
    name_of = {number: name for name, number in labels.items()}
    sides = []
    for name, dataset in datasets.items():
        names = Names(f"{name_of[number]}/{row:06d}" for row, number in enumerate(of_rows[name].tolist()))
        rows = torch.arange(len(dataset))
        title = f"{data_dir.name}, {name}"
        sides.append(DatasetPictures(dataset, picture, rows, names, of_rows[name], title=title, **options))
    return labels, sides[0], sides[1] if len(sides) > 1 else None


def load_folder(data_dir: Path) -> Any:
    """The Dataset or DatasetDict that `save_to_disk` wrote.

    Raises:
        UserError: `datasets` is not installed, or it is damaged.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(f"{data_dir} is a Hugging Face dataset, which `datasets` reads: pip install datasets") from None
    try:
        return datasets.load_from_disk(str(data_dir))
    except (OSError, ValueError, LookupError, TypeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:160]
        raise UserError(f"The dataset {data_dir} cannot be read ({reason}): copy or save it again") from None


def _picture_column(dataset: "Dataset", data_dir: Path) -> str:
    from datasets import Image as ImageFeature

    typed = [name for name, feature in dataset.features.items() if isinstance(feature, ImageFeature)]
    named = [name for name in PICTURE_COLUMNS if name in dataset.column_names]
    column = next((name for name in named if name in typed), None) or next(iter(typed + named), None)
    return column or _refuse(dataset, data_dir, "pictures", "Image", PICTURE_COLUMNS)


def _label_column(dataset: "Dataset", data_dir: Path) -> str:
    from datasets import ClassLabel

    typed = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    named = [name for name in LABEL_COLUMNS if name in dataset.column_names]
    column = next((name for name in named if name in typed), None) or next(iter(typed + named), None)
    return column or _refuse(dataset, data_dir, "labels", "ClassLabel", LABEL_COLUMNS)


def _refuse(dataset: "Dataset", data_dir: Path, what: str, kind: str, names: Sequence[str]) -> str:
    raise UserError(
        f"No {what} in {data_dir}, which has the columns {', '.join(dataset.column_names)}: expected one of type "
        f"{kind} or called {either(names)}. Rename yours with dataset.rename_column and save it again"
    )


def _types(dataset: "Dataset", picture: str, label: str) -> tuple:
    return dataset.features[picture], getattr(dataset.features[label], "names", None)


def _values(dataset: "Dataset", column: str) -> list:
    return dataset.select_columns([column]).with_format("arrow")[:].column(column).to_pylist()


def _numbered(values: dict[str, list], first: "Dataset", column: str) -> tuple[dict[str, int], dict[str, Tensor]]:
    """Class name → label, and the labels int64 (N,) of each side's rows; the first side says which classes there are.

    Whole numbers are labels as they stand; words are numbered by `labels_of`.
    """
    train = next(iter(values.values()))
    class_names = getattr(first.features[column], "names", None)
    if class_names:
        labels = {name: number for number, name in enumerate(class_names)}
    elif all(isinstance(value, str) for value in train):
        labels = labels_of(set(train))
        values = {side: [labels.get(value, value) for value in of_side] for side, of_side in values.items()}
    else:
        labels = {str(value): value for value in sorted({v for v in train if isinstance(v, int)})}
    known = set(labels.values())
    for side, of_side in values.items():
        unknown = {value for value in of_side if not isinstance(value, int) or value not in known or value < 0}
        if unknown:
            raise UserError(
                f"The column {column} of the side {side} holds {listed(sorted(map(repr, unknown)))}; expected the "
                f"classes {listed(labels)} of the training side, as names or whole numbers from 0 on"
            )
    return labels, {side: torch.tensor(of_side, dtype=torch.int64) for side, of_side in values.items()}
