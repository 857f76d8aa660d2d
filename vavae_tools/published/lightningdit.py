"""The weights of LightningDiT (Yao & Wang 2025) and of RAE's (Zheng et al. 2025) → our DiT and ClassConditioner."""

import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.ddt import DDT
from vavae_tools.diffusion.factory import make_denoiser, split_reference_arguments
from vavae_tools.diffusion.objectives import expand_time
from vavae_tools.diffusion.transformer import DiT
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import read_saved

REFERENCE_DEFAULTS = {  # where they differ from ours
    "input_size": 32,
    "patch_size": 2,
    "hidden_size": 1152,
    "depth": 28,
    "num_heads": 16,
    "use_swiglu": False,
    "use_rope": False,
    "use_rmsnorm": False,
}
RAE_DEFAULTS = {"in_channels": 768, "hidden_size": 1152, "depth": 28, "num_heads": 16}
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of DDP and torch.compile
TABLES = ("pos_embed", "feat_rope.", "enc_feat_rope.", "dec_feat_rope.")  # fixed, computed by our constructors

Interval = tuple[float, float]


class LightningDiT(nn.Module):
    """The two parts of the published model behind its own call: (x, t, y) → velocity; y may be the null class."""

    def __init__(self, denoiser: DiT, conditioner: ClassConditioner) -> None:
        super().__init__()
        self.denoiser, self.conditioner = denoiser, conditioner

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.denoiser(x, t, self.conditioner(y))


