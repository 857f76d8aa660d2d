"""In which precision a pipeline computes, and what is done where its numbers overflow there.

By autocast, so that norms and softmax stay float32, as do the solver's state and guidance (`sampling`). Pictures are
decoded in fp16 on any card: it has 10 bits, of which bf16 has 7 and a picture needs 8.
"""

from collections.abc import Callable

from diffusers import DiffusionPipeline
from torch import Tensor

from vavae_tools.runtime.console import tell
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.machine import machine_of
from vavae_tools.runtime.precision import HALF, PRECISIONS, computing_in, for_inference, precision_on

_OF_WEIGHTS = {kind: name for name, kind in HALF.items()}


def precisions_for(pipe: DiffusionPipeline, name: str | None = None) -> list[str]:
    """The precision to compute in, and, where none is named, behind it those that would do as well.

    That is the weights' own where they are half (`pipe.to(torch.float16)`), else the machine's (`precision_on`).

    Raises:
        UserError: a precision that there is not, or that this machine or these weights do not have.
    """
    machine, of_weights = machine_of(pipe._execution_device), _OF_WEIGHTS.get(pipe.denoiser.dtype)
    if name is None and of_weights:
        return [of_weights]
    first = precision_on(machine, name)
    if first == "32" and of_weights:
        raise UserError(
            f"precision 32, but the weights are {PRECISIONS[of_weights]}: take pipe.to(torch.float32) first, or leave "
            "the precision out"
        )
    if name is not None:
        return [first]
    slow = {"cpu": "16", "t4": "bf16"}.get(machine.kind)
    return [first, *(other for other in PRECISIONS if other not in (first, slow))]


def all_finite(
    pipe: DiffusionPipeline,
    count: int,
    precision: str,
    make: Callable[[slice | Tensor], Tensor],
    what: str = "pictures",
    say: Callable[[str], None] = tell,
) -> Tensor:
    """What `make` makes of `count` rows in a precision; rows of it that are not finite, again in float32.

    Args:
        make: some of the rows → (B, …).

    Raises:
        UserError: numbers that are none in the weights' own precision.
    """
    device, called = pipe._execution_device, PRECISIONS[precision]
    with computing_in(precision, device):
        made = make(slice(None))
    lost = _not_finite(made)
    if len(lost) and precision != "32" and pipe.denoiser.dtype not in _OF_WEIGHTS:
        said = vars(pipe).setdefault("said_not_finite", set())
        if what not in said:  # the first time
            said.add(what)
            say(f"{len(lost)} of {count} {what} are not finite in {called}: such ones are made again in float32")
        with computing_in("32", device):
            made[lost] = make(lost).to(made.dtype)
        lost, called = _not_finite(made), "float32"
    if len(lost):
        mend = "the weights are ruined, take an earlier checkpoint"
        if pipe.denoiser.dtype in _OF_WEIGHTS:
            mend = "take pipe.to(torch.float32)"
        raise UserError(f"{len(lost)} of {count} {what} are not finite in {called}: {mend}")
    return made


def decoded(pipe: DiffusionPipeline, latents: Tensor, precision: str, labels: Tensor | None = None) -> Tensor:
    """Pictures near [-1, 1], all finite, of latents (B, C, h, w) that were made in a precision."""
    device = pipe._execution_device
    half = precision != "32" and device.type == "cuda"
    if half:
        for_inference(pipe.vae, device)

    def decode(rows: slice | Tensor) -> Tensor:
        return pipe.vae.decode_latents(latents[rows], None if labels is None else labels[rows])

    return all_finite(pipe, len(latents), "16" if half else "32", decode, "pictures")


def _not_finite(made: Tensor) -> Tensor:
    """The rows that hold NaN or infinity. This waits for a GPU, once a batch."""
    return (~made.isfinite().flatten(1).all(1)).nonzero().flatten()
