"""The Trainer as all trainings here use it: whole checkpoints, one progress bar, TensorBoard."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from vavae_tools.checkpoints.folders import read_any
from vavae_tools.errors import Stopped, UserError
from vavae_tools.machine import keep_freed_memory
from vavae_tools.training.checkpoints import WholeCheckpointIO
from vavae_tools.training.progress import Progress


def build_trainer(
    settings: dict[str, Any], output_dir: Path, callbacks: list[L.Callback], say: Callable[[str], None], **length: Any
) -> L.Trainer:
    """A Trainer with `settings` (`devices.trainer_settings`) whose `length` is in max_epochs or max_steps.

    Raises:
        UserError: settings that Lightning cannot use, such as a strategy whose package is missing.
    """
    if settings.get("accelerator") == "cpu":
        keep_freed_memory()
    try:
        return L.Trainer(
            **settings,
            **length,
            default_root_dir=output_dir,
            logger=TensorBoardLogger(output_dir),
            callbacks=[*callbacks, Progress(say)],
            plugins=[WholeCheckpointIO(say)],
            enable_progress_bar=False,
        )
    except MisconfigurationException as error:
        raise UserError(str(error)) from None


def fit(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: L.LightningDataModule,
    resume_from: Path | None,
    say: Callable[[str], None],
) -> None:
    """Train to the end, or until training is stopped in good order: then it is said how to go on, and all is saved.

    Raises:
        UserError: a checkpoint that this run cannot go on from, such as one that is further than its length.
    """
    try:
        with _one_file(trainer, resume_from) as checkpoint:
            trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except Stopped as stop:
        say(str(stop))
    except MisconfigurationException as error:  # such as a checkpoint that is further than this run's length
        raise UserError(str(error)) from None
    finally:
        trainer.strategy.checkpoint_io.teardown()  # the last one is on the disk; not every strategy sees to that


@contextmanager
def _one_file(trainer: L.Trainer, resume_from: Path | None) -> Iterator[Path | None]:
    """The checkpoint as a file of Lightning's form, for a sharded model, whose strategy reads no other."""
    if resume_from is None or resume_from.suffix == ".ckpt" or not isinstance(trainer.strategy, ModelParallelStrategy):
        yield resume_from
        return
    with TemporaryDirectory() as folder:  # each process its own
        torch.save(read_any(resume_from, lambda line: None), Path(folder) / "checkpoint.ckpt")
        yield Path(folder) / "checkpoint.ckpt"
