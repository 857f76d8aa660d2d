"""Any number of pictures to files, batch by batch: resumable, from one process or several, as PNG files or one .npz.

What a set follows from stands beside it in `samples.json`, so that pictures of two settings never mix. Batches are cut
at the same places whenever the same set is asked for, and one of which anything is missing is made whole again: the
last bits of a picture depend on its batch, and so a set that was interrupted equals one that was not.
"""

import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from vavae_tools.diffusion.portions import Portions, placed
from vavae_tools.diffusion.precision import precisions_for
from vavae_tools.diffusion.sample_files import Npz, PictureFiles, Pngs, numbers_of
from vavae_tools.diffusion.sample_record import note_finished, note_start, settings_of
from vavae_tools.errors import UserError
from vavae_tools.launch import call_on_ranks, several_processes
from vavae_tools.machine import device_of, trying_convolutions
from vavae_tools.ranks import Ranks
from vavae_tools.screen import clock, someone_looks

if TYPE_CHECKING:
    from vavae_tools.diffusion.pipeline import LatentDiTPipeline

_MANY = 8
"""Batches from which on it pays that cuDNN tries its convolutions."""


def write_samples(
    pipe: "LatentDiTPipeline | str | Path",
    labels: Iterable[int | str],
    output_dir: str | Path,
    seed: int = 0,
    names: Sequence[str] | None = None,
    format: str = "png",
    batch_size: int | None = None,
    overwrite: bool = True,
    ranks: Ranks | None = None,
    **sampling: Any,
) -> list[Path]:
    """Make a picture for each label; those that are there already, of the same settings, are kept.

    Args:
        pipe: or the path of one, as `load_pipeline` takes it: then all GPUs of this machine make pictures.
        seed: the n-th picture of a label follows from it, the label and n; other seeds and labels can stand beside.
        names: folder names in the order of the labels that the pipeline knows, in place of its own.
        format: "png": `output_dir/ID_k/seed0_00000.png` …, where a split and any classifier find them. "npz": one file
            `samples_NxHxWx3.npz` as ADM's evaluator reads it: arr_0 uint8 (N, H, W, 3), arr_1 the labels int64 (N,),
            both in the order of `labels`.
        batch_size: pictures made at once, halved where memory runs out; None: as before in this folder, else by
            the memory there is.
        overwrite: what if the folder holds pictures of other settings: True replaces them, False raises an error.
        ranks: the processes that share the work. The first one returns when all are done.
        sampling: further arguments of `pipe.make`. Without a precision it is the one of the pictures that are there, of
            the same settings, where this machine has it; else the machine's own.

    Returns:
        The files, in the order of `labels`.

    Raises:
        UserError: an unknown label, names that do not fit, settings that cannot be, pictures of other settings, or
            memory that not even one picture fits into.
    """
    if isinstance(pipe, str | Path):
        settings = output_dir, seed, names, format, batch_size, overwrite
        return _write_on_all_devices(pipe, list(labels), settings, sampling)
    labels, ranks = pipe.labels_of(labels), ranks or Ranks()
    if not labels:
        raise UserError("No labels: at least one picture is needed")
    if format not in ("png", "npz"):
        raise UserError(f"No format {format!r}; there are png, npz")
    folders = _folder_names(pipe, names)
    files: PictureFiles
    if format == "npz":
        files = Npz(Path(output_dir), labels, pipe.picture_size)
    else:
        files = Pngs(Path(output_dir), labels, seed, folders)
    plan = None
    if ranks.rank == 0:
        usual, precisions = Portions(pipe, batch_size).at_once, precisions_for(pipe, sampling.get("precision"))
        settings = settings_of(pipe, {**sampling, "precision": precisions[0]})
        at_once, finished, precision = note_start(
            files, settings, folders, labels, seed, batch_size, usual, overwrite, precisions
        )
        files.clear_up()
        there = files.there()
        batches = cut(len(labels), at_once, finished)
        todo = [(start, stop) for start, stop in batches if not there[start:stop].all()]
        plan = {"batch_size": at_once, "todo": todo, "missing": int((~there).sum()), "precision": precision}
    plan = ranks.share("plan", plan)
    with Progress(len(labels), plan["missing"], hidden=ranks.rank > 0) as progress:
        _make_all(pipe, files, plan, labels, seed, sampling, ranks, progress)
        if ranks.rank == 0:
            while ranks.add("ended", 0) < ranks.size:
                progress.at(ranks.add("made", 0))
                time.sleep(0.1)
            files.finish()
            note_finished(files, len(labels))
            progress.at(ranks.add("made", 0))
    return files.paths()


def _write_on_all_devices(
    checkpoint: str | Path, labels: list[int | str], settings: tuple, sampling: dict[str, Any]
) -> list[Path]:
    several = several_processes()
    if several is None:
        return _write_on_this_device(checkpoint, labels, settings, sampling)
    arguments = {"checkpoint": checkpoint, "labels": labels, "settings": settings, "sampling": sampling}
    return call_on_ranks(f"{__name__}:_write_on_this_device", arguments, *several)


