"""Published weights → these models."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from vavae_tools.autoencoders.weights import build_vavae, from_state_dict
from vavae_tools.published.denoisers import DENOISERS, load_denoiser
from vavae_tools.published.rae import load_rae_encoder_reference, load_rae_reference
from vavae_tools.runtime.errors import check_known

KINDS = (*DENOISERS, "vavae", "rae", "rae_decoder", "rae_encoder")


def load_reference(kind: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """Return one of our models with a reference's weights, in eval mode, called as the reference is.

    Args:
        kind: "lightningdit", "rae_lightningdit" (RAE's), "ddt" (RAE's DiT^DH), "dit" (facebookresearch's) →
            `model(x, t, y)` in the reference's own time and sign; "vavae", without vectors → `model.encode(x)
            .latent_dist`, `model.decode(z).sample`; "rae" and "rae_decoder" → see `rae.load_rae_reference`,
            "rae_encoder" → `rae.load_rae_encoder_reference`.
        state_dict: the weights under the reference's names; of a denoiser also a checkpoint with "ema" or "model".
        config: some of the reference's constructor arguments; of "vavae" {"ddconfig": {…}, "embed_dim": …}.
    """
    check_known("reference of kind", kind, KINDS)
    if kind in DENOISERS:
        return load_denoiser(kind, state_dict, config)
    if kind == "vavae":
        return build_vavae(from_state_dict(state_dict, config), log=lambda line: None).eval()
    return (load_rae_encoder_reference if kind == "rae_encoder" else load_rae_reference)(state_dict, config)
