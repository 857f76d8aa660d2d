"""How networks compute on a device: precisions by name, autocast, the layout of convolutions."""

import pytest
import torch
from tiny import same, tiny_vavae

from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.machine import Machine
from vavae_tools.runtime.precision import computing_in, for_inference, precision_on, trying_convolutions

CPU, T4, A100 = Machine("cpu", 1, "CPU"), Machine("t4", 2, "Tesla T4"), Machine("ampere", 1, "NVIDIA A100")


@pytest.mark.parametrize(
    ("machine", "name", "expected"),
    [
        (CPU, None, "32"),
        (T4, None, "16"),
        (A100, None, "bf16"),
        (A100, "fp16", "16"),
        (CPU, "bf16", "bf16"),
        (T4, 16, "16"),
        (T4, False, "32"),
        (T4, "fp32", "32"),
    ],
)
def test_a_precision_by_machine_and_by_name(machine, name, expected):
    assert precision_on(machine, name) == expected


@pytest.mark.parametrize(
    ("machine", "name", "message"),
    [
        (T4, "bf16", r"Tesla T4 has no bf16 \(it is emulated and slow\): use --precision 16 or 32"),
        (CPU, "fp16", "A CPU has no fp16: use --precision 32"),
        (A100, "8", "No precision '8'; there are 32, 16, bf16"),
    ],
)
def test_a_precision_that_cannot_be(machine, name, message):
    with pytest.raises(UserError, match=message):
        precision_on(machine, name)


def test_a_precision_holds_whatever_is_set_around_it():
    linear, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    with computing_in("bf16", "cpu"):
        assert linear(x).dtype == torch.bfloat16
        with computing_in("32", "cpu"):
            assert linear(x).dtype == torch.float32


def test_the_layout_for_a_card_changes_no_number():
    model, kept = tiny_vavae(), tiny_vavae().state_dict()
    assert for_inference(model, "cpu") is model
    weight = model.decoder.conv_in.weight
    assert weight.is_contiguous()
    for_inference(model, "cuda:0")
    assert not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
    assert all(same(tensor, kept[name]) for name, tensor in model.state_dict().items())


def test_convolutions_are_tried_only_where_bits_may_change(monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)  # whatever a training before left
    with trying_convolutions():
        assert torch.backends.cudnn.benchmark
    assert not torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    try:
        with trying_convolutions():
            assert not torch.backends.cudnn.benchmark
    finally:
        torch.use_deterministic_algorithms(False)
