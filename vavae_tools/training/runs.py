"""Latents and the DiT, whole: from a folder to a folder. Notebooks and commands call these."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from vavae_tools.autoencoders.vavae import fitting_size
from vavae_tools.autoencoders.weights import load_vavae
from vavae_tools.checkpoints.resuming import check_resumable, resume_path
from vavae_tools.data.images import PictureDataModule
from vavae_tools.data.latents import LatentDataModule, LatentFolder, encode_latents, weights_digest
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.pipeline import LatentDiTPipeline, load_pipeline, solver
from vavae_tools.diffusion.transformer import DiT, dit
from vavae_tools.errors import UserError
from vavae_tools.files import save_model
from vavae_tools.machine import find_device
from vavae_tools.training.checkpoints import checkpoint_callbacks
from vavae_tools.training.devices import quiet_lightning
from vavae_tools.training.diffusion_module import DiffusionModule
from vavae_tools.training.previews import SamplePreviews
from vavae_tools.training.processes import several_devices_from_a_cell
from vavae_tools.training.progress import say
from vavae_tools.training.record import RunRecord
from vavae_tools.training.saving import Saving
from vavae_tools.training.trainer import build_trainer, fit

Show = Callable[[Tensor], None]


def encode_split(
    data_dir: str | Path,
    vavae_dir: str | Path,
    output_dir: str | Path,
    image_size: int | tuple[int, int] | None = None,
    flips: bool = False,
    seed: int = 0,
    say: Callable[[str], None] = say,
) -> LatentFolder:
    """Encode a split with a VA-VAE, a folder or a `.ckpt`, once."""
    model = load_vavae(vavae_dir, say=lambda line: None)
    pictures = PictureDataModule(
        data_dir, fitting_size(model, image_size), seed=seed, channels=model.config.in_channels
    )
    latents = encode_latents(model, pictures, output_dir, flips, device=find_device(), seed=seed)
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
    saving: Saving | dict[str, Any] | None = None,
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
        saving: when checkpoints are written and training ends, a `Saving` or its numbers as a dict.

    Returns:
        The folder of the pipeline, with the averaged weights of the last step.
    """
    L.seed_everything(seed, verbose=False)
    quiet_lightning()
    saving = Saving(**saving) if isinstance(saving, dict) else saving or Saving()
    output_dir = Path(output_dir)
    checkpoints = output_dir / "checkpoints"
    resume_from = resume_path(resume, checkpoints, say)
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
    callbacks = checkpoint_callbacks(checkpoints, "val/loss" if has_validation else None, saving)
    if previews:
        callbacks.append(SamplePreviews(make, columns, output_dir / "samples", every, show))
    callbacks.append(
        RunRecord(output_dir, {"precision": settings["precision"]}, latents.folder.key, saving.allow_changes, say)
    )
    trainer = build_trainer(
        settings,
        output_dir,
        callbacks,
        say,
        max_steps=max_steps,
        max_epochs=-1,
        check_val_every_n_epoch=max(1, epochs // 20),
    )
    check_resumable(resume_from, module)
    fit(trainer, module, latents, resume_from, say)

    folder = output_dir / "pipeline"
    if trainer.is_global_zero:
        save_model(load_pipeline(checkpoints / "last.ckpt"), folder)
        say(f"written: {folder}, {checkpoints}/, {output_dir / 'samples'}/")
    return folder
