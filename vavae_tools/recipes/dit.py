"""A denoiser on latents of images of classes, whole: from a folder to a pipeline. Notebooks and commands call these."""

import inspect
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from vavae_tools.autoencoders.loading import load_autoencoder
from vavae_tools.autoencoders.vavae import fitting_size
from vavae_tools.autoencoders.weights import load_vavae
from vavae_tools.data.datasets import class_data
from vavae_tools.data.latents import LatentDataModule, LatentFolder, encode_latents, latents_digest
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.ddt import DDT
from vavae_tools.diffusion.factory import RENAMED as REFERENCE_NAMES
from vavae_tools.diffusion.factory import make_denoiser, split_reference_arguments
from vavae_tools.diffusion.objectives import ALIASES, OBJECTIVES, make_objective, time_shift_of
from vavae_tools.diffusion.objectives import Objective as Learned
from vavae_tools.diffusion.solvers import make_solver
from vavae_tools.diffusion.transformer import DiT
from vavae_tools.paths import find_split
from vavae_tools.pipelines.classes import LatentDiTPipeline, load_pipeline
from vavae_tools.published.lightningdit import read_latent_statistics
from vavae_tools.recipes.base import DenoiserModel, LatentRecipe, Objective, VAVAEDiTRecipe
from vavae_tools.recipes.presets import resolved
from vavae_tools.runtime.console import say
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import keep_once, save_model
from vavae_tools.runtime.machine import find_device
from vavae_tools.runtime.ranks import first_alone, is_first, of_torchrun
from vavae_tools.training.callbacks.previews import SamplePreviews
from vavae_tools.training.config import Saving, filled
from vavae_tools.training.denoiser_module import DiffusionModule
from vavae_tools.training.devices import compiles
from vavae_tools.training.run import Run, Say, Show, train

RENAMED = {**REFERENCE_NAMES, "class_dropout_prob": "condition_dropout"}
"""Arguments of a denoiser, as references call them, that are keys here under another name."""
COLUMNS = 8
"""Samples of each person in a preview."""


def encode_split(
    data_dir: str | Path | Mapping[str, Any],
    vavae_dir: str | Path,
    output_dir: str | Path,
    image_size: int | tuple[int, int] | None = None,
    flips: bool = False,
    seed: int = 0,
    say: Say = say,
    latents_stats: str | Path | None = None,
) -> LatentFolder:
    """Encode a split with a VA-VAE, a folder or a `.ckpt`, once; several processes share the work.

    Args:
        data_dir: a split, or what else `datasets.PictureDataModule` reads; or the arguments of `datasets.class_data`.
        latents_stats: the `latents_stats.pt` of published weights that training is to go on from; by default the
            statistics are computed on the training subset.
    """
    model = load_vavae(vavae_dir, say=lambda line: None)
    given = dict(data_dir) if isinstance(data_dir, Mapping) else {"data_dir": data_dir}
    size = fitting_size(model, given.pop("image_size", None) or image_size)
    pictures = class_data(**{"seed": seed, **given}, image_size=size, channels=model.config.in_channels)
    statistics = read_latent_statistics(latents_stats) if latents_stats else None
    latents = encode_latents(
        model,
        pictures,
        output_dir,
        flips,
        device=find_device(),
        seed=seed,
        statistics=statistics,
        ranks=of_torchrun(),
        say=say,
    )
    say(str(latents))
    return latents


