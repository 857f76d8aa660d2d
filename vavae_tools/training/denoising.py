"""What all trainings of a denoiser share, once module and data are there: the plan, who looks on, and the Trainer."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from torch import Tensor, nn

from vavae_tools.checkpoints.resuming import check_resumable
from vavae_tools.data.order import OrderedDataModule
from vavae_tools.training.checkpoints import checkpoint_callbacks
from vavae_tools.training.devices import describe
from vavae_tools.training.diffusion_module import DiffusionModule
from vavae_tools.training.memory import EXPERIMENT, Names
from vavae_tools.training.previews import SamplePreviews
from vavae_tools.training.record import RunRecord
from vavae_tools.training.saving import Saving
from vavae_tools.training.trainer import build_trainer, fit


def length_of(training: dict[str, Any]) -> dict[str, int]:
    """How long an experiment's `training` goes on: max_steps where it says so, else num_epochs."""
    return {"max_steps": training["max_steps"]} if training["max_steps"] else {"max_epochs": training["num_epochs"]}


def train_denoiser(
    module: DiffusionModule,
    data: OrderedDataModule,
    output_dir: Path,
    make: Callable[[nn.ModuleDict], Any],
    columns: int,
    previews: int,
    *,
    data_key: str,
    devices: dict[str, Any],
    saving: Saving,
    best: str,
    compile: bool,
    say: Callable[[str], None],
    max_steps: int = -1,
    max_epochs: int = -1,
    resume_from: Path | None = None,
    noted: dict[str, float] | None = None,
    show: Callable[[Tensor], None] | None = None,
    callbacks: Sequence[L.Callback] = (),
    names: Names = EXPERIMENT,
    slicing: bool | None = None,
    preview: Callable[..., SamplePreviews] = SamplePreviews,
) -> L.Trainer:
    """Train, to the end or until it is stopped in good order.

    Args:
        make: the averaged network → pictures uint8 (N, 3, H, W), rows of `columns`, for the previews.
        previews: grids of them in all.
        data_key: fingerprint of the data; a run that goes on must have the same.
        devices: arguments of `devices.trainer_settings`.
        best: how the name of the best checkpoint begins.
        max_steps, max_epochs: the length, in one of them.
        noted: numbers known before training that its curves shall hold.
        callbacks: more that look on.
        names, slicing: see `trainer.fit`.
        preview: what `make` is given to.

    Returns:
        The Trainer; `checkpoints/last.ckpt` in `output_dir` holds what was trained.
    """
    settings = module.trainer_settings(**devices)
    processes, gathered = settings["devices"] * settings["num_nodes"], settings.get("accumulate_grad_batches", 1)
    count = len(data.train_data)
    global_batch = min(data.batch_size, count) * processes
    batches = max(1, data.batches_of(processes))
    epochs = max_epochs if max_epochs > 0 else -(-max_steps * gathered // batches)
    steps = max_steps if max_steps > 0 else -(-batches // gathered) * max_epochs
    weights = sum(weight.numel() for weight in module.network.parameters())
    say(
        f"Training a {type(module.network['denoiser']).__name__} of {weights / 1e6:,.1f} M weights on {count:,} "
        f"pictures: {steps:,} steps of {global_batch * gathered}, {epochs:,} epochs"
    )
    say(describe(settings, compile, data.batch_size, data.num_workers))

    checkpoints = output_dir / "checkpoints"
    validates = data.val_data is not None and len(data.val_data) > 0
    watching = checkpoint_callbacks(checkpoints, "val/loss" if validates else None, saving, best=best)
    if previews:
        every = max(1, epochs // previews)
        watching.append(preview(make, columns, output_dir / "samples", every, show))
    watching.append(RunRecord(output_dir, {"precision": settings["precision"]}, data_key, saving.allow_changes, say))
    length = {"max_steps": max_steps, "max_epochs": max_epochs, "check_val_every_n_epoch": max(1, epochs // 20)}
    trainer = build_trainer({**length, **settings}, output_dir, [*watching, *callbacks], say)
    if noted and trainer.is_global_zero:
        trainer.logger.log_metrics(noted, step=0)
    check_resumable(resume_from, module)
    fit(trainer, module, data, resume_from, say, names, slicing)
    return trainer
