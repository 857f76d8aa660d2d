"""What a good reconstruction is: the parts of the VA-VAE's loss, each with a weight; 0 turns a part off.

A part is a function of (reconstruction, pictures) or of the posterior that returns its mean over the batch, so that
weights mean the same at any batch and picture size. Pictures are (B, C, H, W) in [-1, 1].
"""

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor


def l1(reconstruction: Tensor, pictures: Tensor) -> Tensor:
    """Mean absolute error, in the units of [-1, 1]."""
    return F.l1_loss(reconstruction, pictures)


def gradient(reconstruction: Tensor, pictures: Tensor, scales: int = 3) -> Tensor:
    """Mean absolute error of the differences between neighbours, at full, half and quarter size: edges stay edges."""
    total = reconstruction.new_zeros(())
    for scale in range(scales):
        if scale:
            reconstruction, pictures = F.avg_pool2d(reconstruction, 2), F.avg_pool2d(pictures, 2)
        for axis in (2, 3):
            total = total + F.l1_loss(reconstruction.diff(dim=axis), pictures.diff(dim=axis))
    return total / scales


def spectral(reconstruction: Tensor, pictures: Tensor, windows: tuple[int, ...] = (8, 16)) -> Tensor:
    """Mean absolute error of the magnitudes of short 2-D Fourier transforms (half-overlapping Hann windows).

    A blurred texture loses nothing in the mean but much of its magnitude; this part gives fine texture its strength
    back even where its phase cannot be known, and needs no pretrained weights (as the multi-resolution STFT losses of
    Parallel WaveGAN, Yamamoto et al. 2020, do for sound). Windows larger than the picture are left out.
    """
    total, count = reconstruction.new_zeros(()), 0
    for size in windows:
        if size > min(pictures.shape[2:]):
            continue
        window = torch.hann_window(size, periodic=False, device=pictures.device)
        window = torch.outer(window, window)
        window = window / window.square().sum().sqrt()
        with torch.no_grad():
            expected = _magnitudes(pictures, window)
        total, count = total + (_magnitudes(reconstruction, window) - expected).abs().mean(), count + 1
    return total / max(count, 1)


def _magnitudes(pictures: Tensor, window: Tensor) -> Tensor:
    size = len(window)
    patches = (
        pictures.float().unfold(2, size, size // 2).unfold(3, size, size // 2)
    )  # (B, C, rows, columns, size, size)
    return torch.fft.rfft2(patches * window).abs()


def kl(posterior: DiagonalGaussianDistribution, pictures: Tensor) -> Tensor:
    """KL divergence of the posterior from a standard normal, summed over the latent, per value of the picture.

    In the reference's loss (LDM, VA-VAE) absolute errors are summed over a picture and so is this; here both are
    divided by C·H·W. A `kl_weight` of 1e-6 means the same in both.
    """
    return posterior.kl().mean() / pictures[0].numel()


class VAVAELoss:
    """The weighted sum of the parts: `loss, parts = loss(reconstruction, pictures, posterior)`.

    `parts` holds each part by its name, "reconstruction" (the weighted sum without the KL) and "loss".

    Args:
        l1_weight: of the absolute error.
        gradient_weight: of the multi-scale gradients.
        spectral_weight: of the short-time spectra; with the gradients it keeps reconstructions sharp.
        kl_weight: of the KL divergence; 1e-6 is the published value: nearly none, the denoiser's latents are
            normalised instead.
    """

    def __init__(
        self,
        l1_weight: float = 1.0,
        gradient_weight: float = 0.5,
        spectral_weight: float = 1.0,
        kl_weight: float = 1e-6,
    ) -> None:
        self.pictures = {
            part: weight
            for part, weight in [(l1, l1_weight), (gradient, gradient_weight), (spectral, spectral_weight)]
            if weight
        }
        self.kl_weight = kl_weight

    def __call__(
        self, reconstruction: Tensor, pictures: Tensor, posterior: DiagonalGaussianDistribution
    ) -> tuple[Tensor, dict[str, Tensor]]:
        parts = {part.__name__: part(reconstruction, pictures) for part in self.pictures}
        loss = sum(weight * parts[part.__name__] for part, weight in self.pictures.items())
        parts["reconstruction"] = loss
        if self.kl_weight:
            parts["kl"] = kl(posterior, pictures)
            loss = loss + self.kl_weight * parts["kl"]
        return loss, {"loss": loss.detach(), **{name: value.detach() for name, value in parts.items()}}
