"""What a machine is, what training takes on it, and what is said of what cannot be."""

import re
from types import SimpleNamespace

import pytest
import torch
from tiny import refuses

from vavae_tools import prepare_environment
from vavae_tools.recipes.presets import find_preset
from vavae_tools.runtime import machine
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.machine import Machine, find_machine
from vavae_tools.training import devices
from vavae_tools.training.devices import (
    allow_tf32,
    compiles,
    describe,
    no_deterministic_form,
    precision_of,
    trainer_settings,
)
from vavae_tools.training.memory import memory_faults

T4S = Machine("t4", 2, "Tesla T4", 15_843_721_216)
P100 = Machine("t4", 1, "Tesla P100-PCIE-16GB", 17_059_545_088, (6, 0))
A100 = Machine("ampere", 8, "NVIDIA A100-SXM4-80GB", 85_097_971_712)
CPU = Machine("cpu", 1, "CPU")


@pytest.fixture
def on(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_RANK", "SLURM_NTASKS", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)

    def on(machine: Machine, **environment: str) -> None:
        monkeypatch.setattr(devices, "find_machine", lambda: machine)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    return on


def cards(monkeypatch, *found: tuple[str, tuple[int, int], int], built_for: tuple[str, ...]) -> None:
    """A torch that sees these cards."""
    fakes = {
        "is_available": lambda: bool(found),
        "device_count": lambda: len(found),
        "get_device_name": lambda card: found[card][0],
        "get_device_capability": lambda card: found[card][1],
        "get_device_properties": lambda card: SimpleNamespace(total_memory=found[card][2]),
        "get_arch_list": lambda: list(built_for),
        "mem_get_info": lambda card: (found[card][2], found[card][2]),
        "memory_reserved": lambda card: 0,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(machine.torch.cuda, name, fake)


def refused(said: str, **choices: object) -> None:
    refuses(said, trainer_settings, **choices)


# ---- the machine


def test_cards_as_torch_sees_them(monkeypatch):
    recent = ("sm_75", "sm_80", "sm_86", "sm_90")
    cards(monkeypatch, *[("Tesla T4", (7, 5), 15_843_721_216)] * 2, built_for=recent)
    assert find_machine() == T4S
    cards(monkeypatch, ("NVIDIA H100", (9, 0), 80 * 2**30), built_for=recent)
    assert (find_machine().kind, find_machine().capability) == ("ampere", (9, 0))
    cards(monkeypatch, ("NVIDIA A100", (8, 0), 40 * 2**30), ("Tesla T4", (7, 5), 15 * 2**30), built_for=recent)
    assert find_machine() == Machine("t4", 2, "Tesla T4", 15 * 2**30, (7, 5))  # the least sets the pace
    cards(monkeypatch, built_for=())
    assert find_machine() == CPU


def test_a_p100_is_used_where_torch_has_its_code_and_named_where_not(monkeypatch, on):
    p100 = ("Tesla P100-PCIE-16GB", (6, 0), 17_059_545_088)
    cards(monkeypatch, p100, built_for=("sm_60", "sm_75"))
    assert find_machine() == P100
    on(P100)
    assert trainer_settings()["precision"] == "16-mixed" and compiles(None, P100) is False
    cards(monkeypatch, p100, built_for=("sm_75", "sm_80"))
    with pytest.warns(UserWarning, match=r"has no code for a Tesla P100-PCIE-16GB \(sm_60\): .* GPU T4 x2"):
        found = find_machine()
    assert found.kind == "cpu"
    on(found)
    refused(r"it has no code for the Tesla P100-PCIE-16GB \(sm_60\)\): take --accelerator", accelerator="gpu")


# ---- precision and compilation


PRECISIONS = [
    *((None, CPU, "auto", "32-true"), (None, T4S, "ddp", "16-mixed"), (None, A100, "fsdp", "bf16-mixed")),
    (None, T4S, "fsdp", "32-true"),  # Lightning's FSDP2 has no gradient scaler
    (None, A100, "deepspeed_stage_2", "32-true"),  # it would cast the averaged weights too
    *((False, T4S, "auto", "32-true"), ("16-mixed", T4S, "auto", "16-mixed"), (16, T4S, "auto", "16-mixed")),
    *(("fp16", A100, "auto", "16-mixed"), ("bf16", CPU, "auto", "bf16-mixed")),
]


@pytest.mark.parametrize(("name", "machine", "strategy", "precision"), PRECISIONS)
def test_precision(name, machine, strategy, precision):
    assert precision_of(name, machine, strategy) == precision


def test_precision_that_cannot_be():
    for name, card, strategy, message in (
        ("fp16", CPU, "auto", "A CPU has no fp16: use --precision 32"),
        ("bf16", T4S, "auto", "Tesla T4 has no bf16"),
        ("8", A100, "auto", "No precision '8'; there are 32, 16, bf16"),
        ("16", T4S, "fsdp", "no gradient scaler: take --precision 32, or ddp"),
        ("bf16", A100, "deepspeed", "would round the averaged weights to it: take --precision 32"),
    ):
        refuses(message, precision_of, name, card, strategy)


def test_compilation_by_machine_and_what_is_there(monkeypatch, tmp_path):
    for name in ("CC", "CXX", "CPATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(devices.sysconfig, "get_path", lambda name, scheme: str(tmp_path))

    def there(*compilers: str, headers: bool = True, triton: bool = True) -> None:
        monkeypatch.setattr(devices.shutil, "which", lambda name: name if name in compilers else None)
        monkeypatch.setattr(devices, "find_spec", lambda name: name if triton else None)
        (tmp_path / "Python.h").touch() if headers else (tmp_path / "Python.h").unlink(missing_ok=True)

    there("gcc", "g++")
    assert [compiles(None, found) for found in (CPU, P100, T4S, A100)] == [False, False, False, True]
    assert compiles(True, T4S) is True and compiles(True, CPU) is True and compiles(False, A100) is False
    refuses(r"Tesla P100-PCIE-16GB has compute capability 6\.0 and Triton needs 7\.0", compiles, True, P100)
    there(headers=False, triton=False)
    missing = r"no Triton .* and no C compiler .* and no Python\.h in \S+ \(apt-get install python3-dev"
    refuses(f"compile=true, but there is {missing}", compiles, True, A100)
    said = []
    assert compiles(None, A100, said.append) is False and re.match(f"compile stays off: there is {missing}", *said)


def test_tf32_comes_as_training_starts_and_only_where_it_is(on):
    try:
        for found, precision in ((T4S, "highest"), (CPU, "highest"), (A100, "high")):
            torch.set_float32_matmul_precision("highest")
            on(found)
            settings = trainer_settings()
            assert torch.get_float32_matmul_precision() == "highest"
            allow_tf32(settings)
            assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision("highest")


# ---- settings and strategies


def test_settings_by_machine(on):
    on(T4S)
    settings = trainer_settings()
    assert (settings["accelerator"], settings["devices"], settings["strategy"]) == ("gpu", 2, "ddp")
    assert settings["precision"] == "16-mixed" and settings["use_distributed_sampler"] is False
    assert trainer_settings(parts_may_go_unused=True)["strategy"] == "ddp_find_unused_parameters_true"
    assert trainer_settings(devices=1)["strategy"] == "auto"
    assert trainer_settings(deterministic=True)["strategy"] == "ddp"
    cpu = trainer_settings(accelerator="cpu")
    assert (cpu["accelerator"], cpu["devices"], cpu["precision"]) == ("cpu", 1, "32-true")
    on(A100)
    for choices in ({}, {"strategy": "ddp"}):  # groups of gradients stay as they are in the first step
        assert trainer_settings(**choices, deterministic=True)["strategy"] == "ddp_find_unused_parameters_true"
    on(CPU)
    assert trainer_settings()["accelerator"] == "cpu"
    refused(r"No GPU that torch can use here \(none is there\): take --accelerator cpu", accelerator="gpu")
    assert find_preset(machine=A100).dit_batch_size == 256 and find_preset(machine=T4S).dit_batch_size == 64


def test_torchrun_says_how_many_and_starts_several_machines(on):
    on(A100)
    command = "torchrun --nnodes=2 --nproc_per_node=4 --node_rank=0 --master_addr=ADDRESS --master_port=29500 "
    refused(f"--num_nodes 2: .*{command}", devices=4, num_nodes=2)
    on(A100, SLURM_NTASKS="16", SLURM_PROCID="3")
    refused("SLURM has 16 tasks here, .*--ntasks-per-node=1 and srun torchrun")
    on(A100, TORCHELASTIC_RUN_ID="x", LOCAL_RANK="0", LOCAL_WORLD_SIZE="8", WORLD_SIZE="16")
    settings = trainer_settings(devices=1)
    assert (settings["devices"], settings["num_nodes"], settings["strategy"]) == (8, 2, "ddp")
    on(T4S)
    refused(r"torchrun started 8 processes here, but .* take --nproc_per_node=2")


def test_what_is_unknown_or_does_not_suit(on, monkeypatch):
    on(T4S)
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    refused(r"--devices 4, but this machine has 2 \(Tesla T4\): take --devices 2", devices=4)
    refused("No --strategy 'dpp' .did you mean ddp.*; there are auto, ddp, ", strategy="dpp")
    refused("--strategy deepspeed needs its package: pip install deepspeed", strategy="deepspeed")
    refused("--strategy deepspeed_stage_2 needs CUDA GPUs", strategy="deepspeed_stage_2", accelerator="cpu")
    refused("--strategy fsdp is for the denoiser", strategy="fsdp", shardable=False)
    refused("--devices two: expected how many, at least one, or auto", devices="two")
    refused("--num_nodes 0: expected how many, at least one", num_nodes=0)
    monkeypatch.setattr(devices, "find_spec", lambda name: name)
    assert trainer_settings(strategy="deepspeed_stage_2")["strategy"] == "deepspeed_stage_2"  # Lightning's own


def test_the_line_that_is_printed(on, monkeypatch):
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 4)
    on(CPU)
    settings = trainer_settings()
    line = "CPU, 4 cores: one process, float32, compile off, batch 8 per device, 0 workers"
    assert describe(settings, False, batch_size=8, num_workers=0) == line
    on(T4S)
    settings = trainer_settings(accumulate_grad_batches=4, deterministic=True)
    assert settings["deterministic"] is True
    assert describe(settings, False, batch_size=64, num_workers=2) == (
        "2 × Tesla T4 (15 GB each): ddp, fp16 with a gradient scaler, compile off, batch 64 per device, 4 batches a "
        "step, deterministic, 2 workers"
    )
    on(A100)
    settings = {**trainer_settings(strategy="fsdp"), "num_nodes": 2}
    line = "2 machines of 8 × NVIDIA A100-SXM4-80GB (79 GB each): fsdp, bf16, compile on, batch 8 per device, 1 worker"
    assert describe(settings, True, 8, 1) == line


# ---- the card


def test_the_environment_is_set_before_a_card_is_used_and_only_where_the_user_has_not():
    grows, workspace = "expandable_segments:True", {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    both = {"PYTORCH_ALLOC_CONF": grows, "PYTORCH_CUDA_ALLOC_CONF": grows}
    for before, platform, after in (
        ({}, "linux", {**both, **workspace}),
        ({}, "win32", workspace),
        ({"PYTORCH_CUDA_ALLOC_CONF": "x"}, "linux", {"PYTORCH_CUDA_ALLOC_CONF": "x", **workspace}),
        ({"PYTORCH_ALLOC_CONF": "", "CUBLAS_WORKSPACE_CONFIG": ":16:8"}, "linux", {}),
    ):
        environment = dict(before)
        prepare_environment(environment, platform)
        assert environment == {**before, **after}


@pytest.fixture
def taken(monkeypatch):
    """A card with so much free, and so much kept by this process; the cards that were taken."""
    taken = []

    def card(free: float | str, kept: float = 0.0) -> list[int]:
        def info(number):
            if isinstance(free, str):
                raise RuntimeError(f"CUDA error: {free}\nCompile with TORCH_USE_CUDA_DSA")
            return int(free * 2**30), int(14.6 * 2**30)

        cards(monkeypatch, *[("Tesla T4", (7, 5), 0)] * 2, built_for=())
        fakes = {"set_device": taken.append, "mem_get_info": info, "memory_reserved": lambda card: int(kept * 2**30)}
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)
        return taken

    return card


def test_a_card_that_another_process_holds_is_said_at_the_start(taken, on):
    on(Machine("t4", 1, "Tesla T4", 15_843_721_216))
    taken(3.0)
    assert trainer_settings()["devices"] == 1
    for free, said in (
        (0.2, r"GPU 0 has 0\.2 of its 14\.6 GiB free: another process holds it, such as a notebook's other kernel"),
        ("out of memory", r"GPU 0 has no room for this process \(CUDA error: out of memory\): another process"),
        ("all CUDA-capable devices are busy or unavailable", "End that one, or restart the notebook's kernels"),
    ):
        taken(free)
        refused(said)
    taken(0.2, kept=8.0)  # its own, of an earlier cell
    assert trainer_settings()["devices"] == 1
    taken("an illegal memory access")
    with pytest.raises(RuntimeError, match="illegal"):
        trainer_settings()


def test_each_process_takes_its_own_card_and_the_one_that_starts_them_none(taken, on):
    on(T4S)
    found = taken(14.0)
    trainer_settings()
    assert found == []  # two processes will be started
    on(T4S, TORCHELASTIC_RUN_ID="x", LOCAL_WORLD_SIZE="2", WORLD_SIZE="2", LOCAL_RANK="1")
    trainer_settings()
    assert found == [1]


def test_what_has_no_deterministic_form_is_said_in_a_line():
    error = RuntimeError("reflection_pad2d_backward_cuda does not have a deterministic implementation, but you set …")
    torch.use_deterministic_algorithms(True)
    try:
        said = "^deterministic=true, but reflection_pad2d_backward_cuda has no deterministic form on this device: leave"
        with pytest.raises(UserError, match=said), memory_faults(8):
            raise error
        error = RuntimeError("… you must set an environment variable … CUBLAS_WORKSPACE_CONFIG=:4096:8 …")
        assert "import vavae_tools first" in no_deterministic_form(error)
    finally:
        torch.use_deterministic_algorithms(False)
