"""One progress bar over a whole training: steps, rate, what is left, the losses; plain lines where output is piped."""

import time
from collections.abc import Callable

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor
from tqdm.auto import tqdm

from vavae_tools.runtime.console import clock, say, someone_looks
from vavae_tools.training.lightning_inside import is_gathering, written_as

# ---- The curves of training: values of one step, the mean over all processes, without making any of them wait for it


def log_step(module: L.LightningModule, parts: dict[str, Tensor], batch_size: int) -> None:
    """Log `train/NAME` of this batch; of several processes, whose batches are equally large, the mean.

    They speak with each other at the batches that Lightning writes down, and then once: one sum of all values. At all
    others a value is this process's own, which nobody reads. (Lightning's own `sync_dist` waits for all processes and
    sums up value by value, at every batch.)

    Args:
        parts: scalars on the module's device, the same names on all processes.
    """
    values = {name: value.detach() for name, value in parts.items()}
    if module.trainer.world_size > 1 and is_written(module.trainer):
        summed = torch.stack([value.float() for value in values.values()])  # (number of values,)
        dist.all_reduce(summed)
        values = dict(zip(values, summed / module.trainer.world_size, strict=True))
    module.log_dict({f"train/{name}": value for name, value in values.items()}, batch_size=batch_size)


def is_written(trainer: L.Trainer) -> bool:
    """Whether Lightning writes the values of the batch that is being trained on; the same on all processes."""
    if trainer.lightning_module.automatic_optimization and is_gathering(trainer):
        return False
    every = trainer.log_every_n_steps
    # not Lightning's own answer, which also looks whether training shall stop: processes may learn that one by one
    return every > 0 and (written_as(trainer) + 1) % every == 0


SHOWN = ("train/loss", "val/loss", "val/psnr", "val/right", "val/frechet_ratio")


def pace(made: int, left: int, seconds: float) -> tuple[float, float]:
    """(steps a second so far, seconds for those that are left).

    >>> pace(10, 30, 5.0)
    (2.0, 15.0)
    """
    rate = made / max(seconds, 1e-9)
    return rate, left / max(rate, 1e-9)


class Progress(L.Callback):
    """A bar on a screen or in a notebook; a line for each twentieth of the way in a file.

    The losses are those of the last logged step and the last validation. A GPU is waited for where they are shown, at
    steps that are logged, and for each line.
    """

    def __init__(self, say: Callable[[str], None] = say) -> None:
        self.say = say
        self._live = someone_looks()
        self._bar: tqdm | None = None

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.total = int(getattr(module, "total_steps", trainer.estimated_stepping_batches))
        self.start, self.began = trainer.global_step, time.monotonic()
        if self.start:
            self.say(f"going on after step {self.start:,} of {self.total:,}")
        if self._live and trainer.is_global_zero:
            self._bar = tqdm(total=self.total, initial=self.start, unit="step", desc="training", dynamic_ncols=True)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx) -> None:
        step = trainer.global_step
        if self._bar is not None:
            self._bar.update(step - self._bar.n)
            if step % trainer.log_every_n_steps == 0:
                self._bar.set_postfix_str(self.losses(trainer), refresh=False)
        elif trainer.is_global_zero and (step % max(1, self.total // 20) == 0 or step == self.total):
            rate, left = pace(step - self.start, self.total - step, time.monotonic() - self.began)
            self.say(f"step {step:>6,}/{self.total:,}  {rate:6.2f} steps/s  {clock(left)} left  {self.losses(trainer)}")

    def losses(self, trainer: L.Trainer) -> str:
        shown = {name: trainer.logged_metrics.get(name) for name in SHOWN}
        return "  ".join(f"{name} {float(value):.4g}" for name, value in shown.items() if value is not None)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._close()

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None
