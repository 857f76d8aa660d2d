"""Look after checkpoints: what is there, is it whole, what is in it, which may go, and from one kind to another."""

import time
from argparse import ArgumentParser
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vavae_tools.runtime.console import clock
from vavae_tools.runtime.errors import UserError, command_parser, contents, run_command

if TYPE_CHECKING:
    from vavae_tools.checkpoints.resuming import Checkpoint


def main() -> None:
    parser = command_parser("python -m vavae_tools.checkpoints", __doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, function: Callable[..., None], **paths: str) -> ArgumentParser:
        text = function.__doc__
        command = commands.add_parser(name, help=text[0].lower() + text[1:], description=text, allow_abbrev=False)
        command.set_defaults(function=function)
        for path, meaning in paths.items():
            command.add_argument(path, metavar=path.upper(), help=meaning)
        return command

    run, one = "a run's folder, or the checkpoints/ in it", "a .ckpt, .pth or checkpoint folder"
    add("list", list_checkpoints, folder=run)
    add("inspect", inspect_checkpoint, path=one)
    prune = add("prune", prune_checkpoints, folder=run)
    prune.add_argument("--keep", type=int, required=True, metavar="N", help="how many stay; last and best-* always do")
    prune.add_argument("--dry_run", action="store_true", help="say what would go, and remove nothing")
    new = "NAME.ckpt, NAME.pth or a folder's name, which does not exist yet"
    add("convert", convert_checkpoint, source=one, destination=new)
    trust = add("trust", trust_file, source=f"{one}, whose origin you trust: reading it may run code")
    trust.add_argument("destination", metavar="DESTINATION", help="what is written; it does not exist yet")
    add("verify", verify_checkpoints, folder=f"{run}; or one alone")
    options = vars(parser.parse_args())
    options.pop("function")(**options)


def list_checkpoints(folder: str) -> None:
    """Print a table of a run's checkpoints: step, epoch, metric, size, age, whole or damaged."""
    rows = [("checkpoint", "step", "epoch", "metric", "size", "age", "state")]
    for c in _found(Path(folder)):
        name = str(c.path.relative_to(folder)) if c.path.is_relative_to(folder) else str(c.path)
        place = ["-" if number is None else f"{number:,}" for number in (c.step, c.epoch)]
        fault = c.damage()
        state = "whole" if fault is None else f"damaged: {fault}"
        rows.append((name, *place, c.metric or "-", _size(c.bytes), clock(time.time() - c.written), state))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers, state in rows:
        cells = [number.rjust(width) for number, width in zip(numbers, widths[1:-1], strict=True)]
        print("  ".join([name.ljust(widths[0]), *cells, state]))


def inspect_checkpoint(path: str) -> None:
    """Print what is in a checkpoint: weights by part, optimisers, hyper-parameters, versions."""
    from vavae_tools.checkpoints import formats, resuming

    checkpoint, found = formats.read_any_format(path, print), resuming.checkpoint_info(path)
    fault = found.damage()
    print(f"{path}: {_size(found.bytes)}, {'whole' if fault is None else f'damaged ({fault})'}")
    print(f"step {checkpoint.get('global_step', '-')}, epoch {checkpoint.get('epoch', '-')}")
    _print_weights(checkpoint.get("state_dict", {}))
    for number, state in enumerate(checkpoint.get("optimizer_states", [])):
        groups = state.get("param_groups", [])
        rates = ", ".join(f"{group['lr']:g}" for group in groups if "lr" in group)
        print(f"optimiser {number}: {sum(len(group['params']) for group in groups):,} tensors, lr {rates}")
    for number, state in enumerate(checkpoint.get("lr_schedulers", [])):
        print(f"schedule {number}: step {state.get('last_epoch', '-')}")
    run = checkpoint.get("run") or {}
    versions = {"lightning": checkpoint.get("pytorch-lightning_version", "-"), **run.get("versions", {})}
    print("versions: " + ", ".join(f"{name} {number}" for name, number in versions.items()))
    if run.get("command"):
        print("command: " + " ".join(map(str, run["command"])))
    for name, value in checkpoint.get("hyper_parameters", {}).items():
        print(f"  {name}: {value}")


def prune_checkpoints(folder: str, keep: int, dry_run: bool) -> None:
    """Remove a run's periodic checkpoints (checkpoint-*) but the newest whole ones."""
    from vavae_tools.checkpoints.resuming import keep_newest

    _found(Path(folder))
    gone = keep_newest(folder, keep, thoroughly=True, dry_run=dry_run)
    for checkpoint in gone:
        print(f"{'would go' if dry_run else 'removed'}: {checkpoint.path} ({_size(checkpoint.bytes)})")
    print(f"{_size(sum(c.bytes for c in gone))} {'would be ' if dry_run else ''}freed by {len(gone)} checkpoints")


def convert_checkpoint(source: str, destination: str) -> None:
    """Write a checkpoint as another kind: .ckpt, .pth, or a folder."""
    from vavae_tools.checkpoints import formats, resuming

    _refuse_existing(destination)
    path = resuming.resume_path(source, Path(), print)
    written = formats.write_any_format(formats.read_any_format(path, print), destination)
    print(f"written: {written} (from {path})")


def trust_file(source: str, destination: str) -> None:
    """Open what holds more than tensors, and write its tensors and plain values, which every command opens."""
    from vavae_tools.checkpoints.trusted import write_plain

    _refuse_existing(destination)
    written, left = write_plain(source, destination)
    without = f"; left out: {', '.join(left)}" if left else ""
    print(f"written: {written} (from {source}{without})")


def verify_checkpoints(folder: str) -> None:
    """Read everything, and end with status 2 where a checkpoint is damaged."""
    from vavae_tools.checkpoints import formats, resuming

    path = Path(folder)
    alone = path.is_file() or formats.is_checkpoint(path)
    faults = {c.path: c.damage() for c in ([resuming.checkpoint_info(path)] if alone else _found(path))}
    for name, fault in faults.items():
        print(f"{name}: {fault or 'whole'}")
    damaged = [name.name for name, fault in faults.items() if fault]
    if damaged:
        found = f"{len(damaged)} of {len(faults)} in {folder} damaged: {', '.join(damaged)}"
        raise UserError(f"{found}. Remove them; --resume last takes a whole one")


def _refuse_existing(destination: str) -> None:
    if Path(destination).exists():
        raise UserError(f"{destination} exists already: name another place, or remove it")


def _found(folder: Path) -> list["Checkpoint"]:
    from vavae_tools.checkpoints.resuming import checkpoints_in

    found = checkpoints_in(folder, also=("*.ckpt", "*.pth"))
    if not found:
        expected = "a run's folder with last.ckpt, best-*.ckpt or checkpoint-*/, there or in checkpoints/"
        raise UserError(f"No checkpoints in {folder}: it {contents(folder)}; expected {expected}")
    return found


def _print_weights(weights: dict[str, Any]) -> None:
    parts: dict[str, list[Any]] = {}
    for name, tensor in weights.items():
        names = name.split(".")
        deep = 2 if names[0] in ("network", "vavae") else 1
        parts.setdefault(".".join(names[:deep]), []).append(tensor)
    for part, tensors in parts.items():
        kinds = ", ".join(sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors}))
        print(f"{part}: {sum(tensor.numel() for tensor in tensors):,} weights in {len(tensors):,} tensors, {kinds}")


def _size(number: int) -> str:
    return f"{number / 1e6:,.2f} MB"


if __name__ == "__main__":
    run_command(main)
