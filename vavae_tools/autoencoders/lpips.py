"""LPIPS: how different two pictures look, by the features of a VGG16 (Zhang et al. 2018, version 0.1).

The network is built here, for torchvision may be missing. Its weights come from files:

- convolutions: the checkpoint of a VA-VAE or VQGAN in training holds them (`loss.perceptual_loss.net.slice1.0.weight`),
  and so does torchvision's `vgg16-397923af.pth` (`features.0.weight`);
- linear layers: in the same checkpoints and in the lpips package's `vgg.pth` (`lin0.model.1.weight`). Where no file
  holds them they are read from the torchmetrics package, which ships that file. `LPIPS.origin` says what was taken.
"""

import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import read_checkpoint
from vavae_tools.runtime.precision import in_float32

VGG16_WIDTHS = (64, 128, 256, 512, 512)
_DEPTHS = (2, 2, 3, 3, 3)  # convolutions of each block; features are taken after its last ReLU
_LAYERS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)  # where torchvision's stack has the convolutions
_SMALLEST = 16  # pixels, which four halvings leave one of
_NEEDS_NONE = "--perceptual_weight 0 --spectral_weight 1 needs no weights"


class LPIPS(nn.Module):
    """The distance between two pictures: squared differences of normalised features, weighed by channel, averaged.

    It is frozen, and stays in evaluation mode whatever `train()` of a module around it says.

    Args:
        widths: channels of the five blocks; VGG16's but in tests.

    Attributes:
        origin: where the weights come from.
    """

    shift: Tensor
    scale: Tensor

    def __init__(self, widths: Sequence[int] = VGG16_WIDTHS) -> None:
        super().__init__()
        self.origin = "random weights"
        channels = [3, *(width for width, depth in zip(widths, _DEPTHS, strict=True) for _ in range(depth))]
        self.convolutions = nn.ModuleList(nn.Conv2d(channels[n], channels[n + 1], 3, padding=1) for n in range(13))
        self.linear = nn.ParameterList(torch.full((width,), 1.0 / width) for width in widths)
        # from [-1, 1] to what VGG16 was trained on, with the constants of the published LPIPS
        self.register_buffer("shift", torch.tensor([-0.030, -0.088, -0.188]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.tensor([0.458, 0.448, 0.450]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "LPIPS":
        """Stay in evaluation mode."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, pictures: Tensor) -> Tensor:
        """Distances (B,) in float32 of two batches (B, C, H, W) in [-1, 1]; C is 3, or 1 which is repeated.

        Gradients flow to `reconstruction` alone. Where it wants them this is a loss, and under autocast its
        convolutions run in that precision; without gradients it is a metric, and all of it runs in float32.

        Raises:
            UserError: pictures smaller than 16×16.
        """
        height, width = pictures.shape[2:]
        if min(height, width) < _SMALLEST:
            raise UserError(
                f"Pictures of {height}×{width} are too small for LPIPS: it needs {_SMALLEST}×{_SMALLEST} at least. "
                f"{_NEEDS_NONE}"
            )
        features = self.features if reconstruction.requires_grad else in_float32(self.features)
        with torch.no_grad():
            expected = features(pictures)
        found = features(reconstruction)
        distances = [_distance(*layer) for layer in zip(found, expected, self.linear, strict=True)]
        return torch.stack(distances).sum(0)

    def features(self, pictures: Tensor) -> list[Tensor]:
        """What the five blocks see in pictures (B, C, H, W): (B, widths[n], H/2ⁿ, W/2ⁿ), not normalised."""
        x = (pictures.float().expand(-1, 3, -1, -1) - self.shift) / self.scale
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
    """Of one block's features (B, C, h, w), twice, and the weights of their channels (C,): (B,)."""
    return torch.einsum("bchw,c->bhw", (_unit(found) - _unit(expected)).square(), weights).mean((1, 2))


def _unit(features: Tensor) -> Tensor:
    """Length 1 over the channels; the small number is under the root, where zeros have a gradient (as torchmetrics)."""
    return features / (features.square().sum(1, keepdim=True) + 1e-8).sqrt()


def load_lpips(files: str | Path | Sequence[str | Path], widths: Sequence[int] = VGG16_WIDTHS) -> LPIPS:
    """LPIPS with the weights of one or several files; see the module's text for which.

    Args:
        files: checkpoints (read with `weights_only=True`) or safetensors. Where two hold the same, the later counts.
        widths: of the blocks, as in `LPIPS`.

    Raises:
        UserError: a file that cannot be read, no convolutions in them, or some of other shapes.
    """
    files = [Path(file) for file in ([files] if isinstance(files, str | Path) else files)]
    weights: dict[str, Tensor] = {}
    origins: dict[str, Path] = {}
    others: list[str] = []
    for path in files:
        for key, tensor in _read(path).items():
            name = _own_name(key)
            if name is None:
                others.append(key)
            else:
                weights[name], origins[_part(name)] = tensor, path
    lpips = LPIPS(widths)
    expected = lpips.state_dict()
    missing = [name for name in expected if name not in weights]
    convolutions = [name for name in missing if _part(name) == "convolutions"]
    if convolutions:
        raise UserError(_say_missing(files, convolutions, others))
    if missing:
        path = _shipped_linear_layers()
        weights |= {_own_name(key): tensor for key, tensor in _read(path).items()}
        origins["linear"] = path
    for name, tensor in expected.items():
        weights[name] = weights[name].flatten() if _part(name) == "linear" else weights[name]
        if weights[name].shape != tensor.shape:
            found, needed = ("×".join(map(str, t.shape)) for t in (weights[name], tensor))
            raise UserError(f"{origins[_part(name)]}: {name} is {found}, expected {needed} as in VGG16. {_NEEDS_NONE}")
    lpips.load_state_dict({name: weights[name].float() for name in expected})
    lpips.origin = f"convolutions from {origins['convolutions']}, linear layers from {origins['linear']}"
    return lpips


def _say_missing(files: Sequence[Path], missing: Sequence[str], others: Sequence[str]) -> str:
    _, number, kind = missing[0].split(".")
    besides = f" and others ({', '.join(others[:2])} …)" if others else ""
    return (
        f"{', '.join(map(str, files)) or 'No file'}: {26 - len(missing)} of the 26 tensors of LPIPS's VGG16 (without "
        f"features.{_LAYERS[int(number)]}.{kind}){besides}. Needed: torchvision's vgg16-397923af.pth, or a VA-VAE's or "
        f"VQGAN's checkpoint from training (loss.perceptual_loss.net.slice1.0.weight …). {_NEEDS_NONE}"
    )


def _part(name: str) -> str:
    return name.split(".")[0]


def _own_name(key: str) -> str | None:
    """Our name of a tensor, or None where it is none of LPIPS's.

    >>> [_own_name(key) for key in ("loss.perceptual_loss.net.slice2.5.bias", "features.5.bias", "lin1.model.1.weight")]
    ['convolutions.2.bias', 'convolutions.2.bias', 'linear.1']
    >>> _own_name("classifier.0.weight")
    """
    if match := re.search(r"(?:(?:^|\.)net\.slice[1-5]|^features)\.(\d+)\.(weight|bias)$", key):
        layer = int(match[1])
        return f"convolutions.{_LAYERS.index(layer)}.{match[2]}" if layer in _LAYERS else None
    if match := re.search(r"(?:^|\.)lin([0-4])\.model\.\d\.weight$", key):
        return f"linear.{match[1]}"
    return None


def _shipped_linear_layers() -> Path:
    package = find_spec("torchmetrics")
    path = Path(package.origin).parent / "functional/image/lpips_models/vgg.pth" if package else None
    if path is None or not path.is_file():
        raise UserError(
            "LPIPS's linear layers are in none of the files, and this torchmetrics does not ship them. Name the lpips "
            f"package's lpips/weights/v0.1/vgg.pth as well. {_NEEDS_NONE}"
        )
    return path


def _read(path: Path) -> dict[str, Tensor]:
    if path.suffix == ".safetensors" and path.is_file():
        try:
            return load_file(path)
        except SafetensorError as error:
            raise UserError(f"{path} is damaged ({error}): copy it anew") from None
    weights = read_checkpoint(path)
    weights = weights.get("state_dict", weights)
    return {name: tensor for name, tensor in weights.items() if isinstance(tensor, Tensor)}
