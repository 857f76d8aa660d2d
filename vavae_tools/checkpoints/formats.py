"""Checkpoints on the disk, folders and single files of any training: inside, every kind is Lightning's, a dict.

What was written here comes back bit by bit; from another's, training resumes after the finished epoch.
"""

import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any
from zipfile import ZipFile, is_zipfile

import torch
from torch import Tensor

from vavae_tools.checkpoints.foreign import LIVE, is_average, plain_name
from vavae_tools.runtime.errors import UserError, contents, join_first, one_line
from vavae_tools.runtime.files import (
    atomic_write,
    flush,
    free_bytes,
    read_checkpoint,
    read_json,
    read_saved,
    write_json,
)

AVERAGE = "ema."
"""Where a module's state_dict has the averaged weights, each under its name in the network."""
STATE = "training_state.json"
PARTS = {"optimizer": "optimizer_states", "scheduler": "lr_schedulers"}
"""Parts of a folder, and what Lightning calls them."""
ALL_PARTS = ("model", "ema_model", *PARTS, "trainer", "scaler")
FILES = (".ckpt", ".pth", ".pt")
NAMES = {
    "model": LIVE,
    "optimizer": ("optimizer", "optimizer_state_dict", "optimizer_states", "opt"),
    "scheduler": ("scheduler", "scheduler_state_dict", "lr_scheduler", "lr_schedulers"),
    "scaler": ("scaler", "scaler_state_dict"),
}
"""Parts of a checkpoint, and what single files of other trainings call them."""
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


