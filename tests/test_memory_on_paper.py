"""The simulated allocator against sequences worked out by hand, and what of a run on paper it is asked for."""

from dataclasses import replace

import pytest
import torch

from benchmarks.memory import MACHINES, STAGES, WORKSPACE, Allocator, Case, simulated, verdict
from vavae_tools.recipes.presets import find_preset
from vavae_tools.runtime.machine import find_device, find_machine

KIB, MIB = 2**10, 2**20


def test_blocks_and_segments_are_of_torchs_sizes():
    card = Allocator()
    first, second, third = card.malloc(1), card.malloc(513), card.malloc(MIB)
    assert [(b.start, b.size) for b in (first, second, third)] == [(0, 512), (512, KIB), (1536, MIB)]
    assert (card.alive, card.reserved) == (MIB + 1536, 2 * MIB)
    assert card.malloc(MIB).segment != first.segment and card.reserved == 4 * MIB  # 1 MiB − 1.5 KiB are left
    sizes = {MIB + 1: 20, 10 * MIB - 512: 20, 10 * MIB: 10, 10 * MIB + 1: 12, 33 * MIB: 34}
    for asked, segment in sizes.items():
        card = Allocator()
        card.malloc(asked)
        assert card.reserved == segment * MIB, asked
    card = Allocator()
    assert card.malloc(19 * MIB).size == 20 * MIB  # a segment of its own, of which 1 MiB stays with it
    card = Allocator()
    assert card.malloc(9 * MIB).size == 9 * MIB and [b.size for b in card.free_blocks] == [11 * MIB]
    assert card.malloc(10 * MIB).size == 11 * MIB and not card.free_blocks and card.reserved == 20 * MIB


def test_tensors_without_contents_take_what_theirs_would():
    with simulated(MACHINES["T4x2"], others=MIB) as card:
        assert (find_machine().kind, find_machine().devices, find_device()) == ("t4", 2, "cuda")
        assert torch.device("cuda").type == "cuda"  # by which the package decides on half precision
        at_first = card.alive
        assert at_first == WORKSPACE // 512 * 512
        half = torch.zeros(2, 4, 512, 512, dtype=torch.float16, device="cuda")
        assert card.alive - at_first == 4 * MIB
        wide = half.float()
        view = wide[0]
        assert card.alive - at_first == 12 * MIB
        del wide
        assert card.alive - at_first == 12 * MIB  # the view holds it
        del view, half
        assert card.alive == at_first
        free, total = torch.cuda.mem_get_info()
        assert total - free == card.reserved + 513 * MIB
    assert find_machine().kind == "cpu"


def on_paper(stage: str, batch_size: int) -> list[tuple[str, int, int]]:
    """Phases, bytes alive and reserved, of a small model's stage."""
    small = {"vavae_size": "small", "image_size": 32, "dit": {"hidden_size": 32, "depth": 1, "num_heads": 2}}
    machine = MACHINES["T4x1"]
    with simulated(machine) as card:
        STAGES[stage](
            card, Case(machine, replace(find_preset(machine=machine), **small), True, {"batch_size": batch_size})
        )
    assert all(0 < alive <= reserved < machine.memory / 10 for _, alive, reserved in card.marks)
    return card.marks


@pytest.mark.filterwarnings("ignore")  # Lightning's, of lengths that are none
@pytest.mark.parametrize("stage", ["vavae_full", "dit"])
def test_a_training_on_paper_has_steps_validation_and_previews(stage):
    assert [phase for phase, _, _ in on_paper(stage, 4)] == ["training", "validation", "previews"]


@pytest.mark.parametrize("stage", ["encoding", "sampling"])
def test_twice_the_images_take_about_twice_as_much(stage):
    (_, few, _), (_, many, _) = (on_paper(stage, count)[0] for count in (64, 128))
    assert 1.5 * few < many < 2.1 * few


def test_a_verdict_counts_contexts_and_other_processes():
    gib = 2**30
    cases = ((13.49, 0.5), (13.51, 0.5), (13.49, 0.6), (14.1, 0.0))
    said = [verdict(int(reserved * gib), int(others * gib), int(14.56 * gib)) for reserved, others in cases]
    assert said == ["fits", "tight", "does not fit", "does not fit"]


@pytest.mark.filterwarnings("ignore")
def test_without_attached_weights_the_vavae_takes_an_eighth_of_a_t4():
    machine = MACHINES["T4x2"]
    with simulated(machine) as card:
        STAGES["vavae_light"](card, Case(machine, find_preset(machine=machine), True, {}))
    assert [phase for phase, _, _ in card.marks] == ["training", "validation", "previews"]
    assert all(reserved < machine.memory / 8 for _, _, reserved in card.marks)
