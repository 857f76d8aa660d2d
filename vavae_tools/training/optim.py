"""An exponential moving average of a network's weights, warmed up so that short runs are not shown noise."""

import copy
import math
from typing import Any

import torch
from torch import nn

from vavae_tools.runtime.errors import UserError


class EMA(nn.Module):
    """A copy of `network` whose weights follow it: average ← average + (1 − decay) · (weights − average).

    What is frozen in `network` is shared with it, not copied. The decay at step n is min(decay, (1 + n) / (10 + n)): it
    follows from the step, so there is nothing to save but the average.
    """

    def __init__(self, network: nn.Module, decay: float = 0.9999) -> None:
        super().__init__()
        self.decay = decay
        frozen = {id(weight): weight for weight in network.parameters() if not weight.requires_grad}
        self.network = copy.deepcopy(network, frozen).requires_grad_(False).eval()

    def decay_at(self, step: int) -> float:
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Follow `network` after optimiser step `step` (1, 2, …); one fused operation for all weights."""
        pairs = zip(self.network.parameters(), network.parameters(), strict=True)
        pairs = [(mine, theirs.detach()) for mine, theirs in pairs if mine is not theirs]
        average, weights = map(list, zip(*pairs, strict=True))
        torch._foreach_lerp_(average, weights, 1.0 - self.decay_at(step))
        for mine, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)

    def train(self, mode: bool = True) -> "EMA":
        return super().train(False)  # the average is never trained, whatever the module around it does


DECAYS = ("cosine", "linear", "constant")


def with_warmup(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: float, decay: str = "cosine"
) -> dict[str, Any]:
    """Return an optimiser and its rate's schedule, as a LightningModule's `configure_optimizers` returns them.

    Warm-up is linear and takes at most a tenth of all steps; then the rate decays to zero along half a "cosine" or
    "linear", or stays ("constant", or without an end: `total_steps` of inf).
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
