"""Any number of pictures to files, batch by batch: resumable, from one process or several, as PNG files or one .npz.

What a set follows from stands beside it in `samples.json`, so that pictures of two settings never mix. Batches are cut
at the same places whenever the same set is asked for, and one of which anything is missing is made whole again: the
last bits of a picture depend on its batch, and so a set that was interrupted equals one that was not.
"""

import hashlib
import inspect
import json
import os
import re
import shutil
import sys
import textwrap
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from vavae_tools.diffusion.clip import TextEncoder
from vavae_tools.pipelines.formats import Npz, PictureFiles, Pngs, numbers_of
from vavae_tools.pipelines.portions import Portions, placed
from vavae_tools.pipelines.precision import precisions_for
from vavae_tools.pipelines.record import (
    RECORD,
    as_before,
    differences,
    digest_of,
    note_finished,
    note_start,
    settings_of,
)
from vavae_tools.pipelines.tokens import Prompt, TokenImagePipeline, Written, as_prompts, check_sampling
from vavae_tools.plots import picture_grid
from vavae_tools.runtime.console import clock, someone_looks
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import write_json, written_whole
from vavae_tools.runtime.launch import call_on_ranks, several_processes
from vavae_tools.runtime.machine import device_of
from vavae_tools.runtime.precision import trying_convolutions
from vavae_tools.runtime.ranks import Ranks

# ---- Pictures of prompts as files: resumable, on several devices, with a grid that shows each one's prompt


if TYPE_CHECKING:
    from vavae_tools.pipelines.text import TextToImagePipeline


GRID = "grid.png"
_MODELS = ("model", "text encoder")
SHOWN = 64
"""Pictures in the grid, at most."""


def write_prompted(
    pipe: "TextToImagePipeline",
    prompts: Sequence[str],
    output_dir: str | Path,
    num_samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    overwrite: bool = False,
    ranks: Ranks | None = None,
    negative_prompt: str | None = None,
    **sampling: Any,
) -> list[Path]:
    """Write `00000.png` …, the prompts taken in turn; those that are there already, of the same settings, are kept.

    `samples.json` says each file's prompt, and `grid.png` shows the first of them with theirs.

    Args:
        num_samples: pictures in all; by default one for each prompt.
        seed: picture number i follows from it, i and its prompt, whatever else is made beside it.
        batch_size: pictures made at once, halved where memory runs out; None: by the memory there is.
        overwrite: replace pictures of other settings.
        ranks: the processes that share the work; the first one returns when all are done.
        negative_prompt: what guidance leads away from; by default the empty prompt.
        sampling: further arguments of the pipeline, such as guidance_scale. Without a precision it is the one of the
            pictures that are there, of the same settings, where this machine has it; else the machine's own.

    Raises:
        UserError: no prompts, or pictures of other settings in the folder.
    """
    ranks, output_dir = ranks or Ranks(), Path(output_dir)
    prompts = [prompt.strip() for prompt in prompts]
    if not prompts:
        raise UserError("No prompts: at least one is needed")
    count = num_samples or len(prompts)
    of_files = [prompts[number % len(prompts)] for number in range(count)]
    paths = [output_dir / f"{number:05d}.png" for number in range(count)]
    plan = None
    if ranks.rank == 0:
        precisions = precisions_for(pipe, sampling.get("precision"))
        given = {**sampling, "precision": precisions[0], "seed": seed, "negative_prompt": negative_prompt}
        wanted = {path.name: prompt for path, prompt in zip(paths, of_files, strict=True)}
        precision = _begin(output_dir, wanted, settings_of_prompts(pipe, **given), overwrite, precisions)
        missing = [number for number, path in enumerate(paths) if not path.exists()]
        plan = {"precision": precision, "missing": missing}
    plan = ranks.share("prompts", plan)
    sampling, missing = {**sampling, "precision": plan["precision"]}, plan["missing"]
    mine, batch_size = missing[ranks.rank :: ranks.size], Portions(pipe, batch_size).at_once
    hidden = ranks.rank > 0 or not someone_looks()
    with tqdm(total=len(missing), desc="sampling", unit="picture", disable=hidden) as bar:
        for start in range(0, len(mine), batch_size):
            numbers = mine[start : start + batch_size]
            rows = torch.tensor(numbers)
            made = pipe(
                [of_files[number] for number in numbers],
                negative_prompt,
                latents=pipe.noise(seed, rows),
                generator=pipe.generators(seed, rows),
                batch_size=len(numbers),
                **sampling,
            ).images
            for number, picture in zip(numbers, made, strict=True):
                with written_whole(paths[number]) as partial:
                    picture.save(partial, format="png")
            bar.update(ranks.add("prompted", len(numbers)) - bar.n)
        while ranks.rank == 0 and ranks.add("prompted", 0) < len(missing):
            time.sleep(0.05)
            bar.update(ranks.add("prompted", 0) - bar.n)
    if ranks.rank == 0:
        grid_of(paths[:SHOWN], of_files[:SHOWN], output_dir / GRID)
    return paths


