"""The adversary of the VA-VAE's loss: a small network that judges patches, its losses, and how much they weigh."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae_tools.errors import UserError
from vavae_tools.float32 import in_float32


class PatchDiscriminator(nn.Module):
    """Tells real pictures from made ones, patch by patch: one logit for each, high for real.

    The PatchGAN of pix2pix (Isola et al. 2017) as VQGAN and VA-VAE train it, with their names of the weights
    (`main.0.weight` …). A logit of the published one (3 layers) sees 70×70 pixels; they lie 8 pixels apart.

    Args:
        in_channels: of the pictures.
        width: channels of the first layer; each further one doubles them, up to eight times as many.
        layers: that halve the picture.
    """

    def __init__(self, in_channels: int = 3, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        widths = [width * min(2**n, 8) for n in range(layers + 1)]
        main: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for n in range(1, layers + 1):
            stride = 2 if n < layers else 1
            main += [
                nn.Conv2d(widths[n - 1], widths[n], 4, stride, padding=1, bias=False),  # BatchNorm brings the bias
                nn.BatchNorm2d(widths[n]),
                nn.LeakyReLU(0.2),
            ]
        self.main = nn.Sequential(*main, nn.Conv2d(widths[-1], 1, 4, padding=1))
        # the layers that halve must leave 3×3: the two after them take a pixel each
        self.smallest_size = 3 * 2**layers
        self.initialize_weights()

    def initialize_weights(self) -> None:
        """DCGAN's (Radford et al. 2016): normal with standard deviation 0.02, BatchNorm's scale around 1."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, pictures: Tensor) -> Tensor:
        """Judge pictures (B, C, H, W) in [-1, 1]: logits (B, 1, ⌊H/2^layers⌋ − 2, ⌊W/2^layers⌋ − 2).

        Call it once for real pictures and once for made ones: in training BatchNorm normalises each call by itself.

        Raises:
            UserError: pictures that are too small for a single patch.
        """
        height, width = pictures.shape[2:]
        if min(height, width) < self.smallest_size:
            raise UserError(
                f"Pictures of {height}×{width} are too small for the discriminator: it needs "
                f"{self.smallest_size}×{self.smallest_size} at least. Take larger pictures or disc_weight 0"
            )
        return self.main(pictures)


@in_float32
def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """The discriminator's loss (Lim & Ye 2017): real logits below 1 and made ones above −1 cost, halved as in VQGAN."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


@in_float32
def generator_loss(fake_logits: Tensor) -> Tensor:
    """The adversarial loss of what makes the pictures: minus the mean logit."""
    return -fake_logits.mean()


@in_float32
def adaptive_weight(reference_gradient: Tensor, gradient: Tensor, largest: float) -> Tensor:
    """The factor, 0 to `largest`, that makes one loss pull at a layer as strongly as the reference does (VQGAN).

    Args:
        reference_gradient, gradient: of the two losses at the same weights, any shape; Frobenius norms are compared.

    Returns:
        A scalar without a graph.
    """
    reference_norm, norm = (torch.linalg.vector_norm(g.detach()) for g in (reference_gradient, gradient))
    return (reference_norm / (norm + 1e-4)).clamp(0.0, largest)
