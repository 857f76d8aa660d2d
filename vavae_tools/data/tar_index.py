"""Where the pictures of a tar file lie in it, and what it says about them, found by its headers alone.

A key ends at the first dot of a file's name, as webdataset has it.
"""

import functools
import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np

from vavae_tools.data.decoded import Names
from vavae_tools.data.folders import extension_of, listed
from vavae_tools.errors import UserError
from vavae_tools.files import written_whole

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
