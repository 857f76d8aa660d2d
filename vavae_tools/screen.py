"""Whether there is a screen, and what stands on it the same everywhere."""

import sys


def in_notebook() -> bool:
    """Whether this code runs in a notebook's kernel, and not merely beside one."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return getattr(shell, "kernel", None) is not None


def someone_looks() -> bool:
    """Whether a bar that moves has a reader: a screen or a notebook, not a file."""
    return sys.stderr.isatty() or in_notebook()


def clock(seconds: float) -> str:
    """
    >>> clock(3725)
    '1:02:05'
    """
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
