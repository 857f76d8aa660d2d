"""Texts: every caption encoded once, kept as safetensors shards, read memory-mapped beside the pictures' latents.

A folder of texts holds `tokens-00000.safetensors …`, each with some thousand captions: the states of their tokens one
after the other without any padding (`tokens` float16 (T, D), `ends` int64 (n,)) and `pooled` float16 (n, P); further
`captions.safetensors`, which says for each picture of each side which of them are its own, and `texts.json`. Equal
captions are stored once, in alphabetical order; the first is the empty one, which guidance needs. Each shard says in
its header which encoder and captions it belongs to, so that an encoding that was interrupted goes on with what lacks.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from vavae_tools.data.captions import CaptionOrderedDataModule
from vavae_tools.data.encoded import _mapped
from vavae_tools.data.folders import counted
from vavae_tools.data.latents import LatentDataset, LatentFolder, StoredDataModule, normalised
from vavae_tools.data.loader import index_and_number
from vavae_tools.runtime.console import tell
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import disk_errors, write_json, written_whole
from vavae_tools.runtime.machine import at_work
from vavae_tools.runtime.precision import Computing

SHARD_SIZE = 16_384
SHARD_BYTES = 2**30
"""A shard holds at most so many captions, and bytes if all were as long as the encoder takes: one is in memory while it
is made, and is lost with a kill."""
INDEX = "texts.json"
CAPTIONS = "captions.safetensors"
_FORM = 1  # of the files; another form is another cache key
_NUMBER = 2  # bytes of a float16


class States(Protocol):
    """tokens (B, L, D), mask bool (B, L), true where a token is, pooled (B, P)."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class Encoder(Protocol):
    """What encodes captions, such as `autoencoders.text_encoder.TextEncoder`."""

    dim: int
    pooled_dim: int
    max_tokens: int
    device: torch.device

    def to(self, device: str | torch.device) -> Any: ...

    def encode(self, captions: list[str]) -> States: ...

    def lengths(self, captions: list[str]) -> tuple[Sequence[int], int]:
        """How many tokens each has, and how many captions have more than `max_tokens` and are cut to that."""
        ...

    def digest(self) -> str:
        """A hash of weights and tokenizer."""
        ...


