"""A process's place among those that work together, one for each device, and what they share: a store of a few keys."""

import json
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any

PARENT = "VAVAE_STDIN_IS_THE_PARENT"
"""Environment variable of the processes that `launch` starts."""


@dataclass
class Ranks:
    """This process's place among those that work together; without arguments, the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0  # its place on this machine, and its device's number
    store: Any = None
    counts: dict[str, int] = field(default_factory=dict)  # stand in for a store where it is alone

    @classmethod
    def from_environment(cls) -> "Ranks":
        """Return the place that torchrun or `launch` gave this process."""
        end_with_parent()
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls()
        from torch.distributed import rendezvous

        store, rank, size = next(rendezvous("env://", timeout=timedelta(days=7)))
        return cls(rank, size, int(os.environ.get("LOCAL_RANK", rank)), store)

    def share(self, name: str, value: Any = None) -> Any:
        """Return to all what the first process gives under this name, plain values; the others wait for it."""
        if self.store is None:
            return value
        if self.rank == 0:
            self.store.set(name, json.dumps(value))
            return value
        return json.loads(self.store.get(name))

    def add(self, name: str, number: int) -> int:
        """Add to a count that all share, and return the sum so far."""
        if self.store is None:
            self.counts[name] = self.counts.get(name, 0) + number
            return self.counts[name]
        return self.store.add(name, number)


def is_rank_zero() -> bool:
    """Return whether this process is the first of a training, or the only one."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0


def started_already() -> bool:
    """Return whether torchrun or `launch` started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


@cache
def current_ranks() -> Ranks:
    """Return this process's place where torchrun or `launch` started it; elsewhere it is the only one."""
    return Ranks.from_environment() if started_already() else Ranks()


_TURNS = count(1)  # all processes pass the same blocks; the store keeps what was said in former ones


@contextmanager
def rank_zero_first(name: str) -> Iterator[None]:
    """Let the first process go through this block before the others."""
    ranks = current_ranks()
    turn = f"vavae {name} {next(_TURNS)}"
    if ranks.rank:
        ranks.share(turn)
    yield
    if not ranks.rank:
        ranks.share(turn, True)


PATIENCE = 60.0
"""Seconds until a process that failed gives up those that wait for it."""


@contextmanager
def failing_together(what: str) -> Iterator[None]:
    """Let an error of this block pass where all processes get through it, and else, as they wait for this one, end."""
    from vavae_tools.runtime.errors import StoppedAtOnce, one_line  # which imports this module

    ranks = current_ranks()
    turn = f"vavae {what} {next(_TURNS)}"
    try:
        yield
    except Exception as error:
        ended, until = ranks.add(turn, 1), time.monotonic() + PATIENCE
        while ended < ranks.size:
            if time.monotonic() > until:
                reason = f"{type(error).__name__}: {one_line(error)}"
                raise StoppedAtOnce(
                    f"{what} failed in process {ranks.rank + 1} alone ({reason}), for which the others wait: resume"
                    " from the last checkpoint, with train.previews=0"
                ) from error
            time.sleep(0.1)
            ended = ranks.add(turn, 0)
        raise
    ranks.add(turn, 1)


@cache
def end_with_parent() -> None:
    """Let this process end when the one that started it does, however that ends."""

    def wait() -> None:
        while os.read(0, 1):  # not sys.stdin, whose lock would be held at exit
            pass
        os._exit(1)

    if PARENT in os.environ:
        threading.Thread(target=wait, daemon=True).start()
