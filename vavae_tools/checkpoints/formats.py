"""Checkpoints as folders, `checkpoint-epoch-118/` and `checkpoint-5000/`, and as files of other trainings.

A folder may also hold the parts of several processes (`checkpoints.sharded`). Inside, every kind is Lightning's
checkpoint, a dict. A folder that was written here holds all of it, so that it comes back bit by bit; from one that was
not, training goes on at the beginning of the epoch after the finished one.
"""

import ctypes
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any
from zipfile import BadZipFile, ZipFile, is_zipfile

import torch
from torch import Tensor

from vavae_tools.checkpoints.foreign import (
    AVERAGE,
    NAMES,
    STARTS_ANEW,
    few,
    from_elsewhere,
    from_name,
    place_in,
    place_in_name,
    plain_name,
)
from vavae_tools.checkpoints.sharded import CHECKPOINT, OF_DEEPSPEED, open_parts, read_deepspeed, whole_tensors
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import flush_folder, read_checkpoint, read_saved, written_whole

STATE = "training_state.json"
PARTS = {"optimizer": "optimizer_states", "scheduler": "lr_schedulers"}
"""Parts of a folder, and what Lightning calls them."""
FILES = (".ckpt", ".pth", ".pt")
NAMES_OF_CHECKPOINTS = ("last.ckpt", "previous.ckpt", "best-*.ckpt", "epoch=*.ckpt", "checkpoint-*", "checkpoint_*")
"""What a run goes on from; the latter two are periodic."""


