"""The weights of DiT (Peebles & Xie 2023, facebookresearch/DiT) → our DiT and ClassConditioner."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.factory import make_denoiser, split_reference_arguments
from vavae_tools.diffusion.transformer import DiT
from vavae_tools.published.lightningdit import with_weights

REFERENCE_DEFAULTS = {
    "input_size": 32,
    "patch_size": 2,
    "in_channels": 4,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "learn_sigma": True,
}
PLAIN = {"swiglu": False, "rope": False, "rms_norm": False}  # GELU, fixed positions alone, LayerNorm


class PlainDiT(nn.Module):
    """The two parts of the published model behind its own calls: timesteps 0 … 999, noise and variance predicted.

    Its noise follows another schedule than ours, so its denoiser's `forward` is no velocity; `predict` is what it says.
    """

    def __init__(self, denoiser: DiT, conditioner: ClassConditioner) -> None:
        super().__init__()
        self.denoiser, self.conditioner = denoiser, conditioner

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """x (B, C, h, w), timesteps t (B,), labels y (B,) → (B, 2·C, h, w); (B, C, h, w) without learn_sigma."""
        return self.denoiser.predict(x, t, self.conditioner(y))

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """The batch is [conditional | null] with the first half's x for both; only three channels are guided."""
        half = x[: len(x) // 2]
        out = self(torch.cat([half, half]), t, y)
        conditional, null = out[:, :3].chunk(2)
        guided = null + cfg_scale * (conditional - null)
        return torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1)


def load_dit(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> PlainDiT:
    """Our models with the reference's weights, in eval mode; the defaults are those of its constructor, DiT-XL/2."""
    denoiser, conditioner = split_reference_arguments({**REFERENCE_DEFAULTS, **config})
    return with_weights(PlainDiT(make_denoiser({**PLAIN, **denoiser}), ClassConditioner(**conditioner)), state_dict)
