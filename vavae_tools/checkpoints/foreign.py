"""Checkpoints that another training wrote → what Lightning resumes from, at the beginning of an epoch."""

import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor

from vavae_tools.runtime.errors import UserError, join_first

AVERAGE = "ema."
"""Where a module's state_dict has the averaged weights, each under its name in the network."""
NAMES = {
    "model": ("model", "model_state_dict", "state_dict", "net"),
    "optimizer": ("optimizer", "optimizer_state_dict", "optimizer_states", "opt"),
    "scheduler": ("scheduler", "scheduler_state_dict", "lr_scheduler", "lr_schedulers"),
    "ema_model": ("ema_model", "ema", "ema_state_dict", "ema_model_state_dict", "model_ema"),
    "scaler": ("scaler", "scaler_state_dict"),
}
"""Parts of a checkpoint, and what single files call them."""
MISSING_PART_NOTES = {
    "optimizer": "the optimiser starts anew",
    "scheduler": "the learning rate's schedule starts anew",
    "ema_model": "the average of the weights, where there is one, starts anew from them",
}
DATA_MODULES = (
    *("ImageDataModule", "ImageSetDataModule", "PictureDataModule", "PictureSetDataModule", "LatentDataModule"),
    *("CaptionedDataModule", "TextLatentDataModule", "TokenImageDataModule"),
)
"""Under whose names Lightning looks for the place in the data."""


def place_in(state: dict[str, Any]) -> dict[str, int]:
    """Return `epoch` and `global_step` as far as a training's plain values tell them, under their several names."""
    names = {"epoch": ("current_epoch", "epoch"), "global_step": ("global_step", "step")}
    found = {own: state[name] for own, known in names.items() for name in reversed(known) if name in state}
    return {name: int(value) for name, value in found.items() if isinstance(value, (int, float, Tensor))}


def place_in_name(path: Path) -> dict[str, int]:
    """Return what a name tells.

    >>> place_in_name(Path("checkpoint-epoch-118")), place_in_name(Path("checkpoint-5000"))
    ({'epoch': 118}, {'global_step': 5000})
    >>> place_in_name(Path("checkpoint_epoch_50.pth")), place_in_name(Path("weights"))
    ({'epoch': 50}, {})
    """
    patterns = {"epoch": r"epoch[-_=]?(\d+)", "global_step": r"(?:step[-_=]?|checkpoint[-_])(\d+)(?:\.\w+)?$"}
    return {name: int(found[1]) for name, p in patterns.items() if (found := re.search(p, path.name))}


def plain_name(name: str) -> str:
    """Return a weight's name without what `torch.compile` and DataParallel put before it.

    >>> plain_name("module._orig_mod.network._orig_mod.pos")
    'network.pos'
    """
    name = name.replace("_orig_mod.", "")
    while name.startswith("module."):
        name = name.removeprefix("module.")
    return name


def from_name(path: Path) -> str:
    epoch = place_in_name(path).get("epoch")
    return "starting at epoch 0" if epoch is None else f"epoch {epoch} is taken from its name"


def from_elsewhere(
    parts: dict[str, Any], place: dict[str, int], where: Path, ending: str, log: Callable[[str], None]
) -> dict[str, Any]:
    """Return what Lightning resumes from, at the beginning of an epoch, of parts that another training wrote."""
    model = _weights_in(parts["model"])
    if model is None:
        raise UserError(f"{where} has no weights: its model{ending} holds no tensors by name")
    average = _weights_in(parts.get("ema_model")) or {}
    # a scheduler of another kind, without lr_lambdas, a LambdaLR cannot take up
    needed = {"optimizer": "state", "scheduler": "lr_lambdas"}
    states = {part: _states_in(parts.get(part), key) for part, key in needed.items()}
    for part, found in {**states, "ema_model": average}.items():
        if not found:
            has = "cannot be used here" if part in parts else "is not there"
            log(f"{where}: {part}{ending} {has}: {MISSING_PART_NOTES[part]}")
    epoch = place["epoch"] + 1 if "epoch" in place else 0
    step = place.get("global_step", _steps_of(states["optimizer"]))
    checkpoint = {
        "epoch": epoch,
        "global_step": step,
        "pytorch-lightning_version": version("lightning"),
        "state_dict": {**model, **{AVERAGE + name: tensor for name, tensor in average.items()}},
        "loops": {"fit_loop": _loops(epoch, step)},
        "optimizer_states": states["optimizer"],
        "lr_schedulers": states["scheduler"],
        **{name: {"epoch": epoch, "batches_done": 0} for name in DATA_MODULES},
    }
    if parts.get("scaler"):
        checkpoint["MixedPrecision"] = parts["scaler"]
    return checkpoint


def _weights_in(part: Any) -> dict[str, Tensor] | None:
    """Return the weights by their plain names, also out of a dict around them; None where there are none."""
    if not isinstance(part, dict):
        return None
    for key in NAMES["model"]:
        if isinstance(part.get(key), dict):
            return _weights_in(part[key])
    weights = {plain_name(k): v for k, v in part.items() if isinstance(v, Tensor) and k != "n_averaged"}
    return weights or None


def _states_in(part: Any, key: str) -> list[dict[str, Any]]:
    """Return state_dicts of optimisers or schedulers, given one or a list; none where one lacks this key."""
    found = part if isinstance(part, list) else [part]
    return found if all(isinstance(state, dict) and key in state for state in found) else []


def _steps_of(optimizers: list[dict[str, Any]]) -> int:
    """Return the optimiser steps made, as the first optimiser counted them."""
    states = optimizers[0]["state"].values() if optimizers else []
    return max((int(state["step"]) for state in states if "step" in state), default=0)


def _loops(epoch: int, step: int) -> dict[str, Any]:
    """Return Lightning's progress at the beginning of `epoch`; what is left out of it starts at zero."""
    begun = dict.fromkeys(("ready", "started", "processed", "completed"), epoch)
    made = {"ready": step, "completed": step}
    steps = {"total": made, "current": {"ready": 0, "completed": 0}}
    none = dict.fromkeys(("ready", "started", "completed"), 0)
    automatic = {"optimizer": {"step": steps, "zero_grad": {"total": none, "current": none}}}
    return {
        "epoch_progress": {"total": begun, "current": begun},
        "epoch_loop.state_dict": {"_batches_that_stepped": step},
        "epoch_loop.automatic_optimization.optim_progress": automatic,
        "epoch_loop.manual_optimization.optim_step_progress": steps,  # with two optimisers
    }


def contents(folder: Path) -> str:
    """Return what to say of a folder where something is missing: "holds a, b", "is empty", "is not there"."""
    names = [path.name for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []
    return f"holds {join_first(sorted(names), 5)}" if names else "is empty" if folder.is_dir() else "is not there"