class RAELightningDiT(LightningDiT):
    """RAE's: t is the share of noise and the answer noise − data, as with all that RAE publishes.

    Its guidance takes a list of intervals *in* which another scale holds (`interval_cfg`; up to 1: none), t[0] deciding
    for the batch. RAE's own sampling gives it one interval (min, max) instead, which its code cannot take; here
    that is what it is for the wide head: guidance is for the times inside.
    """

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.denoiser.predict(x, t, self.conditioner(y))[:, : self.denoiser.in_channels]

    def forward_with_cfg(
        self,
        x: Tensor,
        t: Tensor,
        y: Tensor,
        cfg_scale: float,
        cfg_interval: Sequence[Interval] | Interval = (),
        interval_cfg: float = 0.0,
    ) -> Tensor:
        """The batch is [conditional | null] with the first half's x for both; returns [guided | guided]."""
        half = x[: len(x) // 2]
        conditional, null = self(torch.cat([half, half]), t, y).chunk(2)
        guided = self._guide(conditional, null, t[: len(half)], cfg_scale, cfg_interval, interval_cfg)
        return torch.cat([guided, guided])

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
        """Of the batch only the first half counts; returns [guided | guided]."""
        x, t, y = (part[: len(x) // 2] for part in (x, t, y))
        weak = additional_model_forward(x, t, y)[:, : self.denoiser.in_channels]
        guided = self._guide(self(x, t, y), weak, t, cfg_scale, cfg_interval, interval_cfg)
        return torch.cat([guided, guided])

    def _guide(
        self,
        strong: Tensor,
        weak: Tensor,
        t: Tensor,
        scale: float,
        interval: Sequence[Interval] | Interval,
        interval_scale: float,
    ) -> Tensor:
        if len(interval) == 2 and not isinstance(interval[0], Sequence):
            return guided_between(strong, weak, t, scale, interval)
        if any(start <= t[0] < end for start, end in interval):
            scale = interval_scale if interval_scale > 1 else 1.0
        return weak + scale * (strong - weak) if scale != 1 else strong


def guided_between(strong: Tensor, weak: Tensor, t: Tensor, scale: float, interval: Interval) -> Tensor:
    """weak + scale · (strong − weak) for the samples with start ≤ t ≤ end, the strong for the others."""
    start, end = interval
    if not start < end:
        raise UserError(f"cfg_interval is ({start:g}, {end:g}), expected (min, max) with min < max.")
    inside = expand_time((t >= start) & (t <= end), strong)
    return torch.where(inside, weak + scale * (strong - weak), strong)


def split_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """LightningDiT's constructor arguments → those of `DiT` and of `ClassConditioner`."""
    return split_reference_arguments({**REFERENCE_DEFAULTS, **config})


def split_state_dict(state_dict: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The reference's weights → those of `DiT` and of `ClassConditioner`; the fixed tables are left out."""
    denoiser, conditioner = {}, {}
    for name, tensor in plain_state_dict(state_dict).items():
        if name.startswith("y_embedder."):
            conditioner[name.removeprefix("y_embedder.")] = tensor
        elif not name.startswith(TABLES):
            denoiser[name] = tensor
    return denoiser, conditioner


def plain_state_dict(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights in a checkpoint {"model", "ema", …} (its EMA) or in a bare state dict, without wrappers' prefixes."""
    for part in ("ema", "model"):
        if isinstance(checkpoint.get(part), Mapping):
            checkpoint = checkpoint[part]
            break
    return {WRAPPERS.sub("", name): tensor for name, tensor in checkpoint.items()}


def load_lightningdit(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> LightningDiT:
    """Our models with the reference's weights, in eval mode; RAE's are told by their random frequencies of time."""
    if "t_embedder.W" in plain_state_dict(state_dict):
        return load_rae_lightningdit(state_dict, config)
    denoiser, conditioner = split_config(config)
    return with_weights(LightningDiT(make_denoiser(denoiser), ClassConditioner(**conditioner)), state_dict)


def load_rae_lightningdit(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> RAELightningDiT:
    """Our models with RAE's weights, in eval mode; the defaults are those of its constructor.

    These are latents of 16×16×768, patches of 1, SwiGLU, RoPE and RMSNorm, with DiT-XL's width and depth.
    """
    denoiser, conditioner = split_reference_arguments({**RAE_DEFAULTS, **config})
    denoiser |= {"time_embed": "fourier", "reversed_time": True}
    return with_weights(RAELightningDiT(make_denoiser(denoiser), ClassConditioner(**conditioner)), state_dict)


def with_weights(model: nn.Module, state_dict: Mapping[str, Any]) -> nn.Module:
    """`model`, of a denoiser and a conditioner, with a reference's weights, in eval mode.

    Raises:
        UserError: other weights or shapes than the model's, or a table of positions of another shape.
    """
    for part, weights in zip((model.denoiser, model.conditioner), split_state_dict(state_dict), strict=True):
        try:
            part.load_state_dict(weights)
        except RuntimeError as error:
            reason = textwrap.shorten(str(error), 400)
            raise UserError(f"These weights do not fit the configuration. {reason}") from error
    # The published table is the one that ours computes; another is honoured here, though `save_pretrained` keeps none.
    denoiser, positions = model.denoiser, plain_state_dict(state_dict).get("pos_embed")
    ours = denoiser.enc_pos_embed if isinstance(denoiser, DDT) else denoiser.pos_embed
    if positions is not None and (ours is None or positions.shape != ours.shape):
        found = f"pos_embed is {tuple(positions.shape)} in these weights"
        if ours is None:
            raise UserError(f"{found}, but use_pos_embed is False.")
        raise UserError(f"{found}, {tuple(ours.shape)} by input_size, patch_size and hidden_size.")
    if positions is not None:
        ours.copy_(positions)
    return model.eval()


def read_latent_statistics(path: str | Path) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each latent channel, from LightningDiT's `latents_stats.pt` {mean, std}.

    Raises:
        UserError: no such file, a file that is something else, or numbers that cannot normalise latents.
    """
    saved = read_saved(path)
    if not isinstance(saved, Mapping) or not all(isinstance(saved.get(name), Tensor) for name in ("mean", "std")):
        held = ", ".join(map(str, list(saved)[:4])) if isinstance(saved, Mapping) else type(saved).__name__
        raise UserError(f"{path} holds {held or 'nothing'}, expected the tensors mean and std of latents_stats.pt.")
    mean, std = saved["mean"].flatten(), saved["std"].flatten()
    for name in ("mean", "std"):
        if saved[name].ndim != 4 or saved[name].shape != (1, len(mean), 1, 1):
            shape = tuple(saved[name].shape)
            raise UserError(f"{path} has a {name} of shape {shape}, expected (1, channels, 1, 1), both of one length.")
    if not (mean.isfinite().all() and std.isfinite().all() and (std > 0).all()):
        raise UserError(f"{path} has numbers that are not finite or a std of 0 in it: make the statistics again.")
    return mean.tolist(), std.tolist()
