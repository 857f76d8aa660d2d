"""Pictures with sentences about them: COCO, CUB-200-2011, folders of one's own, Hugging Face datasets on the disk.

Whatever it is made of, a side is `DecodedPictures` with `captions`, one or more for each picture, and labels all 0. Of
several captions one is taken each time, which follows from seed, epoch and picture alone (`CaptionOrder`).
"""

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from vavae_tools.data import hugging_face
from vavae_tools.data.decoded import DecodedPictures, Names
from vavae_tools.data.folders import contents, counted, either, extension_of, listed, natural_key, no_such_folder
from vavae_tools.data.order import EpochOrder
from vavae_tools.data.picture_sets import EXTENSIONS, VALIDATION_SIDES, PictureSetDataModule, hold_out
from vavae_tools.draws import Draws
from vavae_tools.errors import UserError

DATASETS = ("coco", "cub", "custom", "shapes")
FILE_COLUMNS = ("file_name", "image", "path", "image_path", "filename", "file", "img", "picture")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "texts", "sentence", "sentences", "description")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
SURE = 3
"""Of CUB's certainties: 1 not visible, 2 guessing, 3 probably, 4 definitely."""
_TEXT_FOLDERS = ("text_c10", "text", "text/text_c10", "captions", "cvpr2016_cub/text_c10")
_GO_ON = "or go on without them: data.skip_missing=true"


# ---- which caption


