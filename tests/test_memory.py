"""What is said where memory runs out, and the largest batch that fits: with stand-ins for what takes memory."""

import gc
import random
import threading
import weakref
from itertools import product

import numpy as np
import pytest
import torch
from tiny import same, tiny_dit, trained_looking
from torch import nn

from vavae_tools.data.latents import LatentDataModule
from vavae_tools.recipes.rae import fine_tune_rae_decoder
from vavae_tools.recipes.vavae import fine_tune_vavae
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.machine import is_memory_fault
from vavae_tools.runtime.ranks import Ranks
from vavae_tools.training import memory
from vavae_tools.training.autoencoder_module import RAEDecoderModule, VAVAEModule
from vavae_tools.training.denoiser_module import DiffusionModule
from vavae_tools.training.devices import quiet_lightning
from vavae_tools.training.memory import (
    PYTHON,
    WITH_SEARCH,
    Names,
    bytes_at_rest,
    find_batch_size,
    fitting_batch_size,
    keep_effective,
    memory_fault,
    memory_faults,
    of_size,
    smallest,
    whole_steps,
)
from vavae_tools.training.run import fit

GB = 2**30
CPU_FAULT = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "4294967296 bytes. Error code 12 (Cannot allocate memory)"
)


def cuda_fault(asked="2.00 GiB", total=24.0, free=0.5, mine=23.5, tensors=20.0, spare=2.5, gpu=0):
    """In torch's words, numbers in GiB."""
    return torch.OutOfMemoryError(
        f"CUDA out of memory. Tried to allocate {asked}. GPU {gpu} has a total capacity of {total:.2f} GiB of which "
        f"{free:.2f} GiB is free. Including non-PyTorch memory, this process has {mine:.2f} GiB memory in use. Of the "
        f"allocated memory {tensors:.2f} GiB is allocated by PyTorch, and {spare:.2f} GiB is reserved by PyTorch but "
        "unallocated. If reserved but unallocated memory is large try setting PYTORCH_ALLOC_CONF"
    )


def line_for(batch_size, gathered=1, names=WITH_SEARCH, **named):
    """What a training of sentences would say of an error."""
    return lambda error: memory_fault(error, batch_size, gathered, names=names, **named)


class Of(nn.Module):
    """So many GiB of weights, of which none are really there; one part can do gradient checkpointing, or none."""

    def __init__(self, size: float, checkpoints: bool | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(int(size * GB / 4), device="meta"))
        if checkpoints is not None:
            self.gradient_checkpointing = checkpoints


# ---- what is a lack of memory, and what is not


@pytest.mark.parametrize(
    "error",
    [
        cuda_fault(),
        torch.OutOfMemoryError("HIP or whatever else"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError(CPU_FAULT),
        RuntimeError("Caught RuntimeError in DataLoader worker process 0.\nTraceback: DefaultCPUAllocator: not enough "
                     "memory: you tried to allocate 12 bytes."),
        MemoryError("Unable to allocate 3 GiB for an array"),
    ],
)  # fmt: skip
def test_faults_of_memory_are_known(error):
    assert is_memory_fault(error)
    line = line_for(8)(error)
    assert "data.batch_size" not in line and "train.batch_size=" in line and "\n" not in line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
        RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED"),
        ValueError("CUDA out of memory"),
        UserError("CUDA out of memory"),
    ],
)
def test_other_errors_stay_what_they_are(error):
    assert not is_memory_fault(error) and memory_fault(error, 8) is None
    with pytest.raises(type(error)) as raised, memory_faults(line_for(8)):
        raise error
    assert raised.value is error


def test_a_fault_of_memory_that_another_error_wraps():
    wrapped = RuntimeError("backend='inductor' raised")
    wrapped.__cause__ = cuda_fault()
    assert is_memory_fault(wrapped) and "2.0 GiB more were asked for" in memory_fault(wrapped, 8)


def test_torch_says_it_in_these_words_here():
    said = r"^The memory of this machine \([\d.,]+ GiB\) is too small for batches of 7: 1,048,576.0 GiB more"
    with pytest.raises(UserError, match=said), memory_faults(line_for(7)):
        torch.empty(2**48, dtype=torch.float32)


# ---- the line


