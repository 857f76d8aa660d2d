"""A frozen model is on its device for its work only, and computes in half precision where that is finite."""

import pytest
import torch

from vavae_tools.runtime import machine
from vavae_tools.runtime.machine import at_work
from vavae_tools.runtime.precision import Computing


def moved(monkeypatch, device: str) -> list[str]:
    """What happens while a linear layer works on a device."""
    model, happened = torch.nn.Linear(2, 2), []
    monkeypatch.setattr(model, "to", lambda device: happened.append(f"to {device}"))
    where = iter([torch.device("cpu"), torch.device(device)])
    monkeypatch.setattr(machine, "_device_of", lambda model: next(where))
    monkeypatch.setattr(machine, "release_memory", lambda: happened.append("given back"))
    with pytest.raises(RuntimeError, match="in the middle"), at_work(model, device):
        happened.append("works")
        raise RuntimeError("in the middle")
    return happened


def test_it_goes_back_and_gives_back_also_where_its_work_fails(monkeypatch):
    assert moved(monkeypatch, "cuda:1") == ["to cuda:1", "works", "to cpu", "given back"]
    assert moved(monkeypatch, "cpu") == ["to cpu", "works"]


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
