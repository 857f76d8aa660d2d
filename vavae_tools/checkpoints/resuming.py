"""Which checkpoints a run has, which of them are whole, and whether a training can resume from one."""

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from torch import Tensor

from vavae_tools.checkpoints import formats
from vavae_tools.checkpoints.foreign import plain_name
from vavae_tools.checkpoints.formats import AVERAGE, is_checkpoint
from vavae_tools.runtime.errors import UserError, contents, in_home, join_first
from vavae_tools.runtime.files import read_checkpoint

if TYPE_CHECKING:
    import lightning as L

NAMES_OF_CHECKPOINTS = ("last.ckpt", "previous.ckpt", "best-*.ckpt", "epoch=*.ckpt", "checkpoint-*", "checkpoint_*")
"""What a run resumes from; the latter two are periodic."""


# ---- what is on the disk
@dataclass(frozen=True)
class Checkpoint:
    """What is known of a checkpoint on the disk without its tensors; `step` and `epoch` are None where unknown."""

    path: Path
    step: int | None
    epoch: int | None
    metric: str  # what the name of a `best-EPOCH-METRIC.ckpt` or `epoch=EPOCH-METRIC.ckpt` says
    bytes: int
    written: float  # seconds since 1970
    fault: str | None  # why it cannot be read

    def damage(self, quickly: bool = False) -> str | None:
        """Return what is wrong with its contents, or None; `quickly` leaves out what has to read everything."""
        faults = formats.damage_by_file(self.path, quickly)
        named = [fault if self.path.is_file() else f"{name}: {fault}" for name, fault in faults.items()]
        return "; ".join(named) or self.fault


def checkpoint_info(path: str | Path) -> Checkpoint:
    """Read step and epoch of a checkpoint; its tensors stay on the disk."""
    path = Path(path)
    place, fault = {}, None
    try:
        state = formats.read_state(path) if path.is_dir() else read_checkpoint(path)
        place = {**formats.place_in_name(path), **formats.place_in(state)}
        if path.is_dir() and not is_checkpoint(path):
            fault = "model.pt: missing"
    except UserError as error:
        fault = formats.reason_of(error, path)
    sizes = [file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]) if file.is_file()]
    metric = re.fullmatch(r"(?:best-|epoch=)\d+-(-?[\d.]+|-?inf|nan)\.ckpt", path.name)
    written = path.stat().st_mtime if path.exists() else 0.0
    step, epoch = place.get("global_step"), place.get("epoch")
    return Checkpoint(path, step, epoch, metric[1] if metric else "", sum(sizes), written, fault)


def checkpoints_in(run: str | Path, also: tuple[str, ...] = ()) -> list[Checkpoint]:
    """Return a run's checkpoints, in its folder and in `checkpoints/` there, the newest first by step and time."""
    run = Path(run)
    run = run.parent if run.name == "checkpoints" else run
    patterns = (*NAMES_OF_CHECKPOINTS, *also)
    names = {path for folder in (run, run / "checkpoints") for pattern in patterns for path in folder.glob(pattern)}
    found = [checkpoint_info(path) for path in names if path.is_dir() or path.suffix in formats.FILES]
    return sorted(found, key=lambda c: (-1 if c.step is None else c.step, c.written), reverse=True)


def keep_newest(run: str | Path, n: int, thoroughly: bool = False, dry_run: bool = False) -> list[Checkpoint]:
    """Remove a run's periodic checkpoints but the `n` newest whole ones, never the only whole one; return the removed.

    Contents are compared `thoroughly` to tell what is whole, or else lengths, which no step has to wait for.
    """
    if n < 0:
        raise UserError(f"--keep {n}: the number of checkpoints to keep, 0 or more")
    found = checkpoints_in(run)
    periodic = [checkpoint for checkpoint in found if checkpoint.path.name.startswith("checkpoint")]
    if len(periodic) <= n:
        return []
    sound = [checkpoint for checkpoint in found if not checkpoint.damage(not thoroughly)]
    others = any(checkpoint not in periodic for checkpoint in sound)
    kept = [checkpoint for checkpoint in periodic if checkpoint in sound][: n if others else max(n, 1)]
    if not sound or (n and not kept):
        return []  # what is there is left for a person to look at
    gone = [checkpoint for checkpoint in periodic if checkpoint not in kept]
    for checkpoint in gone if not dry_run else ():
        formats.remove(checkpoint.path)
    return gone