def test_the_line_in_full():
    """1.5 GiB of weights and no step yet: 20 + 2 − 1.5 GiB for 96 are too many, of 0.92 · 24 − 6 GiB there fit 75."""
    line = line_for(96, module=Of(1.5, checkpoints=False), slicing=False)
    with pytest.raises(UserError) as raised, memory_faults(line):
        raise cuda_fault()
    assert str(raised.value) == (
        "The memory of GPU 0 (24.0 GiB) is too small for batches of 96: 2.0 GiB more were asked for, 0.5 GiB are "
        "free, this process holds 23.5 GiB. What helps: train.batch_size=48 train.accumulate_grad_batches=2 "
        "(the same 96 a step), or train.gradient_checkpointing=true (a third more time), or vae.use_slicing=true (the "
        "VAE takes one picture after the other); --auto_batch_size finds the largest batch that fits"
    )


def suggested(line: str) -> tuple[int, int]:
    words = line.replace(",", " ").split()
    return tuple(
        int(next(word for word in words if word.startswith(name)).partition("=")[2])
        for name in ("train.batch_size=", "train.accumulate_grad_batches=")
    )


@pytest.mark.parametrize(
    ("batch", "gathered", "weights", "stepped", "fault", "expected"),
    [
        # before the first step has ended nobody knows what more was to come: at most half
        (96, 1, 0.25, False, cuda_fault(), (48, 2)),
        # after it less is enough: of 0.92 · 24 GiB 21.08 are the batches', of which 96 asked for 21.5: 94 fit
        (96, 10, 0.25, True, cuda_fault(tensors=20.25), (80, 12)),
        (96, 94, 0.25, True, cuda_fault(tensors=20.25), (94, 96)),
        # 8 GiB that others hold are not there: of 0.92 · 16 GiB 8.72 are the batches', of which 96 asked for 12.5: 66
        (96, 11, 1.5, True, cuda_fault("2.00 GiB", free=0.5, mine=15.5, tensors=15.0), (66, 16)),
        # 4.5 GiB of weights: 18 at rest, 4.08 left, of which 96 asked for 17.5: 22
        (96, 1, 4.5, False, cuda_fault(), (16, 6)),
        (96, 11, 4.5, False, cuda_fault(), (22, 48)),
        # more at rest than there is: never 0
        (96, 1, 6.0, False, cuda_fault(), (1, 96)),
        (3, 1, 0.25, False, cuda_fault(), (1, 3)),
        (2, 1, 0.25, True, cuda_fault(), (1, 2)),
        (97, 1, 0.25, False, cuda_fault(), (1, 97)),
        # nothing but that it is so
        (96, 2, 0.25, False, RuntimeError("CUDA error: out of memory"), (48, 4)),
        (96, 1, 0.25, False, RuntimeError(CPU_FAULT), (48, 2)),
    ],
)
def test_values_keep_the_effective_batch_and_fit_the_card(batch, gathered, weights, stepped, fault, expected):
    found = suggested(line_for(batch, gathered, module=Of(weights), stepped=stepped)(fault))
    assert found == expected and found[0] * found[1] == batch * gathered and found[0] < batch


def test_without_room_for_the_weights_that_is_said():
    line = memory_fault(cuda_fault(), 96, module=Of(6.0))
    assert "optimiser states alone take 24.0 GiB" in line and "--strategy fsdp" in line
    assert "alone" not in memory_fault(cuda_fault(), 96, module=Of(4.5))


def test_a_batch_of_one_cannot_be_smaller():
    line = line_for(1, 8, module=Of(0.5, False), slicing=True)(cuda_fault())
    assert "What helps: train.gradient_checkpointing=true" in line
    assert line.endswith("train.batch_size=1 and vae.use_slicing=true are set already")
    line = line_for(1, 8, module=Of(0.5, True))(cuda_fault())
    assert "What is left: a smaller model" in line and "train.gradient_checkpointing=true are set" in line


@pytest.mark.parametrize(("on", "said"), [(None, None), (False, "=true (a third"), (True, "=true is set already")])
def test_gradient_checkpointing_is_looked_up_in_the_module(on, said):
    line = line_for(96, module=nn.Sequential(Of(0.5, on)))(cuda_fault())
    assert said in line if said else "gradient_checkpointing" not in line


def test_a_dit_tells_whether_it_checkpoints():
    denoiser, _ = tiny_dit()
    assert "gradient_checkpointing=true (a third" in line_for(96, module=denoiser)(cuda_fault())
    denoiser.enable_gradient_checkpointing()
    assert "gradient_checkpointing=true is set already" in line_for(96, module=denoiser)(cuda_fault())


