"""What earlier notebooks left, in the work folder and in attached outputs and datasets: the newest that fits is taken.

It fits where it follows from the images and models at hand, by their digests, whatever its folder is called. What is
attached is read where it is, and never written to.
"""

import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vavae_tools.data.datasets import ImageDataModule
from vavae_tools.data.demo.gait import write_gait_dataset
from vavae_tools.data.folders import extension_of, list_folders
from vavae_tools.data.latents import LatentFolder
from vavae_tools.data.split import split_folders
from vavae_tools.data.split_report import INFO_NAME, read_split_info
from vavae_tools.paths import ProjectPaths, walked
from vavae_tools.pipelines.classes import load_pipeline
from vavae_tools.pipelines.formats import RECORD
from vavae_tools.runtime.console import log
from vavae_tools.runtime.errors import UserError, join_first
from vavae_tools.runtime.files import atomic_write, read_checkpoint, read_json, read_weights
from vavae_tools.training.callbacks.record import NAME as RUN

_GROWING = ("lightning_logs", "samples", "reconstructions", "train.log")  # of a run that is resumed elsewhere

Log = Callable[[str], None]


class Stage(NamedTuple):
    what: str
    mark: str  # a file in its folder
    is_one: Callable[[Path], bool]  # whether a folder with this file is one
    misfit: Callable[[ProjectPaths, Path], str | None]  # what speaks against one
    make: str  # what makes one


def find_stage(place: ProjectPaths, stage: str, log: Log = log) -> Path:
    """Return the folder of a "split", "vavae", "pipeline" or "samples": the newest that fits.

    Log in one line what was taken and what was passed over.
    """
    what, mark, is_one, misfit, make = STAGES[stage]
    taken, passed = None, []
    found = filter(is_one, place.folders_with(mark))
    for folder in sorted(found, key=lambda each: _made(each / mark), reverse=True):
        why = misfit(place, folder) or ("older" if taken else None)
        if why is None:
            taken = folder
        else:
            passed.append(f"{folder} ({why})")
    if taken is None:
        roots = " or ".join(map(str, (place.work, *place.attached)))
        raise UserError(f"No fitting {what} in {roots}{_listed(passed)}: {make}, or attach the output of one")
    log(f"{what}: {taken}{_listed(passed)}")
    return taken


def find_or_make_split(place: ProjectPaths, log: Log = log, **settings: Any) -> Path:
    """Return the split that `find_stage` finds; where there is none, make the one that notebook 01 makes."""
    try:
        return find_stage(place, "split", log)
    except UserError as none:
        log(f"{none}. It is made now")
    log(str(split_folders(images_or_walkers(place), place.split, **{"test_ratio": None, **settings})))
    return place.split


def images_or_walkers(place: ProjectPaths) -> Path:
    """Return the folder of the images; where there are none, simulate walkers."""
    return place.images or write_gait_dataset(place.work / "gait", people=6, images=75, size=64)


def find_run(place: ProjectPaths, run: str, data: Path | LatentFolder, log: Log = log) -> str | None:
    """Return what `resume` takes to resume a run, "vavae" or "dit": the one here, else the furthest attached, or None.

    Curves and previews of an attached run are copied into the work folder, where it is resumed.

    Args:
        data: the split or the latents that it must have been trained on.
    """
    own, passed = place.work / run, []
    found = [each for each in place.folders_with("last.ckpt") if run in (each.parent.name, each.parts[-3])]
    held = {folder: _checkpoint(folder / "last.ckpt") for folder in found}
    steps = {folder: state.get("global_step", -1) for folder, state in held.items()}
    for folder in sorted(found, key=lambda each: (each.is_relative_to(own), steps[each]), reverse=True):
        if _trained_on_others(held[folder], data):
            passed.append(f"{folder.parent} (of other data)")
            continue
        log(f"resuming {folder.parent} at step {steps[folder]:,}" + _listed(passed))
        begun = Path(held[folder].get("hyper_parameters", {}).get("started_from") or own)
        elsewhere = any(begun.name in (at.name, *files) for at, files in walked((place.work, *place.attached)))
        if begun != own and not begun.exists() and not elsewhere:
            log(f"it began with {begun}, which is not here: attach it again, or it cannot be resumed as it was")
        if folder.is_relative_to(own):
            return "last"
        if folder.parent.name != run:  # a stage of several, each of which needs those before
            shutil.copytree(folder.parent.parent, own, dirs_exist_ok=True)
            return "last"
        copy_record(folder.parent, own, _GROWING)
        return str(folder / "last.ckpt")
    if passed:
        log(f"No {run} to resume{_listed(passed)}")
    return None


