"""Any number of samples to files, batch by batch: resumable, from one process or several.

Batches are cut at the same places whenever the same set is asked for, and one of which anything is missing is made
whole again: the last bits of a sample depend on its batch, and so a set that was interrupted equals one that was not.
"""

import inspect
import json
import os
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from itertools import count
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from vavae_tools.diffusion.solvers import lay_out
from vavae_tools.diffusion.variations import first_order, usual_strength
from vavae_tools.pipelines.base import PLAN, DenoiserPipeline, ImagePipeline, digest_of
from vavae_tools.pipelines.batches import batch_size_for, move_to_device, precision_for
from vavae_tools.pipelines.classes import LatentDiTPipeline, load_pipeline
from vavae_tools.pipelines.formats import RECORD, JsonlFile, NpzFile, PngFolder, PromptPngFolder, SampleFiles, begin
from vavae_tools.pipelines.given import between_images, from_images
from vavae_tools.pipelines.text import TextToImagePipeline
from vavae_tools.pipelines.tokens import Prompt, TokenImagePipeline, as_prompts, check_sampling
from vavae_tools.runtime.console import BarLines, is_interactive, log
from vavae_tools.runtime.errors import UserError, check_known, in_home
from vavae_tools.runtime.files import write_json
from vavae_tools.runtime.launch import call_on_ranks, several_processes
from vavae_tools.runtime.machine import device_of, trying_convolutions
from vavae_tools.runtime.ranks import Ranks

_PER_SAMPLE_ARGUMENTS = ("negative", "generators", "prompts", "num_samples", "seed", "batch_size", "numbers", "start")


def write_samples(
    pipe: LatentDiTPipeline | str | Path,
    labels: Iterable[int | str],
    output_dir: str | Path,
    seed: int = 0,
    names: Sequence[str] | None = None,
    format: str = "png",
    overwrite: bool = True,
    image: str | Path | None = None,
    strength: float | None = None,
    mask_image: str | Path | None = None,
    interpolate: tuple[str | Path, str | Path] | None = None,
    **settings: Any,
) -> list[Path]:
    """Make an image for each label, and return the files; those that are there, of the same settings, are kept.

    Args:
        pipe: or the path of one, as `load_pipeline` takes it: then all GPUs of this machine make images.
        seed: the n-th image of a label follows from it, the label and n; other seeds and labels can stand beside.
        names: folder names in the order of the labels that the pipeline knows, in place of its own.
        format: "png": `output_dir/ID_k/seed0_00000.png` …, where a split and any classifier find them. "npz": one file
            `samples_NxHxWx3.npz` as ADM's evaluator reads it: arr_0 uint8 (N, H, W, 3), arr_1 the labels int64 (N,),
            both in the order of `labels`.
        overwrite: what if the folder holds images of other settings: True replaces them, False raises an error.
        image: file or folder of images that are varied, `strength` and the file `mask_image` as of the pipeline's call:
            a person's own, in a folder of that name, where there are some among them, else all in turn.
        interpolate: two files; each label's images lead from the one to the other, as `pipe.interpolate` makes them.
        settings: arguments of `pipe.make`; batch_size, made at once; both it and the precision are by default as before
            in this folder, or the machine's own; ranks, the processes that share the work; until, the `time.time()`
            from which on no batch is begun: then nothing is returned, and the same call makes the rest.
    """
    if isinstance(pipe, str | Path):
        settings |= {"labels": list(labels), "output_dir": output_dir, "seed": seed, "names": names, "format": format}
        settings |= {"image": image, "strength": strength, "mask_image": mask_image, "interpolate": interpolate}
        arguments = {"path": pipe, "settings": {**settings, "overwrite": overwrite}}
        if several := several_processes():
            return call_on_ranks(f"{__name__}:_load_and_write", arguments, several)
        return _load_and_write(**arguments)
    labels, output_dir = pipe.labels_of(labels), in_home(output_dir)
    if settings.get("num_inference_steps") is None:
        settings["num_inference_steps"] = pipe.usual_steps
    check_known("format", format, ("png", "npz"))
    if not labels:
        raise UserError("No labels: at least one image is needed")
    folders, counts = _folder_names(pipe, names), defaultdict(count)
    numbers = [next(counts[label]) for label in labels]  # how often each came before
    paths = [f"{folders[label]}/seed{seed}_{n:05d}.png" for label, n in zip(labels, numbers, strict=True)]
    if format == "png":
        files = PngFolder(output_dir, paths, {str(label): folders[label] for label in sorted(set(labels))})
    else:
        files = NpzFile(output_dir, labels, seed, pipe.image_size)
    draws, solver = torch.tensor(labels) * 1_000_003 + torch.tensor(numbers), pipe.scheduler
    from_given, record = None, {}
    if image is None and (strength is not None or mask_image is not None):
        raise UserError(
            f"{'mask_image' if strength is None else 'strength'} without an image: name one, or leave it out"
        )
    if interpolate is not None:
        if image is not None:
            raise UserError("image and interpolate: images are varied, or made between two, so give one of them")
        pipe.scheduler, settings["guidance_scale"] = first_order(solver, pipe.objective), 1.0
        of_steps = ("num_inference_steps", "timestep_shift", "precision")
        steps = {name: settings[name] for name in of_steps if name in settings}
        from_given, record = between_images(pipe, interpolate, labels, usual_strength(strength, usual=0.8), **steps)
    elif image is not None:
        strength = usual_strength(strength, mask_image)
        from_given, record = from_images(pipe, image, strength, mask_image)

    def asked(start: int, stop: int) -> dict[str, Any]:
        arguments = {"labels": labels[start:stop], "output_type": "pt", "latents": pipe.noise(seed, draws[start:stop])}
        return arguments if from_given is None else arguments | from_given(labels[start:stop], numbers[start:stop])

    try:
        return _write(pipe, files, asked, record, overwrite=overwrite, **settings)
    finally:
        pipe.scheduler = solver


