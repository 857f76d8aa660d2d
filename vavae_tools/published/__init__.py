"""Published weights → these models."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from vavae_tools.autoencoders.vavae import VAVAE
from vavae_tools.autoencoders.weights import build_vavae, from_state_dict
from vavae_tools.published.denoisers import load_ddt, load_dit, load_lightningdit, load_rae_lightningdit
from vavae_tools.published.rae import load_rae_encoder_reference, load_rae_reference
from vavae_tools.runtime.errors import UserError


def load_vavae_reference(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> VAVAE:
    """Return a VA-VAE without vectors; what its training holds beside the weights is ignored."""
    return build_vavae(from_state_dict(state_dict, config), log=lambda line: None)


LOADERS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any]], nn.Module]] = {
    "lightningdit": load_lightningdit,
    "rae_lightningdit": load_rae_lightningdit,
    "ddt": load_ddt,
    "dit": load_dit,
    "vavae": load_vavae_reference,
    "rae": load_rae_reference,
    "rae_decoder": load_rae_reference,
    "rae_encoder": load_rae_encoder_reference,
}


def load_reference(kind: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """Return one of our models with a reference's weights, in eval mode, called as the reference is.

    Args:
        kind: "lightningdit", "rae_lightningdit" (RAE's), "ddt" (RAE's DiT^DH), "dit" (facebookresearch's) →
            `model(x, t, y)` in the reference's own time and sign; "vavae" → `model.encode(x).latent_dist`,
            `model.decode(z).sample`; "rae" and "rae_decoder" → see `rae.load_rae_reference`, "rae_encoder" →
            `rae.load_rae_encoder_reference`.
        state_dict: the weights under the reference's names; of a denoiser also a checkpoint with "ema" or "model".
        config: some of the reference's constructor arguments; of "vavae" {"ddconfig": {…}, "embed_dim": …}.
    """
    if kind not in LOADERS:
        raise UserError(f"No reference of kind {kind!r}; known kinds: {', '.join(sorted(LOADERS))}.")
    return LOADERS[kind](state_dict, config).eval()
