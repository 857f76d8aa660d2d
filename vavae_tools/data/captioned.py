"""What captioned pictures are, whatever they are made of, and which of several captions one has each time.

A side is `DecodedPictures` with `captions`, one or more for each picture, and labels all 0. Of several captions one is
taken each time, which follows from seed, epoch and picture alone (`CaptionOrder`).
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from vavae_tools.data.decoded import DecodedPictures
from vavae_tools.data.order import EpochOrder, OrderedDataModule
from vavae_tools.data.picture_sets import PictureSetDataModule
from vavae_tools.draws import Draws

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