def settings_of_prompts(pipe: "TextToImagePipeline", **sampling: Any) -> dict[str, Any]:
    """All that pictures follow from, besides their prompt and number, as plain values."""
    given = inspect.signature(type(pipe).__call__).bind_partial(None, None, **sampling)
    given.apply_defaults()
    left_out = ("self", "prompt", "generator", "latents", "batch_size", "output_type", "return_dict")
    given = {name: value for name, value in given.arguments.items() if name not in left_out}
    solver = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    settings = {
        **given,
        "model": digest_of(pipe.denoiser, pipe.conditioner, pipe.vae),
        "text encoder": TextEncoder(pipe.text_encoder, pipe.tokenizer).digest(),
        "solver": {"name": type(pipe.scheduler).__name__, **solver},
    }
    return json.loads(json.dumps(settings, default=str))


def _begin(
    output_dir: Path, wanted: dict[str, str], settings: dict[str, Any], overwrite: bool, precisions: Sequence[str]
) -> str:
    """Write down what is to be made, where that does not contradict what is there; its precision."""
    record, there = _read(output_dir / RECORD), [path for path in output_dir.glob("*.png") if _is_ours(path.name)]
    foreign = ""
    if there and record is None:
        foreign = f"{RECORD}, which says how they were made, is missing or damaged"
    elif there:
        settings = as_before(settings, record["settings"], precisions, _MODELS)
        foreign = "; ".join(_differences(record, settings, wanted))
    if foreign and not overwrite:
        raise UserError(
            f"{output_dir} holds pictures of other settings ({foreign}), which would mix with these: name another "
            "--output_dir, or replace them by --overwrite"
        )
    if foreign:
        for path in there:
            path.unlink()
    prompts = wanted if foreign or not there else {**record["prompts"], **wanted}
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / RECORD, {"settings": settings, "prompts": prompts})
    return settings["precision"]


def _is_ours(name: str) -> bool:
    return name == GRID or re.fullmatch(r"\d{5,}\.png", name) is not None


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        return record if isinstance(record["settings"], dict) and isinstance(record["prompts"], dict) else None
    except (OSError, ValueError, LookupError, TypeError):  # none, or a damaged one, which is as good as none
        return None


def _differences(record: dict[str, Any], settings: dict[str, Any], wanted: dict[str, str]) -> list[str]:
    found = differences(record["settings"], settings, _MODELS)
    shown = record["prompts"]
    others = [name for name in wanted if shown.get(name, wanted[name]) != wanted[name]]
    return found + [f"{name} shows {shown[name]!r}, not {wanted[name]!r}" for name in others[:1]]


def grid_of(paths: Sequence[Path], prompts: Sequence[str], target: Path) -> None:
    """Draw pictures in rows, each below its prompt."""
    from vavae_tools.plots import show_pictures

    pictures = [_opened(path) for path in paths]
    titles = [textwrap.shorten(prompt, 90, placeholder=" …") for prompt in prompts]
    figure = show_pictures(pictures, min(8, len(pictures)), titles, 1.6)
    with written_whole(target) as partial:
        figure.savefig(partial, format="png")


