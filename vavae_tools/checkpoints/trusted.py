"""Files that hold more than tensors, such as settings as objects or whole modules, made into what any reader opens.

Classes of packages that are not among `PACKAGES` are not imported: their objects become dicts of their attributes.
"""

import pickle
import shutil
from argparse import Namespace
from collections.abc import Mapping
from contextlib import suppress
from datetime import date, timedelta
from pathlib import Path, PurePath
from types import SimpleNamespace
from typing import Any
from warnings import catch_warnings
from zipfile import is_zipfile

import numpy as np
import torch
from torch import Tensor, nn

from vavae_tools.runtime.errors import UserError, one_line
from vavae_tools.runtime.files import atomic_write

PACKAGES = ("torch", "numpy", "collections", "_codecs", "copyreg", "typing", "argparse", "pathlib", "datetime")
BUILTINS = ("bool", "int", "float", "complex", "str", "bytes", "bytearray", "list", "tuple", "dict", "set", "frozenset")
BUILTINS += ("slice", "range", "object")


class Unknown:
    """An object of a class that is not imported: what was pickled of it are its attributes."""

    def __init__(self, *arguments: Any, **named: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        for part in state if isinstance(state, tuple) else (state,):  # the second is of slots
            vars(self).update(part if isinstance(part, dict) else {})

    def __setitem__(self, name: Any, value: Any) -> None:
        vars(self)[name] = value

    def append(self, value: Any) -> None: ...

    def __call__(self, *arguments: Any, **named: Any) -> "Unknown":  # of a method that makes an object
        return Unknown()


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name == "_rebuild_from_type_v2":  # of a tensor's subclass, whose class may be unknown
            return lambda make, kind, arguments, state: make(*arguments)
        package = module.partition(".")[0]
        if package in PACKAGES or (package in ("builtins", "__builtin__") and name in BUILTINS):
            with suppress(ImportError, AttributeError):  # of another version
                return super().find_class(module, name)
        return type(name, (Unknown,), {"__module__": module})


def write_plain(source: str | Path, destination: str | Path) -> tuple[Path, list[str]]:
    """Write what a file of `torch.save` or of `pickle` holds as tensors and plain values under the same keys.

    Of a checkpoint's folder every `.pt` is written so, and its other files are copied. Return what was written, and of
    which classes something had no such form and was left out.
    """
    source, destination = Path(source), Path(destination)
    left: set[str] = set()
    files = [path for path in (source, *source.rglob("*")) if path.is_file()]
    if not files:
        raise UserError(f"No file {source}: name a .pt, .pth or .ckpt, or a checkpoint's folder")
    with atomic_write(destination) as whole:
        for path in files:
            made = whole / path.relative_to(source)  # of a file "."
            made.parent.mkdir(parents=True, exist_ok=True)
            if path == source or path.suffix in (".pt", ".pth", ".ckpt"):
                torch.save(_plain(_unpickled(path), left), made)
            else:
                shutil.copyfile(path, made)
    return destination, sorted(left)


def _unpickled(path: Path) -> Any:
    ours = SimpleNamespace(__name__=__name__, Unpickler=_Unpickler, load=lambda file, **named: _Unpickler(file).load())
    try:
        with path.open("rb") as file, catch_warnings(action="ignore"):
            first = None if is_zipfile(path) else _Unpickler(file).load()
            if isinstance(first, int | None):  # before PyTorch 1.6 a file begins with a number
                return torch.load(path, map_location="cpu", weights_only=False, pickle_module=ours)
            return first
    except OSError:
        raise
    except Exception as error:  # of many classes where a file is damaged
        raise UserError(f"{path} is damaged or no file of torch.save ({one_line(error)}): copy it again") from None


def _plain(value: Any, left: set[str], around: frozenset[int] = frozenset()) -> Any:
    """Return a value as what `torch.load` opens with `weights_only=True`; what has no such form is None."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "biufc":
        value = torch.from_numpy(value.astype(value.dtype.newbyteorder("=")))
    elif isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Tensor):
        return value.detach()
    if isinstance(value, torch.jit.ScriptModule):
        return dict(value.state_dict())
    if value is None or type(value) in (bool, int, float, complex, str, bytes) or isinstance(value, torch.dtype):
        return value
    if isinstance(value, (PurePath, date, timedelta, torch.device)):
        return str(value)
    if id(value) in around:  # one that holds itself
        return None
    around |= {id(value)}
    if isinstance(value, (list, tuple, set, frozenset)):
        made = [_plain(each, left, around) for each in value]
        return tuple(made) if isinstance(value, tuple) else made
    held = vars(value) if isinstance(value, (Unknown, Namespace, nn.Module)) else value
    if not isinstance(held, Mapping) or (isinstance(value, Unknown) and not held):
        left.add(f"{type(value).__module__}.{type(value).__qualname__}")
        return None
    if "_modules" in held:
        return _weights_of(held)
    for content in ("_content", "_val"):  # of omegaconf's containers and values
        if content in held:
            return _plain(held[content], left, around)
    return {key if isinstance(key, int) else str(key): _plain(each, left, around) for key, each in held.items()}


def _weights_of(held: Mapping[str, Any], before: str = "") -> dict[str, Tensor]:
    """Return the state_dict of a module with these attributes, also of one whose class is not imported."""
    passing = held.get("_non_persistent_buffers_set", ())
    tensors = {**held["_parameters"], **{k: v for k, v in held["_buffers"].items() if k not in passing}}
    found = {before + name: tensor.detach() for name, tensor in tensors.items() if tensor is not None}
    for name, part in held["_modules"].items():
        found |= _weights_of(vars(part), f"{before}{name}.") if part is not None else {}
    return found
