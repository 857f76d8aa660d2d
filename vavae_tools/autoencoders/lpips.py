"""LPIPS: how different two images look, by the features of a VGG16 (Zhang et al. 2018, version 0.1).

Its convolutions come from torchvision's `vgg16-397923af.pth` (`features.0.weight`) or from a checkpoint of VA-VAE's or
VQGAN's training (`loss.perceptual_loss.net.slice1.0.weight`), its linear layers (`lin0.model.1.weight`) from the latter
or the lpips package's `vgg.pth`, which torchmetrics ships.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vavae_tools.checkpoints.foreign import flat_names
from vavae_tools.runtime.errors import UserError, in_home
from vavae_tools.runtime.files import load_weights, read_weights
from vavae_tools.runtime.machine import in_float32

VGG16_WIDTHS = (64, 128, 256, 512, 512)
_DEPTHS = (2, 2, 3, 3, 3)  # convolutions of each block; features are taken after its last ReLU
_LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # where torchvision's stack has the convolutions
_LPIPS_FREE_HINT = "--perceptual_weight 0 --spectral_weight 1 needs no weights"


class LPIPS(nn.Module):
    """The distance between two images: squared differences of normalised features, weighed by channel, averaged.

    It is frozen. `widths` are the channels of the five blocks.
    """

    def __init__(self, widths: Sequence[int] = VGG16_WIDTHS) -> None:
        super().__init__()
        self.origin = "random weights"
        channels = [3, *(width for width, depth in zip(widths, _DEPTHS, strict=True) for _ in range(depth))]
        self.convolutions = nn.ModuleList(nn.Conv2d(channels[n], channels[n + 1], 3, padding=1) for n in range(13))
        self.linear = nn.ParameterList(torch.full((width,), 1.0 / width) for width in widths)
        # from [-1, 1] to what VGG16 was trained on, with the constants of the published LPIPS
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Return distances (B,) in float32 of two batches (B, C, H, W) in [-1, 1]; C is 3, or 1 which is repeated.

        Gradients flow to `reconstruction` alone. Where it wants them this is a loss, and under autocast its
        convolutions run in that precision; without gradients it is a metric, and all of it runs in float32.
        """
        height, width = images.shape[2:]
        if min(height, width) < 16:  # four halvings leave one pixel
            small = f"Images of {height}×{width} are too small for LPIPS"
            raise UserError(f"{small}: it needs 16×16 at least. {_LPIPS_FREE_HINT}")
        features = self.features if reconstruction.requires_grad else in_float32(self.features)
        with torch.no_grad():
            expected = features(images)
        found = features(reconstruction)
        distances = [_distance(*layer) for layer in zip(found, expected, self.linear, strict=True)]
        return torch.stack(distances).sum(0)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return what the five blocks see in images (B, C, H, W): (B, widths[n], H/2ⁿ, W/2ⁿ), not normalised."""
        x = (images.float().expand(-1, 3, -1, -1) - self.shift) / self.scale
        convolutions, features = iter(self.convolutions), []
        for block, depth in enumerate(_DEPTHS):
            if block:
                x = F.max_pool2d(x, 2)
            for _ in range(depth):
                x = F.relu(next(convolutions)(x), inplace=True)
            features.append(x)
        return features


@in_float32
def _distance(found: Tensor, expected: Tensor, weights: Tensor) -> Tensor:
    """Return distances (B,) by one block's features (B, C, h, w) and the weights of their channels (C,)."""
    return torch.einsum("bchw,c->bhw", (_unit(found) - _unit(expected)).square(), weights).mean((1, 2))


def _unit(features: Tensor) -> Tensor:
    """Return features of length 1; the small number is under the root, so that zeros have a gradient."""
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


def load_lpips(files: str | Path | Sequence[str | Path], widths: Sequence[int] = VGG16_WIDTHS) -> LPIPS:
    """Load LPIPS with the weights of one or several checkpoints or safetensors files; the later ones count."""
    files = [in_home(file) for file in ([files] if isinstance(files, str | Path) else files)]
    shipped = Path(find_spec("torchmetrics").origin).parent / "functional/image/lpips_models/vgg.pth"
    weights: dict[str, Tensor] = {}
    origins: dict[str, Path] = {}
    for path in (shipped, *files):
        for key, tensor in flat_names(read_weights(path)).items():
            if name := own_name(key):
                weights[name] = tensor.flatten() if name.startswith("linear") else tensor
                origins[name.split(".")[0]] = path
    count = sum(name.startswith("convolutions") for name in weights)
    if count < 26:
        found = f"{', '.join(map(str, files)) or 'No file'}: {count} of the 26 tensors of LPIPS's VGG16"
        needed = "torchvision's vgg16-397923af.pth, or a VA-VAE's or VQGAN's checkpoint from training"
        raise UserError(f"{found}. Needed: {needed}. {_LPIPS_FREE_HINT}")
    lpips = LPIPS(widths)
    load_weights(lpips, weights, ", ".join(map(str, files)))
    lpips.origin = f"convolutions from {origins['convolutions']}, linear layers from {origins['linear']}"
    return lpips


def own_name(key: str) -> str | None:
    """Return our name of a tensor, or None where it is none of LPIPS's.

    >>> [own_name(key) for key in ("loss.perceptual_loss.net.slice2.5.bias", "features.5.bias", "lin1.model.1.weight")]
    ['convolutions.2.bias', 'convolutions.2.bias', 'linear.1']
    >>> own_name("classifier.0.weight")
    """
    if match := re.search(r"(?:(?:^|\.)net\.slice[1-5]|^features)\.(\d+)\.(weight|bias)$", key):
        layer = int(match[1])
        return f"convolutions.{_LAYERS.index(layer)}.{match[2]}" if layer in _LAYERS else None
    if match := re.search(r"(?:^|\.)lin([0-4])\.model\.\d\.weight$", key):
        return f"linear.{match[1]}"
    return None
