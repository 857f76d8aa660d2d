"""Texts ↔ token numbers, by a tokenizer of transformers, ↔ squares of an image, a cell for each token."""

import math
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor

from vavae_tools.data.tokens.text_files import Chat
from vavae_tools.runtime.errors import UserError, one_line

_TABLE_LIMIT = 2**24  # numbers in a table of cells, or of distances
END, ASSISTANT = "<|end|>", "<|assistant|>"
SPECIAL = (END, "<|system|>", "<|user|>", ASSISTANT)
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_FILES = "tokenizer.json and tokenizer_config.json, as save_pretrained writes them"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns of each process that is forked later


# ---- tokens as cells


class TokenCode:
    """Each token number is a square cell of pixels that are −1 or 1; cells stand row by row, from the left.

    A cell's n = channels · cell_size² pixels (channel by channel, row by row) are the bits of a linear code: pixel j is
    the parity of those bits of the number that column j of the code names. With b bits for all numbers, columns 0 to
    b − 1 name one bit each, so that different numbers always look different; the others, 1 + (j²·s mod (2ᵇ − 1)) with s
    nearest to (√2 − 1)·(2ᵇ − 1), name many, so that cells differ in many pixels: of n = 48 in 16 or more for b = 9 (260
    tokens), in 10 or more for b = 16 (50,257), in 9 or more for b = 18 (152,000), and in 24 on average.
    """

    def __init__(self, num_tokens: int, cell_size: int = 4, channels: int = 3) -> None:
        bits, self.length = max(1, (num_tokens - 1).bit_length()), channels * cell_size**2
        if num_tokens < 1 or cell_size < 1 or channels < 1:
            raise UserError(f"{num_tokens} tokens in {channels} channels of {cell_size}×{cell_size}: expected more")
        if bits > self.length:
            cell = f"a cell of {channels}×{cell_size}×{cell_size} pixels has {self.length}"
            needed = f"{num_tokens:,} tokens need {bits} bits"
            raise UserError(f"{needed}, {cell}: take a larger cell_size, or more channels")
        self.num_tokens, self.cell_size, self.channels = num_tokens, cell_size, channels
        self.config = {"num_tokens": num_tokens, "cell_size": cell_size, "channels": channels}  # the arguments
        self._bits, largest = bits, 2**bits - 1
        spread = round(largest * (math.sqrt(2) - 1))
        self._columns = torch.tensor([2**j if j < bits else 1 + j**2 * spread % largest for j in range(self.length)])

    def capacity(self, img_size: int) -> int:
        size = self.cell_size
        if img_size < 1 or img_size % size:
            near = max(size, round(img_size / size) * size)
            raise UserError(f"img_size {img_size} is no multiple of cell_size {size}: take {near} or another one")
        return (img_size // size) ** 2

    def cells(self, tokens: Tensor) -> Tensor:
        """Return the pixels of token numbers int64 (...): float32 −1 or 1 (..., n)."""
        bits = tokens[..., None] & self._columns.to(tokens.device)
        for shift in (32, 16, 8, 4, 2, 1):  # the parity of all bits ends up in the last
            bits = bits ^ (bits >> shift)
        return (bits & 1).float() * 2 - 1

    def drawn(self, tokens: Tensor) -> Tensor:
        """Return `cells`, looked up where that is a small table."""
        if self.num_tokens * self.length > _TABLE_LIMIT:
            return self.cells(tokens)
        return F.embedding(tokens, self.table.to(tokens.device))

    @cached_property
    def table(self) -> Tensor:
        return self.cells(torch.arange(self.num_tokens))

    def draw(self, tokens: Tensor, valid: Tensor, img_size: int) -> Tensor:
        """Draw token numbers int64 (B, L) as images (B, C, H, W); where `valid` (B, L) is false the cell is 0, grey."""
        capacity, length = self.capacity(img_size), tokens.shape[1]
        if length > capacity:
            found = f"{length:,} tokens for an image of {img_size}×{img_size}, which has {capacity:,} cells"
            raise UserError(f"{found}: cut the text, or take a larger img_size")
        cells = F.pad(self.drawn(tokens) * valid[..., None], (0, 0, 0, capacity - length))
        return self.images(cells, img_size // self.cell_size)

    def images(self, cells: Tensor, columns: int) -> Tensor:
        """Put cells (B, L, n), whole rows of them, together to images (B, C, H, W)."""
        sizes = {"w": columns, "c": self.channels, "p": self.cell_size}
        return rearrange(cells, "b (h w) (c p q) -> b c (h p) (w q)", **sizes)

    def cells_of(self, images: Tensor) -> Tensor:
        """Cut images (B, C, H, W) into cells (B, L, n): the reverse of `images`."""
        p = self.cell_size
        return rearrange(images, "b c (h p) (w q) -> b (h w) (c p q)", p=p, q=p)

    def spread_to_pixels(self, of_cells: Tensor, img_size: int) -> Tensor:
        """Spread a number for each of the first cells (B, L) over pixels (B, H, W); 0 for the other cells."""
        side, p = img_size // self.cell_size, self.cell_size
        of_cells = F.pad(of_cells, (0, side**2 - of_cells.shape[1]))
        return repeat(of_cells, "b (h w) -> b (h p) (w q)", h=side, p=p, q=p)

    def mask_to_cells(self, mask: Tensor) -> Tensor:
        return F.max_pool2d(mask[:, None].float(), self.cell_size).flatten(1) > 0

    def nearest(self, cells: Tensor) -> Tensor:
        """Return the tokens whose cells are nearest to cells (..., n), all of the same length: int64 (...)."""
        rows = cells.reshape(-1, self.length).float()
        found, valid = self._by_signs(rows)
        others = rows[~valid]  # no cell can be nearer than one that has all the signs
        if len(others):
            table = self.table.to(rows.device).T
            parts = others.split(max(1, _TABLE_LIMIT // self.num_tokens))
            found[~valid] = torch.cat([(part @ table).argmax(1) for part in parts])
        return found.view(cells.shape[:-1])

    def is_valid(self, cells: Tensor) -> Tensor:
        """Return whether the signs of all of a cell's pixels (..., n) are those of one token: bool (...)."""
        return self._by_signs(cells)[1]

    def _by_signs(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers that the first pixels show, int64 (...), and whether all other signs are that token's."""
        numbers = ((cells[..., : self._bits] > 0) << torch.arange(self._bits, device=cells.device)).sum(-1)
        return numbers, (numbers < self.num_tokens) & (cells * self.cells(numbers) > 0).all(-1)

    def decode(self, images: Tensor, mask: Tensor) -> list[list[int]]:
        """Read images (B, C, H, W) and their masks (B, H, W): token numbers, exact of clean ones, else the nearest."""
        found, valid = self.nearest(self.cells_of(images)), self.mask_to_cells(mask)
        return [tokens[kept].tolist() for tokens, kept in zip(found, valid, strict=True)]


# ---- texts as tokens


def byte_tokenizer() -> Any:
    """Return the built-in tokenizer: 0 to 255 are the bytes of UTF-8; the end of a text and a chat's roles follow."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    # byte-level tokenizers write printable bytes as they are, and the others as characters from 256 on
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(sorted(letter for letter in pre_tokenizers.ByteLevel.alphabet() if ord(letter) >= 256))
    letters = {chr(byte) if byte in printable else next(others): byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocab=letters, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    options = {"eos_token": END, "additional_special_tokens": list(SPECIAL[1:]), "chat_template": _TEMPLATE}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def learn_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> Any:
    """Learn byte-pair encoding (Sennrich et al. 2016) on bytes: frequent words become one token, any text stays exact.

    Of at most `vocab_size` tokens, 256 are the bytes, and four the end of a text and the roles of a chat.
    """
    if vocab_size <= 256 + len(SPECIAL):
        raise UserError(f"vocab_size {vocab_size}: {256 + len(SPECIAL)} are taken before the first piece of a word")
    return byte_tokenizer().train_new_from_iterator(texts, vocab_size, show_progress=False)


def load_tokenizer(folder: str | Path) -> Any:
    """Load a tokenizer of transformers from a folder on the disk; no code of the folder is run."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(f"No folder {folder} with a tokenizer ({_FILES}): leave it out for the built-in one, of bytes")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library in Rust raises no narrower one
        problem = f"{folder} holds no tokenizer of transformers ({one_line(error)})"
        raise UserError(f"{problem}: expected {_FILES}") from None
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):  # of a class, without its files
        raise UserError(f"The tokenizer in {folder} has no tokens but special ones: expected {_FILES}")
    return tokenizer


class TextTokens:
    """What a tokenizer of transformers, the folder of one, or by default `byte_tokenizer` makes of texts and chats."""

    def __init__(self, tokenizer: Any = None) -> None:
        self._bytewise = tokenizer is None
        if isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(tokenizer)
        self.tokenizer: Any = byte_tokenizer() if tokenizer is None else tokenizer
        self.end: int | None = self.tokenizer.eos_token_id
        self._length = max(self.tokenizer.get_vocab().values()) + 1  # the largest number plus one

    def __len__(self) -> int:
        return self._length

    def encode(self, texts: Sequence[str], end: bool = False) -> list[np.ndarray]:
        """Return token numbers of texts, int32, with the `end` if there is one; special tokens in texts are text."""
        if self._bytewise:  # what the tokenizer says, 300 times as fast
            rows = [np.frombuffer(text.encode(), np.uint8) for text in texts]
        else:
            rows = self._numbers(texts, split_special_tokens=True)
        ends = [self.end] if end and self.end is not None else []
        return [np.concatenate([row, ends], dtype=np.int32, casting="unsafe") for row in rows]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of token numbers without special and unknown ones."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def prompt(self, chat: Chat) -> list[int]:
        """Return the tokens of a chat by its template, up to where the assistant begins."""
        return [token for part in self._numbers(self._parts(chat, ask=True)) for token in part]

    def encode_chats(self, chats: Sequence[Chat]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """Return the tokens of chats by their template, up to the last answer's end, and which are the assistant's.

        What looks like a special token in a message is one, as transformers has it.
        """
        parts = [self._parts(chat) for chat in chats]
        tokens = iter(self._numbers([part for of_chat in parts for part in of_chat]))
        rows, answers = [], []
        for of_chat in parts:
            encoded = [next(tokens) for _ in of_chat]  # what is asked, an answer, what is asked …
            rows.append(np.concatenate(encoded).astype(np.int32))
            answers.append(np.repeat(np.arange(len(encoded)) % 2 == 1, [len(part) for part in encoded]))
        return rows, answers

    def _parts(self, chat: Chat, ask: bool = False) -> list[str]:
        """Return a chat's text up to the first answer, that answer, what follows up to the second …"""
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            problem = "The tokenizer has no chat template (chat_template.jinja, or in tokenizer_config.json)"
            raise UserError(f"{problem}: leave use_chat_template out, or add one")
        answers = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
        ends = [end for number in answers for end in ((number, True), (number + 1, False))]
        parts, former = [], ""
        for end, asks in [*ends, (len(chat), True)] if ask else ends:
            try:  # of a list of chats, since transformers takes an empty chat for one
                options = {"add_generation_prompt": asks, "tokenize": False}
                text = self.tokenizer.apply_chat_template([chat[:end]], **options)[0]
            except TemplateError as error:
                roles = ", ".join(message["role"] for message in chat[: min(end, 5)]) or "no message"
                problem = f"The tokenizer's chat template refuses a chat of {roles} ({one_line(error)})"
                raise UserError(f"{problem}: write the chats as it expects them, or take another template") from None
            if not text.startswith(former):
                problem = "The tokenizer's chat template writes earlier messages otherwise when others follow"
                raise UserError(f"{problem}, so that prompt and answer cannot be told apart: take another template")
            parts.append(text[len(former) :])
            former = text
        return parts

    def _numbers(self, texts: Sequence[str], **options: bool) -> list[list[int]]:
        """Return token numbers of texts in which special tokens are meant, as a template writes them."""
        options |= {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(list(texts), **options).input_ids if texts else []