def _load_and_write(path: str | Path, settings: dict[str, Any]) -> list[Path]:
    ranks = Ranks.from_environment()
    if ranks.rank:
        ranks.share(PLAN)  # one process says what is wrong
    return write_samples(move_to_device(load_pipeline(path), device_of(ranks.local_rank)), ranks=ranks, **settings)


def _folder_names(pipe: LatentDiTPipeline, names: Sequence[str] | None) -> dict[int, str]:
    by_label = sorted((label, name) for name, label in pipe.people.items())
    if names is None:
        return dict(by_label)
    if len(names) != len(by_label):
        first, last = (f"label {label} ({name})" for label, name in (by_label[0], by_label[-1]))
        found = f"The class list has {len(names)} names, the model {len(by_label)} classes"
        raise UserError(f"{found}: write one line for each, from {first} to {last}")
    return {label: name for (label, _), name in zip(by_label, names, strict=True)}


def write_prompt_samples(
    pipe: TextToImagePipeline,
    prompts: Sequence[str],
    output_dir: str | Path,
    num_samples: int | None = None,
    seed: int = 0,
    negative_prompt: str | None = None,
    **settings: Any,
) -> list[Path]:
    """Write `00000.png` …, the prompts taken in turn, and `grid.png` with the first of them and their prompts.

    They are `num_samples` in all, by default one for each prompt; image number i follows from the seed, i and its
    prompt. Settings are those of `write_samples`, and overwrite is false by default.
    """
    prompts = [prompt.strip() for prompt in prompts]
    if not prompts:
        raise UserError("No prompts: at least one is needed")
    of_files = {f"{number:05d}.png": prompts[number % len(prompts)] for number in range(num_samples or len(prompts))}
    prompts = list(of_files.values())

    def asked(start: int, stop: int) -> dict[str, Any]:
        numbers = torch.arange(start, stop)
        noise = {"latents": pipe.noise(seed, numbers), "generator": pipe.generators(seed, numbers)}
        return {"prompt": prompts[start:stop], "negative_prompt": negative_prompt, **noise, "output_type": "pt"}

    files = PromptPngFolder(in_home(output_dir), list(of_files), of_files)
    return _write(pipe, files, asked, {"seed": seed, "negative_prompt": negative_prompt}, **settings)


def write_texts(
    pipe: TokenImagePipeline,
    output_dir: str | Path,
    prompts: Sequence[Prompt] = (),
    num_samples: int | None = None,
    seed: int = 0,
    **settings: Any,
) -> Path:
    """Write `texts.jsonl`, {"text": …, "prompt": …} in each line, and `grid.png` with the first of their images.

    They are `num_samples` in all, by default one for each prompt, which are taken in turn, or without prompts 100 texts
    of their own. All else is as in `write_prompt_samples`.
    """
    prompts = as_prompts(prompts) if len(prompts) else []
    texts = (len(prompts) or 100) if num_samples is None else num_samples
    check_sampling(num_samples=texts, **settings)
    pipe.beginnings(prompts or None)

    def asked(start: int, stop: int) -> dict[str, Any]:
        own = [prompts[number % len(prompts)] for number in range(start, stop)] if prompts else None
        return {"prompts": own, "numbers": range(start, stop), "seed": seed}

    files = JsonlFile(in_home(output_dir), texts, prompts)
    _write(pipe, files, asked, {"prompts": prompts, "texts": texts, "seed": seed}, **settings)
    return files.path


