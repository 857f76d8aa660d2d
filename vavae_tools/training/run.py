"""One way to train anything: what a recipe has built, on the devices of this machine, with what looks on."""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import EarlyStopping, LambdaCallback
from lightning.pytorch.loggers import CSVLogger, Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn

from vavae_tools.checkpoints.formats import read_any_format, remove
from vavae_tools.checkpoints.resuming import (
    check_export,
    check_resumable,
    exported_checkpoint,
    former_run,
    resume_path,
)
from vavae_tools.data.loader import OrderedDataModule, loader_faults
from vavae_tools.runtime.console import log
from vavae_tools.runtime.errors import Stopped, UserError, check_known, disk_faults, in_home, one_line
from vavae_tools.runtime.files import alone_in
from vavae_tools.runtime.launch import call_on_ranks, several_processes
from vavae_tools.runtime.machine import keep_freed_memory, release_memory
from vavae_tools.runtime.ranks import is_rank_zero
from vavae_tools.training.callbacks.checkpointing import AtomicCheckpointIO, checkpoint_callbacks
from vavae_tools.training.callbacks.previews import preview_epochs
from vavae_tools.training.callbacks.progress import Progress, TrainLog, is_measured
from vavae_tools.training.callbacks.record import RunRecord, checkpoint_in
from vavae_tools.training.callbacks.throughput import Throughput
from vavae_tools.training.config import SaveConfig, TrainConfig
from vavae_tools.training.curves import LiveCurves, judge_export
from vavae_tools.training.devices import allow_tf32, describe, quiet_lightning, trainer_settings
from vavae_tools.training.memory import memory_faults

Log = Callable[[str], None]
Show = Callable[[Tensor], None]


@dataclass
class Run:
    """What one training trains, and what becomes of it."""

    module: L.LightningModule  # with `trainer_settings`
    data: OrderedDataModule
    fingerprint: str  # of the data; a run that resumes must have the same
    config: TrainConfig  # its batch size and length are given
    network: nn.Module  # what is trained, for the line that says so
    what: str  # it is called there, with an article
    export: Callable[[L.Trainer, Path], None]  # called by the first process; writes what the run was for
    folder: Path  # where it stands then
    preview: Callable[[Collection[int]], L.Callback] | None = None  # after which epochs → the callback
    monitor: tuple[str, str] = ("val/loss", "min")  # what the best checkpoint is chosen by, where anything validates
    best: str = "epoch="  # how the best checkpoint's name begins
    callbacks: Sequence[L.Callback] = ()
    recorded: Mapping[str, Any] = field(default_factory=dict)  # what else the run follows from, as plain values
    remarks: Sequence[str] = ()
    logged: Mapping[str, float] = field(default_factory=dict)  # numbers known before training, for the curves
    validations: int = 20  # in all, at most one an epoch
    saves_memory: Sequence[str] = ()  # settings that help where memory runs out, besides those of every training


Build = Callable[[Any, Path, Path | None, Show | None, Log], Run]  # of recipe, output_dir, resume_from, show, log


@disk_faults()
def train(
    build: Build, recipe: Any, output_dir: str | Path, resume: str | None = None, show: Show | None = None, log=log
) -> Path:
    """Train what `build` makes of a recipe, on as many processes as its devices ask for; return what it was for.

    A recipe is plain values, with a `TrainConfig` as `train` and a `seed`. `show` is called with each preview, uint8
    (3, H, W); by default a notebook's cell shows it.
    """
    devices = recipe.train.of_devices()
    trainer_settings(**devices)  # what cannot be is said before anything is started
    several = several_processes(**devices)
    arguments = {"build": build, "recipe": recipe, "output_dir": in_home(output_dir), "resume": resume}
    if several is not None:
        return call_on_ranks(f"{__name__}:_train_here", arguments, several, show=show)
    try:
        return _train_here(**arguments, show=show, log=log)
    finally:
        release_memory()  # a notebook's process lives on


def _train_here(
    build: Build, recipe: Any, output_dir: Path, resume: str | None, show: Show | None = None, log: Log = log
) -> Path:
    L.seed_everything(recipe.seed, verbose=False)
    quiet_lightning()
    with own_run(output_dir, resume, recipe.overwrite, log) as (resume_from, former):
        settings = {**trainer_settings(**recipe.train.of_devices()), "deterministic": None}  # which would hold at once
        _trainer(settings, output_dir, recipe.train.logger)  # what it does not take is said before anything is encoded
        check_export(output_dir, recipe.train.exported())
        run = build(recipe, output_dir, resume_from, show, log)
        return _train_built(run, output_dir, resume_from, former, log)


