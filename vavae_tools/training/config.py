"""When checkpoints are written, and when a session ends: the same knobs and flags for every training."""

import argparse
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from vavae_tools.runtime.errors import UserError

KAGGLE_HOURS = 12.0
"""A session with a GPU."""
RESERVE_MINUTES = 15.0
"""Of Kaggle's time, for the cells after training."""


def _knob(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True)
class Saving:
    """When checkpoints are written, and when training ends before its length."""

    save_every_minutes: float = _knob(5.0, "between two of last.ckpt")
    save_every_n_steps: int = _knob(0, "optimiser steps between two folders checkpoint-STEP/; 0 for none")
    save_every_n_epochs: int = _knob(0, "epochs between two folders checkpoint-epoch-N/; 0 for none")
    keep_best: int = _knob(1, "of best-*.ckpt, how many stay")
    keep_last: int = _knob(3, "of the folders, how many stay")
    single_files: bool = _knob(False, "in place of folders write files, checkpoint_STEP.pth and checkpoint_epoch_N.pth")
    max_time: str | None = _knob(None, "hours:minutes until it saves and ends; on Kaggle the session's own, 0 for none")
    allow_changes: bool = _knob(False, "go on from a checkpoint though settings or data are others than its own")

    def until(self) -> float | None:
        """`time.time()` at which training has to be over."""
        return session_end(self.max_time)


def saving_knobs(callbacks: Mapping[str, Any]) -> dict[str, Any]:
    """Those of an experiment's `callbacks` that are `Saving`'s."""
    return {knob.name: callbacks[knob.name] for knob in fields(Saving) if knob.name in callbacks}


def add_saving_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each of `Saving`'s fields."""
    group = parser.add_argument_group("checkpoints and time")
    for knob in fields(Saving):
        kind = {"action": "store_true"} if knob.type is bool else {"type": str if knob.default is None else knob.type}
        group.add_argument(f"--{knob.name}", default=knob.default, help=knob.metadata["help"], **kind)


def saving_of(options: dict[str, object]) -> Saving:
    """Take `Saving`'s fields out of parsed options."""
    return Saving(**{knob.name: options.pop(knob.name) for knob in fields(Saving)})


def session_end(
    max_time: str | None, kaggle: Path = Path("/kaggle/working"), began: Path = Path("/proc/1")
) -> float | None:
    """`time.time()` at which training has to be over; None where nothing limits it.

    Args:
        max_time: "11:30", hours and minutes from now; "0" for no limit; None takes Kaggle's where we are there.
        kaggle: a folder that only exists there.
        began: a file that is as old as the session.

    Raises:
        UserError: a time that cannot be read.

    >>> session_end("0:00") is None, session_end(None, Path("/nowhere")) is None
    (True, True)
    """
    if max_time is None:
        if not kaggle.is_dir() or not began.exists():
            return None
        return began.stat().st_ctime + KAGGLE_HOURS * 3600 - RESERVE_MINUTES * 60
    found = re.fullmatch(r"(\d+)(?::([0-5]\d))?(?::([0-5]\d))?", max_time.strip())
    if not found:
        raise UserError(f"--max_time {max_time!r}: expected hours:minutes, such as 11:30")
    hours, minutes, seconds = (int(part or 0) for part in found.groups())
    seconds += hours * 3600 + minutes * 60
    return time.time() + seconds if seconds else None
