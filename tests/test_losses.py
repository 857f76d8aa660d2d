"""The VA-VAE's losses against values worked out by hand."""

import math

import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from vavae_tools.autoencoders.losses import VAVAELoss, gradient, kl, l1, spectral


def pictures(size: int = 32, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def waves(phase: float, amplitude: float = 1.0, size: int = 64) -> torch.Tensor:
    """A wave of period 8 along the width."""
    x = torch.arange(size) * 2 * math.pi / 8
    return (amplitude * torch.sin(x + phase)).expand(1, 3, size, size)


def posterior(mean: float, std: float, shape=(2, 4, 8, 8)) -> DiagonalGaussianDistribution:
    moments = torch.cat([torch.full(shape, mean), torch.full(shape, 2 * math.log(std))], dim=1)
    return DiagonalGaussianDistribution(moments)


@pytest.mark.parametrize("part", [l1, gradient, spectral])
def test_equal_pictures_lose_nothing(part):
    x = pictures()
    assert part(x, x) == 0


def test_a_constant_offset():
    x = pictures() * 0.5
    torch.testing.assert_close(l1(x + 0.25, x), torch.tensor(0.25))
    assert gradient(x + 0.25, x) < 1e-6  # differences do not see it


def test_gradients_of_a_ramp():
    """A slope of 0.01 per pixel along one axis: 0.01 at full size, 0.02 at half, 0.04 at quarter; 0 along the other."""
    flat, ramp = torch.zeros(1, 3, 32, 32), (torch.arange(32) * 0.01).expand(1, 3, 32, 32)
    expected = (0.01 + 0.02 + 0.04) / 3
    torch.testing.assert_close(gradient(ramp, flat), torch.tensor(expected))
    torch.testing.assert_close(gradient(ramp.transpose(2, 3), flat), torch.tensor(expected))
    torch.testing.assert_close(gradient(ramp, flat, scales=1), torch.tensor(0.01))


def test_spectra_miss_a_lost_texture_but_not_its_phase():
    sharp = waves(0.0)
    none = waves(0, amplitude=0)
    torch.testing.assert_close(spectral(waves(0, 0.5), sharp), 0.5 * spectral(none, sharp))  # magnitudes are linear
    for phase in (1.0, math.pi):
        assert spectral(waves(phase), sharp) < 0.1 * spectral(none, sharp)
    assert l1(waves(math.pi), sharp) > 1.9 * l1(none, sharp)  # where the absolute error would rather have no wave


def test_spectra_of_a_constant_offset_by_hand():
    """Only frequencies near zero hold the window's own spectrum: magnitude 0.1 · |FFT(window)|."""
    size, x = 8, torch.zeros(1, 1, 16, 16)
    window = torch.hann_window(size, periodic=False)
    window = torch.outer(window, window)
    window = window / window.square().sum().sqrt()
    expected = 0.1 * torch.fft.rfft2(window).abs().mean()
    torch.testing.assert_close(spectral(x + 0.1, x, windows=(8,)), expected)


def test_windows_larger_than_the_picture_are_left_out():
    x, y = pictures(8), pictures(8, seed=1)
    torch.testing.assert_close(spectral(x, y), spectral(x, y, windows=(8,)))
    assert spectral(x[..., :4], y[..., :4]) == 0  # none fits: nothing, not NaN
    assert spectral(pictures(16), pictures(16, seed=1)) > 0


def test_kl_in_closed_form():
    mean, std, x = 0.7, 0.4, pictures()
    by_hand = 0.5 * (mean**2 + std**2 - 1 - math.log(std**2))  # per number of the latent
    expected = by_hand * (4 * 8 * 8) / (3 * 32 * 32)
    torch.testing.assert_close(kl(posterior(mean, std), x), torch.tensor(expected))
    assert kl(posterior(0.0, 1.0), x).abs() < 1e-7


def test_parts_are_means_whatever_the_batch():
    x, y = pictures(), pictures(seed=1)
    for part in (l1, gradient, spectral):
        one_by_one = torch.stack([part(x[i : i + 1], y[i : i + 1]) for i in range(2)]).mean()
        torch.testing.assert_close(part(x, y), one_by_one)
        torch.testing.assert_close(part(x.repeat(3, 1, 1, 1), y.repeat(3, 1, 1, 1)), part(x, y))


def test_the_sum_is_weighted_and_its_parts_are_named():
    x, y = pictures(), pictures(seed=1)
    loss, parts = VAVAELoss(2.0, 0.5, 0.25, 0.1)(x, y, posterior(0.7, 0.4))
    assert set(parts) == {"l1", "gradient", "spectral", "reconstruction", "kl", "loss"}
    expected = 2 * l1(x, y) + 0.5 * gradient(x, y) + 0.25 * spectral(x, y)
    torch.testing.assert_close(parts["reconstruction"], expected)
    torch.testing.assert_close(loss, expected + 0.1 * kl(posterior(0.7, 0.4), y))
    torch.testing.assert_close(parts["loss"], loss)
    assert not any(part.requires_grad for part in parts.values())


@pytest.mark.parametrize("weights", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (1, 0, 0, 1e-6)])
def test_weight_zero_removes_the_part(weights, monkeypatch):
    names = [name for name, weight in zip(["l1", "gradient", "spectral", "kl"], weights, strict=True) if weight]
    _, parts = VAVAELoss(*weights)(pictures(), pictures(seed=1), posterior(0.7, 0.4))
    assert set(parts) == {*names, "reconstruction", "loss"}


@pytest.mark.parametrize("part", [l1, gradient, spectral])
def test_gradients_flow_to_the_reconstruction_and_are_finite(part):
    x = pictures().requires_grad_()
    part(x, pictures(seed=1)).backward()
    assert x.grad.isfinite().all()
    assert (x.grad[:, :, 1:-1, 1:-1] != 0).float().mean() > 0.9  # the spectra's windows are zero on the very border
    black = torch.zeros(1, 3, 16, 16, requires_grad=True)  # where every magnitude is exactly zero
    part(black, torch.zeros(1, 3, 16, 16)).backward()
    assert black.grad.isfinite().all()
