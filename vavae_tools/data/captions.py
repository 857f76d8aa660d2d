"""Captioned images: which of several captions is taken, both subsets as batches, and what files of them must hold."""

import json
import unicodedata
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vavae_tools.data.folders import EXTENSIONS, count_of, files_below
from vavae_tools.data.images import DecodedImages, ImageFiles, ImageSetDataModule, hash_of
from vavae_tools.data.loader import EpochOrder, OrderedDataModule
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError, join_first


class CaptionOrder(EpochOrder):
    """The order of `EpochOrder` as (index, number of a caption) pairs; the number follows from seed, epoch and index.

    `counts` int64 (N,) says how many captions each image has; further arguments are those of `EpochOrder`.
    """

    def __init__(self, counts: Tensor, *args: Any, **options: Any) -> None:
        super().__init__(len(counts), *args, **options)
        self.counts = counts

    def __iter__(self) -> Iterator[tuple[int, int]]:
        index = torch.tensor(list(super().__iter__()), dtype=torch.int64)
        uniform = Draws(self.seed, self.epoch, index).uniform("caption", 1)[:, 0]
        numbers = (uniform.double() * self.counts[index]).long()  # in float32 the product may round up to the count
        return iter(zip(index.tolist(), numbers.tolist(), strict=True))


class CaptionOrderedDataModule(OrderedDataModule):
    def _new_order(self, *place: int) -> CaptionOrder:
        return CaptionOrder(self.train_data.caption_counts, self.batch_size, self.seed, *place, self.gathered)

    def _order_settings(self, order: CaptionOrder) -> dict[str, int]:
        return {**super()._order_settings(order), "captions": int(order.counts.sum())}


class CaptionedDataModule(CaptionOrderedDataModule, ImageSetDataModule):
    """Captioned images as batches, each with one of its captions, at random; in validation with its first.

    `notes` are lines about what was left out; further arguments are those of `ImageSetDataModule` after `labels`.
    """

    def __init__(
        self, train_data: DecodedImages, val_data: DecodedImages | None, *args: Any, notes: Sequence[str] = ()
    ) -> None:
        self.notes = list(notes)
        super().__init__(train_data, val_data, {"any": 0}, *args)

    def captions_by_subset(self) -> dict[str, list[tuple[str, ...]]]:
        """Return the captions of the subsets that are there, as `text_states.encode_texts` takes them."""
        return dict(zip(("train", "val"), (data.captions for data in self._subsets()), strict=False))

    def fingerprint(self) -> str:
        return hash_of([[subset.fingerprint(), hash_of(subset.captions)] for subset in self._subsets()])


SKIP_HINT = "or leave them out with data.skip_missing=true"


class CaptionedFiles(ImageFiles):
    """Captioned images in files, which caches know by their names and lengths."""

    contents = DecodedImages.contents

    def stored_key(self) -> list:
        return [self.names, self.sizes()]


@dataclass
class NamedImages:
    """One subset as its files name it."""

    folder: Path  # that the names are relative to
    source: Path  # the file or folder that names them, for messages
    captions: Mapping[str, Sequence[str]]  # of each name, as they stand

    def subset(self, skip_missing: bool, notes: list[str], options: Mapping[str, Any]) -> CaptionedFiles:
        """Return the images, or raise a UserError where some are missing or have no caption, unless `skip_missing`."""
        missing, own_captions = dict.fromkeys(missing_images(self.folder, self.captions)), self.captions
        if missing:  # accents may be written in another way
            paths = (path.relative_to(self.folder).as_posix() for path in files_below(self.folder, EXTENSIONS))
            written = {unicodedata.normalize("NFC", path): path for path in paths}
            found = {name: written.get(unicodedata.normalize("NFC", name)) for name in missing}
            own_captions = {found.get(name) or name: of_name for name, of_name in self.captions.items()}
            missing = [name for name in missing if not found[name]]
        existing = {name: of_name for name, of_name in own_captions.items() if name not in missing}
        if missing:
            total = count_of(len(self.captions), "image")
            problem = f"{self.folder} lacks {len(missing):,} of {total} that {self.source} names: {join_first(missing)}"
            if not existing or not skip_missing:
                raise UserError(f"{problem}. Put them there" + (f", {SKIP_HINT}" if existing else ""))
            notes.append(f"{problem}; left out")
        captions = clean_captions(existing, self.source, skip_missing, notes)
        labels, own = torch.zeros(len(captions), dtype=torch.int64), {"title": self.source.name, **options}
        return CaptionedFiles(self.folder, captions, labels, captions=captions.values(), **own)


def missing_images(folder: Path, names: Collection[str]) -> list[str]:
    """Return the names that are not there, by listing each folder: asking for each file is slow on some disks."""
    existing: dict[str, set[str]] = {}
    for parent in {name.rpartition("/")[0] for name in names}:
        place = folder / parent
        existing[parent] = {path.name for path in place.iterdir()} if place.is_dir() else set()
    return [name for name in names if name.rpartition("/")[2] not in existing[name.rpartition("/")[0]]]


def clean_captions(
    captions: Mapping[str, Sequence[Any]], source: Path, skip_missing: bool, notes: list[str]
) -> dict[str, tuple[str, ...]]:
    """Return the captions with single spaces, each once; with `skip_missing` without images that have none."""
    clean, silent = {}, []
    for name, given in captions.items():
        try:
            words = [" ".join((caption or "").replace("\ufffd", " ").split()) for caption in given]
        except AttributeError:
            raise UserError(f"The caption of {name} in {source} is {given}, expected text") from None
        if kept := tuple(dict.fromkeys(filter(None, words))):
            clean[name] = kept
        else:
            silent.append(name)
    if silent:
        what = f"{count_of(len(silent), 'image')} of {source} with an empty caption or none: {join_first(silent)}"
        if not clean or not skip_missing:
            raise UserError(f"{what}. Write one for each" + (f", {SKIP_HINT}" if clean else ""))
        notes.append(f"{what}; left out")
    if not clean:
        raise UserError(f"{source} names no image that is there")
    return clean


def read_text(path: Path) -> str:
    """Return a file's text, with or without a byte order mark; raise a UserError where it is no UTF-8."""
    try:
        data = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(f"No such file: {path}") from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}, line {line:,}, is no UTF-8 ({error.reason}): save it as UTF-8") from None


def read_json_lines(path: Path) -> Iterator[tuple[str, Any]]:
    """Yield "path, line number" and the value of each line that is not empty; raise a UserError where it is no JSON."""
    for number, line in enumerate(read_text(path).split("\n"), 1):  # not splitlines: a text may hold other separators
        if line.strip():
            where = f"{path}, line {number:,}"
            try:
                value = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where}, is no JSON: {error.msg} at column {error.colno}") from None
            yield where, value
