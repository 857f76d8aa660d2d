"""What the pictures of a folder follow from, in `samples.json` beside them, so that two settings never mix."""

import hashlib
import inspect
import json
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from vavae_tools.diffusion.solvers import lay_out
from vavae_tools.pipelines.formats import PictureFiles, npz_in, pngs_in, remove_npz, remove_pngs
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import weights_digest, write_json
from vavae_tools.runtime.precision import PRECISIONS

if TYPE_CHECKING:
    from vavae_tools.pipelines.classes import LatentDiTPipeline


RECORD = "samples.json"
_MODELS = ("model", "guide")

_SHOWN = {  # settings as the command calls them; the others have the same name there
    "num_inference_steps": "num_steps",
    "guidance_scale": "cfg_scale or guide_scale",
    "guidance_interval": "cfg_interval",
}


def settings_of(pipe: "LatentDiTPipeline", sampling: dict[str, Any]) -> dict[str, Any]:
    """All that pictures follow from, besides their seed, label and number, as plain values.

    Raises:
        UserError: settings that cannot be.
    """
    given = inspect.signature(pipe.make).bind(None, None, **sampling)
    given.apply_defaults()
    given = {name: value for name, value in given.arguments.items() if name not in ("labels", "noise")}
    steps = given["num_inference_steps"], given["timestep_shift"]
    lay_out(pipe.scheduler, *steps, objective=pipe.objective)  # which checks them
    guide = given["guide"]
    if guide is None and given["guidance_scale"] != 1:
        pipe.conditioner.null(1)  # which is there, or says what to do
    solver = {name: value for name, value in pipe.scheduler.config.items() if not name.startswith("_")}
    settings = {
        **given,
        "model": digest_of(pipe.denoiser, pipe.conditioner, pipe.vae),
        "guide": None if guide is None else digest_of(*guide),
        "solver": {"name": type(pipe.scheduler).__name__, **solver},
    }
    return json.loads(json.dumps(settings, default=str))


def note_start(
    files: PictureFiles,
    settings: dict[str, Any],
    names: dict[int, str],
    labels: list[int],
    seed: int,
    batch_size: int | None,
    usual_batch_size: int,
    overwrite: bool,
    precisions: Sequence[str] = (),
) -> tuple[int, int, str]:
    """Compare with what is there, remove it where it has to go, and note what will be made.

    Args:
        names: the folder of every label that the model knows.
        batch_size: None takes the one of before, in a new folder the usual one.
        precisions: that may take the place of the settings', see `as_before`.

    Returns:
        The batch size, how many pictures of this set a run finished before, and the precision.

    Raises:
        UserError: pictures of other settings, unless `overwrite`.
    """
    directory, kind = files.output_dir, files.kind
    record = _read(directory)
    used = {str(label): names[label] for label in sorted(set(labels))} if kind == "png" else {}
    folders = {*names.values(), *(record or {}).get("folders", {}).values()}
    now = {"seed": seed, "labels": cycle(labels), "num_samples": len(labels), "finished": 0}
    before = (record or {}).get(kind)
    all_foreign, npz_foreign = "", ""
    if not pngs_in(directory, folders) and not npz_in(directory):
        record = before = None  # of pictures that are gone, or were never made
    elif record is None:
        all_foreign = f"{RECORD}, which says how they were made, is missing"
    else:
        settings = as_before(settings, record["settings"], precisions, _MODELS)
        all_foreign = "; ".join(_differences(record, settings, used))
        npz_foreign = "; ".join(changes(before, now, ("seed", "labels"))) if kind == "npz" and before else ""
        npz_foreign = npz_foreign if before and not _same_order(before, now) else ""
    foreign = "; ".join(filter(None, (all_foreign, npz_foreign)))
    if foreign and not overwrite:
        raise UserError(
            f"{directory} holds pictures of other settings ({foreign}), which would mix with these: name another "
            "--output_dir, or replace them by --overwrite"
        )
    if foreign:
        remove_npz(directory)
        before = None
    if all_foreign:
        remove_pngs(directory, folders)
        record = None
    if before and _same_order(before, now):
        now = before if before["num_samples"] >= len(labels) else {**now, "finished": before["finished"]}
    record = record or {}
    other = {name: record[name] for name in ("png", "npz") if name in record}
    new = {
        "settings": settings,
        "batch_size": batch_size or record.get("batch_size", usual_batch_size),
        "folders": {**record.get("folders", {}), **used},
        **other,
        kind: now,
    }
    if new != record:
        write_json(directory / RECORD, new)
    return new["batch_size"], now["finished"], settings["precision"]