def _opened(path: Path) -> Image.Image:
    try:
        with Image.open(path) as picture:
            return picture.convert("RGB")
    except OSError as error:
        raise UserError(f"{path} is no picture any more ({error}): delete it, and it is made anew") from None


if TYPE_CHECKING:
    from vavae_tools.pipelines.classes import LatentDiTPipeline


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
    return call_on_ranks(f"{__name__}:_write_on_this_device", arguments, several)


def _write_on_this_device(
    checkpoint: str | Path, labels: list[int | str], settings: tuple, sampling: dict[str, Any]
) -> list[Path]:
    from vavae_tools.pipelines.classes import load_pipeline

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


# ---- Texts of a token image model as a file: resumable, on several devices, with a grid of their pictures


TEXTS, GRID = "texts.jsonl", "grid.png"
_PARTS = ".texts"
"""Folder of what is made so far, START-STOP.jsonl with texts START to STOP − 1."""
_SHOWN = 64
"""Pictures in the grid, at most."""


def write_texts(
    pipe: TokenImagePipeline,
    output_dir: str | Path,
    prompts: Sequence[Prompt] = (),
    num_samples: int | None = None,
    seed: int = 0,
    batch_size: int | None = None,
    overwrite: bool = False,
    ranks: Ranks | None = None,
    **sampling: Any,
) -> Path:
    """Write `texts.jsonl`, {"text": …, "prompt": …} in each line, the prompts taken in turn; interrupted, it goes on.

    `samples.json` says how they were made, and `grid.png` shows the first of them as pictures.

    Args:
        num_samples: texts in all; by default one for each prompt, without prompts 100.
        seed: text number i follows from it, i and its prompt, whatever else is made beside it.
        batch_size: texts made at once, and between two savings, halved where memory runs out; None: by the
            memory there is.
        overwrite: replace texts of other settings.
        ranks: the processes that share the work; the first one returns when all are done.
        sampling: further arguments of the pipeline, such as num_inference_steps. Without a precision it is the one of
            the texts that are there, of the same settings, where this machine has it; else the machine's own.

    Raises:
        UserError: prompts or numbers that cannot be, or samples of other settings in the folder.
    """
    ranks, output_dir = ranks or Ranks(), Path(output_dir)
    prompts = as_prompts(prompts) if len(prompts) else []
    count = (len(prompts) or 100) if num_samples is None else num_samples
    plan, precision = None, sampling.pop("precision", None)
    if ranks.rank == 0:
        check_sampling(count, **sampling)
        pipe.beginnings(prompts or None)
        precisions = precisions_for(pipe, precision)
        batch_size = Portions(pipe, batch_size, "text").at_once
        settings = _settings_of(pipe, **sampling, precision=precisions[0])
        settings |= {"prompts": prompts, "texts": count, "seed": seed}
        precision = _begin_texts(output_dir, settings, overwrite, precisions)
        plan = {"precision": precision, "batch_size": batch_size, "todo": _missing(output_dir, count, batch_size)}
    plan = ranks.share("missing texts", plan)
    todo, sampling = plan["todo"], {**sampling, "precision": plan["precision"], "batch_size": plan["batch_size"]}
    hidden = ranks.rank > 0 or not someone_looks()
    with tqdm(total=sum(stop - start for start, stop in todo), desc="writing", unit="text", disable=hidden) as bar:
        for start, stop in todo[ranks.rank :: ranks.size]:
            asked = [prompts[number % len(prompts)] for number in range(start, stop)] if prompts else None
            made = pipe(asked, numbers=range(start, stop), seed=seed, **sampling)
            if start == 0:
                _draw(made, output_dir / GRID)
            with written_whole(_part(output_dir, start, stop)) as partial:
                partial.write_text(_lines(made, asked), encoding="utf-8", newline="\n")
            ranks.add("parts of texts", 1)
            bar.update(ranks.add("texts", stop - start) - bar.n)
        while ranks.rank == 0 and ranks.add("parts of texts", 0) < len(todo):
            time.sleep(0.05)
            bar.update(ranks.add("texts", 0) - bar.n)
    if ranks.rank == 0:
        if todo:
            with written_whole(output_dir / TEXTS) as partial, partial.open("wb") as file:
                for start, stop in sorted(_parts(output_dir)):
                    file.write(_part(output_dir, start, stop).read_bytes())
        shutil.rmtree(output_dir / _PARTS, ignore_errors=True)
    return output_dir / TEXTS


