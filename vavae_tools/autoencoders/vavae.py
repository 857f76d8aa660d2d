"""The VA-VAE: diffusers' AutoencoderKL with a user-condition vector.

A vector per person is let into every level of encoder and decoder by projections that start at zero: at first the model
equals the one without vectors, bit by bit, of which the published f16d32 (Yao & Wang 2025, LightningDiT) is one.
"""

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin  # noqa: F401  (a pipeline looks here for the base it loads with)
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from vavae_tools.data.images import ImageFolder, to_pixels, to_unit
from vavae_tools.runtime.errors import UserError, check_known, join_first


class LatentStatistics:
    """A diffusers model whose config has `latents_mean` and `latents_std`, a number per channel each."""

    has_own_statistics = False  # True: its latents come out normalised already
    decoding_alone: tuple[str, ...] = ()  # how the names of weights begin that latents do not follow from

    def normalise(self, latents: Tensor) -> Tensor:
        """Return latents as the denoiser sees them: per channel (z − mean) / std."""
        if self.has_own_statistics:
            return latents
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """Return the inverse of `normalise`: what `decode` takes."""
        if self.has_own_statistics:
            return latents
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.latents_mean is None or self.config.latents_std is None:
            name = type(self).__name__
            raise UserError(f"This {name} carries no latent statistics: encode the training subset first (latents)")
        numbers = torch.tensor([self.config.latents_mean, self.config.latents_std]).to(like)
        return numbers[0, :, None, None], numbers[1, :, None, None]


