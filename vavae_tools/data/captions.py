"""Pictures with sentences about them: COCO, CUB-200-2011, folders of one's own, Hugging Face datasets on the disk."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from PIL import Image
from torch import Tensor

from vavae_tools.data.folders import counted, listed
from vavae_tools.data.images import DecodedPictures, Names, PictureSetDataModule
from vavae_tools.data.loader import EpochOrder, OrderedDataModule
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError

# ---- What captioned pictures are, whatever they are made of, and which of several captions one has each time
#
# A side is `DecodedPictures` with `captions`, one or more for each picture, and labels all 0. Of several captions one
# is taken each time, which follows from seed, epoch and picture alone (`CaptionOrder`).


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


class CaptionOrderedDataModule(OrderedDataModule):
    """A DataModule whose training side has `caption_counts`: each picture comes with the number of a caption."""

    def _new_order(self) -> CaptionOrder:
        return CaptionOrder(self.train_data.caption_counts, self.batch_size, self.seed, *self._place())

    def _what_orders(self, order: CaptionOrder) -> dict[str, int]:
        return {**super()._what_orders(order), "captions": int(order.counts.sum())}


# ---- sides, and both of them
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


class CaptionedDataModule(CaptionOrderedDataModule, PictureSetDataModule):
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


# ---- Captioned pictures in files: what names them, whether they are there, and whether their captions say something


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
