"""Pictures on disk: a file for each in a folder for each person, or one .npz of all as ADM's evaluator reads it."""

import os
import re
import shutil
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np
from torch import Tensor

from vavae_tools.data.images import save_picture
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import written_whole

_PNG = re.compile(r"seed\d+_\d{5,}\.png")
_NPZ = re.compile(r"samples_(\d+)x\d+x\d+x3\.npz")
_PART = re.compile(r"(\d+)-(\d+)\.npy")
_PARTS = ".parts"


def numbers_of(labels: Iterable[int]) -> list[int]:
    """How often each label came before.

    >>> numbers_of([4, 7, 4, 4])
    [0, 0, 1, 2]
    """
    counts: dict[int, int] = {}
    numbers = []
    for label in labels:
        numbers.append(counts.get(label, 0))
        counts[label] = numbers[-1] + 1
    return numbers


class PictureFiles(Protocol):
    """Where pictures go."""

    kind: str
    """"png" or "npz"""
    output_dir: Path

    def there(self) -> np.ndarray:
        """Which of the pictures are there, bool (N,)."""

    def clear_up(self) -> None:
        """Remove what a killed run left unfinished."""

    def tasks(self, start: int, pictures: Tensor) -> list[tuple]:
        """Functions with their arguments that write a batch and return how many pictures were new."""

    def finish(self) -> None:
        """Bring them into their last form, when all are there."""

    def paths(self) -> list[Path]:
        """The files in their last form."""


class Pngs:
    """A folder for each person, a file for each picture."""

    kind = "png"

    def __init__(self, output_dir: Path, labels: list[int], seed: int, folders: dict[int, str]) -> None:
        self.output_dir = output_dir
        self.names = [
            (folders[label], f"seed{seed}_{number:05d}.png")
            for label, number in zip(labels, numbers_of(labels), strict=True)
        ]
        self.folders = {folder for folder, _ in self.names}

    def there(self) -> np.ndarray:
        found = {folder: set(_names_in(self.output_dir / folder)) for folder in self.folders}
        return np.array([name in found[folder] for folder, name in self.names])

    def clear_up(self) -> None:
        for folder in self.folders:
            for name in _names_in(self.output_dir / folder):
                if name.startswith(".seed") and name.endswith(".partial"):
                    (self.output_dir / folder / name).unlink(missing_ok=True)

    def tasks(self, start: int, pictures: Tensor) -> list[tuple]:
        return [(self._write, picture, *self.names[start + i]) for i, picture in enumerate(pictures)]

    def _write(self, picture: Tensor, folder: str, name: str) -> bool:
        path = self.output_dir / folder / name
        if path.is_file():
            return False
        save_picture(picture, path)
        return True

    def finish(self) -> None:
        pass

    def paths(self) -> list[Path]:
        return [self.output_dir / folder / name for folder, name in self.names]


