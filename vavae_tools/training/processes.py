"""Several devices from a notebook's cell: the training runs as a program of its own, its lines come into the cell.

Lightning refuses ddp in a notebook, and forking after CUDA was touched fails or hangs; a program that is started anew,
with ddp inside, does neither.
"""

import functools
import inspect
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, is_dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar

from vavae_tools.errors import UserError
from vavae_tools.machine import find_machine
from vavae_tools.screen import in_notebook

Run = TypeVar("Run", bound=Callable[..., Path])


def several_devices_from_a_cell(run: Run) -> Run:
    """Let `run` be called from a notebook on a machine with several GPUs; elsewhere it is called as it is.

    `run` returns a path and takes plain values and paths; its `devices` holds the arguments of `trainer_settings`.
    """
    signature = inspect.signature(run)

    @functools.wraps(run)
    def call(*args: Any, **named: Any) -> Path:
        arguments = signature.bind(*args, **named).arguments
        wanted = (arguments.get("devices") or {}).get("devices", "auto")
        if not in_notebook() or (find_machine().devices if wanted == "auto" else int(wanted)) < 2:
            return run(*args, **named)
        plain = {**arguments, **arguments.pop("changes", {})}  # what **changes gathered goes on by name, too
        plain = {name: value for name, value in plain.items() if name not in ("show", "say", "changes")}
        plain = {name: asdict(value) if is_dataclass(value) else value for name, value in plain.items()}
        return run_as_program(f"{run.__module__}:{run.__name__}", plain)

    return call  # type: ignore[return-value]


def run_as_program(function: str, arguments: dict[str, Any]) -> Path:
    """Call "module:function" with plain arguments in a new Python, print its lines as they come, return its path.

    Raises:
        UserError: it failed; its last lines are above.
    """
    with tempfile.TemporaryDirectory() as folder:
        task, result = Path(folder) / "task.json", Path(folder) / "result.json"
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in arguments.items()}
        task.write_text(json.dumps({"function": function, "arguments": plain, "result": str(result)}))
        command = [sys.executable, "-u", "-m", "vavae_tools.training.processes", str(task)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            try:
                for line in process.stdout:
                    print(line, end="")
            except BaseException:  # the stop button: nothing may go on behind the notebook
                process.terminate()
                raise
        if process.returncode:
            raise UserError(f"{function} failed with status {process.returncode}; its last lines are above")
        return Path(json.loads(result.read_text()))


def main() -> None:
    task = json.loads(Path(sys.argv[1]).read_text())
    module, name = task["function"].split(":")
    path = getattr(import_module(module), name)(**task["arguments"])
    if not Path(task["result"]).exists():
        Path(task["result"]).write_text(json.dumps(str(path)))


if __name__ == "__main__":
    from vavae_tools.errors import run_command

    run_command(main)
