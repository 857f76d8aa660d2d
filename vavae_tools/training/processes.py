"""Trainings on all devices of a machine, wherever they are called from: a notebook's cell, a script, a command."""

import functools
import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
from torch import Tensor

from vavae_tools.checkpoints.folders import read_any
from vavae_tools.checkpoints.resuming import check_resumable, resume_path
from vavae_tools.data.order import OrderedDataModule
from vavae_tools.launch import call_on_ranks, several_processes
from vavae_tools.machine import release_memory
from vavae_tools.training import trainer as training
from vavae_tools.training.checkpoints import checkpoint_callbacks
from vavae_tools.training.devices import quiet_lightning, trainer_settings
from vavae_tools.training.memory import PYTHON
from vavae_tools.training.progress import say
from vavae_tools.training.saving import Saving

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
    trainer = training.build_trainer(settings, output_dir, [*callbacks, *saves], say, **length)
    check_resumable(resume_from, module)
    training.fit(trainer, module, data, resume_from, say, PYTHON)
    return checkpoints / "last.ckpt"
