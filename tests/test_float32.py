"""What measures and compares images gives the same numbers inside autocast and outside, to the last digit."""

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from tiny import same

from vavae_tools.autoencoders.foundation import alignment_loss
from vavae_tools.autoencoders.losses import adaptive_weight, generator_loss, gradient, hinge_loss, kl, l1, spectral
from vavae_tools.autoencoders.lpips import LPIPS
from vavae_tools.evaluation.classifier import PersonClassifier
from vavae_tools.evaluation.metrics import frechet_distance, kernel_distance, nearest, psnr, sharpness, ssim
from vavae_tools.runtime.machine import Computing


def images(seed: int = 0, size: int = 24) -> torch.Tensor:
    """Numbers that bfloat16 holds exactly."""
    return (torch.rand(4, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1).bfloat16().float()


def seeded(network: type, *arguments) -> torch.nn.Module:
    torch.manual_seed(0)
    return network(*arguments).eval().requires_grad_(False)


LPIPS_OF = seeded(LPIPS, (4, 4, 6, 6, 8))
CLASSIFIER = seeded(PersonClassifier, 3, (24, 24))


def divergence(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return kl(DiagonalGaussianDistribution(torch.cat([x, y], dim=1).float()), x)


def features_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    features, named = CLASSIFIER.judge(((x + 1) * 127.5).to(torch.uint8))
    return torch.cat([features, named[:, None]], dim=1)


MEASURES = {
    **{measure.__name__: measure for measure in (psnr, ssim, sharpness, l1, gradient, spectral)},
    **{measure.__name__: measure for measure in (hinge_loss, alignment_loss, divergence, features_of)},
    "generator_loss": lambda x, y: generator_loss(x),
    "adaptive_weight": lambda x, y: adaptive_weight(x, y, 1e4),
    "lpips": LPIPS_OF,
    "classifier": lambda x, y: CLASSIFIER.features(x),
    "frechet_distance": lambda x, y: torch.tensor(frechet_distance(x.flatten(1), y.flatten(1))),
    "kernel_distance": lambda x, y: torch.tensor(kernel_distance(x.flatten(1), y.flatten(1)).value),
    "nearest": lambda x, y: nearest(x.flatten(1), y.flatten(1))[1],
}


@pytest.mark.parametrize("name", MEASURES)
def test_the_same_number_inside_autocast(name):
    """Also of images that come in half precision, as an autocast decoder makes them."""
    x, y = images(), images(1)
    expected = MEASURES[name](x, y)
    with torch.autocast("cpu", torch.bfloat16):
        whole, half = MEASURES[name](x, y), MEASURES[name](x.bfloat16(), y.bfloat16())
    for found in (whole, half) if name != "features_of" else (whole,):
        pairs = zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]
        assert all(same(a, b) for a, b in pairs)
        assert all(a.dtype == torch.float32 for a, _ in pairs)


@pytest.mark.parametrize(
    ("name", "value"),
    [("psnr", math.inf), ("ssim", 1), ("sharpness", 1), ("l1", 0), ("gradient", 0), ("spectral", 0), ("lpips", 0)],
)
def test_equal_images_are_equal_inside_autocast(name, value):
    x = (0.8 + images() / 50).bfloat16().float()  # nearly flat, as most of a spectrogram is
    with torch.autocast("cpu", torch.bfloat16):
        assert (MEASURES[name](x, x) == value).all()
        assert (MEASURES[name](x.bfloat16(), x) == value).all()


def test_gradients_go_through_to_half_precision():
    x = images().bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        (gradient(x, images(1)) + spectral(x, images(1))).backward()
    assert x.grad.dtype == torch.bfloat16 and x.grad.isfinite().all() and (x.grad != 0).any()


def test_what_is_not_finite_in_half_precision_is_computed_again():
    assert [Computing(None, device, "", str).precision for device in ("cpu", "cuda:1")] == ["32", "16"]
    a, said = torch.full((1, 1), 1 + 2**-12), []
    half = Computing("bf16", "cpu", "States", said.append)
    with torch.autocast("cpu", torch.bfloat16):
        assert half.in_half and half(lambda: a @ a) == 1 and half.again(lambda: a @ a) > 1 and half.again(lambda: a) > 1
    assert said == ["States are not finite in half precision: such batches are computed again in float32"]
