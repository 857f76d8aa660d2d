"""`train.log`: what became of a training, line by line, as `tail -f` shows it and grep finds it."""

import shlex
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import lightning as L

from vavae_tools.runtime.console import clock, say
from vavae_tools.runtime.errors import Stopped
from vavae_tools.runtime.machine import find_machine
from vavae_tools.training.callbacks.progress import SHOWN, is_written, pace
from vavae_tools.training.callbacks.record import versions
from vavae_tools.training.callbacks.throughput import peak_memory
from vavae_tools.training.devices import SAID

NAME = "train.log"


class TrainLog(L.Callback):
    """Appends to `train.log` in the run's folder: how training began, steps, validations, checkpoints, how it ended.

    A line is a time, what it is about (`step`, `val`, `saved`, `end`, `stopped`, `failed`) and values with their
    names. What goes on after a checkpoint is appended, and says so. Only the first process writes.

    Loss and learning rate are those of the last step that Lightning writes down, for which it waits for the GPU anyway;
    no other step does. With `every` a multiple of the Trainer's log_every_n_steps they are the line's own.

    Args:
        folder: of the run.
        every: optimiser steps between two lines; the last step has one too.
        say: told once where the file cannot be written; training goes on.
        machine: the line of `devices.describe`; by default the device, the precision and the number of processes.
    """

    def __init__(
        self, folder: str | Path, every: int, say: Callable[[str], None] = say, machine: str | None = None
    ) -> None:
        self.path, self.every, self.say, self.machine = Path(folder) / NAME, max(1, every), say, machine
        self._file: TextIO | None = None
        self._values: dict[str, float] = {}

    # ---- beginning and end

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._close()
        if not trainer.is_global_zero:
            return
        self.total = int(getattr(module, "total_steps", trainer.estimated_stepping_batches))
        self.start = self._step = trainer.global_step
        self.began, self._values = time.monotonic(), {}
        self._note_checkpoints(trainer)
        self._open()
        self._write("command", _command())
        self._write("versions", ", ".join(f"{name} {found}" for name, found in versions().items()))
        self._write("machine", self.machine or _machine(trainer))
        resumed = f"going on after step {self.start} of {self.total}" if self.start else f"{self.total} steps to go"
        self._write("begin", resumed)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:  # the last checkpoint is noted by then
        self._write("end", self._passed(trainer))
        self._close()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if isinstance(exception, Stopped):
            self._write("stopped", f"{exception} ({self._passed(trainer)})")
        elif self._file is not None:
            reason = (str(exception).strip().splitlines() or [""])[0]
            self._write("failed", f"{type(exception).__name__}: {reason} ({self._passed(trainer)})")
        self._close()

    def _passed(self, trainer: L.Trainer) -> str:
        if self._file is None:
            return ""
        made = trainer.global_step - self.start
        return f"{made} steps in {clock(time.monotonic() - self.began)}, at step {trainer.global_step} of {self.total}"

    # ---- steps

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx) -> None:
        if self._file is None:
            return
        if is_written(trainer):
            values = trainer.logged_metrics  # with those of this batch
            self._values = {name: float(values[name]) for name in ("train/loss", "train/lr") if name in values}
        step, before, self._step = trainer.global_step, self._step, trainer.global_step
        if step // self.every > before // self.every or before < step >= self.total:
            self._write_step(trainer, module, step)

    def _write_step(self, trainer: L.Trainer, module: L.LightningModule, step: int) -> None:
        loss, lr = self._values.get("train/loss"), self._values.get("train/lr")
        if lr is None and trainer.optimizers:
            lr = trainer.optimizers[0].param_groups[0]["lr"]
        rate, left = pace(step - self.start, self.total - step, time.monotonic() - self.began)
        where = "GPU" if module.device.type == "cuda" else "RAM"
        self._write(
            "step",
            f"{self._place(trainer)}  loss {_number(loss, '.4e'):>10}  lr {_number(lr, '.3e'):>9}  "
            f"{rate:7.2f} steps/s  {clock(left):>8} left  {peak_memory(module.device) / 1e9:6.2f} GB {where}",
        )

    def _place(self, trainer: L.Trainer) -> str:
        return f"{trainer.global_step:>{len(str(self.total))}}/{self.total}  epoch {trainer.current_epoch + 1:<4}"

    # ---- what else happens

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._file is None or trainer.sanity_checking:
            return
        values = {name: trainer.callback_metrics[name] for name in SHOWN if name in trainer.callback_metrics}
        shown = "  ".join(f"{name} {float(value):.4e}" for name, value in values.items() if name.startswith("val/"))
        self._write("val", f"{self._place(trainer)}  {shown}".rstrip())

    def _note_checkpoints(self, trainer: L.Trainer) -> None:
        """Lightning tells callbacks that a checkpoint is made, but not where."""
        save = getattr(trainer.save_checkpoint, "unnoted", trainer.save_checkpoint)

        def save_checkpoint(filepath: str | Path, *arguments: Any, **named: Any) -> None:
            save(filepath, *arguments, **named)
            self._write("saved", f"{filepath}  step {trainer.global_step}")

        save_checkpoint.unnoted = save  # of a Trainer that fits once more
        trainer.save_checkpoint = save_checkpoint

    # ---- the file

    def _open(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("a", encoding="utf-8")
            if self._file.tell():
                self._file.write("\n")
        except OSError as error:
            self._give_up(error)

    def _write(self, about: str, text: str) -> None:
        if self._file is None:
            return
        try:
            now = datetime.now().isoformat(" ", "seconds")
            self._file.write(f"{now}  {about:<8}  {' '.join(text.splitlines())}\n")
            self._file.flush()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self.say(f"{self.path} cannot be written ({error.strerror or error}): training goes on without it")
        self._close()

    def _close(self) -> None:
        file, self._file = self._file, None
        if file is not None:
            with suppress(OSError):  # what was not flushed; said before
                file.close()


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def _command() -> str:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    program = ["python", "-m", spec.name.removesuffix(".__main__")] if spec is not None else sys.argv[:1]
    return shlex.join([*program, *sys.argv[1:]])


def _machine(trainer: L.Trainer) -> str:
    processes = f"{trainer.world_size} process{'es' if trainer.world_size > 1 else ''}"
    machine = str(find_machine()) if trainer.strategy.root_device.type == "cuda" else "CPU"
    return f"{machine}: {SAID.get(str(trainer.precision), trainer.precision)}, {processes}"
