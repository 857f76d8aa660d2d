"""What is said where memory runs out, and the largest batch that fits: with stand-ins for what takes memory."""

import gc
import weakref
from itertools import product

import pytest
import torch
from tiny import new_dit, same, tiny_dit
from torch import nn

from vavae_tools.data.latents import LatentDataModule
from vavae_tools.recipes.vavae import fine_tune_vavae
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.machine import is_memory_fault
from vavae_tools.training.autoencoder_module import VAVAEModule
from vavae_tools.training.denoiser_module import DiffusionModule
from vavae_tools.training.devices import quiet_lightning
from vavae_tools.training.memory import (
    fitting_batch_size,
    keep_effective,
    memory_fault,
    memory_faults,
    of_size,
    whole_steps,
)
from vavae_tools.training.run import fit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 24.00 GiB")
CPU_FAULT = "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to …"


# ---- what is a lack of memory, and what is not


FAULTS = [
    *(FULL, torch.OutOfMemoryError("HIP or whatever else"), MemoryError("Unable to allocate 3 GiB for an array")),
    RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    *(RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), RuntimeError(CPU_FAULT)),
    RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nDefaultCPUAllocator: not enough memory: you …"),
]


@pytest.mark.parametrize("error", FAULTS)
def test_faults_of_memory_are_known(error):
    wrapped = RuntimeError("backend='inductor' raised")
    wrapped.__cause__ = error
    for fault in (error, wrapped):
        assert is_memory_fault(fault)
        line = memory_fault(fault, 8)
        assert "train.batch_size=4 train.accumulate_grad_batches=2" in line and "\n" not in line


@pytest.mark.parametrize("error", [RuntimeError("CUDA error: device-side assert"), ValueError("CUDA out of memory")])
def test_other_errors_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, memory_faults(8):
        raise error
    assert raised.value is error


# ---- the line


