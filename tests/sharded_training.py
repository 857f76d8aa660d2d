"""Trainings of a tiny DiT, one after the other, as one of several processes: `torchrun … sharded_training.py JOBS`."""

import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path

import lightning as L
import torch
from tiny import tiny_dit, tiny_pipeline
from torch import Tensor, nn

from vavae_tools.checkpoints.resuming import resume_path
from vavae_tools.data.latents import LatentDataModule
from vavae_tools.pipelines.classes import LatentDiTPipeline
from vavae_tools.runtime import ranks
from vavae_tools.runtime.errors import run_command
from vavae_tools.training.callbacks.checkpointing import checkpoint_callbacks
from vavae_tools.training.callbacks.previews import SamplePreviews
from vavae_tools.training.config import SaveConfig
from vavae_tools.training.denoiser_module import DiffusionModule
from vavae_tools.training.devices import quiet_lightning
from vavae_tools.training.run import build_trainer, fit_trainer


class Stop(L.Callback):
    """A signal to one process before a step."""

    def __init__(self, step: int, rank: int) -> None:
        self.step, self.rank = step, rank

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if (trainer.global_step, trainer.global_rank) == (self.step, self.rank):
            os.kill(os.getpid(), signal.SIGTERM)


def make(network: nn.ModuleDict) -> Tensor:
    """Two guided samples."""
    whole = tiny_pipeline()
    pipe = LatentDiTPipeline(whole.vae, network["denoiser"], network["conditioner"], whole.scheduler, whole.people)
    pipe.set_progress_bar_config(disable=True)
    people, noise = ["ID_1", "ID_2"], pipe.noise(0, torch.arange(2))
    return pipe(people, 2, 2.0, latents=noise, output_type="pt").images


def fail(network: nn.ModuleDict) -> Tensor:
    """Two forward passes that end in the middle, with whole weights."""
    with suppress(TypeError):
        network["conditioner"](None)
    return network["denoiser"](None, None, None)


def fail_at_once(network: nn.ModuleDict) -> Tensor:
    raise MemoryError("too little")


def train(
    run, latents, resume=None, batch_size=4, checkpointing=False, stop=None, saving=None, failing=False, **devices
):
    L.seed_everything(0, verbose=False)
    quiet_lightning()
    denoiser, conditioner = tiny_dit(depth=2)
    if checkpointing:
        denoiser.enable_gradient_checkpointing()
    module = DiffusionModule(denoiser, conditioner, lr=1e-2, ema_decay=0.9, warmup_steps=2)
    data = LatentDataModule(latents, batch_size, 0, seed=0)
    settings = module.trainer_settings(accelerator="cpu", **devices)
    saving = SaveConfig(**{"save_every_minutes": 99, **(saving or {})})
    ranks.PATIENCE = 2.0
    alone = failing == os.environ.get("RANK")
    previews = SamplePreviews(
        fail_at_once if alone else fail if failing is True else make, 2, Path(run) / "samples", range(9)
    )
    saves = checkpoint_callbacks(Path(run) / "checkpoints", "val/loss", saving)
    callbacks = [*([Stop(*stop)] if stop else []), previews, *saves]
    trainer = build_trainer(settings, Path(run), callbacks, print, max_steps=8, max_epochs=-1)
    resume_from = resume_path(resume, Path(run) / "checkpoints")
    fit_trainer(trainer, module, data, resume_from, print)


if __name__ == "__main__":
    run_command(lambda: [train(**job) for job in json.loads(sys.argv[1])])
