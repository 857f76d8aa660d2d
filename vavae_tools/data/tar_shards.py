"""Pictures in tar files (WebDataset shards) as sides of a data module, never unpacked.

A shard holds `KEY.jpg` (or another picture) and beside it `KEY.cls`, a whole number, or `KEY.json` with a `label`,
`class_name` or `class`; where no shard has any of these, a picture's folder is its class, as in a tar of class folders.
"""

import hashlib
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from itertools import product
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from vavae_tools.data.decoded import DecodedPictures, Names
from vavae_tools.data.folders import contents, either, labels_of, listed, natural_key, no_such_folder
from vavae_tools.data.tar_index import LABEL_FIELDS, Shard, ShardIndex, index_shard
from vavae_tools.errors import UserError

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
