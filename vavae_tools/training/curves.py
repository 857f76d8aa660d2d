"""The curves of a run: one figure of `metrics.csv` of all its sessions, after training and while it goes on."""

import csv
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from math import ceil, isfinite
from pathlib import Path
from typing import TYPE_CHECKING
from uuid import uuid4

import lightning as L
from lightning.pytorch.loggers import CSVLogger

from vavae_tools.checkpoints.resuming import best_checkpoint, checkpoint_info
from vavae_tools.evaluation.verdicts import judge_losses, memorising_since
from vavae_tools.plots import as_image, new_figure
from vavae_tools.runtime.console import for_a_cell, in_notebook, log, show_image
from vavae_tools.runtime.errors import StoppedAtOnce, UserError, in_home, one_line

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Points = list[tuple[int, float]]  # of step and value

PANELS = {
    "loss": {"train/loss": "training", "val/loss": "validation"},
    "PSNR, dB": {"val/psnr": "validation"},
    "accuracy": {"val/accuracy": "reconstructions", "val/real_accuracy": "originals"},
    "Fréchet ratio": {"val/frechet_ratio": "to the originals' distance"},
    "samples": {"val/sample_accuracy": "accuracy", "val/copies": "suspected copies", "val/usable": "usable"},
    "nearest training image": {"val/nearest_ratio": "distance, times validation images'"},
    "learning rate": {"train/lr": "learning rate"},
}
"""What is plotted where it is logged: the axis' name → the logged value → its line's name."""
COLUMNS = 3
SECONDS_BETWEEN = 30.0  # a figure takes 0.3 s on one core: with this 1 % of the time at most


def plot_training(run: str | Path) -> "Figure":
    """Plot losses, PSNR, accuracy, Fréchet ratio and learning rate, as logged, over a run's steps.

    Args:
        run: the `output_dir` of a training. Its sessions continue each other, a broken line where it was resumed; the
            stages of the recipe staged follow each other.
    """
    logged, marks = _read(in_home(run))
    panels = {label: {name: logged[name] for name in names if name in logged} for label, names in PANELS.items()}
    panels = {label: lines for label, lines in panels.items() if lines} or {"loss": {}}
    rows, columns = ceil(len(panels) / COLUMNS), min(COLUMNS, len(panels))
    figure = new_figure((3.6 * columns, 2.7 * rows))
    for i, (label, lines) in enumerate(panels.items()):
        ax = figure.add_subplot(rows, columns, i + 1)
        for name, points in lines.items():
            marker = "o" if len(points) < 40 else None
            ax.plot(*zip(*points, strict=True), marker=marker, markersize=2.5, linewidth=1.2, label=PANELS[label][name])
        values = [value for points in lines.values() for _, value in points]
        _finish(ax, label, values, marks if i == 0 else dict.fromkeys(marks))
    return figure


def judge_training(run: str | Path) -> str:
    """Return a sentence on the losses of a run, whose `output_dir` it is: whether it memorises its images."""
    logged, _ = _read(in_home(run))
    return judge_losses(logged.get("train/loss", []), logged.get("val/loss", []))


def judge_export(run: Path, made: Path, checkpoint: Path, export: str, monitor: str) -> str:
    """Return which of a run's checkpoints something was made of, beside its last and best, and why another may fit.

    Args:
        made, checkpoint: what was made, and of what.
        export: what asked for that one.
        monitor: the logged value that the best is chosen by.
    """
    logged, _ = _read(run)
    folder, values = run / "checkpoints", {name: logged[name] for name in (monitor, "val/loss") if name in logged}
    known = checkpoint, best_checkpoint(folder), folder / "last.ckpt"
    steps = {path: checkpoint_info(path).step or 0 for path in known}

    def measured(path: Path) -> str:
        until = {name: [value for step, value in points if step < steps[path]] for name, points in values.items()}
        found = ", ".join(f"{name} {of[-1]:.4g}" for name, of in until.items() if of)
        return f"{path.name}, step {steps[path]:,}{': ' if found else ''}{found}"

    why = f"export={export}" if values or export != "best" else "export=best, but no image validates"
    others = [measured(path) for path in steps if steps[path] != steps[checkpoint]]
    line = "; ".join([f"{made} is made of {measured(checkpoint)} ({why})", *others])
    train, val = (logged.get(name, []) for name in ("train/loss", "val/loss"))
    since = memorising_since(train, val)
    return line if since is None or steps[checkpoint] <= since + 1 else f"{line}\n{judge_losses(train, val)}"


