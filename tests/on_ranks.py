"""What tests let several processes do (`launch.call_on_ranks`), and how they look at them."""

import atexit
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import torch
from forked import fork_of

PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK")


def place(folder: str, what: Any = None) -> tuple[list[str], Any, list[str]]:
    """Where this process stands, what `what` makes, and the command line that it knows of."""
    mine = [os.environ[name] for name in PLACE]
    (Path(folder) / os.environ["RANK"]).write_text(" ".join(mine))
    return mine, what and what(), sys.argv


def fail(rank: int, how: str) -> None:
    """One process fails; the others would sleep for ten minutes, or are drawn along and end before it does."""
    from vavae_tools.runtime.errors import UserError

    if os.environ["RANK"] != str(rank):
        time.sleep(2 if how in ("raise", "abort") else 600)
        if how == "abort":
            os.abort()
        raise ConnectionError("closed by the other one")
    if how in ("raise", "abort"):
        atexit.register(time.sleep, 600)
        how = "fault"
    if how == "user":
        raise UserError("no space")
    if how == "fault":
        raise LookupError("a fault of ours")
    if how == "signal":
        os.kill(os.getpid(), signal.SIGKILL)
    print("gone without a word", file=sys.stderr)
    sys.exit(3)


def sleep(folder: str) -> None:
    (Path(folder) / str(os.getpid())).write_text("")
    time.sleep(600)


def tell(folder: str) -> str:
    """Lines, a bar and an image, as trainings have them."""
    from tqdm.auto import tqdm

    from vavae_tools.plots import show_inline

    print(f"a line of process {os.environ['RANK']}")
    for _ in tqdm(range(3), desc="counting", unit="thing"):
        pass
    if os.environ["RANK"] == "0":
        show_inline(torch.arange(12, dtype=torch.uint8).reshape(3, 2, 2))
    return folder


def children(pid: int) -> list[int]:
    pid = fork_of(pid)
    return [fork_of(int(child)) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def gone(pids: list[int], seconds: float = 30) -> bool:
    """Whether all of them end within so many seconds."""
    deadline = time.monotonic() + seconds
    while any(map(alive, pids)):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