class CaptionOrder(EpochOrder):
    """The order of `EpochOrder`, with the number of the caption that a picture has this time: (index, number) pairs.

    The number follows from seed, epoch and index alone, so it is the same wherever and whenever the picture is loaded.

    Args:
        counts: int64 (N,), how many captions each picture has.
        batch_size, seed, rank, world_size: see `EpochOrder`.
    """

    def __init__(self, counts: Tensor, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(len(counts), batch_size, seed, rank, world_size)
        self.counts = counts

    def __iter__(self) -> Iterator[tuple[int, int]]:
        index = torch.tensor(list(super().__iter__()), dtype=torch.int64)
        uniform = Draws(self.seed, self.epoch, index).uniform("caption", 1)[:, 0]
        numbers = (uniform.double() * self.counts[index]).long()  # in float32 the product may round up to the count
        return iter(zip(index.tolist(), numbers.tolist(), strict=True))


def index_and_number(indices: Sequence[int | tuple[int, int]]) -> tuple[list[int], list[int]]:
    """What a sampler gives, taken apart; a plain index has its first caption.

    >>> index_and_number([(5, 2), (7, 0)]), index_and_number([3, 4])
    (([5, 7], [2, 0]), ([3, 4], [0, 0]))
    """
    pairs = [pair if isinstance(pair, tuple) else (int(pair), 0) for pair in indices]
    return [index for index, _ in pairs], [number for _, number in pairs]


# ---- sides


class Captioned:
    """What makes `DecodedPictures` captioned ones; comes before their class.

    Attributes:
        captions: of each picture, one or more.

    A batch has "captions" too, a list of one for each picture: the one that the sampler names, or the first.
    """

    captions: list[tuple[str, ...]]

    @property
    def caption_counts(self) -> Tensor:
        """How many captions each picture has: int64 (N,)."""
        return torch.tensor([len(captions) for captions in self.captions], dtype=torch.int64)

    def captions_digest(self) -> str:
        """A hash of all captions; `fingerprint` is that of the pictures alone, which latents follow from."""
        return hashlib.sha256(json.dumps(self.captions).encode()).hexdigest()

    def part(self, places: Sequence[int]) -> Self:
        part = super().part(places)
        part.captions = [self.captions[place] for place in places]
        return part

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> dict[str, Any]:
        indices, numbers = index_and_number(indices)
        captions = [self.captions[index][number] for index, number in zip(indices, numbers, strict=True)]
        return {**super().__getitems__(indices), "captions": captions}


class CaptionedFiles(Captioned, DecodedPictures):
    """Pictures in files; further arguments are those of `DecodedPictures`.

    Args:
        folder: that the names are relative to.
    """

    def __init__(
        self, folder: Path, names: Sequence[str], captions: Sequence[Sequence[str]], **options: object
    ) -> None:
        super().__init__(Names(names), torch.zeros(len(names), dtype=torch.int64), **options)
        self.folder, self.captions = folder, list(map(tuple, captions))
        self._sizes: list[int] | None = None

    def stored(self, places: Sequence[int]) -> list[Path]:
        return [self.folder / self.names[place] for place in places]

    def opened(self, stored: Path) -> Image.Image:
        return Image.open(stored)

    def what_is_stored(self) -> list:
        if self._sizes is None:
            parts = [range(start, min(start + 1024, len(self))) for start in range(0, len(self), 1024)]
            with ThreadPoolExecutor(8) as pool:  # a disk far away answers each question late, but many at once
                self._sizes = [size for sizes in pool.map(self._sizes_of, parts) for size in sizes]
        return [list(self.names), self._sizes]

    def _sizes_of(self, places: range) -> list[int]:
        return [path.stat().st_size for path in self.stored(places)]

    def where(self, place: int) -> str:
        return str(self.stored([place])[0])

    def part(self, places: Sequence[int]) -> Self:
        part = super().part(places)
        part._sizes = None
        return part


class CaptionedRows(Captioned, hugging_face.DatasetPictures):
    """Rows of a Hugging Face dataset; further arguments are those of `hugging_face.DatasetPictures`."""

    def __init__(self, captions: Sequence[Sequence[str]], *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.captions = list(map(tuple, captions))


class CaptionedDataModule(PictureSetDataModule):
    """Captioned pictures as batches, each with one of its captions, at random; what validates with its first.

    Args:
        train_data, val_data: sides with `captions`; None where nothing validates.
        batch_size, num_workers, seed: see `PictureSetDataModule`; the captions follow from the seed, too.
        notes: lines about what was left out, for `remark`.
    """

    def __init__(
        self,
        train_data: DecodedPictures,
        val_data: DecodedPictures | None,
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
        notes: Sequence[str] = (),
    ) -> None:
        self.notes = list(notes)
        super().__init__(train_data, val_data, {"any": 0}, batch_size, num_workers, seed)

    def _find_workers(self) -> None:
        self.remark = ""
        super()._find_workers()
        self.remark = "; ".join(filter(None, [*self.notes, self.remark]))

    def captions_by_side(self) -> dict[str, list[tuple[str, ...]]]:
        """The captions of the sides that are there, as `texts.encode_texts` takes them."""
        sides = {"train": self.train_data, "val": self.val_data}
        return {side: data.captions for side, data in sides.items() if data is not None and len(data)}

    def fingerprint(self) -> str:
        """A hash of both sides' pictures and captions."""
        sides = [side for side in (self.train_data, self.val_data) if side is not None]
        values = [[side.fingerprint(), side.captions_digest()] for side in sides]
        return hashlib.sha256(json.dumps(values).encode()).hexdigest()

    def _new_order(self) -> CaptionOrder:
        return CaptionOrder(self.train_data.caption_counts, self.batch_size, self.seed, *self._place())

    def _what_orders(self, order: CaptionOrder) -> dict[str, int]:
        return {**super()._what_orders(order), "captions": int(order.counts.sum())}


# ---- any of them


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
    pictures: str | Path | None = None,
    channels: int = 3,
    progress: bool = True,
) -> CaptionedDataModule:
    """Captioned pictures as a data module.

    `dataset_name` says what `dataset_path` is:

    - coco: `annotations/captions_train2017.json` (or another year) and the pictures in `train2017/`,
      `images/train2017/` or `images/`; where val's are there as well, they validate;
    - cub: CUB-200-2011, with captions in `text_c10/` or `text/`, a sentence a line, where they are there, else with
      sentences made from class names and attributes; its test side validates;
    - custom: a folder with `metadata.jsonl` or `.csv` (a file name and a caption, or a list of captions), or with a
      .txt beside each picture, a caption a line, or with `train/` and `validation/` that are such; the jsonl or csv
      itself; or a Hugging Face dataset, as `save_to_disk` writes it;
    - shapes: made up here, see `captioned_shapes`; no path.

    Args:
        image_size: pixels, one number or (height, width); by default 256, of shapes 32.
        num_samples: at most so many pictures of each side, chosen by seed and name, the same on every machine (of
            shapes: how many there are). What is held out is held out of these.
        batch_size, num_workers: see `PictureSetDataModule`.
        seed: of order, choice of captions, `num_samples`, and what is held out.
        val_share: where nothing validates, this share of the pictures is held out; 0 for none.
        skip_missing: leave out pictures that are named but not there, or have no caption, instead of refusing them.
        crop: "adm", the centre (`crops.centre_crop`), or "none", the whole picture resized.
        annotations, pictures: of coco, the file with the captions and the folder with the pictures, where they are not
            found by their usual names.
        channels: 3, or 1 for grey.

    Raises:
        UserError: an unknown name, nothing there, files that cannot be read as what they are, missing pictures, empty
            captions, or settings that cannot be.
    """
    name = str(dataset_name).lower()
    if name not in DATASETS:
        near = get_close_matches(name, DATASETS, 1, 0.4)
        meant = f"; did you mean {near[0]}?" if near else "."
        raise UserError(f"No data set {dataset_name!r}{meant} There are {', '.join(DATASETS)}")
    if num_samples is not None and (not isinstance(num_samples, int) or num_samples < 1):
        raise UserError(f"num_samples {num_samples}: expected a whole number of at least 1, or none for all pictures")
    if not 0 <= val_share < 1:
        raise UserError(f"val_share {val_share:g}: expected a share from 0 to below 1, such as 0.05")
    if name == "shapes":
        from vavae_tools.data.captioned_shapes import captioned_shape_data  # which is made of what is here

        size = 32 if image_size is None else image_size
        return captioned_shape_data(num_samples or 10_000, size, batch_size, num_workers or 0, seed, val_share)
    if dataset_path is None:
        raise UserError(f"The data set {name} needs dataset_path, the folder where it lies")
    path = Path(dataset_path).expanduser()
    if not path.is_dir() and not (name == "custom" and path.is_file()):
        raise UserError(f"{path} is a file, expected a folder" if path.is_file() else no_such_folder(path))
    options = {"image_size": image_size or 256, "crop": crop, "channels": channels, "progress": progress}
    notes: list[str] = []
    if name == "custom" and path.is_dir() and hugging_face.is_dataset(path):
        sides = _dataset_sides(path, skip_missing, notes, options)
    else:
        if name == "coco":
            found = _coco(path, annotations, pictures, notes)
        else:
            found = _cub(path, notes) if name == "cub" else _custom(path, notes)
        sides = [one.side(skip_missing, notes, options) for one in found]
    if num_samples is not None:
        sides = [_some(side, num_samples, seed) for side in sides]
    train, val = sides if len(sides) > 1 else hold_out(sides[0], val_share, seed)
    return CaptionedDataModule(train, val, batch_size, num_workers, seed, notes)


def _some(side: DecodedPictures, count: int, seed: int) -> DecodedPictures:
    """So many of the pictures, those with the least hashes of seed and name."""
    if count >= len(side):
        return side
    ranks = [
        hashlib.blake2b(f"samples {seed}/{name}".encode("utf-8", "surrogateescape")).digest() for name in side.names
    ]
    return side.part(sorted(sorted(range(len(side)), key=ranks.__getitem__)[:count]))


# ---- what is named, and what is there


@dataclass
class _Found:
    """One side as its files name it.

    Attributes:
        folder: that the names are relative to.
        source: the file or folder that names them, for messages.
        captions: of each name, as they stand.
    """

    folder: Path
    source: Path
    captions: dict[str, list[str]]

    def side(self, skip_missing: bool, notes: list[str], options: Mapping[str, object]) -> CaptionedFiles:
        names = list(self.captions)
        missing = missing_pictures(self.folder, names)
        if missing:
            how_many = f"{len(missing):,} of {counted(len(names), 'picture')} that {self.source} names"
            how_many += f" {'is' if len(missing) == 1 else 'are'} not in {self.folder}: {listed(missing)}"
            if len(missing) == len(names) or not skip_missing:
                mend = "" if len(missing) == len(names) else f", {_GO_ON}"
                raise UserError(f"{how_many}. Put them there{mend}")
            notes.append(f"{how_many}; left out")
        captions = cleaned(self.captions, self.source, skip_missing, notes, set(missing))
        return CaptionedFiles(self.folder, list(captions), captions.values(), title=self.source.name, **options)


def missing_pictures(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of the names that are not there, by a listing of each folder and no question about each file."""
    there: dict[str, set[str]] = {}
    missing = []
    for name in names:
        parent, _, base = name.rpartition("/")
        if parent not in there:
            try:
                with os.scandir(folder / parent) as entries:
                    there[parent] = {entry.name for entry in entries}
            except (FileNotFoundError, NotADirectoryError):
                there[parent] = set()
        if base not in there[parent]:
            missing.append(name)
    return missing


def cleaned(
    captions: Mapping[str, Sequence[Any]],
    source: Path,
    skip_missing: bool = False,
    notes: list[str] | None = None,
    without: set[str] = frozenset(),
) -> dict[str, tuple[str, ...]]:
    """The captions with single spaces, each once; without pictures that have none, where that is allowed.

    Args:
        without: names to leave out.

    Raises:
        UserError: a picture without a caption (unless `skip_missing`), or a caption that is no text.
    """
    notes = [] if notes is None else notes
    clean, silent, partly = {}, [], []
    for name, given in captions.items():
        if name in without:
            continue
        try:
            words = [" ".join((caption or "").replace("\ufffd", " ").split()) for caption in given]
        except AttributeError:
            raise UserError(f"The caption of {name} in {source} is {given}, expected text") from None
        kept = tuple(dict.fromkeys(filter(None, words)))
        if kept:
            clean[name] = kept
        if not kept:
            silent.append(name)
        elif "" in words:
            partly.append(name)
    if silent:
        what = f"{counted(len(silent), 'picture')} of {source} with an empty caption or none: {listed(silent)}"
        if not clean or not skip_missing:
            raise UserError(f"{what}. Write one for each" + (f", {_GO_ON}" if clean else ""))
        notes.append(f"{what}; left out")
    if partly:
        notes.append(f"empty captions beside others left out, in {source}: {listed(partly)}")
    if not clean:
        raise UserError(f"{source} names no picture that is there")
    return clean


# ---- files with text


def read_text(path: Path) -> str:
    """A file's text, with or without a byte order mark.

    Raises:
        UserError: no such file, or it is no UTF-8.
    """
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"No such file: {path}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line:,}, is no UTF-8 ({error.reason}): save it as UTF-8") from None


def read_records(path: Path) -> dict[str, list[str]]:
    """Picture → captions, of a .jsonl, .csv or .tsv, in their order; a picture may stand on several lines.

    Raises:
        UserError: it is no UTF-8, a line is not what it should be, or there is no column for picture or caption.
    """
    text = read_text(path)
    captions: dict[str, list[str]] = {}
    for line, name, given in _json_lines(path, text) if path.suffix.lower() == ".jsonl" else _table_rows(path, text):
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{path}, line {line:,}: the file name is {name!r}, expected text")
        several = given if isinstance(given, list) else [given]
        captions.setdefault(name.strip().replace("\\", "/").removeprefix("./"), []).extend(several)
    if not captions:
        raise UserError(f"{path} is empty, expected a line for each picture")
    return captions


def _json_lines(path: Path, text: str) -> Iterator[tuple[int, Any, Any]]:
    for number, line in enumerate(text.split("\n"), 1):  # not splitlines: captions may hold other ends of lines
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number:,}, is no JSON ({error}): expected {_EXAMPLE}") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}, line {number:,}, is a {type(record).__name__}: expected {_EXAMPLE}")
        file, caption = (_column(record, names) for names in (FILE_COLUMNS, CAPTION_COLUMNS))
        if file is None or caption is None:
            raise UserError(f"{path}, line {number:,}{_lacks(file, record)}")
        yield number, record[file], record[caption]


def _table_rows(path: Path, text: str) -> Iterator[tuple[int, Any, Any]]:
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        file, caption = (_column(header, names) for names in (FILE_COLUMNS, CAPTION_COLUMNS))
        if file is None or caption is None:
            raise UserError(f"{path}{_lacks(file, header)}")
        file, caption = header.index(file), header.index(caption)
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                raise UserError(
                    f"{path}, line {rows.line_num:,}, has {counted(len(row), 'field')}, its head {len(header)}: put "
                    'captions with a comma into quotes ("…")'
                )
            yield rows.line_num, row[file], _several(row[caption])
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num:,}, cannot be read as a table ({error})") from None


_EXAMPLE = '{"file_name": "1.png", "text": "a caption"}'


def _lacks(file: str | None, columns: Iterable[str]) -> str:
    what, names = ("captions", CAPTION_COLUMNS) if file else ("file names", FILE_COLUMNS)
    return f" has no column for {what}, only {listed(columns, 6) or 'nothing'}: expected one called {either(names)}"


def _column(columns: Iterable[str], names: Sequence[str]) -> str | None:
    return next((name for name in names if name in columns), None)


def _several(cell: str) -> str | list[str]:
    """A cell of a table may hold a list of captions, as JSON."""
    if cell.startswith("["):
        try:
            values = json.loads(cell)
        except ValueError:
            return cell
        if isinstance(values, list) and all(isinstance(value, str) for value in values):
            return values
    return cell


# ---- coco


def _coco(root: Path, annotations: str | Path | None, pictures: str | Path | None, notes: list[str]) -> list[_Found]:
    train = _annotations(root) if annotations is None else _given(root, annotations)
    sides = [_coco_side(root, train, pictures)]
    val = train.with_name(train.name.replace("train", "val"))
    if val != train and val.is_file():
        # where the pictures' folder was given, val's may still stand beside it
        there = [one for one in (_coco_side(root, val, None), _coco_side(root, val, pictures)) if _any_there(one)]
        if there:
            sides.append(there[0])
        else:
            notes.append(f"none of the pictures of {val.name} is there: some of {train.name} are held out instead")
    return sides


def _any_there(found: _Found) -> bool:
    return len(missing_pictures(found.folder, found.captions)) < len(found.captions)


def _annotations(root: Path) -> Path:
    for pattern in ("captions_train*.json", "captions*.json"):
        for folder in (root / "annotations", root):
            found = sorted(folder.glob(pattern))
            if found:
                return found[-1]
    raise UserError(
        f"No captions_train2017.json in {root / 'annotations'} or {root}, which holds {contents(root)}: put it there, "
        "or name the file: data.annotations=FILE"
    )


def _given(root: Path, path: str | Path) -> Path:
    """A path as it stands, or below the data set's."""
    path = Path(path).expanduser()
    return path if path.exists() else root / path


def _coco_side(root: Path, annotations: Path, pictures: str | Path | None) -> _Found:
    captions = read_coco(annotations)
    name = annotations.stem.removeprefix("captions_")
    usual = [root / name, root / "images" / name, root / "images", root]
    folders = usual if pictures is None else [_given(root, pictures) / name, _given(root, pictures)]
    folders = [folder for folder in folders if folder.is_dir()]
    if not folders:
        raise UserError(f"No such folder of pictures: {_given(root, pictures)}")
    return _Found(min(folders, key=lambda folder: len(missing_pictures(folder, captions))), annotations, captions)


def read_coco(path: Path) -> dict[str, list[str]]:
    """Picture → captions, of COCO's JSON with captions.

    Raises:
        UserError: it is no JSON, or holds something else.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): fetch it again") from None
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        captions: dict[str, list[str]] = {name: [] for name in names.values()}
        for annotation in content["annotations"]:
            captions[names[annotation["image_id"]]].append(annotation["caption"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} lacks {error} of COCO's captions: expected images with id and file_name, annotations with the "
            "image_id of one of them and caption, as captions_train2017.json has them"
        ) from None
    if not captions:
        raise UserError(f"{path} names no pictures")
    return captions


# ---- cub


def _cub(path: Path, notes: list[str]) -> list[_Found]:
    root = next((folder for folder in (path, path / "CUB_200_2011") if (folder / "images.txt").is_file()), None)
    if root is None:
        raise UserError(f"No images.txt in {path}, which holds {contents(path)}: expected the folder CUB_200_2011")
    names = _numbered_lines(root / "images.txt")
    captions = _cub_captions(root, names, notes)
    sides = {"1": {}, "0": {}}  # as train_test_split.txt says it
    side_of = _numbered_lines(root / "train_test_split.txt") if (root / "train_test_split.txt").is_file() else {}
    for number, name in names.items():
        side = side_of.get(number, "1")
        if side not in sides:
            raise UserError(f"{root / 'train_test_split.txt'} says {side!r} of picture {number}, expected 1 or 0")
        sides[side][name] = captions[number]
    return [_Found(root / "images", root / "images.txt", of_side) for of_side in sides.values() if of_side]


def _numbered_lines(path: Path) -> dict[str, str]:
    """The lines "number what" of a file of CUB."""
    lines = {}
    for place, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            number, _, what = line.strip().partition(" ")
            if not what:
                raise UserError(f"{path}, line {place:,}, is {line.strip()!r}: expected a number and a word")
            lines[number] = what.strip()
    return lines


def _cub_captions(root: Path, names: dict[str, str], notes: list[str]) -> dict[str, Sequence[str]]:
    places = [home / name for home in (root, root.parent) for name in _TEXT_FOLDERS]
    written = {number: str(Path(name).with_suffix(".txt")) for number, name in names.items()}
    captions: dict[str, Sequence[str]] = {}
    for folder in places:
        lacking = set(missing_pictures(folder, written.values())) if folder.is_dir() else set(written.values())
        if len(lacking) < len(set(written.values())):
            there = {number: text for number, text in written.items() if text not in lacking}
            captions = {number: read_text(folder / text).split("\n") for number, text in there.items()}
            captions = {number: lines for number, lines in captions.items() if any(map(str.strip, lines))}
            break
    if len(captions) < len(names):
        made = _bird_captions(root, {number: name for number, name in names.items() if number not in captions})
        notes.append(f"captions of {counted(len(made), 'picture')} of {root} made from class names and attributes")
        captions.update(made)
    return captions


def _bird_captions(root: Path, names: dict[str, str]) -> dict[str, tuple[str, ...]]:
    classes = [root / file for file in ("image_class_labels.txt", "classes.txt")]
    class_of, class_names = (map(_numbered_lines, classes)) if all(map(Path.is_file, classes)) else ({}, {})
    attributes = _sure_attributes(root)
    made = {}
    for number, name in names.items():
        class_name = class_names.get(class_of.get(number), name.partition("/")[0])
        made[number] = bird_sentences(class_name, attributes.get(number, []))
    return made


def _sure_attributes(root: Path) -> dict[str, list[str]]:
    """Picture's number → its attributes that somebody was sure of, as they are called, in their order."""
    labels = root / "attributes" / "image_attribute_labels.txt"
    places = (root / "attributes" / "attributes.txt", root / "attributes.txt", root.parent / "attributes.txt")
    called = next((path for path in places if path.is_file()), None)
    if called is None or not labels.is_file():
        return {}
    names = _numbered_lines(called)
    of_each: dict[str, list[str]] = {}
    # picture, attribute, whether it is there, certainty, seconds: 3.7 million lines, a few with fields too many
    for picture, attribute in re.findall(rf"^(\d+) (\d+) 1 [{SURE}-4]\b", read_text(labels), re.MULTILINE):
        if attribute in names:
            of_each.setdefault(picture, []).append(names[attribute])
    return of_each


_PLURAL = {"wing": "wings", "eye": "eyes", "leg": "legs", "upperparts": "upperparts", "underparts": "underparts"}


def bird_sentences(class_name: str, attributes: Sequence[str]) -> tuple[str, ...]:
    """Sentences about a bird of CUB, by the name of its class and its attributes.

    >>> bird_sentences("149.Brown_Thrasher", ["has_wing_color::brown", "has_size::small_(5_-_9_in)"])
    ('a brown thrasher, a small bird', 'a small bird with brown wings')
    """
    name = re.sub(r"^\d+\.", "", class_name).replace("_", " ").lower()
    values: dict[tuple[str, str], list[str]] = {}
    for attribute in attributes:
        what, _, value = attribute.removeprefix("has_").partition("::")
        part, _, kind = what.rpartition("_")
        value = re.sub(r"\s*\(.*", "", value.replace("_", " ")).replace("-", " ")
        values.setdefault((part.replace("_", " "), kind), []).append(value)
    first = [*values.pop(("", "size"), [])[:1], " and ".join(values.pop(("primary", "color"), []))]
    bird = " ".join(filter(None, [*first, "bird"]))
    phrases = [
        _phrase(part, of_part)
        for (part, kind), of_part in values.items()
        if part and kind in ("color", "pattern", "shape")
    ]
    known = f"{_with_article(name)}, {_with_article(bird)}" if bird != "bird" else _with_article(name)
    sentences = [known]
    for place, start in enumerate(range(0, min(len(phrases), 12), 3)):
        who = _with_article(name if place % 2 else bird)
        sentences.append(f"{who} with {' and '.join(filter(None, _last_apart(phrases[start : start + 3])))}")
    return tuple(sentences)


def _phrase(part: str, values: Sequence[str]) -> str:
    noun = _PLURAL.get(part, part)
    values = [value.removesuffix(noun).strip() for value in values]  # "forked tail", "rounded wings"
    words = f"{' and '.join(values)} {noun}"
    return words if part in _PLURAL else _with_article(words)


def _last_apart(words: Sequence[str]) -> tuple[str, str]:
    return ", ".join(words[:-1]), words[-1]


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# ---- custom


def _custom(path: Path, notes: list[str]) -> list[_Found]:
    if path.is_file():
        if path.suffix.lower() not in (".jsonl", ".csv", ".tsv"):
            raise UserError(f"{path}: expected a .jsonl or .csv with file names and captions, or a folder")
        return [_Found(path.parent, path, read_records(path))]
    whole = _custom_side(path, notes, by_text=False)
    if whole:
        return [whole]
    if (path / "train").is_dir():
        train = _custom_side(path / "train", notes)
        others = (_custom_side(path / name, notes) for name in VALIDATION_SIDES if (path / name).is_dir())
        val = next(filter(None, others), None)
        if train:
            return [train, val] if val else [train]
    whole = _custom_side(path, notes)
    if whole is None:
        raise UserError(
            f"No captions in {path}, which holds {contents(path)}: expected metadata.jsonl or metadata.csv, a .txt "
            f"beside each picture, or a Hugging Face dataset ({hugging_face.MARKS})"
        )
    return [whole]


def _custom_side(folder: Path, notes: list[str], by_text: bool = True) -> _Found | None:
    named = [folder / name for name in METADATA if (folder / name).is_file()]
    if not named:
        named = sorted(file for kind in ("jsonl", "csv", "tsv") for file in folder.glob(f"*.{kind}"))
        if len(named) > 1:
            raise UserError(
                f"{folder} holds {listed(file.name for file in named)}, of which each may name the captions: set "
                "dataset_path to one of them"
            )
    if named:
        return _Found(folder, named[0], read_records(named[0]))
    return _beside(folder, notes) if by_text else None


def _beside(folder: Path, notes: list[str]) -> _Found | None:
    """Pictures with a .txt of the same name, a caption a line."""
    captions, alone = {}, 0
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_key)
        texts = {name[:-4] for name in files if extension_of(name) == "txt"}
        pictures = sorted((name for name in files if extension_of(name) in EXTENSIONS), key=natural_key)
        alone += len(texts - {name.rpartition(".")[0] for name in pictures})
        for name in pictures:
            path, stem = Path(place, name).relative_to(folder).as_posix(), name.rpartition(".")[0]
            captions[path] = read_text(_text_file(place, stem, files)).split("\n") if stem in texts else []
    if not any(captions.values()):
        return None
    if alone:
        notes.append(f"{counted(alone, '.txt file')} in {folder} beside no picture")
    return _Found(folder, folder, captions)


def _text_file(place: str, stem: str, files: Sequence[str]) -> Path:
    plain = Path(place, f"{stem}.txt")
    return (
        plain
        if plain.name in files
        else next(Path(place, n) for n in files if n[:-4] == stem and n.lower()[-4:] == ".txt")
    )


def _dataset_sides(
    path: Path, skip_missing: bool, notes: list[str], options: Mapping[str, object]
) -> list[CaptionedRows]:
    found = hugging_face._load(path)
    datasets = {"train": found}
    if isinstance(found, dict):  # a DatasetDict
        if "train" not in found:
            raise UserError(f"No side train in {path}; there are {', '.join(found)}: rename one and save it again")
        names = ["train", *[name for name in VALIDATION_SIDES if name in found and len(found[name])][:1]]
        datasets = {name: found[name] for name in names}
    sides = []
    for name, dataset in datasets.items():
        if not len(dataset):
            raise UserError(f"The side {name} of {path} is empty")
        picture = hugging_face._picture_column(dataset, path)
        caption = _column(dataset.column_names, CAPTION_COLUMNS)
        if caption is None:
            raise UserError(
                f"No captions in {path}, which has the columns {', '.join(dataset.column_names)}: expected one called "
                f"{either(CAPTION_COLUMNS)}. Rename yours with dataset.rename_column and save it again"
            )
        values = hugging_face._values(dataset, caption)
        given = {f"{row:06d}": value if isinstance(value, list) else [value] for row, value in enumerate(values)}
        captions = cleaned(given, Path(path, name), skip_missing, notes)
        rows = torch.tensor([int(row) for row in captions])
        zeros = torch.zeros(len(rows), dtype=torch.int64)
        title = f"{path.name}, {name}"
        sides.append(
            CaptionedRows(captions.values(), dataset, picture, rows, Names(captions), zeros, title=title, **options)
        )
    return sides
