"""The references' small cases: copies in tests/golden, all of them in ../shared/golden where that folder is present."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

HERE = Path(__file__).parent / "golden"
SHARED = Path(__file__).parents[2] / "shared" / "golden"


def folder(name: str) -> Path:
    for root in (HERE, SHARED):
        if (root / name / "case.json").is_file():
            return root / name
    pytest.skip(f"the case {name} is neither in {HERE} nor in {SHARED}")


def load_case(name: str) -> tuple[dict, dict[str, Tensor]]:
    """A case's description and its tensors."""
    path = folder(name)
    return json.loads((path / "case.json").read_text()), load_file(path / "io.safetensors")


def load_weights(name: str) -> dict[str, Tensor]:
    return load_file(folder(name) / "weights.safetensors")


def assert_close(actual: Tensor, expected: Tensor, tolerance: dict[str, float]) -> None:
    torch.testing.assert_close(actual, expected, rtol=tolerance.get("rtol", 0), atol=tolerance.get("atol", 0))


def reference_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """A published denoiser's parameters under the reference's names."""
    named = {name.replace("conditioner.", "y_embedder."): weight for name, weight in model.named_parameters()}
    return {name.removeprefix("denoiser."): weight for name, weight in named.items()}
