"""What a training goes on from: found, checked, judged."""

from collections import Counter
from collections.abc import Callable, Iterator
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vavae_tools.checkpoints.foreign import AVERAGE, few, plain_name
from vavae_tools.checkpoints.formats import (
    Checkpoint,
    checkpoints_in,
    damaged_file,
    damaged_files,
    is_checkpoint,
    no_weights,
    open_folder,
    read_any,
    whole,
)
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import read_checkpoint

if TYPE_CHECKING:
    import lightning as L


def resume_path(resume: str | None, run: str | Path, say: Callable[[str], None] = print) -> Path | None:
    """`--resume` → the checkpoint to go on from, whole; None starts anew.

    Args:
        resume: "last"; a `.ckpt`, a `.pth` or a checkpoint's folder; or a run's folder, for its newest whole one.
        run: the folder of this run, or the `checkpoints/` in it, where "last" is looked for.
        say: gets a line where another one than the newest is taken, because that is damaged.

    Raises:
        UserError: there is none (what is there is named), or it is damaged or would run code.
    """
    if resume is None:
        return None
    if str(resume) == "last":
        found = _first_whole(_last_first(Path(run)), say)
        if found is None:
            raise UserError(_not_there(Path(run) / "last.ckpt"))
        return found
    path = Path(resume)
    if not path.exists():
        raise UserError(_not_there(path))
    if path.is_dir() and not is_checkpoint(path):
        found = _first_whole(iter(checkpoints_in(path)), say)
        if found is None:
            runs = "last.ckpt, best-*.ckpt or checkpoint-*/ as in a run's"
            raise UserError(f"{no_weights(path)} as in a checkpoint's folder, or {runs}")
        return found
    if path.is_file():
        fault = damaged_file(path)
        if fault:
            raise UserError(f"{path} is damaged ({fault}): go on with --resume last, or name another one")
        read_checkpoint(path)  # refuses what would run code
    # a file that was taken out on purpose is no damage: reading says what starts anew
    for name, fault in damaged_files(path).items() if path.is_dir() else ():
        if fault != "missing":
            raise UserError(f"{path} is damaged ({name}: {fault}): go on with --resume last, or name another one")
    return path


def _last_first(run: Path) -> Iterator[Checkpoint]:
    """`last.ckpt`, what it was before, then all others, the newest first."""
    found = checkpoints_in(run)
    names = ["last.ckpt", "previous.ckpt"]
    for name in names:
        yield from (checkpoint for checkpoint in found if checkpoint.path.name == name)
    yield from (checkpoint for checkpoint in found if checkpoint.path.name not in names)


def _first_whole(found: Iterator[Checkpoint], say: Callable[[str], None]) -> Path | None:
    damaged: list[str] = []
    for checkpoint in found:
        fault = whole(checkpoint.path)
        if fault is None:
            if damaged:
                step = "" if checkpoint.step is None else f", step {checkpoint.step:,}"
                say(f"{'; '.join(damaged)}: going on from {checkpoint.path}{step}")
            return checkpoint.path
        damaged.append(f"{checkpoint.path} is damaged ({fault})")
    if damaged:
        raise UserError(f"{'; '.join(damaged)}; nothing else is there to go on from: start anew without --resume")
    return None


def _not_there(path: Path) -> str:
    """What to say of a path that is not there: the nearest names that are."""
    missing = path
    while not missing.parent.is_dir():
        missing = missing.parent
    names = [beside.name for beside in missing.parent.iterdir() if not beside.name.startswith(".")]
    near = get_close_matches(missing.name, names, n=3, cutoff=0.5)
    if near:
        return f"No checkpoint {path}; nearest in {missing.parent}: {', '.join(near)}"
    return f"No checkpoint {path}; {missing.parent} {'holds ' + few(names) if names else 'is empty'}"


def check_resumable(path: Path | None, module: "L.LightningModule") -> None:
    """Say what differs between a checkpoint to go on from and the module that is to go on.

    Where a checkpoint from elsewhere names the weights otherwise, but in one way only, or lacks their average, the
    module is told, and takes them when Lightning loads them.

    Raises:
        UserError: the checkpoint is of another model, or holds no more than weights.
    """
    if path is None:
        return
    checkpoint, own = open_any(path), module.state_dict()
    lacking = [part for part in ("state_dict", "optimizer_states", "loops") if part not in checkpoint]
    if lacking:
        raise UserError(f"{path} has no {lacking[0]}: training cannot go on from it; name a last.ckpt or best-*.ckpt")
    found = as_own(checkpoint["state_dict"], own)
    _check_weights(path, found, own)
    _check_optimizers(path, checkpoint["optimizer_states"], module)
    if list(found) != list(checkpoint["state_dict"]):

        def take(module: Any, weights: dict[str, Tensor], *others: Any) -> None:
            named = as_own(weights, own)
            weights.clear()
            weights.update(named)

        module.register_load_state_dict_pre_hook(take)


