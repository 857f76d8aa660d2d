"""A person's own captions: in a table of file names, in a .txt beside each picture, in a Hugging Face dataset."""

import csv
import io
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from vavae_tools.data.captions import Captioned, NamedPictures, cleaned, read_text
from vavae_tools.data.folders import contents, counted, either, extension_of, listed, natural_key
from vavae_tools.data.images import EXTENSIONS, VALIDATION_SIDES, Names
from vavae_tools.data.sources import hugging_face
from vavae_tools.runtime.errors import UserError

# ---- Files in which each line names a picture and its captions: .jsonl, .csv and .tsv


FILE_COLUMNS = ("file_name", "image", "path", "image_path", "filename", "file", "img", "picture")
CAPTION_COLUMNS = ("text", "caption", "captions", "prompt", "texts", "sentence", "sentences", "description")


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
        file, caption = (column_of(record, names) for names in (FILE_COLUMNS, CAPTION_COLUMNS))
        if file is None or caption is None:
            raise UserError(f"{path}, line {number:,}{_lacks(file, record)}")
        yield number, record[file], record[caption]


def _table_rows(path: Path, text: str) -> Iterator[tuple[int, Any, Any]]:
    head = text.partition("\n")[0]
    delimiter = max(",;\t", key=head.count)
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        header = [name.strip().lower() for name in next(rows, [])]
        file, caption = (column_of(header, names) for names in (FILE_COLUMNS, CAPTION_COLUMNS))
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


def column_of(columns: Iterable[str], names: Sequence[str]) -> str | None:
    """The first of the names that is one of the columns."""
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


METADATA = ("metadata.jsonl", "metadata.csv", "metadata.tsv")


def own_sides(path: Path, notes: list[str]) -> list[NamedPictures]:
    """What trains, and what validates where it is there.

    Args:
        path: a folder, or the .jsonl, .csv or .tsv that names pictures and captions.
        notes: gets lines about what was left out.

    Raises:
        UserError: no captions, or several files that may name them.
    """
    if path.is_file():
        if path.suffix.lower() not in (".jsonl", ".csv", ".tsv"):
            raise UserError(f"{path}: expected a .jsonl or .csv with file names and captions, or a folder")
        return [NamedPictures(path.parent, path, read_records(path))]
    whole = _own_side(path, notes, by_text=False)
    if whole:
        return [whole]
    if (path / "train").is_dir():
        train = _own_side(path / "train", notes)
        others = (_own_side(path / name, notes) for name in VALIDATION_SIDES if (path / name).is_dir())
        val = next(filter(None, others), None)
        if train:
            return [train, val] if val else [train]
    whole = _own_side(path, notes)
    if whole is None:
        raise UserError(
            f"No captions in {path}, which holds {contents(path)}: expected metadata.jsonl or metadata.csv, a .txt "
            f"beside each picture, or a Hugging Face dataset ({hugging_face.MARKS})"
        )
    return [whole]


def _own_side(folder: Path, notes: list[str], by_text: bool = True) -> NamedPictures | None:
    named = [folder / name for name in METADATA if (folder / name).is_file()]
    if not named:
        named = sorted(file for kind in ("jsonl", "csv", "tsv") for file in folder.glob(f"*.{kind}"))
        if len(named) > 1:
            raise UserError(
                f"{folder} holds {listed(file.name for file in named)}, of which each may name the captions: set "
                "dataset_path to one of them"
            )
    if named:
        return NamedPictures(folder, named[0], read_records(named[0]))
    return _beside(folder, notes) if by_text else None


def _beside(folder: Path, notes: list[str]) -> NamedPictures | None:
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
    return NamedPictures(folder, folder, captions)


def _text_file(place: str, stem: str, files: Sequence[str]) -> Path:
    plain = Path(place, f"{stem}.txt")
    return (
        plain
        if plain.name in files
        else next(Path(place, n) for n in files if n[:-4] == stem and n.lower()[-4:] == ".txt")
    )


# ---- a dataset
class CaptionedRows(Captioned, hugging_face.DatasetPictures):
    """Rows of a Hugging Face dataset; further arguments are those of `hugging_face.DatasetPictures`."""

    def __init__(self, captions: Sequence[Sequence[str]], *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.captions = list(map(tuple, captions))


def dataset_sides(
    path: Path, skip_missing: bool, notes: list[str], options: Mapping[str, object]
) -> list[CaptionedRows]:
    """The same of a Hugging Face dataset as `save_to_disk` wrote it.

    Args:
        options: further arguments of `hugging_face.DatasetPictures`.

    Raises:
        UserError: it has no captions, or a side is empty.
    """
    found = hugging_face.load_folder(path)
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
        caption = column_of(dataset.column_names, CAPTION_COLUMNS)
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
