"""What Lightning (2.6) has no public name for, and we cannot do without."""

from typing import Any

import lightning as L
from lightning.pytorch.core.optimizer import LightningOptimizer


def is_gathering(trainer: L.Trainer) -> bool:
    """Return whether this batch's gradients are gathered, and no step is made after it."""
    return trainer.fit_loop._should_accumulate()


def logged_step(trainer: L.Trainer) -> int:
    """Return the number of the step under which Lightning writes this batch's values."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def exclude_from_global_step(optimizer: LightningOptimizer) -> None:
    """Leave this optimiser's next step out of `global_step`, which counts every optimiser's; the loop undoes it."""
    optimizer._on_before_step = optimizer._on_after_step = lambda: None


def leave_sigterm_to_us(trainer: L.Trainer) -> None:
    """Keep the loop from telling all processes of a SIGTERM.

    From 2.6 on it asks the first process before every batch, which a GPU has to be waited for, and ends without saving;
    and its SIGTERM calls a collective at a moment that the other processes cannot know.
    """
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None


def reopen_epoch(loops: dict[str, Any], counts_steps: bool) -> None:
    """Bring the progress in a checkpoint from a run's end to what it was after the last step.

    Where a run ended within an epoch, or goes on until a number of steps, Lightning would leave the rest of it out.
    """
    epochs, batches = loops["epoch_progress"], loops.get("epoch_loop.batch_progress")
    at_end = batches is not None and len(set(epochs["current"].values())) == 1 and epochs["current"]["ready"]
    if not at_end or (batches["is_last_batch"] and not counts_steps):
        return
    for counts in epochs.values():
        counts |= {name: counts[name] - 1 for name in ("processed", "completed")}
    for counts in () if batches["is_last_batch"] else (batches["current"], batches["total"]):
        counts["completed"] -= 1
    loops["epoch_loop.state_dict"]["_batches_that_stepped"] -= 1