class VAVAE(LatentStatistics, AutoencoderKL):
    """AutoencoderKL with a condition vector; its other arguments are AutoencoderKL's own.

    Args:
        condition_dim: length of the condition vector; 0 builds the plain AutoencoderKL.
        num_conditions: how many people (or classes) have a vector of their own in `conditions`.
        people: their names → rows in it; None: not known, as in former versions.

    Images are (B, C, H, W) in [-1, 1]; latents (B, latent_channels, H/f, W/f), not normalised.
    """

    def __init__(
        self,
        condition_dim: int = 0,
        num_conditions: int = 0,
        scaling_factor: float = 1.0,
        people: dict[str, int] | None = None,
        **arguments: Any,
    ) -> None:
        super().__init__(scaling_factor=scaling_factor, **arguments)
        self.register_to_config(condition_dim=condition_dim, num_conditions=num_conditions, people=people)
        block_out_channels = self.config.block_out_channels
        self.downsampling = 2 ** (len(block_out_channels) - 1)
        if condition_dim:
            self.conditions = nn.Embedding(num_conditions, condition_dim)
            into_encoder = [block_out_channels[0], *block_out_channels]  # that reach each block, the middle one last
            into_decoder = [block_out_channels[-1], block_out_channels[-1], *block_out_channels[:0:-1]]
            for half, into in (("encoder", into_encoder), ("decoder", into_decoder)):
                linear = nn.ModuleList(nn.Linear(condition_dim, width, bias=False) for width in into)
                for weight in linear.parameters():
                    nn.init.zeros_(weight)
                setattr(self, f"{half}_projections", linear)

    @staticmethod
    def _get_init_keys(input_class: type) -> set[str]:  # what `from_config` gives to `__init__`
        of_base = AutoencoderKL._get_init_keys(AutoencoderKL)
        return of_base if input_class is not VAVAE else {*of_base, "condition_dim", "num_conditions", "people"}

    def condition_vectors(self, labels: Tensor | None, keep: Tensor | None = None) -> Tensor | None:
        """Return vectors (B, condition_dim) of labels int64 (B,), zero where `keep` (B,) is False; None without any."""
        if labels is None or not self.config.condition_dim:
            return None
        vectors = self.conditions(labels)
        return vectors if keep is None else vectors * keep[:, None].to(vectors.dtype)

    def encode(
        self, x: Tensor, return_dict: bool = True, condition: Tensor | None = None
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Return the posterior of images' latents; `condition` is (B, condition_dim), None stands for no vector."""
        if condition is None:
            return super().encode(x, return_dict)
        posterior = DiagonalGaussianDistribution(self._encode(x, condition))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _encode(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        encoder = self.encoder
        h = encoder.conv_in(x)
        h = self._through([*encoder.down_blocks, encoder.mid_block], "encoder_projections", h, condition)
        return _last_layers(encoder, h, self.quant_conv)  # (B, 2·latent_channels, H/f, W/f)

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: None = None, condition: Tensor | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Return images of latents (not normalised), which may lie slightly outside [-1, 1]."""
        if condition is None:
            return super().decode(z, return_dict, generator)
        return self._decode(z, return_dict, condition)

    def _decode(
        self, z: Tensor, return_dict: bool = True, condition: Tensor | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        decoder = self.decoder
        h = decoder.conv_in(self.post_quant_conv(z) if self.post_quant_conv is not None else z)
        h = self._through([decoder.mid_block, *decoder.up_blocks], "decoder_projections", h, condition)
        images = _last_layers(decoder, h)  # (B, C, H, W)
        return DecoderOutput(sample=images) if return_dict else (images,)

    def _through(self, blocks: list[nn.Module], projections: str, h: Tensor, condition: Tensor | None) -> Tensor:
        checkpointing = torch.is_grad_enabled() and self.encoder.gradient_checkpointing
        for i, block in enumerate(blocks):
            if condition is not None:
                h = h + getattr(self, projections)[i](condition)[:, :, None, None].to(h.dtype)
            h = self.encoder._gradient_checkpointing_func(block, h) if checkpointing else block(h)
        return h

    def freeze_encoder(self) -> None:
        """Train only what decodes from now on."""
        for name in ("encoder", "quant_conv", "encoder_projections"):
            if getattr(self, name, None) is not None:
                getattr(self, name).requires_grad_(False)

    @apply_forward_hook
    def encode_images(
        self, images: Tensor, labels: Tensor | None = None, normal: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Return a latent for each image in [-1, 1], not normalised: a sample of the posterior, or its mode.

        Args:
            labels: int64 (B,), of the people whose vectors are used.
            normal: gives standard normal numbers of the shape (B, *sizes) when called with `sizes`; None: the mode.
        """
        posterior = self.encode(images, condition=self.condition_vectors(labels)).latent_dist
        return posterior.mean if normal is None else posterior.mean + posterior.std * normal(*posterior.mean.shape[1:])

    @apply_forward_hook
    def decode_latents(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images of normalised latents, which may lie slightly outside [-1, 1]."""
        condition = self.condition_vectors(labels)
        return self.decode(self.denormalise(latents).to(self.dtype), condition=condition).sample


def _last_layers(half: nn.Module, h: Tensor, following: nn.Module | None = None) -> Tensor:
    """Return what the last layers of encoder or decoder make, in their weights' precision also under autocast.

    A variance goes up to e²⁰, a gradient of the last weights is summed over all places of all images: fp16 ends at
    65,504.
    """
    with torch.autocast(h.device.type, enabled=False):
        h = half.conv_out(half.conv_act(half.conv_norm_out(h.to(half.conv_out.weight.dtype))))
        return h if following is None else following(h)


def with_vectors_of(
    model: nn.Module, people: Mapping[str, int], other_people: bool = False, source: Any = "here"
) -> Any:
    """Return a VA-VAE with the vectors of these people, found by name, in the rows of their labels.

    Where it has them so already, or has none at all, it is the model itself. People that it does not know are refused,
    or have no vector, which is one of zeros, if `other_people`; so is another number of them than an earlier version's
    model has, which does not know their names.
    """
    config = model.config
    if not config.get("condition_dim"):
        return model
    known, count = config.get("people"), max(people.values()) + 1
    if known == people or (known is None and count == config.num_conditions):
        return model
    if unknown := people.keys() - (known or {}).keys():
        whose = f"of {join_first(known)}" if known else f"of {config.num_conditions} people without their names"
        given = join_first(sorted(unknown)) if known else f"{count} people"
        if not other_people:
            how = "fine-tune it on these images, or add vavae.other_people=true: whom it does not know gets no vector"
            raise UserError(f"The VA-VAE {source} has vectors {whose}, none for {given} of the images: {how}")
    kept = {name: label for name, label in people.items() if name not in unknown}
    table = model.conditions.weight.new_zeros(count, config.condition_dim)
    for name, label in kept.items():
        table[label] = model.conditions.weight.data[known[name]]
    model = copy.deepcopy(model)
    model.conditions = nn.Embedding(*table.shape, _weight=table)
    model.register_to_config(num_conditions=count, people=kept)
    return model


def block_types(encoder: Iterable[bool], decoder: Iterable[bool] | None = None) -> dict[str, tuple[str, ...]]:
    """Return AutoencoderKL's arguments for levels with attention or without, the finest first; None: as the encoder."""
    encoder = list(encoder)
    halves = (encoder, "DownEncoder"), (list(encoder if decoder is None else decoder)[::-1], "UpDecoder")
    down, up = (tuple(f"{'Attn' if here else ''}{name}Block2D" for here in half) for half, name in halves)
    return {"down_block_types": down, "up_block_types": up}


VAVAE_SIZES: dict[str, dict] = {
    # The published model: 16× smaller, 32 channels, attention at the coarsest level; 70 M parameters, for a GPU.
    "f16d32": {
        **block_types([False, False, False, False, True]),
        **{"block_out_channels": (128, 128, 256, 256, 512), "layers_per_block": 2},
        **{"latent_channels": 32, "norm_num_groups": 32, "sample_size": 256},
    },
    # For a CPU: 4× smaller, 8 channels, no attention; 0.42 M parameters, the size of the weights in this package. With
    # as many numbers in a latent, 8× and 32 channels learned far slower (28.3 against 30.3 dB after 360 steps).
    "small": {
        **block_types([False] * 3),
        **{"block_out_channels": (16, 32, 48), "layers_per_block": 1, "mid_block_add_attention": False},
        **{"latent_channels": 8, "norm_num_groups": 8, "sample_size": 64},
    },
}


def vavae(size: str = "f16d32", **arguments: object) -> VAVAE:
    """Return a VA-VAE with fresh weights, of a size of `VAVAE_SIZES`; further arguments replace single values."""
    check_known("VA-VAE size", size, VAVAE_SIZES)
    return VAVAE(**{**VAVAE_SIZES[size], **arguments})


def resolve_image_size(model: VAVAE, image_size: int | tuple[int, int] | None = None) -> int | tuple[int, int]:
    """Return an image size in pixels that this model takes, one number or (height, width); None: its own."""
    size = model.config.sample_size if image_size is None else image_size
    sides = (size,) if isinstance(size, int) else tuple(size)
    if min(sides) < 1 or any(side % model.downsampling for side in sides):
        given = "x".join(map(str, sides))
        raise UserError(f"--image_size {given} does not fit this VA-VAE: it must be divisible by {model.downsampling}")
    return size if isinstance(size, int) else sides


@torch.inference_mode()
def reconstruct_images(
    model: VAVAE, images: Tensor, labels: Tensor | None = None, decoded_as: Tensor | None = None
) -> Tensor:
    """Return reconstructions, uint8 (B, C, H, W) as the images, by the posterior's mode and the vectors of `labels`.

    `decoded_as` are the labels whose vectors the decoder takes; by default the same.
    """
    condition = model.condition_vectors(labels)
    latents = model.encode(to_unit(images), condition=condition).latent_dist.mode()
    condition = condition if decoded_as is None else model.condition_vectors(decoded_as)
    return to_pixels(model.decode(latents, condition=condition).sample)


def other_labels(labels: Tensor) -> Tensor:
    """Return for each label (B,) the next one that occurs among them: another person's, where there are two."""
    known, place = labels.unique(return_inverse=True)
    return known[(place + 1) % len(known)]


def reconstruct(
    model: VAVAE, data: ImageFolder, batch_size: int = 32, decoded_as: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return all images and their reconstructions with each person's vector, uint8 (N, C, H, W) both.

    `decoded_as`, int64 (N,), are labels whose vectors the decoder takes in place of their own.
    """
    model = model.eval()
    originals, reconstructions = [], []
    for rows in torch.arange(len(data)).split(batch_size):
        batch = data.get_batch(rows)
        originals.append(batch["images"])
        images, labels = (batch[key].to(model.device) for key in ("images", "labels"))
        others = None if decoded_as is None else decoded_as[rows].to(model.device)
        reconstructions.append(reconstruct_images(model, images, labels, others).cpu())
    return torch.cat(originals), torch.cat(reconstructions)
