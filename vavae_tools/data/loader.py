"""The order of the training data, which can be resumed at any batch, and the processes that load them."""

import os
import re
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.machine import find_device

_WORKER_ENDED = re.compile(
    r"DataLoader worker .*(?:killed by signal: ([\w ]+)|exited unexpectedly)|unable to [\w ]*(?:shared memory|</torch_)"
)


def loading_workers() -> int:
    return min(4, usable_cores() // local_world_size())  # four decode and crop some 1,100 images of 500×375 a second


def local_world_size() -> int:
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@contextmanager
def loader_faults() -> Iterator[None]:
    """Raise a UserError of one line where a DataLoader's process was killed or raised a UserError."""
    try:
        yield
    except UserError as error:  # torch puts the loading process's traceback before the message
        if not str(error).startswith("Caught UserError in DataLoader worker"):
            raise
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from None
    except RuntimeError as error:
        text = " ".join(str(link) for link in (error, error.__cause__, error.__context__) if link is not None)
        if not (match := _WORKER_ENDED.search(text)):
            raise
        how = f"was ended by signal {match[1]}" if match[1] else "ended"
        hint = "set num_workers=0 or a smaller number, or start the container with --shm-size=8g"
        raise UserError(f"A loading process {how}, mostly because memory or /dev/shm ran out: {hint}") from None


class EpochOrder(Sampler[int]):
    """Indices of one process, epoch by epoch; the order of epoch e follows from (seed, e).

    Every global batch is cut into equal parts for the ranks, so that their union does not depend on `world_size` when
    `batch_size · world_size` stays the same. An epoch holds whole global batches only (its rest comes up in others) and
    whole steps of `gathered` batches, if there is one; data smaller than one global batch are one smaller batch.
    """

    def __init__(
        self, length: int, batch_size: int, seed: int = 0, rank: int = 0, world_size: int = 1, gathered: int = 1
    ) -> None:
        self.length, self.seed, self.rank, self.world_size, self.gathered = length, seed, rank, world_size, gathered
        self.batch_size = min(batch_size, max(1, length // world_size))
        self.epoch, self._skip = 0, 0

    @property
    def batches(self) -> int:
        found = self.length // (self.batch_size * self.world_size)
        return found // self.gathered * self.gathered or found

    def __len__(self) -> int:
        return self.batches * self.batch_size

    def set_epoch(self, epoch: int) -> None:
        if epoch != self.epoch:
            self.epoch, self._skip = epoch, 0

    def resume(self, epoch: int, batches_done: int) -> None:
        """Leave the first `batches_done` batches of `epoch` out of the next iteration, once."""
        self.epoch, self._skip = epoch, batches_done

    def __iter__(self) -> Iterator[int]:
        skip, self._skip = self._skip, 0
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(self.length, generator=generator)
        whole = order[: self.batches * self.batch_size * self.world_size]
        mine = whole.view(self.batches, self.world_size, self.batch_size)[skip:, self.rank]
        return iter(mine.flatten().tolist())


def index_and_number(indices: Sequence[int | tuple[int, int]]) -> tuple[list[int], list[int]]:
    """Return the indices and the numbers of captions that `captions.CaptionOrder` gives; a plain index has number 0."""
    pairs = [pair if isinstance(pair, tuple) else (int(pair), 0) for pair in indices]
    return [index for index, _ in pairs], [number for _, number in pairs]


def batches_in_order(length: int, batch_size: int, rank: int = 0, world_size: int = 1) -> list[list[int]]:
    """Return one process's batches for validation, where each sample comes once, in order.

    Every process has as many batches as any other, none empty: nearly equal parts of at most `batch_size` samples (of
    one or two for 1), dealt out in turn. Of fewer samples than processes each has all, so that the mean stays right.

    >>> batches_in_order(7, 3), batches_in_order(7, 3, 0, 2), batches_in_order(7, 3, 1, 2)
    ([[0, 1, 2], [3, 4, 5], [6]], [[0], [3, 4]], [[1, 2], [5, 6]])
    """
    if world_size == 1 or length < world_size:
        return [list(range(start, min(start + batch_size, length))) for start in range(0, length, batch_size)]
    of_each = min(-(-length // (batch_size * world_size)), length // world_size)
    ends = [length * part // (of_each * world_size) for part in range(of_each * world_size + 1)]
    return [list(range(*ends[part : part + 2])) for part in range(rank, of_each * world_size, world_size)]


class OrderedDataModule(L.LightningDataModule):
    """A DataModule whose training data resume at the very batch where a checkpoint was written.

    Lightning restores the epoch and the batch of a run, but not its place in the data. A subclass sets `train_data` and
    `val_data`: data sets whose `get_batch` takes a list of indices and returns one batch, a dict of tensors with the
    samples' places under "index". `batch_size` and `num_workers` are those of each device.
    """

    train_data: Dataset
    val_data: Dataset | None = None
    persistent_workers = True
    prefetch_factor = 2
    gathered = 1  # see `EpochOrder`
    notes: Sequence[str] = ()  # what is to be said of the data
    kept = 1  # so many batches are gathered where the run had one, on more devices

    def __init__(self, batch_size: int, num_workers: int = 0, seed: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size}: at least one sample per step is needed")
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self._order: EpochOrder | None = None
        self._resumed: tuple[int, int] | None = None

    @property
    def shown_data(self) -> Dataset:
        """Return what validates, or else what is trained on."""
        return self.train_data if self.val_data is None else self.val_data

    def batches_of(self, world_size: int) -> int:
        return self._new_order(0, world_size).batches

    def keep_batch(self, checkpoint: dict[str, Any], processes: int) -> int:
        """Return how many batches are to be gathered where a checkpoint's run had one, for steps of its samples."""
        if (state := _place_in_data(checkpoint)) is None:
            return 1
        there, here = state["samples per step"], self._new_order(0, processes).batch_size * processes
        if there % here:
            take = f"--batch_size {there // processes}" if there % processes == 0 else "as many --devices as it had"
            found = f"The checkpoint's run has steps of {there:,} images, here they are of {here:,}"
            raise UserError(f"{found}: take {take}")
        self.kept = there // here
        self.gathered *= self.kept
        self._check_place(state, self._new_order(0, processes))
        return self.kept

    def _check_place(self, state: dict[str, int], order: EpochOrder) -> None:
        for name, here in self._order_settings(order).items():
            if state.get(name, here) != here:
                problem = f"The checkpoint was written with {name} = {state[name]:,}, here it is {here:,}"
                raise UserError(f"{problem}: resume with the data and settings of that run, or start anew")

    def read_progress(self, checkpoint: dict[str, Any]) -> None:
        """Bring the progress of Lightning's loops in a checkpoint, in batches, to the batches of here."""
        progress = checkpoint["loops"]["fit_loop"].get("epoch_loop.batch_progress")
        state = _place_in_data(checkpoint)
        for counts in (progress["current"], progress["total"]) if progress and state else ():
            counts.update({name: count * self.kept // state.get("kept", 1) for name, count in counts.items()})

    def train_dataloader(self) -> DataLoader:
        self._order = self._new_order(*self._place())
        if self._resumed:
            self._order.resume(*self._resumed)
            self._resumed = None
        return self._loader(self.train_data, self._order, self._order.batch_size)

    def _new_order(self, rank: int, world_size: int) -> EpochOrder:
        return EpochOrder(len(self.train_data), self.batch_size, self.seed, rank, world_size, self.gathered)

    def _place(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def val_dataloader(self) -> DataLoader | list:
        if self.val_data is None or len(self.val_data) == 0:
            return []
        batches = batches_in_order(len(self.val_data), self.batch_size, *self._place())
        return self._loader(self.val_data, batches, self.batch_size)

    def _loader(self, data: Dataset, order: Sampler | list[list[int]], batch_size: int) -> DataLoader:
        given = {"batch_sampler": order} if isinstance(order, list) else {"sampler": order, "batch_size": batch_size}
        return DataLoader(
            in_batches(data),
            **given,
            num_workers=self.num_workers,
            collate_fn=identity_collate,
            pin_memory=find_device() == "cuda",  # not for a card that this torch cannot use
            persistent_workers=self.persistent_workers and self.num_workers > 0,
            prefetch_factor=self.prefetch_factor if self.num_workers > 0 else None,
            worker_init_fn=ignore_interrupts,
        )

    def state_dict(self) -> dict[str, Any]:
        if self.trainer is None or self._order is None:
            return {}
        done = self.trainer.fit_loop.epoch_loop.batch_progress.current.processed
        # not trainer.current_epoch, which is one further once the hooks at an epoch's end have run
        epoch = self.trainer.fit_loop.epoch_progress.current.ready - 1
        if done >= self._order.batches:  # written after an epoch's last batch: the next one begins
            epoch, done = epoch + 1, 0
        done //= self.kept
        return {"epoch": epoch, "batches_done": done, "kept": self.kept, **self._order_settings(self._order)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict:
            self._check_place(state_dict, self._new_order(*self._place()))
            self._resumed = (state_dict["epoch"], state_dict["batches_done"] * self.kept)
            if self._order is not None:
                self._order.resume(*self._resumed)

    def _order_settings(self, order: EpochOrder) -> dict[str, int]:
        """Return what a place in the data means nothing without."""
        global_batch = order.batch_size * order.world_size * self.kept
        return {"seed": self.seed, "samples": len(self.train_data), "samples per step": global_batch}


def _place_in_data(checkpoint: dict[str, Any]) -> dict[str, int] | None:
    states = (state for state in checkpoint.values() if isinstance(state, dict) and "samples per step" in state)
    return next(states, None)


class Batched(Dataset):
    """A data set with `get_batch`; on its own it gives samples, as torch's own DataLoader asks for them."""

    def __getitem__(self, index: Any) -> dict[str, Any]:
        return {name: value[0] for name, value in self.get_batch([index]).items()}


class _InBatches(Dataset):
    def __init__(self, data: Dataset) -> None:
        self.data = data

    def __len__(self) -> int:
        return len(self.data)

    def __getitems__(self, indices: Sequence[Any]) -> Any:
        return self.data.get_batch(indices)


def in_batches(data: Any) -> Any:
    """Return what a DataLoader with `identity_collate` reads whole batches of."""
    return _InBatches(data) if hasattr(data, "get_batch") else data


def ignore_interrupts(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group: the parent finishes its step


def identity_collate(batch: Any) -> Any:
    return batch
