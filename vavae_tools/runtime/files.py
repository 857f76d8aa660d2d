"""Files that are whole: written beside their final name, flushed to the disk, renamed; read without trusting them."""

import filecmp
import hashlib
import json
import logging
import os
import pickle
import re
import shlex
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from warnings import catch_warnings
from zipfile import is_zipfile

import torch
from diffusers import ConfigMixin
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vavae_tools.runtime.errors import UserError, contents, in_home, join_first, one_line


def local_folder(
    source: str | Path, of: str, instead: str, patterns: Sequence[str], ignored: Sequence[str] = (), file: str = ""
) -> Path:
    """Return a path as it is, or for "owner/name", where there is no such path, the folder of the hub's repository.

    `of` and `instead` are for messages: whose folder it is, what to do without the hub; `file` is what a path may be
    in place of a folder, such as "config.json".
    """
    path = in_home(source)
    if path.is_dir() or (file and path.exists()):
        return path
    is_file = bool(file) and path.suffix == Path(file).suffix
    if path.exists() or is_file or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise UserError(f"No {f'folder or {file}' if file else 'folder'} {path} of {of}: {instead}")
    try:
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(str(source), allow_patterns=[*patterns], ignore_patterns=[*ignored] or None))
    except Exception as error:  # no network, no such repository, not allowed: of many classes
        reason = one_line(error)
        raise UserError(f"No folder {source}, and the hub does not give a repository ({reason}): {instead}") from None


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keep other trainings from writing into a run's folder.

    A lock does not outlive its process; those that it starts, and what it calls, have it too.
    """
    name, whole = "VAVAE_TOOLS_LOCKED", str(folder.absolute())
    before = os.environ.get(name, "")
    if before == whole:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            os.environ[name] = whole
            try:
                yield
            finally:
                os.environ[name] = before
                if folder.is_dir() and [path.name for path in folder.iterdir()] == [".lock"]:  # refused
                    shutil.rmtree(folder)
    except Timeout:
        raise UserError(
            f"Another training writes into {folder}: wait for its end, or name another --output_dir"
        ) from None


def free_bytes(folder: str | Path) -> int:
    """Return how much room the disk has for a folder, which need not be there yet."""
    path = Path(folder).absolute()
    return shutil.disk_usage(next(one for one in (path, *path.parents) if one.is_dir())).free


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`, which replaces it whole on leaving, and leaves it as it was on an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with disk_errors():
            yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        partial.replace(path)
        flush_folder(path.parent)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def flush_folder(folder: Path) -> None:
    """Make the names in a folder as durable as the files' contents, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextmanager
def disk_errors() -> Iterator[None]:
    """Turn what safetensors raises where it cannot write (full disk) into the `OSError` it is."""
    try:
        yield
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from None


def save_model(model: Any, folder: str | Path) -> None:
    """Call `model.save_pretrained(folder)`, of a model or a pipeline whose weights are finite: each file is whole."""
    folder = Path(folder)
    for name, part in getattr(model, "components", {"": model}).items():
        weights = part.named_parameters() if isinstance(part, nn.Module) else ()
        damaged = [weight for weight, values in weights if not values.isfinite().all()]
        if damaged:
            found = f"{len(damaged)} weights of {name or type(model).__name__} are not finite ({damaged[0]} …)"
            help = "Resume from an earlier checkpoint, with a smaller learning rate or --precision 32"
            raise UserError(f"{folder} is not written: {found}. {help}")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", suffix=".partial", dir=folder) as partial, disk_errors():
        model.save_pretrained(partial)
        made = sorted((path for path in Path(partial).rglob("*") if path.is_file()), key=lambda p: p.suffix == ".json")
        for path in made:  # the weights first: a configuration is never without them
            with atomic_write(folder / path.relative_to(partial)) as whole:
                path.replace(whole)


def load_model(kind: type[Any], folder: str | Path, **options: Any) -> Any:
    """Return `kind.from_pretrained(folder)` in float32 and eval mode; refuse weights that are missing or left over."""
    if variant := next((_variant(_WEIGHTS.match(file.name)) for file in weight_files(Path(folder))), ""):
        options["variant"] = variant
    logging.disable(logging.WARNING)  # what is left over is said below, in one line
    try:  # a .bin is read as tensors only; without low_cpu_mem_usage it does not ask for a package that is of no use
        model, report = kind.from_pretrained(folder, low_cpu_mem_usage=False, output_loading_info=True, **options)
    except UserError:
        raise
    except Exception as error:  # of any kind: what diffusers' versions stumble over in damaged files
        problem = f"The {kind.__name__} in {folder} cannot be loaded ({one_line(error)})"
        raise UserError(f"{problem}: copy the folder anew") from None
    finally:
        logging.disable(logging.NOTSET)
    missing = sorted(report["missing_keys"])
    if missing:
        lacking = f"{len(missing)} are missing, such as {missing[0]}"
        raise UserError(f"The weights in {folder} are not those of its config.json: {lacking}. Copy the folder anew")
    refuse_left_over(model.state_dict(), sorted(report["unexpected_keys"]), folder)
    return model.float().eval()


def refuse_left_over(own: Iterable[str], given: Iterable[str], source: Any) -> None:
    """Raise a `UserError` that names those of the weights that belong to a part of the model and find no place there.

    Parts of a model are what its weights' names begin with; weights of others may stay unused.
    """
    own = set(own)
    parts = {name.split(".")[0] for name in own}
    left = [name for name in given if name not in own and name.split(".")[0] in parts]
    left = [name for name in left if not name.endswith(("position_ids", "inv_freq"))]  # formulas
    if left:
        found = f"{len(left)} weights of {source} find no place in this model ({join_first(left)})"
        raise UserError(f"{found}: it is another network, or its configuration another one's. Take those that belong")


def hardlink_duplicates(kept: Path, copies: Path) -> None:
    """Replace .safetensors of `copies` that equal those of `kept` by hard links; files here are never written into."""
    for file in kept.glob("*.safetensors"):
        copy = copies / file.name
        if copy.is_file() and filecmp.cmp(file, copy, shallow=False):
            with suppress(OSError), atomic_write(copy) as partial:
                os.link(file, partial)


def write_json(path: str | Path, value: Any) -> None:
    with atomic_write(path) as partial:
        partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, expected an object of settings")
    return value


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    checkpoint = read_saved(path)
    if not isinstance(checkpoint, dict):
        raise UserError(f"{path} holds a {type(checkpoint).__name__}, expected a dict of weights")
    return checkpoint


def read_safetensors(path: str | Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): copy it again") from None


def read_weights(path: str | Path) -> dict[str, Any]:
    """Return what a safetensors file, a checkpoint of `torch.save` or the `weight_files` of a folder hold."""
    path = in_home(path)
    if not path.is_dir():
        return read_safetensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)
    if not (files := weight_files(path)):
        expected = "expected model.safetensors or diffusion_pytorch_model.safetensors"
        raise UserError(f"No weights in {path}: {expected}; it {contents(path)}")
    return {name: tensor for file in files for name, tensor in read_weights(file).items()}


_WEIGHTS = re.compile(
    r"(?:diffusion_pytorch_model|pytorch_model|model)(?:\.([a-z]\w+?))?(?:-\d+-of-(?P<shards>\d+))?(?:\.([a-z]\w+))?"
    r"\.(?P<ending>safetensors|bin)(?P<index>\.index(?:\.(\w+))?\.json)?$"
)


def _variant(found: re.Match) -> str:
    return found[1] or found[3] or found[6] or ""


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights in a folder of diffusers or transformers, by its index where they are several.

    Full precision goes before a variant (`.fp16.`), safetensors before `.bin`; files of other names are not looked at.
    """
    groups: dict[tuple[bool, bool, bool, str], list[re.Match]] = {}
    for found in filter(None, map(_WEIGHTS.match, sorted(path.name for path in folder.glob("*")))):
        variant = _variant(found)
        groups.setdefault((variant != "", found["ending"] == "bin", variant != "fp16", variant), []).append(found)
    if not groups:
        return []
    group = groups[min(groups)]
    names = [found[0] for found in group if not found["shards"] and not found["index"]][:1]
    if not names:
        indices = [found[0] for found in group if found["index"]]
        listed = {name for index in indices for name in read_json(folder / index).get("weight_map", {}).values()}
        shards = [found for found in group if found["shards"]]
        names = sorted(listed) or [found[0] for found in shards]
        there = [name for name in names if (folder / name).is_file()]
        expected = len(listed) or int(shards[0]["shards"])
        if len(there) != expected:
            lacking = f"{len(there)} of its {expected} files of weights are there"
            raise UserError(f"{folder} is not whole, {lacking}: copy the folder anew")
    return [folder / name for name in names]


def read_saved(path: str | Path) -> Any:
    """Return what `torch.save` wrote, on the CPU, with `weights_only=True`; tensors stay in the file until used."""
    path = in_home(path)
    if not path.is_file():
        beside = sorted(str(p) for folder in ("", "checkpoints/") for p in path.parent.glob(f"{folder}*.ckpt"))
        hint = f"; there {'is' if len(beside) == 1 else 'are'} {', '.join(beside)}" if beside else ""
        if not beside and path.suffix in ("", ".ckpt"):
            hint = ": python -m vavae_tools.train makes one"
        raise UserError(f"No checkpoint {path}{hint}")
    try:
        zipped = is_zipfile(path)
        if not zipped and path.open("rb").read(1) != b"\x80":  # a zip, or before PyTorch 1.6 a pickle
            raise UserError(f"{path} is damaged or no checkpoint: it is neither a zip nor a pickle of torch.save")
        with catch_warnings(action="ignore"):  # of other kinds of pickle, which are told below
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except UserError:
        raise
    except Exception as error:  # of many classes where a file is damaged
        if isinstance(error, pickle.UnpicklingError) or "TorchScript" in str(error):
            raise UserError(_more_than_tensors(path)) from None
        raise UserError(f"{path} is damaged or no checkpoint ({one_line(error)})") from None


def _more_than_tensors(path: Path) -> str:
    """Say how to open a file on trust; of a checkpoint's folder all of it, as its files belong together."""
    source = path.parent if (path.parent / "training_state.json").is_file() else path
    plain = f"{source.stem}.plain{source.suffix}"  # here, as the folder of the file may be read-only
    command = f"python -m vavae_tools.checkpoints trust {shlex.quote(str(source))} {shlex.quote(plain)}"
    found = f"{path} holds more than tensors and plain values, so it is not opened"
    return f"{found}. Where you trust its origin, run {command} and name {plain}"


def weights_digest(model: nn.Module, without: tuple[str, ...] = ()) -> str:
    """Return a hash of a model's weights, but for those whose names begin with `without`."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if name.startswith(without):
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()


def plain_config(model: ConfigMixin) -> dict[str, Any]:
    """Return a diffusers model's configuration as values that `weights_only=True` can read."""
    return {k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items() if not k.startswith("_")}
