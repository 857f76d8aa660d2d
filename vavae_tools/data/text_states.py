"""Texts: every caption encoded once, kept as safetensors shards, read memory-mapped beside the images' latents.

`tokens-00000.safetensors …` have the states of some thousand captions each, one after the other without any padding
(`tokens` float16 (T, D), `ends` int64 (n,)) and `pooled` float16 (n, P); `captions.safetensors` says which of them are
each image's. Equal captions are stored once, in alphabetical order; the first is the empty one.
"""

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vavae_tools.data.captions import CaptionOrderedDataModule
from vavae_tools.data.encoded import (
    SHARD_BYTES,
    EncodedFolder,
    Rows,
    Shard,
    Store,
    Tensors,
    encode,
    open_shard,
    subfolder,
)
from vavae_tools.data.folders import count_of
from vavae_tools.data.latents import LatentDataModule, LatentDataset, LatentFolder
from vavae_tools.data.loader import index_and_number
from vavae_tools.runtime.console import print_beside_bars
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import atomic_write
from vavae_tools.runtime.machine import Computing, on_device

SHARD_SIZE = 16_384  # captions at most
INDEX = "texts.json"
CAPTIONS = "captions.safetensors"
_FORM = 1  # of the files; another form is another cache key

Captions = Mapping[str, Sequence[Sequence[str]]]
"""Subset → of each image its captions."""
Names = Mapping[str, Sequence[str]]


@dataclass(frozen=True)
class TextFolder(EncodedFolder):
    INDEX, CONTENTS = INDEX, "encoded captions"
    encoder: str  # a hash of it
    dim: int
    pooled_dim: int
    pictures: dict[str, int]  # how many images each subset has
    captions: dict[str, int]  # how many captions each subset has
    distinct: int  # how many different ones are stored, the empty one among them
    tokens: int
    cut: int  # how many are longer than the encoder takes
    shards: dict[str, int]  # file → captions in it
    names: dict[str, str]  # of each subset, a hash of the images' names where these were given
    keys: dict[str, str] = field(default_factory=dict)  # file → its key; empty in former versions

    def files(self) -> list[str]:
        return [*self.shards, CAPTIONS]

    def __str__(self) -> str:
        counts = ", ".join(f"{name} {count:,} of {self.pictures[name]:,}" for name, count in self.captions.items())
        cut = f", {self.cut:,} cut because they are too long" if self.cut else ""
        return f"Captions of images: {counts}; {self.distinct:,} different, {self.tokens:,} tokens{cut} ({self.path})"


def encode_texts(
    encoder: Any,
    captions_by_subset: Captions,
    folder: str | Path,
    names_by_subset: Names | None = None,
    batch_size: int = 256,
    progress: bool = True,
    device: str | torch.device | None = None,
    log: Callable[[str], None] = print_beside_bars,
) -> TextFolder:
    """Encode all captions once; what is there already and belongs to this encoder and these captions is kept.

    Of several processes one alone should call this (`ranks.rank_zero_first`), and the others then read what it made.

    Args:
        encoder: a `diffusion.clip.TextEncoder`, or what has its `dim`, `pooled_dim`, `max_tokens`, `device`, `to`,
            `encode`, `lengths` and `digest`. Afterwards it is on the device where it was.
        captions_by_subset: "train" and, if there is one, "val": of each image one caption or more.
        names_by_subset: the images' names, so that `TextLatentDataset` sees that latents are those of these images.
        device: where it works, in fp16 on a GPU; None: where it is.

    Raises:
        UserError: an image without a caption, no space on the disk, or states that float16 cannot hold.
    """
    path, distinct, about = Path(folder), _distinct(captions_by_subset), _encoder_identity(encoder)
    names, key = _names(names_by_subset), texts_key(encoder, captions_by_subset, names_by_subset)
    folder = path / subfolder(key)

    def fields(_: str, captions: list[str]) -> Tensors:
        states = encoder.encode(captions)
        mask = states.mask.bool()  # the states of tokens alone are stored, caption after caption
        return {"tokens": states.tokens[mask], "ends": mask.sum(1), "pooled": states.pooled}

    shards, cut = _shards(encoder, about, distinct)
    device = encoder.device if device is None else device
    computing = Computing(None, device, f"States of this {type(encoder).__name__}", log)
    store, options = _store(path, folder), {"unit": "caption", "progress": progress}
    options["finish"] = lambda shard: {**shard, "ends": shard["ends"].cumsum(0)}
    with ExitStack() as held:
        if there := TextFolder.find_or_lock(path, [key], held, log):
            return there
        with on_device(encoder, device):
            encode(store, {"tokens": shards}, {"tokens": distinct}, fields, computing, batch_size, **options)
        with atomic_write(folder / CAPTIONS) as partial:
            save_file(_caption_rows(captions_by_subset, distinct), partial, metadata={"key": key})
        found = TextFolder(
            folder,
            key,
            encoder=about[1],
            dim=encoder.dim,
            pooled_dim=encoder.pooled_dim,
            pictures={subset: len(captions) for subset, captions in captions_by_subset.items()},
            captions={subset: sum(map(len, captions)) for subset, captions in captions_by_subset.items()},
            distinct=len(distinct),
            tokens=sum(int(open_shard(folder / name)["ends"][-1]) for name in shards),
            cut=cut,
            shards={name: len(shard.rows) for name, shard in shards.items()},
            names=names,
            keys={name: shard.key for name, shard in shards.items()} | {CAPTIONS: key},
        )
        found.write()
    return found


