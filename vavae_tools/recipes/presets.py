"""Sizes and lengths of training that suit a machine; every value is a knob, these are where the knobs start."""

from dataclasses import asdict, dataclass, field
from typing import Any

from vavae_tools.runtime.machine import Machine, find_machine


@dataclass(frozen=True, repr=False)
class Preset:
    """What notebooks 02–05 start from."""

    machine: str
    image_size: int
    """pixels"""
    original_vavae: str | None
    """weights to fine-tune; None: fresh ones"""
    vavae_size: str
    vavae_epochs: int
    vavae_batch_size: int
    """pictures per device and step"""
    vavae_lr: float
    dit: dict[str, Any] = field(default_factory=dict)
    """the denoiser: a size by name, or numbers"""
    dit_steps: int = 0
    dit_batch_size: int = 64
    """latents per device and step"""
    dit_lr: float = 2e-4
    ema_decay: float = 0.999
    previews: int = 6
    """grids of samples in all"""
    samples_per_person: int = 50
    num_steps: int = 50
    """calls of the denoiser for each picture"""
    guidance_scale: float = 1.25

    def __str__(self) -> str:
        width = max(map(len, asdict(self)))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in asdict(self).items())

    __repr__ = __str__


def find_preset(built_in: bool = False, machine: Machine | None = None) -> Preset:
    """The preset for this machine; with the built-in data one that ends within minutes.

    The lengths on a CPU are measured (README); those on a GPU are reckoned from its speed and the models' operations.
    """
    machine = machine or find_machine()
    if machine.kind != "cpu" and not built_in:
        # One T4 makes about 10 pictures a second with f16d32 at 256 px, and 5 steps with DiT-S: hours, not a session.
        # By benchmarks/memory.py f16d32 takes 1.5 GB a picture in training, DiT-S 0.1. A T4's 14.56 also have to hold
        # CUDA, DDP's gradients and the notebook's own process: with six pictures no activation is computed twice.
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
    small = {
        "machine": str(machine),
        "image_size": 64,
        "original_vavae": "small",
        "vavae_size": "small",
        "vavae_batch_size": 16,
    }
    if built_in:
        # sixteen tokens a picture: a quarter of the work, and still the right person after two minutes
        return Preset(
            **small,
            vavae_epochs=6,
            vavae_lr=2e-3,
            dit={"hidden_size": 256, "depth": 6, "num_heads": 4, "patch_size": 4},
            dit_steps=1_100,
            dit_batch_size=32,
            dit_lr=1e-3,
            ema_decay=0.99,
            previews=2,
            samples_per_person=20,
            num_steps=20,
            guidance_scale=2.5,
        )
    return Preset(
        **small,
        vavae_epochs=60,
        vavae_lr=2e-3,
        dit={"hidden_size": 192, "depth": 6, "num_heads": 3, "patch_size": 2},
        dit_steps=4_000,
        dit_batch_size=32,
        dit_lr=1e-3,
    )
