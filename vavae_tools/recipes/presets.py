"""What recipes and notebooks leave open: sizes and lengths of training, by machine and attached weights."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from vavae_tools.autoencoders.rae_weights import is_rae_folder
from vavae_tools.autoencoders.vavae import VAVAE_SIZES
from vavae_tools.autoencoders.weights import read_vavae
from vavae_tools.data.split_report import INFO_NAME, is_simulated
from vavae_tools.recipes.attached import PUBLISHED, AttachedWeights, find_attached_weights
from vavae_tools.recipes.base import AnyRecipe, LatentRecipe, VAVAEDiTRecipe, VAVAERecipe
from vavae_tools.recipes.init_from import read_starting_weights, told_arguments
from vavae_tools.runtime.console import log
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.machine import Machine, find_machine

Log = Callable[[str], None]


@dataclass(frozen=True, repr=False)
class Preset:
    """What notebooks and commands start from. Batch sizes are per device and step, image_size is in pixels."""

    machine: str
    image_size: int | tuple[int, int] = 64
    original_vavae: str | None = "small"  # weights to fine-tune; None: fresh ones
    vavae_size: str = "small"
    vavae_epochs: int = 60
    vavae_batch_size: int = 16
    vavae_lr: float | None = None  # None: by the model's size and the recipe
    recipe: str = "light"  # of the losses
    foundation_model: str | None = None
    lpips_weights: str | None = None
    dit: dict[str, Any] = field(  # the denoiser: a size by name, or numbers
        default_factory=lambda: {"hidden_size": 192, "depth": 6, "num_heads": 3, "patch_size": 2}
    )
    dit_init: dict[str, Any] | None = None  # what it starts from
    dit_steps: int = 4_000
    dit_batch_size: int = 32
    ema_decay: float = 0.999
    previews: int = 6  # grids of samples in all
    samples_per_person: int = 50
    guidance_scale: float = 1.25

    @property
    def dit_lr(self) -> float:
        return 1e-4 if self.dit_init else lr_for(self.dit.get("hidden_size"))

    def __repr__(self) -> str:
        width = max(map(len, asdict(self)))
        return "\n".join(f"{name:<{width}}  {value}" for name, value in asdict(self).items())


_OF_WALKERS = {
    "vavae_epochs": 6,
    "dit_steps": 1_100,
    "ema_decay": 0.99,
    "previews": 2,
    "samples_per_person": 20,
    "guidance_scale": 2.5,
    "dit": {"hidden_size": 256, "depth": 6, "num_heads": 4},
}


def find_preset(
    split: str | Path | None = None,
    weights: AttachedWeights | None = None,
    vavae: str | Path | None = None,
    machine: Machine | None = None,
    log: Log = log,
) -> Preset:
    """Return the preset for this machine; for a split of simulated walkers one that ends within minutes.

    The lengths on a CPU are measured (docs, "Results"); those on a GPU are estimated from its speed and the operations.

    Args:
        weights: from `find_attached_weights`; a GPU is given them to start from, and lines say what starts from what.
        vavae: the VA-VAE where it is decided: "small", in the package, "f16d32", fresh, or what `read_vavae` reads.
    """
    machine = machine or find_machine()
    walkers = split is not None and (Path(split) / INFO_NAME).is_file() and is_simulated(split)
    on_card = machine.kind != "cpu" and not walkers
    there = weights if weights and on_card else AttachedWeights()
    decided = vavae and _config_of(vavae)
    start = str(vavae if decided else there.vavae or "small")
    config = decided or _config_of(start)
    size = 128 if on_card and start == "small" else config["sample_size"]
    preset = Preset(
        str(machine),
        image_size=size,
        original_vavae=None if start == "f16d32" else start,
        vavae_size="f16d32" if config["block_out_channels"][0] >= 64 else "small",
        foundation_model=there.foundation and str(there.foundation),
        lpips_weights=there.lpips and str(there.lpips),
    )
    preset = replace(preset, **_OF_WALKERS if walkers else _of_card(machine, preset) if on_card else {})
    # attention's work grows with the square of the tokens: of walkers 16 are a quarter of the work of 64, and still the
    # right person after two minutes
    side = (size if isinstance(size, int) else max(size)) // 2 ** (len(config["block_out_channels"]) - 1)
    patch_size = -(-side // (4 if walkers else 16 if on_card else 8))
    preset = replace(preset, dit={**preset.dit, "patch_size": patch_size})
    fits = start != "f16d32" and config["latent_channels"] == PUBLISHED["latent_channels"]
    if there.denoiser and fits and find_spec("peft"):
        told = told_arguments(read_starting_weights(there.denoiser))
        preset = going_on(preset, told, {"weights": str(there.denoiser), "lora_rank": 16}, machine)
    if weights is not None:
        for line in _outlook(preset, weights, there, vavae is None, walkers):
            log(line)
    return preset


def _config_of(vavae: str | Path) -> Mapping[str, Any] | None:
    """Return the numbers of a VA-VAE, read or of a size by name; None where there is none yet."""
    if str(vavae) in VAVAE_SIZES and not Path(vavae).exists():
        return VAVAE_SIZES[str(vavae)]
    if is_rae_folder(vavae):
        return PUBLISHED  # as many latents of an image
    with suppress(UserError):  # what is wrong with one is told where it is loaded
        return read_vavae(vavae).config
    return None


def _of_card(machine: Machine, preset: Preset) -> dict[str, Any]:
    # One T4 makes about 10 images a second with f16d32 at 256 px, and 5 steps with DiT-S: hours, not a session. By
    # benchmarks/memory.py f16d32 takes 1.5 GB an image in training, DiT-S 0.1. A T4's 14.56 also have to hold CUDA,
    # DDP's gradients and the notebook's own process: with six images no activation is computed twice.
    roomy, tight = machine.memory > 36e9, machine.memory < 20e9
    numbers = {"vavae_epochs": 100}
    if preset.vavae_size == "f16d32":
        numbers = {"vavae_epochs": 30, "vavae_batch_size": 16 if roomy else 6 if tight else 8}
        if preset.foundation_model and preset.lpips_weights:
            numbers["recipe"] = "full"
    of_dit = {"dit": {"size": "S"}, "dit_steps": 40_000, "dit_batch_size": 256 if roomy else 64, "ema_decay": 0.9995}
    return {**numbers, **of_dit}


def going_on(preset: Preset, dit: dict[str, Any], start: dict[str, Any], machine: Machine) -> Preset:
    """Return the preset with a denoiser that learns low-rank additions to what it starts from, as large as XL."""
    numbers = {"dit_steps": 10_000, "dit_batch_size": 32 if machine.memory > 36e9 else 8, "ema_decay": 0.999}
    return replace(preset, dit=dit, dit_init=start, **numbers)


def _outlook(
    preset: Preset, weights: AttachedWeights, used: AttachedWeights, from_here: bool, walkers: bool
) -> Iterator[str]:
    """Yield lines about what starts from weights, what starts anew, and what to attach."""
    if not used.named() and weights.named():
        yield f"Not used {'for simulated walkers' if walkers else 'on a CPU'}: {', '.join(weights.named())}"
    if walkers:
        return
    if from_here and used.vavae:
        lacking = {"vgg16-397923af.pth": used.lpips, "a folder of DINOv2": used.foundation}
        missing = " and ".join(name for name, path in lacking.items() if path is None)
        losses = f"recipe {preset.recipe}" + (f"; attach {missing} for the recipe full" if missing else "")
        yield f"VA-VAE: starts from {used.vavae}, at {preset.image_size} px, {losses}"
    elif from_here:
        yield (
            f"VA-VAE: starts from the small one in this package, at {preset.image_size} px, as no published one is "
            "attached (960 spectrograms: 35.8 dB at 64 px after 60 epochs, 34.7 at 128 px after 40). For 256 px take a "
            "GPU and attach vavae-imagenet256-f16d32-dinov2.pt, for its recipe full vgg16-397923af.pth and a folder of "
            "DINOv2, for the DiT LightningDiT's .pt"
        )
    if preset.dit_init:
        yield f"DiT: starts from {used.denoiser} by low-rank additions (LoRA)"
    else:
        why = " (LightningDiT's latents are others, or peft is not installed)" if used.denoiser else ""
        yield f"DiT: starts anew{why}"


def lr_for(hidden_size: int | list[int] | None) -> float:
    """Return a denoiser's learning rate: LightningDiT's 2e-4 is for widths from 384 on; below, 1e-3 is faster."""
    return 1e-3 if isinstance(hidden_size, int) and hidden_size <= 256 else 2e-4


def resolved(recipe: AnyRecipe, vavae: str | Path | None = None, log: Log = log) -> AnyRecipe:
    """Return a recipe in which what was left to the machine and to attached weights is as their preset says.

    `vavae` is that whose latents a `LatentRecipe` learns.
    """
    if isinstance(recipe, VAVAERecipe):
        return _resolved_vavae(recipe, log)
    if isinstance(recipe, VAVAEDiTRecipe):
        vavae = recipe.vavae.source
    return _resolved_denoiser(recipe, vavae, log) if isinstance(recipe, LatentRecipe) else recipe


def _resolved_vavae(recipe: VAVAERecipe, log: Log) -> VAVAERecipe:
    loss, start, split = recipe.loss, recipe.vavae, recipe.data.data_dir
    named = start.original_vavae or start.size
    weights = find_attached_weights(log=log) if named is None or loss.recipe not in (None, "light", "vector") else None
    preset = find_preset(split, weights, named, log=log)
    if named is None:
        start = replace(start, original_vavae=preset.original_vavae)
    files = {"foundation_model": preset.foundation_model, "lpips_weights": preset.lpips_weights}
    length = {} if recipe.train.max_steps or recipe.train.max_epochs else {"max_epochs": preset.vavae_epochs}
    return replace(
        recipe,
        vavae=start,
        data=_filled(recipe.data, {"image_size": preset.image_size}) if named in (None, *VAVAE_SIZES) else recipe.data,
        loss=_filled(loss, {"recipe": preset.recipe, **files}),
        train=_filled(recipe.train, {"batch_size": preset.vavae_batch_size, **length}),
    )


def _resolved_denoiser(recipe: LatentRecipe, vavae: str | Path | None, log: Log) -> LatentRecipe:
    model, init = recipe.model, recipe.init
    own_size = bool(model.size or model.hidden_size or model.depth or model.num_heads)
    weights = find_attached_weights(log=log) if vavae and not own_size and not init.weights else None
    preset = find_preset(recipe.data.data_dir, weights, vavae, log=log)
    if own_size:
        numbers = {} if model.size else {"hidden_size": 192, "depth": 6, "num_heads": 3}
        model = _filled(model, {"patch_size": preset.dit["patch_size"], **numbers})
    elif preset.dit_init:
        model, init = replace(model, **preset.dit), replace(init, **preset.dit_init)
    else:
        model = _filled(model, preset.dit)
    lr = preset.dit_lr if preset.dit_init else lr_for(None if model.size else model.hidden_size)
    wanted = {"batch_size": preset.dit_batch_size, "ema_decay": preset.ema_decay, "lr": lr, "previews": preset.previews}
    if not (recipe.train.max_steps or recipe.train.max_epochs):
        wanted["max_steps"] = preset.dit_steps
    sampling = _filled(recipe.sampling, {"guidance_scale": preset.guidance_scale})
    return replace(recipe, model=model, init=init, sampling=sampling, train=_filled(recipe.train, wanted))


def _filled(config: Any, values: Mapping[str, Any]) -> Any:
    return replace(config, **{name: value for name, value in values.items() if getattr(config, name) is None})
