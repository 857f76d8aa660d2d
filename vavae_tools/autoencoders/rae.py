"""The representation autoencoder (RAE, Zheng et al. 2025): a frozen encoder's tokens, and a ViT that decodes them.

The decoder is diffusers' RAEDecoder. Its table of positions is the paper's for every grid here, which diffusers' own is
for 16×16 alone.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, EncoderOutput
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.utils.accelerate_utils import apply_forward_hook
from einops import rearrange
from torch import Tensor, nn

from vavae_tools.autoencoders.encoders import common_name, encoder_class
from vavae_tools.autoencoders.vavae import LatentStatistics
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import weights_digest

VARIANCE_EPS = 1e-5  # added to the variance of element-wise statistics, once
DECODER_NUMBERS = [
    f"decoder_{name}" for name in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
]
RAE_SIZES: dict[str, dict[str, int]] = {
    name: dict(zip((*DECODER_NUMBERS, "decoder_patch_size"), numbers, strict=True))
    for name, numbers in {
        "ViTB": (768, 12, 12, 3072, 16),  # 86 M parameters
        "ViTL": (1024, 24, 16, 4096, 16),  # 304 M
        "ViTXL": (1152, 28, 16, 4096, 16),  # 415 M
        "tiny": (64, 2, 4, 128, 8),  # 0.1 M, for a look at how things go
    }.items()
}
"""Sizes of decoders by name; the first three are the published ones."""


class RAE(LatentStatistics, ModelMixin, ConfigMixin):
    """A frozen encoder, whose patch tokens are the latents, and a ViT decoder.

    Args:
        encoder_cls: Dinov2withNorm, SigLIPwithNorm or MAEwithNorm.
        encoder_config: its transformers configuration, or a part of it; None: the published base size.
        encoder_input_size: pixels of a side that images are resized to before they are encoded; None: the published.
        image_mean, image_std: per colour, what the encoder's pixels are normalised by; None: the encoder's own.
        noise_tau: the largest standard deviation of the noise on tokens in the decoder's training.
        latents_mean, latents_std: per channel, of the training subset's latents, as VAVAE has them.
        element_statistics: keep a mean and a variance for each element of a latent with the weights; its latents are
            then normalised already.
        in_channels, condition_dim, num_conditions: always these, for what asks any autoencoder for them.

    Images are (B, 3, H, W) in [-1, 1]; latents (B, C, h, w), C the encoder's width, h = w the patches of a side.
    """

    _supports_gradient_checkpointing = True
    decoding_alone = ("decoder.",)

    @register_to_config
    def __init__(
        self,
        encoder_cls: str = "Dinov2withNorm",
        encoder_config: dict[str, Any] | None = None,
        encoder_input_size: int | None = None,
        decoder_hidden_size: int = 1152,
        decoder_num_hidden_layers: int = 28,
        decoder_num_attention_heads: int = 16,
        decoder_intermediate_size: int = 4096,
        decoder_patch_size: int = 16,
        decoder_layer_norm_eps: float = 1e-12,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        noise_tau: float = 0.8,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        element_statistics: bool = False,
        in_channels: int = 3,
        condition_dim: int = 0,
        num_conditions: int = 0,
    ) -> None:
        super().__init__()
        kind = encoder_class(encoder_cls)
        self.encoder = kind(encoder_config)
        side = kind.input_size if encoder_input_size is None else encoder_input_size
        patch = self.encoder.patch_size
        if side < patch or side % patch:
            below = max(side // patch, 1) * patch
            raise UserError(f"encoder_input_size {side} is no multiple of {patch}: take {below} or {below + patch}")
        self.grid, self.downsampling = side // patch, decoder_patch_size
        self.image_size = self.grid * decoder_patch_size
        self.latent_shape = (self.encoder.channels, self.grid, self.grid)
        self.decoder = image_decoder(
            self.grid,
            hidden_size=self.encoder.channels,
            patch_size=decoder_patch_size,
            layer_norm_eps=decoder_layer_norm_eps,
            **{name: self.config[name] for name in DECODER_NUMBERS},
        )
        mean, std = list(image_mean or kind.mean), list(image_std or kind.std)
        self.register_to_config(
            encoder_cls=kind.__name__,
            encoder_config=self.encoder.arguments,
            encoder_input_size=side,
            image_mean=mean,
            image_std=std,
        )
        # in the module, so that no step waits for their copy to the device; the configuration keeps them
        self.register_buffer("colour_mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("colour_std", torch.tensor(std)[:, None, None], persistent=False)
        if element_statistics:
            self.register_buffer("statistics_mean", torch.zeros(self.latent_shape))
            self.register_buffer("statistics_var", torch.ones(self.latent_shape))

    @property
    def has_own_statistics(self) -> bool:
        return self.config.element_statistics

    def encode_images(
        self, images: Tensor, labels: Tensor | None = None, normal: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Return the latents of images in [-1, 1]; the rest, which every autoencoder takes, is not used."""
        return self.encode(images).latent

    def decode_latents(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images of normalised latents, which may lie outside [-1, 1]."""
        return self.decode(self.denormalise(latents)).sample

    @apply_forward_hook
    def encode(self, images: Tensor, return_dict: bool = True) -> EncoderOutput | tuple[Tensor]:
        """Return `.latent` (B, C, h, w), without a graph, of images (B, 3, S, S) in [-1, 1], of any S."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] != images.shape[3]:
            raise UserError(f"Images are {tuple(images.shape)}, an RAE takes square ones of 3 channels: (B, 3, S, S)")
        latents = self.latents_of(self.tokens((images.float() + 1) / 2))
        return EncoderOutput(latent=latents) if return_dict else (latents,)

    @apply_forward_hook
    def decode(self, latents: Tensor, return_dict: bool = True) -> DecoderOutput | tuple[Tensor]:
        """Return `.sample`, images float32 (B, 3, `image_size`, `image_size`) near [-1, 1], of what `encode` gives."""
        if latents.ndim != 4 or tuple(latents.shape[1:]) != self.latent_shape:
            raise UserError(f"Latents are {tuple(latents.shape)}, this RAE decodes (B, {self._shape()})")
        images = self.colours(self.tokens_of(latents)) * 2 - 1
        return DecoderOutput(sample=images) if return_dict else (images,)

    def forward(self, images: Tensor) -> Tensor:
        return self.decode(self.encode(images).latent).sample

    @torch.no_grad()
    def tokens(self, colours: Tensor) -> Tensor:
        """Return the encoder's tokens float32 (B, h·w, C) of images (B, 3, H, W) in [0, 1]."""
        return self.encoder(self.pixel_values(colours)).float()

    def pixel_values(self, colours: Tensor) -> Tensor:
        """Return images (B, 3, H, W) in [0, 1] resized and normalised per colour, for the encoder."""
        side = self.config.encoder_input_size
        if colours.shape[2:] != (side, side):
            colours = F.interpolate(colours, size=(side, side), mode="bicubic", align_corners=False)
        return (colours - self.colour_mean.to(colours)) / self.colour_std.to(colours)

    def latents_of(self, tokens: Tensor) -> Tensor:
        """Return latents (B, C, h, w) of tokens (B, h·w, C), normalised where element-wise statistics are kept."""
        latents = rearrange(tokens, "b (h w) c -> b c h w", h=self.grid)
        if self.has_own_statistics:
            latents = (latents - self.statistics_mean.float()) / self._deviation()
        return latents.contiguous()

    def tokens_of(self, latents: Tensor) -> Tensor:
        """The inverse of `latents_of`."""
        if self.has_own_statistics:
            latents = latents * self._deviation() + self.statistics_mean.float()
        return rearrange(latents, "b c h w -> b (h w) c")

    def colours(self, tokens: Tensor) -> Tensor:
        """Return images float32 (B, 3, H, W) near [0, 1], not clipped, of tokens (B, h·w, C)."""
        logits = self._logits(tokens.to(self.decoder.decoder_embed.weight.dtype))  # (B, h·w, 3·p·p)
        pixels = self.decoder.unpatchify(logits).float()
        return pixels * self.colour_std.to(pixels) + self.colour_mean.to(pixels)

    def _logits(self, tokens: Tensor) -> Tensor:
        decoder = self.decoder
        if not (decoder.gradient_checkpointing and torch.is_grad_enabled()):
            return decoder(tokens).logits
        h = decoder.interpolate_latent(decoder.decoder_embed(tokens))
        h = torch.cat([decoder.trainable_cls_token.expand(len(h), -1, -1).to(h.dtype), h], dim=1)  # (B, 1 + h·w, D)
        h = h + decoder.decoder_pos_embed.to(h.dtype)
        for layer in decoder.decoder_layers:
            h = decoder._gradient_checkpointing_func(layer, h)
        return decoder.decoder_pred(decoder.decoder_norm(h))[:, 1:]

    @torch.no_grad()
    def set_statistics(self, mean: Tensor | None, var: Tensor | None) -> None:
        """Keep element-wise statistics with the weights: each broadcasts to (C, h, w), or is None for 0 and 1."""
        for name, given, default in (("mean", mean, 0.0), ("var", var, 1.0)):
            given = torch.tensor(default) if given is None else given.detach()
            try:
                given = given.to(self.device, torch.float32).expand(1, *self.latent_shape)[0].clone()
            except RuntimeError:
                found = tuple(given.shape)
                raise UserError(f"The statistics' {name} is {found}, this RAE's latents are {self._shape()}") from None
            self.register_buffer(f"statistics_{name}", given)
        self.register_to_config(element_statistics=True)

    def _deviation(self) -> Tensor:
        return (self.statistics_var.float() + VARIANCE_EPS).sqrt()

    def _shape(self) -> str:
        return "×".join(map(str, self.latent_shape))

    def _fix_state_dict_keys_on_load(self, state_dict: dict[str, Tensor]) -> None:
        """Rename, in place, what a folder written beside another version of transformers calls otherwise."""
        ours = {common_name(name): name for name in self.state_dict()}
        for name in [name for name in state_dict if common_name(name) in ours]:
            state_dict[ours[common_name(name)]] = state_dict.pop(name)


def noised(tokens: Tensor, tau: float, u: Tensor, n: Tensor) -> Tensor:
    """Return tokens (B, N, C) + tau·u·n: u uniform in [0, 1), one per image, n standard normal (B, N, C)."""
    return tokens + tau * u.reshape(-1, 1, 1).to(tokens) * n.to(tokens)


def image_decoder(grid: int, **numbers: Any) -> nn.Module:
    """Return diffusers' RAEDecoder for tokens on a grid, with the sin-cos table of just that grid."""
    from diffusers.models.autoencoders.autoencoder_rae import RAEDecoder

    width, heads, patch = map(numbers.get, ("decoder_hidden_size", "decoder_num_attention_heads", "patch_size"))
    if width % heads or width % 4:
        raise UserError(f"decoder_hidden_size {width} must be divisible by 4 and by its {heads} attention heads")
    decoder = RAEDecoder(num_patches=grid**2, image_size=grid * patch, **numbers)
    table = get_2d_sincos_pos_embed(width, grid, cls_token=True, extra_tokens=1, base_size=grid, output_type="pt")
    # with the weights, as the RAE authors have it: whatever builds the model, the table comes back with them
    del decoder.decoder_pos_embed
    decoder.register_buffer("decoder_pos_embed", table[None].float(), persistent=True)
    return decoder


def tiny_rae(image_size: int = 32, **changes: Any) -> RAE:
    """Return a random RAE of 0.2 M parameters, latents 64×S/8×S/8, for trials; `changes` are arguments of `RAE`."""
    side = image_size // 8 * 14
    encoder = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    encoder |= {"image_size": side, "patch_size": 14}
    return RAE(**{"encoder_config": encoder, "encoder_input_size": side, **RAE_SIZES["tiny"], **changes})


@dataclass
class RAEFeatures:
    """An RAE's encoder as a `Foundation`: its tokens, of images as they are or turned left to right."""

    rae: RAE
    digest: str
    mirrored: bool = False

    @property
    def channels(self) -> int:
        return self.rae.latent_shape[0]

    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        tokens = self.rae.tokens(((images.flip(3) if self.mirrored else images) + 1) / 2)  # (B, h·w, C)
        return tokens.mT.unflatten(2, grid)


def encoder_digest(rae: RAE) -> str:
    """Return a hash of an RAE's encoder: weights and how images are given to it."""
    given = {key: value for key, value in rae.config.items() if key.startswith(("encoder_", "image_"))}
    of_config = json.dumps(given, sort_keys=True, default=list)
    return hashlib.sha256((weights_digest(rae.encoder) + of_config).encode()).hexdigest()[:16]
