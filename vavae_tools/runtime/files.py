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
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from warnings import catch_warnings
from zipfile import is_zipfile

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.models.modeling_utils import no_init_weights
from filelock import FileLock, Timeout
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from vavae_tools.runtime.errors import UserError, contents, in_home, join_first, one_line


def local_folder(source: str | Path, of: str, instead: str, part: str = "", file: str = "") -> Path:
    """Return a path as it is, or for "owner/name", where there is no such path, the folder of the hub's repository.

    Of a repository all settings are taken, and its weights, there or in the folder `part`, in the first of `FORMS`
    that is there. `of` and `instead` are for messages: whose folder it is, what to do without the hub; `file` is what
    a path may be in place of a folder, such as "config.json".
    """
    path = in_home(source)
    if path.is_dir() or (file and path.exists()):
        return path
    is_file = bool(file) and path.suffix == Path(file).suffix
    if path.exists() or is_file or not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)):
        raise UserError(f"No {f'folder or {file}' if file else 'folder'} {path} of {of}: {instead}")
    try:
        from huggingface_hub import snapshot_download

        for form in FORMS:
            weights = [f"{place}{name}{form}" for place in ("", f"{part}/") for name in NAMES]
            folder = Path(snapshot_download(str(source), allow_patterns=["*.json", "*.txt", *weights]))
            with suppress(UserError):  # an index whose files are of a later form
                if weight_files(folder) or weight_files(folder / part):
                    break
        return folder
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
    """Yield a temporary path beside `path`, which replaces it whole on leaving, and leaves it as it was on an error.

    What is written there is a file, or a folder where there is none of this name.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with disk_errors():
            yield partial
        flush(partial, *partial.rglob("*"))
        partial.replace(path)
        flush(path.parent)
    except BaseException:
        with suppress(OSError):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink(missing_ok=True)
        raise


def flush(*paths: Path) -> None:
    """Make files' contents durable, and where the system can the names in folders."""
    for path in paths:
        with suppress(OSError) if path.is_dir() else nullcontext():
            handle = os.open(path, os.O_RDONLY)
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
        weights = dict(part.named_parameters()) if isinstance(part, nn.Module) else {}
        help = "Resume from an earlier checkpoint, with a smaller learning rate or --precision 32"
        refuse_not_finite(weights, name or type(model).__name__, f"{folder} is not written. {help}")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".", suffix=".partial", dir=folder) as partial, disk_errors():
        model.save_pretrained(partial)
        made = sorted((path for path in Path(partial).rglob("*") if path.is_file()), key=lambda p: p.suffix == ".json")
        for path in made:  # the weights first: a configuration is never without them
            with atomic_write(folder / path.relative_to(partial)) as whole:
                path.replace(whole)


def load_model(kind: type[Any], folder: str | Path) -> Any:
    """Return a model of diffusers or transformers in float32 and eval mode, by its config.json and `read_weights`."""
    folder = Path(folder)
    weights = read_weights(folder)
    logging.disable(logging.WARNING)  # what is left over is said below, in one line
    try:
        if issubclass(kind, ModelMixin):
            with no_init_weights():
                model = kind.from_config(read_json(folder / "config.json"))
            model._fix_state_dict_keys_on_load(weights)
            load_weights(model, weights, folder)
        else:  # which know the names of former versions
            config = kind.config_class.from_pretrained(folder)
            model, report = kind.from_pretrained(None, config=config, state_dict=weights, output_loading_info=True)
            _refuse_missing(sorted(report["missing_keys"]), folder)
            refuse_left_over(model.state_dict(), sorted(report["unexpected_keys"]), folder)
            refuse_not_finite(weights, folder)
    except UserError:
        raise
    except Exception as error:  # of any kind: what their versions stumble over in damaged files
        problem = f"The {kind.__name__} in {folder} cannot be loaded ({one_line(error)})"
        raise UserError(f"{problem}: copy the folder anew") from None
    finally:
        logging.disable(logging.NOTSET)
    return model.float().eval()


def load_weights(model: nn.Module, weights: Mapping[str, Any], source: Any, anew: tuple[str, ...] = ()) -> Any:
    """Load whole, finite weights of this form; those whose names begin with one of `anew` may be missing."""
    try:
        loaded = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise UserError(f"{source} is of another form: {str(error).splitlines()[1].strip()}") from None
    _refuse_missing([name for name in loaded.missing_keys if not name.startswith(anew)], source)
    refuse_left_over(model.state_dict(), weights, source)
    refuse_not_finite(weights, source)
    return loaded


def _refuse_missing(names: list[str], source: Any) -> None:
    if names:
        lacking = f"lacks {len(names)} of the model's weights, the first {names[0]}"
        raise UserError(f"{source} {lacking}: it is not whole, or of another network. Copy it again, or take another")


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


def refuse_not_finite(
    weights: Mapping[str, Any], source: Any, help: str = "Take an earlier checkpoint of that training, or copy it again"
) -> None:
    tensors = {k: v for k, v in weights.items() if isinstance(v, torch.Tensor) and not v.is_meta}
    damaged = [name for name, tensor in tensors.items() if not tensor.float().isfinite().all()]
    if damaged:
        raise UserError(f"{len(damaged)} weights of {source} are not finite ({join_first(damaged, 1)}). {help}")


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
    named = _WEIGHTS.match(path.name)
    if named and (named["shards"] or named["index"]):  # one of several, which belong together
        path = path.parent
    if not path.is_dir():
        return _read_file(path)
    if not (files := weight_files(path)):
        expected = "expected model.safetensors or diffusion_pytorch_model.safetensors"
        raise UserError(f"No weights in {path}: {expected}; it {contents(path)}")
    return {name: tensor for file in files for name, tensor in _read_file(file).items()}


def _read_file(path: Path) -> dict[str, Any]:
    return read_safetensors(path) if path.suffix == ".safetensors" else read_checkpoint(path)


NAMES = ("diffusion_pytorch_model", "pytorch_model", "model")
FORMS = (".safetensors", "-*.safetensors", ".*.safetensors", "*.bin")
"""Files of weights in a repository: a whole one, or else shards, a variant such as fp16, pickles."""
_WEIGHTS = re.compile(
    rf"(?:{'|'.join(NAMES)})(?:\.([a-z]\w+?))?(?:-\d+-of-(?P<shards>\d+))?(?:\.([a-z]\w+))?"
    r"\.(?P<ending>safetensors|bin)(?P<index>\.index(?:\.(\w+))?\.json)?$"
)


def weight_files(folder: Path) -> list[Path]:
    """Return the files of weights in a folder of diffusers or transformers, by its index where they are several.

    Full precision goes before a variant (`.fp16.`), safetensors before `.bin`; files of other names are not looked at.
    """
    groups: dict[tuple[bool, bool, bool, str], list[re.Match]] = {}
    for found in filter(None, map(_WEIGHTS.match, sorted(path.name for path in folder.glob("*")))):
        variant = found[1] or found[3] or found[6] or ""
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
