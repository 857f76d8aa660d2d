"""Weights in files of any training: one list of what their parts are called, one of wrappers, one rule for the rest."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import Tensor

from vavae_tools.runtime.errors import UserError, join_first

LIVE = (
    *("model", "model_state_dict", "state_dict", "net", "network", "module", "weights", "params", "model_state"),
    *("net_state_dict", "module_state_dict"),
)
"""What trainings call the weights that they train, the most usual names first."""
MODELS = ("vae", "autoencoder", "first_stage_model", "rae", "generator", "denoiser", "dit")
"""What trainings of several models call the one that is looked for here."""
WRAPPERS = re.compile(r"\b(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
_AVERAGED = re.compile(r"(?:^|[._-])(?:ema\d*|swa|avg|average|averaged|averaging|polyak|shadow)(?:[._-]|$)")
_CAMEL = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")
_OPTIMISER = re.compile(r"opt(?:im\w*)?(?:_\w+)?[.]")


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

    >>> [is_average(name) for name in ("state_dict.EMA.", "emaModel", "avg-model", "ema_0.9999", "schema", "model")]
    [True, True, True, True, False, False]
    """
    return bool(_AVERAGED.search(_CAMEL.sub("_", name).lower()))


class Found(NamedTuple):
    """A model's weights in a file, averaged where it has an average, by their names in the model."""

    weights: dict[str, Any]
    others: dict[str, Any]  # what else is there, by `flat_names`
    prefix: str  # where they stand


def find_weights(saved: Mapping[Any, Any], first: str, source: Any) -> Found | None:
    """Return a model's weights out of any training's file; None where nothing is called `first`, a pattern.

    What an average lacks, such as weights that are not trained, comes from the live ones.
    """
    named = flat_names(saved)
    candidates = [name for name in named if not _OPTIMISER.match(name)]
    begins = [name[: found.start()] for name in candidates if (found := re.search(rf"(?:^|(?<=\.))(?:{first})$", name))]
    live = _only([begin for begin in begins if not is_average(begin)], source)
    inside = {} if live is None else _behind(live, named)
    # LDM's average has the names without their dots, from the model's beginning or from its training's
    starts = [(live or "")[place:] for place in _places(live or "")]
    spelled = {f"{start}{name}".replace(".", ""): name for start in starts for name in inside}
    covered = Counter(begin for begin in begins if is_average(begin))
    covered.update(
        name[:place]
        for name in candidates
        if is_average(name) and isinstance(named[name], Tensor)
        for place in _places(name)
        if is_average(name[:place]) and (name[place:] in inside or name[place:] in spelled)
    )
    average = _only([begin for begin, count in covered.items() if count == max(covered.values())], source)
    if average is not None:
        averaged = {spelled.get(name, name): value for name, value in _behind(average, named).items()}
        kept = {name: value for name, value in inside.items() if isinstance(value, Tensor) and name not in averaged}
        others = {name: v for name, v in named.items() if not name.startswith(average)}
        others = {name: v for name, v in others.items() if live is None or name.removeprefix(live) not in kept}
        return Found({**kept, **averaged}, others, average)
    for name, value in named.items():
        if is_average(name) and isinstance(value, (list, tuple)) and any(isinstance(item, Tensor) for item in value):
            found = f"{source} has an average of the weights without their names ({name})"
            raise UserError(f"{found}: save it by names (its copy_to, then the model's state_dict), or remove it")
    return live if live is None else Found(inside, {k: v for k, v in named.items() if not k.startswith(live)}, live)


def _places(name: str) -> list[int]:
    """Return where the parts of a name begin."""
    return [0, *(dot.end() for dot in re.finditer("[.]", name))]


def _behind(begin: str, named: Mapping[str, Any]) -> dict[str, Any]:
    inside = {name.removeprefix(begin): value for name, value in named.items() if name.startswith(begin)}
    return inside if is_average(begin) else {name: value for name, value in inside.items() if not is_average(name)}


def _only(begins: Iterable[str], source: Any) -> str | None:
    """Return the prefix that has the fewest words besides those known here, of those the shortest; two are an error."""

    def rank(begin: str) -> tuple[int, int]:
        words = begin.split(".")[:-1]
        return sum(word not in (*LIVE, *MODELS) and not is_average(word) for word in words), len(words)

    ranked = sorted(dict.fromkeys(begins), key=rank)
    best = [begin for begin in ranked if rank(begin) == rank(ranked[0])]
    if len(best) > 1:
        several = join_first(begin.removesuffix(".") for begin in best)
        raise UserError(f"{source} holds several models of this form ({several}): save the one you mean alone")
    return best[0] if best else None
