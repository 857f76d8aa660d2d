"""What went wrong, said to a person: one line on stderr, a non-zero status, no traceback."""

import argparse
import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

from vavae_tools.runtime.console import prepare_streams


class UserError(Exception):
    """Something the user can mend: the message says what was found, where, what was expected and what to do."""

    def _render_traceback_(self) -> list[str]:
        """Return what IPython shows below a notebook's cell in a traceback's place."""
        return [f"error: {self}"]


class StoppedAtOnce(UserError):
    """Whatever is under way ends, nothing is saved: a person stopped for the second time, or another process waits."""


class Stopped(Exception):
    """Training was stopped in good order, by a person or the time: the message says where, and how to go on."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


class _Help(argparse.RawDescriptionHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        shown = action.default not in (None, "", [], argparse.SUPPRESS) and action.default is not False
        return f"{action.help} (default: %(default)s)" if shown else action.help


def with_home(text: str) -> str:
    """Return a text whose ~ at its beginning is the home folder."""
    return os.path.expanduser(text)  # noqa: PTH111  (Path's raises where there is no such user)


def in_home(path: str | Path) -> Path:
    return Path(with_home(str(path)))


def is_path(text: str) -> bool:
    return os.path.exists(text)  # noqa: PTH110  (Path's raises where a text is too long for a name)


class _Parser(argparse.ArgumentParser):
    """Takes --flag=~/folder, which shells leave as it is; says what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (--help shows all flags)")

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else args
        words = [re.sub(r"^(--[\w-]+=)?(~.*)", lambda at: (at[1] or "") + with_home(at[2]), word) for word in given]
        return super().parse_known_args(words, namespace)


def command_parser(program: str, description: str | None) -> argparse.ArgumentParser:
    program = sys.argv[0] if sys.argv[0].startswith("vavae-tools ") else program
    return _Parser(prog=program, description=description, formatter_class=_Help, allow_abbrev=False)


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main` and end the process: status 0 (`Stopped` too), 2 (`UserError`, disk) or 130 (Ctrl-C)."""
    status, message = 0, None
    prepare_streams()
    try:
        with disk_faults():
            main()
            sys.stdout.flush()
    except Stopped as stop:
        print(stop)
    except UserError as error:
        status, message = 2, str(error)
    except KeyboardInterrupt:
        status, message = 130, "stopped by the user"
    if message is not None:
        print("error: " + " ".join(message.split()), file=sys.stderr)
        sys.exit(status)


@contextmanager
def disk_faults() -> Iterator[None]:
    """Raise a `UserError` where the disk is full or does not let us write, or a file is in a folder's place."""
    try:
        yield
    except OSError as error:
        if (fault := disk_fault(error)) is None:
            raise
        raise UserError(fault) from error


def disk_fault(error: OSError) -> str | None:
    """The line to say for a disk that is full or does not let us write, or a file in a folder's place; else None."""
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return f"No space left on the disk{where}. What was there is untouched: free some space and run it again."
    if error.errno in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"Not allowed to write or read here{where}. Choose a folder that is yours, such as ./outputs."
    if error.errno in (errno.ENOTDIR, errno.EEXIST) and error.filename:
        path = Path(error.filename)
        for part in (path, *path.parents):
            if part.is_file():
                return f"{part} is a file, expected a folder: name another one."
            if part.is_symlink() and not part.exists():
                return f"{part} is a link to {part.readlink()}, which is not there: make that folder, or name another."
    return None


def one_line(error: BaseException, most: int = 120) -> str:
    """Return the beginning of an error's message without line breaks and control characters, or else its class."""
    return "".join(filter(str.isprintable, " ".join(str(error).split())))[:most] or type(error).__name__


def check_known(what: str, name: Any, known: Iterable[Any], of: str = "") -> None:
    """Raise a `UserError` with what there is, and what may be meant, where a name is none of those known."""
    known = list(map(str, known))
    if str(name) not in known:
        raise UserError(f"No {what} {name!r}{of}{nearest_named(str(name), known)}; there are {', '.join(known)}")


def nearest_named(name: str, known: Iterable[str]) -> str:
    """Return " (did you mean X?)" with the nearest name that is known, or "" where none is near."""
    small = {word.casefold(): word for word in known}
    nearest = get_close_matches(name.casefold(), small, 1)
    return f" (did you mean {small[nearest[0]]}?)" if nearest else ""


def join_first(words: Iterable, most: int = 3) -> str:
    """Return "a, b, c and 2 more"."""
    words = [str(word) for word in words]
    return ", ".join(words[:most]) + (f" and {len(words) - most:,} more" if len(words) > most else "")


NAMED_FIRST = ("vavae", "autoencoder", "pipeline", "vae", "checkpoints", "last.ckpt", "train", "data_split")
"""Of a folder's contents, what was mostly meant in its place."""


def contents(folder: Path) -> str:
    """Return what to say of a folder where something is missing: "holds a, b", "is empty", "is not there"."""
    if not folder.is_dir():
        return "is not there"
    names = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    names.sort(key=lambda name: NAMED_FIRST.index(name) if name in NAMED_FIRST else len(NAMED_FIRST))
    return f"holds {join_first(names, 5)}" if names else "is empty"
