"""Numbered samples on disk: image files, ADM's .npz, lines of texts.

What they follow from is compared with `samples.json` beside them, so that samples of two settings never mix.
"""

import json
import re
import shutil
import sys
import textwrap
import zipfile
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from PIL import Image
from torch import Tensor

from vavae_tools.data.images import save_image
from vavae_tools.pipelines.tokens import Prompt, TokenImageOutput
from vavae_tools.plots import image_grid, show_images
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import atomic_write, read_json
from vavae_tools.runtime.machine import PRECISIONS

RECORD, GRID = "samples.json", "grid.png"
MAX_GRID_IMAGES = 64  # images in a grid, at most
Batch = tuple[int, int]  # numbers of its first sample and behind its last one


class SampleFiles:
    """The files of a set of samples 0 … count − 1 in a folder."""

    globs: tuple[str, ...]  # where the files of such sets, also of other settings, are
    ours: re.Pattern[str]  # the names that nothing else has
    family, unit = "folders", "image"  # key in the record of `shown`, name → what it shows; of each kind of pipeline
    order: dict[str, Any] | None = None  # what gives a sample its number, where not every set of a folder has the same

    def __init__(self, output_dir: Path, count: int, shown: dict[str, str]) -> None:
        self.output_dir, self.count, self.shown = output_dir, count, shown

    @classmethod
    def found(cls, folder: Path) -> list[Path]:
        return [path for glob in cls.globs for path in folder.glob(glob) if cls.ours.fullmatch(path.name)]


class PngFolder(SampleFiles):
    """A file for each image, by default in a folder for each class."""

    globs, ours = ("*/*.png",), re.compile(r"seed\d+_\d{5,}\.png")

    def __init__(self, output_dir: Path, names: Sequence[str], shown: dict[str, str]) -> None:
        super().__init__(output_dir, len(names), shown)
        self.paths = [output_dir / name for name in names]

    def missing(self, batch: Batch) -> int:
        return sum(not path.is_file() for path in self.paths[slice(*batch)])

    def tasks(self, batch: Batch, made: ImagePipelineOutput) -> list[tuple]:
        """Return functions with their arguments that write a batch and return how many samples were new."""
        return [(self._write, *each) for each in zip(made.images, self.paths[slice(*batch)], strict=True)]

    def _write(self, image: Tensor, path: Path) -> int:
        if new := not path.is_file():
            save_image(image, path)
        return new

    def finish(self, batches: Sequence[Batch]) -> list[Path]:
        """Bring the files into their last form, when all are there, and return them."""
        return self.paths


class PromptPngFolder(PngFolder):
    """00000.png …, and a grid of the first of them, each below its prompt."""

    globs, ours, family = ("*.png",), re.compile(r"\d{5,}\.png|grid\.png"), "prompts"

    def finish(self, batches: Sequence[Batch]) -> list[Path]:
        first = self.paths[:MAX_GRID_IMAGES]
        titles = [textwrap.shorten(self.shown[path.name], 90, placeholder=" …") for path in first]
        images = [Image.open(path).convert("RGB") for path in first]
        with atomic_write(self.output_dir / GRID) as partial:
            show_images(images, min(8, len(images)), titles, 1.6).savefig(partial, format="png")
        return self.paths


class OneFile(SampleFiles):
    """All in one file; until they are, a file for each batch in a hidden folder."""

    path: Path
    part: str  # path of a batch's file, with places for its first number and the one behind its last

    def _part(self, batch: Batch) -> Path:
        return self.output_dir / self.part.format(*batch)

    def missing(self, batch: Batch) -> int:
        return 0 if self.path.is_file() or self._part(batch).is_file() else batch[1] - batch[0]

    def tasks(self, batch: Batch, made: Any) -> list[tuple]:
        return [(self._write, batch, made)]

    def _write(self, batch: Batch, made: Any) -> int:
        with atomic_write(self._part(batch)) as partial:
            self.write(partial, batch, made)
        return batch[1] - batch[0]

    def finish(self, batches: Sequence[Batch]) -> list[Path]:
        if not self.path.is_file():
            with atomic_write(self.path) as partial:
                self.join(partial, [self._part(batch) for batch in batches])
        shutil.rmtree(self._part((0, 0)).parent, ignore_errors=True)
        return [self.path]