@dataclass(frozen=True)
class TextFolder:
    """A folder of encoded captions and what its index says.

    Attributes:
        key, encoder: hashes of all that the states follow from, and of the encoder alone.
        dim, pooled_dim: numbers of each token's state, and of a caption's pooled one.
        pictures, captions: of each side, how many there are.
        distinct, tokens: how many different captions are stored, the empty one among them, and how many tokens.
        cut: how many of them are longer than the encoder takes, and were cut.
        shards: file → captions in it.
        names: of each side, a hash of the pictures' names where these were given.
    """

    path: Path
    key: str
    encoder: str
    dim: int
    pooled_dim: int
    pictures: dict[str, int]
    captions: dict[str, int]
    distinct: int
    tokens: int
    cut: int
    shards: dict[str, int]
    names: dict[str, str]

    @classmethod
    def read(cls, path: str | Path) -> "TextFolder":
        """Read the index of a folder that `encode_texts` wrote.

        Raises:
            UserError: there are no texts, or their index is damaged.
        """
        index = Path(path) / INDEX
        if not index.is_file():
            raise UserError(f"No encoded captions in {path} ({INDEX} is missing): encode them first")
        try:
            return cls(path=Path(path), **json.loads(index.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise UserError(f"{index} is damaged ({error!r}): delete it and encode the captions again") from None

    def __str__(self) -> str:
        counts = ", ".join(f"{side} {count:,} of {self.pictures[side]:,}" for side, count in self.captions.items())
        cut = f", {self.cut:,} cut because they are too long" if self.cut else ""
        return f"Captions of pictures: {counts}; {self.distinct:,} different, {self.tokens:,} tokens{cut} ({self.path})"


def encode_texts(
    encoder: Encoder,
    captions_by_side: Mapping[str, Sequence[Sequence[str]]],
    folder: str | Path,
    names_by_side: Mapping[str, Sequence[str]] | None = None,
    batch_size: int = 256,
    progress: bool = True,
    device: str | torch.device | None = None,
    say: Callable[[str], None] = tell,
) -> TextFolder:
    """Encode all captions once; what is there already and belongs to this encoder and these captions is kept.

    That holds for the whole shards of an encoding that was interrupted, too. A GPU computes in fp16, where that is
    finite, for so the states are stored; afterwards its memory is given back. Of several processes one alone should
    call this (`ranks.first_alone`), and the others then read what it made.

    Args:
        encoder: frozen; afterwards it is on the device where it was.
        captions_by_side: "train" and, if there is one, "val": of each picture one caption or more.
        names_by_side: the pictures' names, so that `TextLatentDataset` sees that latents are those of these pictures.
        batch_size: captions that are encoded at once.
        device: where it works, only while there is something to encode; None: where it is.

    Raises:
        UserError: a picture without a caption, no space on the disk, or states that are not finite or that float16
            cannot hold.
    """
    folder = Path(folder)
    distinct = _distinct(captions_by_side)
    names = {side: _digest(list(of_side)) for side, of_side in (names_by_side or {}).items()}
    about = _about(encoder)
    key = _digest([about, {side: list(map(list, one)) for side, one in captions_by_side.items()}, names])
    there = _complete(folder, key)
    if there:
        return there
    shards = _shards(encoder, about, distinct)
    lacking = {name: rows for name, rows in shards.items() if not _is_whole(folder, name, rows.key)}
    cut, needed = {}, _rows_bytes(captions_by_side)
    for name, rows in lacking.items():
        lengths, cut[name] = encoder.lengths(rows.captions)
        needed += _bytes(encoder, lengths)
    _make_room(folder, needed, keep=shards.keys() - lacking.keys())
    device = encoder.device if device is None else device
    computing = Computing(None, device, f"States of this {type(encoder).__name__}", say)
    bar = tqdm(total=len(distinct), desc="encoding", unit="caption", disable=None if progress else True)
    with at_work(encoder, device) if lacking else nullcontext(), bar:
        for name, rows in shards.items():
            if name in lacking:
                shard = _encoded(encoder, computing, rows.captions, batch_size, bar)
                says = {"key": rows.key, "cut": str(cut[name]), "tokens": str(len(shard["tokens"]))}
                with written_whole(folder / name) as partial, disk_errors():
                    save_file(shard, partial, metadata=says)
            else:
                bar.update(len(rows.captions))
    place_of = {caption: place for place, caption in enumerate(distinct)}
    with written_whole(folder / CAPTIONS) as partial, disk_errors():
        save_file(_owned(captions_by_side, place_of), partial)
    headers = [_header(folder / name) for name in shards]
    found = TextFolder(
        path=folder,
        key=key,
        encoder=about[1],
        dim=encoder.dim,
        pooled_dim=encoder.pooled_dim,
        pictures={side: len(captions) for side, captions in captions_by_side.items()},
        captions={side: sum(map(len, captions)) for side, captions in captions_by_side.items()},
        distinct=len(distinct),
        tokens=sum(int(header["tokens"]) for header in headers),
        cut=sum(int(header["cut"]) for header in headers),
        shards={name: len(rows.captions) for name, rows in shards.items()},
        names=names,
    )
    write_json(folder / INDEX, {name: value for name, value in asdict(found).items() if name != "path"})
    return found


def needed_bytes(
    encoder: Encoder, captions_by_side: Mapping[str, Sequence[Sequence[str]]], folder: str | Path | None = None
) -> int:
    """How many bytes `encode_texts` would write, by the tokenizer alone.

    Args:
        folder: where they would go: what of them is there already is not counted.
    """
    distinct = _distinct(captions_by_side)
    needed = _rows_bytes(captions_by_side)
    for name, rows in _shards(encoder, _about(encoder), distinct).items():
        if folder is None or not _is_whole(Path(folder), name, rows.key):
            needed += _bytes(encoder, encoder.lengths(rows.captions)[0])
    return needed


# ---- what is stored where
@dataclass(frozen=True)
class _Shard:
    captions: list[str]
    key: str


def _distinct(captions_by_side: Mapping[str, Sequence[Sequence[str]]]) -> list[str]:
    distinct = {""}
    for side, captions in captions_by_side.items():
        for place, of_picture in enumerate(captions):
            if not of_picture:
                raise UserError(f"Picture {place:,} of the side {side} has no caption: expected one or more for each")
            distinct.update(of_picture)
    return sorted(distinct)


def _shards(encoder: Encoder, about: list, distinct: Sequence[str]) -> dict[str, _Shard]:
    longest = _bytes(encoder, [encoder.max_tokens])
    most = max(1, min(SHARD_SIZE, SHARD_BYTES // longest))
    parts = [list(distinct[start : start + most]) for start in range(0, len(distinct), most)]
    return {
        f"tokens-{number:05d}.safetensors": _Shard(part, _digest([about, part])) for number, part in enumerate(parts)
    }


def _about(encoder: Encoder) -> list:
    return [_FORM, encoder.digest(), encoder.dim, encoder.pooled_dim, encoder.max_tokens]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _bytes(encoder: Encoder, lengths: Sequence[int]) -> int:
    tokens = sum(min(int(length), encoder.max_tokens) for length in lengths)
    return _NUMBER * (tokens * encoder.dim + len(lengths) * encoder.pooled_dim) + 8 * len(lengths)


def _rows_bytes(captions_by_side: Mapping[str, Sequence[Sequence[str]]]) -> int:
    return sum(8 * (len(captions) + sum(map(len, captions))) for captions in captions_by_side.values())


def _owned(captions_by_side: Mapping[str, Sequence[Sequence[str]]], place_of: Mapping[str, int]) -> dict[str, Tensor]:
    """Of each side: the places of its captions, picture by picture, and where each picture's end."""
    owned = {}
    for side, captions in captions_by_side.items():
        places = [place_of[caption] for of_picture in captions for caption in of_picture]
        counts = torch.tensor([len(of_picture) for of_picture in captions], dtype=torch.int64)
        owned[f"{side}.places"], owned[f"{side}.ends"] = torch.tensor(places, dtype=torch.int64), counts.cumsum(0)
    return owned


def _complete(folder: Path, key: str) -> TextFolder | None:
    """The texts of this key, where all of them are there."""
    with suppress(UserError):  # no texts, or an index that is damaged: they are made anew
        there = TextFolder.read(folder)
        if there.key == key and all((folder / name).is_file() for name in (*there.shards, CAPTIONS)):
            return there
    return None


def _header(path: Path) -> dict[str, str]:
    with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
        return file.metadata() or {}
    return {}


def _is_whole(folder: Path, name: str, key: str) -> bool:
    return (folder / name).is_file() and _header(folder / name).get("key") == key


def _make_room(folder: Path, needed: int, keep: set[str]) -> None:
    """Delete what belongs to other captions or another encoder, if after that the disk has room for `needed` bytes."""
    files = [path for pattern in ("tokens-*.safetensors", ".*.partial", CAPTIONS) for path in folder.glob(pattern)]
    stale = [path for path in files if path.name not in keep]
    there = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(there).free + sum(path.stat().st_size for path in stale)
    if needed > free:
        raise UserError(
            f"No space for the encoded captions: {needed / 1e9:,.3f} GB needed, {free / 1e9:,.3f} GB free in {there}. "
            "Free some space, choose another folder, or encode them in each step, without a cache"
        )
    (folder / INDEX).unlink(missing_ok=True)  # first: whatever has an index is whole
    for path in stale:
        path.unlink(missing_ok=True)


@torch.inference_mode()
def _encoded(
    encoder: Encoder, computing: Computing, captions: Sequence[str], batch_size: int, bar: tqdm
) -> dict[str, Tensor]:
    tokens, lengths, pooled = [], [], []
    for start in range(0, len(captions), batch_size):
        encode = partial(encoder.encode, list(captions[start : start + batch_size]))
        states = computing(encode)
        if computing.in_half and not states.tokens.isfinite().all():
            states = computing.again(encode)
        mask = states.mask.bool()
        tokens.append(_as_stored(states.tokens[mask]))  # (T, D), caption after caption
        pooled.append(_as_stored(states.pooled))
        lengths.append(mask.sum(1).cpu())
        bar.update(len(mask))
    return {"tokens": torch.cat(tokens), "ends": torch.cat(lengths).cumsum(0), "pooled": torch.cat(pooled)}


def _as_stored(states: Tensor) -> Tensor:
    largest = states.abs().max().item()
    if not largest <= torch.finfo(torch.float16).max:
        raise UserError(
            f"States of this text encoder reach {largest:,.0f}, and float16 holds up to 65,504: its weights are "
            "damaged, or another encoder is needed"
        )
    return states.to(torch.float16).cpu()


# ---- what is read
class EncodedTexts:
    """The stored states of a folder's captions, memory-mapped: only those of a batch are read.

    Raises:
        UserError: a file cannot be read.
    """

    def __init__(self, folder: TextFolder) -> None:
        self.folder = folder
        self._shards = [_readable(folder.path / name) for name in folder.shards]
        counts = torch.tensor(list(folder.shards.values()), dtype=torch.int64)
        self._ends = counts.cumsum(0)  # (shards,), the places after each one's last caption
        self._starts = self._ends - counts
        ends = [shard["ends"] for shard in self._shards]
        self._lengths = torch.cat([one.diff(prepend=one.new_zeros(1)) for one in ends])  # (captions,), in tokens
        self._firsts = torch.cat(ends) - self._lengths  # each caption's first token in its shard

    def states(self, places: Tensor) -> dict[str, Tensor]:
        """The states of captions by their places, padded with zeros to the longest of them.

        Args:
            places: int64 (B,).

        Returns:
            "text_tokens" float16 (B, L, D), "text_mask" bool (B, L), true where a token is, "text_pooled" float16
            (B, P).
        """
        lengths = self._lengths[places]
        tokens, pooled = [], []
        shards = torch.searchsorted(self._ends, places, right=True)
        rows = (shards, places - self._starts[shards], self._firsts[places], lengths)
        for shard, row, first, length in zip(*(values.tolist() for values in rows), strict=True):
            tokens.append(self._shards[shard]["tokens"][first : first + length])
            pooled.append(self._shards[shard]["pooled"][row])
        padded = pad_sequence(tokens, batch_first=True)  # (B, L, D)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        return {"text_tokens": padded, "text_mask": mask, "text_pooled": torch.stack(pooled)}

    def empty(self) -> dict[str, Tensor]:
        """The states of the empty prompt, a batch of one, in float32."""
        states = self.states(torch.zeros(1, dtype=torch.int64))
        return {name: value if name == "text_mask" else value.float() for name, value in states.items()}


def _readable(path: Path) -> dict[str, Tensor]:
    try:
        return _mapped(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read ({error}): delete {INDEX} beside it and encode again") from None


class TextLatentDataset(Dataset):
    """One side's latents, each with one of its captions: the one that the sampler names, or the first.

    A batch is that of `LatentDataset` and the states of `EncodedTexts`, in float32; `stored` gives both as they are on
    the disk.

    Args:
        latents, texts: of the same pictures.
        side: "train" or "val".

    Raises:
        UserError: they are of other pictures, or cannot be read.
    """

    def __init__(self, latents: LatentFolder, texts: TextFolder | EncodedTexts, side: str) -> None:
        self.latents = LatentDataset(latents, side)
        self.texts = texts if isinstance(texts, EncodedTexts) else EncodedTexts(texts)
        folder = self.texts.folder
        pictures, named = folder.pictures.get(side, 0), folder.names.get(side)
        if pictures != len(self.latents):
            raise UserError(
                f"{latents.path} has latents of {counted(len(self.latents), 'picture')} of the side {side}, "
                f"{folder.path} captions of {pictures:,}: encode both for the same pictures"
            )
        if named and named != _digest(list(latents.names.get(side, []))):
            raise UserError(
                f"The captions in {folder.path} are those of other pictures of the side {side} than the latents in "
                f"{latents.path}: encode both for the same pictures"
            )
        owned = _readable(folder.path / CAPTIONS) if pictures else {}
        self._places = owned.get(f"{side}.places", torch.empty(0, dtype=torch.int64))
        self._ends = owned.get(f"{side}.ends", torch.empty(0, dtype=torch.int64))

    @property
    def labels(self) -> Tensor:
        """int64 (N,)."""
        return self.latents.labels

    @property
    def caption_counts(self) -> Tensor:
        """How many captions each picture has: int64 (N,)."""
        return self._ends.diff(prepend=self._ends.new_zeros(1))

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def statistics(self) -> tuple[Tensor, Tensor]:
        """The latents' mean and standard deviation, float32 (C, 1, 1) both."""
        return self.latents.statistics

    def stored(self, indices: Sequence[int | tuple[int, int]]) -> dict[str, Tensor]:
        """Return a batch as it is stored: float16 states, latents not normalised."""
        indices, numbers = index_and_number(indices)
        index = torch.tensor(indices, dtype=torch.int64)
        firsts = torch.where(index > 0, self._ends[index - 1], 0)
        states = self.texts.states(self._places[firsts + torch.tensor(numbers, dtype=torch.int64)])
        return {**self.latents.stored(indices), **states}

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> dict[str, Tensor]:
        return normalised(self.stored(indices), *self.statistics)

    def __getitem__(self, index: int | tuple[int, int]) -> dict[str, Any]:
        return {name: value[0] for name, value in self.__getitems__([index]).items()}


class TextLatentDataModule(StoredDataModule, CaptionOrderedDataModule):
    """Both sides of a folder of latents, each picture with one of its captions, as batches for the denoiser.

    In training the caption is chosen at random for each epoch and picture (`captioned.CaptionOrder`); what validates
    has always its first.

    Args:
        latents: what `latents.encode_latents` wrote.
        texts: what `encode_texts` wrote, of the same pictures.
        batch_size: latents per device and step.

    Raises:
        UserError: they are of other pictures, or cannot be read.
    """

    def __init__(
        self,
        latents: str | Path | LatentFolder,
        texts: str | Path | TextFolder,
        batch_size: int = 64,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, num_workers, seed)
        self.folder = latents if isinstance(latents, LatentFolder) else LatentFolder.read(latents)
        self.texts = EncodedTexts(texts if isinstance(texts, TextFolder) else TextFolder.read(texts))
        self.train_data = TextLatentDataset(self.folder, self.texts, "train")
        self.val_data = TextLatentDataset(self.folder, self.texts, "val")
        self.num_classes = self.folder.num_classes
