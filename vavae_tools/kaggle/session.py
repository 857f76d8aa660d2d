"""From session to session on Kaggle: what the next one needs goes into a private dataset, and comes out of it again.

A dataset is one tar, `small-files.pack` (Kaggle unpacks what is called .zip or .tar), and a manifest with every file's
place, length and hash, `session-DIGEST.json`: its name tells whether the new version is listed yet. Older versions kept
large files beside the tar; they are read as well.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import IO, Any

from vavae_tools.checkpoints.formats import place_in
from vavae_tools.data.folders import IMAGE_EXTENSIONS
from vavae_tools.data.split_report import INFO_NAME, SUBSETS
from vavae_tools.paths import KAGGLE_INPUT, MAX_SEARCH_DEPTH
from vavae_tools.runtime.errors import UserError, in_home
from vavae_tools.runtime.files import atomic_write, read_checkpoint, read_json, write_json

NEEDED = (
    *("last.ckpt", "best-*.ckpt", "epoch=*.ckpt", "*.safetensors", "*.pt", "*.json", "*.yaml"),
    *("chat_template.jinja", "merges.txt", "vocab.txt"),  # of tokenizers
)
WHOLE_FOLDERS = ("lightning_logs", "checkpoint-*")
NEVER = ("foundation", "__pycache__")  # features of the foundation model are gigabytes, and soon made again
OF_RUN = ("checkpoints", *WHOLE_FOLDERS, "vavae", "autoencoder", "pipeline")  # never new checkpoints with old models
RUNS = ("checkpoints", "vavae/checkpoints", "vavae/*/checkpoints", "dit/checkpoints", "logs/runs/*/*/checkpoints")
MANIFEST = re.compile(r"session-[0-9a-f]{12}\.json")
PACK = "small-files.pack"
INSTEAD = 'push again, or take the version before it ("owner/name/NUMBER")'
DATASET = re.compile(r"([A-Za-z0-9][A-Za-z0-9_-]*)/([a-z0-9][a-z0-9-]{4,48}[a-z0-9])(?:/[1-9][0-9]*)?")

Log = Callable[[str], None]


class Unavailable(UserError):
    """What a notebook can do without: no credentials, no client, no network, nothing from an earlier session."""


@dataclass(frozen=True)
class Session:
    source: str  # the dataset or the folder it came from; where it was pushed to
    steps: dict[str, tuple[int, int]]  # for each run, a folder below `work`, the last checkpoint's step and epoch
    files: tuple[str, ...]  # those that were written
    kept: tuple[str, ...] = ()  # folders that are newer here

    def __str__(self) -> str:
        runs = [f"{run} at step {step:,} (epoch {epoch:,})" for run, (step, epoch) in self.steps.items()]
        return f"{self.source}: {', '.join(runs) or 'no checkpoints'}"


def push_session(
    work: str | Path, dataset: str | None, message: str = "", images: bool = False, wait: float = 600, log: Log = print
) -> Session | None:
    """Do what `push` does; where Kaggle cannot be used, log why and return None."""
    try:
        return push(in_home(work), dataset, message, images, wait, log)
    except Unavailable as reason:
        log(f"not pushed: {reason}")
        return None


def pull_session(
    work: str | Path, dataset: str | None = None, input_roots: Sequence[Path] = (KAGGLE_INPUT,), log: Log = print
) -> Session | None:
    """Do what `pull` does of a session's dataset; where there is nothing to pull, log why and return None.

    The output of a notebook is not copied: `recipes.handover` reads it where it is.
    """
    try:
        return pull(in_home(work), dataset, input_roots, log, outputs=False)
    except Unavailable as reason:
        log(f"nothing pulled: {reason}")
        return None


def session_files(work: Path, images: bool = False) -> list[str]:
    found = []
    for name, folders, names in os.walk(work):
        folder = Path(name)
        place = folder.relative_to(work)
        left_out = {*NEVER, *(SUBSETS if INFO_NAME in names and not images else ())}
        folders[:] = [
            child
            for child in sorted(folders)
            if (child == ".hydra" or not child.startswith("."))
            and child not in left_out
            and not any((folder / child / mark).exists() for mark in (".git", "pyproject.toml"))
        ]
        whole = any(fnmatch(part, pattern) for part in place.parts for pattern in WHOLE_FOLDERS)
        in_split = any((work / parent / INFO_NAME).is_file() for parent in place.parents)
        for name in sorted(names):
            image = name.rpartition(".")[2].lower() in IMAGE_EXTENSIONS
            wanted = (images and in_split) if image else whole or any(fnmatch(name, form) for form in NEEDED)
            if wanted and not name.startswith("."):
                found.append((place / name).as_posix())
    return found


# ---- there
def push(
    work: Path, dataset: str | None, message: str = "", images: bool = False, wait: float = 600.0, log: Log = print
) -> Session:
    """Push what the next session needs as the private Kaggle dataset "owner/name": a new one, or its next version.

    Args:
        message: notes of this version, by default how far each run is.
        images: push the split's images too.
        wait: seconds in which Kaggle must list every file.

    Raises:
        UserError: nothing to push, a damaged checkpoint, an upload that failed; what Kaggle held before is kept.
    """
    if not dataset:
        raise Unavailable('no dataset is named; "your-name/your-run" is made where there is none')
    if (name := _check_name(dataset)) != dataset:
        raise UserError(f"--dataset {dataset}: a version is made, not chosen: name {name}")
    if not work.is_dir():
        raise UserError(f"No such folder: {work}. Name the one that holds checkpoints/, latents/ …")
    paths = session_files(work, images)
    if not any(path.endswith((".ckpt", ".safetensors", ".pt")) for path in paths):
        raise UserError(f"Nothing to push in {work}: it holds no checkpoint, latents or model. Train first")
    with TemporaryDirectory(prefix="vavae-push-") as folder:
        staging = Path(folder) / "dataset"
        staging.mkdir()
        files, steps = pack(work, paths, staging)
        session = Session(dataset, steps, tuple(files))
        marker = write_manifest(staging, {"dataset": dataset, "made": time.time(), "steps": steps, "files": files})
        expected = {path.name: path.stat().st_size for path in staging.iterdir()}
        log(f"pushing {len(files):,} files ({sum(expected.values()) / 1e6:,.1f} MB) from {work}")
        request = {"do": "push", "dataset": dataset, "folder": str(staging), "files": expected, "marker": marker}
        done = _ask({**request, "message": message or str(session), "wait": wait}, Path(folder))
    kind = "a new private dataset" if done["created"] else "a new version"
    log(f"pushed {kind}, every file is listed whole ({session})")
    log(f"next session: attach {dataset}, or have it downloaded: python -m vavae_tools.kaggle_session pull")
    return session


def _check_name(dataset: str) -> str:
    if not DATASET.fullmatch(dataset):
        expected = "owner/name, the name of 6 to 50 small letters, digits and hyphens"
        raise UserError(f"--dataset {dataset!r}: expected {expected}")
    return "/".join(dataset.split("/")[:2])


def pack(work: Path, paths: list[str], folder: Path) -> tuple[dict[str, Any], dict[str, tuple[int, int]]]:
    """Write files into one tar in `folder`; return what the manifest says of each, and each run's step and epoch."""
    files: dict[str, Any] = {}
    with tarfile.open(folder / PACK, "w") as packed:
        for path in sorted(paths, key=_is_last):  # they are put in place in this order
            try:
                file = (work / path).open("rb")  # this moment's, though training writes the next one over its name
            except FileNotFoundError:  # a training that goes on has replaced its best checkpoint
                continue
            with file:
                member = packed.gettarinfo(arcname=path, fileobj=file)
                digest = hashlib.file_digest(file, "sha256").hexdigest()
                files[path] = {"bytes": member.size, "mtime": member.mtime, "stored": PACK, "sha256": digest}
                file.seek(0)
                packed.addfile(member, file)
    return files, _steps(work, files)


