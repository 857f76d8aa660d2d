"""Files in which each line names a picture and its captions: .jsonl, .csv and .tsv."""

import csv
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vavae_tools.data.caption_files import read_text
from vavae_tools.data.folders import counted, either, listed
from vavae_tools.errors import UserError

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
