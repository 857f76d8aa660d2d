"""The Trainer as all trainings here use it: whole checkpoints, one progress bar, TensorBoard, throughput."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from vavae_tools.data.loading import loader_faults
from vavae_tools.errors import Stopped, UserError
from vavae_tools.machine import keep_freed_memory
from vavae_tools.training.checkpoints import WholeCheckpointIO
from vavae_tools.training.devices import allow_tf32
from vavae_tools.training.memory import EXPERIMENT, Names, memory_fault, memory_faults
from vavae_tools.training.progress import Progress
from vavae_tools.training.throughput import Throughput


def build_trainer(
    settings: dict[str, Any], output_dir: Path, callbacks: list[L.Callback], say: Callable[[str], None], **length: Any
) -> L.Trainer:
    """A Trainer with `settings` (`devices.trainer_settings`) whose `length` is in max_epochs or max_steps.

    It shows where training is and, at the end, how fast it went (`throughput`).

    Raises:
        UserError: settings that Lightning cannot use, such as a strategy whose package is missing.
    """
    if settings.get("accelerator") == "cpu":
        keep_freed_memory()
    allow_tf32(settings)
    try:
        return L.Trainer(
            **settings,
            **length,
            default_root_dir=output_dir,
            logger=TensorBoardLogger(output_dir),
            callbacks=[Throughput(say), *callbacks, Progress(say)],  # the first: a step ends before what others do
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
    names: Names = EXPERIMENT,
    slicing: bool | None = None,
) -> None:
    """Train to the end, or until training is stopped in good order: then it is said how to go on, and all is saved.

    Args:
        names: what the settings that save memory are called, for the line where it runs out.
        slicing: whether a VAE that stands beside the training takes one picture after the other; None: there is none.

    Raises:
        UserError: a checkpoint that this run cannot go on from, such as one that is further than its length; or memory
            that is too small, where `data` has a `batch_size` that can be smaller.
    """
    begun = trainer.global_step

    def line_for(error: BaseException) -> str | None:
        size = getattr(data, "batch_size", None)
        if size is None:  # somebody's own data
            return None
        gathered = max(trainer.accumulate_grad_batches, getattr(module, "accumulate_grad_batches", 1))
        stepped = trainer.global_step > begun
        return memory_fault(error, size, gathered, module=module, slicing=slicing, names=names, stepped=stepped)

    try:
        with memory_faults(line_for), loader_faults():
            trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)
    except Stopped as stop:
        say(str(stop))
    except MisconfigurationException as error:  # such as a checkpoint that is further than this run's length
        raise UserError(str(error)) from None
    finally:
        trainer.strategy.checkpoint_io.teardown()  # the last one is on the disk; not every strategy sees to that
        torch.use_deterministic_algorithms(False)  # what Lightning has set is this training's, not the whole process's
    trainer.strategy.barrier()  # so that every process finds it there
