"""Published weights → these models."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from vavae_tools.convert.lightningdit import load_lightningdit
from vavae_tools.errors import UserError

LOADERS: dict[str, Callable[[Mapping[str, Tensor], Mapping[str, Any]], nn.Module]] = {
    "lightningdit": load_lightningdit,
}


def load_reference(kind: str, state_dict: Mapping[str, Tensor], config: Mapping[str, Any]) -> nn.Module:
    """One of our models with a reference's weights, in eval mode, called as the reference is.

    Args:
        kind: "lightningdit" → `model(x, t, y)`.
        state_dict: the weights under the reference's names.
        config: the reference's constructor arguments under its names.
    """
    if kind not in LOADERS:
        raise UserError(f"No reference of kind {kind!r}; known kinds: {', '.join(sorted(LOADERS))}.")
    return LOADERS[kind](state_dict, config).eval()
