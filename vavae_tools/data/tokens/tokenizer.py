"""Texts ↔ token numbers, by a tokenizer of transformers: the bytes, one that is learnt from the texts, or any other."""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vavae_tools.data.tokens.text_files import Chat
from vavae_tools.runtime.errors import UserError, one_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END, ASSISTANT = "<|end|>", "<|assistant|>"
SPECIAL = (END, "<|system|>", "<|user|>", ASSISTANT)
_TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '"
    + END
    + "' }}{% endfor %}{% if add_generation_prompt %}{{ '"
    + ASSISTANT
    + "' }}{% endif %}"
)
_FILES = "tokenizer.json and tokenizer_config.json, as save_pretrained writes them"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # else it warns of each process that is forked later


def byte_tokenizer() -> "PreTrainedTokenizerBase":
    """Make the built-in tokenizer: 0 to 255 are the bytes of UTF-8, then come the end of a text and a chat's roles."""
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel

    # byte-level tokenizers write printable bytes as they are, and the others as characters from 256 on
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(sorted(letter for letter in ByteLevel.alphabet() if ord(letter) >= 256))
    letters = {chr(byte) if byte in printable else next(others): byte for byte in range(256)}
    return _for_chats(_byte_level(BPE(vocab=letters, merges=[])))


def learn_tokenizer(texts: Iterable[str], vocab_size: int = 512) -> "PreTrainedTokenizerBase":
    """Learn byte-pair encoding (Sennrich et al. 2016) on bytes: frequent words become one token, any text stays exact.

    Args:
        vocab_size: tokens at most: 256 bytes, the end of a text and the roles of a chat, and pieces of words.
    """
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer

    if vocab_size <= 256 + len(SPECIAL):
        raise UserError(f"vocab_size {vocab_size}: {256 + len(SPECIAL)} are taken before the first piece of a word")
    learnt, options = _byte_level(BPE()), {"initial_alphabet": ByteLevel.alphabet(), "show_progress": False}
    learnt.train_from_iterator(texts, BpeTrainer(vocab_size=vocab_size, special_tokens=list(SPECIAL), **options))
    return _for_chats(learnt)


def _byte_level(model: Any) -> Any:
    from tokenizers import Tokenizer, decoders, pre_tokenizers

    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _for_chats(tokenizer: Any) -> "PreTrainedTokenizerBase":
    from transformers import PreTrainedTokenizerFast

    roles = list(SPECIAL[1:])
    whole = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END, additional_special_tokens=roles)
    whole.chat_template = _TEMPLATE
    return whole


def load_tokenizer(folder: str | Path) -> "PreTrainedTokenizerBase":
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
        """Return the largest number plus one."""
        return self._count

    def encode(self, texts: Sequence[str], end: bool = False) -> list[np.ndarray]:
        """Return token numbers of texts, int32, with the `end` if there is one; special tokens in texts are text."""
        if self._bytewise:  # what the tokenizer says, 300 times as fast
            rows = (np.frombuffer(text.encode(), np.uint8) for text in texts)
        else:
            rows = iter(self._numbers(texts, split_special_tokens=True))
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
        answers = [number for number, message in enumerate(chat) if message["role"] == "assistant"]
        ends = [end for number in answers for end in ((number, True), (number + 1, False))]
        parts, former = [], ""
        for end, asks in [*ends, (len(chat), True)] if ask else ends:
            text = self._templated(chat[:end], asks)
            if not text.startswith(former):
                problem = "The tokenizer's chat template writes earlier messages otherwise when others follow"
                raise UserError(f"{problem}, so that prompt and answer cannot be told apart: take another template")
            parts.append(text[len(former) :])
            former = text
        return parts

    def _templated(self, chat: Chat, ask: bool) -> str:
        from jinja2 import TemplateError

        if not self.tokenizer.chat_template:
            problem = "The tokenizer has no chat template (chat_template.jinja, or in tokenizer_config.json)"
            raise UserError(f"{problem}: leave use_chat_template out, or add one")
        try:  # of a list of chats, since before the first message a chat is empty, which transformers takes for such
            return self.tokenizer.apply_chat_template([chat], add_generation_prompt=ask, tokenize=False)[0]
        except TemplateError as error:
            roles = ", ".join(message["role"] for message in chat[:5])
            problem = f"The tokenizer's chat template refuses a chat of {roles or 'no message'} ({one_line(error)})"
            raise UserError(f"{problem}: write the chats as it expects them, or take another template") from None

    def _numbers(self, texts: Sequence[str], **options: bool) -> list[list[int]]:
        """Return token numbers of texts in which special tokens are meant, as a template writes them."""
        options |= {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        return self.tokenizer(list(texts), **options).input_ids if texts else []
