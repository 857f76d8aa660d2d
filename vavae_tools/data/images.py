"""Picture folders as batches."""

import copy
import hashlib
import json
from array import array
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import zip_longest
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm.auto import tqdm

from vavae_tools.data.folders import PICTURE_EXTENSIONS, labels_of, list_folders
from vavae_tools.data.loader import OrderedDataModule, loading_workers, ranks_here, usable_cores
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import written_whole

# ---- How a picture of any size becomes one of the size wanted: its middle, or the whole of it


Size = tuple[int, int]
"""(height, width) in pixels"""


def centre_crop(picture: Image.Image, size: Size) -> Image.Image:
    """The middle of a picture, as large as can be, as class-to-image models see ImageNet (Dhariwal & Nichol 2021).

    Halved by averages while it stays at least as large as asked for, so that no pixel is passed over; then resized
    bicubically until it just covers `size`; then what lies over is cut off, equally on both sides.
    """
    height, width = size
    while picture.height >= 2 * height and picture.width >= 2 * width:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(height / picture.height, width / picture.width)
    covering = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(covering, Image.Resampling.BICUBIC)  # a copy where nothing is to be done
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def resize_whole(picture: Image.Image, size: Size) -> Image.Image:
    """The whole picture, resized bicubically: its axes keep their ends, as those of a spectrogram must."""
    return picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)


CROPS: dict[str, Callable[[Image.Image, Size], Image.Image]] = {"adm": centre_crop, "none": resize_whole}


def check_crop(crop: str) -> None:
    """
    Raises:
        UserError: no such way to crop.
    """
    if crop not in CROPS:
        raise UserError(f"No crop {crop!r}; there are {', '.join(CROPS)}")


# ---- The one place where pixels become numbers in [-1, 1] and pictures again, and where files of pictures are written


def to_unit(pixels: Tensor) -> Tensor:
    """Pixels uint8 0…255 → float32 in [-1, 1], any shape."""
    return pixels.float().div_(127.5).sub_(1.0)


def to_pixels(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] (what lies outside is clipped) → uint8 0…255, rounded, any shape."""
    return pictures.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def is_grey(picture: Image.Image) -> bool:
    """Whether a Pillow picture is stored in grey: black and white, 8, 16 or 32 bits, with or without alpha."""
    return Image.getmodebase(picture.mode) == "L"


def in_channels(picture: Image.Image, channels: int) -> Image.Image:
    """A Pillow picture with 3 channels (RGB) or 1 (grey, mode L), 8 bits each.

    Of 16 bits, 65,535 becomes white, and what lies above it in 32 bits too. Alpha is dropped: a transparent pixel keeps
    the colour that it is stored with.
    """
    if picture.mode.startswith("I"):  # integers of 16 or 32 bits, of which Pillow's own conversion makes 255 white
        array = (np.asarray(picture).clip(0, 65535).astype(np.uint32) + 128) // 257
        picture = Image.fromarray(array.astype(np.uint8))
    return picture.convert("RGB" if channels == 3 else "L")


def save_picture(pixels: Tensor, path: Path) -> None:
    """Write one picture, uint8 (C, H, W), under `path` (its ending names the format); it is whole or not there."""
    array = pixels.permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)
    with written_whole(path) as partial:
        picture.save(partial, format=Image.registered_extensions()[path.suffix.lower()], quality=95)


@contextmanager
def readable(name: str | Path) -> Iterator[None]:
    """Name the picture that cannot be decoded.

    Raises:
        UserError: in place of what Pillow raises.
    """
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{name} cannot be read as a picture ({error}): take it out or put a whole one there; data_split.py names "
            "such files and leaves them out"
        ) from None


# ---- Pictures of any source as one side of a data module: decoded once and kept in memory where they fit


MEMORY_LIMIT = 4 * 2**30
"""Decoded pictures up to this many bytes are kept in memory: 21,000 of 256×256, a seventh of what Kaggle has.

