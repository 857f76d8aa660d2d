"""The RAE authors' weights (Zheng et al. 2025) → our RAE, called as theirs is."""

from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from vavae_tools.autoencoders.encoders import FrozenEncoder, encoder_class
from vavae_tools.autoencoders.rae import RAE, VARIANCE_EPS, noised, picture_decoder
from vavae_tools.autoencoders.rae_weights import fit, from_diffusers, keep_statistics, sorted_weights
from vavae_tools.runtime.errors import UserError

_DECODER = (
    "decoder_hidden_size",
    "decoder_num_hidden_layers",
    "decoder_num_attention_heads",
    "decoder_intermediate_size",
)
_ENCODER_NAMES = ("encoder", "encoder_cls", "encoder_type", "cls")
_ENCODER_CONFIGS = ("encoder_config", "encoder_params", "config")


class RAEReference(nn.Module):
    """An RAE behind the authors' calls.

    `encode(image)`: (B, 3, S, S) in [0, 1] → latent (B, C, h, w); `decode(latent)`: → image near [0, 1], not clipped;
    `model(image)`: both; `decoder(tokens)` → `.logits` (B, N, p·p·3); `unpatchify(logits)` → pixels (B, 3, H, W), not
    denormalised; `encoder(pixel_values)` → tokens (B, N, C). In training mode `encode` adds noise of `noise_tau`. With
    `reshape_to_2d` off, latents are (B, N, C).
    """

    def __init__(self, rae: RAE, reshape_to_2d: bool = True) -> None:
        super().__init__()
        self.rae, self.reshape_to_2d = rae, reshape_to_2d

    @property
    def encoder(self) -> FrozenEncoder:
        return self.rae.encoder

    @property
    def decoder(self) -> nn.Module:
        return self.rae.decoder

    @property
    def noise_tau(self) -> float:
        return self.rae.config.noise_tau

    def encode(self, image: Tensor, u: Tensor | None = None, n: Tensor | None = None) -> Tensor:
        """Without u (uniform, one per picture) and n (normal, like tokens), training mode draws them: u first."""
        tokens = self.rae.tokens(image)  # (B, h·w, C)
        if u is None and n is None and self.training and self.noise_tau > 0:
            u, n = torch.rand(len(tokens), 1, 1, device=tokens.device), torch.randn_like(tokens)
        if u is not None or n is not None:
            tokens = noised(tokens, self.noise_tau, u, n)
        latent = self.rae.latents_of(tokens)
        return latent if self.reshape_to_2d else rearrange(latent, "b c h w -> b (h w) c")

    def decode(self, latent: Tensor) -> Tensor:
        """A latent (B, C, h, w) → image (B, 3, H, W); without statistics other grids are resized to the model's."""
        if not self.reshape_to_2d:
            latent = rearrange(latent, "b (h w) c -> b c h w", h=self.rae.grid)
        return self.rae.colours(self.rae.tokens_of(latent))

    def unpatchify(self, logits: Tensor) -> Tensor:
        return self.rae.decoder.unpatchify(logits)

    def forward(self, image: Tensor) -> Tensor:
        return self.decode(self.encode(image))


class RAEEncoders(nn.ModuleDict):
    """Several encoders by name: `model.mae(pixel_values)` → tokens; `model(pixel_values)` → tokens of all, by name."""

    def forward(self, pixel_values: Tensor) -> dict[str, Tensor]:
        return {name: encoder(pixel_values) for name, encoder in self.items()}