def train_dit(
    latents_dir: str | Path,
    autoencoder_dir: str | Path,
    output_dir: str | Path = "outputs/dit",
    denoiser: dict[str, Any] | None = None,
    max_steps: int | None = None,
    batch_size: int | None = None,
    lr: float | None = None,
    ema_decay: float | None = None,
    flip: str = "none",
    seed: int = 0,
    resume: str | None = None,
    previews: int | None = None,
    guidance_scale: float | None = None,
    show: Show | None = None,
    say: Say = say,
    devices: dict[str, Any] | None = None,
    saving: Saving | dict[str, Any] | None = None,
    objective: dict[str, Any] | None = None,
    warmup_steps: int | None = None,
    schedule: str | None = None,
    compile: bool | None = None,
    gradient_checkpointing: bool = False,
    num_workers: int | None = None,
    init: dict[str, Any] | None = None,
) -> Path:
    """Train a denoiser on latents; what is None is as in `experiment=vavae_dit`.

    Args:
        latents_dir: what `encode_latents` (or `encode_split`) wrote.
        autoencoder_dir: the autoencoder that made them; a copy with their statistics goes along with the checkpoints.
        output_dir: gets `checkpoints/best-*.ckpt` and `last.ckpt`, `lightning_logs/`, `samples/`, `autoencoder/`, and
            at the end `pipeline/`, ready to sample from.
        denoiser: {"size": "S" | "B" | "L" | "XL"}, or numbers (hidden_size, depth, num_heads), and patch_size; two
            numbers each make a DiT with the wide head. num_classes and class_dropout_prob go to the conditioner. See
            `factory.make_denoiser`.
        max_steps: optimiser steps.
        flip: "half" trains half the time on mirrored images, where they were encoded.
        previews: grids of samples in all.
        devices: arguments of `devices.trainer_settings`, such as {"devices": 2, "precision": "16"}.
        saving: when checkpoints are written and training ends, a `Saving` or its numbers as a dict.
        objective: {"name": …} and its numbers, see `objectives.make_objective`.
        compile: `torch.compile` the blocks; None: where the card gains by it (`devices.compiles`).
        gradient_checkpointing: less memory for a third more time.
        init: arguments of `init_from.start_from`: weights to go on from, and how.

    Returns:
        The folder of the pipeline, with the averaged weights of the last step.
    """
    settings = {
        **{"latents_dir": latents_dir, "num_workers": num_workers, "seed": seed, "guidance_scale": guidance_scale},
        **{"batch_size": batch_size, "max_steps": max_steps, "lr": lr, "ema_decay": ema_decay, "previews": previews},
        **{"warmup_steps": warmup_steps, "schedule": schedule, "compile": compile, "devices": devices},
        **{"gradient_checkpointing": gradient_checkpointing, "saving": saving, "flips": flip == "half"},
    }
    recipe, lightning = filled(LatentRecipe(), settings)
    model, further = filled(recipe.model, {RENAMED.get(name, name): value for name, value in (denoiser or {}).items()})
    recipe = replace(
        recipe,
        model=model,
        objective=replace(recipe.objective, **(objective or {})),
        init=replace(recipe.init, **(init or {})),
        train=replace(recipe.train, trainer=lightning),
    )
    build = partial(build_on_latents, autoencoder=str(autoencoder_dir), further=further, best="best-")
    return train(build, resolved(recipe), output_dir, resume, show, say)


def train_vavae_dit(
    recipe: VAVAEDiTRecipe, output_dir: Path, resume: str | None = None, show: Show | None = None, say: Say = say
) -> Path:
    """`experiment=vavae_dit`, what notebook 03 does: encode a split, and train on its latents."""
    return train(_build_vavae_dit, resolved(recipe), output_dir, resume, show, say)


def _build_vavae_dit(
    recipe: VAVAEDiTRecipe, output_dir: Path, resume_from: Path | None, show: Show | None, say: Say
) -> Run:
    compiles(recipe.train.compile, say=say)  # what it lacks is said before anything takes time
    encode_split(
        {**recipe.data.arguments(), "data_dir": recipe.data.data_dir or find_split(), "seed": recipe.seed},
        recipe.vavae.source,
        recipe.data.latents_dir,
        flips=recipe.data.flips,
        say=say,
        latents_stats=recipe.vavae.latents_stats,
    )
    return build_on_latents(recipe, output_dir, resume_from, show, say, autoencoder=recipe.vavae.source)


