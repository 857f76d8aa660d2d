"""Frozen models that go through data once: on a card in half precision, and what they took of it is given back."""

import itertools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from tqdm.auto import tqdm

from vavae_tools.machine import computing_in, machine_of, precision_on, release_memory

R = TypeVar("R")


def tell(line: str) -> None:
    """Print a line beside progress bars."""
    tqdm.write(line, file=sys.stderr)


@contextmanager
def at_work(model: Any, device: str | torch.device) -> Iterator[None]:
    """Have a model on a device; afterwards it is where it was, and the card's memory is given back.

    Args:
        model: an `nn.Module`, or what has `device` and `to`.
    """
    device, home = torch.device(device), _device_of(model)
    try:
        model.to(device)
        yield
    finally:
        if home != _device_of(model):
            model.to(home)
        if device.type == "cuda":
            release_memory()


def _device_of(model: Any) -> torch.device:
    if not isinstance(model, nn.Module):
        return model.device
    first = next(itertools.chain(model.parameters(), model.buffers()), torch.zeros(()))
    return first.device


class Computing:
    """How a frozen model computes: `computing(function)`, and `computing.again(function)` where that is not finite.

    Args:
        precision: "32", "16" or "bf16"; None: fp16 on a card, whose ten bits after the point bf16 has only seven of,
            and float32 on a CPU.
        device: where it computes.
        what: what it makes, such as "Latents of this VAVAE", for the line that `again` tells `say`.

    Raises:
        UserError: a precision that there is not, or that this device does not have.
    """

    def __init__(
        self, precision: str | None, device: str | torch.device, what: str, say: Callable[[str], None] = tell
    ) -> None:
        if precision is None:
            self.precision = "16" if torch.device(device).type == "cuda" else "32"
        else:
            self.precision = precision_on(machine_of(device), precision)
        self.device, self.what, self.say = device, what, say
        self._said = False

    @property
    def in_half(self) -> bool:
        """Whether there is a reason to try again in float32."""
        return self.precision != "32"

    def __call__(self, function: Callable[[], R]) -> R:
        with computing_in(self.precision, self.device):
            return function()

    def again(self, function: Callable[[], R]) -> R:
        """Compute in float32, and say so the first time."""
        if not self._said:
            self._said = True
            self.say(f"{self.what} are not finite in half precision: such batches are computed again in float32")
        with computing_in("32", self.device):
            return function()