The processes of one machine share it, since each of them keeps all pictures."""
_AT_ONCE = 64  # pictures that a thread decodes before it asks for more
_HANDFUL = 32  # pictures that say what all are like


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
        self.crop, self.channels, self.title = crop, channels, title
        self.along: dict[str, Tensor] = {}
        self._progress = progress
        self.resize(image_size)

    def resize(self, image_size: int | tuple[int, int]) -> None:
        """Read them at this size from now on: pixels, one number or (height, width)."""
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if min(self.image_size) < 1:
            raise UserError(f"image_size {image_size}: at least one pixel is needed")
        self._memory: Tensor | None = None

    def stored(self, places: Sequence[int]) -> Sequence[Any]:
        """What `opened` takes, of several pictures at once."""
        raise NotImplementedError

    def opened(self, stored: Any) -> Image.Image:
        raise NotImplementedError

    def what_is_stored(self) -> list:
        """Plain values that tell these pictures from others, for `fingerprint`."""
        raise NotImplementedError

    def contents(self) -> Iterator[bytes]:
        """What tells these very pictures from others, for the key of what is computed from them and kept."""
        yield self.fingerprint().encode()

    def stored_channels(self) -> int:
        """1 where pictures are stored in grey, else 3: what the headers of a few, spread over all, say.

        Grey and coloured ones together have 3 channels, and so have pictures with a palette.
        """
        places = range(0, len(self), max(1, len(self) // _HANDFUL))
        for place, stored in zip(places, self.stored(places), strict=True):
            with readable(self.where(place)), self.opened(stored) as picture:
                if not is_grey(picture):
                    return 3
        return 1

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
        return _hash_of([self.what_is_stored(), self.image_size, self.crop, self.channels])

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


def channels_of(folder: str | Path, extensions: Collection[str] = PICTURE_EXTENSIONS) -> int:
    """`DecodedPictures.stored_channels` of a folder that holds `ID_1/ ID_2/ …`."""
    return PictureFolder(folder, 1, extensions=extensions).stored_channels()


class PictureFiles(DecodedPictures):
    """Pictures in files; further arguments are those of `DecodedPictures`.

    Args:
        of_split: whether `data_split.py` wrote them, whose fingerprint says nothing of a crop where there is none.
    """

    def __init__(
        self, paths: Sequence[Path], names: Sequence[str], labels: Tensor, of_split: bool = False, **options: Any
    ) -> None:
        super().__init__(names, labels, **options)
        self.paths, self.of_split = list(paths), of_split

    def stored(self, places: Sequence[int]) -> list[Path]:
        return [self.paths[place] for place in places]

    def opened(self, stored: Path) -> Image.Image:
        return Image.open(stored)

    def what_is_stored(self) -> list:
        return [(name, path.stat().st_size) for name, path in zip(self.names, self.paths, strict=True)]

    def fingerprint(self) -> str:
        if not self.of_split or self.crop != "none":
            return super().fingerprint()
        return _hash_of([self.what_is_stored(), self.image_size, self.channels])

    def contents(self) -> Iterator[bytes]:
        if self.crop != "none":
            yield f"crop {self.crop}".encode()
        with ThreadPoolExecutor(usable_cores()) as pool:  # neither reading nor hashing holds the interpreter's lock
            for start in range(0, len(self), 4096):  # a million at once would be a gigabyte of tasks
                names, paths = (values[start : start + 4096] for values in (self.names, self.paths))
                hashes = pool.map(lambda path: hashlib.sha256(path.read_bytes()).digest(), paths)
                yield from (name.encode() + content for name, content in zip(names, hashes, strict=True))

    def where(self, place: int) -> str:
        return str(self.paths[place])

    def part(self, places: Sequence[int]) -> Self:
        part = super().part(places)
        part.paths = [self.paths[place] for place in places]
        return part


class PictureFolder(PictureFiles):
    """Pictures of one folder per person, resized as a whole: nothing is cropped off their axes.

    Args:
        folder: holds `ID_1/ ID_2/ …` (one side of a split).
        image_size: pixels, one number or (height, width); pictures of other sizes are resized.
        labels: folder name → label; by default from the names in `folder`.
        channels: 3, or 1 for grey.
        extensions: which files are pictures.

    Raises:
        UserError: no such folder, no pictures in it, or a picture that cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        image_size: int | tuple[int, int],
        labels: dict[str, int] | None = None,
        channels: int = 3,
        progress: bool = True,
        extensions: Collection[str] = PICTURE_EXTENSIONS,
    ) -> None:
        self.folder = Path(folder)
        people = list_folders(self.folder, extensions)
        labels = labels or labels_of(list(people))
        paths = [path for name in people for path in people[name]]
        if not paths:
            raise UserError(f"No pictures ({', '.join(extensions)}) in the folders of {folder}")
        names = [f"{path.parent.name}/{path.name}" for path in paths]
        of_each = torch.tensor([labels[path.parent.name] for path in paths], dtype=torch.int64)
        options = {"image_size": image_size, "channels": channels, "title": self.folder.name, "progress": progress}
        super().__init__(paths, names, of_each, of_split=True, **options)


