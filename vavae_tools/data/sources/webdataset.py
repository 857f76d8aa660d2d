"""Pictures in tar files (WebDataset shards) as sides of a data module, never unpacked.

A shard holds `KEY.jpg` (or another picture) and beside it `KEY.cls`, a whole number, or `KEY.json` with a `label`,
`class_name` or `class`; where no shard has any of these, a picture's folder is its class, as in a tar of class folders.
"""

import functools
import hashlib
import json
import os
import re
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any, Self
from zipfile import BadZipFile

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from vavae_tools.data.folders import contents, either, extension_of, labels_of, listed, natural_key, no_such_folder
from vavae_tools.data.images import DecodedPictures, Names
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import written_whole

# ---- Where the pictures of a tar file lie in it, and what it says about them, found by its headers alone
#
# A key ends at the first dot of a file's name, as webdataset has it.


LABEL_FIELDS = ("label", "class_name", "class")
"""Of a JSON member; a whole number is a label, a text the name of a class."""
_MAGIC = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"\x04\x22\x4d\x18": "lz4",
}
_BLOCK = 512
_ZEROS = bytes(_BLOCK)
_WINDOW = 8192  # read at once around a header: a label, the next header, and the end of the picture before it
_PADDING = 2**20  # of zeros, at most, after the last member; a file with more of them was never written to its end
_LARGEST_LABEL = 2**20  # bytes of a member that says a label
_FORM = 1  # of the index files
_OPEN = 128  # shards a process holds open; there may be thousands

Read = Callable[[int, int], bytes]  # from a place in the file to another


@dataclass(frozen=True)
class Shard:
    """One tar file, and by what its pictures are known.

    Attributes:
        bytes, mtime_ns: of the file, when its index was made; a file that has others by now is not read.
        digest: a hash of all headers (names, sizes, times), of what says the labels, and of each picture's last 513 to
            1,024 bytes, which hold a PNG's checksums and the end of a JPEG's code. Whoever changes a picture or packs
            it again changes this; a copy of the shard elsewhere keeps it; and nobody reads gigabytes for it.
    """

    path: Path
    bytes: int
    mtime_ns: int
    digest: str

    def read(self, offset: int, size: int) -> bytes:
        """The bytes from `offset` on.

        Raises:
            UserError: the file is not what it was when its index was made.
        """
        handle = _opened(str(self.path), self.bytes, self.mtime_ns)
        found = _read(handle.number, offset, size)
        if len(found) < size:
            raise UserError(_changed(self.path))
        return found


class _Handle:
    """An open file, closed once the last thread that reads from it has let it go."""

    def __init__(self, path: str) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        with suppress(AttributeError, OSError):
            os.close(self.number)


@functools.lru_cache(maxsize=_OPEN)
def _opened(path: str, size: int, mtime_ns: int) -> _Handle:
    try:
        handle = _Handle(path)
    except FileNotFoundError:
        raise UserError(_changed(path)) from None
    found = os.fstat(handle.number)
    if (found.st_size, found.st_mtime_ns) != (size, mtime_ns):
        raise UserError(_changed(path))
    return handle


def _changed(path: object) -> str:
    return f"The shard {path} was changed or taken away while it was read: leave the data as they are, and run it again"


def _read(number: int, offset: int, size: int) -> bytes:
    parts = []
    while size > 0 and (part := os.pread(number, size, offset)):
        parts.append(part)
        offset, size = offset + len(part), size - len(part)
    return parts[0] if len(parts) == 1 else b"".join(parts)


# ---- the index
@dataclass(frozen=True)
class ShardIndex:
    """What a shard holds, in the order of its pictures' places.

    Attributes:
        names: of the pictures' files.
        offsets, sizes: int64 (N,), in bytes.
        numbers: int64 (N,), the labels that are said; −1 where none is.
        words, word: names of classes that are said, and which of them is a picture's, int32 (N,); −1 for none.
    """

    shard: Shard
    names: Names
    offsets: np.ndarray
    sizes: np.ndarray
    numbers: np.ndarray
    words: list[str]
    word: np.ndarray

    @property
    def is_labelled(self) -> bool:
        return bool((self.numbers >= 0).any() or (self.word >= 0).any())