# ---- folders
def write_folder(checkpoint: dict[str, Any], folder: str | Path) -> Path:
    """Write Lightning's checkpoint as a folder that is whole under its name, in place of one that may be there.

    `model.pt` and `ema_model.pt` have the weights under the same names, `optimizer.pt` and `scheduler.pt` lists of
    state_dicts, `trainer.pt` all the rest; `training_state.json` lists every file's length and SHA-256.

    Raises:
        UserError: it cannot be written (what was there is as before), or something else has this name.
    """
    folder = Path(folder)
    partial = begin_folder(folder)
    try:
        files = {f"{part}.pt": save_part(value, partial / f"{part}.pt") for part, value in _split(checkpoint).items()}
        finish_folder(partial, folder, checkpoint, files)
    except (OSError, RuntimeError) as error:  # torch.save says RuntimeError where the disk is full
        raise not_written(folder, error) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def begin_folder(folder: Path) -> Path:
    """An empty folder beside, for the files of a checkpoint.

    Raises:
        UserError: something else has its name, or it cannot be made.
    """
    a_file = folder.suffix == ".ckpt" and folder.is_file()  # of the same run, before it was sharded
    if folder.exists() and not (a_file or is_checkpoint(folder)):
        raise UserError(f"{folder} exists and is no checkpoint (no model.pt): name another folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        raise not_written(folder, error) from None
    return partial


def finish_folder(
    partial: Path,
    folder: Path,
    checkpoint: dict[str, Any],
    files: dict[str, dict[str, Any]],
    former: Path | None = None,
) -> None:
    """List the files of `partial`, flushed, and give it its name; what had it gets the name `former`, or is gone."""
    state = {"global_step": checkpoint.get("global_step", 0), "current_epoch": checkpoint.get("epoch", 0)}
    with (partial / STATE).open("w", encoding="utf-8") as file:
        file.write(json.dumps({**state, "files": files}, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    flush_folder(partial)
    _put_in_place(partial, folder, former)
    flush_folder(folder.parent)


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is a checkpoint, and not a run's folder or something else."""
    return main_file(folder) is not None


def main_file(folder: Path) -> str | None:
    """The file by which a checkpoint's folder is known: of parts by name, of processes' parts, or of DeepSpeed."""
    return next((name for name in ("model.pt", CHECKPOINT, OF_DEEPSPEED) if (folder / name).is_file()), None)


def read_folder(folder: str | Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Lightning's checkpoint from a folder; `say` gets a line for everything that is not there and starts anew.

    Raises:
        UserError: no such folder, no weights in it, or a damaged file.
    """
    folder = Path(folder)
    recover_former(folder.parent)
    if not (folder / "model.pt").is_file():
        raise UserError(no_weights(folder))
    faults = damaged_files(folder)
    for name, fault in faults.items():
        if fault != "missing" or name == "model.pt":
            raise UserError(f"{folder} is damaged ({name}: {fault}): take another checkpoint")
    parts = {p: read_saved(folder / f"{p}.pt") for p in _PARTS if (folder / f"{p}.pt").is_file()}
    state = _state(folder)
    if "trainer" in parts:
        lost = [name.removesuffix(".pt") for name in faults]
        for part in lost:
            say(f"{folder} has no {part}.pt: {STARTS_ANEW.get(part, 'it starts anew')}")
        return _joined(parts, lost)
    if "trainer.pt" in faults:
        say(f"{folder} has no trainer.pt: the place in the epoch is lost, and the next epoch begins")
    if not state:
        say(f"{folder} has no {STATE}: {from_name(folder)}")
    return from_elsewhere(parts, {**place_in_name(folder), **place_in(state)}, folder, ".pt", say)


_PARTS = ("model", "ema_model", *PARTS, "trainer", "scaler")


def _split(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """Lightning's checkpoint → the parts that become files; what a part has no file of stays in "trainer"."""
    weights, rest = checkpoint["state_dict"], {k: v for k, v in checkpoint.items() if k != "state_dict"}
    model = type(weights)((plain_name(k), v) for k, v in weights.items() if not k.startswith(AVERAGE))
    average = {plain_name(k.removeprefix(AVERAGE)): v for k, v in weights.items() if k.startswith(AVERAGE)}
    if len(model) + len(average) < len(weights):
        raise UserError("Two of the weights have the same name without _orig_mod. and module.: rename one of them")
    parts = {"model": model, **({"ema_model": average} if average else {})}
    for part, key in PARTS.items():
        if rest.get(key):
            parts[part] = rest.pop(key)
    return {**parts, "trainer": rest}


def _joined(parts: dict[str, Any], lost: list[str] = ()) -> dict[str, Any]:
    """The reverse of `_split`; parts that are `lost` come back empty."""
    weights = parts["model"]
    weights.update({AVERAGE + name: tensor for name, tensor in parts.get("ema_model", {}).items()})
    checkpoint = {**parts["trainer"], "state_dict": weights}
    for part, key in PARTS.items():
        if part in parts or part in lost:
            checkpoint[key] = parts.get(part, [])
    return checkpoint


def save_part(value: Any, path: Path) -> dict[str, Any]:
    """Write one file of a checkpoint's folder, flushed → its length and SHA-256."""
    torch.save(value, path)
    return described(path)


def described(path: Path) -> dict[str, Any]:
    """A file's length and SHA-256, flushed to the disk before."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def _put_in_place(partial: Path, path: Path, former: Path | None = None) -> None:
    """Rename `partial` to `path`; what is there, file or folder, gets the name `former`, or is gone."""
    if not path.exists():
        partial.rename(path)
        return
    if former is not None and former.exists():
        remove(former)
    aside = partial
    if not _exchanged(partial, path):
        # two renames, and a kill between them leaves the former one under its hidden name: see `recover_former`
        aside = path.with_name(f".{path.name}.former")
        _delete(aside)
        path.rename(aside)
        partial.rename(path)
    if former is not None:
        aside.rename(former)
    else:
        _delete(aside)


def _delete(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchanged(a: Path, b: Path) -> bool:
    """Exchange two names at once, where the system can (Linux, most file systems)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return renameat2(here, os.fsencode(a), here, os.fsencode(b), ctypes.c_uint(exchange)) == 0


def recover_former(parent: Path) -> None:
    """Give folders their names back whose replacement was killed halfway (only where names cannot be exchanged)."""
    for former in parent.glob(".*.former") if parent.is_dir() else ():
        folder = former.with_name(former.name[1:].removesuffix(".former"))
        with suppress(OSError):
            if not folder.exists():
                former.rename(folder)


def clear_left_overs(folder: Path) -> None:
    """Remove what a process that was killed left of checkpoints it was writing or removing, files and folders."""
    recover_former(folder)
    for left_over in [*folder.glob(".*.partial"), *folder.glob(".*.former")]:
        _delete(left_over)


def open_folder(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """As `read_folder`, of any kind; tensors that lie in the parts of several processes stay there, as a `Cut`.

    Raises:
        UserError: as there.
    """
    kind = main_file(folder)
    if kind not in (CHECKPOINT, OF_DEEPSPEED):
        return read_folder(folder, say)
    for name, fault in damaged_files(folder, quickly=True).items():
        raise UserError(f"{folder} is damaged ({name}: {fault}): take another checkpoint")
    return open_parts(folder) if kind == CHECKPOINT else read_deepspeed(folder, say)


# ---- single files
def read_any(path: str | Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Lightning's checkpoint from a `.ckpt`, a `.pth` or `.pt` of this or another training, or a folder.

    Raises:
        UserError: it is not there, damaged, would have to run code to be read, or has no weights.
    """
    path = Path(path)
    if path.is_dir():
        return whole_tensors(open_folder(path, say))
    saved = read_checkpoint(path)
    if path.suffix == ".ckpt" or "pytorch-lightning_version" in saved:
        return saved
    if isinstance(saved.get("trainer"), dict) and "model" in saved:  # by `write_any`
        return _joined({part: saved[part] for part in _PARTS if part in saved})
    parts = {part: saved[key] for part, keys in NAMES.items() for key in reversed(keys) if key in saved}
    if "model" not in parts and saved and all(isinstance(value, Tensor) for value in saved.values()):
        parts["model"] = saved
    if "model" not in parts:
        raise UserError(f"{path} has no weights: it holds {few(saved)}, expected one of {', '.join(NAMES['model'])}")
    place = place_in(saved)
    if "epoch" not in place:
        say(f"{path} names no epoch: {from_name(path)}")
    return from_elsewhere(parts, {**place_in_name(path), **place}, path, "", say)


def write_any(checkpoint: dict[str, Any], path: str | Path) -> Path:
    """Write Lightning's checkpoint as what the name says: a `.ckpt`, a single `.pth` or `.pt`, else a folder.

    A `.pth` has the parts of a folder as its keys, and `epoch` and `global_step`.
    """
    path = Path(path)
    if path.suffix not in FILES:
        return write_folder(checkpoint, path)
    if path.suffix != ".ckpt":
        place = {name: checkpoint.get(name, 0) for name in ("epoch", "global_step")}
        checkpoint = {**_split(checkpoint), **place}
    try:
        with written_whole(path) as partial:
            torch.save(checkpoint, partial)
    except (OSError, RuntimeError) as error:
        raise not_written(path, error) from None
    return path


def not_written(path: Path, error: Exception) -> UserError:
    """What to say of a checkpoint that could not be written."""
    free = shutil.disk_usage(next(parent for parent in path.absolute().parents if parent.is_dir())).free / 2**20
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return UserError(
        f"{path} could not be written ({free:,.0f} MB free): {reason}. What was there is whole: free some space, or "
        "choose a folder that is yours"
    )


# ---- damage
def damaged_file(path: Path) -> str | None:
    """Why a file of `torch.save` is damaged: its length, or the CRC-32 of one of its records; None where it is not."""
    if not path.is_file():
        return "missing"
    if not is_zipfile(path):  # also before PyTorch 1.6, a pickle without a checksum: reading it tells
        return None if path.open("rb").read(1) == b"\x80" else "no file of torch.save, or its end is missing"
    try:
        with ZipFile(path) as records:
            record = records.testzip()
    except (BadZipFile, OSError, ValueError, NotImplementedError, EOFError, RuntimeError) as error:
        return f"cannot be read: {error}"
    return f"other contents than were written ({record})" if record else None


def damaged_files(folder: Path, quickly: bool = False) -> dict[str, str]:
    """Files of a checkpoint's folder that are not as `training_state.json` lists them: {name: what is wrong}.

    Without a list, as from elsewhere, each file's own checksums are looked at; `quickly` looks at lengths alone.
    """
    try:
        listed = _state(folder).get("files")
    except UserError:
        return {STATE: "no JSON object"}
    if not isinstance(listed, dict) or not all(isinstance(e, dict) and "bytes" in e for e in listed.values()):
        found = {path.name: damaged_file(path) for path in sorted(folder.glob("*.pt")) if not quickly}
        return {name: fault for name, fault in found.items() if fault}
    faults = {}
    for name, expected in listed.items():
        path = folder.joinpath(*(part for part in PurePosixPath(name).parts if part not in ("/", "..")))
        if not path.is_file():
            faults[name] = "missing"
        elif path.stat().st_size != expected["bytes"]:
            faults[name] = f"{path.stat().st_size:,} bytes, expected {expected['bytes']:,}"
        elif not quickly and described(path) != expected:
            faults[name] = "other contents than were written"
    return faults


def no_weights(folder: Path) -> str:
    """What to say of a folder that is no checkpoint."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    if ".metadata" in names:
        return (
            f"{folder} was written by torch.distributed.checkpoint: its .metadata is a pickle, which is not opened. "
            "Where you trust its origin, run python -m torch.distributed.checkpoint.format_utils dcp_to_torch "
            f"{folder} FILE.pt, and name that file"
        )
    found = f"holds {few(names)}" if names else "is empty" if folder.is_dir() else "is not there"
    return f"{folder} is no checkpoint: it {found}, expected model.pt"


def _state(folder: Path) -> dict[str, Any]:
    """`training_state.json`, or {} where there is none."""
    path = folder / STATE
    if not path.is_file():
        return {}
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        state = None
    if not isinstance(state, dict):
        raise UserError(
            f"{path} is damaged: it is no JSON object. Mend it, or remove it: then the epoch is taken from the name"
        )
    return state


# ---- what is on the disk
@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on the disk, as far as it is known without its tensors; `step` and `epoch` are None where unknown.

    The metric is what the name of a `best-EPOCH-METRIC.ckpt` or `epoch=EPOCH-METRIC.ckpt` says.
    """

    path: Path
    step: int | None
    epoch: int | None
    metric: str
    bytes: int
    written: float
    """seconds since 1970"""
    fault: str | None
    """why it cannot be read"""

    def __str__(self) -> str:
        return str(self.path)

    @property
    def order(self) -> tuple[int, float]:
        """Newest last."""
        return (-1 if self.step is None else self.step, self.written)


def look_at(path: str | Path) -> Checkpoint:
    """Read step and epoch of a checkpoint; its tensors stay on the disk."""
    path = Path(path)
    place, fault = {}, None
    try:
        place = {**place_in_name(path), **place_in(_state(path) if path.is_dir() else read_checkpoint(path))}
        if path.is_dir() and not is_checkpoint(path):
            fault = "model.pt: missing"
    except UserError as error:
        fault = str(error).removeprefix(f"{path} ").removeprefix("is damaged or no checkpoint").strip(" :()")
    files = [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]
    metric = re.fullmatch(r"(?:best-|epoch=)\d+-(-?[\d.]+|-?inf|nan)\.ckpt", path.name)
    return Checkpoint(
        path,
        place.get("global_step"),
        place.get("epoch"),
        metric[1] if metric else "",
        sum(file.stat().st_size for file in files),
        path.stat().st_mtime,
        fault,
    )


def checkpoints_in(run: str | Path, also: tuple[str, ...] = ()) -> list[Checkpoint]:
    """Checkpoints of a run, in its folder and in `checkpoints/` there, the newest first: by step, then by time.

    Args:
        run: its folder, or the `checkpoints/` in it.
        also: patterns of further names.
    """
    run = Path(run)
    run = run.parent if run.name == "checkpoints" else run
    found = []
    for folder in (run, run / "checkpoints"):
        recover_former(folder)
        names = {path for pattern in (*NAMES_OF_CHECKPOINTS, *also) for path in folder.glob(pattern)}
        found += [path for path in names if path.is_dir() or path.suffix in FILES]
    return sorted(map(look_at, found), key=lambda checkpoint: checkpoint.order, reverse=True)


def whole(path: str | Path, quickly: bool = False) -> str | None:
    """Why a checkpoint is damaged, or None.

    Of a file the CRC-32 of each record is compared, of a folder each file's length and SHA-256; `quickly` leaves out
    what has to read everything.
    """
    path = Path(path)
    fault = damaged_file(path) if not path.is_dir() and not (quickly and path.is_file()) else look_at(path).fault
    if fault or path.is_file():
        return fault or look_at(path).fault
    return "; ".join(f"{name}: {fault}" for name, fault in damaged_files(path, quickly).items()) or None


def keep_newest(run: str | Path, n: int, thoroughly: bool = False, dry_run: bool = False) -> list[Checkpoint]:
    """Remove a run's periodic checkpoints, `checkpoint-*`, but the `n` newest whole ones; never the only whole one.

    `last.ckpt`, `previous.ckpt` and the best stay.

    Args:
        thoroughly: compare all contents to tell what is whole; otherwise lengths, which no step has to wait for.
        dry_run: remove nothing.

    Returns:
        What is removed.
    """
    if n < 0:
        raise UserError(f"--keep {n}: the number of checkpoints to keep, 0 or more")
    found = checkpoints_in(run)
    periodic = [checkpoint for checkpoint in found if checkpoint.path.name.startswith("checkpoint")]
    if len(periodic) <= n:
        return []
    kept = list(islice((c for c in periodic if not whole(c.path, not thoroughly)), max(n, 1)))
    if n == 0 and any(not whole(c.path, not thoroughly) for c in found if c not in periodic):
        kept = []
    elif not kept:
        return []  # nothing is whole: what is there is left for a person to look at
    gone = [checkpoint for checkpoint in periodic if checkpoint not in kept]
    for checkpoint in gone if not dry_run else ():
        remove(checkpoint.path)
    return gone


def remove(path: Path) -> None:
    """Remove a checkpoint; half of one never stands under its name."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    path.rename(partial)
    shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