def test_the_line_in_full(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *device: (2**29, int(14.6 * 2**30)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *device: "Tesla T4")
    denoiser, _ = tiny_dit()
    further = ["vae.use_slicing=true (the VAE takes one image after the other)"]
    assert memory_fault(FULL, 96, 2, denoiser, further) == (
        "The memory of Tesla T4 (14.6 GiB) is too small for batches of 96. What helps: train.batch_size=48 "
        "train.accumulate_grad_batches=4 (the same 192 a step), or train.gradient_checkpointing=true (a third more "
        "time), or vae.use_slicing=true (the VAE takes one image after the other)"
    )
    denoiser.enable_gradient_checkpointing()
    assert "gradient_checkpointing" not in memory_fault(FULL, 96, 2, denoiser)
    assert "gradient_checkpointing" not in memory_fault(FULL, 96, 2, nn.Linear(1, 1))
    assert "What helps: a smaller model, smaller images, or several GPUs" in memory_fault(FULL, 1, 8, denoiser)


def test_what_the_fallen_step_held_is_let_go():
    """A notebook keeps the error, and must not keep the activations with it."""
    held = []

    def step():
        activations = torch.zeros(10)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError("CUDA out of memory")

    kept = None
    try:
        with memory_faults(8):
            step()
    except UserError as error:
        kept = error
    gc.collect()
    assert kept is not None and kept.__context__ is not None and held[0]() is None


def test_trainings_name_their_settings(split_dir, vavae_dir, latents_dir, tmp_path, monkeypatch):
    """In the words of commands, and of `fit` in Python's."""

    def step(self, *arguments):
        raise torch.OutOfMemoryError("CUDA out of memory")

    for kind in (VAVAEModule, DiffusionModule):
        monkeypatch.setattr(kind, "training_step", step)
    devices, log = {"accelerator": "cpu"}, lambda line: None
    settings = {"image_size": 24, "batch_size": 6, "accumulate_grad_batches": 2, "condition_dim": 4}
    said = r"train\.batch_size=3 train\.accumulate_grad_batches=4 \(the same 12 a step\), or train\.gradient_check"
    with pytest.raises(UserError, match=said):
        fine_tune_vavae(split_dir, tmp_path, original_vavae=vavae_dir, devices=devices, log=log, **settings)
    devices["accumulate_grad_batches"] = 3
    with pytest.raises(UserError, match=r"What helps: batch_size=4 accumulate_grad_batches=6 \(the same 24 a step\)$"):
        fit(new_dit(), LatentDataModule(latents_dir, 8), tmp_path, 2, devices=devices, log=log)


# ---- the largest batch


def test_keep_effective_is_exact_and_the_largest():
    for effective, fitting in product(range(1, 130), range(0, 140)):
        batch, gathered = keep_effective(effective, fitting)
        assert batch * gathered == effective and 1 <= batch <= max(1, fitting)
        assert not any(effective % size == 0 for size in range(batch + 1, min(effective, fitting) + 1))


class Room:
    """For so many samples; notes what was tried."""

    def __init__(self, room: int) -> None:
        self.room, self.tried = room, []

    def __call__(self, size: int) -> None:
        self.tried.append(size)
        if size > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize("start", [1, 3, 8, 96])
def test_the_largest_that_fits_is_found(start, monkeypatch):
    """Exactly up to 32, above that to a sixteenth."""
    monkeypatch.setattr(gc, "collect", lambda: 0)  # which takes a tenth of a second in a process of many tests
    for room, largest in product([1, 2, 7, 15, 16, 17, 23, 24, 31, 63, 64, 100, 511], [None, 1, 17, 96, 1000]):
        step, bound = Room(room), room if largest is None else min(room, largest)
        found = fitting_batch_size(step, start, largest)
        assert found in step.tried and bound - (bound // 16 if bound > 32 else 0) <= found <= bound
        assert len(step.tried) == len(set(step.tried)) <= 15 and max(step.tried) <= (largest or 1024)


def test_the_search_doubles_or_halves_then_bisects():
    step = Room(13)
    assert fitting_batch_size(step, start=96) == 13 and step.tried == [96, 48, 24, 12, 18, 15, 13, 14]
    step = Room(0)
    with pytest.raises(UserError, match=r"^Not even a batch of 1 fits"):
        fitting_batch_size(step, start=8)
    assert step.tried == [8, 4, 2, 1]


# ---- whole steps of a module


def test_whole_steps_are_tried_on_copies(monkeypatch):
    """With gathered gradients beside optimiser states; the module and all random states stay bit by bit."""
    quiet_lightning()
    seen, real = [], DiffusionModule.training_step

    def step(self, batch, batch_idx):
        states = sum(len(state) for optimizer in self.trainer.optimizers for state in optimizer.state.values())
        gathered = any(weight.grad is not None for weight in self.network.parameters())
        seen.append((len(batch["index"]), states > 0, gathered))
        loss = real(self, batch, batch_idx)
        Room(5)(len(batch["index"]))
        return loss

    monkeypatch.setattr(DiffusionModule, "training_step", step)
    one = {"latents": torch.ones(1, 2, 8, 8), "labels": torch.zeros(1).long(), "index": torch.zeros(1).long()}
    module = new_dit()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random_before = torch.get_rng_state()
    settings = module.trainer_settings(accelerator="cpu", accumulate_grad_batches=3)
    steps = whole_steps(module, lambda size: of_size(one, size), settings)
    assert fitting_batch_size(steps, start=4) == 5
    assert seen[:4] == [(4, False, False), (4, False, True), (4, True, True), (4, True, True)]
    assert [size for size, *_ in seen] == [4] * 4 + [8, 6] + [5] * 4
    assert all(same(value, before[name]) for name, value in module.state_dict().items())
    assert all(weight.grad is None for weight in module.parameters())
    assert same(torch.get_rng_state(), random_before) and module._trainer is None


def test_one_of_several_processes_tries_alone(monkeypatch):
    started = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": 2, "RANK": 0, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}
    started |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "GROUP_RANK": 0}
    for name, value in started.items():
        monkeypatch.setenv(name, str(value))
    module = new_dit()
    settings = module.trainer_settings(accelerator="cpu")
    assert settings["strategy"] == "ddp" and settings["devices"] == 2
    batch = {"latents": torch.arange(3.0)[:, None, None, None].expand(3, 2, 8, 8), "labels": torch.tensor([0, 1, 2])}
    made = of_size({**batch, "index": torch.tensor([5, 6, 7]), "name": "x"}, 5)
    assert made["latents"][:, 0, 0, 0].tolist() == [0, 1, 2, 0, 1] and made["index"].tolist() == [5, 6, 7, 5, 6]
    steps = whole_steps(module, lambda size: of_size(made, size), settings)
    assert fitting_batch_size(steps, largest=4) == 4 and not torch.distributed.is_initialized()
