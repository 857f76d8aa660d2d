"""One process for each device: those that share out a list of work, started here or by torchrun, and who is first.

They need no collectives: a store with a few keys says what there is to do and how much is done.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache
from tempfile import TemporaryFile
from typing import IO, Any

from vavae_tools.errors import UserError

_PARENT = "VAVAE_STDIN_IS_THE_PARENT"
_LONG = timedelta(days=7)


@dataclass
class Ranks:
    """This process's place among those that work together; without arguments, the only one."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """place among those of this machine, and so the number of its device"""
    store: Any = None
    counts: dict[str, int] = field(default_factory=dict)
    """of the only one, in a store's place"""

    @classmethod
    def from_environment(cls) -> "Ranks":
        """As torchrun or `run_ranks` started this process; alone if neither did."""
        if os.environ.get(_PARENT):
            threading.Thread(target=_end_with_parent, daemon=True).start()
        size = int(os.environ.get("WORLD_SIZE", 1))
        if size == 1:
            return cls()
        from torch.distributed import rendezvous

        store, rank, size = next(rendezvous("env://", timeout=_LONG))
        return cls(rank, size, int(os.environ.get("LOCAL_RANK", rank)), store)

    def share(self, name: str, value: Any = None) -> Any:
        """What the first process gives under this name, plain values, to all of them; the others wait for it."""
        if self.store is None:
            return value
        if self.rank == 0:
            self.store.set(name, json.dumps(value))
            return value
        return json.loads(self.store.get(name))

    def add(self, name: str, count: int) -> int:
        """Add to a count that all share → the sum so far; adding 0 reads it."""
        if self.store is None:
            self.counts[name] = self.counts.get(name, 0) + count
            return self.counts[name]
        return self.store.add(name, count)


def is_first() -> bool:
    """Whether this process is the first of a training, or the only one: it speaks, and writes what all share."""
    return int(os.environ.get("RANK", os.environ.get("LOCAL_RANK", 0))) == 0


@cache
def of_torchrun() -> Ranks:
    """This process's place where torchrun started the training; alone elsewhere.

    Lightning starts further processes once the first one has come to training: by then there is nothing to agree on.
    """
    return Ranks.from_environment() if "TORCHELASTIC_RUN_ID" in os.environ else Ranks()


@contextmanager
def first_alone(name: str) -> Iterator[None]:
    """The first process goes through this block alone; the others wait, and then find what it has made."""
    ranks = of_torchrun()
    if ranks.rank:
        ranks.share(f"vavae {name}")
    yield
    if not ranks.rank:
        ranks.share(f"vavae {name}", True)


def _end_with_parent() -> None:
    while os.read(0, 1):  # not sys.stdin, whose lock would be held at exit
        pass
    os._exit(1)


def run_ranks(count: int, command: Sequence[str]) -> None:
    """Run a command in `count` processes on this machine, each with its rank in the environment, to their end.

    The first one speaks. When one fails the others are ended; when this process ends, however, all of them do.

    Raises:
        UserError: what the first process to fail said.
        SystemExit: with the status of that process, where it has said itself what was wrong.
    """
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_LONG)
    threads = str(max(1, (os.cpu_count() or 1) // count))
    environment = {
        "OMP_NUM_THREADS": threads,
        **os.environ,
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is this process's, which outlives them
        _PARENT: "1",
    }
    with ExitStack() as stack:
        logs = [None, *(stack.enter_context(TemporaryFile("w+")) for _ in range(1, count))]
        processes: list[subprocess.Popen] = []
        stack.callback(_end_all, processes)
        for rank, log in enumerate(logs):
            processes.append(
                subprocess.Popen(
                    command,
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdin=subprocess.PIPE,  # it closes with this process, by which the other one knows
                    stdout=None if rank == 0 else log,
                    stderr=log,
                    start_new_session=True,  # Ctrl-C reaches this process alone, which ends them
                )
            )
        while (failed := _first_failure(processes)) is None:
            if all(process.returncode == 0 for process in processes):
                return
            time.sleep(0.05)
        _end_all(processes)
        failed = failed if processes[0].returncode in (0, -signal.SIGTERM) else 0  # which has spoken
        _say_why(failed, processes[failed].returncode, logs[failed], count)


def _first_failure(processes: list[subprocess.Popen]) -> int | None:
    return next((rank for rank, process in enumerate(processes) if process.poll()), None)


def _end_all(processes: list[subprocess.Popen]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _say_why(rank: int, status: int, log: IO[str] | None, count: int) -> None:
    said = ""
    if log is not None:
        log.seek(0)
        said = log.read().strip()
    if status < 0:
        raise UserError(
            f"Process {rank + 1} of {count} was ended by signal {-status} (9 mostly means too little memory): what is "
            "finished is kept. Run it again, with a smaller --batch_size or fewer --devices"
        )
    errors = [line.removeprefix("error: ") for line in said.splitlines() if line.startswith("error: ")]
    if status == 2 and errors:
        raise UserError(f"{errors[-1]} (process {rank + 1} of {count})")
    if said:
        print(said, file=sys.stderr)
    sys.exit(status)
