"""How a batch is made: as many at once as the memory takes, in half precision where the device has it.

Half precision is by autocast, so that norms, softmax, the solver's state and guidance stay float32.
"""

import math
import os
from collections.abc import Callable
from typing import TypeVar

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor
from torch.distributed.tensor import DTensor

from vavae_tools.runtime import machine
from vavae_tools.runtime.console import print_beside_bars
from vavae_tools.runtime.errors import UserError

Made = TypeVar("Made")
_OF_WEIGHTS = {kind: name for name, kind in machine.HALF_DTYPES.items()}


# ---- how many at once
def in_batches(
    pipe: DiffusionPipeline,
    count: int,
    make: Callable[[slice], Made],
    batch_size: int | None = None,
    done: Callable[[int], object] = lambda rows: None,
) -> list[Made]:
    """Return what `make` makes of `count` rows, batch by batch, halved where memory runs out (then `pipe.fitting`)."""
    at_once, made, start = batch_size_for(pipe, batch_size), [], 0
    while start < count:
        size = min(at_once, count - start)
        try:
            made.append(make(slice(start, start + size)))
            start += size
            done(size)
            continue
        except Exception as error:
            if not machine.is_memory_fault(error) or _is_sharded(pipe):  # whose other processes are in its midst
                raise
        machine.release_memory()  # outside of `except`, whose traceback holds what is to be freed
        if size == 1:
            raise UserError(f"The memory is too small for one {pipe.makes}: end what else runs, or change the device")
        at_once = pipe.fitting = size // 2
        print_beside_bars(f"{size} {pipe.makes}s at once do not fit the memory: making {at_once}")
    return made


def batch_size_for(pipe: DiffusionPipeline, batch_size: int | None = None) -> int:
    """Return how many are made at once: as asked or as have room, and no more than was found to fit before."""
    if batch_size is not None and batch_size < 1:
        raise UserError(f"batch_size {batch_size}: at least one {pipe.makes} at once is needed")
    at_once = _with_room(pipe) if batch_size is None else batch_size
    return min(at_once, getattr(pipe, "fitting", at_once))


def move_to_device(pipe: DiffusionPipeline, device: str | torch.device) -> DiffusionPipeline:
    """Return the pipeline, moved to a device; `UserError` if it has no room there."""
    try:
        return pipe.to(device)
    except Exception as error:
        if not machine.is_memory_fault(error):
            raise
    raise UserError(f"{device} has no room for the models: end what else runs there, or take --accelerator cpu")


def _with_room(pipe: DiffusionPipeline) -> int:
    """Return a power of two, up to 256 on a GPU and 64 on a CPU."""
    if _is_sharded(pipe):  # its processes have to call it equally often
        return 16
    memory, most = 0.25 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), 64
    if pipe._execution_device.type == "cuda":
        machine.release_memory()  # what this process keeps without need is free as well
        memory, most = 0.8 * torch.cuda.mem_get_info(pipe._execution_device)[0], 256
    return min(most, 1 << max(0, int(memory // _bytes_of_one(pipe)).bit_length() - 1))


def _is_sharded(pipe: DiffusionPipeline) -> bool:
    return any(isinstance(weight, DTensor) for weight in pipe.denoiser.parameters())  # among processes (FSDP)


def _bytes_of_one(pipe: DiffusionPipeline) -> int:
    """Return the memory that one image, or text, takes in the denoiser or the decoder, whichever needs more.

    By a simulated allocator, within 15 %: a decoder of convolutions holds 7.5 arrays of its last level, which gets the
    channels of the one below, for every pixel; a transformer 20 numbers of its width for every token, twice if guided.
    """
    denoiser, vae = pipe.denoiser, getattr(pipe, "vae", None)
    width = np.max(denoiser.config.hidden_size)  # of a DDT's two
    of_denoiser = 2 * 20 * denoiser.rows * denoiser.columns * width * denoiser.dtype.itemsize
    if vae is None:
        return int(of_denoiser)
    if "block_out_channels" in vae.config:
        numbers = 7.5 * np.mean(vae.config.block_out_channels[:2]) * math.prod(pipe.image_size)
    else:
        numbers = 20 * math.prod(pipe.image_size) / vae.downsampling**2 * vae.config.decoder_hidden_size
    return int(max(of_denoiser, numbers * vae.dtype.itemsize))


# ---- in which precision
def precision_for(pipe: DiffusionPipeline, name: str | None = None) -> str:
    """Return the precision to compute in: the named one, that of half weights, or the machine's."""
    of_weights = _OF_WEIGHTS.get(pipe.denoiser.dtype)
    if name is None and of_weights:
        return of_weights
    found = machine.precision_on(machine.machine_of(pipe._execution_device), name)
    if found == "32" and of_weights:
        weights = machine.PRECISIONS[of_weights]
        raise UserError(f"precision 32, but the weights are {weights}: take pipe.to(torch.float32) first")
    return found


def all_finite(
    pipe: DiffusionPipeline, count: int, precision: str, make: Callable[[Tensor], Tensor], what: str
) -> Tensor:
    """Return what `make` makes of rows 0 … count − 1, (B, …); those that are not finite are made again in float32."""
    device, half_weights = pipe._execution_device, pipe.denoiser.dtype in _OF_WEIGHTS
    with machine.computing_in(precision, device):
        made = make(torch.arange(count, device=device))
    lost = _not_finite(made)
    if len(lost) and precision != "32" and not half_weights:
        said = vars(pipe).setdefault("said_not_finite", set())
        if what not in said:  # the first time
            said.add(what)
            found = f"{len(lost)} of {count} {what} are not finite in {machine.PRECISIONS[precision]}"
            print_beside_bars(f"{found}: such ones are made again in float32")
        precision = "32"
        with machine.computing_in(precision, device):
            made[lost] = make(lost).to(made.dtype)
        lost = _not_finite(made)
    if len(lost):
        help = "take pipe.to(torch.float32)" if half_weights else "the weights are ruined, take an earlier checkpoint"
        raise UserError(f"{len(lost)} of {count} {what} are not finite in {machine.PRECISIONS[precision]}: {help}")
    return made


def _not_finite(made: Tensor) -> Tensor:
    """Return the rows that hold NaN or infinity. This waits for a GPU, once a batch."""
    return (~made.isfinite().flatten(1).all(1)).nonzero().flatten()


def decoded(pipe: DiffusionPipeline, latents: Tensor, precision: str, labels: Tensor | None = None) -> Tensor:
    """Return images near [-1, 1], all finite, of latents (B, C, h, w) that were made in a precision."""
    half = precision != "32" and pipe._execution_device.type == "cuda"
    if half:
        machine.for_inference(pipe.vae, pipe._execution_device)

    def decode(rows: Tensor) -> Tensor:
        return pipe.vae.decode_latents(latents[rows], None if labels is None else labels[rows])

    # on any card in fp16: it has 10 bits, of which bf16 has 7 and an image needs 8
    return all_finite(pipe, len(latents), "16" if half else "32", decode, "images")
