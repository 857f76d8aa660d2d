"""How many are made at once, the same for all pipelines: as many as the memory takes, and fewer where it did not."""

import os
from collections.abc import Callable
from typing import TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import nn
from torch.distributed.tensor import DTensor

from vavae_tools.runtime.console import tell
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.machine import is_memory_fault, release_memory

Made = TypeVar("Made")
Pipeline = TypeVar("Pipeline", bound=DiffusionPipeline)


class Portions:
    """Makes any number in portions that fit, halved where memory runs out.

    Args:
        pipe: keeps as `fitting` what was found to fit, so that its next calls begin with that.
        batch_size: made at once, at most; None: as many as `default_batch_size` says.
        what: is made.

    Raises:
        UserError: a batch size below 1; when called, not even one fits.
    """

    def __init__(self, pipe: DiffusionPipeline, batch_size: int | None = None, what: str = "picture") -> None:
        if batch_size is not None and batch_size < 1:
            raise UserError(f"batch_size {batch_size}: at least one {what} at once is needed")
        self.pipe, self.what = pipe, what
        at_once = default_batch_size(pipe) if batch_size is None else batch_size
        self.at_once = min(at_once, getattr(pipe, "fitting", at_once))

    def __call__(
        self, count: int, make: Callable[[slice], Made], done: Callable[[int], object] = lambda rows: None
    ) -> list[Made]:
        """What `make` makes of all portions of `count` rows; `done` is told how many each of them had."""
        made, start = [], 0
        while start < count:
            rows = slice(start, min(start + self.at_once, count))
            try:
                made.append(make(rows))
            except Exception as error:
                if not is_memory_fault(error) or _is_shared(self.pipe):  # whose other processes are in its midst
                    raise
                fits = False
            else:
                fits = True
            if not fits:  # outside of `except`, whose traceback holds what is to be freed
                self._take_fewer(rows.stop - rows.start)
                continue
            start = rows.stop
            done(rows.stop - rows.start)
        return made

    def _take_fewer(self, tried: int) -> None:
        release_memory()
        memory = "GPU's memory" if self.pipe._execution_device.type == "cuda" else "memory"
        if tried == 1:
            where = "end what else runs there, or take a CPU" if "GPU" in memory else "end what else runs here"
            raise UserError(f"The {memory} is too small for one {self.what}: {where}")
        self.at_once = self.pipe.fitting = tried // 2
        tell(f"{tried} {self.what}s at once do not fit the {memory}: making {self.at_once}")


def placed(pipe: Pipeline, device: str | torch.device) -> Pipeline:
    """The pipeline, moved to a device.

    Raises:
        UserError: it has no room there.
    """
    try:
        return pipe.to(device)
    except Exception as error:
        if not is_memory_fault(error):
            raise
    weights = [
        weight for part in pipe.components.values() if isinstance(part, nn.Module) for weight in part.parameters()
    ]
    size = sum(weight.nbytes for weight in weights) / 2**30
    raise UserError(
        f"The models take {size:.1f} GiB, for which {device} has no room: end what else runs there, or take "
        "--accelerator cpu"
    )


def default_batch_size(pipe: DiffusionPipeline) -> int:
    """As many at once as have room beside what is there: a power of two, up to 256 on a GPU and 64 on a CPU."""
    device = pipe._execution_device
    if device.type == "cuda":
        release_memory()  # what this process keeps without need is free as well
        memory, most = 0.8 * torch.cuda.mem_get_info(device)[0], 256
    else:
        memory, most = 0.25 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 64
    fitting = int(memory // bytes_of_one(pipe))
    if _is_shared(pipe):  # its processes have to call it equally often
        least = torch.tensor(fitting, device=device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        fitting = int(least)
    return min(most, 1 << max(0, fitting.bit_length() - 1))


def _is_shared(pipe: DiffusionPipeline) -> bool:
    """Whether several processes hold parts of the denoiser's weights (FSDP)."""
    return any(isinstance(weight, DTensor) for weight in pipe.denoiser.parameters())


def bytes_of_one(pipe: DiffusionPipeline) -> int:
    """Memory that one picture, or text, takes while it is made: of the denoiser or the decoder, whichever needs more.

    A decoder of convolutions holds 7.5 arrays of its last level, which gets the channels of the one below, for every
    pixel (by a simulated allocator, within 15 % for f16d32, small and Stable Diffusion's). Under autocast it is as
    much: there are more of them, of half the size. A transformer holds about 20 numbers of its width for every token,
    and guidance makes two of one.
    """
    denoiser, vae = pipe.denoiser, getattr(pipe, "vae", None)
    widths = denoiser.config.hidden_size
    width = widths if isinstance(widths, int) else max(widths)
    needed = 2 * 20 * denoiser.rows * denoiser.columns * width * denoiser.dtype.itemsize
    if vae is None:
        return needed
    height, columns = pipe.picture_size
    if "block_out_channels" in vae.config:
        channels = vae.config.block_out_channels[:2]
        of_decoder = 7.5 * sum(channels) / len(channels) * height * columns
    else:
        tokens = height * columns / vae.downsampling**2
        of_decoder = 20 * tokens * vae.config.decoder_hidden_size
    return max(needed, int(of_decoder * vae.dtype.itemsize))
