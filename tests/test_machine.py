"""How networks compute on a device: autocast, the layout of convolutions."""

import torch
from tiny import same, tiny_vavae

from vavae_tools.runtime.machine import computing_in, for_inference, trying_convolutions


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