class NpzFile(OneFile):
    """arr_0 uint8 (N, H, W, 3) and arr_1 the labels int64 (N,), as ADM's evaluator reads it."""

    globs, ours = ("samples_*.npz", ".parts/*.npy"), re.compile(r"samples_\d+x\d+x\d+x3\.npz|\d+-\d+\.npy")
    part = ".parts/{:08d}-{:08d}.npy"

    def __init__(self, output_dir: Path, labels: list[int], seed: int, size: tuple[int, int]) -> None:
        super().__init__(output_dir, len(labels), {})
        self.labels, self.shape = np.array(labels, dtype=np.int64), (len(labels), *size, 3)
        self.path = output_dir / f"samples_{'x'.join(map(str, self.shape))}.npz"
        self.order = {"seed": seed, "labels": cycle(labels), "num_samples": len(labels)}

    def write(self, path: Path, batch: Batch, made: ImagePipelineOutput) -> None:
        with path.open("wb") as file:
            np.save(file, made.images.permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy())  # (n, H, W, 3), grey too

    def join(self, path: Path, parts: list[Path]) -> None:
        arrays = {"arr_0": ("|u1", self.shape, map(np.load, parts)), "arr_1": ("<i8", (self.count,), [self.labels])}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, (kind, shape, rows) in arrays.items():
                header = {"descr": kind, "fortran_order": False, "shape": shape}
                with archive.open(f"{name}.npy", "w", force_zip64=True) as file:  # dated 1980: always the same bytes
                    np.lib.format.write_array_header_1_0(file, header)
                    for some in rows:
                        file.write(some.tobytes())


class JsonlFile(OneFile):
    """texts.jsonl, {"text": …, "prompt": …} in each line, and a grid of the first batch's images."""

    globs, ours = ("texts.jsonl", GRID, ".texts/*.jsonl"), re.compile(r"texts\.jsonl|grid\.png|\d+-\d+\.jsonl")
    part, family, unit = ".texts/{:05d}-{:05d}.jsonl", "texts", "text"

    def __init__(self, output_dir: Path, count: int, prompts: Sequence[Prompt]) -> None:
        super().__init__(output_dir, count, {})
        self.prompts, self.path = prompts, output_dir / "texts.jsonl"

    def write(self, path: Path, batch: Batch, made: TokenImageOutput) -> None:
        if batch[0] == 0:
            images = made.images[:MAX_GRID_IMAGES]
            images = images[:, : 3 if images.shape[1] >= 3 else 1]  # codes may have other numbers of channels
            save_image(image_grid(images, min(8, len(images))), self.output_dir / GRID)
        with path.open("w", encoding="utf-8", newline="\n") as file:
            for number, text in enumerate(made.texts, batch[0]):
                asked = {"prompt": self.prompts[number % len(self.prompts)]} if self.prompts else {}
                file.write(json.dumps({"text": text, **asked}, ensure_ascii=False) + "\n")

    def join(self, path: Path, parts: list[Path]) -> None:
        path.write_bytes(b"".join(part.read_bytes() for part in parts))


# ---- what a folder's samples follow from
_MODELS = ("model", "guide", "text encoder", "image", "mask")  # settings that are digests
_GUIDANCE = {"guidance_scale": "cfg_scale or guide_scale", "guidance_interval": "cfg_interval"}
_OPTIONS = {"num_inference_steps": "num_steps", **_GUIDANCE}  # settings whose names in the command are others


