"""Captioned images in files: COCO (Lin et al. 2014), CUB-200-2011 (Wah et al. 2011), and a person's own."""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vavae_tools.data import folders
from vavae_tools.data.captions import NamedImages, missing_images, read_json_lines, read_text
from vavae_tools.data.folders import EXTENSIONS, contents, count_of, either, files_below
from vavae_tools.data.sources.hugging_face import CAPTION_COLUMNS, SAVED_DATASET_FILES
from vavae_tools.data.sources.shards import refuse_shards
from vavae_tools.runtime.errors import UserError, in_home, join_first


# ---- COCO, as its archives unpack
def coco_subsets(
    root: Path, annotations: str | Path | None, images: str | Path | None, notes: list[str]
) -> list[NamedImages]:
    """Return what trains, and what validates where it is there; `notes` gets remarks."""
    if annotations is None:
        patterns = [f"{place}{name}*.json" for name in ("captions_train", "captions") for place in ("annotations/", "")]
        train = next((max(found) for pattern in patterns if (found := list(root.glob(pattern)))), None)
        if train is None:
            found = f"No captions_train2017.json in {root / 'annotations'} or {root}, which holds {contents(root)}"
            raise UserError(f"{found}: put it there, or name the file: data.annotations=FILE")
    else:
        train = _given(root, annotations)
    subsets = [_coco_subset(root, train, images)]
    val = train.with_name(train.name.replace("train", "val"))
    if val != train and val.is_file():
        found = _coco_subset(root, val, images)
        if len(missing_images(found.folder, found.captions)) < len(found.captions):
            subsets.append(found)
        else:
            notes.append(f"none of the images of {val.name} is there: some of {train.name} are held out instead")
    return subsets


def _given(root: Path, path: str | Path) -> Path:
    path = in_home(path)
    return path if path.exists() else root / path


def _coco_subset(root: Path, annotations: Path, images: str | Path | None) -> NamedImages:
    captions = _read_coco(annotations)
    name = annotations.stem.removeprefix("captions_")
    places = [root / name, root / "images" / name, root / "images", root]
    if images is not None:
        places = [_given(root, images) / name, _given(root, images), *places]
        if not places[1].is_dir():
            raise UserError(f"No such folder of images: {places[1]}")
    folder = min(places, key=lambda folder: len(missing_images(folder, captions)))  # the first of equals
    return NamedImages(folder, annotations, captions)


def _read_coco(path: Path) -> dict[str, list[str]]:
    try:
        content = json.loads(read_text(path))
        names = {image["id"]: image["file_name"] for image in content["images"]}
        captions: dict[str, list[str]] = {name: [] for name in names.values()}
        for annotation in content["annotations"]:
            captions[names[annotation["image_id"]]].append(annotation["caption"])
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is no JSON ({error}): fetch it again") from None
    except (KeyError, TypeError) as error:
        expected = "images with id and file_name, annotations with the image_id of one of them and caption"
        raise UserError(f"{path} lacks {error} of COCO's captions: expected {expected}") from None
    return captions


# ---- CUB: birds with sentences, written about them or made of their attributes
def cub_subsets(path: Path, notes: list[str]) -> list[NamedImages]:
    """Return what trains, and what validates, of CUB_200_2011 or the folder that it is in; `notes` gets remarks."""
    root = next((folder for folder in (path, path / "CUB_200_2011") if (folder / "images.txt").is_file()), None)
    if root is None:
        raise UserError(f"No images.txt in {path}, which holds {contents(path)}: expected the folder CUB_200_2011")
    names, split = _numbered_lines(root / "images.txt"), root / "train_test_split.txt"
    trains = _numbered_lines(split) if split.is_file() else {}
    captions = _cub_captions(root, names, notes)
    train, val = {}, {}
    for number, name in names.items():
        (val if trains.get(number) == "0" else train)[name] = captions[number]
    return [NamedImages(root / "images", root / "images.txt", of_subset) for of_subset in (train, val) if of_subset]


def _numbered_lines(path: Path) -> dict[str, str]:
    lines = (line.strip().partition(" ") for line in read_text(path).split("\n"))
    return {number: what.strip() for number, _, what in lines if what}


