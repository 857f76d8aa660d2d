"""Stable Diffusion's autoencoder (Rombach et al. 2022): diffusers' AutoencoderKL with the scale of its latents."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from diffusers import AutoencoderKL, ModelMixin  # noqa: F401  (a pipeline looks here for the base it loads with)
from torch import Tensor

from vavae_tools.autoencoders.vavae import LatentStatistics
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import load_model, local_folder, read_json

SHAPES_VAE = Path(__file__).parent / "pretrained_shapes"
"""A small one for coloured shapes: latents 4×H/4×W/4 (`benchmarks/pretrain_small.py`)."""


class StableDiffusionVAE(LatentStatistics, AutoencoderKL):
    """AutoencoderKL as Stable Diffusion uses it: its latents are (z − shift_factor) · scaling_factor.

    With a mean and a standard deviation of each channel in its config they are (z − mean) · scaling_factor / std.

    Images are (B, C, H, W) in [-1, 1]; latents (B, latent_channels, H/f, W/f), of about unit variance.
    """

    has_own_statistics = True
    decoding_alone: ClassVar = ("decoder.", "post_quant_conv.")
    image_size = None  # any; that it has this attribute makes its config, and so the scale, part of the latents' key

    @property
    def downsampling(self) -> int:
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode_images(
        self, images: Tensor, labels: Tensor | None = None, normal: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Return a scaled latent for each image in [-1, 1], as `VAVAE.encode_images`; labels are not used."""
        posterior = self.encode(images).latent_dist
        z = posterior.mean if normal is None else posterior.mean + posterior.std * normal(*posterior.mean.shape[1:])
        mean, std = self._statistics(z)
        return (z - mean) * (self.config.scaling_factor / std)

    def decode_latents(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Return images, which may lie slightly outside [-1, 1], of scaled latents."""
        mean, std = self._statistics(latents)
        return self.decode((latents / (self.config.scaling_factor / std) + mean).to(self.dtype)).sample

    def _statistics(self, like: Tensor) -> tuple[Tensor | float, Tensor | float]:
        if self.config.latents_mean is None:
            return self.config.shift_factor or 0.0, 1.0
        return super()._statistics(like)


def is_stable_diffusion_vae(folder: str | Path) -> bool:
    """Return whether a folder, or the `vae/` in it, holds an AutoencoderKL whose own scale its latents are used with.

    Without one (a scaling_factor of 1), or with a mean and deviation of each channel, it is a VA-VAE that was exported.
    """
    config = config_of_vae(Path(folder))[1]
    if config.get("_class_name") == "AutoencoderKL":
        return not config.get("latents_mean") and config.get("scaling_factor", 0.18215) != 1
    return config.get("_class_name") == "StableDiffusionVAE"


def load_stable_diffusion_vae(source: str | Path, use_slicing: bool = False) -> StableDiffusionVAE:
    """Return a Stable Diffusion VAE in float32, such as that of stabilityai/sd-vae-ft-mse.

    Args:
        source: a folder that `save_pretrained` wrote, a pipeline's folder with `vae/` in it, or "owner/name", a
            repository of Hugging Face's hub, read only where no such path is there.
        use_slicing: encode and decode images one by one, for less memory.
    """
    source = local_folder(
        source,
        of="a Stable Diffusion VAE",
        instead="download its vae/ and name that folder, or the one that holds it",
        part="vae",
    )
    folder, config = config_of_vae(source)
    if config.get("_class_name") not in ("AutoencoderKL", "StableDiffusionVAE"):
        found = f"holds a {config.get('_class_name')}" if config else "has no config.json"
        raise UserError(f"{folder} {found}, expected an AutoencoderKL as Stable Diffusion's vae/")
    numbers = [config.get(name) for name in ("latents_mean", "latents_std")]
    if numbers != [None, None]:
        channels = config.get("latent_channels", 4)
        if any(not isinstance(of, list) or len(of) != channels for of in numbers) or min(numbers[1]) <= 0:
            raise UserError(f"{folder}: expected latents_mean and latents_std > 0, {channels} numbers each, or neither")
        if config.get("shift_factor"):
            raise UserError(f"{folder} has a shift_factor besides latents_mean: remove the one that does not hold")
    model = load_model(StableDiffusionVAE, folder)
    if use_slicing:
        model.enable_slicing()
    return model


def config_of_vae(folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return the folder of a VAE, this one or the `vae/` in it, and its configuration, empty where there is none."""
    if not (folder / "config.json").is_file() and (folder / "vae").is_dir():
        folder /= "vae"
    config = folder / "config.json"
    return folder, read_json(config) if config.is_file() else {}
