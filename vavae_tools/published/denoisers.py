"""Published denoisers → our DiT or DDT and a ClassConditioner, called as the reference's own model is.

LightningDiT (Yao & Wang 2025), RAE's LightningDiT and DiT^DH (Zheng et al. 2025), DiT (Peebles & Xie 2023).
"""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vavae_tools.checkpoints.formats import plain_name
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DDT, DiT, make_denoiser, split_reference_arguments
from vavae_tools.diffusion.objectives import expand_time
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import read_saved

_XL = {"hidden_size": 1152, "depth": 28, "num_heads": 16}
LIGHTNINGDIT_DEFAULTS = {"input_size": 32, "patch_size": 2, **_XL}
LIGHTNINGDIT_DEFAULTS |= {"use_swiglu": False, "use_rope": False, "use_rmsnorm": False}
RAE_LIGHTNINGDIT_DEFAULTS = {"in_channels": 768, **_XL}
DDT_DEFAULTS = {"input_size": 1, "hidden_size": (1152, 2048), "depth": (28, 2), "num_heads": (16, 16)}
DIT_DEFAULTS = {"input_size": 32, "patch_size": 2, "in_channels": 4, **_XL, "learn_sigma": True}
DIT_DEFAULTS |= {"swiglu": False, "rope": False, "rms_norm": False}

TABLES = ("pos_embed", "feat_rope.", "enc_feat_rope.", "dec_feat_rope.")  # fixed, computed by our constructors

Interval = tuple[float, float]


