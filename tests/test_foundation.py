"""Alignment with a foundation model: the loss against the reference, tiny random models, features kept on the disk."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from golden_cases import assert_close, load_case
from safetensors.torch import save_file
from tiny import random_images as images
from tiny import refused, same, tiny_vit
from torch import Tensor

from vavae_tools.autoencoders import foundation as module
from vavae_tools.autoencoders.foundation import (
    TransformersFoundation,
    alignment_loss,
    foundation_features,
    load_foundation,
)
from vavae_tools.autoencoders.losses import adaptive_weight
from vavae_tools.data.images import ImageFolder, to_unit

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
DINO = {**SMALL, "image_size": 28, "patch_size": 14}
MAE = {**SMALL, "image_size": 24, "patch_size": 8, "intermediate_size": 64, "decoder_hidden_size": 16}


def dinov2(**changes):
    return tiny_vit("Dinov2", **{**DINO, **changes})


def vit_mae(**changes):
    return tiny_vit("ViTMAE", **{**MAE, **changes})


def as_grid(tokens: Tensor, height: int, width: int) -> Tensor:
    return tokens.transpose(1, 2).reshape(len(tokens), -1, height, width)


@pytest.fixture(scope="session")
def dino_dir(tmp_path_factory) -> Path:
    """Do not write into it."""
    folder = tmp_path_factory.mktemp("dino")
    dinov2().save_pretrained(folder)
    return folder


# ---- the loss
@pytest.mark.parametrize("number", [0, 1])
def test_reference_loss_and_gradient(number):
    case, tensors = load_case("vf_loss")
    settings, tolerance = case["settings"][number], case["tolerance"]
    projected = tensors["z"].clone().requires_grad_()
    margins = settings["distmat_margin"], settings["cos_margin"]
    distance, cosine = alignment_loss(projected, tensors["aux_feature"], *margins)
    assert_close(distance, tensors[f"vf_distmat_{number}"][0], tolerance)
    assert_close(cosine, tensors[f"vf_cos_{number}"][0], tolerance)
    assert_close(distance + cosine, tensors[f"vf_loss_{number}"][0], tolerance)
    assert_close(0.5 * distance + 2 * cosine, tensors[f"vf_loss_weights_0.5_2_{number}"][0], tolerance)
    (distance + cosine).backward()
    assert_close(projected.grad, tensors[f"vf_loss_grad_z_{number}"], tolerance["gradient"])
    for name, expected in settings["adaptive_weight_times_vf_weight"].items():
        weight = settings["vf_weight"] * adaptive_weight(tensors["grad_nll"], tensors[name], largest=1e8)
        assert_close(weight, torch.tensor(expected), tolerance)


# ---- the models
@pytest.mark.parametrize("grid", [(4, 4), (2, 5)])
def test_dinov2_on_any_grid(grid):
    """The last layer's normalised patch tokens, row by row, with positions resampled as timm does it."""
    model, x = dinov2(image_size=56), images((grid[0] * 14, grid[1] * 14))
    with torch.no_grad():
        table = model.embeddings.position_embeddings
        patches = F.interpolate(as_grid(table[:, 1:], 4, 4), grid, mode="bicubic", antialias=True)
        resampled = torch.cat([table[:, :1], patches.flatten(2).transpose(1, 2)], dim=1)
        model.embeddings.interpolate_pos_encoding = lambda *_: resampled
        expected = as_grid(model(x).last_hidden_state[:, 1:], *grid)
    torch.testing.assert_close(TransformersFoundation(model)(x, grid), expected, rtol=1e-5, atol=1e-5)


def test_registers_are_dropped():
    model, x = tiny_vit("Dinov2WithRegisters", **DINO, num_register_tokens=3), images(28)
    with torch.no_grad():
        tokens = model(x).last_hidden_state
    assert tokens.shape[1] == 1 + 3 + 4
    torch.testing.assert_close(TransformersFoundation(model)(x, (2, 2)), as_grid(tokens[:, 4:], 2, 2))


