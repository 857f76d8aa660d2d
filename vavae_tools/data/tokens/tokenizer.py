"""Texts ↔ token numbers, by a tokenizer of transformers: the bytes, one that is learnt from the texts, or any other."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vavae_tools.data.tokens.text_files import Chat
from vavae_tools.runtime.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_THREADS = "TOKENIZERS_PARALLELISM"
_CHOSEN = os.environ.get(_THREADS)
END, ASSISTANT = "<|end|>", "<|assistant|>"
_FILES = "tokenizer.json and tokenizer_config.json, as save_pretrained writes them"
SPECIAL = (END, "<|system|>", "<|user|>", ASSISTANT)
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '"
    + END
    + "' }}{% endfor %}{% if add_generation_prompt %}{{ '"
    + ASSISTANT
    + "' }}{% endif %}"
)


def byte_tokenizer() -> "PreTrainedTokenizerBase":
    """Tokens 0 to 255 are the bytes of UTF-8, then come the end of a text and the roles of a chat."""
    from tokenizers.models import BPE

    letters = {character: byte for byte, character in enumerate(_letters())}
    return _with_roles(_on_bytes(BPE(vocab=letters, merges=[])))


def learn_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> "PreTrainedTokenizerBase":
    """Byte-pair encoding (Sennrich et al. 2016) on bytes: frequent words become one token, any text stays exact.

    Args:
        vocab_size: tokens at most: 256 bytes, the end of a text and the roles of a chat, and pieces of words.

    Raises:
        UserError: no room for a piece.
    """
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    if vocab_size <= 256 + len(SPECIAL):
        raise UserError(f"vocab_size {vocab_size}: {256 + len(SPECIAL)} are taken before the first piece of a word")
    learnt = _on_bytes(BPE())
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL),
        initial_alphabet=ByteLevel.alphabet(),
        show_progress=False,
    )
    with _threads():
        learnt.train_from_iterator(texts, trainer)
    return _with_roles(learnt)


def _on_bytes(model: Any) -> Any:
    """A tokenizer around a model of pieces that are written in bytes."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _with_roles(tokenizer: Any) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    whole = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END, additional_special_tokens=list(SPECIAL[1:])
    )
    whole.chat_template = _TEMPLATE
    return whole


def _letters() -> list[str]:
    """How byte-level tokenizers write byte 0, 1, …: printable ones as they are, the others from character 256 on."""
    from tokenizers.pre_tokenizers import ByteLevel

    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(sorted(letter for letter in ByteLevel.alphabet() if ord(letter) >= 256))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
    """A tokenizer of transformers from a folder on the disk; no code of the folder is run.

    Raises:
        UserError: there is none.
    """
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise UserError(
            f"No folder {folder} with a tokenizer ({_FILES}): leave it out for the built-in one, whose tokens are bytes"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the library in Rust raises no narrower one
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"{folder} holds no tokenizer of transformers ({reason}): expected {_FILES}") from None
    if not set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids):  # of a class, without its files
        raise UserError(f"The tokenizer in {folder} has no tokens but special ones: expected {_FILES}")
    return tokenizer


@contextmanager
def _threads() -> Iterator[None]:
    """Let tokenizers use several threads here alone: before 0.23 it warns of each process forked from one that did."""
    os.environ[_THREADS] = _CHOSEN or "true"
    try:
        yield
    finally:
        os.environ[_THREADS] = _CHOSEN or "false"