# ---- what they share
def _write(
    pipe: DenoiserPipeline,
    files: SampleFiles,
    asked: Callable[[int, int], dict[str, Any]],
    also: dict[str, Any],
    batch_size: int | None = None,
    overwrite: bool = False,
    ranks: Ranks | None = None,
    until: float | None = None,
    **sampling: Any,
) -> list[Path]:
    """Make the batches of which anything is missing, each process its share, and return the files when all are done.

    `asked` turns the first number and the one behind the last into arguments of the pipeline's call; `also` is what
    samples follow from besides `sampling` and the models.
    """
    ranks, plan = ranks or Ranks(), None
    if ranks.rank == 0:
        usual, wanted = batch_size_for(pipe, batch_size), sampling.get("precision")
        settings = _settings_of(pipe, {**sampling, "precision": precision_for(pipe, wanted)}, also)
        record = begin(files, settings, wanted, overwrite)
        at_once, precision = batch_size or record.get("batch_size", usual), record["settings"]["precision"]
        precision_for(pipe, precision)  # which this machine has, or says what to take
        write_json(files.output_dir / RECORD, {**record, "batch_size": at_once})
        cut = [(start, min(start + at_once, files.count)) for start in range(0, files.count, at_once)]
        missing = [files.missing(batch) for batch in cut]
        todo = [batch for batch, lacks in zip(cut, missing, strict=True) if lacks]
        plan = {"cut": cut, "todo": todo, "missing": sum(missing), "batch_size": at_once, "precision": precision}
    plan = ranks.share(PLAN, plan)
    todo, there = plan["todo"][ranks.rank :: ranks.size], files.count - plan["missing"]
    sampling |= {"precision": plan["precision"], "batch_size": plan["batch_size"]}
    many = trying_convolutions() if len(todo) >= 8 else nullcontext()  # from which on it pays
    bars, often = getattr(pipe, "_progress_bar_config", {}), 0.1 if is_interactive() else 60  # in a file seldom
    pipe.set_progress_bar_config(disable=True)
    bar = tqdm(desc="sampling", total=files.count, initial=there, unit=files.unit, mininterval=often, maxinterval=often,
               dynamic_ncols=True, disable=ranks.rank > 0, file=None if is_interactive() else BarLines())  # fmt: skip
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool, many, bar:
        waiting: deque[list[Future]] = deque()

        def show(tasks: list[Future]) -> None:
            made = ranks.add("made", sum(task.result() for task in tasks))  # by all processes
            bar.update(there + made - bar.n)

        following = pool.submit(asked, *todo[0]) if todo else None
        for number, batch in enumerate(todo, 1):
            if until is not None and time.time() > until:
                break
            arguments = following.result()
            if number < len(todo):  # drawn while the device is busy with this one
                following = pool.submit(asked, *todo[number])
            made = pipe(**arguments, **sampling)
            waiting.append([pool.submit(*task) for task in files.tasks(batch, made)])
            if len(waiting) > 1:  # the disk may be behind by one batch
                show(waiting.popleft())
        for tasks in waiting:
            show(tasks)
        ranks.add("ended", 1)
        while ranks.rank == 0 and ranks.add("ended", 0) < ranks.size:
            time.sleep(0.05)
            show([])
    pipe.set_progress_bar_config(**bars)
    if ranks.rank:
        return []
    if missing := sum(map(files.missing, plan["cut"])):
        log(f"The session's time is nearly over: {missing:,} of {files.count:,} {files.unit}s are not made yet")
        return []
    return files.finish(plan["cut"])


def _settings_of(pipe: DenoiserPipeline, sampling: dict[str, Any], also: dict[str, Any]) -> dict[str, Any]:
    """Check the settings, and return all that samples follow from besides their number and what is asked."""
    given = inspect.signature(getattr(pipe, "make", type(pipe).__call__)).bind_partial(**sampling)
    given.apply_defaults()
    settings = {name: value for name, value in given.arguments.items() if name not in _PER_SAMPLE_ARGUMENTS}
    if isinstance(pipe, ImagePipeline):
        steps = settings["num_inference_steps"], settings.get("timestep_shift")
        lay_out(pipe.scheduler, *steps, objective=pipe.objective)  # which checks them
        by = settings.get("guide") or also.get("negative_prompt")
        if not pipe.is_guided(by):
            settings["guidance_scale"] = 1.0
        elif settings["guidance_scale"] != 1 and by is None:
            pipe.conditioner.null(1)  # which is there, or says what to do
    if settings.get("guide"):
        settings["guide"] = digest_of(*settings["guide"])
    return json.loads(json.dumps({**settings, **pipe.facts(), **also}, default=str))