class PublishedDenoiser(nn.Module):
    """A denoiser and a conditioner as one model: x (B, C, h, w), t (B,), labels y (B,) → what the network predicts.

    Time and sign are the reference's. Batches of `forward_with_cfg` are [conditional | null], of the first half's x.
    """

    def __init__(self, denoiser: DiT | DDT, conditioner: ClassConditioner) -> None:
        super().__init__()
        self.denoiser, self.conditioner = denoiser, conditioner

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.denoiser.predict(x, t, self.conditioner(y))

    def _twice(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        half = x[: len(x) // 2]
        return self(torch.cat([half, half]), t, y)


class PlainDiT(PublishedDenoiser):
    """DiT's: timesteps 0 … 999, noise and variance predicted, (B, 2·C, h, w); (B, C, h, w) without learn_sigma."""

    def forward_with_cfg(self, x: Tensor, t: Tensor, y: Tensor, cfg_scale: float) -> Tensor:
        """Return [guided | guided]; only three channels are guided."""
        out = self._twice(x, t, y)
        conditional, null = out[:, :3].chunk(2)
        guided = null + cfg_scale * (conditional - null)
        return torch.cat([torch.cat([guided, guided]), out[:, 3:]], dim=1)


class LightningDiT(PublishedDenoiser):
    """LightningDiT's: a velocity; t = 1 is data."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return super().forward(x, t, y)[:, : self.denoiser.in_channels]


class RAELightningDiT(LightningDiT):
    """RAE's: t is the share of noise, the answer noise − data.

    Its guidance takes a list of intervals *in* which another scale holds (`interval_cfg`; up to 1: none), t[0] deciding
    for the batch. One interval (min, max), which RAE's sampling passes and its model cannot take, is that of DiT^DH:
    guidance is for the times inside.
    """

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        cfg_interval: Sequence[Interval] | Interval = (),
        interval_cfg: float = 0.0,
    ) -> Tensor:
        """Return [guided | guided]."""
        conditional, null = self._twice(x, t, y).chunk(2)
        return _guided_by_list(conditional, null, t[: len(x) // 2], cfg_scale, cfg_interval, interval_cfg)

    def forward_with_autoguidance(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        additional_model_forward: Callable[..., Tensor],
        cfg_interval: Sequence[Interval] | Interval = (),
        interval_cfg: float = 0.0,
    ) -> Tensor:
        """Return [guided | guided] for the first half of the batch."""
        x, t, y = (part[: len(x) // 2] for part in (x, t, y))
        weak = additional_model_forward(x, t, y)[:, : self.denoiser.in_channels]
        return _guided_by_list(self(x, t, y), weak, t, cfg_scale, cfg_interval, interval_cfg)


class DiTDH(RAELightningDiT):
    """DiT^DH's, in the same convention; its autoguidance (Karras et al. 2024) is of the whole batch."""

    def forward(self, x: Tensor, t: Tensor, y: Tensor, s: Tensor | None = None) -> Tensor:
        """With the encoder's answer s (B, N, D) only the head is computed."""
        return self.denoiser.predict(x, t, self.conditioner(y), s)

    def forward_with_autoguidance(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        additional_model_forward: Callable[..., Tensor],
        cfg_interval: Interval = (0, 1),
    ) -> Tensor:
        weak = additional_model_forward(x, t, y)[:, : self.denoiser.in_channels]
        return _guided_between(self(x, t, y), weak, t, cfg_scale, cfg_interval)


def _guided_between(strong: Tensor, weak: Tensor, t: Tensor, scale: float, interval: Interval) -> Tensor:
    """weak + scale · (strong − weak) for the samples with start ≤ t ≤ end, `strong` for the others."""
    start, end = interval
    if not start < end:
        raise UserError(f"cfg_interval is ({start:g}, {end:g}), expected (min, max) with min < max.")
    inside = expand_time((t >= start) & (t <= end), strong)
    return torch.where(inside, weak + scale * (strong - weak), strong)


def _guided_by_list(
    strong: Tensor, weak: Tensor, t: Tensor, scale: float, interval: Sequence[Interval], interval_scale: float
) -> Tensor:
    if len(interval) == 2 and not isinstance(interval[0], Sequence):
        guided = _guided_between(strong, weak, t, scale, interval)
    else:
        if any(start <= t[0] < end for start, end in interval):
            scale = max(interval_scale, 1.0)
        guided = weak + scale * (strong - weak) if scale != 1 else strong
    return torch.cat([guided, guided])


# ---- weights
def load_lightningdit(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> LightningDiT:
    """Return a LightningDiT, or RAE's where its random frequencies of time are among the weights."""
    if "t_embedder.W" in plain_state_dict(state_dict):
        return load_rae_lightningdit(state_dict, config)
    return _load(LightningDiT, {**LIGHTNINGDIT_DEFAULTS, **config}, state_dict)


def load_rae_lightningdit(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> RAELightningDiT:
    """Return RAE's LightningDiT."""
    own = {"time_embed": "fourier", "reversed_time": True}
    return _load(RAELightningDiT, {**RAE_LIGHTNINGDIT_DEFAULTS, **config, **own}, state_dict)


def load_ddt(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> DiTDH:
    """Return RAE's DiT^DH."""
    return _load(DiTDH, {**DDT_DEFAULTS, **config}, state_dict)


def load_dit(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> PlainDiT:
    """Return facebookresearch's DiT."""
    return _load(PlainDiT, {**DIT_DEFAULTS, **config}, state_dict)


def _load(kind: type[PublishedDenoiser], config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> PublishedDenoiser:
    """Return a model in eval mode with a reference's weights."""
    denoiser, conditioner = split_reference_arguments(config)
    model = kind(make_denoiser(denoiser), ClassConditioner(**conditioner))
    for part, weights in zip((model.denoiser, model.conditioner), split_state_dict(state_dict), strict=True):
        try:
            part.load_state_dict(weights)
        except RuntimeError as error:
            reason = textwrap.shorten(str(error), 400)
            raise UserError(f"These weights do not fit the configuration. {reason}") from error
    # The published table is the one that ours computes; another is honoured here, though `save_pretrained` keeps none.
    positions = plain_state_dict(state_dict).get("pos_embed")
    ours = model.denoiser.enc_pos_embed if kind is DiTDH else model.denoiser.pos_embed
    if positions is not None:
        found, expected = tuple(positions.shape), None if ours is None else tuple(ours.shape)
        if found != expected:
            arguments = "use_pos_embed, input_size, patch_size and hidden_size"
            raise UserError(f"pos_embed is {found} in these weights, {expected} by {arguments}.")
        ours.copy_(positions)
    return model.eval()


def split_state_dict(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return the weights of the denoiser and of `ClassConditioner`; the fixed tables are left out."""
    denoiser, conditioner = {}, {}
    for name, tensor in plain_state_dict(state_dict).items():
        if name.startswith("y_embedder."):
            conditioner[name.removeprefix("y_embedder.")] = tensor
        elif not name.startswith(TABLES):
            denoiser[name] = tensor
    return denoiser, conditioner


def plain_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the weights in a checkpoint {"ema", "model", …}, or a bare state dict, without wrappers' prefixes."""
    for part in ("ema", "model"):
        if isinstance(checkpoint.get(part), Mapping):
            checkpoint = checkpoint[part]
            break
    return {plain_name(name): tensor for name, tensor in checkpoint.items()}


def read_latent_statistics(path: str | Path) -> tuple[list[float], list[float]]:
    """Return mean and standard deviation of each latent channel, from LightningDiT's `latents_stats.pt` {mean, std}."""
    saved = read_saved(path)
    if not isinstance(saved, Mapping) or not all(isinstance(saved.get(name), Tensor) for name in ("mean", "std")):
        held = ", ".join(map(str, list(saved)[:4])) if isinstance(saved, Mapping) else type(saved).__name__
        raise UserError(f"{path} holds {held or 'nothing'}, expected the tensors mean and std of latents_stats.pt.")
    mean, std = saved["mean"], saved["std"]
    if mean.shape != std.shape or mean.shape != (1, mean.numel(), 1, 1):
        shapes = f"a mean of shape {tuple(mean.shape)} and a std of shape {tuple(std.shape)}"
        raise UserError(f"{path} has {shapes}, expected (1, channels, 1, 1), both of one length.")
    mean, std = mean.flatten(), std.flatten()
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise UserError(f"{path} has numbers that are not finite or a std of 0 in it: make the statistics again.")
    return mean.tolist(), std.tolist()
