"""Latents and the DiT, whole: from a folder to a folder. Notebooks and commands call these."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from vavae_tools.autoencoders.loading import load_autoencoder
from vavae_tools.autoencoders.vavae import fitting_size
from vavae_tools.autoencoders.weights import load_vavae
from vavae_tools.checkpoints.resuming import resume_path
from vavae_tools.data.images import PictureDataModule
from vavae_tools.data.latents import LatentDataModule, LatentFolder, encode_latents, latents_digest
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.ddt import DDT
from vavae_tools.diffusion.factory import make_denoiser, split_reference_arguments
from vavae_tools.diffusion.objectives import FlowMatching, time_shift_of
from vavae_tools.diffusion.solvers import solver
from vavae_tools.diffusion.transformer import DiT
from vavae_tools.paths import find_split
from vavae_tools.pipelines.classes import LatentDiTPipeline, load_pipeline
from vavae_tools.published.lightningdit import read_latent_statistics
from vavae_tools.runtime.console import say
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import keep_once, save_model
from vavae_tools.runtime.machine import find_device
from vavae_tools.runtime.ranks import first_alone, is_first, of_torchrun
from vavae_tools.training.config import Saving, saving_knobs
from vavae_tools.training.denoiser_module import DiffusionModule
from vavae_tools.training.devices import compiles, quiet_lightning
from vavae_tools.training.run import on_all_devices, train_denoiser

Show = Callable[[Tensor], None]


def encode_split(
    data_dir: str | Path,
    vavae_dir: str | Path,
    output_dir: str | Path,
    image_size: int | tuple[int, int] | None = None,
    flips: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = say,
    latents_stats: str | Path | None = None,
) -> LatentFolder:
    """Encode a split with a VA-VAE, a folder or a `.ckpt`, once; several processes share the work.

    Args:
        latents_stats: the `latents_stats.pt` of published weights that training is to go on from; by default the
            statistics are computed on the training side.
    """
    model = load_vavae(vavae_dir, say=lambda line: None)
    pictures = PictureDataModule(
        data_dir, fitting_size(model, image_size), seed=seed, channels=model.config.in_channels
    )
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


@on_all_devices
def train_dit(
    latents_dir: str | Path,
    autoencoder_dir: str | Path,
    output_dir: str | Path = "outputs/dit",
    denoiser: dict[str, Any] | None = None,
    max_steps: int = 40_000,
    batch_size: int = 64,
    lr: float = 2e-4,
    ema_decay: float = 0.9995,
    flip: str = "none",
    seed: int = 0,
    resume: str | None = None,
    previews: int = 8,
    guidance_scale: float = 1.25,
    show: Show | None = None,
    say: Callable[[str], None] = say,
    devices: dict[str, Any] | None = None,
    saving: Saving | dict[str, Any] | None = None,
    objective: dict[str, Any] | None = None,
    warmup_steps: int = 100,
    schedule: str = "cosine",
    compile: bool | None = None,
    gradient_checkpointing: bool = False,
    best: str = "best-",
    num_workers: int = 0,
    init: dict[str, Any] | None = None,
    noted: dict[str, float] | None = None,
) -> Path:
    """Train a denoiser on latents.

    Args:
        latents_dir: what `encode_latents` (or `encode_split`) wrote.
        autoencoder_dir: the autoencoder that made them; a copy with their statistics goes along with the checkpoints.
        output_dir: gets `checkpoints/best-*.ckpt` and `last.ckpt`, `lightning_logs/`, `samples/`, `autoencoder/`, and
            at the end `pipeline/`, ready to sample from.
        denoiser: {"size": "S" | "B" | "L" | "XL"}, or numbers (hidden_size, depth, num_heads), and patch_size; two
            numbers each make a DiT with the wide head. num_classes and class_dropout_prob go to the conditioner. See
            `denoisers.make_denoiser`.
        max_steps: optimiser steps.
        flip: "half" trains half the time on mirrored pictures, where they were encoded.
        previews: grids of samples in all.
        devices: arguments of `devices.trainer_settings`, such as {"devices": 2, "precision": "16"}.
        saving: when checkpoints are written and training ends, a `Saving` or its numbers as a dict.
        objective: arguments of `FlowMatching`; time_shift None: by the latents' dimension (RAE).
        warmup_steps, schedule: see `DiffusionModule`.
        compile: `torch.compile` the blocks; None: where the card gains by it (`devices.compiles`).
        gradient_checkpointing: less memory for a third more time.
        best: how the name of the best checkpoint begins.
        init: arguments of `starting_point.start_from`: weights to go on from, and how.
        noted: numbers known before training that its curves shall hold.

    Returns:
        The folder of the pipeline, with the averaged weights of the last step.
    """
    L.seed_everything(seed, verbose=False)
    quiet_lightning()
    saving = Saving(**saving) if isinstance(saving, dict) else saving or Saving()
    output_dir = Path(output_dir)
    checkpoints = output_dir / "checkpoints"
    resume_from = resume_path(resume, checkpoints, say)
    latents = LatentDataModule(latents_dir, batch_size, num_workers, seed=seed)
    if flip == "half" and not latents.folder.flips:
        raise UserError(f"flip='half' needs mirrored latents, which {latents_dir} lacks: encode them with flips=True")
    network, conditioner = _denoiser_for(latents, denoiser or {})
    if init and init.get("weights"):
        _start_from(network, conditioner, latents, init, resume_from, seed, say)
    if gradient_checkpointing:
        network.enable_gradient_checkpointing()
    compile = compiles(compile, say=say)
    with first_alone("autoencoder"):  # the others may read what it writes
        model = _autoencoder_of(latents, autoencoder_dir, output_dir / "autoencoder")

    module = DiffusionModule(
        network,
        conditioner,
        _objective_for(latents, objective or {}),
        lr=lr,
        ema_decay=ema_decay,
        warmup_steps=warmup_steps,
        flip=flip,
        seed=seed,
        schedule=schedule,
        compile=compile,
    )
    module.hparams["people"] = latents.folder.people
    columns = 8

    def make(trained: torch.nn.ModuleDict) -> Tensor:
        labels = sorted(latents.folder.people.values())[:columns]
        people = [label for label in labels for _ in range(columns)]
        vae = model.to(next(trained.parameters()).device)
        try:
            parts = trained["denoiser"], trained["conditioner"]
            pipe = LatentDiTPipeline(vae, *parts, solver(module.objective.time_shift), latents.folder.people)
            pipe.set_progress_bar_config(disable=True)
            noise = pipe.noise(seed, torch.arange(len(people)))
            return pipe(people, 20, guidance_scale, latents=noise, output_type="pt").images
        finally:
            model.to("cpu")  # its memory is training's

    trainer = train_denoiser(
        module,
        latents,
        output_dir,
        make,
        columns,
        previews,
        data_key=latents.folder.key,
        max_steps=max_steps,
        devices=devices or {},
        saving=saving,
        best=best,
        compile=compile,
        resume_from=resume_from,
        noted=noted,
        show=show,
        say=say,
    )

    folder = output_dir / "pipeline"
    if trainer.is_global_zero:
        save_model(load_pipeline(checkpoints / "last.ckpt"), folder)
        keep_once(output_dir / "autoencoder", folder / "vae")  # an RAE is 2 GB
        say(f"written: {folder}, {checkpoints}/, {output_dir / 'samples'}/")
    return folder


def _denoiser_for(latents: LatentDataModule, arguments: dict[str, Any]) -> tuple[DiT | DDT, ClassConditioner]:
    channels, height, width = latents.folder.shape
    arguments = {name: value for name, value in arguments.items() if value is not None}
    given = arguments.get("in_channels", channels), arguments.get("input_size", (height, width))
    side = given[1] if isinstance(given[1], int) else tuple(given[1])
    if given[0] != channels or side not in (height, (height, width)) or (side == height and height != width):
        found = f"{given[0]} channels of {side if isinstance(side, int) else '×'.join(map(str, side))}"
        raise UserError(
            f"The denoiser is made for {found}, the latents are {channels}×{height}×{width}: set "
            f"model.dit.in_channels={channels} model.dit.input_size={height}"
        )
    arguments |= {"in_channels": channels, "input_size": (height, width)}
    of_denoiser, of_conditioner = split_reference_arguments({"num_classes": latents.num_classes, **arguments})
    if of_conditioner["num_classes"] < latents.num_classes:
        raise UserError(
            f"num_classes {of_conditioner['num_classes']}, but the data have {latents.num_classes} classes: set "
            "model.dit.num_classes=null, or no fewer than they are"
        )
    return make_denoiser(of_denoiser), ClassConditioner(**of_conditioner)


def _start_from(
    network: DiT | DDT,
    conditioner: ClassConditioner,
    latents: LatentDataModule,
    init: dict[str, Any],
    resume_from: Path | None,
    seed: int,
    say: Callable[[str], None],
) -> None:
    """The weights to begin with; a run that goes on has its own, and needs no more than the same form."""
    from vavae_tools.diffusion.lora import TARGETS, add_lora
    from vavae_tools.recipes.init_from import start_from

    if resume_from is None:
        start_from(network, conditioner, latents=latents, seed=seed, say=say, **init)
    elif init.get("lora_rank"):
        add_lora(network, init["lora_rank"], init.get("lora_alpha"), init.get("lora_targets") or TARGETS)


def _objective_for(latents: LatentDataModule, arguments: dict[str, Any]) -> FlowMatching:
    if arguments.get("time_shift", 1.0) is None:
        arguments = {**arguments, "time_shift": max(1.0, time_shift_of(latents.folder.shape))}
    return FlowMatching(**arguments)


def _autoencoder_of(latents: LatentDataModule, source: str | Path, copy: Path) -> torch.nn.Module:
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


def train_vavae_dit(
    data: dict[str, Any],
    model: dict[str, Any],
    trainer: dict[str, Any],
    callbacks: dict[str, Any],
    output_dir: str | Path,
    resume: str | None = None,
    seed: int = 0,
    say: Callable[[str], None] = say,
) -> Path:
    """`experiment=vavae_dit`: what notebook 03 does, `encode_split` and `train_dit`, with the keys of `configs/`."""
    source = model["vavae"]["source"]
    arguments = experiment_arguments(data, model, trainer, callbacks)
    arguments["compile"] = compiles(arguments["compile"], say=say)  # what it lacks is said before anything takes time
    encode_split(
        data["data_dir"] or find_split(),
        source,
        data["latents_dir"],
        data["image_size"],
        data["flips"],
        say=say,
        latents_stats=model["vavae"]["latents_stats"],
    )
    return train_dit(data["latents_dir"], source, output_dir, resume=resume, seed=seed, say=say, **arguments)


def experiment_arguments(
    data: dict[str, Any], model: dict[str, Any], trainer: dict[str, Any], callbacks: dict[str, Any]
) -> dict[str, Any]:
    """The arguments of `train_dit` from an experiment's keys."""
    module, denoiser = model["dit_module"], dict(model["dit"])
    if denoiser.get("size"):
        denoiser = {k: v for k, v in denoiser.items() if k not in ("hidden_size", "depth", "num_heads")}
    if module["max_steps"] < 1:
        raise UserError(f"max_steps {module['max_steps']}: at least one step is needed")
    return {
        "denoiser": denoiser,
        "batch_size": data["batch_size"],
        "lr": module["learning_rate"],
        **{k: module[k] for k in ("max_steps", "ema_decay", "warmup_steps", "schedule", "compile")},
        "gradient_checkpointing": module["gradient_checkpointing"],
        "objective": model["objective"],
        "flip": "half" if data["flips"] else "none",
        "previews": callbacks["previews"],
        "guidance_scale": callbacks["preview_guidance_scale"],
        "devices": trainer,
        "saving": saving_knobs(callbacks),
        "best": "epoch=",
        "init": model["init"],
    }
