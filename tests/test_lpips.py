"""LPIPS against torchmetrics' own, against a second way to compute it, and with every kind of file."""

import pytest
import torch
from safetensors.torch import save_file
from tiny import random_images as images
from tiny import refuses
from torch import Tensor, nn

from vavae_tools.autoencoders.lpips import LPIPS, load_lpips

WIDTHS = (4, 5, 6, 7, 8)
STACK = [WIDTHS[0]] * 2 + [WIDTHS[1]] * 2 + [WIDTHS[2]] * 3 + [WIDTHS[3]] * 3 + [WIDTHS[4]] * 3
TORCHVISION = [0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28]
SLICES = [1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
BLOCKS_END = [1, 3, 6, 9, 12]  # the convolutions whose ReLU is compared


def torchvision_file(widths: list[int] = STACK, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights, before = {}, 3
    for layer, width in zip(TORCHVISION, widths, strict=True):
        scale = (2 / (9 * before)) ** 0.5  # activations keep their size through the ReLUs
        weights[f"features.{layer}.weight"] = scale * torch.randn(width, before, 3, 3, generator=generator)
        weights[f"features.{layer}.bias"] = 0.1 * torch.randn(width, generator=generator)
        before = width
    return weights


def linear_file(widths: tuple[int, ...] = WIDTHS, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"lin{n}.model.1.weight": torch.rand(1, w, 1, 1, generator=generator) for n, w in enumerate(widths)}


def taming_file(prefix: str = "") -> dict[str, Tensor]:
    weights = torchvision_file()
    named = {
        f"net.slice{number}.{layer}.{kind}": weights[f"features.{layer}.{kind}"]
        for number, layer in zip(SLICES, TORCHVISION, strict=True)
        for kind in ("weight", "bias")
    }
    scaling = {"scaling_layer.shift": torch.zeros(1, 3, 1, 1), "scaling_layer.scale": torch.ones(1, 3, 1, 1)}
    return {prefix + name: tensor for name, tensor in {**scaling, **named, **linear_file()}.items()}


@pytest.fixture
def lpips(tmp_path) -> LPIPS:
    torch.save(taming_file(), tmp_path / "lpips.ckpt")
    return load_lpips(tmp_path / "lpips.ckpt", WIDTHS)


def test_torchmetrics_own(monkeypatch, tmp_path):
    """The full VGG16, with random convolutions and the linear layers that torchmetrics ships; torchvision's stack is
    built here."""
    from torchmetrics.functional.image import lpips as theirs

    widths = [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    weights = torchvision_file(widths)

    def stack(*_, **__) -> nn.Sequential:
        layers: list[nn.Module] = []
        for number, width in enumerate(widths):
            if number - 1 in BLOCKS_END:
                layers.append(nn.MaxPool2d(2, 2))
            layers += [nn.Conv2d(3 if number == 0 else widths[number - 1], width, 3, padding=1), nn.ReLU()]
        model = nn.Sequential(*layers)
        model.load_state_dict({name.removeprefix("features."): tensor for name, tensor in weights.items()})
        return model

    monkeypatch.setattr(theirs, "_get_tv_model_features", stack)
    reference = theirs._LPIPS(net="vgg")
    a, b = images(), images(seed=1)
    expected = reference(a, b).flatten()
    save_file(weights, tmp_path / "vgg16.safetensors")
    found = load_lpips(tmp_path / "vgg16.safetensors")
    assert "torchmetrics" in found.origin and "vgg16.safetensors" in found.origin
    torch.testing.assert_close(found(a, b), expected, rtol=1e-5, atol=1e-7)
    torch.save(reference.state_dict(), tmp_path / "lpips.pth")
    torch.testing.assert_close(load_lpips(tmp_path / "lpips.pth")(a, b), expected, rtol=1e-5, atol=1e-7)


def test_gradients_flow_to_the_reconstruction_alone_and_grey_images_are_repeated(lpips):
    a, b = images().requires_grad_(), images(seed=1).requires_grad_()
    lpips(a, b).mean().backward()
    assert b.grad is None and not any(weights.requires_grad for weights in lpips.parameters())
    assert a.grad.isfinite().all() and (a.grad != 0).float().mean() > 0.9
    a, b = images(channels=1), images(channels=1, seed=1)
    torch.testing.assert_close(lpips(a, b), lpips(a.repeat(1, 3, 1, 1), b.repeat(1, 3, 1, 1)))


def test_under_autocast(lpips):
    """A loss has its convolutions in bfloat16 and the rest in float32, and is nearly the metric, all in float32."""
    a, b = images(), images(seed=1)
    expected = lpips(a, b)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert lpips.features(a)[0].dtype == torch.bfloat16
        assert torch.equal(lpips(a, b), expected)
        a.requires_grad_()
        loss = lpips(a, b)
        assert (lpips(a, a.detach()) == 0).all()
        half = lpips(a.bfloat16(), b)  # as a reconstruction comes out of an autocast decoder
    for found in (loss, half):
        assert found.dtype == torch.float32 and not torch.equal(found, expected)
        torch.testing.assert_close(found, expected, rtol=0.02, atol=0)


@pytest.mark.parametrize("prefix", ["", "loss.perceptual_loss.", "perceptual_loss."])
def test_files_of_vqgan_and_vavae(prefix, tmp_path, lpips):
    a, b = images(), images(seed=1)
    others = {"encoder.conv_in.weight": torch.zeros(2), "loss.discriminator.main.0.weight": torch.zeros(3)}
    torch.save({"epoch": 3, "state_dict": {**others, **taming_file(prefix)}}, tmp_path / "vavae.ckpt")
    found = load_lpips(str(tmp_path / "vavae.ckpt"), WIDTHS)
    torch.testing.assert_close(found(a, b), lpips(a, b), rtol=0, atol=0)
    assert found.origin.count("vavae.ckpt") == 2


def test_torchvision_and_lpips_files_combined(tmp_path, lpips):
    a, b = images(), images(seed=1)
    classifier = {"classifier.0.weight": torch.zeros(3), "classifier.0.bias": torch.zeros(3)}
    vgg, linear = tmp_path / "vgg16.pth", tmp_path / "vgg.pth"
    torch.save({**torchvision_file(), **classifier}, vgg, _use_new_zipfile_serialization=False)  # as torchvision's is
    torch.save(linear_file(), linear)
    for files in ([vgg, linear], (linear, vgg)):
        found = load_lpips(files, WIDTHS)
        torch.testing.assert_close(found(a, b), lpips(a, b), rtol=0, atol=0)
        assert found.origin == f"convolutions from {vgg}, linear layers from {linear}"


def test_missing_convolutions_and_small_images(tmp_path, lpips):
    incomplete = taming_file()
    del incomplete["net.slice3.12.bias"]
    save_file(incomplete, tmp_path / "incomplete.safetensors")
    said = "25 of the 26 tensors.*torchvision's vgg16.*--perceptual_weight 0"
    refuses(said, load_lpips, tmp_path / "incomplete.safetensors", WIDTHS)
    refuses("No file: 0 of the 26", load_lpips, [])
    damaged = {**taming_file(), "net.slice3.12.bias": torch.full((WIDTHS[2],), torch.nan)}
    save_file(damaged, tmp_path / "damaged.safetensors")
    refuses("1 weights of .*damaged.safetensors are not finite", load_lpips, tmp_path / "damaged.safetensors", WIDTHS)
    refuses("damaged.safetensors is of another form: size mismatch", load_lpips, tmp_path / "damaged.safetensors")
    assert lpips(images(16), images(16, seed=1)).isfinite().all()
    refuses("15×15 are too small for LPIPS", lpips, images(15), images(15))
