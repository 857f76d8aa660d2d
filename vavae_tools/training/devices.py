"""The Trainer for the machine at hand: a CPU, one or two 16 GB GPUs of a notebook, better cards, several machines."""

import logging
import os
import re
import shutil
import sysconfig
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch

from vavae_tools.runtime.console import log
from vavae_tools.runtime.errors import UserError, check_known
from vavae_tools.runtime.machine import Machine, find_machine, precision_on, take_card
from vavae_tools.runtime.ranks import started_already
from vavae_tools.training.config import TrainConfig

STRATEGIES = get_args(get_type_hints(TrainConfig)["strategy"])
LIGHTNING_PRECISIONS = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}  # as it calls `machine.PRECISIONS`
PRECISION_LABELS = {"32-true": "float32", "16-mixed": "fp16 with a gradient scaler", "bf16-mixed": "bf16"}


def precision_of(name: str | None, machine: Machine, strategy: str = "auto") -> str:
    """Return Lightning's precision for `16 | 32 | bf16 | fp16 | no`; None takes what suits machine and strategy."""
    short = {long: short for short, long in LIGHTNING_PRECISIONS.items()}.get(str(name), name)
    found = precision_on(machine, short)
    reason = ""
    if found == "16" and strategy == "fsdp":
        reason = "which has no gradient scaler"
    elif found != "32" and strategy.startswith("deepspeed"):
        reason = "which would round the averaged weights to it"
    if reason and name is not None:
        raise UserError(f"--precision {name} with --strategy {strategy}, {reason}: take --precision 32, or ddp")
    return LIGHTNING_PRECISIONS["32" if reason else found]


def compiles(choice: bool | None, machine: Machine | None = None, log: Callable[[str], None] = log) -> bool:
    """Return whether to `torch.compile` here; None: from capability 8.0 on, where it pays within minutes."""
    machine = machine or find_machine()
    if choice is False or (choice is None and machine.kind != "ampere"):
        return False
    on_gpu = machine.kind != "cpu"
    if on_gpu and machine.capability < (7, 0):  # Triton's least: a V100's, not a P100's
        found = f"{machine.name} has compute capability {'.'.join(map(str, machine.capability))}"
        raise UserError(f"compile=true, but {found} and Triton needs 7.0: leave it off")
    missing = []  # what torch's inductor, and Triton on a card, look for as they first compile
    if on_gpu and find_spec("triton") is None:
        missing.append("no Triton (pip install triton)")
    variable, usual = ("CC", ["gcc", "clang"]) if on_gpu else ("CXX", ["g++", "clang++", "cl"])
    if not any(map(shutil.which, [os.environ[variable]] if os.environ.get(variable) else usual)):
        compiler = f"{'C' if on_gpu else 'C++'} compiler ({usual[0]} or {usual[1]}, or the one that {variable} names)"
        missing.append(f"no {compiler}")
    scheme = sysconfig.get_default_scheme()  # Debian's own one names /usr/local
    folder = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    if not any(Path(path, "Python.h").is_file() for path in [folder, *os.environ.get("CPATH", "").split(os.pathsep)]):
        missing.append(f"no Python.h in {folder} (apt-get install python3-dev)")
    there = f"there is {' and '.join(missing)}"
    if missing and choice:
        raise UserError(f"compile=true, but {there}; install what is missing, or leave it off")
    if missing:
        log(f"compile stays off: {there}")
    return not missing


