"""How the learning rate goes: up during warm-up, then down along a curve."""

import math
from typing import Any

import torch

from vavae_tools.errors import UserError

DECAYS = ("cosine", "linear", "constant")


def warmed_up(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: float, decay: str = "cosine"
) -> dict[str, Any]:
    """Linear warm-up, then to zero along half a cosine or a line, counted in optimiser steps.

    Args:
        warmup_steps: at most a tenth of all steps are taken.
        total_steps: of the whole training; without an end (inf) the rate stays.
        decay: "cosine", "linear", or "constant", which stays.

    Returns:
        What a LightningModule's `configure_optimizers` returns.
    """
    if decay not in DECAYS:
        raise UserError(f"schedule {decay!r} is unknown; there are {', '.join(DECAYS)}")
    warmup_steps = min(warmup_steps, total_steps / 10)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if math.isinf(total_steps) or decay == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return 1 - progress if decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