def build_on_latents(
    recipe: LatentRecipe,
    output_dir: Path,
    resume_from: Path | None,
    show: Show | None,
    say: Say,
    autoencoder: str | Path,
    further: Mapping[str, Any] | None = None,
    logged: Mapping[str, float] | None = None,
    best: str = "epoch=",
) -> Run:
    """Return the training of a denoiser on the latents in `recipe.data.latents_dir`.

    Args:
        autoencoder: the folder, or `.ckpt`, of what made them.
        further: arguments of the denoiser that a recipe has no key for, such as a reference's own.
        logged: numbers known before training that its curves shall hold.

    Raises:
        UserError: parts that do not fit together.
    """
    config, seed = recipe.train, recipe.seed
    L.seed_everything(seed, verbose=False)  # the same weights, whether latents were encoded just now or not
    latents = LatentDataModule(recipe.data.latents_dir, config.batch_size, recipe.data.num_workers or 0, seed=seed)
    if recipe.data.flips and not latents.folder.flips:
        raise UserError(
            f"Mirrored images are to be trained on, but {latents.folder.path} has no mirrored latents: encode them "
            "with flips=True"
        )
    network, conditioner = _denoiser_for(latents, recipe.model, further or {})
    if recipe.init.weights:
        _start_from(network, conditioner, latents, asdict(recipe.init), resume_from, seed, say)
    if config.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    config = replace(config, compile=compiles(config.compile, say=say))
    with first_alone("autoencoder"):  # the others may read what it writes
        model = _autoencoder_of(latents, autoencoder, output_dir / "autoencoder")
    module = DiffusionModule(
        network,
        conditioner,
        objective_for(recipe.objective, type(recipe)().objective, latents.folder.shape),
        lr=config.lr,
        ema_decay=config.ema_decay,
        warmup_steps=config.warmup_steps,
        flip="half" if recipe.data.flips else "none",
        seed=seed,
        schedule=config.schedule,
        compile=config.compile,
    )
    module.hparams["people"] = latents.folder.people

    def make(trained: nn.ModuleDict) -> Tensor:
        labels = sorted(latents.folder.people.values())[:COLUMNS]
        people = [label for label in labels for _ in range(COLUMNS)]
        vae = model.to(next(trained.parameters()).device)
        try:
            parts = trained["denoiser"], trained["conditioner"]
            flow = make_solver(None, module.objective), latents.folder.people, module.objective.config
            pipe = LatentDiTPipeline(vae, *parts, *flow)
            pipe.set_progress_bar_config(disable=True)
            noise = pipe.noise(seed, torch.arange(len(people)))
            scale = recipe.sampling.guidance_scale
            return pipe(people, recipe.sampling.num_steps, scale, latents=noise, output_type="pt").images
        finally:
            model.to("cpu")  # its memory is training's

    folder, checkpoints, samples = output_dir / "pipeline", output_dir / "checkpoints", output_dir / "samples"

    def export(trainer: Any) -> None:
        save_model(load_pipeline(checkpoints / "last.ckpt"), folder)
        keep_once(output_dir / "autoencoder", folder / "vae")  # an RAE is 2 GB
        say(f"written: {folder}, {checkpoints}/, {samples}/")

    return Run(
        module=module,
        data=latents,
        fingerprint=latents.folder.key,
        config=config,
        network=module.network,
        what=f"a {type(network).__name__}",
        export=export,
        folder=folder,
        preview=lambda every: SamplePreviews(make, COLUMNS, samples, every, show),
        best=best,
        logged=logged or {},
    )


def objective_for(wanted: Objective, default: Objective, shape: tuple[int, ...]) -> Learned:
    """Return an objective by its name and numbers, on data of a shape (C, h, w).

    What only the recipe's own objective has is left out for another one.

    Args:
        default: the recipe's.

    Raises:
        UserError: a number that this objective does not have.
    """
    numbers = asdict(wanted)
    name = numbers.pop("name")
    taken = inspect.signature(OBJECTIVES[ALIASES.get(name, name)]).parameters
    untouched = {key for key, value in numbers.items() if value == getattr(default, key)}
    numbers = {key: value for key, value in numbers.items() if key in taken or key not in untouched}
    if numbers.get("time_shift", 1.0) is None:
        numbers["time_shift"] = max(1.0, time_shift_of(shape))
    return make_objective(name, **{key: value for key, value in numbers.items() if value is not None})


