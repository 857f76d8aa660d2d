"""Start a process for each device, from a command or a notebook's cell, and stay with them to their end.

The processes find torchrun's environment, and so Lightning and torch.distributed treat them as torchrun's. Its agent is
not used here, since it gives 30 seconds to all: to those that hang because another one died, for whom that is too long,
and to those that save a checkpoint on Ctrl-C, for whom it may be too short; and it changes a kernel's signal handlers.
"""

import json
import os
import pickle
import queue
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from traceback import format_exc
from typing import IO, Any

from vavae_tools.runtime.console import CELL, in_notebook, show_record
from vavae_tools.runtime.errors import Stopped, UserError, disk_fault
from vavae_tools.runtime.ranks import PARENT, started_already

FAULT = "VAVAE_FAULT"
"""Environment variable: the file in which a process leaves what it raised, for the one that started it to say."""
GRACE = 8.0
"""Seconds until a process is killed that does not end after another one has failed."""
NCCL_SEGMENTS = 40_000_000
"""Bytes of shared memory that NCCL takes for a process: of 9.6 MB one to send and one to receive, on two channels."""
_LONG = timedelta(days=7)


@dataclass(frozen=True)
class Nodes:
    """The machines that work together, of which this is number `rank`."""

    count: int = 1
    rank: int = 0
    address: str = "127.0.0.1"
    port: int = 0
    """of the first one; 0: one that is free"""

    @classmethod
    def from_environment(cls, count: int = 1) -> "Nodes":
        """Where `count` machines meet: MASTER_ADDR, MASTER_PORT (29500) and NODE_RANK in the environment.

        Raises:
            UserError: it is not said.
        """
        if count == 1:
            return cls()
        address, rank = os.environ.get("MASTER_ADDR"), os.environ.get("NODE_RANK", os.environ.get("GROUP_RANK"))
        if not address or rank is None:
            raise UserError(f"--num_nodes {count}, but it is not said where they meet: set MASTER_ADDR and NODE_RANK")
        if not rank.isdigit() or int(rank) >= count:
            raise UserError(f"NODE_RANK={rank}, expected 0 to {count - 1} for --num_nodes {count}")
        return cls(count, int(rank), address, int(os.environ.get("MASTER_PORT", 29500)))


def several_processes(
    accelerator: str = "auto", devices: int | str = "auto", num_nodes: int = 1, **others: Any
) -> tuple[int, Nodes] | None:
    """How many processes to start on this machine, and its place among all; None: this one is enough, or one of them.

    Takes the arguments of `devices.trainer_settings`, which says what this machine cannot do.

    Raises:
        UserError: several machines, of which it is not said where they meet.
    """
    if started_already():
        return None
    from vavae_tools.runtime.machine import find_machine

    try:
        count = int(devices) if devices != "auto" else find_machine().devices if accelerator != "cpu" else 1
        machines = int(num_nodes)
    except (TypeError, ValueError):
        return None
    return (count, Nodes.from_environment(machines)) if count * machines > 1 else None


def call_on_ranks(
    function: str,
    arguments: dict[str, Any],
    count: int,
    nodes: Nodes | None = None,
    show: Callable[[Any], None] | None = None,
) -> Any:
    """Call "module:function" with these arguments in `count` processes; what it returns in this machine's first one.

    In a notebook the first one's lines, progress bars and pictures come into the cell.

    Args:
        arguments: whatever cloudpickle takes, what is defined in a cell too.
        show: called with each picture, uint8 (3, H, W), in place of showing it in the cell.

    Raises:
        UserError: a process failed: what it said.
    """
    import cloudpickle

    with TemporaryDirectory() as folder:
        task, result = Path(folder) / "task", Path(folder) / "result"
        sys_path = [str(Path(entry).absolute()) for entry in sys.path]  # a notebook's own too
        task.write_bytes(
            cloudpickle.dumps({"function": function, "arguments": arguments, "argv": sys.argv, "result": str(result)})
        )
        environment = {"PYTHONPATH": os.pathsep.join(sys_path)}
        run_ranks(
            count, [sys.executable, "-u", "-m", "vavae_tools.runtime.launch", str(task)], nodes, environment, show
        )
        return pickle.loads(result.read_bytes()) if result.exists() else None  # our own process's


