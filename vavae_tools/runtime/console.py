"""Whether there is a screen, what stands on it the same everywhere, and how a process's output comes into a cell."""

import errno
import json
import os
import sys
from collections.abc import Callable
from io import StringIO, TextIOWrapper
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from vavae_tools.runtime.ranks import is_rank_zero


def print_beside_bars(line: str) -> None:
    """Print a line beside progress bars."""
    from tqdm.auto import tqdm

    tqdm.write(line, file=sys.stderr)


class LastingStream:
    """A text stream that goes on, into nothing, when its reader has gone (`| head`, a closed terminal)."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.is_read = stream, True

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._lasting(self.stream.write, text) or len(text)

    def flush(self) -> None:
        self._lasting(self.stream.flush)

    def _lasting(self, call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.EIO):
                raise
            self.is_read = False
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def prepare_streams() -> None:
    """Let this process print anything at any time: to a closed stream, in any encoding, and with no reader left."""
    for name in ("stdout", "stderr"):
        if (stream := getattr(sys, name)) is None:  # closed, by `>&-`
            stream = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, LastingStream(stream))


def printable(text: str) -> str:
    """Return a text as UTF-8 can hold it: names of files may not be so."""
    return text.encode("utf-8", "backslashreplace").decode()


CELL = "VAVAE_CELL"
"""Environment variable: this process's output is read by a notebook's, and in this folder images may be left."""
_RECORD = "\x1e"  # begins a line that is not text; ASCII's record separator


def in_notebook() -> bool:
    """Return whether this code runs in a notebook's kernel."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def for_a_cell() -> bool:
    """Return whether this is the process whose output a notebook's cell shows (`launch.call_on_ranks`)."""
    return CELL in os.environ and os.environ.get("LOCAL_RANK") == "0"


def is_interactive() -> bool:
    """Return whether progress bars are displayed: on a screen or in a notebook, not in a file."""
    return sys.stderr.isatty() or in_notebook() or for_a_cell()


class BarLines:
    """A bar's file where there is no screen: each of its states is a line on stderr."""

    def write(self, text: str) -> None:
        if text.strip():
            print(text.strip(), file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def clock(seconds: float) -> str:
    """Return a time such as "1:02:05"."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


# ---- what is no text, from a process into the cell
def send_record(**values: Any) -> None:
    """Hand plain values to the cell that shows this process's output."""
    print(_RECORD + json.dumps(values), flush=True)


def send_image(image: Any) -> None:
    """Hand a Pillow image to the cell."""
    with NamedTemporaryFile(dir=os.environ[CELL], suffix=".png", delete=False) as file:
        image.save(file, format="png")
    send_record(image=file.name)


def show_record(line: str, bars: dict[int, Any], show: Callable[[Any], None] | None = None) -> bool:
    """Show what `send_record` sent, a bar's state (also in `bars`) or an image; return False for a line of text."""
    if not line.startswith(_RECORD):
        return False
    values = json.loads(line[len(_RECORD) :])
    if "image" in values:
        import numpy as np
        from PIL import Image

        with Image.open(values["image"]) as file:
            image = file.convert("RGB")
        Path(values["image"]).unlink()
        if show is None:
            from IPython.display import display

            display(image)
        else:
            import torch

            show(torch.from_numpy(np.array(image)).permute(2, 0, 1))  # (3, H, W)
        return True
    from tqdm.auto import tqdm

    number = values["bar"]
    if number not in bars:
        bars[number] = tqdm(**{name: values[name] for name in ("total", "initial", "unit", "desc")})
    bars[number].n, bars[number].postfix = values["n"], values["postfix"]
    bars[number].refresh()
    if values["closed"]:
        bars.pop(number).close()
    return True


def bars_into_cell() -> None:
    """Let all bars of tqdm that are imported from now on move in the cell, where one shows this process's output."""
    if not for_a_cell():
        return
    import tqdm.auto
    from tqdm.std import tqdm as plain

    class CellBar(plain):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            named |= {"file": StringIO(), "mininterval": 0.5, "disable": bool(named.get("disable"))}
            super().__init__(*arguments, **named)

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            self._send()
            return True

        def close(self) -> None:
            if not self.disable:
                self._send(closed=True)
            super().close()

        def _send(self, closed: bool = False) -> None:
            shown = {name: getattr(self, name) for name in ("n", "total", "initial", "unit", "desc", "postfix")}
            send_record(bar=id(self), closed=closed, **shown)

    tqdm.auto.tqdm = CellBar


def log(line: str) -> None:
    """Print a line at once, and once: of several processes only the first speaks."""
    if is_rank_zero():
        was_read = getattr(sys.stdout, "is_read", None)
        print(line, flush=True)
        if was_read and not sys.stdout.is_read:
            print("The reader of the output has gone: it goes on without", file=sys.stderr, flush=True)
