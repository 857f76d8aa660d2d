"""The smallest models and data that still have every part: a step takes milliseconds on a CPU."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from vavae_tools.autoencoders.stable_diffusion import StableDiffusionVAE
from vavae_tools.autoencoders.vavae import VAVAE
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DiT
from vavae_tools.diffusion.solvers import make_solver
from vavae_tools.pipelines.classes import LatentDiTPipeline
from vavae_tools.runtime.errors import UserError
from vavae_tools.training.denoiser_module import DiffusionModule

torch.set_num_threads(1)  # for steps of a millisecond; two threads on a busy machine take seven times as long

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}
"""arguments of a Trainer that trains and does nothing else"""
PEOPLE = 3
SIZE = 16
"""pixels of the tiny images; two levels make latents of 2×8×8 of them"""

TWO_LEVELS = {
    "down_block_types": ("DownEncoderBlock2D", "DownEncoderBlock2D"),
    "up_block_types": ("UpDecoderBlock2D", "UpDecoderBlock2D"),
    "block_out_channels": (8, 8),
    "norm_num_groups": 4,
    "latent_channels": 2,
    "sample_size": SIZE,
}


def tiny_vavae(seed: int = 0, condition_dim: int = 4, **changes) -> VAVAE:
    torch.manual_seed(seed)
    return VAVAE(**{**TWO_LEVELS, "condition_dim": condition_dim, "num_conditions": PEOPLE, **changes})


def tiny_kl(seed: int = 0, downsampling: int = 4) -> StableDiffusionVAE:
    torch.manual_seed(seed)
    levels = downsampling.bit_length()
    return StableDiffusionVAE(
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        block_out_channels=(8,) * levels,
        norm_num_groups=4,
        scaling_factor=1.0,
        mid_block_add_attention=False,
    ).eval()


def perturb_projections(model: VAVAE) -> VAVAE:
    """Projections as after some training: no longer zero."""
    generator = torch.Generator().manual_seed(5)
    for projections in (model.encoder_projections, model.decoder_projections):
        for linear in projections:
            linear.weight.data.normal_(generator=generator)
    return model


def tiny_dit(seed: int = 0, **changes) -> tuple[DiT, ClassConditioner]:
    torch.manual_seed(seed)
    numbers = {"input_size": 8, "patch_size": 4, "in_channels": 2, "hidden_size": 16, "depth": 1, "num_heads": 2}
    return DiT(**{**numbers, **changes}), ClassConditioner(PEOPLE, 16)


def new_dit(**changes) -> DiffusionModule:
    """The training of one that predicts something."""
    denoiser, conditioner = tiny_dit()
    return DiffusionModule(trained_looking(denoiser), conditioner, **{"lr": 1e-3, "warmup_steps": 1, **changes})


def trained_looking(model: torch.nn.Module, seed: int = 3) -> torch.nn.Module:
    """Small random numbers on all weights: a fresh DiT's last layer is zero, and so would be every prediction."""
    generator = torch.Generator().manual_seed(seed)
    for weights in model.parameters():
        weights.data += 0.1 * torch.randn(weights.shape, generator=generator)
    return model


def tiny_pipeline(seed: int = 0, dropout: float = 0.1) -> LatentDiTPipeline:
    vae = perturb_projections(tiny_vavae(seed, latents_mean=(0.5, -1.0), latents_std=(2.0, 0.5))).eval()
    denoiser, conditioner = tiny_dit(seed)
    conditioner = conditioner if dropout else ClassConditioner(PEOPLE, 16, dropout)
    people = {"ID_1": 0, "ID_2": 1, "ID_3": 2}
    return LatentDiTPipeline(vae, trained_looking(denoiser).eval(), conditioner.eval(), make_solver(), people)


def tiny_vit(name: str, **numbers) -> torch.nn.Module:
    """A random model of transformers, such as Dinov2."""
    import transformers

    torch.manual_seed(0)
    return getattr(transformers, f"{name}Model")(getattr(transformers, f"{name}Config")(**numbers)).eval()


def random_images(size: int | tuple[int, int] = 32, batch: int = 2, seed: int = 0, channels: int = 3) -> Tensor:
    """(B, C, H, W) in [-1, 1]."""
    height, width = (size, size) if isinstance(size, int) else size
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def flat(value: int, size: int = 8) -> Image.Image:
    """An image that says by its grey which one it is."""
    return Image.new("RGB", (size, size), (value, value, value))


def pixels(data, place: int) -> np.ndarray:
    """(H, W, C) of one image of a subset."""
    return data[place]["images"].permute(1, 2, 0).numpy()


def shown(data) -> dict[str, int]:
    """Name → grey, as the images of a subset are read."""
    return {name: int(pixels(data, place).mean()) for place, name in enumerate(data.names)}


def contents(folder: Path) -> dict[str, bytes]:
    """Path → bytes of all files below a folder."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def refused(call, *arguments, **settings) -> str:
    """The one line of the `UserError` that a call raises."""
    with pytest.raises(UserError) as raised:
        call(*arguments, **settings)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def refuses(pattern: str, call, *arguments, **settings) -> None:
    """That a call raises a `UserError` whose one line matches."""
    assert re.search(pattern, said := refused(call, *arguments, **settings)), said


def same(a: Tensor, b: Tensor) -> bool:
    """Bit by bit."""
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b)


def assert_same(a, b, where: str = "") -> None:
    """Bit by bit, all the way down."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{where}/{i}")
    else:
        assert same(a, b) if isinstance(a, torch.Tensor) else a == b, where


def last(run: str | Path) -> dict:
    """What the `last.ckpt` of a run's folder holds."""
    return torch.load(Path(run) / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_training(one: str | Path, other: str | Path) -> None:
    """That the `last.ckpt` of two runs' folders hold the same weights, optimiser, schedule and place."""
    a, b = last(one), last(other)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch"):
        assert_same(a[part], b[part], part)


class Averages(torch.nn.Module):
    """An autoencoder whose latents are means of 8×8 pixels, times `scale`."""

    has_own_statistics = False

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor(scale))  # without a dimension

    def encode_images(self, images, labels, normal):
        return self.scale * torch.nn.functional.avg_pool2d(images, 8)