def trainer_settings(
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
    strategy: Any = "auto",
    precision: str | None = None,
    parts_may_go_unused: bool = False,
    gradient_clip_val: float | None = 1.0,
    shardable: bool = True,
    deterministic: bool = False,
    **lightning: Any,
) -> dict[str, Any]:
    """Return the arguments for `lightning.Trainer` on this machine, and on those that work together with it.

    Those that are not here are of `config.TrainConfig`, or further ones of `lightning.Trainer`.

    Args:
        devices: how many, or "auto" for all there are; torchrun decides that itself, and nodes too.
        strategy: one of `STRATEGIES`, or an object of Lightning's; "auto" takes "ddp" on more than one device.
        parts_may_go_unused: some weights may get no gradient in a step, which plain ddp refuses.
        gradient_clip_val: largest norm of the gradients; None where the module clips.
        shardable: whether the module can be cut over devices: one optimiser, and `configure_model` knows how.
    """
    started = started_already()
    if started:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    machine = find_machine() if accelerator != "cpu" else Machine("cpu", 1, "CPU")
    if accelerator in ("gpu", "cuda") and machine.kind == "cpu":
        there = f"it has no code for the {machine.unusable}" if machine.unusable else "none is there"
        help = "take --accelerator cpu, or switch the GPU on in the settings (Kaggle: GPU T4 x2)"
        raise UserError(f"No GPU that torch can use here ({there}): {help}")
    on_gpu = machine.kind != "cpu"
    count = _at_least_one("devices", (machine.devices if on_gpu else 1) if devices == "auto" else devices)
    num_nodes = _at_least_one("num_nodes", num_nodes)
    if lightning.get("check_val_every_n_epoch") is not None:
        _at_least_one("check_val_every_n_epoch", lightning["check_val_every_n_epoch"])
    _check_count(count, num_nodes, machine, started)
    name = strategy if isinstance(strategy, str) else "auto"
    _check_strategy(name, shardable, on_gpu)
    precision = precision_of(precision, machine, name)
    processes = count * num_nodes
    if strategy == "auto" and processes > 1:
        strategy = "ddp"
    # plain DDP groups gradients anew after a run's first step, also one's that resumes: three are then added in another
    # order (two have only one), and the last bits differ
    if strategy == "ddp" and (parts_may_go_unused or (deterministic and processes > 2)):
        strategy = "ddp_find_unused_parameters_true"
    if strategy == "fsdp":
        from vavae_tools.training.optim import Sharded

        strategy = Sharded(processes)
    if on_gpu and (started or processes == 1):  # this process trains, and starts no others that do
        take_card(int(os.environ["LOCAL_RANK"]) if started else 0)
    where = {"accelerator": "gpu" if on_gpu else "cpu", "devices": count, "num_nodes": num_nodes, "strategy": strategy}
    how = {"precision": precision, "gradient_clip_val": gradient_clip_val, "deterministic": deterministic}
    how["use_distributed_sampler"] = False  # ours cuts the same batches on any number of devices
    quiet = {"num_sanity_val_steps": 0, "log_every_n_steps": 10, "enable_model_summary": False}
    return {**where, **how, **quiet, **lightning}


def _check_strategy(strategy: str, shardable: bool, on_gpu: bool) -> None:
    check_known("--strategy", strategy, STRATEGIES)
    if strategy.startswith(("fsdp", "deepspeed")) and not shardable:
        own = "an autoencoder, 70 M weights and a discriminator with an optimiser of its own, fits on each card"
        raise UserError(f"--strategy {strategy} is for the denoiser: {own}: take --strategy ddp")
    if strategy.startswith("deepspeed") and not on_gpu:
        raise UserError(f"--strategy {strategy} needs CUDA GPUs: take --strategy ddp or fsdp on a CPU")
    if strategy.startswith("deepspeed") and find_spec("deepspeed") is None:
        raise UserError(f"--strategy {strategy} needs its package: pip install deepspeed, or take fsdp")


def _at_least_one(name: str, value: Any) -> int:
    with suppress(TypeError, ValueError):
        if int(value) >= 1:
            return int(value)
    raise UserError(f"--{name} {value}: expected how many, at least one{', or auto' if name == 'devices' else ''}")


