"""Stable Diffusion's autoencoder (Rombach et al. 2022): diffusers' AutoencoderKL with the scale of its latents.

Beside the class stands a small one that learns made-up pictures within a minute, for trials without any downloads.
"""

import json
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin  # noqa: F401  (a pipeline looks here for the base it loads with)
from torch import Tensor

from vavae_tools.autoencoders.hub import local_folder
from vavae_tools.data.pixels import to_pixels, to_unit
from vavae_tools.draws import Draws
from vavae_tools.errors import UserError

_WEIGHT_FILES = tuple(
    f"diffusion_pytorch_model{variant}.{ending}"
    for variant in ("", ".fp16")
    for ending in ("safetensors", "safetensors.index.json", "bin")
)


class StableDiffusionVAE(AutoencoderKL):
    """AutoencoderKL as Stable Diffusion uses it: what it encodes is (z − shift_factor) · scaling_factor, of about unit
    variance, and what it decodes is that too. Arguments are AutoencoderKL's own.

    Pictures are (B, C, H, W) in [-1, 1]; latents (B, latent_channels, H/f, W/f), of Stable Diffusion 1.5 (B, 4, H/8,
    W/8). `enable_slicing()` takes pictures one by one, for less memory.
    """

    has_own_statistics = True
    """Its latents come out scaled already, so that no statistics are to be computed from the training side."""

    decoding_alone: ClassVar = ("decoder.", "post_quant_conv.")
    """How the names of weights begin that the latents do not follow from: another decoder leaves them valid."""

    picture_size = None
    """It takes any size; that it has this attribute makes its config, and so the scale, part of the latents' key."""

    @property
    def downsampling(self) -> int:
        """Pixels of a picture's side for one of a latent's."""
        return 2 ** (len(self.config.block_out_channels) - 1)

    def encode_pictures(
        self, pictures: Tensor, labels: Tensor | None = None, normal: Callable[..., Tensor] | None = None
    ) -> Tensor:
        """Pictures in [-1, 1] → one latent each, scaled: a sample of the posterior, or its mode.

        Args:
            labels: taken as every autoencoder's, and not used.
            normal: gives standard normal numbers of the shape (B, *sizes) when called with `sizes`; None: the mode.
        """
        posterior = self.encode(pictures).latent_dist
        z = posterior.mean if normal is None else posterior.mean + posterior.std * normal(*posterior.mean.shape[1:])
        return (z - (self.config.shift_factor or 0.0)) * self.config.scaling_factor

    def decode_latents(self, latents: Tensor, labels: Tensor | None = None) -> Tensor:
        """Scaled latents, as a denoiser makes them → pictures, which may lie slightly outside [-1, 1]."""
        z = latents / self.config.scaling_factor + (self.config.shift_factor or 0.0)
        return self.decode(z.to(self.dtype)).sample


# ---- from files


def is_stable_diffusion_vae(folder: str | Path) -> bool:
    """Whether a folder, or the `vae/` in it, holds an AutoencoderKL whose own scale its latents are used with.

    Without one (a scaling_factor of 1), or with a mean and deviation of each channel, it is a VA-VAE that was exported.
    """
    config = _folder_of_vae(Path(folder)) / "config.json"
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(found, dict) or found.get("_class_name") not in ("AutoencoderKL", "StableDiffusionVAE"):
        return False
    plain = found["_class_name"] == "AutoencoderKL"
    return not plain or (not found.get("latents_mean") and found.get("scaling_factor", 0.18215) != 1)


def load_stable_diffusion_vae(source: str | Path, use_slicing: bool = False) -> StableDiffusionVAE:
    """A Stable Diffusion VAE in float32, such as that of stabilityai/sd-vae-ft-mse.

    Args:
        source: a folder that `save_pretrained` wrote, a pipeline's folder with `vae/` in it, or "owner/name", a
            repository of Hugging Face's hub, read only where no such path is there.
        use_slicing: encode and decode pictures one by one, for less memory.

    Raises:
        UserError: nothing there, no AutoencoderKL, no weights, or files that are damaged.
    """
    files = ["config.json", "diffusion_pytorch_model.safetensors"]
    there = local_folder(
        source,
        of="a Stable Diffusion VAE",
        name="the one that holds its config.json or vae/",
        instead="download its vae/ and name that folder",
        patterns=[*files, *(f"vae/{file}" for file in files)],
    )
    folder = _folder_of_vae(there)
    config = folder / "config.json"
    there = sorted(path.name for path in folder.iterdir())
    if not config.is_file() or not any(name in there for name in _WEIGHT_FILES):
        missing = _WEIGHT_FILES[0] if config.is_file() else "config.json"
        raise UserError(
            f"{folder} is no folder of a Stable Diffusion VAE: {missing} is missing; it holds "
            f"{', '.join(there[:5]) or 'nothing'}{' …' if len(there) > 5 else ''}"
        )
    try:
        name = json.loads(config.read_text(encoding="utf-8")).get("_class_name")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config} is damaged ({error}): copy the folder anew") from None
    if name not in ("AutoencoderKL", "StableDiffusionVAE"):
        raise UserError(f"{folder} holds a {name}, expected an AutoencoderKL as Stable Diffusion's vae/")
    half = not any(name in there for name in _WEIGHT_FILES if "fp16" not in name)
    try:  # a .bin is read as tensors only; without low_cpu_mem_usage it does not ask for a package that is of no use
        model, report = StableDiffusionVAE.from_pretrained(
            folder, low_cpu_mem_usage=False, output_loading_info=True, variant="fp16" if half else None
        )
    except Exception as error:  # of any kind: what diffusers' versions stumble over in damaged files
        reason = "".join(filter(str.isprintable, " ".join(str(error).split())))[:120]
        raise UserError(f"The VAE in {folder} cannot be loaded ({reason}): copy the folder anew") from None
    if report["missing_keys"]:  # diffusers goes on with random numbers there
        missing = sorted(report["missing_keys"])
        raise UserError(
            f"The weights in {folder} are not those of its config.json: {len(missing)} are missing, such as "
            f"{missing[0]}. Copy the folder anew"
        )
    if use_slicing:
        model.enable_slicing()
    return model.float().eval()


