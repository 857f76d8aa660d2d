"""What a run was: its settings, data, versions and command, in every checkpoint and in the run's folder."""

import json
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

from vavae_tools.runtime.console import say
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import write_json

NAME = "run.json"
PACKAGES = ("vavae_tools", "torch", "lightning", "diffusers", "transformers", "safetensors", "numpy")
FREE = ("vavae_config", "denoiser_config", "conditioner_config", "people", "gradient_checkpointing")
"""Hyper-parameters that a difference in is told elsewhere, or changes no number."""


class RunRecord(L.Callback):
    """Writes `run.json` where training starts, keeps the same in each checkpoint, and compares when it goes on.

    Args:
        folder: of the run.
        settings: plain values that the run follows from besides the module's hyper-parameters.
        data: fingerprint of the data.
        allow_changes: go on though settings or data differ from the checkpoint's; the differences are said.

    Raises:
        UserError: on going on with other settings or data, naming them.
    """

    def __init__(
        self,
        folder: str | Path,
        settings: dict[str, Any],
        data: str,
        allow_changes: bool = False,
        say: Callable[[str], None] = say,
    ) -> None:
        self.folder, self.settings, self.data = Path(folder), settings, data
        self.allow_changes, self.say = allow_changes, say

    def record(self, module: L.LightningModule) -> dict[str, Any]:
        """Plain values: settings, data, versions, machine, command."""
        settings = {**self.settings, **{k: v for k, v in module.hparams.items() if k not in FREE}}
        return {
            "settings": settings,
            "data": self.data,
            "versions": versions(),
            "machine": {"python": platform.python_version(), "device": str(module.device)},
            "command": list(sys.argv),
        }

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            write_json(self.folder / NAME, {**self.record(module), "started": _now()})

    def on_fit_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:  # not where it was stopped
        if trainer.is_global_zero:
            started = json.loads((self.folder / NAME).read_text(encoding="utf-8"))
            write_json(self.folder / NAME, {**started, "ended": _now(), "global_step": trainer.global_step})
        trainer.strategy.barrier()  # before another process asks `has_ended`

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self.record(module)

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        before = checkpoint.get("run")
        if before is None:  # from elsewhere
            return
        now = self.record(module)
        found = [
            f"{name} was {before['settings'].get(name)}, is {now['settings'].get(name)}"
            for name in {**before["settings"], **now["settings"]}
            if before["settings"].get(name) != now["settings"].get(name)
        ]
        if before["data"] != now["data"]:
            found.append("the data are others")
        if found and not self.allow_changes:
            raise UserError(
                f"The checkpoint is of a run with other settings: {'; '.join(found)}. Go on with those of that run, or "
                "with --allow_changes"
            )
        for difference in found:
            self.say(f"changed on going on: {difference}")
        changed = [
            f"{name} {before['versions'].get(name, '-')} → {now['versions'].get(name, '-')}"
            for name in now["versions"]
            if before["versions"].get(name) != now["versions"].get(name)
        ]
        if changed:
            self.say(f"other versions than the checkpoint's, so numbers may differ in their last digits: {changed}")


def has_ended(folder: str | Path) -> bool:
    """Whether the training in a run's folder came to its end, and was not stopped or killed before."""
    path = Path(folder) / NAME
    return path.is_file() and "ended" in json.loads(path.read_text(encoding="utf-8"))


def _now() -> str:
    return datetime.now().astimezone().isoformat(timespec="seconds")


@cache
def versions() -> dict[str, str]:
    """Of the packages whose version may change numbers, those that are installed."""
    found = {}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