def _check_count(count: int, num_nodes: int, machine: Machine, started: bool) -> None:
    """Raise where there are fewer devices, or where torchrun should have started the processes."""
    if machine.kind != "cpu" and count > machine.devices:
        asked = f"torchrun started {count} processes here" if started else f"--devices {count}"
        mend = f"--nproc_per_node={machine.devices}" if started else f"--devices {machine.devices}"
        raise UserError(f"{asked}, but this machine has {machine.devices} ({machine.name}): take {mend}")
    tasks = int(os.environ.get("SLURM_NTASKS") or 1) if "SLURM_PROCID" in os.environ else 1
    if started or (tasks == num_nodes == 1):
        return
    alone = f"SLURM has {tasks} tasks here, each of which would train alone"
    found = alone if tasks > 1 else f"--num_nodes {num_nodes}"
    raise UserError(
        f"{found}: torchrun starts a training on several machines, once on each: torchrun --nnodes={num_nodes} "
        f"--nproc_per_node={count} --node_rank=0 --master_addr=ADDRESS --master_port=29500 -m vavae_tools.train … "
        "(with Slurm, --ntasks-per-node=1 and srun torchrun, see docs/pages/devices.md)"
    )


def describe(settings: dict[str, Any], compile: bool, batch_size: int, num_workers: int) -> str:
    """Return what `trainer_settings` has chosen, in one line."""
    machine, nodes = find_machine(), settings["num_nodes"]
    count, strategy = settings["devices"], settings["strategy"]
    where = f"CPU, {os.cpu_count()} cores{f', {count} processes' if count > 1 else ''}"
    if settings["accelerator"] == "gpu":
        where = f"{count} × {machine.name} ({machine.memory / 2**30:.0f} GB{' each' if count > 1 else ''})"
    gathered = settings.get("accumulate_grad_batches", 1)
    said = [
        "one process" if strategy == "auto" else str(strategy),
        PRECISION_LABELS.get(settings["precision"], str(settings["precision"])),
        f"compile {'on' if compile else 'off'}",
        f"batch {batch_size} per device",
        f"{gathered} batches a step" if gathered > 1 else "",
        "deterministic" if settings.get("deterministic") else "",
        f"{num_workers} worker{'s' * (num_workers != 1)}",
    ]
    return f"{f'{nodes} machines of ' if nodes > 1 else ''}{where}: {', '.join(filter(None, said))}"


def allow_tf32(settings: dict[str, Any]) -> None:
    """Let float32 matrices be multiplied as TF32 where the cards can (capability 8.0)."""
    if settings["accelerator"] == "gpu" and find_machine().kind == "ampere":
        torch.set_float32_matmul_precision("high")


def no_deterministic_form(error: BaseException) -> str | None:
    """Return the line to say where `deterministic` meets something that is not; None for another error."""
    if not torch.are_deterministic_algorithms_enabled():
        return None
    text = str(error)
    if "CUBLAS_WORKSPACE_CONFIG" in text:
        unset = "the card was used before CUBLAS_WORKSPACE_CONFIG was set, or that is neither :4096:8 nor :16:8"
        return f"deterministic=true, but {unset}: restart the kernel, and import vavae_tools first"
    found = re.search(r"(\S+) does not have a deterministic implementation", text)
    return found and f"deterministic=true, but {found[1]} has no deterministic form on this device: leave it off"


def quiet_lightning() -> None:
    """Keep Lightning's advertisements and hints out of the output; what matters is said by the commands."""
    for name in ("utilities.rank_zero", "accelerators.cuda", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric.utilities.distributed").setLevel(logging.WARNING)
    for text in (
        "does not have many workers",  # the data stand in memory
        "The number of training batches",  # fewer than log_every_n_steps: small data
        "isinstance.treespec, LeafSpec",  # Lightning's own
        "exists and is not empty",  # going on in the same folder is meant
        "your dataloader is not resumable",  # its order is, see data/order.py
        "callbacks used to create the checkpoint need",  # early stopping may be turned off
        "in eval mode at the start of training",  # the averaged weights
        "You have overridden `on_(before|after)_batch_transfer`",  # the module encodes what the loader brings
        "returned a view tensor",  # FSDP2: nothing here changes the denoiser's output in place
        "nn.functional.all_gather is deprecated",  # Lightning's own
        "Detected call of `lr_scheduler.step",  # the gradient scaler has left out a first step
    ):
        warnings.filterwarnings("ignore", message=f".*{text}.*")
