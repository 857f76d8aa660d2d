"""Pictures of prompts as files: resumable, on several devices, with a grid that shows each one's prompt."""

import inspect
import json
import re
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from tqdm.auto import tqdm

from vavae_tools.autoencoders.text_encoder import TextEncoder
from vavae_tools.diffusion.portions import Portions
from vavae_tools.diffusion.precision import precisions_for
from vavae_tools.diffusion.sample_record import RECORD, as_before, differences, digest_of
from vavae_tools.errors import UserError
from vavae_tools.files import write_json, written_whole
from vavae_tools.ranks import Ranks
from vavae_tools.screen import someone_looks

if TYPE_CHECKING:
    from vavae_tools.diffusion.text_pipeline import TextToImagePipeline

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
        precision = _begin(output_dir, wanted, settings_of(pipe, **given), overwrite, precisions)
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


def settings_of(pipe: "TextToImagePipeline", **sampling: Any) -> dict[str, Any]:
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
