"""Weights in files of any training: one list of what their parts are called, one of wrappers, one rule for the rest."""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor

from vavae_tools.runtime.errors import UserError

LIVE = (
    *("model", "model_state_dict", "state_dict", "net", "network", "module", "weights", "params", "model_state"),
    *("net_state_dict", "module_state_dict"),
)
"""What trainings call the weights that they train, the most usual names first."""
AVERAGED = (
    *("ema_model", "ema", "ema_state_dict", "ema_model_state_dict", "model_ema", "state_dict_ema", "params_ema"),
    *("model_ema_state_dict", "ema_weights", "ema_params", "net_ema", "ema_net", "g_ema", "ema_network"),
    *("averaged_model", "average_model", "model_average", "swa_model", "swa", "shadow"),
)
"""What trainings call the average of the weights."""
WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def plain_name(name: str) -> str:
    """Return a weight's name without what compilation, FSDP, checkpointing and DataParallel put into it.

    >>> plain_name("module._orig_mod.network._orig_mod.blocks.0._checkpoint_wrapped_module.pos")
    'network.blocks.0.pos'
    """
    return re.sub("^(module[.])+", "", WRAPPERS.sub("", name))


def flat_names(saved: Mapping[Any, Any], before: str = "") -> dict[str, Any]:
    """Return all entries by plain names, those of parts behind the part's name and a dot."""
    found: dict[str, Any] = {}
    for key, value in saved.items():
        name = before + plain_name(str(key))
        found |= flat_names(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return found


def is_average(name: str) -> bool:
    """Return whether a part or a prefix is one of averaged weights.

    >>> [is_average(name) for name in ("state_dict.EMA.", "model_ema", "ema_0.9999", "schema", "model")]
    [True, True, True, False, False]
    """
    return bool(re.search(rf"(?:^|[._])(?:ema\d*|{'|'.join(AVERAGED)})(?:[._]|$)", name, re.IGNORECASE))


def find_prefix(named: Iterable[str], first: str | Callable[[str], str | None]) -> str | None:
    """Return what stands before the weight `first` of a model in `flat_names`, averaged weights before live ones.

    `first` may also return the prefix of a name, or None.
    """

    def prefix_of(name: str) -> str | None:
        return name.removesuffix(first) if f".{name}".endswith(f".{first}") else None

    found = {begin for begin in map(prefix_of if isinstance(first, str) else first, named) if begin is not None}

    def rank(begin: str) -> tuple[bool, bool, int, str]:
        return not is_average(begin), begin != "" and begin.split(".")[0] not in LIVE, len(begin), begin

    return min(found, key=rank, default=None)


def find_weights(saved: Mapping[Any, Any], first: str, source: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
    """Return a model's entries in any training's file, averaged where it has an average, and all others.

    Returns:
        The entries by their names in the model, and those elsewhere by their `flat_names`; None where nothing is called
        `first`, one of the model's weights.
    """
    named = flat_names(saved)
    begin = find_prefix(named, first)
    if begin is None:
        return None
    inside = {name.removeprefix(begin): value for name, value in named.items() if name.startswith(begin)}
    others = {name: value for name, value in named.items() if not name.startswith(begin)}
    if is_average(begin):
        return inside, others
    for name, value in named.items():
        if is_average(name) and isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
            found = f"{source} has an average of the weights without their names ({name})"
            raise UserError(f"{found}: save it by names (its copy_to, then the model's state_dict), or remove it")
    # LDM's average has the names without their dots, from the model's beginning or from its training's
    undotted = {name.split("model_ema.")[-1]: name for name in named if "model_ema." in name}
    starts = {".".join(begin.split(".")[place:]) for place in range(begin.count(".") + 1)}
    for start in starts:
        of_average = {name: undotted.get(f"{start}{name}".replace(".", "")) for name in inside}
        if of_average[first]:
            averaged = {name: named[key] for name, key in of_average.items() if key}
            return {**inside, **averaged}, {k: v for k, v in others.items() if k not in undotted.values()}
    return inside, others
