"""Losses and discriminator against the reference and values worked out by hand."""

import math

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from golden_cases import assert_close, load_case, load_weights
from tiny import random_images as images
from tiny import refuses

from vavae_tools.autoencoders.foundation import alignment_loss
from vavae_tools.autoencoders.losses import (
    ImageLoss,
    PatchDiscriminator,
    adaptive_weight,
    autoencoder_loss,
    generator_loss,
    gradient,
    hinge_loss,
    kl,
    l1,
    spectral,
)


def waves(phase: float, amplitude: float = 1.0) -> torch.Tensor:
    """A wave of period 8 along the width."""
    return (amplitude * torch.sin(torch.arange(64) * 2 * math.pi / 8 + phase)).expand(1, 3, 64, 64)


def posterior(mean: float, std: float, shape=(2, 4, 8, 8)) -> DiagonalGaussianDistribution:
    moments = torch.cat([torch.full(shape, mean), torch.full(shape, 2 * math.log(std))], dim=1)
    return DiagonalGaussianDistribution(moments)


def test_gradients_of_a_ramp():
    """A slope of 0.01 per pixel along one axis: 0.01 at full size, 0.02 at half, 0.04 at quarter; 0 along the other."""
    flat, ramp = torch.zeros(1, 3, 32, 32), (torch.arange(32) * 0.01).expand(1, 3, 32, 32)
    expected = (0.01 + 0.02 + 0.04) / 3
    torch.testing.assert_close(gradient(ramp, flat), torch.tensor(expected))
    torch.testing.assert_close(gradient(ramp.transpose(2, 3), flat), torch.tensor(expected))


def test_spectra_miss_a_lost_texture_but_not_its_phase():
    sharp, none = waves(0.0), waves(0, amplitude=0)
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
    x, y = images(8), images(8, seed=1)  # windows larger than the image are left out
    torch.testing.assert_close(spectral(x, y), spectral(x, y, windows=(8,)))
    assert spectral(x[..., :4], y[..., :4]) == 0  # none fits: nothing, not NaN


def test_the_sum_is_weighted_and_its_parts_are_named():
    x, y = images().requires_grad_(), images(seed=1)
    latent, image_loss = posterior(0.7, 0.4), ImageLoss({"l1": 2.0, "gradient": 0.5, "spectral": 0.25})
    objective, parts = autoencoder_loss(image_loss, x, y, latent, kl_weight=0.1)
    assert set(parts) == {"l1", "gradient", "spectral", "reconstruction", "kl", "loss"}  # no part of weight 0
    expected = 2 * l1(x, y) + 0.5 * gradient(x, y) + 0.25 * spectral(x, y)
    torch.testing.assert_close(parts["reconstruction"], expected)
    torch.testing.assert_close(parts["loss"], expected + 0.1 * kl(latent, y))
    assert not any(part.requires_grad for part in parts.values())
    torch.testing.assert_close(torch.autograd.grad(objective, x), torch.autograd.grad(expected, x))


def test_a_loss_that_is_not_finite_has_no_finite_gradient():
    x = images().requires_grad_()
    latent = posterior(0.7, 0.4)
    latent.mean[0, 0, 0, 0] = math.inf  # the KL is infinite, though no image is
    objective, parts = autoencoder_loss(ImageLoss({"l1": 1.0}), x, images(seed=1), latent)
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
    discriminator, start = PatchDiscriminator(3, arguments["disc_ndf"]), "discriminator."
    weights = {k.removeprefix(start): v for k, v in load_weights("vae_total_loss").items() if k.startswith(start)}
    discriminator.load_state_dict(weights)
    margins = arguments["distmat_margin"], arguments["cos_margin"]
    aligned = alignment_loss(F.conv2d(z, projection), io["aux_feature"], *margins)
    listens = case["runs"][index]["log"]["disc_factor"] == 1.0
    lpips = lambda x, y: io["perceptual_value"].flatten() + 0 * x.sum(dim=(1, 2, 3))  # noqa: E731
    objective, parts = autoencoder_loss(
        ImageLoss({"l1": 1.0, "perceptual": 1.0}, lpips),
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
    x = images().requires_grad_()
    part(x, images(seed=1)).backward()
    assert x.grad.isfinite().all()
    assert (x.grad[:, :, 1:-1, 1:-1] != 0).float().mean() > 0.9  # the spectra's windows are zero on the very border
    black = torch.zeros(1, 3, 16, 16, requires_grad=True)  # where every magnitude is exactly zero
    part(black, torch.zeros(1, 3, 16, 16)).backward()
    assert black.grad.isfinite().all()


def test_what_no_loss_can_be_made_of():
    refuses("No loss 'cubed'; there are l1, gradient, spectral, perceptual", ImageLoss, {"cubed": 1.0})
    refuses("nothing compares the images", ImageLoss, {"l1": 0})
    smallest = PatchDiscriminator(width=2)(images(24, batch=1))  # as in training: BatchNorm still has several values
    assert smallest.isfinite().all()
    refuses("24×23 are too small", PatchDiscriminator(width=2), images((24, 23)))


# ---- the adversary
@pytest.mark.parametrize("mode", ["eval", "train"])
def test_discriminator_equals_the_reference(mode):
    """In training real and generated images are normalised apart; running statistics see the real ones first."""
    case, tensors = load_case("discriminator")
    model = PatchDiscriminator(width=case["constructor"]["ndf"]).train(mode == "train")
    model.load_state_dict(load_weights("discriminator"))
    real, fake = model(tensors["real"]), model(tensors["fake"])
    tolerance = case["tolerance"]
    assert_close(real, tensors[f"logits_real_{mode}"], tolerance)
    assert_close(fake, tensors[f"logits_fake_{mode}"], tolerance)
    assert_close(hinge_loss(real, fake), tensors[f"hinge_d_loss_{mode}"][0], tolerance)
    assert_close(generator_loss(fake), tensors[f"g_loss_{mode}"][0], tolerance)
    for name, expected in case["adaptive_d_weight"]["values"].items():
        weight = 0.5 * adaptive_weight(tensors["grad_nll"], tensors[name], largest=1e4)
        assert_close(weight, torch.tensor(expected), tolerance)
    after = {name.removeprefix("after_train_real_then_fake."): x for name, x in tensors.items() if "after" in name}
    assert len(after) == 6
    for name, expected in after.items() if mode == "train" else ():
        assert_close(model.state_dict()[name], expected, tolerance)


def test_adaptive_weight_by_hand():
    reference, gradient = torch.tensor([[3.0, 4.0]]), torch.tensor([0.6, 0.0, 0.8])
    torch.testing.assert_close(adaptive_weight(reference, gradient, 1e4), torch.tensor(5 / 1.0001))
    assert adaptive_weight(reference, gradient, 2.0) == 2
    torch.testing.assert_close(adaptive_weight(reference, torch.zeros(3), 1e8), torch.tensor(5e4))
    assert adaptive_weight(torch.zeros(3), torch.zeros(3), 1e4) == 0
    half = adaptive_weight(torch.full((100,), 1e4).half(), torch.ones(100).half(), 1e8)  # squares beyond fp16's range
    torch.testing.assert_close(half, torch.tensor(1e5 / 10.0001))
    assert not adaptive_weight(reference.requires_grad_(), gradient.requires_grad_(), 1e4).requires_grad
