"""The RAE authors' weights (Zheng et al. 2025) → our RAE, called as theirs is."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vavae_tools.autoencoders.encoders import encoder_class
from vavae_tools.autoencoders.rae import DECODER_NUMBERS, RAE, VARIANCE_EPS, image_decoder, noised
from vavae_tools.autoencoders.rae_weights import fit, from_diffusers, sorted_weights
from vavae_tools.runtime.errors import UserError


class RAEReference(nn.Module):
    """An RAE behind the authors' calls.

    `encode(image)`: (B, 3, S, S) in [0, 1] → latent (B, C, h, w), without `reshape_to_2d` (B, N, C); in training mode
    with noise of `noise_tau`. `decode(latent)`: → image near [0, 1], not clipped; without statistics grids of other
    sizes are resized to the model's. `encoder(pixel_values)` → tokens (B, N, C), `decoder(tokens)` → `.logits` (B, N,
    p·p·3), `unpatchify(logits)` → pixels (B, 3, H, W), not denormalised.
    """

    def __init__(self, rae: RAE, reshape_to_2d: bool = True) -> None:
        super().__init__()
        self.rae, self.reshape_to_2d, self.noise_tau = rae, reshape_to_2d, rae.config.noise_tau
        self.encoder, self.decoder, self.unpatchify = rae.encoder, rae.decoder, rae.decoder.unpatchify

    def encode(self, image: Tensor, u: Tensor | None = None, n: Tensor | None = None) -> Tensor:
        """Without u (uniform, one per image) and n (normal, like tokens), training mode draws them: u first."""
        tokens = self.rae.tokens(image)  # (B, h·w, C)
        if u is None and self.training and self.noise_tau > 0:
            u, n = torch.rand(len(tokens), 1, 1, device=tokens.device), torch.randn_like(tokens)
        if u is not None:
            tokens = noised(tokens, self.noise_tau, u, n)
        latent = self.rae.latents_of(tokens)
        return latent if self.reshape_to_2d else rearrange(latent, "b c h w -> b (h w) c")

    def decode(self, latent: Tensor) -> Tensor:
        if not self.reshape_to_2d:
            latent = rearrange(latent, "b (h w) c -> b c h w", h=self.rae.grid)
        return self.rae.colours(self.rae.tokens_of(latent))

    def forward(self, image: Tensor) -> Tensor:
        return self.decode(self.encode(image))


class RAEEncoders(nn.ModuleDict):
    """Several encoders: `model.mae(pixel_values)` → tokens; `model(pixel_values)` → tokens of all, by name."""

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {name: encoder(pixel_values) for name, encoder in self.items()}


def load_rae_reference(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> nn.Module:
    """Return the authors' RAE, or a part of it, in eval mode, as weights and config say.

    - Encoder and decoder, with an encoder in `config`: an `RAEReference`. `config` is {"encoder": "Dinov2withNorm",
      "encoder_config": {…}, "encoder_input_size", "decoder_config": {…}, "decoder_patch_size", "image_processor_mean",
      "image_processor_std", "noise_tau"}, or the arguments of diffusers' AutoencoderRAE. Element-wise statistics are
      tensors in it, {"statistics": {"mean", "var"}} (also "stat", or "mean" and "var" beside the rest), or in the
      weights, `stat.mean` and `stat.var`, or `latent_mean` and `latent_var`.
    - The decoder alone, with the four `decoder_…` numbers, and `image_size` or `num_patches`, in `config`:
      `model(tokens).logits`, `model.unpatchify(logits)`.
    - Encoders alone, see `load_rae_encoder_reference`.
    """
    several = any(isinstance(value, Mapping) and "config" in value for value in config.values())
    found = {} if several else sorted_weights(state_dict)
    if "decoder" not in found:
        return load_rae_encoder_reference(state_dict, config)
    if config.get("encoder_type"):
        return RAEReference(from_diffusers(config, state_dict)).eval()
    weights, _ = found["decoder"]
    numbers = _decoder_numbers(config, weights)
    if "encoder" not in found or "encoder" not in config:
        patches, image_size = config.get("num_patches"), config.get("decoder_image_size", config.get("image_size"))
        if patches is None and image_size:
            patches = (image_size // numbers["patch_size"]) ** 2
        elif patches is None and "decoder_pos_embed" in weights:
            patches = weights["decoder_pos_embed"].shape[1] - 1
        grid = round((patches or 0) ** 0.5)
        if not grid or grid**2 != patches:
            raise UserError(f"num_patches is {patches}, expected a square number: give num_patches, or image_size")
        decoder = image_decoder(grid, **numbers)
        fit(decoder, weights)
        return decoder.eval()
    arguments = {"encoder_input_size": config.get("encoder_input_size"), "noise_tau": config.get("noise_tau", 0.8)}
    arguments |= {"image_mean": config.get("image_processor_mean"), "image_std": config.get("image_processor_std")}
    arguments |= {"decoder_patch_size": numbers["patch_size"], "decoder_layer_norm_eps": numbers["layer_norm_eps"]}
    rae = RAE(*_encoder(config), **arguments, **{name: numbers[name] for name in DECODER_NUMBERS})
    fit(rae.encoder, *found["encoder"])
    fit(rae.decoder, weights)
    given = config.get("statistics") or config.get("stat") or config
    mean, var = given.get("mean"), given.get("var")
    if mean is None and var is None:
        mean, var = found.get("statistics", (None, None))
    if mean is not None or var is not None:
        eps = config.get("normalization_eps", VARIANCE_EPS)
        rae.set_statistics(mean, (torch.ones(1) if var is None else var) + (eps - VARIANCE_EPS))
    return RAEReference(rae, config.get("reshape_to_2d", True)).eval()


def load_rae_encoder_reference(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> nn.Module:
    """Return the authors' encoders, in eval mode: `model(pixel_values)`, normalised images → tokens (B, N, C).

    Args:
        state_dict: of one encoder, of any prefix; or of several, each behind its name: `mae.model.*`.
        config: {"encoder": "MAEwNorm", "encoder_config": {…}} of one; {"mae": {"config": {…}}, "siglip2": {…},
            "layer_norm_eps": {"mae": …}} of several, which gives an `RAEEncoders`.
    """
    encoders, eps = {}, config.get("layer_norm_eps")
    for name, value in config.items():
        if isinstance(value, Mapping) and "config" in value:
            weights = {key.removeprefix(f"{name}."): t for key, t in state_dict.items() if key.startswith(f"{name}.")}
            own = {"encoder": name, "encoder_config": value["config"], "layer_norm_eps": (eps or {}).get(name)}
            encoders[name] = load_rae_encoder_reference(weights, own)
    if encoders:
        return RAEEncoders(encoders).eval()
    found = sorted_weights(state_dict)
    if "encoder" not in found:
        some = ", ".join(list(state_dict)[:3]) or "none"
        expected = "neither a decoder (trainable_cls_token …) nor an encoder (embeddings …) of an RAE"
        raise UserError(f"These weights hold {expected}: they are {some} …")
    name, arguments = _encoder(config)
    encoder = encoder_class(name)(arguments)
    fit(encoder, *found["encoder"])
    return encoder.eval()


def _encoder(config: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    name, eps = str(config.get("encoder") or "").split(), config.get("layer_norm_eps")
    if not name:
        raise UserError("The configuration names no encoder: expected encoder, such as Dinov2withNorm")
    own = {"layer_norm_eps": eps} if isinstance(eps, float) else {}
    return name[0], {**own, **(config.get("encoder_config") or {})}  # what follows the name is a remark


def _decoder_numbers(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    inner = config.get("decoder_config") or {}  # or beside the rest
    given = {**config, **inner}
    missing = [name for name in DECODER_NUMBERS if name not in given]
    missing += [name for name in ("decoder_embed.weight", "decoder_pred.bias") if name not in weights]
    if missing:
        raise UserError(f"Configuration and weights have no {missing[0]}, which the decoder needs")
    patch_size = config.get("decoder_patch_size", given.get("patch_size"))
    if not isinstance(patch_size, int):  # the last layer has p·p·3 outputs
        patch_size = round((len(weights["decoder_pred.bias"]) / 3) ** 0.5)
    own = inner if "encoder_config" in config else given  # beside an encoder's, layer_norm_eps is the encoder's, too
    eps = config.get("decoder_layer_norm_eps", own.get("layer_norm_eps"))
    sizes = {"hidden_size": weights["decoder_embed.weight"].shape[1], "patch_size": patch_size}
    return {**sizes, "layer_norm_eps": 1e-12 if eps is None else eps, **{name: given[name] for name in DECODER_NUMBERS}}
