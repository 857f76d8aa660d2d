"""What a run was: its settings, data, versions and command, in every checkpoint and in the run's folder."""

import platform
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lightning as L

from vavae_tools.checkpoints.formats import is_deepspeed, read_any_format
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import read_json, write_json

NAME = "run.json"
PACKAGES = ("vavae_tools", "torch", "lightning", "diffusers", "transformers", "safetensors", "numpy")
UNCOMPARED_SETTINGS = (
    "vavae_config",
    "denoiser_config",
    "conditioner_config",
    "people",
    "gradient_checkpointing",
    "started_from",
)
"""Hyper-parameters that a difference in is told elsewhere, or changes no number."""

NOT_ALWAYS_RECORDED = ("accumulate_grad_batches", "gradient_clip")
_OTHER_DATA = "the data are others"


def checkpoint_in(path: Path | None) -> dict[str, Any]:
    """Return what a checkpoint holds; nothing where there is none, or DeepSpeed's, which its strategy reads."""
    return {} if path is None or is_deepspeed(path) else read_any_format(path, lambda line: None)


def check_data(resume_from: Path | None, allow_changes: bool, key: str) -> None:
    """Raise as `RunRecord` will where a checkpoint's run has other data than those of `key`."""
    run = checkpoint_in(resume_from).get("run")
    if run is not None and run["data"] != key and not allow_changes:
        raise _of_other_settings([_OTHER_DATA])


def _of_other_settings(found: list[str]) -> UserError:
    help = "Go on with those of that run, or with --allow_changes"
    return UserError(f"The checkpoint is of a run with other settings: {'; '.join(found)}. {help}")


class RunRecord(L.Callback):
    """Write `run.json` where training starts, keep the same in each checkpoint, and compare it on resuming.

    A run follows from `settings`, the module's hyper-parameters and the fingerprint `data`: others than the
    checkpoint's are refused, or with `allow_changes` logged.
    """

    def __init__(
        self, folder: str | Path, settings: dict[str, Any], data: str, allow_changes: bool, log: Callable[[str], None]
    ) -> None:
        self.folder, self.settings, self.data = Path(folder), settings, data
        self.allow_changes, self.log_line = allow_changes, log

    def record(self, module: L.LightningModule) -> dict[str, Any]:
        own = {name: value for name, value in module.hparams.items() if name not in UNCOMPARED_SETTINGS}
        machine = {"python": platform.python_version(), "device": str(module.device)}
        follows = {"settings": {**self.settings, **own}, "data": self.data}
        return {**follows, "versions": versions(), "machine": machine, "command": list(sys.argv)}

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:  # a refused one changes nothing
        if trainer.is_global_zero:
            write_json(self.folder / NAME, {**self.record(module), "started": _now()})

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:  # not where it was stopped
        if trainer.is_global_zero and (path := self.folder / NAME).is_file():
            write_json(path, {**read_json(path), "ended": _now(), "global_step": trainer.global_step})
        trainer.strategy.barrier()  # before another process asks `is_finished`

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self.record(module)

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        before = checkpoint.get("run")
        if before is None:  # from elsewhere
            return
        now = self.record(module)
        then = {name: now["settings"][name] for name in NOT_ALWAYS_RECORDED} | before["settings"]
        found = [f"{name} was {old}, is {new}" for name, old, new in _differences(then, now["settings"])]
        if before["data"] != now["data"]:
            found.append(_OTHER_DATA)
        if found and not self.allow_changes:
            raise _of_other_settings(found)
        for difference in found:
            self.log_line(f"changed on going on: {difference}")
        pairs = _differences(before["versions"], now["versions"])
        changed = [f"{name} {old or '-'} → {new or '-'}" for name, old, new in pairs]
        if changed:
            self.log_line(f"other versions than the checkpoint's: numbers may differ in their last digits: {changed}")


def _differences(then: dict[str, Any], now: dict[str, Any], of: str = "") -> list[tuple[str, Any, Any]]:
    found = []
    for name in {**then, **now}:
        old, new = then.get(name), now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            found += _differences(old, new, f"{of}{name}.")
        elif old != new:
            found.append((of + name, old, new))
    return found


def is_finished(folder: str | Path) -> bool:
    """Return whether the training in a run's folder came to its end, and was not stopped or killed before."""
    path = Path(folder) / NAME
    return path.is_file() and "ended" in read_json(path)


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


@cache
def versions() -> dict[str, str]:
    """Return the versions of the packages that may change numbers."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
