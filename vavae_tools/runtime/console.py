"""Whether there is a screen, what stands on it the same everywhere, and how a process's output comes into a cell."""

import errno
import json
import os
import sys
from collections.abc import Callable
from io import BytesIO, StringIO, TextIOWrapper
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any
from uuid import uuid4

from vavae_tools.runtime.ranks import is_rank_zero


def print_beside_bars(line: str) -> None:
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
JPEG_BYTES = 250_000  # of an image in a cell: ten of them, in base64, leave a saved notebook below 5 MB
_RECORD = "\x1e"  # begins a line that is not text; ASCII's record separator


def in_notebook() -> bool:
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


# ---- what stands in its own place in a cell, also from a process that the cell shows
def show_image(image: Any, slot: str | None = None, again: bool = False) -> None:
    """Show a Pillow image below a notebook's cell, from its own process or from one for it; elsewhere do nothing.

    With a `slot`, an identifier, the image is drawn sharply, and with `again` in the place of the one before.
    """
    if for_a_cell():
        with NamedTemporaryFile(dir=os.environ[CELL], suffix=".png", delete=False) as file:
            image.save(file, format="png")
        _send(image=file.name, slot=slot, again=again)
    elif in_notebook():
        _display(image, slot, again)


def _show_text(text: str, slot: str, again: bool) -> None:
    if for_a_cell():
        _send(text=text, slot=slot, again=again)
        return
    from IPython.display import display

    display({"text/plain": text}, raw=True, display_id=slot, update=again)


def _send(**values: Any) -> None:
    """Hand plain values to the cell that shows this process's output."""
    print(_RECORD + json.dumps(values), flush=True)


def _display(image: Any, slot: str | None, again: bool) -> None:
    from IPython.display import Image, display

    buffer = BytesIO()
    if slot is not None:
        image.save(buffer, format="png", optimize=True)  # lines and letters, small as PNG
    data, form = (buffer.getvalue(), "png") if slot is not None else (small_jpeg(image), "jpeg")
    display(Image(data=data, format=form), display_id=slot, update=again)


def small_jpeg(image: Any) -> bytes:
    """Return a Pillow image as JPEG of no more than `JPEG_BYTES`: first with less quality, then with fewer pixels."""
    while True:
        for quality in (90, 80, 65):
            buffer = BytesIO()
            image.save(buffer, format="jpeg", quality=quality)
            if buffer.tell() <= JPEG_BYTES:
                return buffer.getvalue()
        image = image.resize([max(1, side * 3 // 4) for side in image.size], resample=4)  # a pixel's mean (BOX)


def show_record(line: str, show: Callable[[Any], None] | None = None) -> bool:
    """Show what such a process sent, a text or an image; return False for a line that is neither."""
    if not line.startswith(_RECORD):
        return False
    values = json.loads(line[len(_RECORD) :])
    if "text" in values:
        _show_text(**values)
        return True
    import numpy as np
    from PIL import Image

    with Image.open(path := values.pop("image")) as file:
        image = file.convert("RGB")
    Path(path).unlink()
    if show is None or values["slot"] is not None:
        _display(image, **values)
    else:
        import torch

        show(torch.from_numpy(np.array(image)).permute(2, 0, 1))  # (3, H, W)
    return True


def bars_into_cell() -> None:
    """Let all bars of tqdm that are imported from now on be text in a cell, that of this process or one it is for.

    The text is renewed in its place. Widgets would be dead in a saved notebook, and a stream would keep every state.
    """
    if not for_a_cell() and not in_notebook():
        return
    import tqdm.auto
    from tqdm.std import tqdm as plain

    class CellBar(plain):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            self._slot, self._shown = uuid4().hex, False
            named |= {"file": StringIO(), "mininterval": 0.5, "dynamic_ncols": False}
            super().__init__(*arguments, **named | {"disable": bool(named.get("disable"))})

        def display(self, msg: str | None = None, pos: int | None = None) -> bool:
            _show_text(str(self) if msg is None else msg, self._slot, self._shown)
            self._shown = True
            return True

    tqdm.auto.tqdm = CellBar


def log(line: str) -> None:
    """Print a line at once, and once: of several processes only the first speaks."""
    if is_rank_zero():
        was_read = getattr(sys.stdout, "is_read", None)
        print(line, flush=True)
        if was_read and not sys.stdout.is_read:
            print("The reader of the output has gone: it goes on without", file=sys.stderr, flush=True)
