"""On a T4 and an A100, emulated (`emulated_card`): all trainings, pipelines and evaluations run, and wait for nothing.

`on_card.py` does it, one process for each card; here is one test for each card and scenario.
"""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from emulated_card import CARDS, COMPILER, build
from on_card import QUIET, SCENARIOS, TRAININGS

ROOT = Path(__file__).parents[1]
SCALER = "lightning/pytorch/plugins/precision/amp.py"
"""Where a gradient scaler asks the card whether an optimiser's gradients are finite."""
BATCH = "lightning/fabric/utilities/apply_func.py"
"""Where Lightning copies a batch to the card."""
CAPTIONS = "vavae_tools/diffusion/clip.py"
"""Where captions, which are numbered in each step unless they were encoded before, go to the card."""

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="the emulated card needs a C++ compiler"),
    pytest.mark.skipif(torch.version.cuda is not None, reason="the emulated card needs a torch that knows no other"),
]


@pytest.fixture(scope="module")
def found(split_dir, vavae_dir, latents_dir, tmp_path_factory) -> dict[str, dict[str, dict]]:
    """Card → scenario → what `on_card.py` says of it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    build()  # once, for both
    running = {}
    for card in CARDS:
        work = tmp_path_factory.mktemp(card)
        words = [ROOT / "tests/on_card.py", card, split_dir, vavae_dir, latents_dir, work]
        with (work / "said").open("w") as said:
            process = subprocess.Popen([sys.executable, *words], stdout=subprocess.PIPE, stderr=said, env=environment)
        running[card] = process, work / "said"
    out = {card: process.communicate()[0] for card, (process, _) in running.items()}
    for card, (process, said) in running.items():
        assert process.returncode == 0, f"{card}: {process.returncode}\n{said.read_text()[-2000:]}"
    return {card: json.loads(text) for card, text in out.items()}


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("card", CARDS)
def test_on_a_card(found, card, scenario):
    seen = found[card][scenario]
    assert not seen["fault"], seen["fault"]
    assert not seen["half"]
    if scenario not in TRAININGS:
        assert not seen.get("waits")
        return
    numbers = seen["numbers"]
    if seen["precision"] == "16-mixed" and numbers["train/skipped_steps"] == 1:
        # on some processors one of the steps overflows at the scaler's first scale, which it leaves out and halves
        numbers.pop("train/gradient_norm")
    assert numbers and all(map(math.isfinite, numbers.values())), numbers
    assert any(name.startswith("val/") for name in numbers)
    assert len(seen["written"]) == 2, seen["written"]
    assert seen["weights"] == "torch.float32"  # also their averages
    precision = {"t4": "16-mixed", "a100": "bf16-mixed"}[card]
    if scenario.endswith("_other"):
        precision = {"t4": "32-true", "a100": "16-mixed"}[card]
    assert seen["precision"] == precision
    allowed = 0
    if precision == "16-mixed":
        optimisers = 2 if scenario.startswith(("vavae_full", "rae_decoder")) else 1
        allowed = len(QUIET) * optimisers
    assert all(SCALER in what for what in seen["waits"]) and sum(seen["waits"].values()) <= allowed, seen["waits"]
    batch = (BATCH, CAPTIONS) if scenario == "text_not_cached" else (BATCH,)
    assert seen["copies"] and all(any(of in what for of in batch) for what in seen["copies"]), seen["copies"]