def index_shard(path: Path, extensions: Sequence[str]) -> ShardIndex:
    """The index of a tar file: read from `.NAME.index` beside it, else made, and left there where that can be written.

    Raises:
        UserError: it is compressed, damaged, cut off or no tar, or its pictures and labels do not belong together.
    """
    found = path.stat()
    known = (_FORM, found.st_size, found.st_mtime_ns, ",".join(extensions))
    kept = path.with_name(f".{path.name}.index")
    with suppress(OSError, ValueError, KeyError, EOFError, BadZipFile):
        return _kept_index(kept, path, known)
    index = _make_index(path, extensions)
    with suppress(OSError), written_whole(kept) as partial, partial.open("wb") as file:  # a data set may be read-only
        np.savez(
            file,
            known=np.frombuffer(json.dumps(known).encode(), np.uint8),
            digest=np.frombuffer(index.shard.digest.encode(), np.uint8),
            text=np.frombuffer(index.names.text, np.uint8),
            ends=index.names.ends,
            words=np.frombuffer(json.dumps(index.words).encode(), np.uint8),
            **{name: getattr(index, name) for name in ("offsets", "sizes", "numbers", "word")},
        )
    return index


def _kept_index(kept: Path, path: Path, known: tuple) -> ShardIndex:
    with np.load(kept, allow_pickle=False) as arrays:
        if json.loads(arrays["known"].tobytes()) != list(known):
            raise ValueError("of another file")
        shard = Shard(path, known[1], known[2], arrays["digest"].tobytes().decode())
        names = Names.of_bytes(arrays["text"].tobytes(), arrays["ends"])
        columns = {name: arrays[name] for name in ("offsets", "sizes", "numbers", "word")}
        return ShardIndex(shard, names, words=json.loads(arrays["words"].tobytes()), **columns)


@dataclass(slots=True)
class _Member:
    name: str
    offset: int
    size: int
    is_link: bool


