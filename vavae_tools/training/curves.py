"""The curves of training: values of one step, the mean over all processes, without making any of them wait for it."""

import lightning as L
import torch
import torch.distributed as dist
from torch import Tensor


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
    if trainer.lightning_module.automatic_optimization and trainer.fit_loop._should_accumulate():
        return False
    every = trainer.log_every_n_steps
    # not Lightning's own answer, which also looks whether training shall stop: processes may learn that one by one
    return every > 0 and (written_as(trainer) + 1) % every == 0


def written_as(trainer: L.Trainer) -> int:
    """The number of the step under which Lightning writes this batch's values."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped
