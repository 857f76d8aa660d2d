"""What measures and compares images is computed in float32, whatever precision the networks around it compute in."""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from vavae_tools.runtime.console import print_beside_bars
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.machine import Machine, Model, machine_of

P, R = ParamSpec("P"), TypeVar("R")


def in_float32(function: Callable[P, R]) -> Callable[P, R]:
    """Decorate what half precision makes wrong (an SSIM of 1 became 0.66): it computes in float32, without autocast."""

    @functools.wraps(function)
    def computed(*arguments: P.args, **named: P.kwargs) -> R:
        kinds = {value.device.type for value in (*arguments, *named.values()) if isinstance(value, Tensor)}
        with torch.autocast(next(iter(kinds), "cpu"), enabled=False):
            return function(*map(_float32, arguments), **{name: _float32(value) for name, value in named.items()})

    return computed


def _float32(value: Any) -> Any:
    half = isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16)
    return value.float() if half else value


PRECISIONS = {"32": "float32", "16": "fp16", "bf16": "bf16"}  # as people type them → as messages call them
HALF_DTYPES = {"16": torch.float16, "bf16": torch.bfloat16}
_ALSO = {"fp16": "16", "fp32": "32", "float32": "32", "no": "32", "False": "32"}  # YAML reads no as false


# ---- how networks compute
def precision_on(machine: Machine, name: str | None = None) -> str:
    """Return a precision's name in `PRECISIONS`; None: fp16 on a T4, bf16 on newer cards, float32 on a CPU."""
    if name is None:
        return {"cpu": "32", "t4": "16", "ampere": "bf16"}[machine.kind]
    name = _ALSO.get(str(name), str(name))
    if name not in PRECISIONS:
        raise UserError(f"No precision {name!r}; there are {', '.join(PRECISIONS)}")
    if name == "bf16" and machine.kind == "t4":
        raise UserError(f"{machine.name} has no bf16 (it is emulated and slow): use --precision 16 or 32")
    if name == "16" and machine.kind == "cpu":
        raise UserError("A CPU has no fp16: use --precision 32")
    return name


def computing_in(precision: str, device: str | torch.device) -> torch.autocast:
    """Return autocast to a precision of `PRECISIONS`; "32" switches it off."""
    return torch.autocast(torch.device(device).type, HALF_DTYPES.get(precision), enabled=precision in HALF_DTYPES)


def for_inference(model: Model, device: str | torch.device) -> Model:
    """Lay the weights of convolutions out as a card takes them fastest, in place; on a CPU nothing happens."""
    return model.to(memory_format=torch.channels_last) if torch.device(device).type == "cuda" else model


@contextmanager
def trying_convolutions() -> Iterator[None]:
    """Let cuDNN keep its fastest convolutions, for many batches of one size, but under deterministic algorithms."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before


class Computing:
    """How a frozen model goes through data once: `computing(function)`, and `.again(function)` if that is not finite.

    Args:
        precision: "32", "16" or "bf16"; None: fp16 on a card (ten bits after the point, bf16 has seven), else float32.
        what: what it makes, such as "Latents of this VAVAE", for the line that `again` tells `log`.
    """

    def __init__(
        self,
        precision: str | None,
        device: str | torch.device,
        what: str,
        log: Callable[[str], None] = print_beside_bars,
    ) -> None:
        if precision is None:
            self.precision = "16" if torch.device(device).type == "cuda" else "32"
        else:
            self.precision = precision_on(machine_of(device), precision)
        self.device, self.what, self.log = device, what, log
        self.in_half = self.precision != "32"
        self._said = False

    def __call__(self, function: Callable[[], R]) -> R:
        with computing_in(self.precision, self.device):
            return function()

    def again(self, function: Callable[[], R]) -> R:
        """Compute in float32, and say so the first time."""
        if not self._said:
            self._said = True
            self.log(f"{self.what} are not finite in half precision: such batches are computed again in float32")
        with computing_in("32", self.device):
            return function()