class TextTokens:
    """What a tokenizer makes of texts and chats, without anything added but the end.

    Args:
        tokenizer: transformers' own, or the folder of one; by default `byte_tokenizer`.
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerBase | str | Path | None" = None) -> None:
        self._bytewise = tokenizer is None
        if tokenizer is None:
            tokenizer = byte_tokenizer()
        elif isinstance(tokenizer, str | Path):
            tokenizer = load_tokenizer(tokenizer)
        self.tokenizer: Any = tokenizer
        self.end: int | None = tokenizer.eos_token_id
        self._count = max(tokenizer.get_vocab().values()) + 1

    def __len__(self) -> int:
        """How many numbers there are: the largest and one; gaps between them count."""
        return self._count

    def encode(self, texts: Sequence[str], end: bool = False) -> list[np.ndarray]:
        """Token numbers of texts, int32; what looks like a special token in them is text like any other.

        Args:
            end: add the end, where the tokenizer has a token for it.
        """
        if self._bytewise:  # what the tokenizer says, 300 times as fast
            rows = (np.frombuffer(text.encode(), np.uint8) for text in texts)
        else:
            rows = iter(self._numbers(texts, split_special_tokens=True))
        ends = [self.end] if end and self.end is not None else []
        return [np.concatenate([row, ends], dtype=np.int32, casting="unsafe") for row in rows]

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of token numbers, special tokens left out; numbers that are no token's are left out, too."""
        return self.tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def prompt(self, chat: Chat) -> list[int]:
        """The tokens of a chat by its template, up to where the assistant begins.

        Raises:
            UserError: as `encode_chats`.
        """
        parts = self._parts(chat)
        parts.append(self._after("".join(parts), chat, ask=True))
        return [token for part in self._numbers(parts) for token in part]

    def encode_chats(self, chats: Sequence[Chat]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        """The tokens of chats by their template, up to the last answer's end, and which of them are the assistant's.

        What looks like a special token in a message is one, as transformers has it.

        Raises:
            UserError: the tokenizer has no chat template, or one that refuses a chat or writes earlier messages anew.
        """
        parts = [self._parts(chat) for chat in chats]
        tokens = iter(self._numbers([part for of_chat in parts for part in of_chat]))
        rows, answers = [], []
        for of_chat in parts:
            encoded = [next(tokens) for _ in of_chat]  # what is asked, an answer, what is asked …
            rows.append(np.concatenate(encoded).astype(np.int32))
            is_answer = np.arange(len(encoded)) % 2 == 1
            answers.append(np.repeat(is_answer, [len(part) for part in encoded]))
        return rows, answers

    def _parts(self, chat: Chat) -> list[str]:
        """A chat's text up to the first answer, that answer, what follows up to the second …"""
        parts = []
        for number, message in enumerate(chat):
            if message["role"] == "assistant":
                parts.append(self._after("".join(parts), chat[:number], ask=True))
                parts.append(self._after("".join(parts), chat[: number + 1], ask=False))
        return parts

    def _after(self, text: str, chat: Chat, ask: bool) -> str:
        """What a chat's text has after the text of its first messages."""
        longer = self._templated(chat, ask)
        if not longer.startswith(text):
            raise UserError(
                "The tokenizer's chat template writes earlier messages otherwise when others follow, so that prompt "
                "and answer cannot be told apart: take another template"
            )
        return longer[len(text) :]

    def _templated(self, chat: Chat, ask: bool) -> str:
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            raise UserError(
                "The tokenizer has no chat template (chat_template.jinja, or in tokenizer_config.json): leave "
                "use_chat_template out, or add one"
            )
        try:  # of a list of chats, since before the first message a chat is empty, which transformers takes for such
            return self.tokenizer.apply_chat_template([chat], add_generation_prompt=ask, tokenize=False)[0]
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in chat[:5])
            raise UserError(
                f"The tokenizer's chat template refuses a chat of {roles or 'no message'} ({str(error)[:120]}): "
                "write the chats as it expects them, or take another template"
            ) from None

    def _numbers(self, texts: Sequence[str], **options: bool) -> list[list[int]]:
        """Token numbers of texts in which special tokens are meant, as a template writes them."""
        if not texts:
            return []
        with _threads():
            return self.tokenizer(
                list(texts), add_special_tokens=False, return_attention_mask=False, verbose=False, **options
            ).input_ids
