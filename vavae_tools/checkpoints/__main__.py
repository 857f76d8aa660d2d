"""Look after checkpoints: what is there, is it whole, what is in it, which may go, and from one kind to another."""

import argparse
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vavae_tools.runtime.errors import UserError, command_parser, run_command

if TYPE_CHECKING:
    from vavae_tools.checkpoints.resuming import Checkpoint


def main() -> None:
    parser = command_parser("python -m vavae_tools.checkpoints", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(function: Callable[..., Any], name: str, text: str, **paths: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:], allow_abbrev=False)
        command.set_defaults(function=function)
        for path, meaning in paths.items():
            command.add_argument(path, metavar=path.upper(), help=meaning)
        return command

    run, one = "a run's folder, or the checkpoints/ in it", "a .ckpt, .pth or checkpoint folder"
    table = "a table of a run's checkpoints: step, epoch, metric, size, age, whole or damaged"
    add(list_checkpoints, "list", table, folder=run)
    add(inspect_checkpoint, "inspect", "what is in a checkpoint", path=one)
    prune = "remove a run's periodic checkpoints (checkpoint-*) but the newest whole ones"
    prune = add(prune_checkpoints, "prune", prune, folder=run)
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="how many stay; last and best-* always do")
    prune.add_argument("--dry_run", action="store_true", help="say what would go, and remove nothing")
    new = "NAME.ckpt, NAME.pth or a folder's name, which does not exist yet"
    kinds = "write a checkpoint as another kind: .ckpt, .pth, or a folder"
    add(convert_checkpoint, "convert", kinds, source=one, destination=new)
    damage = "read everything, and end with status 2 where a checkpoint is damaged"
    add(verify_checkpoints, "verify", damage, folder=f"{run}; or one alone")
    options = vars(parser.parse_args())
    options.pop("function")(**options)


def list_checkpoints(folder: str | Path, log: Callable[[str], None] = print) -> None:
    """Print a table of a run's checkpoints, the newest first."""
    rows = [("checkpoint", "step", "epoch", "metric", "size", "age", "state")]
    folder = Path(folder)
    for c in _found(folder):
        name = str(c.path.relative_to(folder)) if c.path.is_relative_to(folder) else str(c.path)
        place = ["-" if number is None else f"{number:,}" for number in (c.step, c.epoch)]
        fault = c.damage()
        state = "whole" if fault is None else f"damaged: {fault}"
        age = str(timedelta(seconds=int(time.time() - c.written)))  # such as 2:01:40
        rows.append((name, *place, c.metric or "-", _size(c.bytes), age, state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers, state in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:-1], strict=True)]
        log("  ".join([name.ljust(widths[0]), *cells, state]))


def inspect_checkpoint(path: str | Path, log: Callable[[str], None] = print) -> None:
    """Print what is in a checkpoint: weights by part, optimisers, hyper-parameters, versions."""
    from vavae_tools.checkpoints.formats import read_any_format
    from vavae_tools.checkpoints.resuming import checkpoint_info

    checkpoint, found = read_any_format(path, log), checkpoint_info(path)
    fault = found.damage()
    log(f"{path}: {_size(found.bytes)}, {'whole' if fault is None else f'damaged ({fault})'}")
    log(f"step {checkpoint.get('global_step', '-')}, epoch {checkpoint.get('epoch', '-')}")
    _log_weights(checkpoint.get("state_dict", {}), log)
    for number, state in enumerate(checkpoint.get("optimizer_states", [])):
        groups = state.get("param_groups", [])
        rates = ", ".join(f"{group['lr']:g}" for group in groups if "lr" in group)
        log(f"optimiser {number}: {sum(len(group['params']) for group in groups):,} tensors, lr {rates}")
    for number, state in enumerate(checkpoint.get("lr_schedulers", [])):
        log(f"schedule {number}: step {state.get('last_epoch', '-')}")
    run = checkpoint.get("run")
    run = run if isinstance(run, dict) else {}
    versions = {"lightning": checkpoint.get("pytorch-lightning_version", "-"), **run.get("versions", {})}
    log("versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    if run.get("command"):
        log("command: " + " ".join(map(str, run["command"])))
    for name, value in checkpoint.get("hyper_parameters", {}).items():
        log(f"  {name}: {value}")


def prune_checkpoints(
    folder: str | Path, keep: int, dry_run: bool = False, log: Callable[[str], None] = print
) -> list["Checkpoint"]:
    """Remove a run's periodic checkpoints but the `keep` newest whole ones; print what is freed."""
    from vavae_tools.checkpoints.resuming import keep_newest

    _found(Path(folder))
    gone = keep_newest(folder, keep, thoroughly=True, dry_run=dry_run)
    for checkpoint in gone:
        log(f"{'would go' if dry_run else 'removed'}: {checkpoint.path} ({_size(checkpoint.bytes)})")
    log(f"{_size(sum(c.bytes for c in gone))} {'would be ' if dry_run else ''}freed by {len(gone)} checkpoints")
    return gone


def convert_checkpoint(source: str | Path, destination: str | Path, log: Callable[[str], None] = print) -> Path:
    """Write the checkpoint `source` as what the name `destination` says: a `.ckpt`, a `.pth`, or a folder."""
    from vavae_tools.checkpoints.formats import read_any_format, write_any_format
    from vavae_tools.checkpoints.resuming import resume_path

    if Path(destination).exists():
        raise UserError(f"{destination} exists already: name another place, or remove it")
    source = resume_path(str(source), Path(), log)
    written = write_any_format(read_any_format(source, log), destination)
    log(f"written: {written} (from {source})")
    return written


def verify_checkpoints(folder: str | Path, log: Callable[[str], None] = print) -> None:
    """Read a checkpoint, or all of a run, and print of each whether it is whole; raise where one is not."""
    from vavae_tools.checkpoints.formats import is_checkpoint
    from vavae_tools.checkpoints.resuming import checkpoint_info

    folder = Path(folder)
    found = [checkpoint_info(folder)] if folder.is_file() or is_checkpoint(folder) else _found(folder)
    faults = {c.path: c.damage() for c in found}
    for path, fault in faults.items():
        log(f"{path}: {fault or 'whole'}")
    damaged = [path.name for path, fault in faults.items() if fault]
    if damaged:
        raise UserError(
            f"{len(damaged)} of {len(found)} in {folder} damaged: {', '.join(damaged)}. Remove them; --resume last "
            "takes a whole one"
        )


def _found(folder: Path) -> list["Checkpoint"]:
    from vavae_tools.checkpoints.foreign import contents
    from vavae_tools.checkpoints.resuming import checkpoints_in

    found = checkpoints_in(folder, also=("*.ckpt", "*.pth"))
    if not found:
        raise UserError(
            f"No checkpoints in {folder}: it {contents(folder)}; expected a run's folder with last.ckpt, best-*.ckpt "
            "or checkpoint-*/, there or in checkpoints/"
        )
    return found


def _log_weights(weights: dict[str, Any], log: Callable[[str], None]) -> None:
    parts: dict[str, list[Any]] = {}
    for name, tensor in weights.items():
        names = name.split(".")
        deep = 2 if names[0] in ("network", "vavae") else 1
        parts.setdefault(".".join(names[:deep]), []).append(tensor)
    for part, tensors in parts.items():
        kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
        log(f"{part}: {sum(tensor.numel() for tensor in tensors):,} weights in {len(tensors):,} tensors, {kinds}")


def _size(number: int) -> str:
    return f"{number / 1e6:,.2f} MB"


if __name__ == "__main__":
    run_command(main)
