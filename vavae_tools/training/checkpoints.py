"""Lightning checkpoints that are whole: `best-*.ckpt` and `last.ckpt`, always under these names."""

import shutil
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
    """Writes `last.ckpt` every few minutes, and at the end however training ends."""

    def __init__(self, folder: Path, every_minutes: float = 5.0) -> None:
        super().__init__(
            folder, "last", train_time_interval=timedelta(minutes=every_minutes), enable_version_counter=False
        )

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.global_step and not trainer.fast_dev_run:
            path = self.format_checkpoint_name({}, filename="last")
            trainer.save_checkpoint(path)
            self.best_model_path = path


def checkpoint_callbacks(folder: Path, monitor: str | None, every_minutes: float = 5.0) -> list[ModelCheckpoint]:
    """`last.ckpt`, and the best by `monitor` (smaller is better) as `best-EPOCH-VALUE.ckpt`."""
    callbacks: list[ModelCheckpoint] = [LastCheckpoint(folder, every_minutes)]
    if monitor:
        name = f"best-{{epoch:03d}}-{{{monitor}:.4f}}"
        callbacks.append(
            ModelCheckpoint(folder, name, monitor=monitor, auto_insert_metric_name=False, enable_version_counter=False)
        )
    return callbacks


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
