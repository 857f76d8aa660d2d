"""Captioned pictures in files: what names them, whether they are there, and whether their captions say something."""

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image

from vavae_tools.data.captioned import Captioned
from vavae_tools.data.decoded import DecodedPictures, Names
from vavae_tools.data.folders import counted, listed
from vavae_tools.errors import UserError

_GO_ON = "or go on without them: data.skip_missing=true"


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


@dataclass
class NamedPictures:
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
