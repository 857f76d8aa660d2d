"""Start a process for each device, from a command or a notebook's cell, and stay with them to their end.

They find torchrun's environment. torchrun itself has no way into a notebook's cell, and gives 30 seconds to all
processes: too long for those that hang because another one died, perhaps too short for saving a checkpoint on Ctrl-C.
"""

import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from traceback import format_exc
from typing import IO, Any

from vavae_tools.runtime.console import CELL, bars_into_cell, in_notebook, prepare_streams, show_record
from vavae_tools.runtime.errors import Stopped, UserError, disk_faults
from vavae_tools.runtime.ranks import PARENT, end_with_parent, is_rank_zero, started_already

GRACE = 8.0
"""Seconds until a process is killed that does not end after another one has failed."""
DRAWN_ALONG = (signal.SIGTERM, signal.SIGABRT)
"""Signals that end a process because another one has failed: ours, and torch's where a connection is lost."""
NCCL_SEGMENTS = 40_000_000
"""Bytes of shared memory that NCCL takes for a process: of 9.6 MB one to send and one to receive, on two channels."""


def several_processes(
    accelerator: str = "auto", devices: int | str = "auto", num_nodes: int = 1, **others: Any
) -> int | None:
    """Return how many processes to start here; None: this one is enough, or is one of several.

    Takes the arguments of `devices.trainer_settings`, which refuses what this machine cannot do.
    """
    if started_already() or num_nodes != 1:
        return None
    from vavae_tools.runtime.machine import find_machine

    if devices == "auto":
        devices = find_machine().devices if accelerator != "cpu" else 1
    return int(devices) if str(devices).isdecimal() and int(devices) > 1 else None


def call_on_ranks(
    function: str, arguments: dict[str, Any], count: int, show: Callable[[Any], None] | None = None
) -> Any:
    """Call "module:function" with these arguments in `count` processes; return what it returns in the first one.

    The first one's lines, progress bars and images appear here, also in a notebook's cell; `show` is called with each
    image, uint8 (3, H, W), in place of showing it. Ctrl-C, the stop button and SIGTERM are passed on and waited for, as
    training saves; the second time all are ended at once. When one fails the others are ended within seconds.

    Raises:
        UserError: what the first process to fail raised.
        SystemExit: with the status of that process; its traceback has been printed.
        KeyboardInterrupt: they were stopped, and had nothing to save.
    """
    import cloudpickle
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(days=7))
    with TemporaryDirectory() as name:
        folder = Path(name)
        task = {"function": function, "arguments": arguments, "argv": sys.argv}
        (folder / "task").write_bytes(cloudpickle.dumps(task))
        in_cell = in_notebook()
        environment = {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
            **_without_shared_memory(count),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(Path(entry).absolute()) for entry in sys.path),  # a notebook's own too
            **dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(count)),
            **{"GROUP_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), PARENT: "1"},
            **{"TORCHELASTIC_RUN_ID": "vavae_tools", "TORCHELASTIC_RESTART_COUNT": "0"},
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is this process's, which outlives them
            **({CELL: name} if in_cell else {}),
        }
        ranks: list[Rank] = []
        try:
            for number in range(count):
                ranks.append(Rank(number, folder, environment, in_cell))
            cell = Cell(ranks[0].process.stdout, show) if in_cell else None
            with _passing_on_sigterm(ranks):
                stopped = _wait(ranks, cell)
            failed = [rank for rank in ranks if rank.process.poll()]
        finally:
            _end_all(ranks)
        if cell is not None:
            cell.update(ended=True)
        if failed:
            _raise_fault(failed, ranks, stopped, cell)
        result = folder / "result"
        return pickle.loads(result.read_bytes()) if result.exists() else None  # our own process's