def _finish(ax: "Axes", label: str, values: list[float], marks: dict[int, str | None]) -> None:
    from matplotlib.ticker import LogLocator

    named: set[str | None] = set()
    for step, what in marks.items():
        ax.axvline(step, color="0.45", linewidth=0.9, linestyle=":", label=None if what in named else what)
        named.add(what)
    if not values:
        ax.set_title("nothing is logged yet", fontsize=10)
    elif label == "loss" and min(values) > 0 and max(values) > 10 * min(values):
        ax.set_yscale("log", subs=[])
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter("{x:g}")
    ax.spines[["top", "right"]].set_visible(False)
    ax.set(xlabel="step", ylabel=label)
    ax.grid(alpha=0.3)
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend(frameon=False, fontsize=8)


def _read(run: Path) -> "tuple[dict[str, Points], dict[int, str]]":
    """Return what is logged, and the steps at which a session or a stage began, with a name for it."""
    stages = [path.parent for path in (run / "lightning_logs", *sorted(run.glob("stage[0-9]/lightning_logs")))]
    stages = [stage for stage in stages if (stage / "lightning_logs").is_dir()]
    if not stages:
        expected = "expected lightning_logs/version_*/metrics.csv, as in the output_dir of a training"
        raise UserError(f"No curves in {run}: {expected}")
    logged, marks, before = defaultdict(list), {}, 0
    for stage in stages:
        if before:
            marks[before] = "next stage"
        own: dict[str, Points] = defaultdict(list)
        for session in _sessions(stage):
            rows = list(_values(session))
            first = min((step for name, step, _ in rows if "train/" in name or "val/" in name), default=None)
            if first is None:
                continue
            own = {name: [point for point in points if point[0] < first] for name, points in own.items()}
            if any(own.values()):
                marks[before + first] = "resumed"
            for name, step, value in rows:
                own.setdefault(name, []).append((step, value))
        for name, points in own.items():
            logged[name] += [(before + step, value) for step, value in points]
        before += 1 + max((step for points in own.values() for step, _ in points), default=0)
    return {name: points for name, points in logged.items() if points}, marks


def _sessions(run: Path) -> list[Path]:
    found = run.glob("lightning_logs/version_*/metrics.csv")
    return sorted(found, key=lambda path: (len(path.parent.name), path.parent.name))


def _values(path: Path) -> Iterator[tuple[str, int, float]]:
    """Yield names, steps and values; a line that was cut off by a session's end is left out."""
    with path.open(newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            for name, text in row.items():
                try:
                    step, value = int(row["step"]), float(text)
                except (TypeError, ValueError, KeyError):
                    continue
                if isfinite(value):
                    yield name, step, value


class LiveCurves(L.Callback):
    """Show the run's curves in the cell that trains: one figure, which every validation renews."""

    def __init__(self, folder: Path, log: Callable[[str], None] = log) -> None:
        self.folder, self.log_line = folder, log
        self._slot, self._drawn = uuid4().hex, None

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if not trainer.sanity_checking and (self._drawn is None or time.monotonic() - self._drawn > SECONDS_BETWEEN):
            self._draw(trainer)

    def on_train_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._draw(trainer)

    def _draw(self, trainer: L.Trainer) -> None:
        if not trainer.is_global_zero or not (in_notebook() or for_a_cell()):
            return
        for logger in trainer.loggers:
            if isinstance(logger, CSVLogger):
                logger.save()
        try:
            show_image(as_image(plot_training(self.folder)), self._slot, again=self._drawn is not None)
            self._drawn = time.monotonic()
        except StoppedAtOnce:
            raise
        except Exception as error:  # of any kind: hours of training are worth more than its curves
            self.log_line(f"curves left out at step {trainer.global_step:,}: {one_line(error, 200)}")
