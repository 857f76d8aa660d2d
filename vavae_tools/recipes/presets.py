"""Sizes and lengths of training that suit a machine, for what recipes and notebooks leave open."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vavae_tools.data.split_report import is_simulated
from vavae_tools.recipes.base import AnyRecipe, LatentRecipe, VAVAERecipe
from vavae_tools.runtime.machine import Machine, find_machine


@dataclass(frozen=True, repr=False)
class Preset:
    """What notebooks 02–05 start from. Batch sizes are per device and step, image_size is in pixels."""

    machine: str
    image_size: int = 64
    original_vavae: str | None = "small"  # weights to fine-tune; None: fresh ones
    vavae_size: str = "small"
    vavae_epochs: int = 60
    vavae_batch_size: int = 16
    vavae_lr: float = 2e-3
    dit: dict[str, Any] = field(  # the denoiser: a size by name, or numbers
        default_factory=lambda: {"hidden_size": 192, "depth": 6, "num_heads": 3, "patch_size": 2}
    )
    dit_steps: int = 4_000
    dit_batch_size: int = 32
    ema_decay: float = 0.999
    previews: int = 6  # grids of samples in all
    samples_per_person: int = 50
    num_steps: int = 50  # calls of the denoiser for each image
    guidance_scale: float = 1.25

    @property
    def dit_lr(self) -> float:
        return lr_for(self.dit.get("hidden_size"))

    def __repr__(self) -> str:
        width = max(map(len, asdict(self)))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in asdict(self).items())


def find_preset(split: str | Path | None = None, machine: Machine | None = None) -> Preset:
    """Return the preset for this machine; for a split of simulated walkers one that ends within minutes.

    The lengths on a CPU are measured (README); those on a GPU are estimated from its speed and the models' operations.
    """
    machine = machine or find_machine()
    if split is not None and is_simulated(split):
        return Preset(
            str(machine),
            vavae_epochs=6,
            # sixteen tokens an image: a quarter of the work, and still the right person after two minutes
            dit={"hidden_size": 256, "depth": 6, "num_heads": 4, "patch_size": 4},
            dit_steps=1_100,
            ema_decay=0.99,
            previews=2,
            samples_per_person=20,
            num_steps=20,
            guidance_scale=2.5,
        )
    if machine.kind == "cpu":
        return Preset(str(machine))
    # One T4 makes about 10 images a second with f16d32 at 256 px, and 5 steps with DiT-S: hours, not a session. By
    # benchmarks/memory.py f16d32 takes 1.5 GB an image in training, DiT-S 0.1. A T4's 14.56 also have to hold CUDA,
    # DDP's gradients and the notebook's own process: with six images no activation is computed twice.
    roomy, tight = machine.memory > 36e9, machine.memory < 20e9
    return Preset(
        str(machine),
        image_size=256,
        original_vavae=None,
        vavae_size="f16d32",
        vavae_epochs=30,
        vavae_batch_size=16 if roomy else 6 if tight else 8,
        vavae_lr=1e-4,
        dit={"size": "S", "patch_size": 1},
        dit_steps=40_000,
        dit_batch_size=256 if roomy else 64,
        ema_decay=0.9995,
    )


def lr_for(hidden_size: int | list[int] | None) -> float:
    """Return a denoiser's learning rate: LightningDiT's 2e-4 is for widths from 384 on; below, 1e-3 is faster."""
    return 1e-3 if isinstance(hidden_size, int) and hidden_size <= 256 else 2e-4


def resolved(recipe: AnyRecipe) -> AnyRecipe:
    """Return a recipe in which what was left to the machine is as its preset says."""
    preset, config, wanted = find_preset(), recipe.train, {}
    length = {"max_steps": preset.dit_steps}
    if isinstance(recipe, VAVAERecipe):
        length, wanted = {"max_epochs": preset.vavae_epochs}, {"batch_size": preset.vavae_batch_size}
    elif isinstance(recipe, LatentRecipe):
        model, missing = recipe.model, preset.dit
        if model.size or model.hidden_size or model.depth or model.num_heads:
            missing = {"patch_size": preset.dit["patch_size"]}
            missing |= {} if model.size else {"hidden_size": 192, "depth": 6, "num_heads": 3}
        recipe = replace(recipe, model=_filled(model, missing))
        lr = lr_for(None if model.size else recipe.model.hidden_size)
        wanted = {"batch_size": preset.dit_batch_size, "ema_decay": preset.ema_decay, "lr": lr}
    if config.max_steps is None and config.max_epochs is None:
        wanted |= length
    return replace(recipe, train=_filled(config, wanted))


def _filled(config: Any, values: Mapping[str, Any]) -> Any:
    return replace(config, **{name: value for name, value in values.items() if getattr(config, name) is None})