# ---- reading
def read_any_format(path: str | Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Return Lightning's checkpoint from a `.ckpt`, a `.pth` or `.pt` of this or another training, or a folder.

    `log` gets a line for everything that is missing and starts anew.
    """
    path = Path(path)
    if path.is_dir():
        return read_folder(path, log)
    saved = read_checkpoint(path)
    if path.suffix == ".ckpt" or "pytorch-lightning_version" in saved:
        return saved
    if isinstance(saved.get("trainer"), dict) and "model" in saved:  # by `write_any_format`
        return _joined({part: saved[part] for part in ALL_PARTS if part in saved})
    parts = {part: saved[key] for part, keys in NAMES.items() for key in reversed(keys) if key in saved}
    if averages := [value for key, value in saved.items() if is_average(str(key)) and isinstance(value, dict)]:
        parts["ema_model"] = averages[0]
    if "model" not in parts and saved and all(isinstance(value, Tensor) for value in saved.values()):
        parts["model"] = saved
    if "model" not in parts:
        found = join_first(sorted(map(str, saved)), 5)
        raise UserError(f"{path} has no weights: it holds {found}, expected one of {', '.join(LIVE[:4])}")
    return _from_elsewhere(parts, saved, path, log)


def read_folder(folder: Path, log: Callable[[str], None]) -> dict[str, Any]:
    if not (folder / "model.pt").is_file():
        raise UserError(no_weights(folder))
    faults = damage_by_file(folder, quickly=True)
    for name, fault in faults.items():
        if fault != "missing":
            raise UserError(f"{folder} is damaged ({name}: {fault}): take another checkpoint")
    parts = {p: read_saved(folder / f"{p}.pt") for p in ALL_PARTS if (folder / f"{p}.pt").is_file()}
    if "trainer" in parts:
        lost = [name.removesuffix(".pt") for name in faults]
        for part in lost:
            log(f"{folder} has no {part}.pt: {MISSING_PART_NOTES.get(part, 'it starts anew')}")
        return _joined(parts, lost)
    if "trainer.pt" in faults:
        log(f"{folder} has no trainer.pt: the place in the epoch is lost, and the next epoch begins")
    return _from_elsewhere(parts, read_state(folder), folder, log)


def read_state(folder: Path) -> dict[str, Any]:
    """Return `training_state.json`, or {} where there is none."""
    return read_json(folder / STATE) if (folder / STATE).is_file() else {}


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint, also one that `read_any_format` refuses, and not a run's folder."""
    return is_deepspeed(folder) or any((folder / name).is_file() for name in ("model.pt", "checkpoint.pt"))


def is_deepspeed(folder: Path) -> bool:
    """Return whether Lightning's DeepSpeed strategy has written this folder, which it alone resumes from."""
    return (folder / "checkpoint" / "mp_rank_00_model_states.pt").is_file()


def no_weights(folder: Path) -> str:
    """Return the line to say of a folder that cannot be read as a checkpoint."""
    if (folder / "checkpoint.pt").is_file():
        command = f"python -m vavae_tools.checkpoints consolidate {folder}"
        return f"{folder} holds parts of several processes: make one file of it with the older version ({command})"
    if is_deepspeed(folder):
        convert = "lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict"
        return f"{folder} was written by DeepSpeed: resume from it with --strategy deepspeed_stage_2, or use {convert}"
    return f"{folder} is no checkpoint: it {contents(folder)}, expected model.pt"


# ---- writing
def write_any_format(checkpoint: dict[str, Any], path: str | Path) -> Path:
    """Write Lightning's checkpoint as what the name says: a `.ckpt`, a single `.pth` or `.pt`, else a folder.

    A `.pth` has a folder's parts as its keys. What `last.ckpt` was before becomes `previous.ckpt`.
    """
    path = Path(path)
    if path.suffix not in FILES:
        return write_folder(checkpoint, path)
    if path.suffix != ".ckpt":
        place = {name: checkpoint.get(name, 0) for name in ("epoch", "global_step")}
        checkpoint = {**_split(checkpoint), **place}
    try:
        with atomic_write(path) as partial:
            torch.save(checkpoint, partial)
            if path.name == "last.ckpt" and path.is_file():
                previous = path.with_name("previous.ckpt")
                with suppress(OSError):  # a file system without links goes without
                    previous.unlink(missing_ok=True)
                    os.link(path, previous)
    except (OSError, RuntimeError) as error:
        raise _not_written(path, error) from None
    return path


def write_folder(checkpoint: dict[str, Any], folder: str | Path) -> Path:
    """Write Lightning's checkpoint as a folder that is whole under its name, or leave what was there.

    `model.pt` and `ema_model.pt` have the weights under the same names, `optimizer.pt` and `scheduler.pt` lists of
    state_dicts, `trainer.pt` all the rest; `training_state.json` lists every file's length.
    """
    folder = Path(folder)
    if folder.exists() and not is_checkpoint(folder):
        raise UserError(f"{folder} exists and is no checkpoint (no model.pt): name another folder")
    partial, former = _hidden(folder), _hidden(folder, ".former")
    state = {"global_step": checkpoint.get("global_step", 0), "current_epoch": checkpoint.get("epoch", 0), "files": {}}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for part, value in _split(checkpoint).items():
            path = partial / f"{part}.pt"
            torch.save(value, path)
            state["files"][path.name] = {"bytes": path.stat().st_size}
        write_json(partial / STATE, state)
        flush(*partial.iterdir(), partial)
        if folder.exists():  # by a run that resumed from an earlier checkpoint, which stays through a kill here
            folder.rename(former)
        partial.rename(folder)
        flush(folder.parent)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where the disk is full
        raise _not_written(folder, error) from None
    finally:
        for left_over in (partial, former):
            shutil.rmtree(left_over, ignore_errors=True)
    return folder


def _not_written(path: Path, error: Exception) -> UserError:
    free = free_bytes(path.parent) / 2**20
    help = "free some space, or choose a folder that is yours; a training resumes with --resume last"
    reason = f"({free:,.0f} MB free): {one_line(error, 200)}"
    return UserError(f"{path} could not be written {reason}. What was there is whole: {help}")


def _hidden(path: Path, what: str = "") -> Path:
    """Return a name beside `path` that `clear_left_overs` removes."""
    return path.with_name(f".{path.name}.{os.getpid()}{what}.partial")


def clear_left_overs(folder: Path) -> None:
    """Remove what a process that was killed left of checkpoints it was writing or removing, files and folders."""
    for left_over in folder.glob(".*.partial"):
        shutil.rmtree(left_over, ignore_errors=True) if left_over.is_dir() else left_over.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a checkpoint; half of one never stands under its name."""
    partial = _hidden(path)
    path.rename(partial)
    shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


def _split(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Return the parts that become files; what a part has no file of stays in "trainer"."""
    rest = dict(checkpoint)
    weights = rest.pop("state_dict")
    model = type(weights)((plain_name(k), v) for k, v in weights.items() if not k.startswith(AVERAGE))
    average = {plain_name(k.removeprefix(AVERAGE)): v for k, v in weights.items() if k.startswith(AVERAGE)}
    if len(model) + len(average) < len(weights):
        raise UserError("Two of the weights have the same name without _orig_mod. and module.: rename one of them")
    parts = {"model": model, **({"ema_model": average} if average else {})}
    for part, key in PARTS.items():
        if rest.get(key):
            parts[part] = rest.pop(key)
    return {**parts, "trainer": rest}


def _joined(parts: dict[str, Any], lost: Sequence[str] = ()) -> dict[str, Any]:
    """Return the reverse of `_split`; parts that are `lost` come back empty."""
    weights = parts["model"]
    weights.update({AVERAGE + name: tensor for name, tensor in parts.get("ema_model", {}).items()})
    checkpoint = {**parts["trainer"], "state_dict": weights}
    for part, key in PARTS.items():
        if part in parts or part in lost:
            checkpoint[key] = parts.get(part, [])
    return checkpoint


# ---- damage
def damage_by_file(path: Path, quickly: bool = False) -> dict[str, str]:
    """Return {name: what is wrong} of a checkpoint's file, or of those that its folder lists or has.

    Compared are lengths and, unless `quickly`, the CRC-32 of every record that torch.save wrote.
    """
    folder, listed = path.parent, {path.name: None}
    if is_deepspeed(path):  # which no one else can read
        return {}
    if path.is_dir():
        try:
            folder, listed = path, read_state(path).get("files")
        except UserError:
            return {STATE: "no JSON object"}
        if not isinstance(listed, dict):  # from elsewhere
            listed = dict.fromkeys(sorted(file.name for file in path.glob("*.pt")))
    faults = {name: _damage(folder / name, entry, quickly) for name, entry in listed.items()}
    return {name: fault for name, fault in faults.items() if fault}


def _damage(path: Path, entry: Any, quickly: bool) -> str | None:
    if not path.is_file():
        return "missing"
    size = path.stat().st_size
    expected = entry.get("bytes", size) if isinstance(entry, dict) else size
    if size != expected:
        return f"{size:,} bytes, expected {expected:,}"
    if quickly:
        return None
    try:
        read_saved(path)
        with ZipFile(path) if is_zipfile(path) else nullcontext() as records:
            record = records and records.testzip()
    except UserError as error:
        return reason_of(error, path)
    except Exception as error:  # of many classes where a file is damaged
        return f"cannot be read: {error}"
    return f"other contents than were written ({record})" if record else None


def reason_of(error: UserError, path: Path) -> str:
    """Return why a checkpoint cannot be read, without its name."""
    return str(error).removeprefix(f"{path} ").removeprefix("is damaged or no checkpoint").strip(" :()")


# ---- of other trainings
def place_in(state: dict[str, Any]) -> dict[str, int]:
    """Return `epoch` and `global_step` as far as a training's plain values tell them, under their several names."""
    names = {"epoch": ("current_epoch", "epoch"), "global_step": ("global_step", "step")}
    found = {own: state[name] for own, known in names.items() for name in reversed(known) if name in state}
    return {name: int(value) for name, value in found.items() if isinstance(value, (int, float, Tensor))}


def place_in_name(path: Path) -> dict[str, int]:
    """Return what a name tells; "checkpoint-epoch-50" counts the finished epochs, whose last has number 49.

    >>> place_in_name(Path("checkpoint_epoch_50.pth")), place_in_name(Path("checkpoint-5000"))
    ({'epoch': 49}, {'global_step': 5000})
    """
    patterns = {"epoch": r"epoch[-_=]?(\d+)", "global_step": r"(?:step[-_=]?|checkpoint[-_])(\d+)(?:\.\w+)?$"}
    place = {name: int(found[1]) for name, p in patterns.items() if (found := re.search(p, path.name))}
    if re.match("checkpoint[-_]epoch", path.name) and place.get("epoch"):
        place["epoch"] -= 1
    return place


def _from_elsewhere(
    parts: dict[str, Any], state: dict[str, Any], where: Path, log: Callable[[str], None]
) -> dict[str, Any]:
    """Return what Lightning resumes from, at the beginning of an epoch, of parts that another training wrote."""
    ending = ".pt" if where.is_dir() else ""
    place = {**place_in_name(where), **place_in(state)}
    if "epoch" not in place_in(state):
        taken = f"epoch {place['epoch']} is taken from its name" if "epoch" in place else "starting at epoch 0"
        log(f"{where} {f'has no {STATE}' if ending and not state else 'names no epoch'}: {taken}")
    model = _weights_in(parts["model"])
    if not model:
        raise UserError(f"{where} has no weights: its model{ending} holds no tensors by name")
    average = _weights_in(parts.get("ema_model"))
    # a scheduler of another kind, without lr_lambdas, a LambdaLR cannot take up
    needed = {"optimizer": "state", "scheduler": "lr_lambdas"}
    states = {part: _states_in(parts.get(part), key) for part, key in needed.items()}
    for part, found in {**states, "ema_model": average}.items():
        if not found:
            has = "cannot be used here" if part in parts else "is not there"
            log(f"{where}: {part}{ending} {has}: {MISSING_PART_NOTES[part]}")
    epoch = place.get("epoch", -1) + 1
    of_weights = [weights for first in states["optimizer"][:1] for weights in first["state"].values()]
    counted = max((int(weights["step"]) for weights in of_weights if "step" in weights), default=0)
    step = place.get("global_step", counted)
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


def _weights_in(part: Any) -> dict[str, Tensor]:
    """Return the weights by their plain names, also out of a dict around them."""
    if not isinstance(part, dict):
        return {}
    for key, value in part.items():
        if isinstance(value, dict) and (key in LIVE or is_average(key)):
            return _weights_in(value)
    return {plain_name(k): v for k, v in part.items() if isinstance(v, Tensor) and k != "n_averaged"}


def _states_in(part: Any, key: str) -> list[dict[str, Any]]:
    """Return state_dicts of optimisers or schedulers, given one or a list; none where one lacks this key."""
    found = part if isinstance(part, list) else [part]
    return found if all(isinstance(state, dict) and key in state for state in found) else []


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