def _write_on_this_device(
    checkpoint: str | Path, labels: list[int | str], settings: tuple, sampling: dict[str, Any]
) -> list[Path]:
    from vavae_tools.diffusion.pipeline import load_pipeline  # which offers this file's functions, too

    ranks = Ranks.from_environment()
    if ranks.rank:
        ranks.share("plan")  # once the first has found nothing wrong: one process says what is
    pipe = placed(load_pipeline(checkpoint), device_of(ranks.local_rank))
    return write_samples(pipe, labels, *settings, ranks, **sampling)


# ---- making


def _make_all(
    pipe: "LatentDiTPipeline",
    files: PictureFiles,
    plan: dict[str, Any],
    labels: list[int],
    seed: int,
    sampling: dict[str, Any],
    ranks: Ranks,
    progress: "Progress",
) -> None:
    in_portions, device = Portions(pipe, plan["batch_size"]), pipe._execution_device
    sampling = {**sampling, "precision": plan["precision"]}
    of_label = torch.tensor(numbers_of(labels))
    all_labels = torch.tensor(labels)
    todo = plan["todo"][ranks.rank :: ranks.size]
    draw = [all_labels[start:stop] * 1_000_003 + of_label[start:stop] for start, stop in todo]
    waiting: deque[list[Future]] = deque()
    many = trying_convolutions() if len(todo) >= _MANY else nullcontext()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, many:
        noise = pool.submit(pipe.noise, seed, draw[0]) if todo else None
        for number, (start, stop) in enumerate(todo):
            of_batch = noise.result()
            if number + 1 < len(todo):  # drawn while the device is busy with this one
                noise = pool.submit(pipe.noise, seed, draw[number + 1])
            batch = all_labels[start:stop].to(device), of_batch.to(device)

            def make(rows: slice, batch: tuple[Tensor, Tensor] = batch) -> Tensor:
                return pipe.make(*(values[rows] for values in batch), **sampling).cpu()

            pictures = torch.cat(in_portions(stop - start, make))
            waiting.append([pool.submit(*task) for task in files.tasks(start, pictures)])
            while len(waiting) > 1:  # the disk may be behind by one batch
                progress.at(_written(waiting.popleft(), ranks))
        while waiting:
            progress.at(_written(waiting.popleft(), ranks))
    pipe.maybe_free_model_hooks()  # of `enable_model_cpu_offload`
    ranks.add("ended", 1)


def _written(tasks: list[Future], ranks: Ranks) -> int:
    return ranks.add("made", sum(task.result() for task in tasks))


def cut(total: int, batch_size: int, seam: int = 0) -> list[tuple[int, int]]:
    """Batches as (start, stop) of pictures 0 … total − 1, none of them across the seam.

    >>> cut(9, 4, seam=5)
    [(0, 4), (4, 5), (5, 9)]
    """
    ends = [0, seam, total] if 0 < seam < total else [0, total]
    return [
        (start, min(start + batch_size, end))
        for begin, end in pairwise(ends)
        for start in range(begin, end, batch_size)
    ]


def _folder_names(pipe: "LatentDiTPipeline", names: Sequence[str] | None) -> dict[int, str]:
    by_label = sorted((label, name) for name, label in pipe.people.items())
    if names is None:
        return dict(by_label)
    if len(names) != len(by_label):
        (first, first_name), (last, last_name) = by_label[0], by_label[-1]
        raise UserError(
            f"The class list has {len(names)} names, the model {len(by_label)} classes: write one line for each, from "
            f"label {first} ({first_name}) to label {last} ({last_name})"
        )
    return {label: name for (label, _), name in zip(by_label, names, strict=True)}


# ---- what is said meanwhile


class Progress:
    """A bar with pictures a second on a screen or in a notebook; a line now and then where output is piped.

    Args:
        total: pictures in all.
        missing: those of them that will be made.
        hidden: says nothing, as all but one of several processes.
        say: takes the lines.
    """

    def __init__(
        self, total: int, missing: int, hidden: bool = False, say: Callable[[str], None] | None = None
    ) -> None:
        self.total, self.missing, self.made = total, missing, 0
        self.hidden, self.say = hidden, say or (lambda line: print(line, file=sys.stderr, flush=True))
        self.bar: tqdm | None = None

    def __enter__(self) -> "Progress":
        self.began = self.said_at = time.monotonic()
        self.said = 0
        if not self.hidden and someone_looks():
            there = self.total - self.missing
            self.bar = tqdm(total=self.total, initial=there, desc="sampling", unit="picture", dynamic_ncols=True)
        return self

    def at(self, made: int) -> None:
        """So many new pictures are written."""
        self.made, now = made, time.monotonic()
        if self.bar is not None:
            self.bar.update(self.total - self.missing + made - self.bar.n)
        elif made and not self.hidden and made - self.said >= self.missing / 20 and now - self.said_at >= 10:
            left = (now - self.began) * (self.missing - made) / made
            self.say(f"sampling: {made:,} of {self.missing:,} pictures, {self._rate()}, {clock(left)} left")
            self.said, self.said_at = made, now

    def __exit__(self, kind: type | None, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()
        if kind is None and not self.hidden and not (self.bar is not None and self.made):
            there = self.total - self.missing
            kept = f"; {there:,} were there" if there else ""
            passed = clock(time.monotonic() - self.began)
            self.say(f"sampling: {self.made:,} pictures made in {passed}, {self._rate()}{kept}")

    def _rate(self) -> str:
        return f"{self.made / max(time.monotonic() - self.began, 1e-9):.3g} pictures/s"