def test_mae_sees_every_patch_in_order():
    """transformers shuffles them; put back by its own record they are ours."""
    model, x = vit_mae(mask_ratio=0.0), images(24)
    with torch.no_grad():
        output = model(x)
    tokens = output.last_hidden_state[:, 1:]
    order = output.ids_restore[:, :, None].expand(-1, -1, 32)
    assert not torch.equal(output.ids_restore[0], torch.arange(9))
    expected = as_grid(tokens.gather(1, order), 3, 3)
    found = TransformersFoundation(vit_mae(mask_ratio=0.75))  # as published
    torch.testing.assert_close(found(x, (3, 3)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("make", [dinov2, vit_mae])
def test_features_of_any_images(make):
    found = TransformersFoundation(make())
    x = images((40, 24))
    size = (2 * found.patch_size, 3 * found.patch_size)
    resized = F.interpolate(x, size, mode="bilinear", align_corners=False)
    torch.manual_seed(0)
    features = found(x, (2, 3))
    torch.manual_seed(1)
    torch.testing.assert_close(found(x, (2, 3)), features, rtol=0, atol=0)  # nothing in it is random
    torch.testing.assert_close(found(resized, (2, 3)), features)
    assert features.shape == (2, 32, 2, 3) and features.dtype == torch.float32
    grey = images(channels=1)
    torch.testing.assert_close(found(grey, (2, 2)), found(grey.repeat(1, 3, 1, 1), (2, 2)))
    assert torch.equal(found(x.half(), (2, 3)), found(x.half().float(), (2, 3)))


def test_the_digest_follows_from_weights_and_settings():
    digest = TransformersFoundation(dinov2()).digest
    assert digest == TransformersFoundation(dinov2()).digest
    other = dinov2()
    other.layernorm.bias.data[3] += 1e-3
    assert TransformersFoundation(other).digest != digest
    assert TransformersFoundation(dinov2(num_attention_heads=4)).digest != digest  # of the same weights


# ---- loading
def test_loading_without_network_or_noise(dino_dir, monkeypatch, capfd):
    from transformers.utils import logging as chatter

    def refuse(*_, **__):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket, "socket", refuse)
    before = chatter.get_verbosity(), chatter.is_progress_bar_enabled()
    found = load_foundation(str(dino_dir))
    assert capfd.readouterr() == ("", "")
    assert (chatter.get_verbosity(), chatter.is_progress_bar_enabled()) == before
    x = images()
    torch.testing.assert_close(found(x, (2, 3)), TransformersFoundation(dinov2())(x, (2, 3)))


@pytest.mark.parametrize("form", ["shards without an index", "fp16", "bin"])
def test_every_folder_of_weights(tmp_path, form, capfd):
    model = dinov2().half().float()
    model.config.save_pretrained(tmp_path)
    first, *others = weights = model.state_dict().items()
    if form == "bin":
        torch.save(dict(weights), tmp_path / "pytorch_model.bin")
    elif form == "fp16":
        save_file({name: tensor.half() for name, tensor in weights}, tmp_path / "model.fp16.safetensors")
    else:
        for number, part in enumerate(([first], others), 1):
            save_file(dict(part), tmp_path / f"model-0000{number}-of-00002.safetensors")
    x = images()
    assert same(load_foundation(tmp_path)(x, (3, 3)), TransformersFoundation(model)(x, (3, 3)))
    assert capfd.readouterr() == ("", "")


def test_loading_the_pretraining_model_of_mae(tmp_path):
    from transformers import ViTMAEConfig, ViTMAEForPreTraining

    decoder = {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2, "decoder_intermediate_size": 8}
    model = ViTMAEForPreTraining(ViTMAEConfig(**MAE, **decoder))
    model.save_pretrained(tmp_path)  # with a decoder and other names
    x = images()
    torch.testing.assert_close(load_foundation(tmp_path)(x, (3, 3)), TransformersFoundation(model.vit)(x, (3, 3)))


def set_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(("damage", "says"), [
    (shutil.rmtree, "No vision foundation model in .*, which is not there: name a folder"),
    (lambda folder: (folder / "config.json").unlink(), "No vision foundation model in .*, which holds model"),
    (lambda folder: (folder / "model.safetensors").unlink(), "No weights in .*: expected model.safetensors"),
    (lambda folder: set_config(folder, model_type="bert"), "of type 'bert', expected one of dinov2, dinov2_with_reg"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"cut" * 1000), "cannot be read .*: copy it again"),
    (lambda folder: set_config(folder, hidden_size=64), "cannot be loaded .*: copy the folder anew"),
    (lambda folder: set_config(folder, num_hidden_layers=3), "lacks 18 .*, the first encoder.layer.2"),
])  # fmt: skip
def test_folders_that_do_not_do(dino_dir, tmp_path, damage, says):
    broken = Path(shutil.copytree(dino_dir, tmp_path / "model"))
    damage(broken)
    said = refused(load_foundation, broken)
    assert re.search(says, said) and str(broken) in said


