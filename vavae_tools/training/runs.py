"""The two trainings of the main path, whole: from a folder to a folder. Notebooks and commands call these."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor

from vavae_tools.autoencoders.vavae import (
    VAVAE,
    load_vavae,
    pretrained_small_folder,
    read_condition_file,
    vavae,
)
from vavae_tools.data.images import PictureDataModule
from vavae_tools.data.latents import LatentDataModule, LatentFolder, encode_latents, weights_digest
from vavae_tools.data.split import read_split_info
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.pipeline import LatentDiTPipeline, load_pipeline, solver
from vavae_tools.diffusion.transformer import DiT, dit
from vavae_tools.errors import UserError
from vavae_tools.files import save_model
from vavae_tools.machine import find_machine
from vavae_tools.training.checkpoints import (
    WholeCheckpointIO,
    best_checkpoint,
    check_resumable,
    checkpoint_callbacks,
    resume_path,
)
from vavae_tools.training.devices import quiet_lightning
from vavae_tools.training.diffusion_module import DiffusionModule
from vavae_tools.training.previews import ReconstructionPreviews, SamplePreviews
from vavae_tools.training.processes import several_devices_from_a_cell
from vavae_tools.training.progress import Progress, say
from vavae_tools.training.vavae_module import VAVAEModule

Show = Callable[[Tensor], None]


@several_devices_from_a_cell
def fine_tune_vavae(
    data_dir: str | Path,
    output_dir: str | Path = "outputs",
    original_vavae: str | Path | None = None,
    size: str | None = None,
    image_size: int | None = None,
    condition_dim: int = 32,
    condition_file: str | Path | None = None,
    kl_weight: float = 1e-6,
    gradient_weight: float = 0.5,
    spectral_weight: float = 1.0,
    batch_size: int = 16,
    max_epochs: int = 100,
    lr: float | None = None,
    seed: int = 0,
    resume: str | None = None,
    preview_every: int | None = None,
    show: Show | None = None,
    say: Callable[[str], None] = say,
    devices: dict[str, Any] | None = None,
) -> Path:
    """Fine-tune a VA-VAE with a vector per person on one split.

    Args:
        data_dir: a split.
        output_dir: gets `checkpoints/best-*.ckpt` and `last.ckpt`, `lightning_logs/`, `reconstructions/`, and at the
            end `vavae/`, the best model as a diffusers folder.
        original_vavae: weights to start from: a diffusers folder, a `.ckpt` of this training, or "small" for those
            that come with the package; None starts from fresh ones.
        size: "small" or "f16d32" for fresh weights; by default what suits the machine.
        image_size: pixels; by default the size the weights were made for.
        condition_dim: length of a person's vector; 0 for none.
        condition_file: safetensors with a fixed vector per person, in place of learned ones.
        lr: by default 1e-4 for f16d32, 2e-3 for small: what fits 70 M and 0.4 M weights.
        resume: "last" or a `.ckpt`, to go on from.
        preview_every: epochs between two grids of reconstructions; by default about ten in all.
        show: called with each grid, uint8 (3, H, W); by default a notebook's cell shows it.
        devices: arguments of `devices.trainer_settings`, such as {"devices": 2, "precision": "16"}.

    Returns:
        The folder of the best model.
    """
    L.seed_everything(seed, verbose=False)
    quiet_lightning()
    if max_epochs < 1:
        raise UserError(f"--max_epochs {max_epochs}: at least one pass over the pictures is needed")
    if condition_dim < 0:
        raise UserError(f"--condition_dim {condition_dim}: the length of a vector, or 0 for none")
    output_dir = Path(output_dir)
    checkpoints = output_dir / "checkpoints"
    resume_from = resume_path(resume, checkpoints)
    people = read_split_info(data_dir)["labels"]
    table = read_condition_file(condition_file, people) if condition_file else None
    condition_dim = table.shape[1] if table is not None else condition_dim
    model = _vavae_to_start_from(original_vavae, size, condition_dim, max(people.values()) + 1, say)
    if table is not None:
        model.conditions.weight.data.copy_(table)
        model.conditions.requires_grad_(False)
    pictures = PictureDataModule(data_dir, _fitting_size(image_size, model), batch_size, seed=seed)
    lr = lr or (2e-3 if model.config.block_out_channels[0] < 64 else 1e-4)

    module = VAVAEModule(
        model, lr, kl_weight, gradient_weight=gradient_weight, spectral_weight=spectral_weight, seed=seed
    )
    settings = module.trainer_settings(**(devices or {}))
    world = settings["devices"] * settings["num_nodes"]
    say(
        f"Fine-tuning on {len(pictures.train_data):,} pictures of {pictures.num_classes} people, {batch_size} a step "
        f"on each of {world} device{'s' if world > 1 else ''}, lr {lr:g}, {settings['precision']} ({data_dir})"
    )
    if world > 1:
        say(f"Rule of thumb for {world} devices: lr × sqrt({world}) = {lr * world**0.5:.2g}; lr stays as given")
    validated = pictures.val_data is not None
    callbacks = checkpoint_callbacks(checkpoints, "val/reconstruction" if validated else None)
    shown = (pictures.val_data or pictures.train_data).few_of_each(8)
    every = preview_every or max(1, max_epochs // 10)
    callbacks.append(ReconstructionPreviews(shown, output_dir / "reconstructions", every, show))
    trainer = _trainer(settings, output_dir, callbacks, say, max_epochs=max_epochs)
    check_resumable(resume_from, module)
    trainer.fit(module, pictures, ckpt_path=resume_from, weights_only=True)

    folder = output_dir / "vavae"
    if trainer.is_global_zero:
        best = load_vavae(best_checkpoint(checkpoints), say=lambda line: None)
        save_model(best, folder)
        say(f"written: {folder} (from {best_checkpoint(checkpoints)}), {output_dir / 'reconstructions'}/")
    return folder


def encode_split(
    data_dir: str | Path,
    vavae_dir: str | Path,
    output_dir: str | Path,
    image_size: int | None = None,
    flips: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = say,
) -> LatentFolder:
    """Encode a split with a VA-VAE, a folder or a `.ckpt`, once."""
    model = load_vavae(vavae_dir, say=lambda line: None)
    pictures = PictureDataModule(data_dir, _fitting_size(image_size, model), seed=seed)
    device = "cpu" if find_machine().kind == "cpu" else "cuda"
    latents = encode_latents(model, pictures, output_dir, flips, device=device, seed=seed)
    say(str(latents))
    return latents


@several_devices_from_a_cell
def train_dit(
    latents_dir: str | Path,
    vavae_dir: str | Path,
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
) -> Path:
    """Train a DiT on latents.

    Args:
        latents_dir: what `encode_split` wrote.
        vavae_dir: the VA-VAE that made them; a copy with their statistics goes along with the checkpoints.
        output_dir: gets `checkpoints/best-*.ckpt` and `last.ckpt`, `lightning_logs/`, `samples/`, `vavae/`, and at
            the end `pipeline/`, ready to sample from.
        denoiser: {"size": "S" | "B" | "L" | "XL"}, or numbers (hidden_size, depth, num_heads), and patch_size.
        max_steps: optimiser steps.
        flip: "half" trains half the time on mirrored pictures, where they were encoded.
        previews: grids of samples in all.
        devices: arguments of `devices.trainer_settings`, such as {"devices": 2, "precision": "16"}.

    Returns:
        The folder of the pipeline, with the averaged weights of the last step.
    """
    L.seed_everything(seed, verbose=False)
    quiet_lightning()
    output_dir = Path(output_dir)
    checkpoints = output_dir / "checkpoints"
    resume_from = resume_path(resume, checkpoints)
    latents = LatentDataModule(latents_dir, batch_size, seed=seed)
    if flip == "half" and not latents.folder.flips:
        raise UserError(f"flip='half' needs mirrored latents, which {latents_dir} lacks: encode them with flips=True")
    channels, height, width = latents.folder.shape
    denoiser = {"input_size": (height, width), "in_channels": channels, **(denoiser or {})}
    network = dit(**denoiser) if "size" in denoiser else DiT(**denoiser)
    conditioner = ClassConditioner(latents.num_classes, network.config.hidden_size)
    model = load_vavae(vavae_dir, say=lambda line: None).eval()
    if weights_digest(model) != latents.folder.weights:
        raise UserError(f"{latents_dir} was not made by {vavae_dir}: encode the pictures again with this VA-VAE")
    model.register_to_config(latents_mean=latents.folder.mean, latents_std=latents.folder.std)
    save_model(model, output_dir / "vavae")

    module = DiffusionModule(network, conditioner, lr=lr, ema_decay=ema_decay, flip=flip, seed=seed)
    module.hparams["people"] = latents.folder.people
    settings = module.trainer_settings(**(devices or {}))
    weights = sum(p.numel() for p in module.network.parameters())
    steps = max(1, len(latents.train_data) // (min(batch_size, len(latents.train_data)) * settings["devices"]))
    epochs = -(-max_steps // steps)
    say(
        f"Training a DiT of {weights / 1e6:,.1f} M weights on {len(latents.train_data):,} latents: {max_steps:,} steps "
        f"of {batch_size}, {epochs:,} epochs, {settings['precision']} ({latents_dir})"
    )
    columns = 8

    def make(trained: torch.nn.ModuleDict) -> Tensor:
        labels = sorted(latents.folder.people.values())[:columns]
        people = [label for label in labels for _ in range(columns)]
        vae = model.to(next(trained.parameters()).device)
        pipe = LatentDiTPipeline(vae, trained["denoiser"], trained["conditioner"], solver(), latents.folder.people)
        pipe.set_progress_bar_config(disable=True)
        noise = pipe.noise(seed, torch.arange(len(people)))
        return pipe(people, 20, guidance_scale, latents=noise, output_type="pt").images

    every = max(1, epochs // max(previews, 1))
    has_validation = len(latents.val_data) > 0
    callbacks = checkpoint_callbacks(checkpoints, "val/loss" if has_validation else None)
    if previews:
        callbacks.append(SamplePreviews(make, columns, output_dir / "samples", every, show))
    trainer = _trainer(
        settings,
        output_dir,
        callbacks,
        say,
        max_steps=max_steps,
        max_epochs=-1,
        check_val_every_n_epoch=max(1, epochs // 20),
    )
    check_resumable(resume_from, module)
    trainer.fit(module, latents, ckpt_path=resume_from, weights_only=True)

    folder = output_dir / "pipeline"
    if trainer.is_global_zero:
        save_model(load_pipeline(checkpoints / "last.ckpt"), folder)
        say(f"written: {folder}, {checkpoints}/, {output_dir / 'samples'}/")
    return folder


def _vavae_to_start_from(
    original: str | Path | None, size: str | None, condition_dim: int, people: int, say: Callable[[str], None]
) -> VAVAE:
    if original is None:
        size = size or ("small" if find_machine().kind == "cpu" else "f16d32")
        say(f"No weights given: starting from a fresh VA-VAE ({size})")
        return vavae(size, condition_dim=condition_dim, num_conditions=people if condition_dim else 0)
    source = pretrained_small_folder() if str(original) == "small" else original
    return load_vavae(source, condition_dim, people if condition_dim else 0, say)


def _fitting_size(image_size: int | None, model: VAVAE) -> int:
    image_size = model.config.sample_size if image_size is None else image_size
    if image_size < 1 or image_size % model.downsampling:
        raise UserError(
            f"--image_size {image_size} does not fit this VA-VAE: it must be divisible by {model.downsampling}"
        )
    return image_size


def _trainer(
    settings: dict[str, Any], output_dir: Path, callbacks: list[L.Callback], say: Callable[[str], None], **length: Any
) -> L.Trainer:
    try:
        return L.Trainer(
            **settings,
            **length,
            default_root_dir=output_dir,
            logger=TensorBoardLogger(output_dir),
            callbacks=[*callbacks, Progress(say)],
            plugins=[WholeCheckpointIO()],
            enable_progress_bar=False,
        )
    except MisconfigurationException as error:  # such as a strategy whose package is missing
        raise UserError(str(error)) from None
