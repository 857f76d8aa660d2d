"""What measures and compares pictures is computed in float32, whatever precision the networks around it compute in."""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

P, R = ParamSpec("P"), TypeVar("R")


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate what half precision makes wrong: autocast is off in it, and tensors in half precision come as float32.

    Sums over pictures, windows and neighbours lose their last digits there: an SSIM of 1 became 0.66. Gradients flow
    through as before.
    """

    @functools.wraps(function)
    def computed(*arguments: P.args, **named: P.kwargs) -> R:
        kinds = {value.device.type for value in (*arguments, *named.values()) if isinstance(value, Tensor)}
        with torch.autocast(next(iter(kinds), "cpu"), enabled=False):
            return function(*map(_float32, arguments), **{name: _float32(value) for name, value in named.items()})

    return computed


def _float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value