def write_manifest(folder: Path, manifest: dict[str, Any]) -> str:
    """Write the manifest under a name that holds its hash; return the name."""
    content = json.dumps({"format": 1, **manifest}, indent=1).encode()
    path = folder / _manifest_name(content)
    path.write_bytes(content)
    return path.name


def _manifest_name(content: bytes) -> str:
    return f"session-{hashlib.sha256(content).hexdigest()[:12]}.json"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _steps(folder: Path, files: Iterable[str], skip_damaged: bool = False) -> dict[str, tuple[int, int]]:
    """Return each run's last step and epoch; a damaged checkpoint is an error, as it would replace a good one."""
    steps: dict[str, tuple[int, int]] = {}
    for path in files:
        read = {"last.ckpt": read_checkpoint, "training_state.json": read_json}.get(Path(path).name)
        try:
            place = read and place_in(read(folder / path))
        except UserError:
            if not skip_damaged:
                raise
            continue
        if place is not None:
            run = _run_of(path, files)
            steps[run] = max(steps.get(run, (-1, 0)), (place.get("global_step", 0), place.get("epoch", 0)))
    return steps


def _run_of(path: str, paths: Iterable[str]) -> str:
    """Return the folder that `path` goes together with: its run's, its split's, else the one it is in.

    >>> paths = ["checkpoints/last.ckpt", "dit/checkpoints/last.ckpt"]
    >>> _run_of("dit/pipeline/vae/config.json", paths), _run_of("latents/latents.json", paths)
    ('dit', 'latents')
    """
    parents = list(PurePosixPath(path).parents)
    for parent, child in zip(parents[1:], parents, strict=False):
        within = "" if parent == PurePosixPath(".") else f"{parent}/"
        has_run = any(other.startswith((f"{within}checkpoints/", f"{within}checkpoint-")) for other in paths)
        if has_run and parent.name != "checkpoints" and any(fnmatch(child.name, form) for form in OF_RUN):
            return str(parent)
    for parent in parents:
        if str(parent / INFO_NAME) in paths:
            return str(parent)
    return str(parents[0])


# ---- and back
def pull(
    work: Path,
    dataset: str | None = None,
    input_roots: Sequence[Path] = (KAGGLE_INPUT,),
    log: Log = print,
    outputs: bool = True,
) -> Session:
    """Put the newest state into `work`, so that `resume="last"` resumes it; what is newer there is kept.

    Args:
        dataset: "owner/name", or "owner/name/2" for an older version: taken where it is attached, else downloaded.
            None takes the newest that is attached, with `outputs` also the output of a notebook.
        input_roots: where a Kaggle machine mounts what is attached.

    Raises:
        UserError: what was found is not whole; `work` is as it was.
    """
    own_name = _check_name(dataset) if dataset else None
    if (attached := _newest_attached(input_roots, own_name, outputs and dataset is None)) is not None:
        return _put(attached, work, log)
    if not dataset:
        raise Unavailable("no earlier session's dataset is attached or named")
    with TemporaryDirectory(prefix="vavae-pull-") as folder:
        (Path(folder) / "dataset").mkdir()
        done = _ask({"do": "pull", "dataset": dataset, "folder": f"{folder}/dataset"}, Path(folder))
        return _put(_source_in(Path(done["folder"]), dataset), work, log)


@dataclass(frozen=True)
class Source:
    """A session's state in a folder: what `push` made of it, or the outputs of a notebook as they are.

    `files` are {path: bytes, mtime, sha256, and where it is stored: the tar's name, or its own}.
    """

    folder: Path
    name: str
    made: float  # seconds since 1970
    files: dict[str, dict[str, Any]]
    steps: dict[str, tuple[int, int]]
    dataset: str | None = None

    def contents(self) -> Iterator[tuple[str, dict[str, Any], IO[bytes]]]:
        """Yield each file's path, entry and open content; one that is not there is a `UserError`."""
        path = PACK
        has_pack = any(entry["stored"] == PACK for entry in self.files.values())
        try:
            with tarfile.open(self.folder / PACK) if has_pack else nullcontext() as pack:
                # in the order they were written: the best of several is the latest; a cut-off pull has no last one
                for path, entry in sorted(self.files.items(), key=lambda item: (_is_last(item[0]), item[1]["mtime"])):
                    packed = entry["stored"] == PACK
                    with pack.extractfile(path) if packed else (self.folder / entry["stored"]).open("rb") as file:
                        yield path, entry, file
        except (KeyError, FileNotFoundError, tarfile.TarError):
            raise UserError(f"{self.name} lacks {path}: {INSTEAD}") from None

    def check(self) -> None:
        """Read everything once, so that nothing is put in place of which a part is damaged."""
        for path, entry, file in self.contents():
            if hashlib.file_digest(file, "sha256").hexdigest() != entry["sha256"]:
                raise UserError(f"{self.name}: {path} is damaged: {INSTEAD}")


