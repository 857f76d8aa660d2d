"""The Trainer as all trainings here use it: whole checkpoints, one progress bar, TensorBoard, throughput."""

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from vavae_tools.checkpoints.formats import read_any
from vavae_tools.checkpoints.resuming import check_resumable, resume_path
from vavae_tools.data.loader import OrderedDataModule, loader_faults
from vavae_tools.runtime.console import say
from vavae_tools.runtime.errors import Stopped, UserError
from vavae_tools.runtime.launch import call_on_ranks, several_processes
from vavae_tools.runtime.machine import keep_freed_memory, release_memory
from vavae_tools.training.callbacks.checkpointing import WholeCheckpointIO, checkpoint_callbacks
from vavae_tools.training.callbacks.previews import SamplePreviews
from vavae_tools.training.callbacks.progress import Progress
from vavae_tools.training.callbacks.record import RunRecord
from vavae_tools.training.callbacks.throughput import Throughput
from vavae_tools.training.config import Saving
from vavae_tools.training.denoiser_module import DiffusionModule
from vavae_tools.training.devices import allow_tf32, describe, quiet_lightning, trainer_settings
from vavae_tools.training.memory import EXPERIMENT, PYTHON, Names, memory_fault, memory_faults


def build_trainer(
    settings: dict[str, Any], output_dir: Path, callbacks: list[L.Callback], say: Callable[[str], None], **length: Any
) -> L.Trainer:
    """A Trainer with `settings` (`devices.trainer_settings`) whose `length` is in max_epochs or max_steps.

    It shows where training is and, at the end, how fast it went (`throughput`).

    Raises:
        UserError: settings that Lightning cannot use, such as a strategy whose package is missing.
    """
    if settings.get("accelerator") == "cpu":
        keep_freed_memory()
    allow_tf32(settings)
    try:
        return L.Trainer(
            **settings,
            **length,
            default_root_dir=output_dir,
            logger=TensorBoardLogger(output_dir),
            callbacks=[Throughput(say), *callbacks, Progress(say)],  # the first: a step ends before what others do
            plugins=[WholeCheckpointIO(say)],
            enable_progress_bar=False,
        )
    except MisconfigurationException as error:
        raise UserError(str(error)) from None


def fit_trainer(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: L.LightningDataModule,
    resume_from: Path | None,
    say: Callable[[str], None],
    names: Names = EXPERIMENT,
    slicing: bool | None = None,
) -> None:
    """Train to the end, or until training is stopped in good order: then it is said how to go on, and all is saved.

    Args:
        names: what the settings that save memory are called, for the line where it runs out.
        slicing: whether a VAE that stands beside the training takes one picture after the other; None: there is none.

    Raises:
        UserError: a checkpoint that this run cannot go on from, such as one that is further than its length; or memory
            that is too small, where `data` has a `batch_size` that can be smaller.
    """
    begun = trainer.global_step

    def line_for(error: BaseException) -> str | None:
        size = getattr(data, "batch_size", None)
        if size is None:  # somebody's own data
            return None
        gathered = max(trainer.accumulate_grad_batches, getattr(module, "accumulate_grad_batches", 1))
        stepped = trainer.global_step > begun
        return memory_fault(error, size, gathered, module=module, slicing=slicing, names=names, stepped=stepped)

    try:
        with memory_faults(line_for), loader_faults():
            trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)
    except Stopped as stop:
        say(str(stop))
    except MisconfigurationException as error:  # such as a checkpoint that is further than this run's length
        raise UserError(str(error)) from None
    finally:
        trainer.strategy.checkpoint_io.teardown()  # the last one is on the disk; not every strategy sees to that
        torch.use_deterministic_algorithms(False)  # what Lightning has set is this training's, not the whole process's
    trainer.strategy.barrier()  # so that every process finds it there


# ---- What all trainings of a denoiser share, once module and data are there: the plan, who looks on, and the Trainer


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
    fit_trainer(trainer, module, data, resume_from, say, names, slicing)
    return trainer


# ---- Trainings on all devices of a machine, wherever they are called from: a notebook's cell, a script, a command


Run = TypeVar("Run", bound=Callable[..., Path])