def run_ranks(
    count: int,
    command: Sequence[str],
    nodes: Nodes | None = None,
    environment: dict[str, str] | None = None,
    show: Callable[[Any], None] | None = None,
) -> None:
    """Run a command in `count` processes on this machine, each with its rank in the environment, to their end.

    The first one speaks, in a notebook into the cell. Ctrl-C, a notebook's stop button and SIGTERM are passed on and
    waited for, as training saves; the second time all are ended at once. When one process fails the others are ended
    within seconds; when this process ends, however, all of them do.

    Raises:
        UserError: what the first process to fail said.
        SystemExit: with the status of that process, where it has said itself what was wrong.
        KeyboardInterrupt: they were stopped, and had nothing to bring to an end.
    """
    nodes = nodes or Nodes()
    in_cell = in_notebook()
    with ExitStack() as stack:
        store = _store(nodes)
        folder = Path(stack.enter_context(TemporaryDirectory()))
        shared = {
            "OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // count)),
            **_without_shared_memory(count),
            **os.environ,
            **(environment or {}),
            "WORLD_SIZE": str(count * nodes.count),
            "LOCAL_WORLD_SIZE": str(count),
            "GROUP_RANK": str(nodes.rank),
            "MASTER_ADDR": nodes.address,
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_RUN_ID": "vavae_tools",
            "TORCHELASTIC_RESTART_COUNT": "0",
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # the store is this process's, which outlives them
            PARENT: "1",
            **({CELL: str(folder)} if in_cell else {}),
        }
        ranks = [Rank(number, folder, in_cell) for number in range(count)]
        stack.callback(_end_all, ranks)
        for rank in ranks:
            rank.start(command, {**shared, "RANK": str(nodes.rank * count + rank.number)})
        screen = _Cell(ranks[0].process.stdout, show) if in_cell else None
        with _passed_on(signal.SIGTERM, ranks):
            stopped = _wait(ranks, store, nodes, screen)
        failed = _first_to_fail(ranks)
        if failed is None:
            return
        with suppress(RuntimeError, OSError):  # the store may be gone with its machine
            store.set("vavae failed", f"{failed.number + nodes.rank * count + 1} of {count * nodes.count}")
        _end_all(ranks)
        if screen is not None:
            screen.update(to_the_end=True)
        if failed.process.returncode > 0:  # the one that drew the others along may have ended after them
            failed = min([failed, *ranks], key=lambda rank: rank.failed_at)
        if stopped and failed.process.returncode in (130, -signal.SIGINT, -signal.SIGTERM):
            raise KeyboardInterrupt
        _say_why(failed, count * nodes.count, nodes.rank * count, screen)