@contextmanager
def own_run(
    output_dir: Path, resume: str | None, overwrite: bool, log: Log
) -> Iterator[tuple[Path | None, list[Path]]]:
    """Keep others out of a run's folder; yield what it resumes from, and the checkpoints of one that it replaces."""
    with alone_in(output_dir) if is_rank_zero() else nullcontext():
        resume_from = resume_path(resume, output_dir / "checkpoints", log)
        yield resume_from, former_run(output_dir, resume_from, overwrite) if is_rank_zero() else []


def _removing(former: Sequence[Path]) -> L.Callback:
    return LambdaCallback(on_train_start=lambda *_: [remove(path) for path in former])


def written(made: Any, *beside: Path) -> str:
    """Return the line that says what a training has made, and which of the folders beside it hold anything."""
    return f"written: {', '.join([str(made), *(f'{folder}/' for folder in beside if any(folder.glob('*')))])}"


def _train_built(run: Run, output_dir: Path, resume_from: Path | None, former: list[Path], log: Log) -> Path:
    checkpoints, callbacks = output_dir / "checkpoints", []
    if former:  # what else would pass for this run's while that has made nothing
        made = run.folder.name, "samples/*-[0-9]*.png", "reconstructions/*-[0-9]*.png", "*/strip.png", "evaluation.json"
        callbacks.append(_removing([*former, *chain.from_iterable(map(output_dir.glob, made))]))
    config, data = run.config, run.data
    settings = run.module.trainer_settings(**config.of_devices())
    gathered = settings.get("accumulate_grad_batches", config.accumulate_grad_batches)
    processes = settings["devices"] * settings["num_nodes"]
    follows = {"precision": settings["precision"], "accumulate_grad_batches": gathered}
    recorded = {**follows, "gradient_clip": settings["gradient_clip_val"], **run.recorded}
    begun = None
    if checkpoint := checkpoint_in(resume_from):
        begun, kept = checkpoint.get("global_step"), data.keep_batch(checkpoint, processes)
        gathered *= kept
        if "accumulate_grad_batches" in settings:
            settings["accumulate_grad_batches"] = gathered
        else:
            run.module.accumulate_grad_batches = gathered
        if kept > 1:
            log(f"A step has as many images as before: {kept} batches are gathered where the run had one")
    count, batches, length = len(data.train_data), max(1, data.batches_of(processes)), config.length()
    steps, epochs = length["max_steps"], length["max_epochs"]
    if steps > 0:
        epochs = -(-steps * gathered // batches)
    else:
        steps = -(-batches // gathered) * epochs
    weights = sum(weight.numel() for weight in run.network.parameters())
    log(
        f"Training {run.what} of {weights / 1e6:,.1f} M weights on {count:,} images: {steps:,} steps of "
        f"{min(data.batch_size, count) * processes * gathered}, {epochs:,} epochs, lr {run.module.hparams.lr:g}"
    )
    machine = describe(settings, bool(config.compile), data.batch_size, data.num_workers)
    for line in (machine, *data.notes, *run.remarks):
        log(line)

    validates = bool(data.val_data)
    monitor, mode = run.monitor
    _check_validated(config, data)
    callbacks += checkpoint_callbacks(checkpoints, monitor if validates else None, config, mode, best=run.best)
    if config.early_stopping_patience:
        callbacks.append(EarlyEnd(monitor, mode, config.early_stopping_patience, log))
    if config.previews and run.preview is not None:
        callbacks.append(run.preview(preview_epochs(epochs, config.previews)))
    callbacks.append(RunRecord(output_dir, recorded, run.fingerprint, config.allow_changes, log))
    callbacks.append(TrainLog(output_dir, config.log_every_n_steps, log, machine))
    callbacks.append(LambdaCallback(on_load_checkpoint=lambda *given: data.read_progress(given[2])))
    length["check_val_every_n_epoch"] = max(1, epochs // run.validations)
    trainer = build_trainer(settings, output_dir, [*callbacks, *run.callbacks], log, config.logger, **length)
    if run.logged and trainer.is_global_zero:
        for logger in trainer.loggers:
            logger.log_metrics(dict(run.logged), step=0)
    fit_trainer(trainer, run.module, data, resume_from, log, run.saves_memory)
    if trainer.is_global_zero:
        if trainer.global_step == begun:
            done = f"{resume_from} is at step {begun:,} of {steps:,}"
            early = config.early_stopping_patience and begun < steps
            more = "a larger --early_stopping_patience" if early else "more --max_steps or --max_epochs"
            nothing = f"Nothing is left to train: {done}; take {more}"
            if not (checkpoints / "last.ckpt").exists():
                raise UserError(nothing)
            log(nothing)
        checkpoint = exported_checkpoint(output_dir, config.exported())
        run.export(trainer, checkpoint)
        log(judge_export(output_dir, run.folder, checkpoint, config.exported(), monitor))
    return run.folder


def check_early(
    module: L.LightningModule, config: TrainConfig, data: OrderedDataModule, resume_from: Path | None
) -> None:
    """Raise where training cannot resume or end as asked, before anything is encoded; `data` as it will be."""
    _check_validated(config, data)
    check_resumable(resume_from, module)
    if config.batch_size:  # else it is yet to be found
        settings, data = module.trainer_settings(**config.of_devices()), copy.copy(data)
        data.batch_size = config.batch_size
        data.keep_batch(checkpoint_in(resume_from), settings["devices"] * settings["num_nodes"])


def _check_validated(config: TrainConfig, data: OrderedDataModule) -> None:
    for name in ("early_stopping_patience", "sample_watch"):
        if getattr(config, name, 0) and not data.val_data:
            raise UserError(f"--{name} needs images that validate, such as data.val_share=0.05")


class EarlyEnd(EarlyStopping):
    def __init__(self, monitor: str, mode: str, patience: int, log: Log) -> None:
        super().__init__(monitor, mode=mode, patience=patience, check_on_train_epoch_end=False)
        self.log_line = log

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict({**state, "patience": self.patience})  # as this run asks for it

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.should_stop = trainer.should_stop or self.wait_count >= self.patience  # it has ended before

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if is_measured(trainer, self.monitor):
            super().on_validation_end(trainer, module)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self.wait_count >= self.patience:
            best = f"{self.monitor} was not better than {self.best_score:.4g} in {self.wait_count} validations"
            self.log_line(f"Ended early, after step {trainer.global_step:,}: {best} (--early_stopping_patience)")


_LOGGERS = {
    "tensorboard": TensorBoardLogger,
    "wandb": lambda folder: WandbLogger(folder.name, folder),
    "mlflow": lambda folder: MLFlowLogger(tracking_uri=f"file:{folder.absolute() / 'mlruns'}"),
}


def make_loggers(names: str | Sequence[str] | bool | None, output_dir: Path) -> list[Logger]:
    """Return Lightning's loggers by name, also as "a,b"; `metrics.csv` is always written, beside TensorBoard's."""
    chosen = names.replace(" ", "").split(",") if isinstance(names, str) else list(names or ())
    found: list[Logger] = []
    for name in map(str.lower, chosen):
        if name in ("csv", "none", "false", "no", "off", ""):
            continue
        check_known("logger", name, [*_LOGGERS, "csv", "none"])
        try:
            found.append(_LOGGERS[name](output_dir))
        except ModuleNotFoundError:
            raise UserError(f"logger={name} needs the package {name}: pip install {name}") from None
    version = next((logger.version for logger in found if isinstance(logger, TensorBoardLogger)), None)
    return [*found, CSVLogger(output_dir, version=version)]


def build_trainer(
    settings: dict[str, Any],
    output_dir: Path,
    callbacks: list[L.Callback],
    log: Log,
    logger: str | Sequence[str] | bool | None = "tensorboard",
    **length: int | None,
) -> L.Trainer:
    """Return a Trainer with `settings` (`devices.trainer_settings`) whose `length` is in max_epochs or max_steps."""
    if settings.get("accelerator") == "cpu":
        keep_freed_memory()
    allow_tf32(settings)
    # the first: a step ends before what others do
    every = [Throughput(log), *callbacks, Progress(log), LiveCurves(output_dir, log)]
    return _trainer({**length, **settings}, output_dir, logger, callbacks=every, plugins=[AtomicCheckpointIO(log)])


def _trainer(settings: dict[str, Any], output_dir: Path, logger: Any, **parts: Any) -> L.Trainer:
    loggers = make_loggers(logger, output_dir)
    try:
        return L.Trainer(**settings, **parts, default_root_dir=output_dir, logger=loggers, enable_progress_bar=False)
    except (MisconfigurationException, TypeError, ValueError) as error:  # such as of +trainer.limit_val_batches=2.5
        raise UserError(one_line(error, 300)) from None


def fit_trainer(
    trainer: L.Trainer,
    module: L.LightningModule,
    data: L.LightningDataModule,
    resume_from: Path | None,
    log: Log,
    saves_memory: Sequence[str] = (),
    prefix: str = "train.",
) -> None:
    """Train to the end, or until training is stopped in good order: then all is saved, and a line says how to resume.

    Where memory is too small, a line names smaller batches (`memory.memory_fault`).
    """
    check_resumable(resume_from, module)
    gathered = max(trainer.accumulate_grad_batches, getattr(module, "accumulate_grad_batches", 1))
    size = getattr(data, "batch_size", None)  # somebody's own data may have none
    grouped = dist.is_initialized()
    try:
        with memory_faults(size, gathered, module, saves_memory, prefix), loader_faults():
            trainer.fit(module, data, ckpt_path=resume_from, weights_only=True)
    except Stopped as stop:
        log(str(stop))
    except MisconfigurationException as error:  # such as a checkpoint that is further than this run's length
        raise UserError(str(error)) from None
    finally:
        trainer.strategy.checkpoint_io.teardown()  # the last one is on the disk; not every strategy sees to that
        torch.use_deterministic_algorithms(False)  # what Lightning has set is this training's, not the whole process's
    trainer.strategy.barrier()  # so that every process finds it there
    if not grouped and dist.is_initialized() and dist.get_world_size() == 1:  # strategy=ddp on one device
        dist.destroy_process_group()  # a notebook's process lives on


@disk_faults()
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
    saving: SaveConfig | None = None,
    show: Show | None = None,
    log: Log = log,
    overwrite: bool = False,
) -> Path:
    """Train any module on any data with the devices of this machine; return `last.ckpt`.

    On several devices there is a process for each; module, data and callbacks go there, and the trained weights come
    back into `module`. So CUDA may have been used before, and classes be defined in a cell.

    Args:
        data: an `OrderedDataModule` is cut over the devices, and resumed, exactly; any other by itself.
        output_dir: gets `checkpoints/` and `lightning_logs/`.
        devices: how many, "auto" for all, or a dict with arguments of `devices.trainer_settings`.
        monitor: the logged value whose lowest keeps `best-*.ckpt`.
        resume: "last", a `.ckpt` or a folder.
        show: called with each preview; see `train`.
        overwrite: replace the checkpoints of another run in `output_dir`.
    """
    output_dir, devices = in_home(output_dir), devices if isinstance(devices, dict) else {"devices": devices}
    several = several_processes(**devices)
    if several is not None:
        trainer_settings(**devices)  # what cannot be is said before anything is started
        module.cpu()  # or all processes would take it to one card
        what = {"module": module, "data": data, "output_dir": output_dir, "devices": devices, "monitor": monitor}
        how = {"max_steps": max_steps, "max_epochs": max_epochs, "resume": resume, "saving": saving}
        arguments = {**what, **how, "callbacks": list(callbacks), "overwrite": overwrite}
        last = call_on_ranks(f"{__name__}:fit", arguments, several, show=show)  # which finds itself one of several
        module.load_state_dict(read_any_format(last, lambda line: None)["state_dict"])
        return last
    quiet_lightning()
    settings = getattr(module, "trainer_settings", trainer_settings)(**devices)
    settings["use_distributed_sampler"] = not isinstance(data, OrderedDataModule)
    checkpoints = output_dir / "checkpoints"
    length = {"max_steps": max_steps, "max_epochs": -1 if max_epochs is None and max_steps > 0 else max_epochs}
    with own_run(output_dir, resume, overwrite, log) as (resume_from, former):
        saves = checkpoint_callbacks(checkpoints, monitor, saving)
        trainer = build_trainer(settings, output_dir, [*callbacks, _removing(former), *saves], log, **length)
        fit_trainer(trainer, module, data, resume_from, log, prefix="")
    return checkpoints / "last.ckpt"