def _cub_captions(root: Path, names: dict[str, str], notes: list[str]) -> dict[str, Sequence[str]]:
    """Return image's number → captions: those of the first folder with texts, made up for images without."""
    captions: dict[str, Sequence[str]] = {}
    places = ("text_c10", "text", "text/text_c10", "captions", "cvpr2016_cub/text_c10")
    for folder in filter(Path.is_dir, (home / place for home in (root, root.parent) for place in places)):
        texts = {number: folder / Path(name).with_suffix(".txt") for number, name in names.items()}
        lines = {number: read_text(text).split("\n") for number, text in texts.items() if text.is_file()}
        captions = {number: of_image for number, of_image in lines.items() if any(map(str.strip, of_image))}
        if captions:
            break
    if lacking := {number: name for number, name in names.items() if number not in captions}:
        notes.append(f"captions of {count_of(len(lacking), 'image')} of {root} made from class names and attributes")
        attributes = _certain_attributes(root)
        for number, name in lacking.items():  # in the folder of its class
            captions[number] = bird_sentences(name.partition("/")[0], attributes.get(number, []))
    return captions


def _certain_attributes(root: Path) -> dict[str, list[str]]:
    """Return image's number → the names of its attributes that somebody was certain of, in their order."""
    labels = root / "attributes" / "image_attribute_labels.txt"
    places = (root / "attributes" / "attributes.txt", root / "attributes.txt", root.parent / "attributes.txt")
    called = next((path for path in places if path.is_file()), None)
    if called is None or not labels.is_file():
        return {}
    names = _numbered_lines(called)
    of_each: dict[str, list[str]] = {}
    # image, attribute, whether it is there, certainty (3 probably, 4 definitely), seconds: 3.7 million lines
    for image, attribute in re.findall(r"^(\d+) (\d+) 1 [34]\b", read_text(labels), re.MULTILINE):
        if attribute in names:
            of_each.setdefault(image, []).append(names[attribute])
    return of_each


def bird_sentences(class_name: str, attributes: Sequence[str]) -> tuple[str, ...]:
    """Return sentences about a bird of CUB, by the name of its class and its attributes, of which each names three.

    >>> bird_sentences("149.Brown_Thrasher", ["has_wing_color::brown", "has_size::small_(5_-_9_in)"])
    ('a brown thrasher', 'a small bird with brown wing')
    """
    name = re.sub(r"^\d+\.", "", class_name).replace("_", " ").lower()
    values: dict[tuple[str, str], list[str]] = {}
    for attribute in attributes:
        what, _, value = attribute.removeprefix("has_").replace("_", " ").partition("::")
        part, _, kind = what.rpartition(" ")
        values.setdefault((part, kind), []).append(re.sub(r"\s*\(.*", "", value).replace("-", " "))
    known = [*values.pop(("", "size"), [])[:1], *values.pop(("primary", "color"), [])[:1]]
    phrases = [
        f"{' and '.join(of_part).removesuffix(part).strip()} {part}"  # of a tail the value is "forked tail"
        for (part, kind), of_part in values.items()
        if part and kind in ("color", "pattern", "shape")
    ]
    who = f"a {' '.join([*known, 'bird'])}"
    name = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return name, *(f"{who} with {', '.join(phrases[start : start + 3])}" for start in range(0, len(phrases), 3))


# ---- a person's own: captions in a table of file names (.jsonl, .csv, .tsv), or in a .txt beside each image
_FILE_COLUMNS = ("file_name", "image", "path", "image_path", "filename", "file", "img", "picture")