def former_run(folder: Path, resume_from: Path | None, overwrite: bool) -> list[Path]:
    """Return the checkpoints in the folder of a run that begins: another run's, which it may `overwrite`, or raise."""
    if resume_from is not None and resume_from.resolve().is_relative_to(folder.resolve()):
        return []
    places = [place / pattern for place in (Path(), Path("checkpoints")) for pattern in NAMES_OF_CHECKPOINTS]
    found = sorted({path for place in places for path in folder.glob(str(place))})
    if found and not overwrite:
        holds = f"{folder} holds a run ({join_first(path.name for path in found)})"
        python = 'in Python resume="last" or overwrite=True'
        raise UserError(
            f"{holds}: resume it with --resume last, name another --output_dir, or add --overwrite ({python})"
        )
    return found


# ---- which one
def resume_path(resume: str | None, run: str | Path, log: Callable[[str], None] = print) -> Path | None:
    """Return the whole checkpoint that `--resume` means; None starts anew.

    Args:
        resume: "last"; a `.ckpt`, a `.pth` or a checkpoint's folder; or a run's folder, for its newest whole one.
        run: the folder of this run, or the `checkpoints/` in it, where "last" is looked for.
    """
    if resume is None:
        return None
    if str(resume) == "last":
        first = {"last.ckpt": 0, "previous.ckpt": 1}
        found = sorted(checkpoints_in(run), key=lambda c: first.get(c.path.name, 2))
        return _first_whole(found, log) or _refuse_missing(Path(run) / "last.ckpt")
    path = in_home(resume)
    if not path.exists():
        _refuse_missing(path)
    if path.is_dir() and not is_checkpoint(path):
        if newest := _first_whole(checkpoints_in(path), log):
            return newest
        runs = "last.ckpt, best-*.ckpt or checkpoint-*/ as in a run's"
        raise UserError(f"{formats.no_weights(path)} as in a checkpoint's folder, or {runs}")
    if path.is_file():
        read_checkpoint(path)  # refuses what would run code
    for name, fault in formats.damage_by_file(path).items():
        if path.is_file() or fault != "missing":  # what was taken out of a folder on purpose starts anew
            what = fault if path.is_file() else f"{name}: {fault}"
            raise UserError(f"{path} is damaged ({what}): resume with --resume last, or name another one")
    return path


def _first_whole(found: list[Checkpoint], log: Callable[[str], None]) -> Path | None:
    damaged: list[str] = []
    for checkpoint in found:
        fault = checkpoint.damage()
        if fault is None:
            if damaged:
                step = "" if checkpoint.step is None else f", step {checkpoint.step:,}"
                log(f"{'; '.join(damaged)}: resuming from {checkpoint.path}{step}")
            return checkpoint.path
        damaged.append(f"{checkpoint.path} is damaged ({fault})")
    if damaged:
        raise UserError(f"{'; '.join(damaged)}; nothing else is there to resume from: start anew without --resume")
    return None


def _refuse_missing(path: Path) -> NoReturn:
    folder = next(folder for folder in path.parents if folder.is_dir())
    raise UserError(f"No checkpoint {path}; {folder} {contents(folder)}")


def best_checkpoint(folder: str | Path) -> Path:
    """Return the `best-*.ckpt` (or `epoch=*.ckpt`) of a run, or `last.ckpt` where nothing was monitored."""
    folder = Path(folder)
    best = [*folder.glob("best-*.ckpt"), *folder.glob("epoch=*.ckpt")] or list(folder.glob("last.ckpt"))
    if not best:
        raise UserError(f"No best-*.ckpt or last.ckpt in {folder}: train first")
    if len(best) == 1:
        return best[0]
    newest = max(best, key=lambda path: (formats.place_in_name(path).get("epoch", -1), path.stat().st_mtime))
    last = folder / "last.ckpt"  # some may be of steps that it knows nothing of: it resumed from an earlier one
    states = read_checkpoint(last if last.is_file() else newest).get("callbacks", {}).values()
    named = {
        Path(state["best_model_path"]).name for state in states if isinstance(state, dict) and state.get("monitor")
    }
    return next((path for path in best if path.name in named), newest)


def exported_checkpoint(run: Path, export: str) -> Path:
    """Return the checkpoint of a run that `export` means: last, best, or one by its path or name."""
    folder = run / "checkpoints"
    if export in ("last", "best"):
        return best_checkpoint(folder) if export == "best" else folder / "last.ckpt"
    for path in _inside(run, export):
        if is_checkpoint(path) or (path.is_file() and path.suffix in formats.FILES):
            return path
    there = join_first((checkpoint.path.name for checkpoint in checkpoints_in(run)), 12) or "none"
    raise UserError(
        f"export={export} is no checkpoint of {run}, which has {there}: expected last, best, or one of them"
    )