def _denoiser_for(
    latents: LatentDataModule, model: DenoiserModel, further: Mapping[str, Any]
) -> tuple[DiT | DDT, ClassConditioner]:
    channels, height, width = latents.folder.shape
    arguments = {name: value for name, value in {**asdict(model), **further}.items() if value is not None}
    if model.size:
        arguments = {k: v for k, v in arguments.items() if k not in ("hidden_size", "depth", "num_heads")}
    null_label, latent_size = arguments.pop("null_label", None), arguments.pop("latent_size", None)
    given = arguments.get("in_channels", channels), arguments.get("input_size", (height, width))
    side = given[1] if isinstance(given[1], int) else tuple(given[1])
    if given[0] != channels or side not in (height, (height, width)) or (side == height and height != width):
        found = f"{given[0]} channels of {side if isinstance(side, int) else '×'.join(map(str, side))}"
        raise UserError(
            f"The denoiser is made for {found}, the latents are {channels}×{height}×{width}: set "
            f"model.in_channels={channels} model.input_size={height}, or leave them out"
        )
    if latent_size is not None and list(latent_size) != [channels, height, width]:
        raise UserError(
            f"latent_size {'×'.join(map(str, latent_size))} does not fit the encoder, whose latents are "
            f"{channels}×{height}×{width}: leave it out"
        )
    arguments |= {"in_channels": channels, "input_size": (height, width)}
    arguments["class_dropout_prob"] = arguments.pop("condition_dropout")
    of_denoiser, of_conditioner = split_reference_arguments({"num_classes": latents.num_classes, **arguments})
    classes = of_conditioner["num_classes"]
    if classes < latents.num_classes:
        raise UserError(
            f"num_classes {classes}, but the data have {latents.num_classes} classes: set model.num_classes=null, or "
            "no fewer than they are"
        )
    if null_label not in (None, classes):
        raise UserError(
            f"model.null_label={null_label}, but the model has {classes} classes, and the label after the last one, "
            f"{classes}, stands for any: leave it out, or set model.num_classes"
        )
    return make_denoiser(of_denoiser), ClassConditioner(**of_conditioner)


def _start_from(
    network: DiT | DDT,
    conditioner: ClassConditioner,
    latents: LatentDataModule,
    init: dict[str, Any],
    resume_from: Path | None,
    seed: int,
    say: Say,
) -> None:
    """The weights to begin with; a run that resumes has its own, and needs no more than the same form."""
    from vavae_tools.diffusion.lora import TARGETS, add_lora
    from vavae_tools.recipes.init_from import start_from

    if resume_from is None:
        start_from(network, conditioner, latents=latents, seed=seed, say=say, **init)
    elif init["lora_rank"]:
        add_lora(network, init["lora_rank"], init["lora_alpha"], init["lora_targets"] or TARGETS)


def _autoencoder_of(latents: LatentDataModule, source: str | Path, copy: Path) -> nn.Module:
    """The autoencoder of these latents with their statistics, of which a copy goes along with the checkpoints.

    Raises:
        UserError: another one made them.
    """
    model = load_autoencoder(source).eval()
    if latents_digest(model) != latents.folder.weights:
        raise UserError(f"{latents.folder.path} was not made by {source}: encode the pictures again with this one")
    if not model.has_own_statistics:
        model.register_to_config(latents_mean=latents.folder.mean, latents_std=latents.folder.std)
    if not is_first():
        return model
    if copy.is_dir() and Path(source).resolve() == copy.resolve():
        model.save_config(copy)
    else:
        save_model(model, copy)
    return model
