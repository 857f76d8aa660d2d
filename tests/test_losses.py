"""The VA-VAE's losses against values worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from golden_cases import load_case, load_weights
from tiny import tiny_vavae

from vavae_tools.autoencoders.foundation import alignment_loss
from vavae_tools.autoencoders.losses import (
    PatchDiscriminator,
    PictureLoss,
    autoencoder_loss,
    generator_loss,
    gradient,
    hinge_loss,
    kl,
    l1,
    spectral,
)
from vavae_tools.runtime.errors import UserError


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
    x, y = pictures().requires_grad_(), pictures(seed=1)
    latent = posterior(0.7, 0.4)
    objective, parts = autoencoder_loss(
        PictureLoss({"l1": 2.0, "gradient": 0.5, "spectral": 0.25}), x, y, latent, kl_weight=0.1
    )
    assert set(parts) == {"l1", "gradient", "spectral", "reconstruction", "kl", "loss"}
    expected = 2 * l1(x, y) + 0.5 * gradient(x, y) + 0.25 * spectral(x, y)
    torch.testing.assert_close(parts["reconstruction"], expected)
    torch.testing.assert_close(parts["loss"], expected + 0.1 * kl(latent, y))
    assert not any(part.requires_grad for part in parts.values())
    torch.testing.assert_close(torch.autograd.grad(objective, x), torch.autograd.grad(expected, x))


@pytest.mark.parametrize("weights", [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (1, 0, 0, 1e-6), (0, 0, 0, 0, 2.0)])
def test_weight_zero_removes_the_part(weights):
    names = ["l1", "gradient", "spectral", "kl", "perceptual"]
    weights = {name: weight for name, weight in zip(names, weights, strict=False) if weight}
    names, kl_weight = list(weights), weights.pop("kl", 0.0)
    picture_loss = PictureLoss(weights, lpips=lambda x, y: (x - y).square().mean(dim=(1, 2, 3)))
    x = pictures().requires_grad_()
    _, parts = autoencoder_loss(picture_loss, x, pictures(seed=1), posterior(0.7, 0.4), kl_weight)
    assert set(parts) == {*names, "reconstruction", "loss"}


def test_pictures_must_be_compared_by_something():
    with pytest.raises(UserError, match="nothing compares the images"):
        PictureLoss({"l1": 0})


def test_a_loss_that_is_not_finite_has_no_finite_gradient():
    x = pictures().requires_grad_()
    latent = posterior(0.7, 0.4)
    latent.mean[0, 0, 0, 0] = math.inf  # the KL is infinite, though no picture is
    objective, parts = autoencoder_loss(PictureLoss({"l1": 1.0}), x, pictures(seed=1), latent)
    assert not parts["loss"].isfinite() and not torch.autograd.grad(objective, x)[0].isfinite().any()


# ---- the reference's loss with every part


def golden_loss(index: int):
    """The case's stand-in for an autoencoder: one convolution is the encoder's last layer, one the decoder's."""
    case, io = load_case("vae_total_loss")
    arguments = case["arguments"]
    encoder_last, decoder_last, projection = (
        io[f"{name}_weight"].requires_grad_() for name in ("enc_last_layer", "last_layer", "linear_proj")
    )
    latent = DiagonalGaussianDistribution(F.conv2d(io["encoder_features"], encoder_last, padding=1))
    z = latent.mean + latent.std * io["eps"]
    let_in = F.pad(F.interpolate(z, size=(32, 32)), (0, 0, 0, 0, 0, 2))
    reconstruction = F.conv2d(io["decoder_features"] + let_in, decoder_last, padding=1)
    torch.testing.assert_close(reconstruction, io["reconstructions"], rtol=1e-4, atol=1e-5)
    discriminator = PatchDiscriminator(3, arguments["disc_ndf"])
    weights = load_weights("vae_total_loss")
    discriminator.load_state_dict(
        {k.removeprefix("discriminator."): v for k, v in weights.items() if k.startswith("discriminator.")}
    )
    margins = arguments["distmat_margin"], arguments["cos_margin"]
    aligned = alignment_loss(F.conv2d(z, projection), io["aux_feature"], *margins)
    listens = case["runs"][index]["log"]["disc_factor"] == 1.0
    objective, parts = autoencoder_loss(
        PictureLoss(
            {"l1": 1.0, "perceptual": 1.0}, lambda x, y: io["perceptual_value"].flatten() + 0 * x.sum(dim=(1, 2, 3))
        ),
        reconstruction,
        io["inputs"],
        latent,
        arguments["kl_weight"],
        adversary=(lambda made: generator_loss(discriminator(made))) if listens else None,
        disc_weight=arguments["disc_weight"],
        decoder_last=decoder_last,
        alignment=aligned,
        vf_weight=arguments["vf_weight"],
        encoder_last=encoder_last,
    )
    gradients = torch.autograd.grad(objective, (decoder_last, encoder_last, projection))
    return case, io, parts, gradients, discriminator