def _make_index(path: Path, extensions: Sequence[str]) -> ShardIndex:
    handle, digest = _Handle(str(path)), hashlib.sha256()
    found = os.fstat(handle.number)
    read = _windowed(handle.number)
    names: list[str] = []
    seen: set[str] = set()
    offsets, sizes = array("q"), array("q")
    said: dict[str, dict[str, int | str]] = {}  # key → number and word
    others: Counter[str] = Counter()
    for member in _members(path, found.st_size, read, digest):
        name = member.name
        folder, _, file = name.rpartition("/")
        if file.startswith(".") or "__MACOSX" in folder:
            continue
        stem, _, kind = file.partition(".")
        kind = kind.lower()
        if kind in ("cls", "json"):
            if member.is_link or member.size > _LARGEST_LABEL:
                raise UserError(
                    f"{name} of {path} is no label: expected a short text, not a link or {member.size:,} bytes"
                )
            content = read(member.offset, member.offset + member.size)
            digest.update(content)
            of_key = said.setdefault(f"{folder}/{stem}", {})
            for what, value in _label(name, path, kind, content).items():
                if kind == "cls" or what not in of_key:  # where both say a number, .cls does
                    of_key[what] = value
        elif extension_of(file) in extensions:
            if member.is_link:
                raise UserError(f"{name} of {path} is a link: pack the shard again, with tar's --dereference")
            if name in seen:
                raise UserError(f"{path} holds {name} twice: take one of them out")
            seen.add(name)
            names.append(name)
            offsets.append(member.offset)
            sizes.append(member.size)
            last = member.offset + member.size
            digest.update(read(max(member.offset, (last - 1) // _BLOCK * _BLOCK - _BLOCK), last))
        else:
            others[extension_of(file) or "no extension"] += 1
    if not names:
        there = listed(f"{count:,} .{kind}" for kind, count in others.most_common()) or "nothing else"
        raise UserError(f"{path} holds no picture ({listed(extensions)}); it holds {there}")
    said = {key: of_key for key, of_key in said.items() if of_key}
    rows = _pictures_of_keys(path, names, extensions) if said else None
    columns = [np.array(values, dtype=np.int64) for values in (offsets, sizes)]
    if rows is not None and len(rows) < len(names):
        names, columns = [names[row] for row in rows], [column[rows] for column in columns]
    numbers, word = np.full(len(names), -1, np.int64), np.full(len(names), -1, np.int32)
    words: dict[str, int] = {}
    if said:
        for row, name in enumerate(names):
            of_key = said.get(_key(name))
            if of_key is None:
                raise UserError(f"{name} of {path} has no label, while others there have one: add its .cls or .json")
            numbers[row] = of_key.get("number", -1)
            if "word" in of_key:
                word[row] = words.setdefault(of_key["word"], len(words))
    shard = Shard(path, found.st_size, found.st_mtime_ns, digest.hexdigest())
    return ShardIndex(shard, Names(names), *columns, numbers, list(words), word)


def _key(name: str) -> str:
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _pictures_of_keys(path: Path, names: Sequence[str], extensions: Sequence[str]) -> list[int]:
    """Which pictures labels are meant for: `KEY.jpg`, and of `KEY.jpg` and `KEY.mask.png` the first one."""
    rows: dict[str, int] = {}
    with_more_dots = []
    for row, name in enumerate(names):
        if name.rpartition("/")[2].partition(".")[2].lower() not in extensions:
            with_more_dots.append(name)
        elif rows.setdefault(_key(name), row) != row:
            first = names[rows[_key(name)]]
            raise UserError(f"{path} holds two pictures of one key, {first} and {name}: take one out or rename it")
    for name in with_more_dots:
        if _key(name) not in rows:
            raise UserError(
                f"{name} of {path}: a key ends at the first dot of the name, so that no label belongs to it. Pack it "
                "again under a name without further dots"
            )
    return list(rows.values())


def _label(name: str, path: Path, kind: str, content: bytes) -> dict[str, int | str]:
    """The number and the word that a member says; a JSON member may say none."""
    shown = content[:40].decode("utf-8", "replace").strip()
    if kind == "cls":
        try:
            number = int(content)
        except ValueError:
            number = -1
        if number < 0:
            raise UserError(f"{name} of {path} says {shown!r}, expected the class as a whole number from 0 on")
        return {"number": number}
    try:
        values = json.loads(content)
    except ValueError:
        raise UserError(f"{name} of {path} is no JSON: {shown!r}") from None
    label: dict[str, int | str] = {}
    for field in LABEL_FIELDS if isinstance(values, dict) else ():
        value = values.get(field)
        if isinstance(value, int) and not isinstance(value, bool):
            if value < 0:
                raise UserError(f"{name} of {path} says {field} {value}, expected a whole number from 0 on")
            label.setdefault("number", value)
        elif isinstance(value, str) and value:
            label.setdefault("word", value)
    return label


# ---- a tar's headers
def _windowed(number: int) -> Read:
    """A function that reads from an open file through a window, so that neighbours cost one call of the system."""
    start, window = 0, b""

    def read(offset: int, end: int) -> bytes:
        nonlocal start, window
        if offset < start or end > start + len(window):
            start, window = offset, _read(number, offset, max(_WINDOW, end - offset))
        return window[offset - start : end - start]

    return read


def _members(path: Path, size: int, read: Read, digest: Any) -> Iterator[_Member]:
    """The files in a tar, one after the other; all headers go into the digest.

    tarfile ends in silence where it meets a damaged header, and takes two to five times as long.
    """
    position, further, closed, zeros = 0, {}, False, 0
    while position < size:
        block = read(position, position + _BLOCK)
        if block == _ZEROS:
            closed, zeros, position = True, zeros + _BLOCK, position + _BLOCK
            if zeros > _PADDING:
                raise UserError(
                    f"{path} ends in more than a megabyte of zeros: it was not written whole. Copy it again"
                )
            continue
        if len(block) < _BLOCK:
            raise UserError(_cut_off(path, size))
        header = _header(block)
        if header is None:
            raise UserError(_no_header(path, position, size, read))
        digest.update(block)
        name, length, kind = header
        closed, zeros, offset = False, 0, position + _BLOCK
        if kind not in b"xgLK":
            name, length, further = further.get("path", name), int(further.get("size", length)), {}
        if kind in b"123456":  # links, devices and folders have no content
            length = 0
        if offset + length > size:
            raise UserError(_cut_off(path, size))
        position = offset + -(-length // _BLOCK) * _BLOCK
        if kind == b"L":
            further["path"] = read(offset, offset + length).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif kind == b"x":
            further |= _pax(read(offset, offset + length))
            if any(key.startswith("GNU.sparse") for key in further):
                raise UserError(f"{path} holds a sparse file: pack it again without tar's --sparse")
        elif kind == b"S":
            raise UserError(f"{name} of {path} is a sparse file: pack it again without tar's --sparse")
        elif kind in b"\x0007" and not name.endswith("/"):
            yield _Member(name.removeprefix("./").lstrip("/"), offset, length, is_link=False)
        elif kind in b"12":
            yield _Member(name.removeprefix("./"), offset, 0, is_link=True)
    if not closed:
        raise UserError(_cut_off(path, size))


def _header(block: bytes) -> tuple[str, int, bytes] | None:
    """Name, length and kind of what follows; None if it is no header."""
    try:
        if int(block[148:156].strip(b" \0"), 8) != sum(block) - sum(block[148:156]) + 256:
            return None
        if block[124] & 0x80:  # base 256, for lengths that no octal number of eleven digits has
            length = int.from_bytes(block[125:136], "big")
        else:
            length = int(block[124:136].strip(b" \0") or b"0", 8)
    except ValueError:
        return None
    name = block[:100].partition(b"\0")[0]
    if block[345] and block[257:263] == b"ustar\0":
        name = block[345:500].partition(b"\0")[0] + b"/" + name
    return name.decode("utf-8", "surrogateescape"), length, block[156:157]


def _pax(records: bytes) -> dict[str, str]:
    """Records "LENGTH KEY=VALUE\\n"."""
    found = {}
    while records:
        length, _, _ = records.partition(b" ")
        if not length.isdigit() or not 0 < int(length) <= len(records):
            break
        key, _, value = records[len(length) + 1 : int(length) - 1].partition(b"=")
        found[key.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        records = records[int(length) :]
    return found


def _cut_off(path: Path, size: int) -> str:
    return f"The tar file {path} is cut off ({size:,} bytes): it was not written or copied to its end. Copy it again"


def _no_header(path: Path, position: int, size: int, read: Read) -> str:
    start = read(0, min(size, _BLOCK))
    for magic, name in _MAGIC.items():
        if start.startswith(magic):
            return f"{path} is compressed ({name}): unpack it to a plain tar first"
    if start.startswith(b"version https://git-lfs"):
        return f"{path} is a pointer of Git LFS and not the file itself: get that with git lfs pull"
    if position == 0:
        return f"{path} is no tar file (its first {_BLOCK} bytes are no header): take it out or copy it again"
    return f"The tar file {path} is damaged at byte {position:,}, where no header is: copy it again"


_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
_BRACES = re.compile(r"\{([^{}]*)\}")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")


class TarPictures(DecodedPictures):
    """Pictures in tar files; further arguments are those of `DecodedPictures`.

    Every picture is read by its place in the file (pread), so that processes and threads share no position in it.

    Args:
        shards: the tar files.
        shard: int32 (N,), which of them holds a picture.
        offsets, sizes: int64 (N,), in bytes.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        shard: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        names: Names,
        labels: Tensor,
        **options: Any,
    ) -> None:
        super().__init__(names, labels, **options)
        self.shards, self.shard, self.offsets, self.sizes = list(shards), shard, offsets, sizes

    def stored(self, places: Sequence[int]) -> list[tuple[int, int, int]]:
        places = np.asarray(places, dtype=np.int64)
        columns = (self.shard[places], self.offsets[places], self.sizes[places])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def opened(self, stored: tuple[int, int, int]) -> Image.Image:
        number, offset, size = stored
        return Image.open(BytesIO(self.shards[number].read(offset, size)))

    def what_is_stored(self) -> list:
        """The shards' digests (`Shard`), and which of their pictures these are."""
        which = hashlib.sha256(np.stack([self.shard.astype(np.int64), self.offsets]).tobytes()).hexdigest()
        return [[shard.digest for shard in self.shards], which]

    def where(self, place: int) -> str:
        return f"{self.names[place]} of {self.shards[self.shard[place]].path}"

    def part(self, places: Sequence[int]) -> Self:
        part = super().part(places)
        places = np.asarray(places, dtype=np.int64)
        part.shard, part.offsets, part.sizes = self.shard[places], self.offsets[places], self.sizes[places]
        return part


# ---- where shards are
def is_pattern(data_dir: str | Path) -> bool:
    """Whether this names tar files themselves: one, or several by `*` or `{000..099}`."""
    name = Path(data_dir).name
    return name.endswith((".tar", *_COMPRESSED)) and not Path(data_dir).is_dir()


def holds_shards(folder: Path, train_split: str = "train") -> bool:
    """Whether there are tar files in a folder or its training side."""
    return bool(_tars(folder / train_split) or _tars(folder))


def find_shards(data_dir: Path, train_split: str, validation_sides: Sequence[str]) -> dict[str, list[Path]]:
    """The tar files of the training side, and of the one that validates if there is one; in natural order.

    Sides are folders of those names, or else a word in the files' names (train-000.tar, val-000.tar).

    Args:
        data_dir: a folder, a tar file, or several by `*` or `{000..099}` (`is_pattern`).
        validation_sides: what the other side may be called; the first one there is taken.

    Raises:
        UserError: files that a pattern names are not there, or a compressed one.
    """
    others = [name for name in validation_sides if name != train_split]
    if not is_pattern(data_dir) and (train := _tars(data_dir / train_split)):
        found = {train_split: train}
        found |= {name: of_side for name in others if (of_side := _tars(data_dir / name))}
    else:
        named = is_pattern(data_dir)
        found = _by_name(_expanded(data_dir) if named else _tars(data_dir), train_split, others, in_folders=named)
    chosen = [train_split, *[name for name in others if name in found][:1]]
    for path in (path for side in chosen for path in found[side]):
        if path.name.endswith(_COMPRESSED):
            raise UserError(f"{path} is compressed: unpack it to a plain .tar first, with gunzip, xz -d or the like")
    return {side: found[side] for side in chosen}


def _tars(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.name.endswith((".tar", *_COMPRESSED)) and not e.name.startswith(".")]
    return [folder / name for name in sorted(names, key=natural_key)]


def _by_name(paths: Sequence[Path], train_split: str, others: Sequence[str], in_folders: bool) -> dict[str, list[Path]]:
    """The paths by the side that a word of their names says, or of their folders' names."""
    sides: dict[str | None, list[Path]] = {}
    for path in paths:
        words = set(
            re.split(r"[^a-z]+", f"{path.parent.name}/{path.name}".lower() if in_folders else path.name.lower())
        )
        sides.setdefault(next((side for side in (train_split, *others) if side.lower() in words), None), []).append(
            path
        )
    if train_split not in sides:
        return {train_split: list(paths)}
    if None in sides:
        raise UserError(
            f"{sides[None][0]} is of no side, while {sides[train_split][0].name} trains: give its name one of "
            f"{listed((train_split, *others))}, or take it out"
        )
    return sides


def _expanded(pattern: Path) -> list[Path]:
    paths, missing = [], []
    names = _without_braces(str(pattern))
    for name in names:
        found = _matching(name)
        paths += found
        missing += [] if found else [name]
    if missing and len(names) > 1:
        raise UserError(f"{len(missing):,} of the {len(names):,} shards {pattern} are not there: {listed(missing)}")
    if missing:
        parent = pattern.parent
        there = f"{parent} holds {contents(parent)}" if parent.is_dir() else no_such_folder(parent)
        raise UserError(f"No shard {pattern}; {there}")
    return paths


def _matching(name: str) -> list[Path]:
    path = Path(name)
    if path.is_file():
        return [path]
    found = Path(path.anchor).glob(str(path.relative_to(path.anchor)))
    return sorted(
        (match for match in found if not match.name.startswith(".")), key=lambda match: natural_key(str(match))
    )


def _without_braces(pattern: str) -> list[str]:
    """
    >>> _without_braces("{train,val}-{08..10}.tar")[1:4]
    ['train-09.tar', 'train-10.tar', 'val-08.tar']
    """
    parts = _BRACES.split(pattern)  # text, what stands in braces, text, …
    for place in range(1, len(parts), 2):
        if match := _RANGE.fullmatch(parts[place]):
            first, last = int(match[1]), int(match[2])
            width = len(match[1]) if match[1].startswith("0") else 0
            parts[place] = [f"{number:0{width}d}" for number in range(first, last + 1)]
        else:
            parts[place] = parts[place].split(",")
    return ["".join(words) for words in product(*([part] if isinstance(part, str) else part for part in parts))]


# ---- sides
def read_sides(
    data_dir: Path, train_split: str, validation_sides: Sequence[str], extensions: Sequence[str], **options: Any
) -> tuple[dict[str, int], TarPictures, TarPictures | None]:
    """Class name → label, the training side, and what validates if there is such a side.

    Args:
        data_dir, train_split, validation_sides: see `find_shards`.
        extensions: which members are pictures.
        options: of `DecodedPictures`.

    Raises:
        UserError: see `find_shards` and `index_shard`, or pictures and labels that do not go together.
    """
    found = find_shards(data_dir, train_split, validation_sides)
    indices = _index_all(
        [path for paths in found.values() for path in paths], extensions, options.get("progress", True)
    )
    sides, depth, labels = [], None, None
    for side, paths in found.items():
        of_side, indices = indices[: len(paths)], indices[len(paths) :]
        names = Names.joined([index.names for index in of_side])
        shard = np.repeat(np.arange(len(of_side), dtype=np.int32), [len(index.names) for index in of_side])
        _check_keys(names, shard, paths)
        if _is_labelled(of_side):
            labels, of_pictures = _said_labels(of_side, names, shard, labels)
        else:
            classes, names, depth = _folder_classes(names, shard, paths, depth)
            labels = labels or labels_of(set(classes))
            if unknown := set(classes) - labels.keys():
                raise UserError(_unknown(paths[0].parent, unknown, labels))
            of_pictures = torch.tensor([labels[name] for name in classes])
        columns = [np.concatenate([getattr(index, name) for index in of_side]) for name in ("offsets", "sizes")]
        title = f"{data_dir.name}, {side}"
        shards = [index.shard for index in of_side]
        sides.append(TarPictures(shards, shard, *columns, names, of_pictures, title=title, **options))
    return labels, sides[0], sides[1] if len(sides) > 1 else None


def _index_all(paths: Sequence[Path], extensions: Sequence[str], progress: bool) -> list[ShardIndex]:
    hidden = None if progress and len(paths) >= 8 else True
    with ThreadPoolExecutor(8) as pool:  # they wait for the disk at the same time
        try:
            found = pool.map(lambda path: index_shard(path, extensions), paths)
            return list(tqdm(found, total=len(paths), desc="indexing", unit="shard", disable=hidden))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _is_labelled(indices: Sequence[ShardIndex]) -> bool:
    labelled = [index.is_labelled for index in indices]
    if any(labelled) and not all(labelled):
        without, other = (indices[labelled.index(side)].shard.path for side in (False, True))
        raise UserError(f"{without} has no labels, while {other.name} has: add each picture's .cls or .json")
    return all(labelled)


def _check_keys(names: Names, shard: np.ndarray, paths: Sequence[Path]) -> None:
    """No two pictures of a side have one name: neither could be told from the other."""
    hashes = np.fromiter((hash(name.rpartition(".")[0]) for name in names), np.int64, len(names))
    order = np.argsort(hashes, kind="stable")
    for place in np.flatnonzero(hashes[order][1:] == hashes[order][:-1]).tolist():
        first, second = order[place], order[place + 1]
        if names[first].rpartition(".")[0] == names[second].rpartition(".")[0] and shard[first] != shard[second]:
            raise UserError(
                f"Two shards hold the key {names[first].rpartition('.')[0]}, {paths[shard[first]]} and "
                f"{paths[shard[second]].name}: take one shard out, or pack one again under other keys"
            )


def _said_labels(
    indices: Sequence[ShardIndex], names: Names, shard: np.ndarray, known: dict[str, int] | None
) -> tuple[dict[str, int], Tensor]:
    """Class name → label, and the labels int64 (N,); `known` is the training side's, which says what there is."""
    numbers = np.concatenate([index.numbers for index in indices])
    of_codes = ([*index.words, None] for index in indices)  # the last one, None, is at place −1
    words = [table[code] for table, index in zip(of_codes, indices, strict=True) for code in index.word.tolist()]
    folder = indices[0].shard.path.parent
    if (numbers >= 0).all():
        found = sorted(set(numbers.tolist()))
        if known is None:
            known = _named(numbers, words) or _named(numbers, _folders(names)) or {str(label): label for label in found}
        if unknown := set(found) - set(known.values()):
            raise UserError(_unknown(folder, set(map(str, unknown)), known))
        return known, torch.from_numpy(numbers)
    if None in words:
        place = words.index(None)
        raise UserError(
            f"{names[place]} of {indices[shard[place]].shard.path} has a number as label, and others the name of a "
            "class alone: give all of them the same"
        )
    known = labels_of(set(words)) if known is None else known
    if unknown := set(words) - known.keys():
        raise UserError(_unknown(folder, unknown, known))
    return known, torch.tensor([known[word] for word in words])


def _folders(names: Names) -> list[str | None]:
    return [name.rpartition("/")[0].rpartition("/")[2] or None for name in names]


def _named(numbers: np.ndarray, words: Sequence[str | None]) -> dict[str, int] | None:
    """Names of the numbers, where each number has one name of its own."""
    pairs = set(zip(words, numbers.tolist(), strict=True))
    named = dict(sorted(pairs, key=lambda pair: pair[1])) if None not in dict(pairs) else {}
    return named if len(pairs) == len(named) == len(set(named.values())) else None


def _folder_classes(
    names: Names, shard: np.ndarray, paths: Sequence[Path], depth: int | None
) -> tuple[list[str], Names, int]:
    """Each picture's class, its folder below those that all pictures share; and names from there on."""
    folders = {name.rpartition("/")[0] for name in names}
    if depth is None:
        shared = os.path.commonpath(folders)
        depth = len(shared.split("/")) * bool(shared) - (shared in folders and shared != "")
    short = [len(folder.split("/")) <= depth or not folder for folder in folders]
    if any(short):
        place = next(i for i, name in enumerate(names) if name.count("/") <= depth)
        raise UserError(
            f"{names[place]} of {paths[shard[place]]} has no class: expected KEY.cls or KEY.json with "
            f"{either(LABEL_FIELDS)} beside it, or the pictures of each class in a folder of their own"
        )
    below = [name.split("/", depth)[depth] for name in names]
    return [name.partition("/")[0] for name in below], Names(below), depth


def _unknown(where: Path, unknown: set[str], known: dict[str, int]) -> str:
    return (
        f"What validates in {where} holds {listed(sorted(unknown, key=natural_key))}, which is no class of the "
        f"training side ({listed(known)}): expected the same classes on both sides"
    )