class Npz:
    """One file as ADM's evaluator reads it; until all is there, a file for each batch in `.parts`."""

    kind = "npz"

    def __init__(self, output_dir: Path, labels: list[int], size: tuple[int, int]) -> None:
        self.output_dir, self.labels = output_dir, np.array(labels, dtype=np.int64)
        self.shape = (len(labels), *size, 3)  # (N, H, W, 3)
        self.parts = output_dir / _PARTS
        self.path = output_dir / f"samples_{'x'.join(map(str, self.shape))}.npz"

    def there(self) -> np.ndarray:
        there = np.zeros(len(self.labels), dtype=bool)
        for start, stop, _ in self._sources():
            there[start:stop] = True
        return there

    def clear_up(self) -> None:
        for folder, start in ((self.parts, "."), (self.output_dir, ".samples_")):
            for name in _names_in(folder):
                if name.startswith(start) and name.endswith(".partial"):
                    (folder / name).unlink(missing_ok=True)

    def tasks(self, start: int, pictures: Tensor) -> list[tuple]:
        return [(self._write, start, pictures)]

    def _write(self, start: int, pictures: Tensor) -> int:
        rows = pictures.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()  # (n, H, W, 3), grey three times
        new = len(rows) - int(self.there()[start : start + len(rows)].sum())
        with (
            written_whole(self.parts / f"{start:08d}-{start + len(rows):08d}.npy") as partial,
            partial.open("wb") as file,
        ):
            np.save(file, rows)
        return new

    def finish(self) -> None:
        if not self.path.is_file():
            with written_whole(self.path) as partial, zipfile.ZipFile(partial, "w", zipfile.ZIP_STORED) as archive:
                _put(archive, "arr_0", np.uint8, self.shape, self._rows())
                _put(archive, "arr_1", np.int64, self.labels.shape, [self.labels])
        shutil.rmtree(self.parts, ignore_errors=True)

    def _sources(self) -> list[tuple[int, int, Path]]:
        """Files with pictures start … stop − 1."""
        files = [(0, int(m[1]), self.output_dir / m[0]) for n in _names_in(self.output_dir) if (m := _NPZ.fullmatch(n))]
        parts = [(int(m[1]), int(m[2]), self.parts / m[0]) for n in _names_in(self.parts) if (m := _PART.fullmatch(n))]
        return files + parts

    def _rows(self) -> Iterator[np.ndarray]:
        """All pictures in order, some at a time."""
        done = 0
        for start, stop, path in sorted(self._sources(), key=lambda source: (source[0], -source[1])):
            stop = min(stop, len(self.labels))
            if start <= done < stop:
                yield from _read_rows(path, done - start, stop - start)
                done = stop
        if done < len(self.labels):
            raise UserError(f"{self.parts} lost pictures from number {done} on while they were made: run it again")

    def paths(self) -> list[Path]:
        return [self.path]


def pngs_in(directory: Path, folders: Iterable[str]) -> bool:
    """Whether there are pictures by these names in any of the folders."""
    return any(_PNG.fullmatch(name) for folder in folders for name in _names_in(directory / folder))


def npz_in(directory: Path) -> bool:
    """Whether there is such a file, or a part of one."""
    return any(_NPZ.fullmatch(name) or name == _PARTS for name in _names_in(directory))


def remove_pngs(directory: Path, folders: Iterable[str]) -> None:
    """Remove pictures by these names, and folders that are empty then; nothing else."""
    for folder in folders:
        ours = [name for name in _names_in(directory / folder) if _PNG.fullmatch(name)]
        for name in ours:
            (directory / folder / name).unlink()
        if ours:
            with suppress(OSError):  # something else is in it
                (directory / folder).rmdir()


def remove_npz(directory: Path) -> None:
    """Remove such files and parts of them; nothing else."""
    for name in _names_in(directory):
        if _NPZ.fullmatch(name):
            (directory / name).unlink()
    shutil.rmtree(directory / _PARTS, ignore_errors=True)


def _names_in(folder: Path) -> list[str]:
    with suppress(FileNotFoundError, NotADirectoryError):
        return [path.name for path in folder.iterdir()]
    return []


def _put(archive: zipfile.ZipFile, name: str, dtype: type, shape: tuple, rows: Iterable[np.ndarray]) -> None:
    member = zipfile.ZipInfo(f"{name}.npy")  # dated 1980, so that the same pictures are the same bytes
    header = {"descr": np.lib.format.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
    with archive.open(member, "w", force_zip64=True) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for some in rows:
            file.write(np.ascontiguousarray(some).data)


def _read_rows(path: Path, first: int, last: int, at_once: int = 64) -> Iterator[np.ndarray]:
    """Rows first … last − 1 of a `.npy`, or of arr_0 in one of our `.npz`, some at a time."""
    if path.suffix == ".npy":
        array = np.load(path, mmap_mode="r")
        yield from (array[i : min(i + at_once, last)] for i in range(first, last, at_once))
        return
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        np.lib.format.read_magic(file)
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
        size = int(np.prod(shape[1:])) * dtype.itemsize
        file.seek(first * size, os.SEEK_CUR)
        for i in range(first, last, at_once):
            count = min(at_once, last - i)
            yield np.frombuffer(file.read(count * size), dtype).reshape(count, *shape[1:])