def _newest_attached(roots: Sequence[Path], dataset: str | None, outputs: bool) -> Source | None:
    found: list[Source] = []
    for root in roots:
        for name, folders, names in os.walk(root, followlinks=True):
            folder = Path(name)
            if any(map(MANIFEST.fullmatch, names)):
                found.append(_source_in(folder))
            elif outputs and any((run / "last.ckpt").is_file() for form in RUNS for run in folder.glob(form)):
                found.append(_outputs_in(folder))
            elif len(folder.relative_to(root).parts) < MAX_SEARCH_DEPTH:
                continue
            folders.clear()
    matching = [source for source in found if dataset in (None, source.dataset)]
    return max(matching, key=lambda source: source.made, default=None)


def _source_in(folder: Path, name: str | None = None) -> Source:
    name = name or str(folder)
    manifests = [path for path in folder.iterdir() if MANIFEST.fullmatch(path.name)]
    if len(manifests) != 1:
        raise UserError(f"{name} was not pushed from here: it has {len(manifests)} session-*.json, expected 1")
    content = manifests[0].read_bytes()
    try:
        if manifests[0].name != _manifest_name(content):
            raise ValueError("damaged")
        manifest = json.loads(content)
        files, steps = manifest["files"], {run: (step, epoch) for run, (step, epoch) in manifest["steps"].items()}
        for path, entry in files.items():
            parts = (*PurePosixPath(path).parts, *PurePosixPath(entry["stored"]).parts)
            if "\\" in path or ".." in parts or "/" in parts:
                raise ValueError(path)
        return Source(folder, name, manifest["made"], files, steps, manifest.get("dataset"))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{name}: its manifest cannot be read ({error!r:.100}): {INSTEAD}") from None


def _outputs_in(folder: Path) -> Source:
    files = {}
    for path in session_files(folder, images=True):
        state, digest = (folder / path).stat(), _digest(folder / path)
        files[path] = {"bytes": state.st_size, "mtime": state.st_mtime, "stored": path, "sha256": digest}
    made = max(entry["mtime"] for path, entry in files.items() if _is_last(path))
    return Source(folder, str(folder), made, files, _steps(folder, files))


def _is_last(path: str) -> bool:
    return path.endswith("last.ckpt")