def copy_record(run: Path, own: Path, names: Sequence[str] = (*_GROWING, RUN)) -> None:
    """Copy curves, previews and the log of a run, and what it was, into a folder of its own."""
    for name in names:
        for path in [run / name, *(run / name).rglob("*")]:
            if path.is_file():
                with atomic_write(own / path.relative_to(run)) as partial:
                    shutil.copyfile(path, partial)


def _listed(passed: list[str]) -> str:
    return f"; passed over: {join_first(passed)}" if passed else ""


def _checkpoint(path: Path) -> dict[str, Any]:
    with suppress(UserError):  # a damaged one is told where it is resumed
        return read_checkpoint(path)
    return {}


def _trained_on_others(checkpoint: dict[str, Any], data: Path | LatentFolder) -> bool:
    trained_on = checkpoint.get("run", {}).get("data")
    if trained_on is None:
        return False
    if isinstance(data, LatentFolder):
        return trained_on != data.key
    return trained_on != _fingerprint(data, checkpoint["hyper_parameters"]["vavae_config"])


def _fingerprint(split: Path, vavae: dict[str, Any]) -> str:
    """Return the fingerprint of a split's images as a VA-VAE with this configuration reads them."""
    size = vavae["sample_size"]
    size = tuple(size) if isinstance(size, (list, tuple)) else size
    return ImageDataModule(split, size, channels=vavae["in_channels"], progress=False).fingerprint()


def _read(path: Path) -> dict[str, Any]:
    """Return what a JSON file holds; nothing of one that is not there, is damaged, or somebody else's."""
    with suppress(UserError):
        return read_json(path)
    return {}


def _made(mark: Path) -> float:
    """Return when a stage was made, in seconds since 1970: as its run says, else as its file does."""
    run = _read(mark.parent.parent / RUN)
    said = run.get("ended") or run.get("started")
    return datetime.fromisoformat(said).timestamp() if said else mark.stat().st_mtime


# ---- what each stage is, and what speaks against one
def _is_vavae(folder: Path) -> bool:
    part = folder.name == "autoencoder" or (folder.parent / "model_index.json").is_file()  # of a DiT's run
    return not part and _read(folder / "config.json").get("_class_name") == "VAVAE"


def _is_pipeline(folder: Path) -> bool:
    return "LatentDiTPipeline" in _read(folder / "model_index.json").get("_class_name", "")


def _other_images(place: ProjectPaths, folder: Path) -> str | None:
    if not (folder / "train").is_dir():
        return "without its images"
    try:
        split = {key: entry["bytes"] for key, entry in read_split_info(folder)["files"].items()}
    except UserError:
        return f"its {INFO_NAME} is damaged, or of another version"
    if place.images is None:
        return None
    people = list_folders(place.images, {extension_of(name) for name in split}, passed=[])
    here = {f"{person}/{path.name}": path.stat().st_size for person, paths in people.items() for path in paths}
    return None if here == split else f"of other images than {place.images}"


def _other_training(place: ProjectPaths, folder: Path) -> str | None:
    split, config = find_stage(place, "split", _silent), _read(folder / "config.json")
    if (trained_on := _read(folder.parent / RUN).get("data")) is not None:
        return None if _fingerprint(split, config) == trained_on else f"of other images than {split}"
    return _other_people(config["people"], split) if config.get("people") else None


def _other_vavae(place: ProjectPaths, folder: Path) -> str | None:
    people, split = _read(folder / "model_index.json").get("people"), find_stage(place, "split", _silent)
    if other := _other_people(people, split):
        return other
    with suppress(UserError):  # without one it has its own
        vavae = find_stage(place, "vavae", _silent)
        own, made_with = (sorted(read_weights(each).items()) for each in (folder / "vae", vavae))
        same = len(own) == len(made_with) and all(
            a == b and torch.equal(x, y) for (a, x), (b, y) in zip(own, made_with, strict=True)
        )
        return None if same else f"of another VA-VAE than {vavae}"
    return None


def _other_people(people: dict[str, int] | None, split: Path) -> str | None:
    return None if people == read_split_info(split)["labels"] else f"of other people than {split}"


def _other_pipeline(place: ProjectPaths, folder: Path) -> str | None:
    made_by, pipeline = _read(folder / RECORD).get("settings", {}), find_stage(place, "pipeline", _silent)
    return None if load_pipeline(pipeline).facts()["model"] == made_by.get("model") else f"not made by {pipeline}"


def _silent(line: str) -> None:
    pass


STAGES = {
    "split": Stage("split", INFO_NAME, lambda folder: True, _other_images, "run notebook 01"),
    "vavae": Stage("VA-VAE", "config.json", _is_vavae, _other_training, "run notebook 02"),
    "pipeline": Stage("pipeline", "model_index.json", _is_pipeline, _other_vavae, "run notebook 03"),
    "samples": Stage("samples", RECORD, lambda folder: True, _other_pipeline, "run notebook 04"),
}