def test_other_processes_on_the_card_are_named():
    line = memory_fault(cuda_fault(mine=15.5), 96)
    assert "others hold 8.0 GiB" in line and "or end what else runs on that card" in line
    assert "others" not in memory_fault(cuda_fault(), 96)


def test_settings_have_the_names_of_their_command():
    line = memory_fault(cuda_fault(), 16, module=Of(0.1, False), names=PYTHON)
    assert "batch_size=8 accumulate_grad_batches=2 (the same 16 a step)" in line and "train." not in line
    line = memory_fault(cuda_fault(), 16, module=Of(0.1, False), slicing=False)
    assert "train.batch_size=8 train.accumulate_grad_batches=2" in line and "slicing" not in line
    names = Names(slicing="vae.use_slicing", cached="data.cache=true")
    assert "or data.cache=true (the VAE is not there" in memory_fault(cuda_fault(), 16, slicing=True, names=names)


def test_what_the_fallen_step_held_is_let_go():
    """A notebook keeps the error, and must not keep the activations with it."""
    held = []

    def step():
        activations = torch.zeros(10)
        held.append(weakref.ref(activations))
        raise cuda_fault()

    kept = None
    try:
        with memory_faults(line_for(8)):
            step()
    except UserError as error:
        kept = error
    gc.collect()
    assert kept is not None and kept.__context__ is not None and held[0]() is None


def falls_in_step(number, monkeypatch, kind):
    """Let a module's training step of that number, counted from 1, end as on a full card."""
    steps, real = [], kind.training_step

    def step(self, *arguments):
        steps.append(arguments)
        if len(steps) == number:
            raise cuda_fault()
        return real(self, *arguments)

    monkeypatch.setattr(kind, "training_step", step)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("number", "values"), [(1, (3, 4)), (3, (4, 3))])
