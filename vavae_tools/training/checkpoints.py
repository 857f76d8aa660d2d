"""Lightning checkpoints that are whole: `best-*.ckpt` and `last.ckpt`, always under these names."""

import shutil
import signal
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO

from vavae_tools.errors import UserError
from vavae_tools.files import read_checkpoint, written_whole


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes beside, flushes, renames: a kill or a full disk leaves the checkpoint before it as it was.

    Lightning's own writing goes through TMPDIR, which is another file system on many machines.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str, storage_options: Any | None = None) -> None:
        path = Path(path)
        try:
            with written_whole(path) as partial:
                torch.save(checkpoint, partial)
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError where the disk is full
            free = shutil.disk_usage(path.parent).free / 2**20
            raise UserError(
                f"{path} could not be written ({free:,.0f} MB free): {str(error).splitlines()[0]}. The checkpoint "
                "before it is whole: free some space and go on with --resume last"
            ) from None


class LastCheckpoint(ModelCheckpoint):
    """Writes `last.ckpt` every few minutes, and at the end however training ends.

    Ctrl-C, a notebook's stop button and SIGTERM end training after the step they fall into: between two steps a
    checkpoint is exact, and `--resume last` goes on as if nothing had happened. A second Ctrl-C does not wait.
    """

    def __init__(self, folder: Path, every_minutes: float = 5.0) -> None:
        super().__init__(
            folder, "last", train_time_interval=timedelta(minutes=every_minutes), enable_version_counter=False
        )
        self._stop, self._former_handler = False, None

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, module, stage)
        if trainer.is_global_zero:
            for left_over in Path(self.dirpath).glob(".*.partial"):  # of a process that was killed while it wrote
                left_over.unlink(missing_ok=True)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        super().on_train_start(trainer, module)
        if threading.current_thread() is threading.main_thread():
            self._former_handler = signal.signal(signal.SIGINT, self._interrupt)

    def _interrupt(self, number: int, frame: object) -> None:
        if self._stop:
            raise UserError("Stopped at once, in the middle of a step; last.ckpt is as it was written before")
        self._stop = True

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ends = trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
        gathered = getattr(module, "accumulate_grad_batches", trainer.accumulate_grad_batches)
        if (batch_idx + 1) % gathered and not ends:
            return  # the gradients gathered so far would be lost
        validates = trainer.enable_validation and sum(trainer.num_val_batches) > 0
        if ends and validates and (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0:
            return  # it would be left out on resuming, and with it perhaps the best model: save after it
        self._save_if_due(trainer)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._save_if_due(trainer)

    def _save_if_due(self, trainer: L.Trainer) -> None:
        if trainer.world_size > 1 and trainer.global_step % 20:
            return  # to agree costs the processes a wait: not at every step
        now = time.monotonic()
        due = now - self._last_time_checked >= self._train_time_interval.total_seconds()
        # the first process decides for all
        due, stop = trainer.strategy.broadcast((due, self._stop or trainer.received_sigterm))
        if due or stop:
            self._save(trainer)
            self._last_time_checked = now
        if stop:
            raise UserError(f"Stopped after step {trainer.global_step:,}; go on with --resume last")

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._give_back_signal()
        if trainer.global_step and not trainer.fast_dev_run:
            self._save(trainer)

    def on_exception(self, trainer: L.Trainer, module: L.LightningModule, exception: BaseException) -> None:
        self._give_back_signal()
        super().on_exception(trainer, module, exception)

    def _save(self, trainer: L.Trainer) -> None:
        path = self.format_checkpoint_name({}, filename="last")
        trainer.save_checkpoint(path)
        self.best_model_path = path

    def _give_back_signal(self) -> None:
        if self._former_handler is not None:
            signal.signal(signal.SIGINT, self._former_handler)
            self._former_handler = None


def checkpoint_callbacks(
    folder: Path, monitor: str | None, every_minutes: float = 5.0, mode: str = "min"
) -> list[ModelCheckpoint]:
    """`last.ckpt`, and the best by `monitor` as `best-EPOCH-VALUE.ckpt`; `mode` says whether "min" or "max" is best."""
    callbacks: list[ModelCheckpoint] = []
    if monitor:
        name = f"best-{{epoch:03d}}-{{{monitor}:.4f}}"
        callbacks.append(
            ModelCheckpoint(
                folder,
                name,
                monitor=monitor,
                mode=mode,
                auto_insert_metric_name=False,
                save_on_train_epoch_end=False,  # from there Lightning does not resume exactly where max_steps is set
                enable_version_counter=False,
            )
        )
    return [*callbacks, LastCheckpoint(folder, every_minutes)]  # last, so that it knows of the best


def resume_path(resume: str | None, folder: Path) -> Path | None:
    """`--resume last | FILE` → the checkpoint to go on from; None starts anew.

    Raises:
        UserError: there is none (what is there is named), or it is damaged.
    """
    if resume is None:
        return None
    path = folder / "last.ckpt" if resume == "last" else Path(resume)
    read_checkpoint(path)
    return path


def check_resumable(path: Path | None, module: L.LightningModule) -> None:
    """Say what differs between a checkpoint to go on from and the module that is to go on.

    Raises:
        UserError: the checkpoint is of another model, or holds no more than weights.
    """
    if path is None:
        return
    checkpoint, own = read_checkpoint(path), module.state_dict()
    lacking = [part for part in ("state_dict", "optimizer_states", "loops") if part not in checkpoint]
    if lacking:
        raise UserError(f"{path} has no {lacking[0]}: training cannot go on from it; name a last.ckpt or best-*.ckpt")
    found = checkpoint["state_dict"]
    for name in [*own, *found]:
        shapes = [tuple(weights[name].shape) if name in weights else "not there" for weights in (found, own)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{path} is of another model: {name} is {shapes[0]}, expected {shapes[1]}. Go on with the settings of "
                "that run, or start anew without --resume"
            )


def best_checkpoint(folder: str | Path) -> Path:
    """The `best-*.ckpt` of a run, or `last.ckpt` where nothing was monitored.

    Raises:
        UserError: neither is there.
    """
    folder = Path(folder)
    found = sorted(folder.glob("best-*.ckpt"), key=lambda path: path.stat().st_mtime) or list(folder.glob("last.ckpt"))
    if not found:
        raise UserError(f"No best-*.ckpt or last.ckpt in {folder}: train first")
    return found[-1]