def _folder_of_vae(folder: Path) -> Path:
    inside = folder / "vae"
    return inside if not (folder / "config.json").is_file() and inside.is_dir() else folder


# ---- a small one


def tiny_kl(downsampling: int = 4, latent_channels: int = 4, width: int = 8, seed: int = 0) -> StableDiffusionVAE:
    """A small random autoencoder of the same make.

    Args:
        downsampling: 2, 4 or 8.
        width: channels at the pictures' own size, a multiple of 8; twice as many at each size below, up to four times.

    Raises:
        UserError: numbers that cannot be.
    """
    if downsampling not in (2, 4, 8) or width < 8 or width % 8:
        raise UserError(
            f"tiny_kl with downsampling {downsampling} and width {width}: expected 2, 4 or 8 and a multiple of 8"
        )
    levels = downsampling.bit_length()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = StableDiffusionVAE(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(width * min(2**level, 4) for level in range(levels)),
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=4,
            scaling_factor=1.0,
            mid_block_add_attention=False,
        )
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".conv2." in name:  # residual blocks begin as the identity
                weight.zero_()
        # and the posterior narrow: a decoder that sees noise alone learns to draw grey first
        model.quant_conv.weight[latent_channels:] = 0
        model.quant_conv.bias[latent_channels:] = -6
    return model.eval()


def train_tiny_kl(
    model: StableDiffusionVAE,
    pictures: Tensor,
    steps: int = 500,
    batch_size: int = 16,
    lr: float = 0.02,
    kl_weight: float = 1e-5,
    seed: int = 0,
    callback: Callable[[int, float], Any] | None = None,
) -> float:
    """Teach a `tiny_kl` some pictures, and set shift and scale by their latents.

    Args:
        pictures: uint8 (N, 3, H, W), of which batches are drawn.
        steps: of `_Muon`, whose learning rate `lr` rises for a twentieth of them and falls to zero as a cosine.
        kl_weight: of the divergence from a standard normal, per number of a latent, against the mean squared error.
        seed: batches and posterior samples follow from it.
        callback: called after each step with its number and the loss.

    Returns:
        Peak signal-to-noise ratio of the reconstructions of (up to 256 of) the pictures, in dB.
    """
    model.train().requires_grad_(True)
    optimizer = _Muon(model.parameters())
    rise = max(1, steps // 20)
    for step in range(steps):
        draws = Draws(seed, step, torch.arange(batch_size))
        rows = (draws.uniform("picture") * len(pictures)).long()
        x = to_unit(pictures[rows]).to(model.device)
        posterior = model.encode(x).latent_dist
        normal = draws.normal("posterior", *posterior.mean.shape[1:]).to(x.device)
        made = model.decode(posterior.mean + posterior.std * normal).sample
        kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
        loss = F.mse_loss(made, x) + kl_weight * kl
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(lr * min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * step / steps)))
        if callback is not None:
            callback(step, loss.item())
    model.eval().requires_grad_(False)
    some = pictures[:256]
    model.register_to_config(shift_factor=None, scaling_factor=1.0)
    latents = _encoded(model, some)
    model.register_to_config(shift_factor=float(latents.mean()), scaling_factor=float(1 / latents.std()))
    return reconstruction_psnr(model, some)


class _Muon:
    """Steps of equal length in all directions of a matrix (Muon, Jordan et al. 2024), and Adam's for vectors.

    It takes a small autoencoder in 400 steps to 28 dB, where Adam comes to 19.
    """

    def __init__(self, weights: Iterable[Tensor], momentum: float = 0.95) -> None:
        weights = list(weights)
        self.matrices = [(weight, torch.zeros_like(weight)) for weight in weights if weight.ndim > 1]
        self.adam = torch.optim.Adam([weight for weight in weights if weight.ndim < 2], betas=(0.9, 0.99))
        self.momentum = momentum

    @torch.no_grad()
    def step(self, lr: float) -> None:
        for weight, average in self.matrices:
            average.lerp_(weight.grad, 1 - self.momentum)
            update = _orthogonal(weight.grad.lerp(average, self.momentum).flatten(1))
            weight.sub_(update.view_as(weight), alpha=lr * max(1, update.shape[0] / update.shape[1]) ** 0.5)
        self.adam.param_groups[0]["lr"] = 0.2 * lr
        self.adam.step()


def _orthogonal(matrix: Tensor) -> Tensor:
    """The matrix with all its singular values brought near 1, by five steps of Newton and Schulz's iteration."""
    if matrix.shape[0] > matrix.shape[1]:
        return _orthogonal(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


@torch.no_grad()
def _encoded(model: StableDiffusionVAE, pictures: Tensor) -> Tensor:
    return torch.cat([model.encode_pictures(to_unit(part).to(model.device)) for part in pictures.split(64)])


@torch.no_grad()
def reconstruction_psnr(model: StableDiffusionVAE, pictures: Tensor) -> float:
    """Peak signal-to-noise ratio in dB, over all pixels, of what comes back of pictures uint8 (N, 3, H, W)."""
    made = torch.cat([to_pixels(model.decode_latents(part)).cpu() for part in _encoded(model, pictures).split(64)])
    error = (made.double() - pictures.double()).square().mean().item()
    return 20 * math.log10(255) - 10 * math.log10(max(error, 1e-12))
