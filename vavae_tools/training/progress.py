"""One progress bar over a whole training: steps, rate, what is left, the losses; plain lines where output is piped."""

import time
from collections.abc import Callable

import lightning as L
from lightning.pytorch.utilities import rank_zero_only
from tqdm.auto import tqdm

from vavae_tools.screen import clock, someone_looks

SHOWN = ("train/loss", "val/loss", "val/psnr", "val/right", "val/frechet_ratio")


@rank_zero_only
def say(line: str) -> None:
    """Print a line at once, and once: of several processes only the first speaks."""
    print(line, flush=True)


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