def texts_key(encoder: Any, captions_by_subset: Captions, names_by_subset: Names | None = None) -> str:
    """Return the key of what `encode_texts` makes of these, by the tokenizer and the weights alone."""
    captions = {subset: list(map(list, one)) for subset, one in captions_by_subset.items()}
    return _digest([_encoder_identity(encoder), captions, _names(names_by_subset)])


def _names(names_by_subset: Names | None) -> dict[str, str]:
    return {subset: _digest(list(of_subset)) for subset, of_subset in (names_by_subset or {}).items()}


def _store(path: Path, folder: Path) -> Store:
    return Store(folder, others=[path, *path.glob("*/")])


def needed_bytes(encoder: Any, captions_by_subset: Captions, folder: str | Path | None = None) -> int:
    """Return how many bytes `encode_texts` would write into `folder`, by the tokenizer alone."""
    distinct = _distinct(captions_by_subset)
    shards, _ = _shards(encoder, _encoder_identity(encoder), distinct)
    missing = shards if folder is None else _store(Path(folder), Path(folder)).missing(shards)
    rows = sum(8 * (len(captions) + sum(map(len, captions))) for captions in captions_by_subset.values())
    return sum(shards[name].nbytes for name in missing) + rows


def _distinct(captions_by_subset: Captions) -> list[str]:
    distinct = {""}
    for subset, captions in captions_by_subset.items():
        for place, of_image in enumerate(captions):
            if not of_image:
                raise UserError(f"Image {place:,} of the subset {subset} has no caption: expected one or more for each")
            distinct.update(of_image)
    return sorted(distinct)


