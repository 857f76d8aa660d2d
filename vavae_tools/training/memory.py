"""Where memory runs out: which settings help; and the largest batch that fits, found by trying."""

import copy
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vavae_tools.runtime.console import log
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.machine import is_memory_fault, release_memory
from vavae_tools.runtime.ranks import current_ranks
from vavae_tools.training.devices import no_deterministic_form

HEADROOM = 0.08  # share of the memory that stays free: gaps between tensors, and batches of longer texts


@contextmanager
def memory_faults(batch_size: int | None, *about: Any, **more: Any) -> Iterator[None]:
    """Raise a `UserError` where memory runs out (see `memory_fault`) or an operation is not deterministic.

    What the block's functions held on the device is let go, so that a notebook can go on with other settings.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        line = memory_fault(error, batch_size, *about, **more) or no_deterministic_form(error)
        if line is None:
            raise
        for link in (error, error.__cause__, error.__context__):
            if link is not None:
                traceback.clear_frames(link.__traceback__)
        release_memory()
        raise UserError(line) from None


def memory_fault(
    error: BaseException,
    batch_size: int | None,
    gathered: int = 1,
    module: nn.Module | None = None,
    further: Sequence[str] = (),
    prefix: str = "train.",
) -> str | None:
    """Return the line to say where memory has run out; None for another error, or where no batch size is known.

    `gathered` batches make one step; `further` settings save memory besides; the settings' names begin with `prefix`,
    "" where they are a function's arguments.
    """
    if batch_size is None or not is_memory_fault(error):
        return None
    helps = []
    if batch_size > 1:
        batch, parts = keep_effective(batch_size * gathered, batch_size // 2)
        values = f"{prefix}batch_size={batch} {prefix}accumulate_grad_batches={parts}"
        helps.append(f"{values} (the same {batch_size * gathered} a step)")
    states = {getattr(part, "gradient_checkpointing", None) for part in module.modules()} if module is not None else {}
    if prefix and False in states and True not in states:
        helps.append(f"{prefix}gradient_checkpointing=true (a third more time)")
    helps = [*helps, *further] or ["a smaller model, smaller images, or several GPUs with --strategy fsdp"]
    small = f"The memory of {_memory_of(error)} is too small for batches of {batch_size}"
    return f"{small}. What helps: {', or '.join(helps)}"


def _memory_of(error: BaseException) -> str:
    if any(isinstance(link, MemoryError) or "CPUAllocator" in str(link) for link in (error, error.__cause__)):
        return "this machine"
    try:
        return f"{torch.cuda.get_device_name()} ({torch.cuda.mem_get_info()[1] / 2**30:.1f} GiB)"
    except (RuntimeError, AssertionError):  # an earlier fault of the card, or a torch without CUDA
        return "the GPU"


def keep_effective(effective: int, fitting: int) -> tuple[int, int]:
    """Return (batch, number of them gathered) whose product is the effective batch: its largest divisor that fits."""
    batch = next(size for size in range(max(1, min(effective, fitting)), 0, -1) if effective % size == 0)
    return batch, effective // batch


def fitting_batch_size(
    try_step: Callable[[int], None], start: int = 1, largest: int | None = None, device: torch.device | None = None
) -> int:
    """Return a batch for which `try_step` finds memory, less than a sixteenth below the largest one.

    It is doubled from `start`, or halved, then bisected. Random states are afterwards what they were. Of the memory of
    `device`, a GPU, `HEADROOM` is kept from the tries.
    """
    most = largest or 2**30
    size, fits, fails = max(1, min(start, most)), 0, None
    with isolate_rng(include_cuda=False), nullcontext() if device is None else _less_of(device):
        while fits < most and (fails is None or fails - fits > max(1, fits // 16)):
            try:
                try_step(size)
                fits = size
            except (RuntimeError, MemoryError) as error:
                if not is_memory_fault(error):
                    raise
                fails = size
            finally:
                release_memory()
            size = min(2 * fits, most) if fails is None else (fits + fails) // 2
    if not fits:
        help = "take a smaller model, smaller images or gradient checkpointing, or end what else runs on that card"
        raise UserError(f"Not even a batch of 1 fits into memory: {help}")
    return fits


@contextmanager
def _less_of(card: torch.device) -> Iterator[None]:
    """Keep `HEADROOM` of what a card has free, and its random state."""
    release_memory()
    free, total = torch.cuda.mem_get_info(card)
    usable = free + torch.cuda.memory_reserved(card)
    torch.cuda.set_per_process_memory_fraction(min(1.0, (1 - HEADROOM) * usable / total), card)
    try:
        with torch.random.fork_rng([card]):
            yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, card)


def find_batch_size(
    module: L.LightningModule,
    make_batch: Callable[[int], dict[str, Any]],
    settings: dict[str, Any],
    batch_size: int,
    largest: int | None = None,
    log: Callable[[str], None] = log,
) -> int:
    """Return the largest batch of which whole training steps fit into this GPU; the first process tries for all.

    Lightning's BatchSizeFinder refuses several processes and takes the data's own batches, which small data have not.
    The search begins at `batch_size`, which stays on a CPU, and ends at `largest`. `make_batch` returns a batch of a
    size as the training's own, with the longest text; it and the module are on the CPU.
    """
    if settings["accelerator"] != "gpu":
        log(f"auto batch size: a CPU's memory ends without an error to go by, so the batch stays {batch_size}")
        return batch_size
    ranks, found = current_ranks(), None
    if ranks.rank == 0:
        device = torch.device("cuda", ranks.local_rank)
        found = fitting_batch_size(whole_steps(module, make_batch, settings), batch_size, largest, device)
        log(f"auto batch size: {found} fit into {torch.cuda.get_device_name(device)}, {HEADROOM:.0%} of it kept free")
    return ranks.share("vavae batch size", found)


def whole_steps(
    module: L.LightningModule, make_batch: Callable[[int], dict[str, Any]], settings: dict[str, Any]
) -> Callable[[int], None]:
    """Return what `fitting_batch_size` tries: two steps of two batches each, on a copy, on the first device.

    In the second all is there that training holds, DDP's buckets of gradients too.
    """
    on_gpu, several = settings["accelerator"] == "gpu", settings["devices"] * settings["num_nodes"] > 1
    alone = {"devices": [0] if on_gpu else 1, "num_nodes": 1, "strategy": "auto"}
    short = {"accumulate_grad_batches": 2, "max_epochs": 1, "limit_val_batches": 0}
    silent = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}

    def try_step(size: int) -> None:
        tried = copy.deepcopy(module)
        bucket = sum(weight.nbytes for weight in tried.parameters() if weight.requires_grad) if several else 0
        kept = torch.empty(bucket, dtype=torch.uint8, device="cuda:0" if on_gpu else "cpu")
        trainer = L.Trainer(**{**settings, **alone, **short, **silent})
        trainer.fit(tried, DataLoader([make_batch(size)] * 4, batch_size=None))
        del kept

    return try_step


def of_size(batch: dict[str, Any], size: int) -> dict[str, Any]:
    """Return a batch of that many samples, the given one's over and over: tensors (B, …) → (size, …)."""
    return {
        name: value[torch.arange(size) % len(value)] if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
