"""Texts and chats on the disk: .txt, .jsonl, or a dataset of Hugging Face's `datasets`; or built-in ones by name."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from vavae_tools.data.captions import read_json_lines, read_text
from vavae_tools.data.demo.sentences import questions, stories, zen
from vavae_tools.data.folders import contents, natural_key
from vavae_tools.data.sources.hugging_face import is_dataset, read_datasets
from vavae_tools.runtime.errors import UserError, in_home

Chat = list[dict[str, str]]  # messages, each with "role" and "content"
BUILT_IN: dict[str, Callable[[], list[str] | list[Chat]]] = {
    "sentences": lambda: stories(20_000),
    "questions": lambda: questions(20_000),
    "zen": zen,
}
_MESSAGES = 'a list of {"role": …, "content": …} with an answer of "assistant" in it'
_EXTENSIONS = (".txt", ".jsonl")
_Row = tuple[dict[str, Any], str]  # "text" or "messages", and where they were found


def read_texts(data_path: str | Path, chats: bool = False) -> tuple[list[Any], list[Any]]:
    """Return all texts, or all chats, in the natural order of the files' names, and those that only validate.

    Args:
        data_path: a .txt file (one text) or a .jsonl file (a JSON object in each line, with "text" or "messages"), a
            folder with such files at any depth, a dataset that `save_to_disk` wrote with such a column (of several
            subsets "train" and, to validate, "validation", "valid" or "val"), or a name of `BUILT_IN`.
        chats: read messages; else those become a text, one message below the other.
    """
    path, val = in_home(data_path), ()
    if path.is_dir() and is_dataset(path):
        train, val = _rows_of_dataset(path)
    elif path.exists():
        train = _rows_of_files(path)
    elif str(data_path) in BUILT_IN:
        found = BUILT_IN[str(data_path)]()
        name = "text" if isinstance(found[0], str) else "messages"
        train = (({name: one}, f"the built-in {data_path}") for one in found)
    else:
        expected = f"a folder with them, a dataset of save_to_disk, or one of the built-in {', '.join(BUILT_IN)}"
        raise UserError(f"No {path}: expected a .txt or .jsonl file, {expected}")
    return tuple([_to_text_or_chat(row, chats, where) for row, where in rows] for rows in (train, val))


def _rows_of_files(path: Path) -> Iterator[_Row]:
    files = [path]
    if path.is_dir():
        names = [file.relative_to(path) for file in path.rglob("*") if file.suffix.lower() in _EXTENSIONS]
        names = [name for name in names if not any(part[0] == "." or part == "__MACOSX" for part in name.parts)]
        files = [path / name for name in sorted(names, key=lambda name: natural_key(str(name)))]
        if not files:
            raise UserError(f"{path} has no .txt or .jsonl file; it has {contents(path)}")
    for file in files:
        if file.suffix.lower() not in _EXTENSIONS:
            raise UserError(f"{file}: expected a .txt or .jsonl file")
        content = read_text(file)
        if not content.strip():
            raise UserError(f"{file} is empty: expected text in it, or take it away")
        if file.suffix.lower() == ".txt":
            yield {"text": content}, str(file)
        else:
            yield from ((row if isinstance(row, dict) else {}, where) for where, row in read_json_lines(file))


def _rows_of_dataset(path: Path) -> tuple[Iterable[_Row], Iterable[_Row]]:
    rows = [_rows_of_subset(dataset, f"{path}, {name}") for name, dataset in read_datasets(path).items()]
    return rows[0], rows[1] if len(rows) > 1 else ()


def _rows_of_subset(dataset: Any, where: str) -> Iterator[_Row]:
    columns = [name for name in ("text", "messages") if name in dataset.column_names]
    if not columns:
        raise UserError(f"{where} has no column text or messages; it has {', '.join(dataset.column_names)}: rename one")
    for number, row in enumerate(dataset.select_columns(columns).with_format(None)):
        yield row, f"{where}, row {number:,}"


def _to_text_or_chat(row: dict[str, Any], chats: bool, where: str) -> str | Chat:
    text, messages = row.get("text"), row.get("messages")
    if messages is not None and (chats or text is None):
        messages = _checked_messages(messages, where)
        text = "\n".join(message["content"] for message in messages)
    elif chats:
        raise UserError(f"{where} has no messages, {_MESSAGES}: leave use_chat_template out, or give chats")
    if not isinstance(text, str):
        raise UserError(f'{where} has neither "text" nor "messages": expected {{"text": "…"}} or {{"messages": […]}}')
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON's \ud83d without the half that belongs to it
        found = f"character {error.start:,} of the text is half of a surrogate pair, {text[error.start]!a}"
        raise UserError(f"{where}: {found}: take it out") from None
    return messages if chats else text


def _checked_messages(messages: Any, where: str) -> Chat:
    fits = isinstance(messages, Iterable) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )
    if not fits or all(message["role"] != "assistant" for message in messages):
        raise UserError(f"{where}: its messages are not {_MESSAGES}")
    return [{"role": message["role"], "content": message["content"]} for message in messages]
