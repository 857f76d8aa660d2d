"""How far a training is: a bar or lines on the screen, `train.log` in its folder, and the values that are logged."""

import math
import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from datetime import datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from vavae_tools.runtime.console import clock, is_interactive, log
from vavae_tools.runtime.errors import Stopped, one_line
from vavae_tools.runtime.machine import peak_memory
from vavae_tools.training.callbacks.record import versions
from vavae_tools.training.lightning_inside import is_gathering, logged_step


def log_step(module: L.LightningModule, parts: dict[str, Tensor], batch_size: int) -> None:
    """Log `train/NAME` of this batch; of several processes, whose batches are equally large, the mean.

    All values are summed at once, at the batches that Lightning logs; its own `sync_dist` sums value by value at every
    batch. `parts` are scalars on the module's device.
    """
    values = {name: value.detach() for name, value in parts.items()}
    if module.trainer.world_size > 1 and is_written(module.trainer):
        summed = torch.stack([value.float() for value in values.values()])  # (number of values,)
        dist.all_reduce(summed)
        values = dict(zip(values, summed / module.trainer.world_size, strict=True))
    module.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=batch_size)


def is_written(trainer: L.Trainer) -> bool:
    """Return whether Lightning logs the batch that is being trained on; the same on all processes."""
    if trainer.lightning_module.automatic_optimization and is_gathering(trainer):
        return False
    every = trainer.log_every_n_steps
    # not Lightning's own answer, which also looks whether training shall stop: processes may learn that one by one
    return every > 0 and (logged_step(trainer) + 1) % every == 0


NAME = "train.log"
SAMPLE_METRICS = ("val/sample_accuracy", "val/nearest_ratio", "val/copies", "val/usable")
"""Of samples that a `SampleWatch` judges, at some validations."""
LOGGED_METRICS = ("train/loss", "val/loss", "val/psnr", "val/accuracy", "val/frechet_ratio", *SAMPLE_METRICS)


def is_measured(trainer: L.Trainer, name: str) -> bool:
    """Return whether the validation that ends has this value, which samples are not judged for at each of them."""
    return name not in SAMPLE_METRICS or name in trainer.callback_metrics


def losses(metrics: Mapping[str, Any], names: Sequence[str], form: str) -> str:
    """Return those of the named metrics that there are, as text."""
    return "  ".join(f"{name} {float(metrics[name]):{form}}" for name in names if name in metrics)