# ---- features on the disk
class Brightness:
    """A foundation model by hand: the mean of each channel on the grid, and what it was asked."""

    channels = 3

    def __init__(self, digest: str = "a", factor: float = 1.0) -> None:
        self.digest, self.factor, self.seen = digest, factor, 0

    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        self.seen += len(images)
        return self.factor * F.adaptive_avg_pool2d(images, grid)


@pytest.fixture
def data(gait, tmp_path) -> ImageFolder:
    return ImageFolder(shutil.copytree(gait, tmp_path / "images"), 16)


def all_of(rows) -> Tensor:
    return rows[torch.arange(sum(map(len, rows.shards)))]


def test_features_are_computed_once(data, tmp_path):
    model, path = Brightness(), tmp_path / "features" / "train.safetensors"
    rows = foundation_features(model, data, (2, 4), path, batch_size=2, progress=False)
    expected = F.adaptive_avg_pool2d(to_unit(data.in_memory()), (2, 4)).half()  # in the order of data.paths
    assert same(all_of(rows), expected) and model.seen == 30
    assert len(expected.flatten(1).unique(dim=0)) > 10  # so that the order can be seen
    assert sorted(p.name for p in path.parent.iterdir()) == [f"train-{n:05d}.safetensors" for n in range(8)]
    (path.parent / "train-00003.safetensors").unlink()
    again = Brightness()
    assert same(all_of(foundation_features(again, data, (2, 4), path, batch_size=2, progress=False)), expected)
    assert again.seen == 4


def test_features_follow_from_weights_grid_and_images(data, tmp_path):
    def computed(model: Brightness, grid: tuple[int, int] = (2, 2)) -> int:
        images = ImageFolder(data.folder, 16)
        found = foundation_features(model, images, grid, tmp_path / "train.safetensors", progress=False)
        expected = F.adaptive_avg_pool2d(to_unit(images.in_memory()), grid) * model.factor
        assert same(all_of(found), expected.half())
        return model.seen

    assert computed(Brightness()) == 30 and computed(Brightness()) == 0
    assert computed(Brightness("b", factor=2.0)) == 30
    assert computed(Brightness(), (4, 1)) == 30
    shutil.copyfile(data.paths[4], data.paths[5])
    assert computed(Brightness(), (4, 1)) == 30


def test_too_many_features_are_not_kept(data, tmp_path, monkeypatch):
    model, path = Brightness(), tmp_path / "train.safetensors"
    monkeypatch.setattr(module, "LARGEST_CACHE", 2 * 30 * 3 * 4 - 1)
    assert foundation_features(model, data, (2, 2), path, progress=False) is None
    assert model.seen == 0 and not path.exists()
    monkeypatch.setattr(module, "LARGEST_CACHE", 2 * 30 * 3 * 4)
    assert foundation_features(model, data, (2, 2), path, progress=False) is not None