def check_export(run: Path, export: str) -> None:
    """Raise where `export` is no checkpoint of a run, and none that its training may write."""
    to_come = any(fnmatch(Path(export).name, pattern) for pattern in NAMES_OF_CHECKPOINTS)
    elsewhere = in_home(export).exists() or not _inside(run, export)
    if export not in ("last", "best") and not (to_come and not elsewhere):
        exported_checkpoint(run, export)


def _inside(run: Path, path: str) -> list[Path]:
    """Return what a path may mean in a run's folder."""
    places = in_home(path), run / path, run / "checkpoints" / path
    return [place for place in places if place.resolve().is_relative_to(run.resolve())]


# ---- of the same model
def check_resumable(path: Path | None, module: "L.LightningModule") -> None:
    """Raise where a checkpoint is of another model than the module, or holds no more than weights.

    Where one names the weights otherwise or lacks their average (`match_names`), the module takes them all the same.
    """
    if path is None or formats.is_deepspeed(path):  # which its strategy checks and reads
        return
    checkpoint, own = formats.read_any_format(path, lambda line: None), module.state_dict()
    lacking = [part for part in ("state_dict", "optimizer_states", "loops") if part not in checkpoint]
    if lacking:
        raise UserError(f"{path} has no {lacking[0]}: training cannot resume from it; name a last.ckpt or best-*.ckpt")
    found = match_names(checkpoint["state_dict"], own)
    _check_weights(path, found, own)
    _check_optimizers(path, checkpoint["optimizer_states"], module)
    if list(found) != list(checkpoint["state_dict"]):

        def take(module: Any, weights: dict[str, Tensor], *others: Any) -> None:
            named = match_names(weights, own)
            weights.clear()
            weights.update(named)

        module.register_load_state_dict_pre_hook(take)


def match_names(found: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a checkpoint's weights under a module's names; an average that is missing starts from the weights.

    Names may be those of a compiled network or not, and lack a beginning that all have here, if only one fits.
    """
    plain = {plain_name(name): name for name in own}
    theirs = {plain_name(name): tensor for name, tensor in found.items()}
    parts = [name.removeprefix(AVERAGE) for name in theirs]
    if not any(part in plain for part in parts):
        trained = [name for name in plain if not name.startswith(AVERAGE)]
        beginnings = {name[: i + 1] for name in trained for i, letter in enumerate(name) if letter == "."}
        fitting = [begin for begin in beginnings if all(begin + part in plain for part in parts)]
        if len(fitting) == 1:
            averages = [AVERAGE if name.startswith(AVERAGE) else "" for name in theirs]
            names = [a + fitting[0] + part for a, part in zip(averages, parts, strict=True)]
            theirs = dict(zip(names, theirs.values(), strict=True))
    if not any(name.startswith(AVERAGE) for name in theirs):
        theirs |= {AVERAGE + name: tensor for name, tensor in theirs.items() if AVERAGE + name in plain}
    return {plain.get(name, name): tensor for name, tensor in theirs.items()}


def _check_weights(path: Path, found: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    there, here = ({name: tuple(tensor.shape) for name, tensor in weights.items()} for weights in (found, own))
    other = [name for name in {**here, **there} if here.get(name) != there.get(name)]
    if not other:
        return
    first, more = other[0], other[1:]
    others = f", and {len(more)} more differ ({', '.join(more[:3])})" if more else ""
    cause = "usually another size or number of people, or a part that is on only here or there, such as disc_weight"
    if here.keys().isdisjoint(there):
        cause = "none of its names is known here: weights to start from are no checkpoint to resume from"
    shapes = [shape.get(first, "not there") for shape in (there, here)]
    differs = f"{first} is {shapes[0]}, expected {shapes[1]}{others}; {cause}"
    help = "Resume with the settings of that run, or start anew without --resume"
    raise UserError(f"{path} is of another model: {differs}. {help}")


def _check_optimizers(path: Path, states: list[dict[str, Any]], module: "L.LightningModule") -> None:
    """The states are by number, not by name: as many as weights are trained here, of the same shapes."""
    trained = [weights.shape for weights in module.parameters() if weights.requires_grad]
    held = sum(len(group["params"]) for state in states for group in state.get("param_groups", ()))
    moments = [moment for found in states for moment in found.get("state", {}).values()]
    known = [moment["exp_avg"].shape for moment in moments if "exp_avg" in moment]
    if states and (held != len(trained) or Counter(known) - Counter(trained)):
        found = f"its optimisers' state is of {held} tensors of weights, here {len(trained)} are trained"
        help = (
            "Resume with that run's settings (such as freeze_encoder), or remove optimizer.pt of a checkpoint's folder"
        )
        raise UserError(f"{path}: {found}, of these and no other shapes. {help}")
