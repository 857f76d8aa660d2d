"""A frozen model is on its device for its work only, and computes in half precision where that is finite."""

import torch

from vavae_tools.runtime import machine
from vavae_tools.runtime.precision import Computing


def test_it_is_found_by_its_buffers_too():
    model = torch.nn.BatchNorm1d(2, affine=False, device="meta")
    assert machine._device_of(model).type == "meta" and machine._device_of(torch.nn.Identity()).type == "cpu"


def test_the_precision_of_a_device():
    assert (
        Computing(None, "cpu", "", print).precision == "32" and Computing(None, "cuda:1", "", print).precision == "16"
    )
    half = Computing("bf16", "cpu", "States", print)
    a, said = torch.full((1, 1), 1 + 2**-12), []
    half.log = said.append
    with torch.autocast("cpu", torch.bfloat16):
        assert half.in_half and half(lambda: a @ a) == 1 and half.again(lambda: a @ a) > 1 and half.again(lambda: a) > 1
    assert said == ["States are not finite in half precision: such batches are computed again in float32"]