def own_subsets(path: Path, notes: list[str]) -> list[NamedImages]:
    """Return what trains, and what validates where it is there, of a folder or a table; `notes` gets remarks."""
    if path.is_file():
        refuse_shards(path)
        if path.suffix.lower() not in (".jsonl", ".csv", ".tsv"):
            raise UserError(f"{path}: expected a .jsonl or .csv with file names and captions, or a folder")
        return [NamedImages(path.parent, path, _read_table(path))]
    first, *rest = folders.choose_subset_names(folders.person_folders(path)) or ["train"]
    if not _table_in(path) and (train := _own_subset(path / first, notes)):
        others = (_own_subset(path / name, notes) for name in rest)
        return [train, *list(filter(None, others))[:1]]
    if whole := _own_subset(path, notes):
        return [whole]
    refuse_shards(path)
    expected = "metadata.jsonl or metadata.csv, a .txt beside each image, or a Hugging Face dataset"
    found = f"No captions in {path}, which holds {contents(path)}"
    raise UserError(f"{found}: expected {expected} ({SAVED_DATASET_FILES})")


def _own_subset(folder: Path, notes: list[str]) -> NamedImages | None:
    if not folder.is_dir():
        return None
    table = _table_in(folder)
    return NamedImages(folder, table, _read_table(table)) if table else _texts_beside(folder, notes)


def _table_in(folder: Path) -> Path | None:
    tables = [path for kind in ("jsonl", "csv", "tsv") for path in sorted(folder.glob(f"*.{kind}"))]
    named = [path for path in tables if path.stem == "metadata"]
    if len(tables) > 1 and not named:
        names = join_first(path.name for path in tables)
        raise UserError(f"{folder} holds {names}: set dataset_path to one of them")
    return (named or tables or [None])[0]


def _read_table(path: Path) -> dict[str, list[str]]:
    captions: dict[str, list[str]] = {}
    for where, record in (read_json_lines if path.suffix.lower() == ".jsonl" else _rows_of_csv)(path):
        if not isinstance(record, dict):
            expected = '{"file_name": "1.png", "text": "a caption"}'
            raise UserError(f"{where}, is a {type(record).__name__}: expected {expected}")
        name = _value(where, record, "file names", _FILE_COLUMNS)
        given = _value(where, record, "captions", CAPTION_COLUMNS)
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: the file name is {name!r}, expected text")
        name = name.strip().replace("\\", "/").removeprefix("./")
        captions.setdefault(name, []).extend(given if isinstance(given, list) else [given])
    if not captions:
        raise UserError(f"{path} is empty, expected a line for each image")
    return captions


def _rows_of_csv(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    head, _, body = read_text(path).partition("\n")
    delimiter = max(",;\t", key=head.count)
    names = [name.strip().lower() for row in csv.reader([head], delimiter=delimiter) for name in row]
    rows = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter, strict=True)
    try:
        for row in filter(None, rows):
            where = f"{path}, line {rows.line_num + 1:,}"
            if len(row) != len(names):
                found = f"{where}, has {count_of(len(row), 'field')}, its head {len(names)}"
                raise UserError(f'{found}: put captions with a comma into quotes ("…")')
            yield where, dict(zip(names, map(_parse_caption_cell, row), strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {rows.line_num + 1:,}, cannot be read as a table ({error})") from None


def _parse_caption_cell(cell: str) -> str | list[str]:
    try:
        values = json.loads(cell) if cell.startswith("[") else None
    except ValueError:
        return cell
    return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else cell


def _value(where: str, record: dict[str, Any], what: str, names: Sequence[str]) -> Any:
    for name in names:
        if name in record:
            return record[name]
    found = f"{where} has no column for {what}, only {join_first(record, 6)}"
    raise UserError(f"{found}: expected one called {either(names)}")


def _texts_beside(folder: Path, notes: list[str]) -> NamedImages | None:
    paths = list(files_below(folder, (*EXTENSIONS, "txt")))
    texts = {path.with_suffix(""): path for path in paths if path.suffix.lower() == ".txt"}
    images = {path: path.with_suffix("") for path in paths if path.suffix.lower() != ".txt"}
    captions = {
        path.relative_to(folder).as_posix(): read_text(texts[stem]).split("\n") if stem in texts else []
        for path, stem in images.items()
    }
    if not any(captions.values()):
        return None
    if alone := len(texts.keys() - set(images.values())):
        notes.append(f"{count_of(alone, '.txt file')} in {folder} beside no image")
    return NamedImages(folder, folder, captions)
