"""Images as arrays, tensors and batches; where they come from, a subclass of `DecodedImages` says."""

import copy
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import BytesIO
from itertools import chain, zip_longest
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from tqdm.auto import tqdm

from vavae_tools.data import loader
from vavae_tools.data.folders import IMAGE_EXTENSIONS, labels_of, list_folders
from vavae_tools.data.loader import Batched, OrderedDataModule, index_and_number, loading_workers, local_world_size
from vavae_tools.data.stored import convert_channels, is_grey, pixel_hash, turn_upright, white_of
from vavae_tools.runtime.errors import UserError, check_known, in_home, one_line
from vavae_tools.runtime.files import atomic_write

Size = tuple[int, int]  # (height, width) in pixels


def centre_crop(image: Image.Image, size: Size) -> Image.Image:
    """Return the largest centred part, resized, as class-to-image models see ImageNet (Dhariwal & Nichol 2021)."""
    height, width = size
    while image.height >= 2 * height and image.width >= 2 * width:  # bicubic weights alone would pass over pixels
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    covering = (round(image.width * scale), round(image.height * scale))
    image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


CROPS = {"adm": centre_crop, "none": lambda image, size: image.resize(size[::-1], Image.Resampling.BICUBIC)}


def to_unit(pixels: Tensor) -> Tensor:
    """Return uint8 0…255 as float32 in [-1, 1], any shape."""
    return pixels.float().div_(127.5).sub_(1.0)