def test_fine_tuning_a_vavae_says_it_in_its_commands_words(split_dir, vavae_dir, tmp_path, monkeypatch, number, values):
    """Two batches of 6 a step: in the first step at most half of one is named, after it what is a little smaller."""
    falls_in_step(number, monkeypatch, VAVAEModule)
    settings = {"image_size": 24, "batch_size": 6, "accumulate_grad_batches": 2, "devices": {"accelerator": "cpu"}}
    settings |= {"original_vavae": vavae_dir, "condition_dim": 4, "say": lambda line: None}
    with pytest.raises(UserError) as raised:
        fine_tune_vavae(split_dir, tmp_path, **settings)
    assert str(raised.value).endswith(
        f"What helps: train.batch_size={values[0]} train.accumulate_grad_batches={values[1]} (the same 12 a step), or "
        "train.gradient_checkpointing=true (a third more time)"
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fine_tuning_a_decoder_says_it_in_its_keys(tmp_path, monkeypatch):
    falls_in_step(1, monkeypatch, RAEDecoderModule)
    data = {"count": 16, "num_classes": 2, "val_share": 0.25}
    settings = {"disc_weight": 0.0, "gradient_checkpointing": True, "devices": {"accelerator": "cpu"}}
    with pytest.raises(UserError) as raised:
        fine_tune_rae_decoder(data, "tiny", tmp_path, batch_size=4, max_steps=2, say=lambda line: None, **settings)
    assert str(raised.value).endswith(
        "What helps: train.batch_size=2 train.accumulate_grad_batches=2 (the same 4 a step); "
        "train.gradient_checkpointing=true is set already"
    )


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_anybodys_training_says_it_in_pythons_words(latents_dir, tmp_path, monkeypatch):
    falls_in_step(1, monkeypatch, DiffusionModule)
    devices = {"accelerator": "cpu", "accumulate_grad_batches": 3}
    with pytest.raises(UserError, match=r"helps: batch_size=4 accumulate_grad_batches=6 \(the same 24 a step\)$"):
        fit(new_dit(), LatentDataModule(latents_dir, 8), tmp_path, 2, devices=devices, say=lambda line: None)


def test_bytes_at_rest():
    module = nn.ModuleDict({"trained": nn.Linear(3, 4), "frozen": nn.Linear(2, 5).requires_grad_(False)})
    module.register_buffer("table", torch.zeros(7, dtype=torch.float64))
    trained, standing = 4 * 16, 4 * 16 + 4 * 15 + 8 * 7
    assert bytes_at_rest(module) == (standing, standing + 3 * trained)
    module["trained"](torch.ones(1, 3)).sum().backward()
    assert bytes_at_rest(module) == (standing + trained, standing + 3 * trained)
    assert bytes_at_rest(module, stepped=True) == (standing + 3 * trained,) * 2


# ---- the largest batch


def test_keep_effective_is_exact_and_the_largest():
    for effective in range(1, 130):
        for fitting in range(0, 140):
            batch, gathered = keep_effective(effective, fitting)
            assert batch * gathered == effective and 1 <= batch <= max(1, fitting)
            assert not any(effective % size == 0 for size in range(batch + 1, min(effective, fitting) + 1))


@pytest.fixture
def quick(monkeypatch):
    """Without collecting garbage after each try, which takes a tenth of a second in a process of many tests."""
    monkeypatch.setattr(gc, "collect", lambda: 0)


class Room:
    """For so many samples; notes what was tried."""

    def __init__(self, room: int) -> None:
        self.room, self.tried = room, []

    def __call__(self, size: int) -> None:
        self.tried.append(size)
        if size > self.room:
            raise cuda_fault()


@pytest.mark.parametrize("start", [1, 3, 8, 96])
def test_the_largest_that_fits_is_found(start, quick):
    """Exactly up to 16, above that the multiple of 8 below it, or a size that doubling has come along."""
    for room, largest in product([1, 2, 7, 15, 16, 17, 23, 24, 31, 63, 64, 100, 511], [None, 1, 17, 96, 1000]):
        step, bound = Room(room), room if largest is None else min(room, largest)
        found = fitting_batch_size(step, start, largest)
        assert found in step.tried and (found == bound if bound <= 16 else bound - 8 < found <= bound)
        assert len(step.tried) == len(set(step.tried)) <= 15 and max(step.tried) <= (largest or 1024)


def test_it_doubles_then_bisects_on_multiples_of_eight(quick):
    step = Room(100)
    assert fitting_batch_size(step) == 96 and step.tried == [1, 2, 4, 8, 16, 32, 64, 128, 96, 112, 104]
    step = Room(13)
    assert fitting_batch_size(step, start=96) == 13 and step.tried == [96, 48, 24, 12, 18, 15, 13, 14]


def test_not_even_one(quick):
    step = Room(0)
    with pytest.raises(UserError, match=r"^Not even a batch of 1 fits"):
        fitting_batch_size(step, start=8)
    assert step.tried == [8, 4, 2, 1]


def test_another_fault_ends_the_search():
    def step(size: int) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    with pytest.raises(RuntimeError, match="shapes"):
        fitting_batch_size(step)


def test_a_failed_try_leaves_nothing_in_memory(quick):
    held, alive = [], []

    def step(size: int) -> None:
        alive.append(sum(made() is not None for made in held))
        activations = torch.zeros(size)
        held.append(weakref.ref(activations))
        if size > 20:
            raise cuda_fault()

    assert fitting_batch_size(step) == 16
    assert alive == [0] * len(held) and len(held) == 7


def test_random_states_are_what_they_were(quick):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()

    def step(size: int) -> None:
        torch.rand(size), random.random(), np.random.rand()
        Room(5)(size)

    assert fitting_batch_size(step) == 5
    assert same(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert (np.random.get_state()[1] == before[2]).all()


# ---- whole steps of a module


def new_dit(**changes) -> DiffusionModule:
    denoiser, conditioner = tiny_dit()
    return DiffusionModule(trained_looking(denoiser), conditioner, **{"lr": 1e-3, "warmup_steps": 1, **changes})


ONE = {"latents": torch.ones(1, 2, 8, 8), "labels": torch.zeros(1, dtype=torch.long), "index": torch.zeros(1).long()}


def test_batches_of_any_size():
    given = {"latents": torch.arange(3.0)[:, None], "index": torch.tensor([5, 6, 7]), "name": "x"}
    made = of_size(given, 5)
    assert made["latents"].flatten().tolist() == [0, 1, 2, 0, 1] and made["index"].tolist() == [5, 6, 7, 5, 6]
    assert made["name"] == "x" and of_size(given, 2)["index"].tolist() == [5, 6]


@pytest.fixture
def limited(monkeypatch):
    """Training steps of a DiT that say, above so many latents, what a full card says; what they saw, in its order."""
    quiet_lightning()
    seen, real = [], DiffusionModule.training_step

    def step(self, batch, batch_idx):
        states = sum(len(state) for optimizer in self.trainer.optimizers for state in optimizer.state.values())
        gathered = any(weight.grad is not None for weight in self.network.parameters())
        seen.append((len(batch["index"]), states > 0, gathered))
        loss = real(self, batch, batch_idx)
        if len(batch["index"]) > 5:
            raise cuda_fault()
        return loss

    monkeypatch.setattr(DiffusionModule, "training_step", step)
    return seen


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_whole_steps_are_tried_on_copies(limited):
    """With gathered gradients beside optimiser states; the module and all random states stay bit by bit."""
    module = new_dit()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random_before = torch.get_rng_state()
    settings = module.trainer_settings(accelerator="cpu", accumulate_grad_batches=3)
    steps = whole_steps(module, lambda size: of_size(ONE, size), settings)
    assert fitting_batch_size(steps, start=4) == 5
    assert limited[:4] == [(4, False, False), (4, False, True), (4, True, True), (4, True, True)]
    assert [size for size, *_ in limited] == [4] * 4 + [8, 6] + [5] * 4
    assert all(same(value, before[name]) for name, value in module.state_dict().items())
    assert all(weight.grad is None for weight in module.parameters())
    assert same(torch.get_rng_state(), random_before) and module._trainer is None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_each_of_several_processes_tries_alone(limited, monkeypatch):
    started = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": 2, "RANK": 1, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2}
    started |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "GROUP_RANK": 0}
    for name, value in started.items():
        monkeypatch.setenv(name, str(value))
    module = new_dit()
    settings = module.trainer_settings(accelerator="cpu")
    assert settings["strategy"] == "ddp" and settings["devices"] == 2
    steps = whole_steps(module, lambda size: of_size(ONE, size), settings, place=1, gradients_twice=True)
    assert fitting_batch_size(steps, largest=4) == 4 and not torch.distributed.is_initialized()


def test_a_cpu_keeps_its_batch():
    said = []
    settings = {"accelerator": "cpu"}
    assert find_batch_size(None, None, settings, 96, say=said.append) == 96
    assert len(said) == 1 and "the batch stays 96" in said[0]


def in_threads(work, count: int) -> list:
    """What `work(rank)` makes or raises, each in a thread of its own."""
    made = [None] * count

    def run(rank: int) -> None:
        try:
            made[rank] = work(rank)
        except UserError as error:
            made[rank] = error

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return made


def test_the_smallest_of_all_processes(monkeypatch):
    store = torch.distributed.HashStore()
    monkeypatch.setattr(memory, "_SEARCHES", [1])
    monkeypatch.setattr(memory, "next", lambda turns: turns[0], raising=False)  # threads share what processes do not
    assert in_threads(lambda rank: smallest([40, 24, 32][rank], Ranks(rank, 3, rank, store)), 3) == [24, 24, 24]
    assert smallest(7, Ranks()) == 7


@pytest.mark.parametrize(("rooms", "expected"), [([40, 29], 24), ([40, 0], None)])
def test_all_processes_come_to_one_batch(monkeypatch, rooms, expected, quick):
    """Where one finds none, the others are not left waiting."""
    store = torch.distributed.HashStore()
    monkeypatch.setattr(memory, "_SEARCHES", [1])
    monkeypatch.setattr(memory, "next", lambda turns: turns[0], raising=False)
    monkeypatch.setattr(memory, "whole_steps", lambda *arguments, **named: Room(rooms[arguments[3]]))
    monkeypatch.setattr(memory, "fitting_batch_size", lambda step, start, largest, device: search(step, start, largest))
    card = type("Card", (), {"name": "a card", "total_memory": 24 * GB})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    search, said = fitting_batch_size, []

    def work(rank: int) -> int:
        ranks = Ranks(rank, 2, rank, store)
        return find_batch_size(None, None, {"accelerator": "gpu"}, 16, ranks=ranks, say=said.append)

    made = in_threads(work, 2)
    if expected is None:
        assert all(isinstance(error, UserError) and "Not even a batch of 1" in str(error) for error in made)
    else:
        assert made == [expected] * 2
        assert said[0].startswith(f"auto batch size: {expected} fit into a card (24.0 GiB, 8% of it kept free), the sm")


def test_names_of_the_text_to_image_experiment():
    assert WITH_SEARCH.search == "--auto_batch_size" and WITH_SEARCH.slicing == "vae.use_slicing"