def note_finished(files: PictureFiles, count: int) -> None:
    """Note that so many pictures are there."""
    record = _read(files.output_dir)
    if record is not None and record[files.kind]["finished"] < count:
        record[files.kind]["finished"] = count
        write_json(files.output_dir / RECORD, record)


def digest_of(*models: Any) -> str:
    digest = hashlib.sha256()
    for model in models:
        config = {name: value for name, value in model.config.items() if not name.startswith("_")}
        digest.update(json.dumps([weights_digest(model), config], sort_keys=True, default=str).encode())
    return digest.hexdigest()


def _read(directory: Path) -> dict[str, Any] | None:
    try:
        record = json.loads((directory / RECORD).read_text(encoding="utf-8"))
        return record if {"settings", "batch_size", "folders"} <= record.keys() else None
    except (OSError, ValueError, AttributeError):  # none, or a damaged one, which is as good as none
        return None


def _differences(record: dict[str, Any], settings: dict[str, Any], folders: dict[str, str]) -> list[str]:
    found = differences(record["settings"], settings, _MODELS)
    of_folders = {name: record["folders"].get(name, folder) for name, folder in folders.items()}
    found += [f"folder of label {change}" for change in changes(of_folders, folders, folders)][:1]
    return found


def differences(there: dict[str, Any], here: dict[str, Any], models: Sequence[str]) -> list[str]:
    """In what settings differ, those of `models` without their digests."""
    there = _with_precision(there)
    found = [f"another {name}" for name in models if there.get(name) != here[name]]
    solvers = there.get("solver") or {}, here.get("solver") or {}
    same_kind = solvers[0].get("name") == solvers[1].get("name")
    names = sorted(solvers[0].keys() & solvers[1]) if same_kind else ["name"]  # another diffusers may have more
    found += [f"solver's {change}" for change in changes(*solvers, names)]
    return found + changes(there, here, sorted({*there, *here} - {*models, "solver"}))


def as_before(
    settings: dict[str, Any],
    there: dict[str, Any],
    precisions: Sequence[str],
    models: Sequence[str],
    say: Callable[[str], None] = lambda line: print(line, file=sys.stderr),
) -> dict[str, Any]:
    """Settings with the precision of what is there, if that is one of these and nothing else differs.

    Args:
        precisions: the settings' own first, and those that would do as well, see `precision.precisions_for`.
    """
    kept = {**settings, "precision": _with_precision(there)["precision"]}
    if kept == settings or kept["precision"] not in precisions or differences(there, kept, models):
        return settings
    before, usual = (PRECISIONS[of["precision"]] for of in (kept, settings))
    say(f"going on in {before}, as what is there was made; --overwrite --precision {settings['precision']} makes it "
        f"anew in {usual}")  # fmt: skip
    return kept


def _with_precision(settings: dict[str, Any]) -> dict[str, Any]:
    return {"precision": "32", **settings}  # the only one until there was a choice


def changes(there: dict[str, Any], here: dict[str, Any], names: Iterable[str]) -> list[str]:
    """
    >>> changes({"seed": 0, "labels": "1"}, {"seed": 3, "labels": "1"}, ["seed", "labels"])
    ['seed 0 there, 3 here']
    """
    return [
        f"{_SHOWN.get(name, name)} {_short(there.get(name))} there, {_short(here.get(name))} here"
        for name in names
        if there.get(name) != here.get(name)
    ]


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 40 else text[:39] + "…"


def cycle(labels: list[int]) -> str:
    """The labels until they repeat, which over and over are `labels`.

    >>> cycle([0, 2, 0, 2, 0]), cycle([0, 0, 1])
    ('0,2', '0,0,1')
    """
    border = [0] * len(labels)  # the longest beginning that is an end, too, of each beginning (Knuth–Morris–Pratt)
    for i in range(1, len(labels)):
        k = border[i - 1]
        while k and labels[i] != labels[k]:
            k = border[k - 1]
        border[i] = k + (labels[i] == labels[k])
    return ",".join(map(str, labels[: len(labels) - border[-1]]))


def _same_order(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether one set goes on where the other ends: the same seed, and the same label at every number of both."""
    shorter = min(before["num_samples"], now["num_samples"])
    a, b = (np.resize(np.array(of["labels"].split(",")), shorter) for of in (before, now))
    return before["seed"] == now["seed"] and bool((a == b).all())