class Rank:
    """One of the processes, and what it leaves behind."""

    def __init__(self, number: int, folder: Path, environment: dict[str, str], in_cell: bool) -> None:
        self.number, self.fault_file, self.log_file = number, folder / f"fault-{number}", folder / f"log-{number}"
        with self.log_file.open("wb") as log:  # only the first one's lines are shown
            output: Any = log if number else subprocess.PIPE if in_cell else None
            self.process = subprocess.Popen(
                [sys.executable, "-u", "-m", "vavae_tools.runtime.launch", str(folder)],
                env={**environment, "RANK": str(number), "LOCAL_RANK": str(number)},
                stdin=subprocess.PIPE,  # it closes with this process, by which the other one knows
                stdout=output,
                stderr=subprocess.STDOUT if output else None,
                start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
            )

    @property
    def fault(self) -> dict[str, Any] | None:
        """What it raised, as `main` wrote it."""
        try:
            return json.loads(self.fault_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None


class Cell:
    """The first process's output in a notebook's cell, as it comes: lines, progress bars, images."""

    def __init__(self, output: IO[bytes], show: Callable[[Any], None] | None) -> None:
        os.set_blocking(output.fileno(), False)
        self.show, self.last = show, deque(maxlen=50)
        self._output, self._unread = output, b""

    def update(self, ended: bool = False) -> None:
        self._unread += self._output.read() or b""
        while b"\n" in self._unread or (ended and self._unread):
            line, _, self._unread = self._unread.partition(b"\n")
            text = line.decode(errors="replace")
            if not show_record(text, self.show):
                self.last.append(text.rstrip())
                print(text, flush=True)


def _without_shared_memory(count: int, folder: str = "/dev/shm") -> dict[str, str]:
    """Return what NCCL is told where shared memory has no room for its segments: else it fails at the first step."""
    from vavae_tools.runtime.machine import find_machine

    if count == 1 or "NCCL_SHM_DISABLE" in os.environ or find_machine().kind == "cpu" or not Path(folder).is_dir():
        return {}
    free, needed = shutil.disk_usage(folder).free, count * NCCL_SEGMENTS
    if free >= needed:
        return {}
    found = f"{folder} has {free / 1e6:.0f} MB free, of which NCCL may need {needed / 1e6:.0f}"
    slower = "which is slower between cards without NVLink; docker run --shm-size=1g gives it room"
    print(f"{found}: it does without it (NCCL_SHM_DISABLE=1), {slower}", flush=True)
    return {"NCCL_SHM_DISABLE": "1"}


def _wait(ranks: Sequence[Rank], cell: Cell | None) -> bool:
    """Wait until all have ended or one has failed; return whether they were asked to stop."""
    stopped = False
    while True:
        try:
            while None in (states := [rank.process.poll() for rank in ranks]) and not any(states):
                if cell is not None:
                    cell.update()
                time.sleep(0.05)
            return stopped
        except KeyboardInterrupt:
            if stopped:
                raise
            stopped = True
            print("stopping; once more to stop at once", file=sys.stderr, flush=True)
            for rank in ranks:
                rank.process.send_signal(signal.SIGINT)


def _end_all(ranks: Sequence[Rank]) -> None:
    running = [rank.process for rank in ranks if rank.process.poll() is None]
    for process in running:
        process.terminate()
    until = time.monotonic() + GRACE
    for process in running:
        try:
            process.wait(max(0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # those that load its data, too
            process.wait()


@contextmanager
def _passing_on_sigterm(ranks: Sequence[Rank]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(signal.SIGTERM, lambda *_: [rank.process.terminate() for rank in ranks])
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, former)


def _raise_fault(failed: Sequence[Rank], ranks: Sequence[Rank], stopped: bool, cell: Cell | None) -> None:
    """Raise what the first one raised: one that was killed, or else the first of all by its clock."""
    # these two signals follow from another one's fault, whose process may have ended after them
    killed = [rank for rank in failed if rank.process.returncode < 0 and -rank.process.returncode not in DRAWN_ALONG]
    first = min(killed or [*failed, *ranks], key=lambda rank: rank.fault["at"] if rank.fault else math.inf)
    status, fault, who = first.process.returncode, first.fault, f"process {first.number + 1} of {len(ranks)}"
    if stopped and status in (130, -signal.SIGINT, -signal.SIGTERM):
        raise KeyboardInterrupt
    if fault and fault["user"]:
        raise UserError(fault["message"] + (f" ({who})" if first.number else ""))
    if status < 0 and not fault:
        memory = " (mostly too little memory)", ", with a smaller --batch_size or fewer --devices"
        reason, change = memory if status == -signal.SIGKILL else ("", "")
        raise UserError(
            f"{who.capitalize()} was ended by signal {-status}{reason}: run it again{change}. What is finished is kept"
        )
    text = (fault["traceback"] if fault else first.log_file.read_text(errors="replace")).rstrip()
    if cell is None:
        if text:
            print(f"{text}\n({who})" if fault else text, file=sys.stderr)
        sys.exit(max(1, status))
    lines = (text.splitlines() or list(cell.last))[-8:]
    message = fault["message"] if fault else f"status {status}"
    raise UserError("\n".join([f"{who.capitalize()} failed: {message}. Its last lines:", *lines]))


def main() -> None:
    """Be one of the processes of `call_on_ranks`: what is raised here, that one says."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell's background job makes its children ignore
    end_with_parent()
    prepare_streams()
    bars_into_cell()
    folder, rank = Path(sys.argv[1]), os.environ["RANK"]
    task = pickle.loads((folder / "task").read_bytes())  # written by that process
    sys.argv = task["argv"]
    module, name = task["function"].split(":")
    try:
        with disk_faults():
            made = getattr(import_module(module), name)(**task["arguments"])
        if is_rank_zero():
            (folder / "result").write_bytes(pickle.dumps(made))
    except Stopped as stop:
        if is_rank_zero():
            print(stop)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        user = isinstance(error, UserError)
        message = str(error) if user else f"{type(error).__name__}: {error}"
        fault = {"user": user, "message": message, "traceback": format_exc(), "at": time.time()}
        (folder / f"fault-{rank}").write_text(json.dumps(fault), encoding="utf-8")
        sys.exit(2 if user else 1)


if __name__ == "__main__":
    main()
