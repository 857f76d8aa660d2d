"""LightningDiT's weights (Yao & Wang 2025) → our DiT and ClassConditioner."""

import re
import textwrap
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.transformer import DiT
from vavae_tools.errors import UserError

OURS = {  # the reference's constructor arguments → ours
    "input_size": "input_size",
    "patch_size": "patch_size",
    "in_channels": "in_channels",
    "hidden_size": "hidden_size",
    "depth": "depth",
    "num_heads": "num_heads",
    "mlp_ratio": "mlp_ratio",
    "use_qknorm": "qk_norm",
    "use_swiglu": "swiglu",
    "use_rope": "rope",
    "use_rmsnorm": "rms_norm",
    "learn_sigma": "learn_sigma",
}
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
WRAPPERS = re.compile(r"^(module\.|_orig_mod\.)+")  # of DDP and torch.compile
TABLES = ("pos_embed", "feat_rope.")  # fixed, computed by our constructor


class LightningDiT(nn.Module):
    """The two parts of the published model behind its own call: (x, t, y) → velocity; y may be the null class."""

    def __init__(self, denoiser: DiT, conditioner: ClassConditioner) -> None:
        super().__init__()
        self.denoiser, self.conditioner = denoiser, conditioner

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.denoiser(x, t, self.conditioner(y))


def split_config(config: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The reference's constructor arguments → those of `DiT` and of `ClassConditioner`."""
    config = {**REFERENCE_DEFAULTS, **config}
    others = {"num_classes", "class_dropout_prob", "wo_shift", "use_checkpoint"}
    unknown = sorted(set(config) - set(OURS) - others)
    if unknown:
        raise UserError(
            f"LightningDiT has no argument {', '.join(unknown)}; it has {', '.join(sorted({*OURS, *others}))}."
        )
    denoiser = {OURS[name]: value for name, value in config.items() if name in OURS}
    denoiser["adaln_shift"] = not config.get("wo_shift", False)
    conditioner = {
        "num_classes": config.get("num_classes", 1000),
        "hidden_size": config["hidden_size"],
        "dropout": config.get("class_dropout_prob", 0.1),
    }
    return denoiser, conditioner


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
    """Our models with the reference's weights, in eval mode."""
    arguments = split_config(config)
    model = LightningDiT(DiT(**arguments[0]), ClassConditioner(**arguments[1]))
    for part, weights in zip((model.denoiser, model.conditioner), split_state_dict(state_dict), strict=True):
        try:
            part.load_state_dict(weights)
        except RuntimeError as error:
            reason = textwrap.shorten(str(error), 400)
            raise UserError(f"These weights do not fit the configuration. {reason}") from error
    # The published table is the one that DiT computes; another is honoured here, though `save_pretrained` keeps none.
    positions = plain_state_dict(state_dict).get("pos_embed", model.denoiser.pos_embed)
    if positions.shape != model.denoiser.pos_embed.shape:
        found, expected = tuple(positions.shape), tuple(model.denoiser.pos_embed.shape)
        raise UserError(f"pos_embed is {found} in these weights, {expected} by input_size, patch_size and hidden_size.")
    model.denoiser.pos_embed.copy_(positions)
    return model.eval()
