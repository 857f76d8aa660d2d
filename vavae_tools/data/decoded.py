"""Pictures of any source as one side of a data module: decoded once and kept in memory where they fit."""

import copy
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import zip_longest
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vavae_tools.data.crops import CROPS, check_crop
from vavae_tools.data.loading import ranks_here, usable_cores
from vavae_tools.data.pixels import in_channels, readable
from vavae_tools.errors import UserError

MEMORY_LIMIT = 4 * 2**30
"""Decoded pictures up to this many bytes are kept in memory: 21,000 of 256×256, a seventh of what Kaggle has.

The processes of one machine share it, since each of them keeps all pictures."""
_AT_ONCE = 64  # pictures that a thread decodes before it asks for more


class Names(Sequence[str]):
    """Many names as one run of bytes: a fifth of a list's memory, and no page of it is copied by a loading process.

    >>> names = Names(["cat/1.png", "dog/2.png"])
    >>> len(names), names[1], names.part([1]) == ["dog/2.png"]
    (2, 'dog/2.png', True)
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._take(name.encode("utf-8", "surrogateescape") for name in names)

    def _take(self, encoded: Iterable[bytes]) -> None:
        text, ends = bytearray(), array("q", [0])
        for name in encoded:
            text += name
            ends.append(len(text))
        self.text, self.ends = bytes(text), np.array(ends, dtype=np.int64)

    @classmethod
    def of_bytes(cls, text: bytes, ends: np.ndarray) -> Self:
        """Of what `text` and `ends` of other names are; `ends` int64 (N + 1,) begins with 0."""
        names = cls.__new__(cls)
        names.text, names.ends = text, ends
        return names

    @classmethod
    def joined(cls, parts: Sequence["Names"]) -> Self:
        """The names of one after those of the other."""
        starts = np.cumsum([0, *(len(part.text) for part in parts)])
        ends = [part.ends[1:] + start for part, start in zip(parts, starts[:-1], strict=True)]
        return cls.of_bytes(b"".join(part.text for part in parts), np.concatenate([[0], *ends]).astype(np.int64))

    def part(self, places: Sequence[int]) -> Self:
        places = np.asarray(places, dtype=np.int64)
        part = type(self).__new__(type(self))
        bounds = zip(self.ends[places].tolist(), self.ends[places + 1].tolist(), strict=True)
        part._take(self.text[start:end] for start, end in bounds)
        return part

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, place: int | slice) -> Any:
        if isinstance(place, slice):
            return [self[i] for i in range(*place.indices(len(self)))]
        place = range(len(self))[place]
        return self.text[self.ends[place] : self.ends[place + 1]].decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        start = 0
        for end in self.ends[1:].tolist():
            yield self.text[start:end].decode("utf-8", "surrogateescape")
            start = end

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(str.__eq__, self, other))

    __hash__ = None


class DecodedPictures(Dataset):
    """One side; a subclass says by `stored` and `opened` where pictures lie and how one is opened.

    Args:
        names: of the pictures, each once; a list, or `Names` where they are many.
        labels: int64 (N,).
        image_size: pixels, one number or (height, width).
        crop: "adm" or "none", see `crops`.
        channels: 3, or 1 for grey; pictures of the other kind are converted.
        title: what the progress bar says is read.

    Attributes:
        along: further tensors with a row for each picture, in their order, such as cached features; empty at first.
            Memory-mapped ones stay on the disk: only the rows of a batch are read.

    A batch is {"pictures": uint8 (B, C, H, W), "labels": int64 (B,), "index": int64 (B,)}, and the rows of `along`
    under their own names.
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: Tensor,
        image_size: int | tuple[int, int],
        crop: str = "none",
        channels: int = 3,
        title: str = "pictures",
        progress: bool = True,
    ) -> None:
        check_crop(crop)
        self.names, self.labels = names if isinstance(names, Names) else list(names), labels
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if min(self.image_size) < 1:
            raise UserError(f"image_size {image_size}: at least one pixel is needed")
        self.crop, self.channels, self.title = crop, channels, title
        self.along: dict[str, Tensor] = {}
        self._progress = progress
        self._memory: Tensor | None = None

    def stored(self, places: Sequence[int]) -> Sequence[Any]:
        """What `opened` takes, of several pictures at once."""
        raise NotImplementedError

    def opened(self, stored: Any) -> Image.Image:
        raise NotImplementedError

    def what_is_stored(self) -> list:
        """Plain values that tell these pictures from others, for `fingerprint`."""
        raise NotImplementedError

    def where(self, place: int) -> str:
        """What a person finds a picture by."""
        return f"{self.names[place]} of {self.title}"

    def part(self, places: Sequence[int]) -> Self:
        """Some of these pictures, as a side of their own; nothing is decoded for it."""
        part = copy.copy(self)
        taken = self.names.part(places) if isinstance(self.names, Names) else [self.names[place] for place in places]
        part.names, part.labels = taken, self.labels[torch.as_tensor(places)]
        part.along, part._memory = {}, None
        return part

    def __len__(self) -> int:
        return len(self.names)

    def fingerprint(self) -> str:
        """A hash of what is stored, and of the size, crop and channels that it is read with."""
        settings = [self.what_is_stored(), self.image_size, self.crop, self.channels]
        return hashlib.sha256(json.dumps(settings).encode()).hexdigest()

    def fits_memory(self) -> bool:
        """Whether all of them, decoded, fit into this process's part of `MEMORY_LIMIT`."""
        return len(self) * self._picture_bytes() <= MEMORY_LIMIT // ranks_here()

    def _picture_bytes(self) -> int:
        return self.image_size[0] * self.image_size[1] * self.channels

    def row_bytes(self) -> int:
        """Bytes of one picture in a batch, with its rows of `along`."""
        along = sum(rows[:1].numel() * rows.element_size() for rows in self.along.values())
        return self._picture_bytes() + 2 * self.labels.element_size() + along

    def in_memory(self) -> Tensor:
        """All pictures, uint8 (N, C, H, W), decoded by several threads on the first call."""
        if self._memory is None:
            memory = np.empty((len(self), *self.image_size, self.channels), dtype=np.uint8)
            parts = [range(start, min(start + _AT_ONCE, len(self))) for start in range(0, len(self), _AT_ONCE)]
            hidden = True if not self._progress or len(self) < 500 else None
            bar = tqdm(total=len(self), desc=f"reading {self.title}", unit="picture", disable=hidden)
            # Pillow decodes without the interpreter's lock
            with bar, ThreadPoolExecutor(max(1, usable_cores() // ranks_here())) as pool:
                try:
                    for done in pool.map(lambda part: self._decode_into(memory[part.start : part.stop], part), parts):
                        bar.update(done)
                except BaseException:
                    pool.shutdown(cancel_futures=True)
                    raise
            self._memory = torch.from_numpy(memory).permute(0, 3, 1, 2)  # (N, C, H, W)
        return self._memory

    def _decode_into(self, memory: np.ndarray, places: Sequence[int]) -> int:
        size = (self.image_size[1], self.image_size[0])
        for row, (place, stored) in enumerate(zip(places, self.stored(places), strict=True)):
            with readable(self.where(place)), self.opened(stored) as picture:
                picture = in_channels(picture, self.channels)
            if picture.size != size:
                picture = CROPS[self.crop](picture, self.image_size)
            memory[row] = np.asarray(picture).reshape(memory.shape[1:])
        return len(places)

    def pictures(self, places: Sequence[int]) -> Tensor:
        """uint8 (B, C, H, W), from memory where all fit, else decoded now."""
        if self.fits_memory():
            return self.in_memory()[torch.as_tensor(places, dtype=torch.int64)]
        memory = np.empty((len(places), *self.image_size, self.channels), dtype=np.uint8)
        self._decode_into(memory, places)
        return torch.from_numpy(memory).permute(0, 3, 1, 2)

    def __getitems__(self, indices: Sequence[int]) -> dict[str, Tensor]:
        index = torch.as_tensor(indices, dtype=torch.int64)
        along = {name: rows[index] for name, rows in self.along.items()}
        return {"pictures": self.pictures(indices), "labels": self.labels[index], "index": index, **along}

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}

    def few_of_each(self, count: int) -> dict[str, Tensor]:
        """A batch of the first `count` pictures when taken from one class after the other: for previews."""
        rows: dict[int, list[int]] = {}
        for place, label in enumerate(self.labels.tolist()):
            rows.setdefault(label, []).append(place)
        in_turn = [row for turn in zip_longest(*rows.values()) for row in turn if row is not None]
        return self.__getitems__(in_turn[:count])