def _part(output_dir: Path, start: int, stop: int) -> Path:
    return output_dir / _PARTS / f"{start:05d}-{stop:05d}.jsonl"


def _parts(output_dir: Path) -> list[tuple[int, int]]:
    """First and last + 1 of the texts in each of the parts that are there."""
    names = [path.stem.split("-") for path in (output_dir / _PARTS).glob("[0-9]*-[0-9]*.jsonl")]
    return [(int(start), int(stop)) for start, stop in names]


def _missing(output_dir: Path, count: int, batch_size: int) -> list[tuple[int, int]]:
    """Batches that are still to be made, as first and last + 1."""
    if (output_dir / TEXTS).exists():
        return []
    todo, end = [], 0
    for start, stop in [*sorted(_parts(output_dir)), (count, count)]:
        todo += [(first, min(first + batch_size, start)) for first in range(end, start, batch_size)]
        end = stop
    return todo


def _settings_of(pipe: TokenImagePipeline, **sampling: Any) -> dict[str, Any]:
    """All that texts follow from besides seed, prompt and number, as plain values."""
    given = inspect.signature(type(pipe).__call__).bind_partial(**sampling)
    given.apply_defaults()
    left_out = ("self", "prompts", "num_samples", "seed", "batch_size", "numbers")
    given = {name: value for name, value in given.arguments.items() if name not in left_out}
    of_models = ("denoiser", "conditioner", "tokenizer", "objective", "solver")
    if pipe.config.solver:
        given["solver"] = {"name": pipe.config.solver}
    of_pipeline = {k: v for k, v in pipe.config.items() if not k.startswith("_") and k not in of_models}
    words = [pipe.tokenizer.get_vocab(), pipe.tokenizer.chat_template]
    model = json.dumps([digest_of(pipe.denoiser, pipe.conditioner), of_pipeline, words], sort_keys=True)
    return {**given, "model": hashlib.sha256(model.encode()).hexdigest()}


def _begin_texts(output_dir: Path, settings: dict[str, Any], overwrite: bool, precisions: Sequence[str]) -> str:
    """Write down what is to be made, where that does not contradict what is there; its precision."""
    there, record = (output_dir / TEXTS).exists() or bool(_parts(output_dir)), output_dir / RECORD
    try:
        before = dict(json.loads(record.read_text(encoding="utf-8"))["settings"])
    except (OSError, ValueError, LookupError, TypeError):  # none, or a damaged one, which is as good as none
        before = None
    if before is not None and "texts" not in before:
        raise UserError(
            f"{output_dir} holds pictures, of which {RECORD} says how they were made: name another --output_dir"
        )
    foreign = f"{RECORD}, which says how they were made, is missing or damaged"
    if before is not None:
        settings = as_before(settings, before, precisions, ["model"])
        foreign = "; ".join(differences(before, settings, ["model"]))
    if there and foreign and not overwrite:
        raise UserError(
            f"{output_dir} holds texts of other settings ({foreign}): name another --output_dir, or replace them by "
            "--overwrite"
        )
    if foreign:
        (output_dir / TEXTS).unlink(missing_ok=True)
        shutil.rmtree(output_dir / _PARTS, ignore_errors=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(record, {"settings": settings})
    return settings["precision"]


def _lines(made: Written, asked: Sequence[Prompt] | None) -> str:
    rows = [{"text": text} for text in made.texts]
    if asked:
        rows = [{**row, "prompt": prompt} for row, prompt in zip(rows, asked, strict=True)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _draw(made: Written, path: Path) -> None:
    pictures = made.pictures[:_SHOWN]
    pictures = pictures[:, : 3 if pictures.shape[1] >= 3 else 1]  # codes may have other numbers of channels
    grid = picture_grid(pictures, min(8, len(pictures))).permute(1, 2, 0)  # (H, W, 3)
    with written_whole(path) as partial:
        Image.fromarray(grid.numpy()).save(partial, format="png")
