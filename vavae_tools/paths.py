"""Where a notebook or command stands: its images, its split, and the folder its outputs survive in."""

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from vavae_tools.data.folders import EXTENSIONS, best_home, list_folders, person_folders
from vavae_tools.data.split_report import INFO_NAME
from vavae_tools.runtime.errors import UserError, in_home, join_first

KAGGLE_INPUT, KAGGLE_WORKING = Path("/kaggle/input"), Path("/kaggle/working")
MADE = (INFO_NAME, "samples.json")  # in folders of images that were made here
MAX_DEPTH = 8
"""Levels below a root that are searched for what was made: a run lies some levels below an output's top."""
MAX_SEARCH_DEPTH = 5
"""Levels below a root that are searched for person folders: Kaggle mounts at …/datasets/OWNER/NAME/ANY/FOLDER."""


def _below_work(name: str) -> property:
    return property(lambda paths: paths.work / name)


@dataclass(frozen=True, repr=False)
class ProjectPaths:
    """The folders of one project: notebooks 01 to 05 hand over to each other through them."""

    images: Path | None  # person folders; None: the built-in data are to be used
    work: Path  # what is written goes below it
    attached: tuple[Path, ...] = ()  # folders below which earlier notebooks' outputs and datasets are, read only

    def __repr__(self) -> str:
        return f"images: {self.images or 'simulated walkers (none were found or named)'}\noutputs:  {self.work}"

    def folders_with(self, mark: str) -> Iterator[Path]:
        return folders_with((self.work, *self.attached), mark)

    split = _below_work("data_split")
    vavae = _below_work("vavae")
    latents = _below_work("latents")
    dit = _below_work("dit")
    rae = _below_work("rae")
    text = _below_work("text")
    tokens = _below_work("tokens")
    samples = _below_work("samples")
    evaluation = _below_work("evaluation")


def find_paths(
    images: str | Path | None = None,
    work: str | Path | None = None,
    input_roots: Sequence[Path] = (KAGGLE_INPUT,),
    working_root: Path = KAGGLE_WORKING,
) -> ProjectPaths:
    """Find images and a folder for outputs: what is given, else what Kaggle mounted, else the built-in data.

    `images` (person folders) and `work` may also be given by the environment, as `VAVAE_PICTURES` and `VAVAE_WORK`.
    """
    images = images or os.environ.get("VAVAE_PICTURES")
    work = work or os.environ.get("VAVAE_WORK") or (working_root if working_root.is_dir() else "outputs")
    images, work = images and in_home(images), in_home(work)
    if images and not images.is_dir():
        raise UserError(f"No such folder: {images}. Name the folder that holds ID_1, ID_2 …")
    attached = attached_roots(input_roots)
    return ProjectPaths(images or _person_folders(attached), work, attached)


def attached_roots(input_roots: Sequence[Path] = (KAGGLE_INPUT,)) -> tuple[Path, ...]:
    """Return the folders below which data sets and outputs are attached; `VAVAE_INPUT` names others than Kaggle's."""
    roots = [Path(root) for root in os.environ.get("VAVAE_INPUT", "").split(os.pathsep) if root] or input_roots
    return tuple(root for root in roots if root.is_dir())


def _person_folders(roots: Iterable[Path]) -> Path | None:
    """Return the folder nearest below `roots` that holds at least two folders with images."""
    level, alone = list(roots), []
    for _ in range(MAX_SEARCH_DEPTH + 1):
        level = [folder for folder in level if not any((folder / mark).is_file() for mark in MADE)]
        people = {folder: [n for n, images in list_folders(folder, EXTENSIONS).items() if images] for folder in level}
        alone += [folder / names[0] for folder, names in people.items() if len(names) == 1]
        if homes := [folder for folder, names in people.items() if len(names) > 1]:
            return best_home(homes, EXTENSIONS)
        level = [folder / name for folder in level for name in person_folders(folder)]
    if len(named := [folder for folder in alone if re.fullmatch(r"ID_\d+", folder.name)]) > 1:
        raise UserError(f"{join_first(named)} lie in folders of their own: put the persons' folders into one data set")
    return None


def find_split(work: str | Path | None = None) -> Path:
    """Return the split that `data_split.py` wrote in its usual places; without one, raise a `UserError`."""
    tried = [find_paths(work=work).split, Path("data_split")]
    for folder in tried:
        if (folder / INFO_NAME).is_file():
            return folder
    looked = " or ".join(str(folder) for folder in tried)
    raise UserError(f"No split in {looked}: run data_split.py first, or name it with --data_dir")


def folders_with(roots: Iterable[Path], mark: str) -> Iterator[Path]:
    """Yield those of `walked` that hold a file."""
    return (folder for folder, files in walked(roots) if mark in files)


def walked(roots: Iterable[Path]) -> Iterator[tuple[Path, list[str]]]:
    """Yield each of `roots` and the folders below, with its files' names; none hidden, none below what `MADE` names."""
    for root in roots:
        for name, folders, files in os.walk(root):
            folder = Path(name)
            yield folder, files
            ends = len(folder.relative_to(root).parts) >= MAX_DEPTH or not set(MADE).isdisjoint(files)
            folders[:] = [] if ends else sorted(each for each in folders if not each.startswith("."))
