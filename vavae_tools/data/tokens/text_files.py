"""Texts and chats on the disk: .txt, .jsonl, or a dataset of Hugging Face's `datasets`; or built-in ones by name."""

import json
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from vavae_tools.data.demo.sentences import questions, stories, zen
from vavae_tools.data.folders import contents, natural_key
from vavae_tools.data.sources.hugging_face import is_dataset, load_folder
from vavae_tools.runtime.errors import UserError

Chat = list[dict[str, str]]
"""Messages, each with "role" and "content"."""
BUILT_IN: dict[str, Callable[[], list[str] | list[Chat]]] = {
    "sentences": lambda: stories(20_000),
    "questions": lambda: questions(20_000),
    "zen": zen,
}
"""Names that stand for texts of `data.sentences`."""
_MESSAGES = 'a list of {"role": …, "content": …} with an answer of "assistant" in it'


def read_texts(data_path: str | Path, chats: bool = False) -> tuple[list[Any], list[Any]]:
    """All texts, or all chats, in the natural order of the files' names, and those that only validate.

    Args:
        data_path: a .txt file (one text) or a .jsonl file (a JSON object in each line, with "text" or "messages"), a
            folder with such files at any depth, a dataset that `save_to_disk` wrote with such a column (of several
            sides "train" and, to validate, "validation", "valid" or "val"), or a name of `BUILT_IN`.
        chats: read messages; else those become a text, one message below the other.

    Raises:
        UserError: nothing is there, a file is empty or no UTF-8, or a line has neither text nor messages.
    """
    path = Path(data_path)
    if not path.exists():
        if str(data_path) not in BUILT_IN:
            raise UserError(
                f"No {path}: expected a .txt or .jsonl file, a folder with them, a dataset of save_to_disk, or one of "
                f"the built-in {', '.join(BUILT_IN)}"
            )
        found = BUILT_IN[str(data_path)]()
        return [_as_asked(text, chats, f"the built-in {data_path}") for text in found], []
    if path.is_dir() and is_dataset(path):
        return _of_dataset(path, chats)
    files = [path]
    if path.is_dir():
        files = [file for file in path.rglob("*") if file.suffix.lower() in _READERS and file.is_file()]
        files = [file for file in files if not _hidden(file.relative_to(path))]
        files.sort(key=lambda file: natural_key(str(file.relative_to(path))))
        if not files:
            raise UserError(f"{path} has no .txt or .jsonl file; it has {contents(path)}")
    return [text for file in files for text in _of_file(file, chats)], []


def _hidden(path: Path) -> bool:
    """Copies of editors and what unpacking leaves, as in folders of pictures."""
    return any(part.startswith(".") or part == "__MACOSX" for part in path.parts)


def _of_file(path: Path, chats: bool) -> Iterator[str | Chat]:
    read = _READERS.get(path.suffix.lower())
    if read is None:
        raise UserError(f"{path}: expected a .txt or .jsonl file")
    try:
        content = path.read_bytes().decode().removeprefix("\ufeff")  # not utf-8-sig, which counts bytes after the mark
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise UserError(
            f"{path} is no text in UTF-8: byte {error.start:,} is {byte:#04x}; save it as UTF-8 (iconv -t UTF-8)"
        ) from None
    if not content.strip():
        raise UserError(f"{path} is empty: expected text in it, or take it away")
    for text, where in read(content, path):
        yield _as_asked(text, chats, where)


def _plain(content: str, path: Path) -> Iterator[tuple[str, str]]:
    yield content, str(path)


def _json_lines(content: str, path: Path) -> Iterator[tuple[Any, str]]:
    for number, line in enumerate(content.split("\n"), 1):  # not splitlines: a string may hold other separators
        if not line.strip():
            continue
        where = f"{path}, line {number:,}"
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is no JSON: {error.msg} at column {error.colno}") from None
        yield row if isinstance(row, dict) else {}, where


_READERS = {".txt": _plain, ".jsonl": _json_lines}


def _of_dataset(path: Path, chats: bool) -> tuple[list[Any], list[Any]]:
    found = load_folder(path)
    if not isinstance(found, dict):
        return _of_side(found, chats, str(path)), []
    if "train" not in found:
        raise UserError(f"No side 'train' in {path}; there are {', '.join(found)}: rename one")
    val = next((name for name in ("validation", "valid", "val") if name in found), None)
    return (
        _of_side(found["train"], chats, f"{path}, train"),
        _of_side(found[val], chats, f"{path}, {val}") if val else [],
    )


def _of_side(dataset: Any, chats: bool, where: str) -> list[Any]:
    columns = [name for name in ("text", "messages") if name in dataset.column_names]
    if not columns:
        raise UserError(f"{where} has no column text or messages; it has {', '.join(dataset.column_names)}: rename one")
    rows = dataset.select_columns(columns).with_format(None)
    return [_as_asked(row, chats, f"{where}, row {number:,}") for number, row in enumerate(rows)]


def _as_asked(found: str | Chat | dict[str, Any], chats: bool, where: str) -> str | Chat:
    """What was found as the text, or as the chat, that it is to be."""
    row = found if isinstance(found, dict) else {"text" if isinstance(found, str) else "messages": found}
    text, messages = row.get("text"), row.get("messages")
    if messages is not None and (chats or text is None):
        messages = _checked(messages, where)
        text = _checked_text("\n".join(message["content"] for message in messages), where)
        return messages if chats else text
    if chats:
        raise UserError(f"{where} has no messages, {_MESSAGES}: leave use_chat_template out, or give chats")
    if not isinstance(text, str):
        raise UserError(f'{where} has neither "text" nor "messages": expected {{"text": "…"}} or {{"messages": […]}}')
    return _checked_text(text, where)


def _checked_text(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON's \ud83d without the half that belongs to it
        raise UserError(
            f"{where}: character {error.start:,} of the text is half of a surrogate pair, {text[error.start]!a}: "
            "write the other half, or take it out"
        ) from None
    return text


def _checked(messages: Any, where: str) -> Chat:
    fits = isinstance(messages, Iterable) and all(
        isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))
        for message in messages
    )
    if not fits or all(message["role"] != "assistant" for message in messages):
        raise UserError(f"{where}: its messages are not {_MESSAGES}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
