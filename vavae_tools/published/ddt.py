"""The weights of RAE's denoiser with a wide head, DiT^DH (Zheng et al. 2025) → our DDT and ClassConditioner."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.ddt import DDT
from vavae_tools.diffusion.factory import make_denoiser, split_reference_arguments
from vavae_tools.published.lightningdit import Interval, guided_between, with_weights

REFERENCE_DEFAULTS = {"input_size": 1, "hidden_size": (1152, 2048), "depth": (28, 2), "num_heads": (16, 16)}


class DiTDH(nn.Module):
    """The two parts of the published model behind its own calls: t is the share of noise, the answer noise − data."""

    def __init__(self, denoiser: DDT, conditioner: ClassConditioner) -> None:
        super().__init__()
        self.denoiser, self.conditioner = denoiser, conditioner

    def forward(self, x: Tensor, t: Tensor, y: Tensor, s: Tensor | None = None) -> Tensor:
        """x (B, C, h, w), t (B,), labels y (B,), and perhaps the encoder's answer s (B, N, D) → (B, C, h, w)."""
        return self.denoiser.predict(x, t, self.conditioner(y), s)

    def forward_with_cfg(
        self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float, cfg_interval: Interval = (0, 1)
    ) -> Tensor:
        """The batch is [conditional | null] with the first half's x for both; returns [guided | guided]."""
        half = x[: len(x) // 2]
        conditional, null = self(torch.cat([half, half]), t, y).chunk(2)
        guided = guided_between(conditional, null, t[: len(half)], cfg_scale, cfg_interval)
        return torch.cat([guided, guided])

    def forward_with_autoguidance(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        additional_model_forward: Callable[..., Tensor],
        cfg_interval: Interval = (0, 1),
    ) -> Tensor:
        """The whole batch, guided away from what a weaker model's forward says (Karras et al. 2024)."""
        weak = additional_model_forward(x, t, y)[:, : self.denoiser.in_channels]
        return guided_between(self(x, t, y), weak, t, cfg_scale, cfg_interval)


def load_ddt(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> DiTDH:
    """Our models with the reference's weights, in eval mode; the defaults are those of its constructor.

    Args:
        state_dict: flat, or a checkpoint's {"ema": …} or {"model": …}.
        config: the reference's constructor arguments, under its names or ours.
    """
    denoiser, conditioner = split_reference_arguments({**REFERENCE_DEFAULTS, **config})
    return with_weights(DiTDH(make_denoiser(denoiser), ClassConditioner(**conditioner)), state_dict)
