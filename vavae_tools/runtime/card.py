"""What a card needs before it is used: settings that torch and CUDA read as they begin, and room in its memory."""

import os
import sys
from collections.abc import MutableMapping

from vavae_tools.runtime.errors import UserError

LEAST_ROOM = 2**30
"""Bytes: less than CUDA's context, its libraries' workspaces and the smallest training take."""
_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Newer and older versions of torch read them."""


def prepare_environment(environment: MutableMapping[str, str] = os.environ, platform: str = sys.platform) -> None:
    """Set what torch and CUDA read as they begin, where the user has not: this package does so when it is imported.

    Segments that grow leave no gaps that are too small for the next tensor, so that batches and previews of other sizes
    do not add up; Windows has none. cuBLAS gets workspaces with which it computes the same each time: `deterministic`
    asks for them when the card has long been in use. They take 32 MiB, on cards before Hopper 24 more than by default.
    """
    if platform == "linux" and not any(name in environment for name in _ALLOCATOR):
        environment.update(dict.fromkeys(_ALLOCATOR, "expandable_segments:True"))
    environment.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def take_card(number: int = 0) -> None:
    """Let "cuda" mean this card in this process, and look whether there is room; nothing happens without one.

    Raises:
        UserError: less than `LEAST_ROOM` is free beside what this process holds, or another process keeps the card.
    """
    import torch

    if not torch.cuda.is_available() or number >= torch.cuda.device_count():
        return
    try:
        if number:
            torch.cuda.set_device(number)
        free, total = torch.cuda.mem_get_info(number)
        room = free + torch.cuda.memory_reserved(number)
        what = f"{free / 2**30:.1f} of its {total / 2**30:.1f} GiB free"
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        if not any(word in reason.lower() for word in ("out of memory", "busy")):
            raise
        room, what = 0, f"no room for this process ({reason})"
    if room < LEAST_ROOM:
        raise UserError(
            f"GPU {number} has {what}: another process holds it, such as a notebook's other kernel or a run that "
            "still goes on (nvidia-smi names it). End that one, or restart the notebook's kernels, and try again"
        )
