"""The Trainer as all trainings here use it: whole checkpoints, one progress bar, TensorBoard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from vavae_tools.errors import UserError
from vavae_tools.training.checkpoints import WholeCheckpointIO
from vavae_tools.training.progress import Progress


def build_trainer(
    settings: dict[str, Any], output_dir: Path, callbacks: list[L.Callback], say: Callable[[str], None], **length: Any
) -> L.Trainer:
    """A Trainer with `settings` (`devices.trainer_settings`) whose `length` is in max_epochs or max_steps.

    Raises:
        UserError: settings that Lightning cannot use, such as a strategy whose package is missing.
    """
    try:
        return L.Trainer(
            **settings,
            **length,
            default_root_dir=output_dir,
            logger=TensorBoardLogger(output_dir),
            callbacks=[*callbacks, Progress(say)],
            plugins=[WholeCheckpointIO()],
            enable_progress_bar=False,
        )
    except MisconfigurationException as error:
        raise UserError(str(error)) from None