class Rank:
    """One process of this machine, and what it leaves behind."""

    def __init__(self, number: int, folder: Path, in_cell: bool) -> None:
        self.number, self.in_cell = number, in_cell
        self.fault_file = folder / f"fault-{number}.json"
        self.log: IO[str] | None = None

    def start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        speaks = self.number == 0
        self.log = None if speaks else TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            command,
            env={**environment, "LOCAL_RANK": str(self.number), FAULT: str(self.fault_file)},
            stdin=subprocess.PIPE,  # it closes with this process, by which the other one knows
            stdout=(subprocess.PIPE if self.in_cell else None) if speaks else self.log,
            stderr=(subprocess.STDOUT if self.in_cell else None) if speaks else self.log,
            start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on
        )

    def send(self, number: int) -> None:
        with suppress(ProcessLookupError):
            self.process.send_signal(number)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)  # those that load its data, too
        self.process.wait()

    def said(self) -> str:
        if self.log is None:
            return ""
        self.log.seek(0)
        return self.log.read().strip()

    def fault(self) -> dict[str, Any] | None:
        """What it raised, as `_keep_fault` wrote it."""
        try:
            return json.loads(self.fault_file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None

    @property
    def failed_at(self) -> float:
        """When it raised; later than all where it did not."""
        fault = self.fault()
        return fault["at"] if fault else float("inf")


def _without_shared_memory(count: int, folder: str = "/dev/shm") -> dict[str, str]:
    """What NCCL is told where shared memory has no room for its segments: else it ends all at the first gradient."""
    from vavae_tools.runtime.machine import find_machine

    if count == 1 or "NCCL_SHM_DISABLE" in os.environ or find_machine().kind == "cpu" or not Path(folder).is_dir():
        return {}
    free, needed = shutil.disk_usage(folder).free, count * NCCL_SEGMENTS
    if free >= needed:
        return {}
    print(
        f"{folder} has {free / 1e6:.0f} MB free, of which NCCL may need {needed / 1e6:.0f}: it does without it "
        "(NCCL_SHM_DISABLE=1), which is slower between cards without NVLink; docker run --shm-size=1g gives it room",
        flush=True,
    )
    return {"NCCL_SHM_DISABLE": "1"}


def _store(nodes: Nodes) -> Any:
    from torch.distributed import TCPStore

    if nodes.rank:
        return TCPStore(nodes.address, nodes.port, is_master=False, timeout=timedelta(minutes=15))
    if nodes.count > 1:
        _check_free(nodes.port)
    return TCPStore(nodes.address, nodes.port, is_master=True, wait_for_workers=False, timeout=_LONG)


def _check_free(port: int) -> None:
    """Ask the system, as TCPStore would say it in many lines."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            raise UserError(
                f"Port {port} is in use on this machine: set MASTER_PORT to another one, the same on all machines"
            ) from None


def _wait(ranks: list[Rank], store: Any, nodes: Nodes, screen: "_Cell | None") -> bool:
    """Until all have ended or one has failed; whether they were asked to stop."""
    stopped, looked = False, time.monotonic()
    while True:
        try:
            while any(rank.process.poll() is None for rank in ranks) and not _any_failed(ranks):
                if nodes.count > 1 and time.monotonic() - looked > 1:
                    looked = time.monotonic()
                    _look_elsewhere(store)
                if screen is not None:
                    screen.update()
                time.sleep(0.05)
            if screen is not None and not _any_failed(ranks):
                screen.update(to_the_end=True)
            if nodes.count > 1 and not _any_failed(ranks):
                _wait_for_others(store, nodes)
            return stopped
        except KeyboardInterrupt:
            if stopped:
                raise
            stopped = True
            print("stopping; once more to stop at once", file=sys.stderr, flush=True)
            for rank in ranks:
                rank.send(signal.SIGINT)


def _any_failed(ranks: list[Rank]) -> bool:
    return any(rank.process.poll() for rank in ranks)


def _first_to_fail(ranks: list[Rank]) -> Rank | None:
    """One that failed, and rather one that a signal ended: what the others raise then follows from it."""
    failed = [rank for rank in ranks if rank.process.poll()]
    return min(failed, key=lambda rank: (rank.process.returncode > 0, rank.failed_at), default=None)


def _look_elsewhere(store: Any) -> None:
    """
    Raises:
        UserError: a process of another machine has failed.
    """
    try:
        if not store.check(["vavae failed"]):
            return
        who = store.get("vavae failed").decode()
    except (RuntimeError, OSError):
        raise UserError("The first machine is gone, so this one stops; its last checkpoint is whole") from None
    raise UserError(f"Process {who} has failed on another machine: see there what it said")


def _wait_for_others(store: Any, nodes: Nodes) -> None:
    """The first machine's store has to outlive the others' processes."""
    store.add("vavae ended", 1)
    while nodes.rank == 0 and store.add("vavae ended", 0) < nodes.count and not store.check(["vavae failed"]):
        time.sleep(0.05)


def _end_all(ranks: list[Rank]) -> None:
    running = [rank for rank in ranks if hasattr(rank, "process") and rank.process.poll() is None]
    for rank in running:
        rank.send(signal.SIGTERM)
    until = time.monotonic() + GRACE
    for rank in running:
        try:
            rank.process.wait(max(0, until - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()


@contextmanager
def _passed_on(number: int, ranks: list[Rank]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = signal.signal(number, lambda *_: [rank.send(number) for rank in ranks])
    try:
        yield
    finally:
        signal.signal(number, former)


def _say_why(rank: Rank, world: int, before: int, screen: "_Cell | None") -> None:
    status, who, fault = rank.process.returncode, f"process {before + rank.number + 1} of {world}", rank.fault()
    if fault and fault["user"]:
        raise UserError(fault["message"] + (f" ({who})" if before + rank.number else ""))
    if status < 0:
        raise UserError(
            f"{who.capitalize()} was ended by signal {-status} (9 mostly means too little memory): what is "
            "finished is kept. Run it again, with a smaller --batch_size or fewer --devices"
        )
    said = (fault["traceback"] if fault else rank.said()).rstrip()
    if screen is None:
        if said:
            print(f"{said}\n({who})" if fault else said, file=sys.stderr)
        sys.exit(status)
    lines = said.splitlines()[-8:] if said else list(screen.last)[-8:]
    message = fault["message"] if fault else f"status {status}"
    raise UserError("\n".join([f"{who.capitalize()} failed: {message}. Its last lines:", *lines]))


class _Cell:
    """The first process's output, as it comes, in a notebook's cell: lines, progress bars, pictures."""

    def __init__(self, output: IO[bytes], show: Callable[[Any], None] | None) -> None:
        self.show, self.last, self.bars = show, deque(maxlen=50), {}
        self._lines: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, args=(output,), daemon=True)
        self._reader.start()

    def _read(self, output: IO[bytes]) -> None:
        for line in output:
            self._lines.put(line.decode(errors="replace"))

    def update(self, to_the_end: bool = False) -> None:
        if to_the_end:
            self._reader.join(10)
        while not self._lines.empty():
            line = self._lines.get()
            if not show_record(line, self.bars, self.show):
                self.last.append(line.rstrip())
                print(line, end="", flush=True)


def main() -> None:
    """One of the processes of `call_on_ranks`: what it raises is said by the process that started it."""
    from importlib import import_module

    from vavae_tools.runtime.console import bars_into_cell
    from vavae_tools.runtime.ranks import end_with_parent, is_first

    signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell's background job makes its children ignore
    end_with_parent()
    bars_into_cell()
    task = pickle.loads(Path(sys.argv[1]).read_bytes())  # written by that process
    sys.argv = task["argv"]
    module, name = task["function"].split(":")
    try:
        made = getattr(import_module(module), name)(**task["arguments"])
        if os.environ["LOCAL_RANK"] == "0":  # one on each machine
            Path(task["result"]).write_bytes(pickle.dumps(made))
    except Stopped as stop:
        if is_first():
            print(stop)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        reason = disk_fault(error) if isinstance(error, OSError) else None
        _keep_fault(UserError(reason) if reason else error)
        sys.exit(2 if reason or isinstance(error, UserError) else 1)


def _keep_fault(error: Exception) -> None:
    user = isinstance(error, UserError)
    message = str(error) if user else f"{type(error).__name__}: {error}"
    fault = {"user": user, "message": message, "traceback": format_exc(), "at": time.time()}
    Path(os.environ[FAULT]).write_text(json.dumps(fault), encoding="utf-8")


if __name__ == "__main__":
    main()
