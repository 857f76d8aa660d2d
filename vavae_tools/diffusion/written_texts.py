"""Texts of a token image model as a file: resumable, on several devices, with a grid of their pictures."""

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image
from tqdm.auto import tqdm

from vavae_tools.diffusion.sample_record import RECORD, changes, digest_of
from vavae_tools.diffusion.token_pipeline import Prompt, TokenImagePipeline, Written
from vavae_tools.errors import UserError
from vavae_tools.files import write_json, written_whole
from vavae_tools.plots import picture_grid
from vavae_tools.ranks import Ranks
from vavae_tools.screen import someone_looks

TEXTS, GRID = "texts.jsonl", "grid.png"
_PART = ".part-{:05d}.jsonl"


def write_texts(
    pipe: TokenImagePipeline,
    output_dir: str | Path,
    prompts: Sequence[Prompt] = (),
    num_samples: int | None = None,
    seed: int = 0,
    batch_size: int = 64,
    overwrite: bool = False,
    ranks: Ranks | None = None,
    **sampling: Any,
) -> Path:
    """Write `texts.jsonl`, {"text": …, "prompt": …} in each line, the prompts taken in turn; interrupted, it goes on.

    `samples.json` says how they were made, and `grid.png` shows the first of them as pictures.

    Args:
        num_samples: texts in all; by default one for each prompt, without prompts 100.
        seed: text number i follows from it, i and its prompt, whatever else is made beside it.
        batch_size: texts made at once, and between two savings.
        overwrite: replace texts of other settings.
        ranks: the processes that share the work; the first one returns when all are done.
        sampling: further arguments of the pipeline, such as num_inference_steps.

    Raises:
        UserError: texts of other settings in the folder.
    """
    ranks, output_dir = ranks or Ranks(), Path(output_dir)
    count = num_samples or len(prompts) or 100
    starts = range(0, count, batch_size)
    parts = [output_dir / _PART.format(number) for number in range(len(starts))]
    if ranks.rank == 0:
        model = digest_of(pipe.denoiser, pipe.conditioner)
        given = {"prompts": list(prompts), "texts": count, "seed": seed, "batch_size": batch_size, **sampling}
        _begin(output_dir, {"model": model, **given}, overwrite)
    missing = ranks.share("missing texts", _missing(output_dir, parts) if ranks.rank == 0 else None)
    hidden = ranks.rank > 0 or not someone_looks()
    with tqdm(total=len(missing) * batch_size, desc="writing", unit="text", disable=hidden) as bar:
        for part in missing[ranks.rank :: ranks.size]:
            numbers = range(starts[part], min(count, starts[part] + batch_size))
            asked = [prompts[number % len(prompts)] for number in numbers] if prompts else None
            made = pipe(asked, numbers=numbers, batch_size=batch_size, seed=seed, **sampling)
            if part == 0:
                _draw(made, output_dir / GRID)
            with written_whole(parts[part]) as partial:
                partial.write_text(_lines(made, asked), encoding="utf-8")
            bar.update(ranks.add("texts", len(numbers)) - bar.n)
        while ranks.rank == 0 and not all(part.exists() for part in parts) and missing:
            time.sleep(0.05)
            bar.update(ranks.add("texts", 0) - bar.n)
    if ranks.rank == 0 and missing:
        with written_whole(output_dir / TEXTS) as partial:
            partial.write_text("".join(part.read_text(encoding="utf-8") for part in parts), encoding="utf-8")
        for part in parts:
            part.unlink()
    return output_dir / TEXTS


def _missing(output_dir: Path, parts: list[Path]) -> list[int]:
    if (output_dir / TEXTS).exists():
        return []
    return [number for number, part in enumerate(parts) if not part.exists()]


def _begin(output_dir: Path, settings: dict[str, Any], overwrite: bool) -> None:
    """Write down what is to be made, where that does not contradict what is there."""
    settings = json.loads(json.dumps(settings, default=str))
    there = [path for path in (output_dir / TEXTS, *output_dir.glob(".part-*.jsonl")) if path.exists()]
    try:
        before = json.loads((output_dir / RECORD).read_text(encoding="utf-8"))["settings"]
        foreign = "; ".join(changes(before, settings, sorted({*before, *settings})))
    except (OSError, ValueError, LookupError, TypeError):  # none, or a damaged one, which is as good as none
        foreign = f"{RECORD}, which says how they were made, is missing or damaged"
    if there and foreign and not overwrite:
        raise UserError(
            f"{output_dir} holds texts of other settings ({foreign}): name another --output_dir, or replace them by "
            "--overwrite"
        )
    if foreign:
        for path in there:
            path.unlink()
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / RECORD, {"settings": settings})


def _lines(made: Written, asked: Sequence[Prompt] | None) -> str:
    rows = [{"text": text} for text in made.texts]
    if asked:
        rows = [{**row, "prompt": prompt} for row, prompt in zip(rows, asked, strict=True)]
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _draw(made: Written, path: Path) -> None:
    with written_whole(path) as partial:
        Image.fromarray(picture_grid(made.pictures[:64], 8).permute(1, 2, 0).numpy()).save(partial, format="png")