def on_all_devices(run: Run) -> Run:
    """Let `run` be called anywhere: where its `devices` ask for several processes it runs in each of them.

    `devices` holds the arguments of `devices.trainer_settings`; `say` stays behind, `show` is called here.
    """
    signature = inspect.signature(run)

    @functools.wraps(run)
    def call(*args: Any, **named: Any) -> Path:
        arguments = signature.bind(*args, **named).arguments
        devices = arguments.get("devices") or {}
        trainer_settings(**devices)  # what cannot be is said before anything is started
        several = several_processes(**devices)
        if several is None:
            try:
                return run(*args, **named)
            finally:
                release_memory()  # a notebook's process lives on
        changes = arguments.pop("changes", {})  # what **changes gathered goes on by name, too
        arguments = {**arguments, **changes}
        arguments.pop("say", None)
        show = arguments.pop("show", None)
        return call_on_ranks(f"{run.__module__}:{run.__name__}", arguments, *several, show=show)

    return call  # type: ignore[return-value]


def fit(
    module: L.LightningModule,
    data: L.LightningDataModule,
    output_dir: str | Path,
    max_steps: int = -1,
    max_epochs: int | None = None,
    devices: int | str | dict[str, Any] = "auto",
    callbacks: Sequence[L.Callback] = (),
    monitor: str | None = None,
    resume: str | None = None,
    saving: Saving | None = None,
    show: Callable[[Tensor], None] | None = None,
    say: Callable[[str], None] = say,
) -> Path:
    """Train any module on any data with the devices of this machine, from a notebook's cell or a script.

    On one device this process trains. On several there is a process for each; module, data and callbacks go there, and
    the trained weights come back into `module`. So CUDA may have been used before, and classes be defined in a cell.

    Args:
        data: an `OrderedDataModule` is cut over the devices, and gone on with, exactly; any other by itself.
        output_dir: gets `checkpoints/` and `lightning_logs/`.
        max_steps, max_epochs: the length, in one of them.
        devices: how many, "auto" for all there are, or the arguments of `devices.trainer_settings`, such as
            {"devices": 2, "precision": "16"}.
        monitor: the logged value whose lowest keeps `best-*.ckpt`.
        resume: "last", a `.ckpt` or a folder to go on from.
        saving: when checkpoints are written and training ends.
        show: called with each preview, uint8 (3, H, W); by default the cell shows it.

    Returns:
        `last.ckpt`; where training was stopped it holds how far it came.

    Raises:
        UserError: settings that cannot be, or a process that failed: what it said.
    """
    devices = devices if isinstance(devices, dict) else {"devices": devices}
    arguments = {
        "module": module,
        "data": data,
        "output_dir": Path(output_dir),
        "length": {"max_steps": max_steps, "max_epochs": -1 if max_epochs is None and max_steps > 0 else max_epochs},
        "devices": devices,
        "callbacks": list(callbacks),
        "monitor": monitor,
        "resume": resume,
        "saving": saving,
    }
    trainer_settings(**devices)  # what cannot be is said before anything is started
    several = several_processes(**devices)
    if several is None:
        return _fit_here(**arguments, say=say)
    module.cpu()  # or all processes would take it to one card
    last = call_on_ranks(f"{__name__}:_fit_here", arguments, *several, show=show)
    module.load_state_dict(read_any(last, lambda line: None)["state_dict"])
    return last


def _fit_here(
    module: L.LightningModule,
    data: L.LightningDataModule,
    output_dir: Path,
    length: dict[str, Any],
    devices: dict[str, Any],
    callbacks: list[L.Callback],
    monitor: str | None,
    resume: str | None,
    saving: Saving | None,
    say: Callable[[str], None] = say,
) -> Path:
    quiet_lightning()
    of_module = getattr(module, "trainer_settings", trainer_settings)
    settings = of_module(**devices)
    settings["use_distributed_sampler"] = not isinstance(data, OrderedDataModule)
    checkpoints = output_dir / "checkpoints"
    resume_from = resume_path(resume, checkpoints, say)
    saves = checkpoint_callbacks(checkpoints, monitor, saving)
    trainer = build_trainer(settings, output_dir, [*callbacks, *saves], say, **length)
    check_resumable(resume_from, module)
    fit_trainer(trainer, module, data, resume_from, say, PYTHON)
    return checkpoints / "last.ckpt"