@pytest.mark.parametrize("index", [0, 1])
def test_every_part_equals_the_reference(index):
    """Ours are the reference's sums divided by C·H·W."""
    case, io, parts, gradients, discriminator = golden_loss(index)
    log, values = case["runs"][index]["log"], 3 * 32 * 32
    expected = {
        "loss": log["total_loss"] / values,
        "reconstruction": log["nll_loss"] / values,
        "kl": log["kl_loss"] / values,
        "alignment": log["vf_loss"],
        "vf_weight": log["vf_weight"],
    }
    if index == 1:  # before the discriminator starts nothing of it is computed
        expected |= {"generator": log["g_loss"], "disc_weight": log["d_weight"]}
    for name, value in expected.items():
        assert parts[name].item() == pytest.approx(value, rel=1e-4), name
    for name, found in zip(("last_layer", "enc_last_layer", "linear_proj"), gradients, strict=True):
        expected = io[f"grad_{name}_{index}"]
        torch.testing.assert_close(found * values, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
    if index == 1:
        real, made = discriminator(io["inputs"]), discriminator(io["reconstructions"])
        assert hinge_loss(real, made).item() == pytest.approx(log["disc_loss"], rel=1e-4)


@pytest.mark.parametrize("part", [l1, gradient, spectral])
def test_gradients_flow_to_the_reconstruction_and_are_finite(part):
    x = pictures().requires_grad_()
    part(x, pictures(seed=1)).backward()
    assert x.grad.isfinite().all()
    assert (x.grad[:, :, 1:-1, 1:-1] != 0).float().mean() > 0.9  # the spectra's windows are zero on the very border
    black = torch.zeros(1, 3, 16, 16, requires_grad=True)  # where every magnitude is exactly zero
    part(black, torch.zeros(1, 3, 16, 16)).backward()
    assert black.grad.isfinite().all()


def test_a_loss_of_the_table_needs_no_more_than_its_weight(monkeypatch):
    from vavae_tools.autoencoders import losses
    from vavae_tools.training.autoencoder_module import VAVAEModule

    monkeypatch.setitem(losses.PICTURE_LOSSES, "squared", lambda made, pictures: (made - pictures).square().mean())
    module = VAVAEModule(tiny_vavae(), l1_weight=0.0, gradient_weight=0.0, spectral_weight=0.0, squared_weight=2.0)
    loss, parts = module.picture_loss(torch.full((1, 3, 8, 8), 0.5), torch.zeros(1, 3, 8, 8))
    assert loss == 0.5 and parts["squared"] == 0.25 and module.hparams.squared_weight == 2.0
    with pytest.raises(UserError, match="No loss cubed; there are l1, gradient, spectral, squared, perceptual"):
        VAVAEModule(tiny_vavae(), cubed_weight=1.0)
