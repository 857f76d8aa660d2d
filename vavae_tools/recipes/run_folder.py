"""The folder of a run: where it writes, what it resumes from, and what was typed."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from itertools import chain, count
from pathlib import Path

import yaml

from vavae_tools.recipes.config import Experiment
from vavae_tools.runtime.errors import UserError, join_first
from vavae_tools.runtime.ranks import current_ranks, is_rank_zero

RUNS = Path("logs/runs")
_TURNS = count(1)


def run_folder(plan: Experiment, now: datetime | None = None) -> tuple[Path, str | None, str | None]:
    """Return where a run writes, what it resumes from, and a line about it.

    `resume=last` takes the newest run of the same experiment and writes into its folder, and so does a path into a
    run's folder; another checkpoint starts a folder of its own.
    """
    ranks = current_ranks()
    found = _run_folder(plan, now) if ranks.rank == 0 else None  # the clock says another second to each of them
    folder, *rest = ranks.share(f"vavae run folder {next(_TURNS)}", found and (str(found[0]), *found[1:]))
    return Path(folder), *rest


def _run_folder(plan: Experiment, now: datetime | None) -> tuple[Path, str | None, str | None]:
    resume = plan.recipe.resume
    if plan.recipe.output_dir is not None:
        return Path(plan.recipe.output_dir), resume, None
    if resume == "last":
        found = _newest_run(plan.name)
        return found, "last", f"resume=last: resuming {found}"
    for folder in (Path(resume), *Path(resume).parents) if resume else ():
        if (folder / ".hydra").is_dir():
            return folder, resume, f"resuming {folder}"
    begin = RUNS / f"{now or datetime.now():%Y-%m-%d/%H-%M-%S}"
    others = (begin.with_name(f"{begin.name}-{number}") for number in count(2))  # of the same second
    for folder in chain([begin], others):
        with suppress(FileExistsError):  # of several processes one makes it
            folder.mkdir(parents=True)
            return folder, resume, None


def _newest_run(name: str) -> Path:
    known = []
    for path in sorted(RUNS.glob("*/*/.hydra/config.yaml"), reverse=True):
        kept, run = yaml.safe_load(path.read_text(encoding="utf-8")) or {}, path.parent.parent
        of = kept.get("experiment") or kept.get("name")  # as older versions wrote it
        if of == name and any(run.glob("checkpoints/*.ckpt")):
            return run
        known.append(f"{run} ({of})")
    raise UserError(f"resume=last: no run of {name} with a checkpoint; in {RUNS}: {join_first(known) or 'none'}")


@contextmanager
def kept_config(plan: Experiment, words: Sequence[str], folder: Path) -> Iterator[None]:
    """Keep what was typed in a run's folder; where the training is refused, leave the folder as it was."""
    from vavae_tools.runtime.files import alone_in, atomic_write

    if not is_rank_zero():
        yield
        return
    made, kept = not folder.is_dir() or not any(folder.iterdir()), folder / ".hydra"
    with alone_in(folder):
        former, begun = {path: path.read_bytes() for path in kept.glob("*")}, _begun(folder)
        try:
            for name, value in (("config", plan.plain()), ("overrides", list(words))):  # as Hydra does
                with atomic_write(kept / f"{name}.yaml") as partial:
                    partial.write_text(yaml.safe_dump(value, sort_keys=False, allow_unicode=True), encoding="utf-8")
            yield
        except UserError:
            if _begun(folder) == begun:
                shutil.rmtree(folder if made else kept)
                for path, content in former.items():
                    path.parent.mkdir(exist_ok=True)
                    path.write_bytes(content)
            raise


def _begun(folder: Path) -> list[int]:
    return [path.stat().st_size for pattern in ("train.log", "*/train.log") for path in folder.glob(pattern)]