def _put(source: Source, work: Path, log: Log) -> Session:
    """Copy into `work`, each file whole and the last checkpoints last, what is not newer there."""
    source.check()
    runs: dict[str, list[str]] = {}
    for path in source.files:
        runs.setdefault(_run_of(path, source.files), []).append(path)
    steps_here = _steps(work, session_files(work), skip_damaged=True)
    wanted, kept = [], []
    for run, paths in runs.items():
        if [Path(path) for path in paths] == [Path(run, INFO_NAME)] and not (work / run / SUBSETS[0]).is_dir():
            log(f"left out: {paths[0]}, which is no split without its images; notebook 01 makes the same one again")
            continue
        here, there = steps_here.get(run), source.steps.get(run)
        differing = [path for path in paths if _differs(work / path, source.files[path])]
        if here and there and here[0] != there[0]:
            newer = there[0] > here[0]
        else:
            written = max((source.files[path]["mtime"] for path in differing), default=0)
            newer = written >= max(((work / path).stat().st_mtime for path in differing), default=0)
        if newer:
            wanted += [path for path in paths if path in differing or not (work / path).exists()]
        else:
            kept.append(run)
            compared = " against ".join(f"step {state[0]:,}" for state in (here, there) if state)
            log(f"kept: {work / run} is newer than what {source.name} holds{f' ({compared})' if here else ''}")
    size = sum(source.files[path]["bytes"] for path in wanted)
    work.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(work).free < size:
        raise UserError(f"{work} has no space for the {size / 1e6:,.0f} MB of {source.name}: free some and try again")
    for path, _, file in source.contents():
        if path in wanted:
            with atomic_write(work / path) as partial, partial.open("wb") as target:
                shutil.copyfileobj(file, target, 2**20)
    session = Session(source.name, source.steps, tuple(wanted), tuple(kept))
    log(f"found {session}")
    log(f"put {len(wanted):,} files into {work} ({size / 1e6:,.1f} MB; {len(source.files) - len(wanted):,} stay)")
    if any(run not in kept for run in source.steps):
        log('next: resume = "last" in the notebook of that run, or --resume last')
    return session


def _differs(path: Path, entry: dict[str, Any]) -> bool:
    return path.is_file() and (path.stat().st_size != entry["bytes"] or _digest(path) != entry["sha256"])


# ---- the clients
def _ask(request: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Have `client.py` do it, and raise what went wrong as one line."""
    asked, answered = folder / "request.json", folder / "answer.json"
    write_json(asked, request)
    environment = {**os.environ, "TMPDIR": str(folder)}  # where the client keeps, for days, what it did not finish
    command = [sys.executable, "-P", str(Path(__file__).with_name("client.py")), str(asked), str(answered)]
    quiet = subprocess.DEVNULL
    status = subprocess.run(command, stdin=quiet, stdout=quiet, stderr=quiet, env=environment, check=False).returncode
    try:
        answer = json.loads(answered.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        answer = {"fault": "failed", "reason": f"the client ended with status {status}"}
    if "done" in answer:
        return answer["done"]
    dataset, reason = request["dataset"], answer["reason"]
    own = "make a token in the settings of your Kaggle account and set KAGGLE_API_TOKEN, or KAGGLE_USERNAME and "
    own += "KAGGLE_KEY, in the environment or as secrets of the notebook. Nothing else needs them"
    said = {
        "client": f"neither kagglehub nor the kaggle client is here ({reason}): pip install kaggle",
        "credentials": f"no Kaggle credentials are here, or none that work: {own}",
        "refused": f"Kaggle does not know these credentials ({reason}): {own}",
        "network": f"Kaggle cannot be reached ({reason}): switch the internet on in the notebook's settings, or save "
        "its version and attach its output to the next session",
        "missing": f"there is no dataset {dataset} that you may read: it is made by the first push",
        "late": f"{dataset}: Kaggle took every file, but does not list the new version after {reason}; the versions "
        f"before are kept. Look later with kaggle datasets files {dataset}, or push again",
        "lost": f"{dataset} has lost something on the way: {reason}. Push again; the versions before are kept, such as "
        f"{dataset}/1 for --dataset of pull",
        "failed": f"{dataset} was not pushed ({reason}); what it held before is kept. Push again",
    }
    if request["do"] == "pull":
        said["failed"] = f"{dataset} could not be downloaded ({reason}); what is here is as it was. Try it again"
    kind = answer["fault"]
    raise (UserError if kind in ("late", "lost", "failed") else Unavailable)(said[kind])
