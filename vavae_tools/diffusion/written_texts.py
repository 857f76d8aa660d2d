"""Texts of a token image model as a file: resumable, on several devices, with a grid of their pictures."""

import hashlib
import inspect
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from vavae_tools.diffusion.portions import Portions
from vavae_tools.diffusion.precision import precisions_for
from vavae_tools.diffusion.sample_record import RECORD, as_before, differences, digest_of
from vavae_tools.diffusion.token_pipeline import Prompt, TokenImagePipeline, Written, as_prompts, check_sampling
from vavae_tools.errors import UserError
from vavae_tools.files import write_json, written_whole
from vavae_tools.plots import picture_grid
from vavae_tools.ranks import Ranks
from vavae_tools.screen import someone_looks

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
        precision = _begin(output_dir, settings, overwrite, precisions)
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
    of_models = ("denoiser", "conditioner", "tokenizer")
    of_pipeline = {k: v for k, v in pipe.config.items() if not k.startswith("_") and k not in of_models}
    words = [pipe.tokenizer.get_vocab(), pipe.tokenizer.chat_template]
    model = json.dumps([digest_of(pipe.denoiser, pipe.conditioner), of_pipeline, words], sort_keys=True)
    return {**given, "model": hashlib.sha256(model.encode()).hexdigest()}


def _begin(output_dir: Path, settings: dict[str, Any], overwrite: bool, precisions: Sequence[str]) -> str:
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
