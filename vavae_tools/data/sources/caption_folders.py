"""A person's own captions: in a table of file names (.jsonl, .csv, .tsv), or in a .txt beside each image."""

import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from vavae_tools.data.captions import NamedImages, read_json_lines, read_text
from vavae_tools.data.folders import (
    EXTENSIONS,
    VALIDATION_SUBSETS,
    contents,
    count_of,
    either,
    extension_of,
    natural_key,
)
from vavae_tools.data.sources.hugging_face import CAPTION_COLUMNS, SAVED_DATASET_FILES
from vavae_tools.data.sources.shards import refuse_shards
from vavae_tools.runtime.errors import UserError, join_first

FILE_COLUMNS = ("file_name", "image", "path", "image_path", "filename", "file", "img", "picture")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv")
_COLUMNS = (("file names", FILE_COLUMNS), ("captions", CAPTION_COLUMNS))
_EXAMPLE = '{"file_name": "1.png", "text": "a caption"}'


def own_subsets(path: Path, notes: list[str]) -> list[NamedImages]:
    """Return what trains, and what validates where it is there, of a folder or a table; `notes` gets remarks."""
    if path.is_file():
        refuse_shards(path)
        if path.suffix.lower() not in (".jsonl", ".csv", ".tsv"):
            raise UserError(f"{path}: expected a .jsonl or .csv with file names and captions, or a folder")
        return [NamedImages(path.parent, path, read_records(path))]
    if not _table_in(path) and (train := _own_subset(path / "train", notes)):
        others = (_own_subset(path / name, notes) for name in VALIDATION_SUBSETS)
        return [train, *[subset for subset in others if subset][:1]]
    if whole := _own_subset(path, notes):
        return [whole]
    refuse_shards(path)
    expected = (
        f"metadata.jsonl or metadata.csv, a .txt beside each image, or a Hugging Face dataset ({SAVED_DATASET_FILES})"
    )
    raise UserError(f"No captions in {path}, which holds {contents(path)}: expected {expected}")


def _own_subset(folder: Path, notes: list[str]) -> NamedImages | None:
    if not folder.is_dir():
        return None
    table = _table_in(folder)
    return NamedImages(folder, table, read_records(table)) if table else _texts_beside(folder, notes)


def _table_in(folder: Path) -> Path | None:
    tables = [folder / name for name in METADATA if (folder / name).is_file()]
    if not tables:
        tables = sorted(file for kind in ("jsonl", "csv", "tsv") for file in folder.glob(f"*.{kind}"))
        if len(tables) > 1:
            raise UserError(
                f"{folder} holds {join_first(file.name for file in tables)}: set dataset_path to one of them"
            )
    return tables[0] if tables else None


# ---- a table
def read_records(path: Path) -> dict[str, list[str]]:
    """Return image → captions, of a .jsonl, .csv or .tsv, in their order; an image may be on several lines."""
    captions: dict[str, list[str]] = {}
    for where, record in (read_json_lines if path.suffix.lower() == ".jsonl" else _table_rows)(path):
        if not isinstance(record, dict):
            raise UserError(f"{where}, is a {type(record).__name__}: expected {_EXAMPLE}")
        name, given = (_value(where, record, *column) for column in _COLUMNS)
        if not isinstance(name, str) or not name.strip():
            raise UserError(f"{where}: the file name is {name!r}, expected text")
        name = name.strip().replace("\\", "/").removeprefix("./")
        captions.setdefault(name, []).extend(given if isinstance(given, list) else [given])
    if not captions:
        raise UserError(f"{path} is empty, expected a line for each image")
    return captions


def _table_rows(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    head, _, body = read_text(path).partition("\n")
    delimiter = max(",;\t", key=head.count)
    names = [name.strip().lower() for row in csv.reader([head], delimiter=delimiter) for name in row]
    rows = csv.reader(io.StringIO(body, newline=""), delimiter=delimiter, strict=True)

    def where() -> str:
        return f"{path}, line {rows.line_num + 1:,}"

    try:
        for row in filter(None, rows):
            if len(row) != len(names):
                found = f"{where()}, has {count_of(len(row), 'field')}, its head {len(names)}"
                raise UserError(f'{found}: put captions with a comma into quotes ("…")')
            yield where(), dict(zip(names, map(_parse_caption_cell, row), strict=True))
    except csv.Error as error:
        raise UserError(f"{where()}, cannot be read as a table ({error})") from None


def _parse_caption_cell(cell: str) -> str | list[str]:
    """Return the captions of a cell that holds a list of them, as JSON, else the cell."""
    try:
        values = json.loads(cell) if cell.startswith("[") else None
    except ValueError:
        return cell
    return values if isinstance(values, list) and all(isinstance(value, str) for value in values) else cell


def _value(where: str, record: dict[str, Any], what: str, names: Sequence[str]) -> Any:
    """Return the value under the first of the names that is there."""
    for name in names:
        if name in record:
            return record[name]
    raise UserError(
        f"{where} has no column for {what}, only {join_first(record, 6)}: expected one called {either(names)}"
    )


def _texts_beside(folder: Path, notes: list[str]) -> NamedImages | None:
    """Return images with a .txt of the same name, a caption a line."""
    captions: dict[str, Sequence[str]] = {}
    alone = 0
    for place, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_key)
        texts = {name.rpartition(".")[0]: Path(place, name) for name in files if extension_of(name) == "txt"}
        images = sorted((name for name in files if extension_of(name) in EXTENSIONS), key=natural_key)
        alone += len(texts.keys() - {name.rpartition(".")[0] for name in images})
        for name in images:
            text = texts.get(name.rpartition(".")[0])
            captions[Path(place, name).relative_to(folder).as_posix()] = read_text(text).split("\n") if text else []
    if not any(captions.values()):
        return None
    if alone:
        notes.append(f"{count_of(alone, '.txt file')} in {folder} beside no image")
    return NamedImages(folder, folder, captions)
