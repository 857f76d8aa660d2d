"""Stable Diffusion's autoencoder: diffusers' own numbers times its scale, and the small one that knows shapes."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from tiny import TWO_LEVELS, refuses, same, tiny_kl, tiny_vavae

from vavae_tools.autoencoders.stable_diffusion import SHAPES_VAE, StableDiffusionVAE, load_stable_diffusion_vae
from vavae_tools.autoencoders.vavae import VAVAE
from vavae_tools.autoencoders.weights import load_autoencoder
from vavae_tools.data.demo.shapes import CaptionedShapes, ShapeImages, shape_data
from vavae_tools.data.images import to_unit
from vavae_tools.data.latents import encode_latents
from vavae_tools.evaluation.metrics import psnr


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    AutoencoderKL(**TWO_LEVELS, scaling_factor=0.5, shift_factor=0.25).save_pretrained(tmp_path / "sd" / "vae")
    return tmp_path / "sd" / "vae"


def images(count: int = 3) -> torch.Tensor:
    return to_unit(ShapeImages(count, 36, 16).in_memory())


@torch.no_grad()
def test_it_is_diffusers_autoencoder_with_its_scale(folder):
    vae, plain = load_stable_diffusion_vae(folder), AutoencoderKL.from_pretrained(folder, low_cpu_mem_usage=False)
    x, normal = images(), torch.randn(3, 2, 8, 8, generator=torch.Generator().manual_seed(1))
    posterior = plain.encode(x).latent_dist
    assert same(vae.encode_images(x), (posterior.mode() - 0.25) * 0.5)
    drawn = vae.encode_images(x, None, lambda *shape: normal)
    assert same(drawn, (posterior.mean + posterior.std * normal - 0.25) * 0.5)
    torch.testing.assert_close(vae.decode_latents(drawn), plain.decode(drawn / 0.5 + 0.25).sample)
    assert vae.downsampling == 2 and vae.has_own_statistics and not vae.training


@torch.no_grad()
def test_latents_with_a_mean_and_deviation_of_each_channel(folder, tmp_path):
    plain = AutoencoderKL(**TWO_LEVELS, scaling_factor=0.5, latents_mean=[1.0, -2.0], latents_std=[2.0, 4.0])
    plain.save_pretrained(tmp_path / "vae")
    vae, x = load_stable_diffusion_vae(tmp_path), images()
    mean, std = torch.tensor([1.0, -2.0])[:, None, None], torch.tensor([2.0, 4.0])[:, None, None]
    z = plain.eval().encode(x).latent_dist.mode()
    torch.testing.assert_close(vae.encode_images(x), (z - mean) * 0.5 / std)
    torch.testing.assert_close(vae.decode_latents(vae.encode_images(x)), plain.decode(z).sample, rtol=1e-4, atol=1e-5)
    for change in ({"latents_std": None}, {"latents_std": [1.0]}, {"latents_std": [1.0, 0.0]}, {"shift_factor": 0.1}):
        config = {**json.loads((tmp_path / "vae" / "config.json").read_text()), **change}
        (tmp_path / "bad").mkdir(exist_ok=True)
        (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
        refuses(r"latents_std|latents_mean", load_stable_diffusion_vae, tmp_path / "bad")


@torch.no_grad()
def test_slices_give_the_same(folder):
    whole, slices = load_stable_diffusion_vae(folder), load_stable_diffusion_vae(folder, use_slicing=True)
    assert slices.use_slicing and not whole.use_slicing
    latents = whole.encode_images(images())
    torch.testing.assert_close(slices.encode_images(images()), latents)
    torch.testing.assert_close(slices.decode_latents(latents), whole.decode_latents(latents))


def test_stable_diffusion_1_5_has_the_published_size():
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    levels |= {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    with torch.device("meta"):
        vae = StableDiffusionVAE(**levels)
    assert vae.num_parameters() == 83_653_863
    assert (vae.downsampling, vae.config.latent_channels, vae.config.scaling_factor) == (8, 4, 0.18215)


def test_a_run_finds_it_by_its_config(folder, tmp_path):
    for source in (folder, folder.parent):
        assert isinstance(load_autoencoder(source), StableDiffusionVAE)
    load_autoencoder(folder).save_pretrained(tmp_path / "again")
    again = load_autoencoder(tmp_path / "again")
    assert same(again.encode_images(images()), load_autoencoder(folder).encode_images(images()))
    assert isinstance(AutoencoderKL.from_pretrained(tmp_path / "again", low_cpu_mem_usage=False), AutoencoderKL)


def test_an_exported_vavae_stays_one(tmp_path):
    tiny_vavae(condition_dim=0).save_pretrained(tmp_path / "vavae")
    AutoencoderKL(**TWO_LEVELS, scaling_factor=1.0).save_pretrained(tmp_path / "exported")
    statistics = {"latents_mean": [0.0, 1.0], "latents_std": [1.0, 2.0]}
    AutoencoderKL(**TWO_LEVELS, **statistics).save_pretrained(tmp_path / "with statistics")
    for name in ("vavae", "exported", "with statistics"):
        assert type(load_autoencoder(tmp_path / name)) is VAVAE


def test_folders_that_are_none(folder, tmp_path):
    refuses(r"No folder .*nowhere of a Stable Diffusion VAE", load_stable_diffusion_vae, tmp_path / "nowhere")
    config = json.loads((folder / "config.json").read_text())
    for change, said in (
        ({"_class_name": "VQModel"}, "holds a VQModel, expected an AutoencoderKL"),
        ({"layers_per_block": 2}, "lacks 32 of the model's weights, the first"),
    ):
        (folder / "config.json").write_text(json.dumps({**config, **change}))
        refuses(said, load_stable_diffusion_vae, folder)


@pytest.mark.parametrize("size", [32, 64])
@torch.no_grad()
def test_the_small_one_knows_shapes_and_its_latents_have_unit_variance(size):
    """Reconstructions have 34 dB on average, each 28 or more; the package grows by less than 150 KB."""
    vae = load_stable_diffusion_vae(SHAPES_VAE)
    for data in (ShapeImages(64, 36, size), CaptionedShapes(64, size, subset=1)):
        x = to_unit(data.in_memory())
        latents = vae.encode_images(x)
        assert latents.shape == (64, 4, size // 4, size // 4)
        assert latents.mean().abs() < 0.3 and 0.7 < latents.std() < 1.3
        found = psnr(vae.decode_latents(latents).clamp(-1, 1), x)
        assert found.mean() > 34 and found.min() > 28, found
    assert sum(path.stat().st_size for path in SHAPES_VAE.iterdir()) < 150_000


def test_latents_on_the_disk_know_the_scale(tmp_path):
    data, vae = shape_data(8, 4, 16, num_workers=0), tiny_kl(downsampling=2)
    first = encode_latents(vae, data, tmp_path, progress=False)
    assert first.mean == [0.0] * 4 and first.std == [1.0] * 4
    vae.register_to_config(scaling_factor=2.0)
    assert encode_latents(vae, data, tmp_path, progress=False).key != first.key