def _shards(encoder: Any, about: list, distinct: Sequence[str]) -> tuple[dict[str, Shard], int]:
    """Return the shards, and how many captions are cut; keys follow from a shard's own captions, so others keep it."""
    of_token, of_caption = 2 * encoder.dim, 2 * encoder.pooled_dim + 8  # bytes
    lengths, cut = encoder.lengths(distinct)
    nbytes = [min(length, encoder.max_tokens) * of_token + of_caption for length in lengths]
    most = max(1, min(SHARD_SIZE, SHARD_BYTES // (encoder.max_tokens * of_token + of_caption)))
    shards = {}
    for number, start in enumerate(range(0, len(distinct), most)):
        part = slice(start, start + most)
        shard = Shard(range(len(distinct))[part], _digest([about, distinct[part]]), sum(nbytes[part]))
        shards[f"tokens-{number:05d}.safetensors"] = shard
    return shards, cut


def _encoder_identity(encoder: Any) -> list:
    return [_FORM, encoder.digest(), encoder.dim, encoder.pooled_dim, encoder.max_tokens]


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _caption_rows(captions_by_subset: Captions, distinct: Sequence[str]) -> Tensors:
    owned, row_of = {}, {caption: row for row, caption in enumerate(distinct)}
    for subset, captions in captions_by_subset.items():
        rows = [row_of[caption] for of_image in captions for caption in of_image]
        counts = torch.tensor([len(of_image) for of_image in captions], dtype=torch.int64)
        owned |= {f"{subset}.places": torch.tensor(rows, dtype=torch.int64), f"{subset}.ends": counts.cumsum(0)}
    return owned


class TextLatentDataset(LatentDataset):
    """One subset's latents, each with the states of one of its captions: that which the sampler names, or the first.

    A batch is that of `LatentDataset` and, padded with zeros to the longest of its captions, "text_tokens" float16 (B,
    L, D), "text_mask" bool (B, L), true where a token is, and "text_pooled" float16 (B, P).
    """

    def __init__(self, latents: LatentFolder, texts: TextFolder, subset: str) -> None:
        super().__init__(latents, subset)
        images, named = texts.pictures.get(subset, 0), texts.names.get(subset)
        if images != len(self) or (named and named != _digest(list(latents.names.get(subset, [])))):
            raise UserError(
                f"{texts.path} has captions of {count_of(images, 'image')} of the subset {subset}, {latents.path} "
                f"latents of {len(self):,} other ones: encode both for the same images"
            )
        texts.check(texts.keys)
        owned, none = open_shard(texts.path / CAPTIONS), torch.empty(0, dtype=torch.int64)
        self._captions, self._ends = (owned.get(f"{subset}.{name}", none) for name in ("places", "ends"))

        shards = [open_shard(texts.path / name) for name in texts.shards]
        self._tokens, self._pooled = [shard["tokens"] for shard in shards], Rows([shard["pooled"] for shard in shards])
        ends = [shard["ends"] for shard in shards]
        self._lengths = torch.cat([one.diff(prepend=one.new_zeros(1)) for one in ends])  # (captions,), in tokens
        self._firsts = torch.cat(ends) - self._lengths  # each caption's first token in its shard
        self._shard_of = torch.arange(len(ends)).repeat_interleave(torch.tensor(list(map(len, ends))))

    @property
    def caption_counts(self) -> Tensor:
        return self._ends.diff(prepend=self._ends.new_zeros(1))

    def stored(self, indices: Sequence[int | tuple[int, int]]) -> Tensors:
        indices, numbers = index_and_number(indices)
        index = torch.tensor(indices, dtype=torch.int64)
        firsts = torch.where(index > 0, self._ends[index - 1], 0)
        return {**super().stored(indices), **self.states(self._captions[firsts + torch.tensor(numbers)])}

    def states(self, captions: Tensor) -> Tensors:
        """Return the stored states of captions int64 (B,), of which only these are read."""
        lengths = self._lengths[captions]
        rows = (values.tolist() for values in (self._shard_of[captions], self._firsts[captions], lengths))
        tokens = [self._tokens[shard][first : first + length] for shard, first, length in zip(*rows, strict=True)]
        padded = pad_sequence(tokens, batch_first=True)  # (B, L, D)
        mask = torch.arange(padded.shape[1]) < lengths[:, None]
        return {"text_tokens": padded, "text_mask": mask, "text_pooled": self._pooled[captions]}


class TextLatentDataModule(LatentDataModule, CaptionOrderedDataModule):
    """Both subsets of a folder of latents, each image with one of its captions, as batches for the denoiser.

    In training `captions.CaptionOrder` chooses the caption for each epoch and image; in validation it is the first.
    """

    def __init__(self, latents: LatentFolder | Path, texts: TextFolder, batch_size: int = 64, **loading: int) -> None:
        super().__init__(latents, batch_size, **loading)
        self.train_data, self.val_data = (TextLatentDataset(self.folder, texts, name) for name in ("train", "val"))
