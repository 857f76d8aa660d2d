"""The order of the training data: a shuffle that follows from seed and epoch, and can be taken up at any batch.

Lightning restores the epoch and the batch of a run, but not its place in the data; here the order is told both (the
recipe that was found bit-exact within an epoch, at its boundary, with workers and with several processes).
"""

import signal
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vavae_tools.errors import UserError


class EpochOrder(Sampler[int]):
    """Indices of one process, epoch by epoch; every global batch is cut into equal parts for the ranks.

    Args:
        length: samples in the data set.
        batch_size: samples per process and step.
        seed: of the shuffles; the order of epoch e follows from (seed, e).
        rank, world_size: this process among all; the union over ranks does not depend on `world_size` when
            `batch_size · world_size` stays the same.

    An epoch holds whole global batches only (its rest comes up in other epochs), so that every step has one shape;
    data smaller than one global batch are one smaller batch.
    """

    def __init__(self, length: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        self.length, self.seed, self.rank, self.world_size = length, seed, rank, world_size
        self.batch_size = min(batch_size, max(1, length // world_size))
        self.epoch, self._skip = 0, 0

    @property
    def batches(self) -> int:
        return self.length // (self.batch_size * self.world_size)

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning before each epoch."""
        if epoch != self.epoch:
            self.epoch, self._skip = epoch, 0

    def resume(self, epoch: int, batches_done: int) -> None:
        """Go on in `epoch` after its first `batches_done` batches: the next iteration leaves them out, once."""
        self.epoch, self._skip = epoch, batches_done

    def __iter__(self) -> Iterator[int]:
        skip, self._skip = self._skip, 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator)
        whole = order[: self.batches * self.batch_size * self.world_size]
        mine = whole.view(self.batches, self.world_size, self.batch_size)[skip:, self.rank]
        return iter(mine.flatten().tolist())


class OrderedDataModule(L.LightningDataModule):
    """A DataModule whose training data go on at the very batch where a checkpoint was written.

    A subclass sets `train_data` and `val_data` in `setup`: data sets whose `__getitems__` takes a list of indices and
    returns one batch, a dict of tensors with the samples' places under "index".

    Args:
        batch_size: samples per device and step.
        num_workers: loading processes per device; 0 where the data stand in memory.
        seed: of the order.
    """

    train_data: Dataset
    val_data: Dataset | None = None

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: at least one sample per step is needed")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._order: EpochOrder | None = None
        self._resumed: tuple[int, int] | None = None

    def train_dataloader(self) -> DataLoader:
        self._order = self._new_order()
        if self._resumed:
            self._order.resume(*self._resumed)
            self._resumed = None
        return self._loader(self.train_data, self._order, self._order.batch_size)

    def _new_order(self) -> EpochOrder:
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        return EpochOrder(len(self.train_data), self.batch_size, self.seed, rank, world_size)

    def val_dataloader(self) -> DataLoader | list:
        if self.val_data is None or len(self.val_data) == 0:
            return []
        return self._loader(self.val_data, None, self.batch_size)

    def _loader(self, data: Dataset, order: Sampler | None, batch_size: int) -> DataLoader:
        return DataLoader(
            data,
            batch_size,
            sampler=order,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
            worker_init_fn=_leave_interrupts,
        )

    def state_dict(self) -> dict[str, Any]:
        if self.trainer is None or self._order is None:
            return {}
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        # not trainer.current_epoch, which is one further once the hooks at an epoch's end have run
        epoch = self.trainer.fit_loop.epoch_progress.current.ready - 1
        if done >= self._order.batches:  # written after an epoch's last batch: the next one begins
            epoch, done = epoch + 1, 0
        return {"epoch": epoch, "batches_done": done, **self._what_orders(self._order)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            for name, here in self._what_orders(self._new_order()).items():
                if state_dict.get(name, here) != here:
                    raise UserError(
                        f"The checkpoint was written with {name} = {state_dict[name]:,}, here it is {here:,}: go on "
                        "with the data and settings of that run, or start anew without --resume"
                    )
            self._resumed = (state_dict["epoch"], state_dict["batches_done"])
            if self._order is not None:
                self._order.resume(*self._resumed)

    def _what_orders(self, order: EpochOrder) -> dict[str, int]:
        """What a place in the data means nothing without."""
        global_batch = order.batch_size * order.world_size
        return {"seed": self.seed, "samples": len(self.train_data), "samples per step": global_batch}


def _leave_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent finishes its step


def _as_it_is(batch: Any) -> Any:
    return batch
