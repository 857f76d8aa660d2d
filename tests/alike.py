"""What two orders of the same sums have in common: fewer digits step by step, as a training magnifies them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

DIGITS = 1e-5
"""Relative difference of two sums in float32, at a training's first step."""
GROWTH = 2.0
"""What AdamW makes of it each step at most, where gradients are near zero (measured: 1.7)."""
MAX_SENTENCES = 1e-2
"""A wrong batch, weight or average differs by more."""


def assert_curves_alike(
    found: Sequence[float], expected: Sequence[float], where: str = "", steps_before: int = 0
) -> None:
    """Raise unless values of step after step are alike: tightly at first, loosely later."""
    assert len(found) == len(expected) > 0, where
    for step, (value, wanted) in enumerate(zip(found, expected, strict=True), steps_before):
        digits = min(MAX_SENTENCES, DIGITS * GROWTH**step)
        assert value == pytest.approx(wanted, rel=digits, abs=1e-9), f"{where} at step {step}"


def assert_weights_alike(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], share: float = 1e-3) -> None:
    """Raise unless tensors together differ by at most that share of what they are.

    Not each number by itself: what moves by rounding alone, as a key's bias does, moves by AdamW's whole step.
    """
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].shape == tensor.shape and found[name].dtype == tensor.dtype, name
    one, two = (torch.cat([of[name].flatten().double() for name in expected]) for of in (found, expected))
    apart, whole = (one - two).norm(), two.norm()
    assert apart <= share * whole, f"{apart / whole:.1e} apart"


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """tag → (step, value), as TensorBoard has them of all the folder's versions."""
    found = {}
    for version in sorted((folder / "lightning_logs").iterdir()):
        events = EventAccumulator(str(version)).Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, []).extend((event.step, event.value) for event in events.Scalars(tag))
    return found


def values_of(run: Path, tag: str) -> list[float]:
    return [value for _, value in curves(run)[tag]]
