"""The representation autoencoder (RAE, Zheng et al. 2025): a frozen encoder's tokens, and a ViT that decodes them.

The decoder is diffusers' RAEDecoder. Its table of positions is the paper's for every grid here, which diffusers' own is
for 16×16 alone.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ModelMixin  # noqa: F401
from torch import Tensor

from vavae_tools.autoencoders.rae import RAE, RAE_SIZES
from vavae_tools.autoencoders.stable_diffusion import StableDiffusionVAE
from vavae_tools.data.images import to_pixels, to_unit
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError


def tiny_rae(picture_size: int = 32, **changes: Any) -> RAE:
    """A small RAE with random weights, encoder too, for trials without any downloads: 0.2 M parameters.

    Args:
        picture_size: pixels of a side; a multiple of 8, whose eighth is the latents' grid: 64×4×4 for 32 pixels.
        changes: further arguments of `RAE`.
    """
    if picture_size < 8 or picture_size % 8:
        raise UserError(f"picture_size {picture_size}: the tiny RAE takes multiples of 8 pixels")
    side = picture_size // 8 * 14
    encoder = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "image_size": side,
        "patch_size": 14,
    }
    return RAE(**{"encoder_config": encoder, "encoder_input_size": side, **RAE_SIZES["tiny"], **changes})


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