def to_pixels(images: Tensor) -> Tensor:
    """Return numbers in [-1, 1] as uint8 0…255, rounded and clipped, any shape."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def save_image(pixels: Tensor, path: Path) -> None:
    """Write one image, uint8 (C, H, W) with C 1 or 3, whole or not at all; the ending of `path` names the format."""
    array = pixels.permute(1, 2, 0).cpu().numpy()
    image = Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)
    with atomic_write(path) as partial:
        image.save(partial, format=Image.registered_extensions()[path.suffix.lower()], quality=95)


@contextmanager
def image_errors(name: str | Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        hint = "remove or replace it; data_split.py names such files and leaves them out"
        raise UserError(f"{name} cannot be read as an image ({one_line(error)}): {hint}") from None


MEMORY_LIMIT = 4 * 2**30
"""Bytes of decoded images that all processes of a machine together keep in memory: 21,000 images of 256×256."""


class DecodedImages(Batched):
    """One subset, decoded once and kept in memory where it fits.

    A subclass has `opened(places)`, which yields Pillow images, and `stored_key()`, plain values that tell these images
    from others. `rows` int64 (N,) says which of the images that it was made with are left in it.

    Args:
        names: one for each image, unique.
        labels: int64 (N,).
        crop: a key of `CROPS`.
        channels: 3, or 1 for grey; images of the other kind are converted.
        title: of the progress bar and of messages.
        captions: for each image, one or more.

    A batch is {"images": uint8 (B, C, H, W), "labels": int64 (B,), "index": int64 (B,)}, the rows of `extra_fields`
    (tensors with a row for each image, such as cached features) and, if there are captions, "captions": one for each.
    """

    def __init__(
        self,
        names: Sequence[str],
        labels: Tensor,
        image_size: int | Size,
        crop: str = "none",
        channels: int = 3,
        title: str = "images",
        progress: bool = True,
        captions: Sequence[Sequence[str]] | None = None,
    ) -> None:
        check_known("crop", crop, CROPS)
        self.names, self.labels = list(names), labels
        self.crop, self.channels, self.title = crop, channels, title
        self.captions = None if captions is None else list(map(tuple, captions))
        self.extra_fields: dict[str, Tensor] = {}
        self.rows, self._progress = torch.arange(len(self.names)), progress
        self.notes: Sequence[str] = ()  # about what was left out
        self.white: int | None = None  # of images of more than 8 bits; None: each image's own
        self.resize(image_size)

    def resize(self, image_size: int | Size) -> None:
        self.image_size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if min(self.image_size) < 1:
            raise UserError(f"image_size {image_size}: at least one pixel is needed")
        self._memory: Tensor | None = None

    def fingerprint(self) -> str:
        """Return a hash of what is stored, and of the size, crop and channels that it is read with."""
        return hash_of([self.stored_key(), self.image_size, self.crop, self.channels])

    def contents(self) -> Iterator[bytes]:
        """Yield what the key of whatever is computed of these images follows from."""
        yield self.fingerprint().encode()

    def where(self, place: int) -> str:
        return f"{self.names[place]} of {self.title}"

    def part(self, places: Sequence[int]) -> Self:
        part, index = copy.copy(self), torch.as_tensor(places, dtype=torch.int64)
        part.names = [self.names[place] for place in places]
        part.labels, part.rows = self.labels[index], self.rows[index]
        part.captions = None if self.captions is None else [self.captions[place] for place in places]
        part.extra_fields, part._memory = {}, None
        return part

    def __len__(self) -> int:
        return len(self.names)

    @property
    def caption_counts(self) -> Tensor:
        """Return how many captions each image has: int64 (N,)."""
        return torch.tensor([len(captions) for captions in self.captions], dtype=torch.int64)

    def stored_channels(self) -> int:
        return 1 if all(all(map(all, self._of_each(is_grey, parts))) for parts in self._spread_then_all()) else 3

    def stored_white(self) -> int | None:
        """Return the white that all images of more than 8 bits have in common, by `white_of`; None without any."""
        for parts in self._spread_then_all():  # all are looked at where one is among the first
            found = [white for part in self._of_each(white_of, parts, broken=None) for white in part if white]
            if not found:
                return None
        return max(found)

    def pixel_hashes(self) -> list[str | None]:
        """Return `pixel_hash` of each image, None for one that is damaged."""
        return list(chain.from_iterable(self._of_each(pixel_hash, self._parts(), broken=None)))

    def _parts(self) -> list[range]:
        return [range(len(self))[start : start + 64] for start in range(0, len(self), 64)]  # a thread's at once

    def _spread_then_all(self) -> tuple[list[range], list[range]]:
        """Return some images from everywhere, where what is looked for is found soon, mostly; then all."""
        return [range(0, len(self), max(1, len(self) // 64))], self._parts()

    def _of_each(self, function: Callable, parts: Iterable[range], **broken: None) -> Iterator[list]:
        """Yield what `function` makes of each part's images, in threads; for a damaged one `broken`, where given."""

        def of_part(places: range) -> list:
            made = []
            for place in places:
                try:
                    with image_errors(self.where(place)), next(self.opened([place])) as image:
                        made.append(function(image))
                except UserError:
                    if not broken:
                        raise
                    made.append(None)
            return made

        pool = _decoding_threads()
        try:
            yield from pool.map(of_part, parts)
        finally:
            pool.shutdown(cancel_futures=True)

    def fits_memory(self) -> bool:
        """Return whether all of them, decoded, fit into this process's part of `MEMORY_LIMIT`."""
        return len(self) * math.prod(self.image_size) * self.channels <= MEMORY_LIMIT // local_world_size()

    def in_memory(self) -> Tensor:
        """Return all images, uint8 (N, C, H, W), decoded on the first call."""
        if self._memory is None:
            memory = torch.empty((len(self), *self.image_size, self.channels), dtype=torch.uint8).permute(0, 3, 1, 2)
            parts = self._parts()
            hidden = True if not self._progress or len(self) < 500 else None
            bar = tqdm(total=len(self), desc=f"reading {self.title}", unit="image", disable=hidden)
            with bar, _decoding_threads() as pool:
                for part, decoded in zip(parts, pool.map(self._decode, parts), strict=True):
                    memory[part.start : part.stop] = decoded
                    bar.update(len(part))
            self._memory = memory
        return self._memory

    def _decode(self, places: Sequence[int]) -> Tensor:
        decoded = np.empty((len(places), *self.image_size, self.channels), dtype=np.uint8)
        size, images = self.image_size[::-1], self.opened(places)
        for row, place in enumerate(places):
            with image_errors(self.where(place)), next(images) as image:
                turn_upright(image)
                image = convert_channels(image, self.channels, self.white)
            if image.size != size:
                image = CROPS[self.crop](image, self.image_size)
            decoded[row] = np.asarray(image).reshape(decoded.shape[1:])
        return torch.from_numpy(decoded).permute(0, 3, 1, 2)

    def images(self, places: Sequence[int]) -> Tensor:
        """Return uint8 (B, C, H, W), from memory where all fit."""
        if self.fits_memory():
            return self.in_memory()[torch.as_tensor(places, dtype=torch.int64)]
        return self._decode(places)

    def get_batch(self, indices: Sequence[int | tuple[int, int]]) -> dict[str, Any]:
        indices, numbers = index_and_number(indices)
        index = torch.tensor(indices, dtype=torch.int64)
        batch = {"images": self.images(indices), "labels": self.labels[index], "index": index}
        batch |= {name: rows[index] for name, rows in self.extra_fields.items()}
        if self.captions is not None:
            batch["captions"] = [self.captions[place][n] for place, n in zip(indices, numbers, strict=True)]
        return batch

    def preview_batch(self, count: int) -> dict[str, Any]:
        """Return a batch of the first `count` images when taken from one class after the other, of as many as fit."""
        classes = list(dict.fromkeys(self.labels.tolist()))
        classes = [classes[place] for place in spread(count, len(classes))]
        rows = [(self.labels == label).nonzero().flatten().tolist() for label in classes]
        in_turn = [row for turn in zip_longest(*rows) for row in turn if row is not None]
        return self.get_batch(in_turn[:count])


