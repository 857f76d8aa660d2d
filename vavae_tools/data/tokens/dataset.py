"""Texts as images: every token a cell of pixels, every text cut into as many images as it needs."""

import copy
import hashlib
import math
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from vavae_tools.data.loader import Batched, OrderedDataModule
from vavae_tools.data.tokens.code import TextTokens, TokenCode, learn_tokenizer
from vavae_tools.data.tokens.text_files import read_texts
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError


class TokenImageDataset(Batched):
    """Items {"clean": float32 (C, H, W) in [−1, 1], "mask": float32 (H, W), "index": int64}; of a list, a batch.

    `clean` has a cell of ±1 for each token (`TokenCode`) and 0 elsewhere, `mask` is 1 on the cells of tokens. With a
    chat template `mask` is 1 on the answers alone; "condition" has the prompts' cells, 0 elsewhere, "condition_mask" is
    1 on them. A text, with its end, is cut into pieces of `max_tokens`, no token lost and none repeated.

    Args:
        data_path: files, a folder, a dataset or a built-in name, see `text_files.read_texts`.
        img_size: height and width of the images in pixels.
        use_chat_template: read chats, and tell prompts and answers apart by the tokenizer's chat template.
        max_tokens: in an image; None: as many as it holds.
        tokenizer: transformers' own or the folder of one; None: the 256 bytes (`byte_tokenizer`); "bpe": one of
            `vocab_size` tokens is learnt from the texts (`learn_tokenizer`).
        cell_size, channels: of the code.
    """

    def __init__(
        self,
        data_path: str | Path,
        img_size: int = 64,
        use_chat_template: bool = False,
        max_tokens: int | None = None,
        tokenizer: Any = None,
        cell_size: int = 4,
        channels: int = 3,
        vocab_size: int = 512,
    ) -> None:
        texts, validating = read_texts(data_path, use_chat_template)
        if tokenizer == "bpe":
            messages = ([text] if isinstance(text, str) else [one["content"] for one in text] for text in texts)
            tokenizer = learn_tokenizer(chain.from_iterable(messages), vocab_size)
        self.tokens = TextTokens(tokenizer)
        self.code = TokenCode(len(self.tokens), cell_size, channels)
        self.img_size, self.use_chat_template = img_size, use_chat_template
        cells = self.code.capacity(img_size)
        if max_tokens is not None and not 1 <= max_tokens <= cells:
            raise UserError(f"max_tokens {max_tokens}: an image of {img_size}×{img_size} has 1 to {cells} cells")
        self.max_tokens, self.data_path = max_tokens or cells, str(data_path)
        self._train_texts = len(texts)
        self._cut([*texts, *validating])

    def _cut(self, texts: list[Any]) -> None:
        rows, answers = [], []
        for start in range(0, len(texts), 1024):  # that a tokenizer is given at once
            part = texts[start : start + 1024]
            of_part, of_answers = self.tokens.encode_chats(part) if self.use_chat_template else (None, [])
            rows += of_part or self.tokens.encode(part, end=True)
            answers += of_answers
        lengths = np.array([len(row) for row in rows], dtype=np.int64)
        if not lengths.any():
            raise UserError(f"{self.data_path} has no token in it: expected text")
        self._numbers = np.concatenate(rows)  # int32, all tokens
        self._answers = np.concatenate(answers) if answers else None  # bool, which are an answer's
        pieces = -(-lengths // self.max_tokens)
        self._text_of = np.repeat(np.arange(len(texts)), pieces)  # of each piece
        number = np.arange(pieces.sum()) - np.repeat(pieces.cumsum() - pieces, pieces)  # of a piece in its text
        ends = lengths.cumsum()
        self._starts = np.repeat(ends - lengths, pieces) + number * self.max_tokens
        self._ends = np.minimum(self._starts + self.max_tokens, np.repeat(ends, pieces))

    def __len__(self) -> int:
        return len(self._starts)

    def get_batch(self, indices: Sequence[int]) -> dict[str, Tensor]:
        places = np.asarray(indices, np.int64)
        starts, ends = self._starts[places, None], self._ends[places, None]
        at = starts + np.arange((ends - starts).max())  # (B, L)
        valid, at = torch.from_numpy(at < ends), np.minimum(at, ends - 1)
        numbers = torch.from_numpy(self._numbers[at].astype(np.int64))
        answers = valid if self._answers is None else torch.from_numpy(self._answers[at]) & valid
        batch = {
            "clean": self.code.draw(numbers, valid, self.img_size),
            "index": torch.from_numpy(places),
            "mask": self.code.spread_to_pixels(answers.float(), self.img_size),
        }
        if self._answers is not None:
            prompt = batch["condition_mask"] = self.code.spread_to_pixels((valid & ~answers).float(), self.img_size)
            batch["condition"] = batch["clean"] * prompt[:, None]
        return batch

    def tokens_of(self, index: int) -> np.ndarray:
        return self._numbers[self._starts[index] : self._ends[index]]

    def decode(self, image: Tensor, mask: Tensor) -> Any:
        """Return the token numbers of an image (C, H, W) with its mask (H, W), or of each image of a batch."""
        return self.code.decode(image, mask) if image.ndim == 4 else self.code.decode(image[None], mask[None])[0]

    def text(self, tokens: Sequence[int]) -> str:
        return self.tokens.decode(tokens)

    def noised_examples(self, index: int, times: Sequence[float], seed: int = 0) -> dict[str, Tensor]:
        """Return t·image + (1 − t)·noise for each time, by a title with the text that the nearest codes tell."""
        item, found = self[index], {}
        noise = Draws(seed, 0, item["index"][None]).normal("noise", *item["clean"].shape)[0]
        for t in times:
            x = t * item["clean"] + (1 - t) * noise
            text = self.text(self.decode(x, item["mask"]))
            found[f"t = {t:g}: {''.join(c if c.isascii() and c.isprintable() else '·' for c in text)}"] = x
        return found

    def prompts(self, indices: Sequence[int]) -> list[list[int]]:
        """Return the tokens that images begin with: of chats all up to the first answer, of texts a third."""
        found = []
        for index in indices:
            piece = slice(self._starts[index], self._ends[index])
            tokens = self._numbers[piece]
            end = max(1, len(tokens) // 3) if self._answers is None else self._answers[piece].argmax()
            found.append(tokens[:end].tolist())
        return found

    def lengths(self) -> Tensor:
        """Return how many images have 0, 1, … tokens that are learnt: int64 (max_tokens + 1,)."""
        counts = self._ends - self._starts
        if self._answers is not None:
            before = np.concatenate([[0], self._answers.cumsum()])
            counts = before[self._ends] - before[self._starts]
        return torch.from_numpy(np.bincount(counts, minlength=self.max_tokens + 1))

    def answer_lengths(self) -> list[list[int]]:
        """Return [tokens before the first answer, tokens of this answer, images with as many] of chats."""
        if self._answers is None:
            return []
        answers, others = (np.concatenate([[0], flags.cumsum()]) for flags in (self._answers, ~self._answers))
        first = answers.searchsorted(answers[self._starts], "right") - 1  # the first token that is an answer's
        answered = first < self._ends
        first, starts, ends = first[answered], self._starts[answered], self._ends[answered]
        end = np.minimum(others.searchsorted(others[first], "right") - 1, ends)
        kinds, counts = np.unique(np.stack([first - starts, end - first], 1), axis=0, return_counts=True)
        return [[*kind, count] for kind, count in zip(kinds.tolist(), counts.tolist(), strict=True)]

    def part(self, pieces: Sequence[int]) -> Self:
        part, rows = copy.copy(self), np.asarray(pieces, np.int64)
        part._starts, part._ends, part._text_of = self._starts[rows], self._ends[rows], self._text_of[rows]
        return part

    def subsets(self, val_share: float, seed: int = 0) -> tuple[Self, Self | None]:
        """Return what trains and what validates: the dataset's own subsets, or of the images a share.

        That share has whole texts, or the end of the longest where all are too long.
        """
        if not 0 <= val_share < 1:
            raise UserError(f"val_share {val_share:g}: expected a share from 0 to below 1, such as 0.05")
        validates = self._text_of >= self._train_texts
        if not validates.any():
            validates = self._drawn_to_validate(min(len(self) - 1, math.ceil(round(val_share * len(self), 9))), seed)
        elif validates.all():
            raise UserError(f"The subset train of {self.data_path} has no token in it: expected text")
        train, val = np.flatnonzero(~validates), np.flatnonzero(validates)
        return self.part(train), self.part(val) if len(val) else None

    def _drawn_to_validate(self, wanted: int, seed: int) -> np.ndarray:
        """Return which images, bool (N,): no more than wanted, of texts in a drawn order that are not too long."""
        pieces = np.bincount(self._text_of)
        order = torch.randperm(len(pieces), generator=torch.Generator().manual_seed(seed)).numpy()
        taken, left = [], wanted
        for text, count in zip(order.tolist(), pieces[order].tolist(), strict=True):
            if 0 < count <= left:
                taken.append(text)
                left -= count
        if not taken:
            longest = np.flatnonzero(self._text_of == pieces.argmax())
            return np.isin(np.arange(len(self)), longest[len(longest) - wanted :])
        return np.isin(self._text_of, taken)

    def fingerprint(self) -> str:
        digest = hashlib.sha256(repr(("token images 1", self.img_size, self.code.config)).encode())
        for array in (self._numbers, self._answers, self._starts, self._ends):
            if array is not None:
                digest.update(np.ascontiguousarray(array).tobytes())
        return digest.hexdigest()

    def __str__(self) -> str:
        tokens = int((self._ends - self._starts).sum())
        texts, kind = len(np.unique(self._text_of)), "chats" if self.use_chat_template else "texts"
        cells, size = self.code.capacity(self.img_size), self.img_size
        return (
            f"{texts:,} {kind} of {self.data_path}: {tokens:,} tokens (of {self.code.num_tokens:,} kinds) in "
            f"{len(self):,} images of {size}×{size}, {tokens / len(self):.0f} of {cells} cells filled on average"
        )


class TokenImageDataModule(OrderedDataModule):
    """A `TokenImageDataset` in an order that resumes at any batch; a share of its images validates."""

    def __init__(self, data: TokenImageDataset, batch_size: int = 32, val_share: float = 0.05, **loading: int) -> None:
        super().__init__(batch_size, **loading)
        self.train_data, self.val_data = data.subsets(val_share, self.seed)