class PacedCallback(L.Callback):
    def begin(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.total = int(getattr(module, "total_steps", trainer.estimated_stepping_batches))
        self.start = self._step = trainer.global_step
        self.began = time.monotonic()

    def pace(self, step: int) -> str:
        """Return steps a second so far, and the time for those that are left."""
        rate = (step - self.start) / max(time.monotonic() - self.began, 1e-9)
        return f"{rate:7.2f} steps/s  {clock((self.total - step) / max(rate, 1e-9)):>8} left"


class Progress(PacedCallback):
    """Show a bar on a screen or in a notebook, in a file a line for each twentieth of the steps; one a validation."""

    def __init__(self, log: Callable[[str], None] = log) -> None:
        self.log_line, self._live = log, is_interactive()
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.begin(trainer, module)
        if self.start:
            self.log_line(f"resuming after step {self.start:,} of {self.total:,}")
        if self._live and trainer.is_global_zero:
            self._bar = tqdm(total=self.total, initial=self.start, unit="step", desc="training", dynamic_ncols=True)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx) -> None:
        step, before, self._step = trainer.global_step, self._step, trainer.global_step
        if step == before:  # its gradients are gathered
            return
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            if step % trainer.log_every_n_steps == 0:
                self._bar.set_postfix_str(losses(trainer.logged_metrics, LOGGED_METRICS, ".4g"), refresh=False)
        elif trainer.is_global_zero and (step % max(1, self.total // 20) == 0 or step == self.total):
            shown = losses(trainer.logged_metrics, LOGGED_METRICS, ".4g")
            self.log_line(f"step {step:>6,}/{self.total:,}  {self.pace(step)}  {shown}")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        shown = losses({**trainer.logged_metrics, **trainer.callback_metrics}, LOGGED_METRICS, ".4g")
        with nullcontext() if self._bar is None else self._bar.external_write_mode():
            where = f"epoch {trainer.current_epoch + 1:,}, step {trainer.global_step:,}/{self.total:,}"
            self.log_line(f"validated  {where}  {shown}")
        if self._bar is not None:
            self._bar.set_postfix_str(shown, refresh=False)

    def _close(self, *arguments: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    on_train_end = on_exception = _close


class TrainLog(PacedCallback):
    """Append to `train.log` in the run's folder: how training began, steps, validations, checkpoints, how it ended.

    A line is a time, what it is about (`step`, `val`, `saved`, `end`, `stopped`, `failed`) and values with their names.
    There are `every` steps between two lines; the last step has one too. Loss and learning rate are those of the last
    step that Lightning logged, so that the GPU is waited for at no other. Only the first process writes. Where the file
    cannot be written, `log` gets a line and training continues.
    """

    def __init__(self, folder: str | Path, every: int, log: Callable[[str], None] = log, machine: str = "") -> None:
        self.path, self.every, self.log_line, self.machine = Path(folder) / NAME, max(1, every), log, machine
        self._writes = False

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._writes = trainer.is_global_zero
        if not self._writes:
            return
        self.begin(trainer, module)
        self._values = {}
        trainer.strategy.checkpoint_io.note = lambda path: self._write("saved", f"{path}  step {trainer.global_step}")
        if self.path.is_file() and self.path.stat().st_size:
            self._append("\n")
        spec = getattr(sys.modules.get("__main__"), "__spec__", None)
        program = ["python", "-m", spec.name.removesuffix(".__main__")] if spec is not None else sys.argv[:1]
        self._write("command", shlex.join([*program, *sys.argv[1:]]))
        self._write("versions", ", ".join(f"{name} {found}" for name, found in versions().items()))
        self._write("machine", self.machine or str(trainer.strategy.root_device))
        begun = f"resuming after step {self.start} of {self.total}" if self.start else f"{self.total} steps to go"
        self._write("begin", begun)

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:  # the last checkpoint is noted by then
        if self._writes:
            self._write("end", self._passed(trainer))
        self._writes = False

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        if self._writes:
            stopped = isinstance(exception, Stopped)
            text = str(exception) if stopped else f"{type(exception).__name__}: {one_line(exception, 500)}"
            self._write("stopped" if stopped else "failed", f"{text} ({self._passed(trainer)})")
        self._writes = False

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx) -> None:
        if not self._writes:
            return
        if is_written(trainer):
            values = trainer.logged_metrics  # with those of this batch
            self._values = {name: float(values[name]) for name in ("train/loss", "train/lr") if name in values}
        step, before, self._step = trainer.global_step, self._step, trainer.global_step
        if not (step // self.every > before // self.every or before < step >= self.total):
            return
        loss, lr = (self._values.get(name, math.nan) for name in ("train/loss", "train/lr"))
        memory = f"{peak_memory(module.device) / 1e9:6.2f} GB {'GPU' if module.device.type == 'cuda' else 'RAM'}"
        shown = f"loss {loss:>10.4e}  lr {lr:>9.3e}  {self.pace(step)}  {memory}"
        self._write("step", f"{self._place(trainer)}  {shown}")

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._writes and not trainer.sanity_checking:
            shown = losses(trainer.callback_metrics, LOGGED_METRICS[1:], ".4e")
            self._write("val", f"{self._place(trainer)}  {shown}".rstrip())

    def _place(self, trainer: L.Trainer) -> str:
        return f"{trainer.global_step:>{len(str(self.total))}}/{self.total}  epoch {trainer.current_epoch + 1:<4}"

    def _passed(self, trainer: L.Trainer) -> str:
        made = trainer.global_step - self.start
        return f"{made} steps in {clock(time.monotonic() - self.began)}, at step {trainer.global_step} of {self.total}"

    def _write(self, about: str, text: str) -> None:
        self._append(f"{datetime.now().isoformat(' ', 'seconds')}  {about:<8}  {' '.join(text.splitlines())}\n")

    def _append(self, text: str) -> None:
        if not self._writes:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            self._writes = False
            self.log_line(f"{self.path} cannot be written ({error.strerror or error}): training continues without it")
