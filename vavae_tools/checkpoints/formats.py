"""Checkpoints on the disk: folders, `checkpoint-epoch-118/` and `checkpoint-5000/`, and single files of any training.

Inside, every kind is Lightning's checkpoint, a dict. A folder that was written here holds all of it, so that it comes
back bit by bit; from one that was not, training resumes at the beginning of the epoch after the finished one.
"""

import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from torch import Tensor

from vavae_tools.checkpoints.foreign import (
    AVERAGE,
    MISSING_PART_NOTES,
    NAMES,
    contents,
    from_elsewhere,
    from_name,
    place_in,
    place_in_name,
    plain_name,
)
from vavae_tools.runtime.errors import UserError, join_first, one_line
from vavae_tools.runtime.files import atomic_write, flush_folder, read_checkpoint, read_saved

STATE = "training_state.json"
PARTS = {"optimizer": "optimizer_states", "scheduler": "lr_schedulers"}
"""Parts of a folder, and what Lightning calls them."""
FILES = (".ckpt", ".pth", ".pt")
_PARTS = ("model", "ema_model", *PARTS, "trainer", "scaler")


# ---- folders
def write_folder(checkpoint: dict[str, Any], folder: str | Path) -> Path:
    """Write Lightning's checkpoint as a folder that is whole under its name, or leave what was there.

    `model.pt` and `ema_model.pt` have the weights under the same names, `optimizer.pt` and `scheduler.pt` lists of
    state_dicts, `trainer.pt` all the rest; `training_state.json` lists every file's length.
    """
    folder = Path(folder)
    if folder.exists() and not is_checkpoint(folder):
        raise UserError(f"{folder} exists and is no checkpoint (no model.pt): name another folder")
    partial, former = _hidden(folder), _hidden(folder, "former")
    state = {"global_step": checkpoint.get("global_step", 0), "current_epoch": checkpoint.get("epoch", 0), "files": {}}
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        for part, value in _split(checkpoint).items():
            path = partial / f"{part}.pt"
            torch.save(value, path)
            state["files"][path.name] = {"bytes": path.stat().st_size}
        (partial / STATE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
        for path in partial.iterdir():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        flush_folder(partial)
        if folder.exists():  # by a run that resumed from an earlier checkpoint, which stays through a kill here
            folder.rename(former)
        partial.rename(folder)
        flush_folder(folder.parent)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError where the disk is full
        raise not_written(folder, error) from None
    finally:
        for left_over in (partial, former):
            shutil.rmtree(left_over, ignore_errors=True)
    return folder


def _hidden(path: Path, what: str = "") -> Path:
    """Return a name beside `path` that `clear_left_overs` removes."""
    return path.with_name(f".{path.name}.{os.getpid()}{what and f'.{what}'}.partial")


def is_checkpoint(folder: Path) -> bool:
    """Return whether a folder is a checkpoint, also one that `read_any_format` refuses, and not a run's folder."""
    return is_deepspeed(folder) or any((folder / name).is_file() for name in ("model.pt", "checkpoint.pt"))


def is_deepspeed(folder: Path) -> bool:
    """Return whether Lightning's DeepSpeed strategy has written this folder, which it alone resumes from."""
    return (folder / "checkpoint" / "mp_rank_00_model_states.pt").is_file()


def read_folder(folder: str | Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Return Lightning's checkpoint from a folder; `log` gets a line for everything that is missing and starts anew."""
    folder = Path(folder)
    if not (folder / "model.pt").is_file():
        raise UserError(no_weights(folder))
    faults = damage_by_file(folder, quickly=True)
    for name, fault in faults.items():
        if fault != "missing":
            raise UserError(f"{folder} is damaged ({name}: {fault}): take another checkpoint")
    parts = {p: read_saved(folder / f"{p}.pt") for p in _PARTS if (folder / f"{p}.pt").is_file()}
    state = read_state(folder)
    if "trainer" in parts:
        lost = [name.removesuffix(".pt") for name in faults]
        for part in lost:
            log(f"{folder} has no {part}.pt: {MISSING_PART_NOTES.get(part, 'it starts anew')}")
        return _joined(parts, lost)
    if "trainer.pt" in faults:
        log(f"{folder} has no trainer.pt: the place in the epoch is lost, and the next epoch begins")
    if not state:
        log(f"{folder} has no {STATE}: {from_name(folder)}")
    return from_elsewhere(parts, {**place_in_name(folder), **place_in(state)}, folder, ".pt", log)


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


def no_weights(folder: Path) -> str:
    """Return the line to say of a folder that cannot be read as a checkpoint."""
    if (folder / "checkpoint.pt").is_file():
        return (
            f"{folder} holds the parts of several processes, as an older version wrote them: make one file of it with "
            f"that version (python -m vavae_tools.checkpoints consolidate {folder})"
        )
    if is_deepspeed(folder):
        return (
            f"{folder} was written by DeepSpeed: resume from it with --strategy deepspeed, or make a file of its "
            "weights by lightning.pytorch.utilities.deepspeed.convert_zero_checkpoint_to_fp32_state_dict"
        )
    return f"{folder} is no checkpoint: it {contents(folder)}, expected model.pt"


def read_state(folder: Path) -> dict[str, Any]:
    """Return `training_state.json`, or {} where there is none."""
    path = folder / STATE
    if not path.is_file():
        return {}
    with suppress(ValueError):
        state = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(state, dict):
            return state
    raise UserError(
        f"{path} is damaged: it is no JSON object. Mend it, or remove it: then the epoch is taken from the name"
    )


# ---- files
def read_any_format(path: str | Path, log: Callable[[str], None]) -> dict[str, Any]:
    """Return Lightning's checkpoint from a `.ckpt`, a `.pth` or `.pt` of this or another training, or a folder."""
    path = Path(path)
    if path.is_dir():
        return read_folder(path, log)
    saved = read_checkpoint(path)
    if path.suffix == ".ckpt" or "pytorch-lightning_version" in saved:
        return saved
    if isinstance(saved.get("trainer"), dict) and "model" in saved:  # by `write_any_format`
        return _joined({part: saved[part] for part in _PARTS if part in saved})
    parts = {part: saved[key] for part, keys in NAMES.items() for key in reversed(keys) if key in saved}
    if "model" not in parts and saved and all(isinstance(value, Tensor) for value in saved.values()):
        parts["model"] = saved
    if "model" not in parts:
        found = f"{path} has no weights: it holds {join_first(sorted(map(str, saved)), 5)}"
        raise UserError(f"{found}, expected one of {', '.join(NAMES['model'])}")
    place = place_in(saved)
    if "epoch" not in place:
        log(f"{path} names no epoch: {from_name(path)}")
    return from_elsewhere(parts, {**place_in_name(path), **place}, path, "", log)


def write_any_format(checkpoint: dict[str, Any], path: str | Path) -> Path:
    """Write Lightning's checkpoint as what the name says: a `.ckpt`, a single `.pth` or `.pt`, else a folder.

    A `.pth` has the parts of a folder as its keys, and `epoch` and `global_step`. What `last.ckpt` was before becomes
    `previous.ckpt`.
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
                _keep_as_previous(path)
    except (OSError, RuntimeError) as error:
        raise not_written(path, error) from None
    return path


def _keep_as_previous(last: Path) -> None:
    previous = last.with_name("previous.ckpt")
    partial = _hidden(previous)
    with suppress(OSError):  # a file system without links goes without
        partial.unlink(missing_ok=True)
        os.link(last, partial)
        partial.replace(previous)


def not_written(path: Path, error: Exception) -> UserError:
    free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.is_dir())).free / 2**20
    return UserError(
        f"{path} could not be written ({free:,.0f} MB free): {one_line(error, 200)}. What was there is whole: free "
        "some space, or choose a folder that is yours; a training resumes with --resume last"
    )


def clear_left_overs(folder: Path) -> None:
    """Remove what a process that was killed left of checkpoints it was writing or removing, files and folders."""
    for left_over in folder.glob(".*.partial"):
        shutil.rmtree(left_over, ignore_errors=True) if left_over.is_dir() else left_over.unlink(missing_ok=True)


def remove(path: Path) -> None:
    """Remove a checkpoint; half of one never stands under its name."""
    partial = _hidden(path)
    path.rename(partial)
    shutil.rmtree(partial) if partial.is_dir() else partial.unlink()


# ---- damage
def damage_by_file(path: Path, quickly: bool = False) -> dict[str, str]:
    """Return {name: what is wrong} of a checkpoint's file, or of those that its folder lists or has.

    Looked at are a folder's list, the lengths there and, unless `quickly`, the CRC-32 of every record that torch.save
    wrote.
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
    except (BadZipFile, OSError, ValueError, NotImplementedError, EOFError, RuntimeError) as error:
        return f"cannot be read: {error}"
    except UserError as error:
        return reason_of(error, path)
    return f"other contents than were written ({record})" if record else None


def reason_of(error: UserError, path: Path) -> str:
    """Return why a checkpoint cannot be read, without its name."""
    return str(error).removeprefix(f"{path} ").removeprefix("is damaged or no checkpoint").strip(" :()")
