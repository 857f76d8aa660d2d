"""An exponential moving average of a network's weights, warmed up so that short runs are not shown noise."""

import copy

import torch
from torch import nn


class EMA(nn.Module):
    """A copy of `network` whose weights follow it: average ← average + (1 − decay) · (weights − average).

    Args:
        network: the trained network alone, not what is frozen beside it.
        decay: reached after the warm-up; 0.9999 averages over the last 10,000 steps.

    What is frozen in `network` is shared with it, not copied: it equals its average.

    The decay at step n is min(decay, (1 + n) / (10 + n)): it follows from the step, so there is nothing to save but
    the average. Use `ema.network` for validation and sampling.
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
