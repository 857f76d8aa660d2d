"""How many processes load pictures beside a training, by the cores and the shared memory there are for them."""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from vavae_tools.errors import UserError

MOST_WORKERS = 4
"""Loading processes per training process: four cores decode and crop some 1,100 pictures of 500×375 a second, which is
more than a step of the models here takes from one GPU, and each process costs some hundred megabytes of memory."""
PREFETCH = 2
"""Batches that each of them has ready, as torch's DataLoader has it."""
SHARED_MEMORY = Path("/dev/shm")
"""Through it batches come from one process to another."""
_SHARE = 0.5  # of what is free there: validation has loading processes of its own while those of training wait
_CGROUP = Path("/sys/fs/cgroup")
_KILLED = re.compile(r"DataLoader worker .*(is killed by signal: ([\w ]+)|exited unexpectedly)")
_NO_ROOM = re.compile(r"Bus error|unable to [\w ]*(shared memory|file </torch_).*No space left", re.DOTALL)


def loading_workers(batch_bytes: int) -> tuple[int, str]:
    """How many processes should load batches of this size for this process, where the data do not stand in memory.

    The cores that this process may use are shared by the processes of this machine (LOCAL_WORLD_SIZE), at most
    `MOST_WORKERS` for each; the batches that they have ready fit into half of the free shared memory.

    Returns:
        The number, and a line that says why where shared memory makes it smaller; else an empty one.
    """
    workers = min(MOST_WORKERS, usable_cores() // ranks_here())
    free = free_shared_memory()
    if free is None:
        return workers, ""
    fitting = int(free * _SHARE / ranks_here() // max(1, PREFETCH * batch_bytes))
    if fitting >= workers:
        return workers, ""
    how_many = f"{fitting} of {workers} loading processes" if fitting else "no loading processes"
    return fitting, (
        f"{SHARED_MEMORY} has {_megabytes(free)} free, and batches of {_megabytes(batch_bytes)} pass through it: "
        f"{how_many} for each device. More with docker run --shm-size=8g, a smaller batch_size, or num_workers=N"
    )


def _megabytes(count: int) -> str:
    return f"{count / 2**20:,.0f} MB" if count >= 2**20 else f"{count / 2**20:.2f} MB"


def ranks_here() -> int:
    """How many processes of this training share this machine; 1 where no launcher says it (LOCAL_WORLD_SIZE)."""
    with suppress(ValueError):
        return max(1, int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    return 1


def usable_cores() -> int:
    """The cores this process may use: not those a container's quota or an affinity leaves to others."""
    try:
        cores = len(os.sched_getaffinity(0))
    except AttributeError:  # only Linux has it
        cores = os.cpu_count() or 1
    quota = _cpu_quota()
    return cores if quota is None else min(cores, max(1, int(quota)))


def _cpu_quota() -> float | None:
    """Cores' worth of time that a container has, of either version of control groups; None without a limit."""
    with suppress(OSError, ValueError):
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    with suppress(OSError, ValueError, ZeroDivisionError):
        quota, period = (int((_CGROUP / "cpu" / f"cpu.cfs_{name}_us").read_text()) for name in ("quota", "period"))
        return quota / period if quota > 0 else None
    return None


def free_shared_memory() -> int | None:
    """Bytes free in /dev/shm; None where there is no such place, and so no limit that can be seen."""
    with suppress(OSError):
        return shutil.disk_usage(SHARED_MEMORY).free
    return None


@contextmanager
def loader_faults() -> Iterator[None]:
    """Say in one line what became of a DataLoader's processes: for the block that takes batches from it.

    Raises:
        UserError: in place of torch's RuntimeError where one was killed, or of what it wraps around a UserError.
    """
    try:
        yield
    except UserError as error:  # raised in a loading process: torch puts that one's traceback before the message
        text = str(error)
        if text.startswith("Caught UserError in DataLoader worker"):
            raise UserError(text.rpartition("UserError: ")[2].strip()) from None
        raise
    except RuntimeError as error:
        line = worker_fault(error)
        if line is None:
            raise
        raise UserError(line) from None


def worker_fault(error: BaseException) -> str | None:
    """The line to say for a loading process that was killed or found no shared memory; None for another error."""
    text = " ".join(str(link) for link in (error, error.__cause__, error.__context__) if link is not None)
    if _NO_ROOM.search(text):
        free = free_shared_memory()
        room = "" if free is None else f" ({_megabytes(free)} free now)"
        return (
            f"A loading process ended because {SHARED_MEMORY} is full{room}, through which its batches come: set "
            "num_workers=0, take a smaller batch_size, or start the container with --shm-size=8g"
        )
    match = _KILLED.search(text)
    if match is None:
        return None
    how = f"was ended by signal {match[2]}" if match[2] else "ended unexpectedly"
    return f"A loading process {how}, mostly because memory ran out: set num_workers=0 or a smaller number"
