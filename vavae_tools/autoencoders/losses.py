"""What a good reconstruction is: the parts of an autoencoder's loss, each with a weight; 0 turns a part off.

Each is a mean, so that weights mean the same at any batch and image size. Images are (B, C, H, W) in [-1, 1]. LDM and
VA-VAE sum over an image: their total is ours times C·H·W.
"""

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Tensor, nn

from vavae_tools.runtime.errors import UserError, check_known
from vavae_tools.runtime.machine import in_float32


class PatchDiscriminator(nn.Module):
    """The PatchGAN of pix2pix (Isola et al. 2017): a logit for each patch of an image, high for real ones.

    Weights are named as VQGAN and VA-VAE name them (`main.0.weight` …). A logit sees 70×70 pixels; they lie 8 pixels
    apart. `width` is the channels of the first layer; the others have 2, 4 and 8 times as many.
    """

    smallest_size = 24  # pixels of a side: three layers halve it, two more take a pixel each

    def __init__(self, in_channels: int = 3, width: int = 64) -> None:
        super().__init__()
        main: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for wider, stride in ((2 * width, 2), (4 * width, 2), (8 * width, 1)):
            conv = nn.Conv2d(wider // 2, wider, 4, stride, padding=1, bias=False)  # BatchNorm brings the bias
            main += [conv, nn.BatchNorm2d(wider), nn.LeakyReLU(0.2)]
        self.main = nn.Sequential(*main, nn.Conv2d(8 * width, 1, 4, padding=1))
        for module in self.modules():  # as DCGAN (Radford et al. 2016)
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits (B, 1, ⌊H/8⌋ − 2, ⌊W/8⌋ − 2) of images (B, C, H, W) in [-1, 1].

        Call it once for real images and once for generated ones: in training BatchNorm normalises each call by itself.
        """
        height, width = images.shape[2:]
        if min(height, width) < self.smallest_size:
            needed = f"{self.smallest_size}×{self.smallest_size} at least. Take larger images or disc_weight 0"
            raise UserError(f"Images of {height}×{width} are too small for the discriminator: it needs {needed}")
        return self.main(images)


@in_float32
def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """Return the discriminator's hinge loss (Lim & Ye 2017), halved as in VQGAN."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


@in_float32
def generator_loss(fake_logits: Tensor) -> Tensor:
    """Return the autoencoder's adversarial loss: minus the mean logit."""
    return -fake_logits.mean()


@in_float32
def adaptive_weight(reference_gradient: Tensor, gradient: Tensor, largest: float, epsilon: float = 1e-4) -> Tensor:
    """Return the factor, 0 to `largest`, that makes one loss pull at a layer as strongly as the reference (VQGAN): the
    Frobenius norms of the two losses' gradients at the same weights are compared.
    """
    reference_norm, norm = (torch.linalg.vector_norm(g.detach()) for g in (reference_gradient, gradient))
    return (reference_norm / (norm + epsilon)).clamp(0.0, largest)


@in_float32
def l1(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Return the mean absolute error, in the units of [-1, 1]."""
    return F.l1_loss(reconstruction, images)


@in_float32
def gradient(reconstruction: Tensor, images: Tensor) -> Tensor:
    """Return the mean absolute error of differences between neighbours, at full, half and quarter size."""
    total = reconstruction.new_zeros(())
    for scale in range(3):
        if scale:
            reconstruction, images = F.avg_pool2d(reconstruction, 2), F.avg_pool2d(images, 2)
        for axis in (2, 3):
            total = total + F.l1_loss(reconstruction.diff(dim=axis), images.diff(dim=axis))
    return total / 3


@in_float32
def spectral(reconstruction: Tensor, images: Tensor, windows: tuple[int, ...] = (8, 16)) -> Tensor:
    """Return the mean absolute error of the magnitudes of short 2-D Fourier transforms (half-overlapping Hann windows).

    This keeps fine texture strong even where its phase cannot be known, without pretrained weights (as the
    multi-resolution STFT losses of Parallel WaveGAN, Yamamoto et al. 2020, for sound). Windows larger than the image
    are left out.
    """
    total, windows = reconstruction.new_zeros(()), [size for size in windows if size <= min(images.shape[2:])]
    for size in windows:
        window = torch.hann_window(size, periodic=False, device=images.device)
        window = torch.outer(window, window)
        window = window / window.square().sum().sqrt()
        with torch.no_grad():
            expected = _magnitudes(images, window)
        total = total + (_magnitudes(reconstruction, window) - expected).abs().mean()
    return total / max(len(windows), 1)


def _magnitudes(images: Tensor, window: Tensor) -> Tensor:
    size = len(window)
    patches = images.unfold(2, size, size // 2).unfold(3, size, size // 2)  # (B, C, rows, columns, size, size)
    return torch.fft.rfft2(patches * window).abs()


@in_float32
def kl(posterior: DiagonalGaussianDistribution, images: Tensor) -> Tensor:
    """Return the KL divergence from a standard normal, summed over the latent and divided by the image's C·H·W."""
    return posterior.kl().mean() / images[0].numel()


IMAGE_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {"l1": l1, "gradient": gradient, "spectral": spectral}
"""By name; a key NAME_weight of a recipe's loss weighs each of them."""


class ImageLoss:
    """The weighted sum of what compares images: `loss, parts = image_loss(reconstruction, images)`.

    Args:
        weights: by name, of `IMAGE_LOSSES` and of "perceptual", which is `lpips`; 0 turns a part off.
    """

    def __init__(self, weights: Mapping[str, float], lpips: Callable[[Tensor, Tensor], Tensor] | None = None) -> None:
        known = {**IMAGE_LOSSES, "perceptual": lambda made, images: lpips(made, images).mean()}
        for name in weights:
            check_known("loss", name, known)
        self.parts = {name: (known[name], weight) for name, weight in weights.items() if weight}
        if not self.parts:
            raise UserError("All weights of the image loss are 0: nothing compares the images. Take l1_weight 1")

    def __call__(self, reconstruction: Tensor, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        parts = {name: part(reconstruction, images) for name, (part, _) in self.parts.items()}
        loss = sum((weight * parts[name] for name, (_, weight) in self.parts.items()), reconstruction.new_zeros(()))
        return loss, {**{name: value.detach() for name, value in parts.items()}, "reconstruction": loss.detach()}


def autoencoder_loss(
    image_loss: ImageLoss,
    reconstruction: Tensor,
    images: Tensor,
    posterior: DiagonalGaussianDistribution | None = None,
    kl_weight: float = 1e-6,
    adversary: Callable[[Tensor], Tensor] | None = None,
    disc_weight: float = 0.5,
    decoder_last: Tensor | None = None,
    adversary_norm: str = "sums",
    alignment: tuple[Tensor, Tensor] | None = None,
    vf_weight: float = 0.1,
    encoder_last: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Combine every part as VA-VAE (Yao & Wang 2025) or RAE (Zheng et al. 2025) does, divided by C·H·W.

    The adversarial and the alignment part are weighed against the image loss by the gradients that each has at a
    layer (VQGAN, Esser et al. 2021). What compares images is differentiated once, down to the reconstruction, from
    where both weighing and training go on: LPIPS and the discriminator are passed backwards once, not three times.

    Args:
        reconstruction: (B, C, H, W) float32 with its graph.
        adversary: reconstruction → the generator's adversarial loss.
        decoder_last, encoder_last: weights of the last layers, where `adversary` and `alignment` are weighed.
        adversary_norm: which gradients are compared there: "sums", of errors summed over an image (VA-VAE), or "means"
            (RAE), whose limit of 1e4 is C·H·W times as far away.
        alignment: distance and cosine of the alignment, with their graphs.

    Returns:
        A scalar to go backwards from (its value means nothing), and the parts by name: "loss" is the loss's value,
        "disc_weight" and "vf_weight" the weights found, in sums or in means.
    """
    values = images[0].numel()
    unit, epsilon = {"sums": (1, 1e-4), "means": (values, 1e-6)}[adversary_norm]
    image = reconstruction.detach().requires_grad_()
    loss, parts = image_loss(image, images)
    # in sums: also where a half-precision decoder follows, these numbers are neither tiny nor huge
    (direction,) = torch.autograd.grad(loss * values, image)  # (B, C, H, W)
    total, into = loss.detach(), direction
    if adversary is not None:
        parts["generator"] = adversary(image)
        (against,) = torch.autograd.grad(parts["generator"], image)
        found = _gradient(reconstruction, decoder_last, values * against) / values
        reference = _gradient(reconstruction, decoder_last, direction) / unit
        weight = disc_weight * adaptive_weight(reference, found, largest=1e4, epsilon=epsilon)
        parts["disc_weight"] = weight
        total = total + weight * unit * parts["generator"].detach() / values
        into = into + weight * unit * against
    objective = (reconstruction * into).sum() / values
    if kl_weight and posterior is not None:
        parts["kl"] = kl(posterior, images)
        total, objective = total + kl_weight * parts["kl"], objective + kl_weight * parts["kl"]
    if alignment is not None:
        parts["distance"], parts["cosine"] = alignment
        parts["alignment"] = parts["distance"] + parts["cosine"]
        at_last = [_gradient(reconstruction, encoder_last, direction), _gradient(parts["alignment"], encoder_last)]
        parts["vf_weight"] = vf_weight * adaptive_weight(*at_last, largest=1e8)
        weighted = parts["vf_weight"] * parts["alignment"] / values
        total, objective = total + weighted, objective + weighted
    parts["loss"] = total
    # a loss that is not finite must not look as if it had a gradient: on no process of several
    objective = objective * torch.where(torch.isfinite(total.detach()), 1.0, torch.nan)
    return objective, {name: value.detach() for name, value in parts.items()}


def _gradient(of: Tensor, at: Tensor, direction: Tensor | None = None) -> Tensor:
    return torch.autograd.grad(of, at, direction, retain_graph=True)[0]