VALIDATION_SIDES = ("validation", "valid", "val", "dev", "test")
"""What the side that validates may be called; the first one there is taken."""
EXTENSIONS = (*PICTURE_EXTENSIONS, "bmp", "webp", "tif", "tiff", "ppm", "pgm")


class PictureSetDataModule(OrderedDataModule):
    """Two sides as batches, wherever their pictures come from; `datasets.PictureDataModule` finds them.

    Args:
        train_data, val_data: the sides; None where nothing validates.
        labels: class name → label.
        batch_size: pictures per device and step.
        num_workers: loading processes per device; by default 0 where the pictures fit into memory, else what
            `loading_workers` finds.
        seed: of the order.

    Attributes:
        num_classes: largest label + 1.
        channels: 3, or 1 where pictures are read in grey.
        remark: a line that says why there are fewer loading processes than cores; mostly empty.
    """

    def __init__(
        self,
        train_data: DecodedPictures,
        val_data: DecodedPictures | None,
        labels: dict[str, int],
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        self.remark = ""
        self._finds_workers = num_workers is None
        super().__init__(batch_size, num_workers or 0, seed)
        self.train_data, self.val_data, self.labels = train_data, val_data, labels
        self.num_classes = max(labels.values()) + 1
        self._find_workers()

    @property
    def channels(self) -> int:
        return self.train_data.channels

    def resize(self, image_size: int | tuple[int, int]) -> None:
        """Read pictures at this size from now on: where the model that says it is made after the data are known."""
        for side in self._sides():
            side.resize(image_size)
        self._find_workers()

    def _sides(self) -> list[DecodedPictures]:
        return [side for side in (self.train_data, self.val_data) if side is not None]

    def _find_workers(self) -> None:
        if self._finds_workers:
            self.num_workers, self.remark = 0, ""
            if not self.train_data.fits_memory():
                self.num_workers, self.remark = loading_workers(self.batch_size * self.train_data.row_bytes())

    def fingerprint(self) -> str:
        """A hash of both sides and their labels."""
        return self._fingerprint_by(lambda side: side.fingerprint())

    def _fingerprint_by(self, of_side: Callable[[DecodedPictures], str]) -> str:
        return _hash_of([[of_side(side) for side in self._sides()], self.labels])

    def take_over(self, checkpoint: dict[str, Any]) -> None:
        """Read a checkpoint from when an RAE's data were of this class: its place in them is this module's, and a split
        was known with its crop."""
        former = checkpoint.get(PictureSetDataModule.__qualname__)
        if former is not None and type(self).__qualname__ not in checkpoint:
            checkpoint[type(self).__qualname__] = former
            run = checkpoint.get("run", {})
            if run.get("data") == self._fingerprint_by(DecodedPictures.fingerprint):
                run["data"] = self.fingerprint()

    def _loader(self, data: DecodedPictures, order: Sampler | None, batch_size: int) -> DataLoader:
        self._find_workers()  # again, for what has come `along` since then
        if self.num_workers and data.fits_memory():
            data.in_memory()  # now, once, and not in each worker
        return super()._loader(data, order, batch_size)


def _hash_of(values: list) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