def spread(count: int, among: int) -> list[int]:
    """Return `count` places spread evenly over so many, the first and the last among them.

    >>> spread(8, 31), spread(8, 3)
    ([0, 4, 9, 13, 17, 21, 26, 30], [0, 1, 2])
    """
    return sorted({round(place * (among - 1) / max(1, count - 1)) for place in range(count)})


def _decoding_threads() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(max(1, loader.usable_cores() // local_world_size()))  # Pillow decodes without the GIL


class ImageFiles(DecodedImages):
    """Images in files, whose names say where in `folder` they are; further arguments are those of `DecodedImages`.

    Where `data_split.py` wrote them (`of_split`), the fingerprint says nothing of a crop if there is none.
    """

    def __init__(self, folder: str | Path, *args: Any, of_split: bool = False, **options: Any) -> None:
        self.folder, self.of_split = Path(folder), of_split
        super().__init__(*args, **{"title": self.folder.name, **options})

    @property
    def paths(self) -> list[Path]:
        return [self.folder / name for name in self.names]

    def opened(self, places: Sequence[int]) -> Iterator[Image.Image]:
        return (Image.open(self.folder / self.names[place]) for place in places)

    def sizes(self) -> list[int]:  # in bytes
        paths = self.paths
        parts = [paths[start : start + 1024] for start in range(0, len(paths), 1024)]
        with ThreadPoolExecutor(8) as pool:  # a remote disk answers each question late, but many at once
            return list(chain.from_iterable(pool.map(lambda part: [path.stat().st_size for path in part], parts)))

    def stored_key(self) -> list:
        return list(zip(self.names, self.sizes(), strict=True))

    def fingerprint(self) -> str:
        if not self.of_split or self.crop != "none":
            return super().fingerprint()
        return hash_of([self.stored_key(), self.image_size, self.channels])

    def contents(self) -> Iterator[bytes]:
        if self.crop != "none":
            yield f"crop {self.crop}".encode()
        if self.white not in (None, 65535):  # which was white of all images when the first caches were written
            yield f"white {self.white}".encode()
        with ThreadPoolExecutor(loader.usable_cores()) as pool:
            hashes = pool.map(_content_hash, self.paths)
            yield from (os.fsencode(name) + content for name, content in zip(self.names, hashes, strict=True))

    def where(self, place: int) -> str:
        return str(self.folder / self.names[place])


class ImageFolder(ImageFiles):
    """Images of one folder per person, such as a subset of a split, resized as a whole; `labels` are by folder name."""

    def __init__(
        self,
        folder: str | Path,
        image_size: int | Size,
        labels: dict[str, int] | None = None,
        channels: int = 3,
        progress: bool = True,
    ) -> None:
        folder = in_home(folder)
        people = list_folders(folder)
        labels = labels or labels_of(people)
        names = [f"{person}/{path.name}" for person, paths in people.items() for path in paths]
        if not names:
            raise UserError(f"No images ({', '.join(IMAGE_EXTENSIONS)}) in the folders of {folder}")
        of_names = torch.tensor([labels[person] for person, paths in people.items() for _ in paths])
        super().__init__(folder, names, of_names, image_size, "none", channels, of_split=True, progress=progress)


def channels_of(folder: str | Path) -> int:
    """Return 1 where all images in a folder of `ID_1/ ID_2/ …` are stored in grey, else 3."""
    return ImageFolder(folder, 1).stored_channels()


class ImageSetDataModule(OrderedDataModule):
    """Two subsets as batches, wherever their images come from; `datasets.ImageDataModule` finds them.

    `labels` are by class name. With `num_workers` None, `loading_workers` load what does not fit into memory.
    """

    test_data: DecodedImages | None = None  # never trained on, and nothing is chosen by them

    def __init__(
        self,
        train_data: DecodedImages,
        val_data: DecodedImages | None,
        labels: dict[str, int],
        batch_size: int = 16,
        num_workers: int | None = None,
        seed: int = 0,
    ) -> None:
        self._finds_workers = num_workers is None
        super().__init__(batch_size, num_workers or 0, seed)
        self.train_data, self.val_data, self.labels = train_data, val_data, labels
        self.num_classes = max(labels.values()) + 1
        self._find_workers()

    @property
    def channels(self) -> int:
        return self.train_data.channels

    def resize(self, image_size: int | Size) -> None:
        for subset in self._subsets() + ([] if self.test_data is None else [self.test_data]):
            subset.resize(image_size)
        self._find_workers()

    def _find_workers(self) -> None:
        if self._finds_workers:
            self.num_workers = 0 if self.train_data.fits_memory() else loading_workers()

    def _subsets(self) -> list[DecodedImages]:
        return [subset for subset in (self.train_data, self.val_data) if subset is not None]

    def fingerprint(self) -> str:
        return hash_of([[subset.fingerprint() for subset in self._subsets()], self.labels])

    def read_former_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Read a checkpoint from when this class had other names, and a split was known with its crop."""
        names = ("PictureDataModule", "PictureSetDataModule", ImageSetDataModule.__qualname__)
        former = next((checkpoint[name] for name in names if name in checkpoint), None)
        if former is not None and type(self).__qualname__ not in checkpoint:
            checkpoint[type(self).__qualname__] = former
            run = checkpoint.get("run", {})
            if run.get("data") == hash_of([list(map(DecodedImages.fingerprint, self._subsets())), self.labels]):
                run["data"] = self.fingerprint()

    def _loader(self, data: DecodedImages, order: Sampler | None, batch_size: int) -> DataLoader:
        if self.num_workers and data.fits_memory():
            data.in_memory()  # now, once, and not in each worker
        return super()._loader(data, order, batch_size)


def _content_hash(path: Path) -> bytes:
    data = path.read_bytes()
    content = hashlib.sha256(data).digest()
    if any(mark in data for mark in (b"Exif\0", b"eXIf", b"EXIF", b"type exif", b"tiff:Orientation")):
        with suppress(OSError), Image.open(BytesIO(data)) as image:
            if turn_upright(image) and image.format != "TIFF":  # the first caches have it as it is stored
                return content + b"upright"
    return content


def hash_of(values: list) -> str:
    return hashlib.sha256(json.dumps(values).encode()).hexdigest()