def load_rae_reference(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> nn.Module:
    """The authors' RAE, or a part of it, by its weights and numbers; in eval mode.

    What is given says what is made:

    - a whole RAE (`encoder.encoder.*` or `encoder.model.*`, and `decoder.*`) with an encoder in `config`: an
      `RAEReference`. `config` is {"encoder": "Dinov2withNorm", "encoder_config": {…}, "encoder_input_size",
      "decoder_config": {…}, "decoder_patch_size", "image_processor_mean", "image_processor_std", "noise_tau"}; numbers
      of the decoder may also stand beside the rest. Element-wise statistics are tensors in it, {"statistics":
      {"mean", "var"}} (also "stat", or "mean" and "var" beside the rest), or stand in the weights as `stat.mean` and
      `stat.var`, or `latent_mean` and `latent_var`. diffusers' AutoencoderRAE, by its own arguments, is one too.
    - the decoder alone (bare names or `decoder.*`, the authors' or diffusers'), with the four `decoder_…` numbers,
      `patch_size`, and `image_size` or `num_patches` in `config`, flat or as above: `model(tokens).logits`,
      `model.unpatchify(logits)`.
    - encoders alone, one or several, see `load_rae_encoder_reference`.

    Raises:
        UserError: weights that do not fit the numbers, or numbers that are missing.
    """
    found = sorted_weights(state_dict)
    if config.get("encoder_type") and "decoder" in found:
        return RAEReference(from_diffusers(config, dict(state_dict))).eval()
    if "decoder" not in found:
        if "encoder" in found:
            return load_rae_encoder_reference(state_dict, config)
        raise UserError(
            f"These weights hold neither a decoder (trainable_cls_token …) nor an encoder (embeddings …) of an RAE: "
            f"they are {', '.join(list(state_dict)[:3]) or 'none'} …"
        )
    has_encoder = "encoder" in found and any(config.get(name) for name in _ENCODER_NAMES)
    return _whole(found, config, state_dict) if has_encoder else _decoder_alone(found, config)


def load_rae_encoder_reference(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> nn.Module:
    """The authors' encoders by their weights: `model(pixel_values)`, normalised pictures → tokens (B, N, C).

    Args:
        state_dict: of one encoder, of any prefix; or of several, each behind its name: `mae.model.*`.
        config: {"encoder": "MAEwNorm", "encoder_config": {…}} of one; {"mae": {"config": {…}}, "siglip2": {…},
            "layer_norm_eps": {"mae": …}} of several, which gives an `RAEEncoders`.
    """
    several = {
        name: value
        for name, value in config.items()
        if isinstance(value, Mapping) and name not in (*_ENCODER_CONFIGS, "layer_norm_eps", "decoder_config")
    }
    if not several:
        return _encoder_alone(state_dict, config)
    eps = config.get("layer_norm_eps", {})
    encoders = {}
    for name, value in several.items():
        weights = {key.removeprefix(f"{name}."): t for key, t in state_dict.items() if key.startswith(f"{name}.")}
        own = {"encoder": name, **{k: v for k, v in value.items() if k != "cls"}}
        if not any(key in value for key in _ENCODER_CONFIGS):
            own["encoder_config"] = dict(value)
        if isinstance(eps, Mapping) and name in eps:
            own["layer_norm_eps"] = eps[name]
        encoders[name] = _encoder_alone(weights if weights else state_dict, own)
    return RAEEncoders(encoders).eval()


def _encoder_alone(state_dict: Mapping[str, Any], config: Mapping[str, Any]) -> FrozenEncoder:
    found = sorted_weights(state_dict)
    if "encoder" not in found:
        raise UserError(f"These weights hold no encoder: they are {', '.join(list(state_dict)[:3]) or 'none'} …")
    encoder = encoder_class(_encoder_name(config))(_encoder_config(config))
    fit(encoder, found["encoder"], "encoder", "state_dict")
    return encoder


def _whole(found: Mapping[str, Any], config: Mapping[str, Any], state_dict: Mapping[str, Any]) -> RAEReference:
    weights = found["decoder"]
    numbers = _decoder_numbers(config, weights)
    rae = RAE(
        encoder_cls=_encoder_name(config),
        encoder_config=_encoder_config(config),
        encoder_input_size=config.get("encoder_input_size"),
        decoder_patch_size=_patch_size(config, weights),
        decoder_layer_norm_eps=numbers["layer_norm_eps"],
        image_mean=_first(config, "image_processor_mean", "image_mean", "encoder_mean", "encoder_norm_mean"),
        image_std=_first(config, "image_processor_std", "image_std", "encoder_std", "encoder_norm_std"),
        noise_tau=_first(config, "noise_tau", default=0.8),
        **{name: numbers[name] for name in _DECODER},
    )
    fit(rae.encoder, found["encoder"], "encoder", "state_dict")
    fit(rae.decoder, weights, "decoder", "state_dict")
    mean, var = _statistics(config, state_dict, found)
    eps = _first(config, "normalization_eps", "eps", default=VARIANCE_EPS)
    if eps != VARIANCE_EPS and (mean is not None or var is not None):
        var = (torch.ones(rae.latent_shape) if var is None else var) + (eps - VARIANCE_EPS)
    keep_statistics(rae, (mean, var))
    return RAEReference(rae, config.get("reshape_to_2d", True)).eval()


def _decoder_alone(found: Mapping[str, Any], config: Mapping[str, Any]) -> nn.Module:
    weights = found["decoder"]
    if "decoder_embed.weight" not in weights:
        raise UserError("These decoder weights have no decoder_embed.weight, from which the tokens' width is known")
    patch_size = _patch_size(config, weights)
    image_size = _first(config, "decoder_image_size", "image_size")
    patches = _first(config, "num_patches")
    if patches is None and image_size is not None:
        patches = (image_size // patch_size) ** 2
    if patches is None and "grid" in config:
        patches = config["grid"] ** 2
    if patches is None and "decoder_pos_embed" in weights:
        patches = weights["decoder_pos_embed"].shape[1] - 1
    grid = round((patches or 0) ** 0.5)
    if not grid or grid**2 != patches:
        raise UserError(f"num_patches is {patches}, expected a square number: give num_patches, or image_size")
    decoder = picture_decoder(
        grid,
        hidden_size=weights["decoder_embed.weight"].shape[1],
        patch_size=patch_size,
        **_decoder_numbers(config, weights),
    )
    fit(decoder, weights, "decoder", "state_dict")
    return decoder.eval()


def _encoder_name(config: Mapping[str, Any]) -> str:
    name = _first(config, *_ENCODER_NAMES)
    if not isinstance(name, str) or not name.strip():
        raise UserError("The configuration names no encoder: expected encoder, such as Dinov2withNorm")
    return name.split()[0].split(".")[-1]  # what follows is a remark, what precedes it a module


def _encoder_config(config: Mapping[str, Any]) -> dict[str, Any]:
    arguments = dict(_first(config, *_ENCODER_CONFIGS, default={}))
    eps = config.get("layer_norm_eps")
    return {"layer_norm_eps": eps, **arguments} if isinstance(eps, float) else arguments


def _decoder_numbers(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> dict[str, Any]:
    inner = config.get("decoder_config")
    inner = inner if isinstance(inner, Mapping) else {}
    numbers: dict[str, Any] = {}
    for name in _DECODER:
        if name not in inner and name not in config:
            raise UserError(f"The configuration has no {name}, which the decoder needs")
        numbers[name] = inner.get(name, config.get(name))
    eps = _first(config, "decoder_layer_norm_eps", default=inner.get("layer_norm_eps"))
    if eps is None and "encoder_config" not in config and isinstance(config.get("layer_norm_eps"), float):
        eps = config["layer_norm_eps"]
    numbers["layer_norm_eps"] = 1e-12 if eps is None else eps
    return numbers


def _patch_size(config: Mapping[str, Any], weights: Mapping[str, Tensor]) -> int:
    """As given, or what the last layer's p·p·3 outputs tell."""
    inner = config.get("decoder_config")
    given = _first(config, "decoder_patch_size", "patch_size")
    if given is None and isinstance(inner, Mapping):
        given = inner.get("patch_size")
    if isinstance(given, int):
        return given
    if "decoder_pred.bias" not in weights:
        raise UserError("The configuration has no decoder_patch_size, and the weights no decoder_pred.bias to tell it")
    return round((len(weights["decoder_pred.bias"]) / 3) ** 0.5)


def _statistics(
    config: Mapping[str, Any], state_dict: Mapping[str, Any], found: Mapping[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    given = _first(config, "statistics", "stat", "stats", "normalization", "latent_stats", default={})
    sources = [given if isinstance(given, Mapping) else {}, config]
    for source in sources:
        for mean, var in (("mean", "var"), ("latent_mean", "latent_var"), ("stat.mean", "stat.var")):
            tensors = source.get(mean), source.get(var)
            if any(isinstance(tensor, Tensor) for tensor in tensors):
                return tensors
    tensors = state_dict.get("stat.mean"), state_dict.get("stat.var")
    if any(tensor is not None for tensor in tensors):
        return tensors
    return found.get("statistics", (None, None))


def _first(config: Mapping[str, Any], *names: str, default: Any = None) -> Any:
    return next((config[name] for name in names if config.get(name) is not None), default)