def begin(files: SampleFiles, settings: dict[str, Any], precision: str | None, overwrite: bool) -> dict[str, Any]:
    """Compare with what is there, remove what is replaced, and return the record of what will be made.

    Its batch size is the one of before, if any, and so is its precision where none is asked for.
    """
    folder, record, foreign, of_order = files.output_dir, {}, [], []
    with suppress(UserError):  # a damaged one is as good as none
        record = read_json(folder / RECORD)
    record = record if isinstance(record.get("settings"), dict) else {}
    own, formats = files.found(folder), (PngFolder, NpzFile) if files.family == "folders" else (type(files),)
    old = [path for kind in formats for path in kind.found(folder)]
    family = "texts" if "texts" in record.get("settings", {}) else "prompts" if "prompts" in record else "folders"
    if record and family != files.family:
        raise UserError(f"{folder} holds samples of another kind of pipeline ({RECORD}): name another --output_dir")
    if not old:
        record = {}  # of samples that are gone, or were never made
    elif record:
        there, shown = {"precision": "32", **record["settings"]}, record.get(files.family, {})  # 32: the only one once
        kept = {**settings, "precision": there["precision"]}
        if precision is None and kept != settings and not _differences(there, kept):
            before, usual = (PRECISIONS[of["precision"]] for of in (kept, settings))
            again = f"--overwrite --precision {settings['precision']} makes it anew in {usual}"
            print(f"resuming in {before}, as what is there was made; {again}", file=sys.stderr)
            settings = kept
        other = [name for name, now in files.shown.items() if shown.get(name, now) != now][:1]
        foreign = _differences(there, settings)
        foreign += [f"{files.family[:-1]} of {change}" for change in _changes(shown, files.shown, other)]
        if files.order and "npz" in record and own:
            of_order = _changes(record["npz"], files.order, ("seed", "labels"))
    else:
        foreign = [f"{RECORD}, which says how they were made, is missing or damaged"]
    if (foreign or of_order) and not overwrite:
        found = f"{folder} holds {files.unit}s of other settings ({'; '.join(foreign + of_order)})"
        raise UserError(f"{found}: name another --output_dir, or replace them by --overwrite")
    for path in (path for glob in files.globs for path in folder.glob(f"{Path(glob).parent}/.*.partial")):
        path.unlink(missing_ok=True)  # what a killed run left unfinished
    for path in old if foreign else own if of_order else []:
        path.unlink()
        if path.parent != folder:
            with suppress(OSError):  # something else is in it
                path.parent.rmdir()
    kept = {} if foreign else record
    order = {"npz": files.order} if files.order else {}
    return {**kept, **order, "settings": settings, files.family: {**kept.get(files.family, {}), **files.shown}}


def _differences(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    found = [f"another {name}" for name in _MODELS if there.get(name) != here.get(name)]
    before, now = there.get("solver") or {}, here.get("solver") or {}
    names = sorted(before.keys() & now) if before.get("name") == now.get("name") else ["name"]  # diffusers may add some
    found += [f"solver's {change}" for change in _changes(before, now, names)]
    return found + _changes(there, here, sorted({*there, *here} - {*_MODELS, "solver"}))


def _changes(there: dict[str, Any], here: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Return in what two records differ, as ["seed 0 there, 3 here"]."""
    changed = [(name, there.get(name), here.get(name)) for name in names if there.get(name) != here.get(name)]
    return [f"{_OPTIONS.get(name, name)} {_short(old)} there, {_short(new)} here" for name, old, new in changed]


def _short(value: Any) -> str:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    return text if len(text) < 40 else text[:39] + "…"


def cycle(labels: Sequence[int]) -> str:
    """Return the labels until they repeat: "0,2" of [0, 2, 0, 2, 0]."""
    row = np.array(labels)
    length = next(n for n in range(1, len(row) + 1) if np.array_equal(row[n:], row[: len(row) - n]))
    return ",".join(map(str, labels[:length]))