def open_any(path: Path) -> dict[str, Any]:
    """As `read_any`; what lies in the parts of several processes stays there, as a `Cut`."""
    return open_folder(path, lambda line: None) if path.is_dir() else read_any(path, lambda line: None)


def as_own(found: dict[str, Any], own: dict[str, Tensor]) -> dict[str, Any]:
    """A checkpoint's weights under a module's names; an average that is missing altogether starts from the weights."""
    return _with_average(_renamed(found, _own_names(found, own)), own)


def _own_names(found: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, str]:
    """{a checkpoint's name: this module's}: compiled or not, and with the beginning that all lack, if only one fits."""
    plain = {plain_name(name): name for name in own}
    theirs = {name: plain_name(name) for name in found}
    parts = [name.removeprefix(AVERAGE) for name in theirs.values()]
    if not any(part in plain for part in parts):
        trained = [name for name in plain if not name.startswith(AVERAGE)]
        beginnings = {name[: i + 1] for name in trained for i, letter in enumerate(name) if letter == "."}
        fitting = [begin for begin in beginnings if all(begin + part in plain for part in parts)]
        if len(fitting) == 1:
            averaged = [AVERAGE if name.startswith(AVERAGE) else "" for name in theirs.values()]
            whole_names = [a + fitting[0] + part for a, part in zip(averaged, parts, strict=True)]
            theirs = dict(zip(theirs, whole_names, strict=True))
    return {name: plain.get(their, name) for name, their in theirs.items()}


def _renamed(weights: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
    return {names.get(name, name): tensor for name, tensor in weights.items()}


def _with_average(weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """An average that is missing altogether starts from the weights."""
    if any(name.startswith(AVERAGE) for name in weights):
        return weights
    trained = {AVERAGE + plain_name(name): tensor for name, tensor in weights.items()}
    return {**weights, **{name: trained[plain_name(name)] for name in own if plain_name(name) in trained}}


def _check_weights(path: Path, found: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    def form(weights: dict[str, Tensor], name: str) -> tuple[int, ...] | str:
        return tuple(weights[name].shape) if name in weights else "not there"

    other = [name for name in {**own, **found} if form(found, name) != form(own, name)]
    if not other:
        return
    first, more = other[0], other[1:]
    others = f", and {len(more)} more differ ({', '.join(more[:3])})" if more else ""
    if all(name not in found for name in own):
        cause = "none of its names is known here: weights to start from are no checkpoint to go on from"
    elif all(name not in found for name in other):
        cause = "usually a part is switched on here that was off there, such as disc_weight, vf_weight or condition_dim"
    elif all(name not in own for name in other):
        cause = "usually a part is switched off here that was on there, such as disc_weight, vf_weight or condition_dim"
    else:
        cause = "usually another size, number of people or condition_dim"
    raise UserError(
        f"{path} is of another model: {first} is {form(found, first)}, expected {form(own, first)}{others}; {cause}. "
        "Go on with the settings of that run, or start anew without --resume"
    )


def _check_optimizers(path: Path, states: list[dict[str, Any]], module: "L.LightningModule") -> None:
    """The states are by number, not by name: as many as weights are trained here, of the same shapes."""
    trained = [weights.shape for weights in module.parameters() if weights.requires_grad]
    held = sum(len(group["params"]) for state in states for group in state.get("param_groups", ()))
    known = [
        state["exp_avg"].shape for found in states for state in found.get("state", {}).values() if "exp_avg" in state
    ]
    if states and (held != len(trained) or Counter(known) - Counter(trained)):
        raise UserError(
            f"{path}: its optimisers' state is of {held} tensors of weights, here {len(trained)} are trained, of these "
            "and no other shapes. Go on with the settings of that run (such as freeze_encoder); in a checkpoint's "
            "folder, remove optimizer.pt, and the optimiser starts anew"
        )


def best_checkpoint(folder: str | Path) -> Path:
    """The `best-*.ckpt` (or `epoch=*.ckpt`) of a run, or `last.ckpt` where nothing was monitored.

    Raises:
        UserError: neither is there.
    """
    folder = Path(folder)
    best = [*folder.glob("best-*.ckpt"), *folder.glob("epoch=*.ckpt")]
    found = sorted(best, key=lambda path: path.stat().st_mtime) or list(folder.glob("last.ckpt"))
    if not found:
        raise UserError(f"No best-*.ckpt or last.ckpt in {folder}: train first")
    return found[-1]
