"""The Trainer for the machine at hand: a CPU, one or two 16 GB GPUs of a notebook, better cards, several machines."""

import logging
import os
import re
import shlex
import shutil
import sys
import sysconfig
import warnings
from collections.abc import Callable
from difflib import get_close_matches
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from vavae_tools.runtime.card import take_card
from vavae_tools.runtime.console import in_notebook, say
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.machine import Machine, find_machine
from vavae_tools.runtime.precision import precision_on

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp", "deepspeed")
LIGHTNING = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
"""What Lightning calls the precisions of `machine.PRECISIONS`."""
SAID = {"32-true": "float32", "16-mixed": "fp16 with a gradient scaler", "bf16-mixed": "bf16"}
COMPILES_FROM = (7, 0)
"""Triton's least compute capability: a V100's, not a P100's."""


def precision_of(name: str | None, machine: Machine, strategy: str = "auto") -> str:
    """`16 | 32 | bf16 | fp16 | no` as people type it → Lightning's precision; None: what suits machine and strategy.

    Raises:
        UserError: a precision that this machine or strategy cannot do, or does many times slower.
    """
    short = {long: short for short, long in LIGHTNING.items()}.get(str(name), name)
    found = precision_on(machine, short)
    if found == "16" and strategy in ("fsdp", "deepspeed"):  # theirs in Lightning have no gradient scaler
        if name is None:
            return LIGHTNING["32"]
        other = "--precision bf16" if machine.kind == "ampere" else "--precision 32, or --strategy ddp"
        raise UserError(f"--precision 16 with --strategy {strategy}, which has no gradient scaler: take {other}")
    return LIGHTNING[found]


def compiles(choice: bool | None, machine: Machine | None = None, say: Callable[[str], None] = say) -> bool:
    """Whether to `torch.compile` here; None: from capability 8.0 on, where it pays within minutes.

    Args:
        say: gets a line where it would pay, and something that it needs is missing.

    Raises:
        UserError: it was asked for and cannot be: a card below 7.0, or something that it needs is missing.
    """
    machine = machine or find_machine()
    if choice is not None and not isinstance(choice, bool):
        raise UserError(f"compile is {choice!r}, expected true, false, or null for what suits the machine")
    if choice is False or (choice is None and machine.kind != "ampere"):
        return False
    if machine.kind != "cpu" and machine.capability < COMPILES_FROM:
        found, needed = (".".join(map(str, capability)) for capability in (machine.capability, COMPILES_FROM))
        raise UserError(
            f"compile=true, but {machine.name} has compute capability {found} and Triton needs {needed}: leave it off"
        )
    missing = " and ".join(_missing_for_compilation(on_gpu=machine.kind != "cpu"))
    if missing and choice:
        raise UserError(f"compile=true, but there is {missing}; install what is missing, or leave it off")
    if missing:
        say(f"compile stays off: there is {missing}")
    return not missing


def _missing_for_compilation(on_gpu: bool) -> list[str]:
    """What torch's inductor, and Triton on a card, look for as they first compile."""
    environment, missing = os.environ, []
    if on_gpu and find_spec("triton") is None:
        missing.append("no Triton (pip install triton)")
    if on_gpu and not any(map(shutil.which, [environment["CC"]] if environment.get("CC") else ["gcc", "clang"])):
        missing.append("no C compiler (gcc or clang, or the one that CC names)")
    if not on_gpu and not any(map(shutil.which, (environment.get("CXX") or "g++", "clang++", "cl"))):
        missing.append("no C++ compiler (g++ or clang++, or the one that CXX names)")
    scheme = sysconfig.get_default_scheme()  # Debian's own one names /usr/local
    folder = sysconfig.get_path("include", "posix_prefix" if scheme == "posix_local" else scheme)
    folders = [folder, *filter(None, environment.get("CPATH", "").split(os.pathsep))]
    if not any((Path(folder) / "Python.h").is_file() for folder in folders):
        missing.append(f"no Python.h in {folder} (apt-get install python3-dev)")
    return missing


def trainer_settings(
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
    strategy: Any = "auto",
    precision: str | None = None,
    parts_may_go_unused: bool = False,
    gradient_clip_val: float | None = 1.0,
    shardable: bool = True,
    sharded_checkpoints: bool = False,
    deterministic: bool = False,
    **lightning: Any,
) -> dict[str, Any]:
    """Arguments for `lightning.Trainer` on this machine, and on those that work together with it.

    Args:
        accelerator: "gpu", "cpu" or "auto".
        devices: how many, or "auto" for all there are; started by torchrun, as many as that says, and nodes too.
        strategy: one of `STRATEGIES`; "auto" takes one process on one device, "ddp" on more. "fsdp" and "deepspeed"
            see `strategies`. A strategy of Lightning's own is taken as it is.
        precision: "16", "32", "bf16"; None: fp16 with a scaler on a T4, bf16 from Ampere on, float32 on a CPU.
        parts_may_go_unused: some weights may get no gradient in a step, which plain ddp refuses.
        gradient_clip_val: largest norm of the gradients; None where the module clips.
        shardable: whether the module can be cut over devices: one optimiser, and `configure_model` knows how.
        sharded_checkpoints: of fsdp, write a folder with each process's part in place of one whole file.
        deterministic: the same numbers each time on a card, too, where else the fastest way is taken, whose sums have
            no fixed order.
        lightning: further arguments of `lightning.Trainer`, such as accumulate_grad_batches, taken as they are.

    Raises:
        UserError: what cannot be: more devices than there are, a strategy that is unknown, lacks its package or does
            not suit, a precision that the machine cannot do, machines of which it is not said where they meet, a card
            that another process holds.
    """
    started = "TORCHELASTIC_RUN_ID" in os.environ  # torchrun, or a launcher like it, has made the processes
    if started:
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    if isinstance(strategy, str):
        _check_strategy(strategy, shardable, sharded_checkpoints)
    if not isinstance(deterministic, bool):
        raise UserError(f"deterministic is {deterministic!r}, expected true or false")
    machine = find_machine() if accelerator != "cpu" else Machine("cpu", 1, "CPU")
    if accelerator in ("gpu", "cuda") and machine.kind == "cpu":
        there = f"it has no code for the {machine.unusable}" if machine.unusable else "none is there"
        raise UserError(
            f"No GPU that torch can use here ({there}): take --accelerator cpu, or switch the GPU on in the settings "
            "(Kaggle: GPU T4 x2)"
        )
    on_gpu = machine.kind != "cpu"
    count = _whole("devices", (machine.devices if on_gpu else 1) if devices == "auto" else devices)
    num_nodes = _whole("num_nodes", num_nodes)
    if on_gpu and count > machine.devices:
        asked = f"torchrun started {count} processes here" if started else f"--devices {count}"
        mend = f"--nproc_per_node={machine.devices}" if started else f"--devices {machine.devices}"
        raise UserError(f"{asked}, but this machine has {machine.devices} ({machine.name}): take {mend}")
    if not started:
        _check_launched(num_nodes, count)
    precision = precision_of(precision, machine, strategy if isinstance(strategy, str) else "auto")
    if strategy == "auto" and count * num_nodes > 1:
        strategy = "ddp_find_unused_parameters_true" if parts_may_go_unused else "ddp"
    if strategy == "ddp" and deterministic and count * num_nodes > 2:
        # plain DDP groups gradients anew after a run's first step, also one's that goes on: three are then added in
        # another order (two have only one), and the last bits differ
        strategy = "ddp_find_unused_parameters_true"
    if strategy == "fsdp":
        from vavae_tools.training.strategies import Sharded

        strategy = Sharded(count * num_nodes, sharded_checkpoints)
    if strategy == "deepspeed":
        strategy = _deepspeed(on_gpu, precision)
    if on_gpu and (started or count * num_nodes == 1):  # this process trains, and starts no others that do
        take_card(int(os.environ["LOCAL_RANK"]) if started else 0)
    return {
        "accelerator": "gpu" if on_gpu else "cpu",
        "devices": count,
        "num_nodes": num_nodes,
        "strategy": strategy,
        "precision": precision,
        "use_distributed_sampler": False,  # ours cuts the same batches on any number of devices
        "gradient_clip_val": gradient_clip_val,
        "deterministic": deterministic,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 10,
        "enable_model_summary": False,
        **lightning,
    }


def _check_strategy(strategy: str, shardable: bool, sharded_checkpoints: bool) -> None:
    if strategy not in STRATEGIES:
        near = get_close_matches(strategy, STRATEGIES, n=1, cutoff=0.4)
        meant = f"; did you mean {near[0]}?" if near else ";"
        raise UserError(f"No --strategy {strategy}{meant} There are {', '.join(STRATEGIES)}")
    if strategy in ("fsdp", "deepspeed") and not shardable:
        raise UserError(
            f"--strategy {strategy} is for the denoiser: an autoencoder, 70 M weights and a discriminator with an "
            "optimiser of its own, fits on each card: take --strategy ddp"
        )
    if sharded_checkpoints and strategy != "fsdp":
        raise UserError(f"sharded_checkpoints=true, but --strategy {strategy} has whole ones: it belongs to fsdp")


def _whole(name: str, value: Any) -> int:
    try:
        number = int(value)
    except (TypeError, ValueError):
        number = 0
    if number < 1:
        raise UserError(f"--{name} {value}: expected how many, at least one{', or auto' if name == 'devices' else ''}")
    return number


def _check_launched(num_nodes: int, count: int) -> None:
    """Raise a `UserError` that names torchrun's command for several machines, and for SLURM's own tasks."""
    environment = os.environ
    if int(environment.get("SLURM_NTASKS") or 1) > 1 and "SLURM_PROCID" in environment:
        raise UserError(
            f"SLURM has {environment['SLURM_NTASKS']} tasks here, each of which would train alone: ask for one a node "
            "(--ntasks-per-node=1), and torchrun in it: "
            + _torchrun(int(environment.get("SLURM_NNODES") or num_nodes), count, slurm=True)
        )
    if num_nodes > 1:
        raise UserError(
            f"--num_nodes {num_nodes}: torchrun starts a training on several machines. On each of them, with its "
            f"--node_rank (0 to {num_nodes - 1}) and the first one's address: {_torchrun(num_nodes, count)}"
        )


def _torchrun(num_nodes: int, count: int, slurm: bool = False) -> str:
    """The command that does on several machines what this process was asked for."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    if spec is not None and spec.name.startswith("vavae_tools."):
        program = f"-m {spec.name} {shlex.join(sys.argv[1:])}".strip()
    else:
        script = sys.argv[0].endswith(".py") and not in_notebook()
        program = shlex.join(sys.argv) if script else "-m vavae_tools.train …"
    meeting = "--node_rank=0 --master_addr=ADDRESS --master_port=29500"
    if slurm:  # the shell of the batch script, on the first machine, fills these in
        meeting = "--rdzv_backend=c10d --rdzv_endpoint=$(hostname):29500 --rdzv_id=$SLURM_JOB_ID"
    srun = "srun " if slurm else ""
    return f"{srun}torchrun --nnodes={num_nodes} --nproc_per_node={count} {meeting} {program}"


def _deepspeed(on_gpu: bool, precision: str) -> Any:
    if not on_gpu:
        raise UserError("--strategy deepspeed needs CUDA GPUs: take --strategy ddp or fsdp on a CPU")
    if find_spec("deepspeed") is None:
        raise UserError("--strategy deepspeed needs its package: pip install deepspeed (0.17 or newer), or take fsdp")
    from vavae_tools.training.strategies import Zero2

    return Zero2(precision)


def describe(
    settings: dict[str, Any],
    compile: bool = False,
    batch_size: int | None = None,
    num_workers: int | None = None,
    machine: Machine | None = None,
) -> str:
    """What `trainer_settings` has chosen, in one line.

    >>> cards = Machine("t4", 2, "Tesla T4", 15_800_000_000)
    >>> settings = {"accelerator": "gpu", "devices": 2, "num_nodes": 1, "strategy": "ddp", "precision": "16-mixed"}
    >>> describe(settings, batch_size=64, machine=cards)
    '2 × Tesla T4 (15 GB each): ddp, fp16 with a gradient scaler, compile off, batch 64 per device'
    """
    machine = machine or find_machine()
    count, nodes, strategy = settings["devices"], settings["num_nodes"], settings["strategy"]
    if settings["accelerator"] == "gpu":
        each = " each" if count > 1 else ""
        where = f"{count} × {machine.name} ({machine.memory / 2**30:.0f} GB{each})"
    else:
        where = f"CPU, {os.cpu_count()} cores"
        where += f", {count} processes" if count > 1 else ""
    if machine.unusable:
        where += f" (this torch has no code for the {machine.unusable}: switch to another, such as GPU T4 x2)"
    said = [
        "one process" if strategy == "auto" else str(strategy),
        SAID.get(settings["precision"], str(settings["precision"])),
        f"compile {'on' if compile else 'off'}",
    ]
    if batch_size is not None:
        said.append(f"batch {batch_size} per device")
    if settings.get("accumulate_grad_batches", 1) > 1:
        said.append(f"{settings['accumulate_grad_batches']} batches a step")
    if settings.get("deterministic"):
        said.append("deterministic")
    if num_workers is not None:
        said.append(f"{num_workers} workers" if num_workers != 1 else "1 worker")
    return f"{f'{nodes} machines of ' if nodes > 1 else ''}{where}: {', '.join(said)}"


def allow_tf32(settings: dict[str, Any]) -> None:
    """Let float32 matrices be multiplied as TF32 where the cards can (capability 8.0); called as training starts."""
    if settings["accelerator"] == "gpu" and find_machine().kind == "ampere":
        torch.set_float32_matmul_precision("high")


def no_deterministic_form(error: BaseException) -> str | None:
    """The line to say where `deterministic` meets something that is not; None for another error."""
    text = str(error)
    if not torch.are_deterministic_algorithms_enabled():
        return None
    if "CUBLAS_WORKSPACE_CONFIG" in text:
        return (
            "deterministic=true, but the card was used before CUBLAS_WORKSPACE_CONFIG was set, or that is neither "
            ":4096:8 nor :16:8: restart the kernel, and import vavae_tools first"
        )
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
        "in eval mode at the start of training",  # the averaged weights
        "You have overridden `on_(before|after)_batch_transfer`",  # the module encodes what the loader brings
        "returned a view tensor",  # FSDP2: nothing here changes the denoiser's output in place
        "nn.functional.all_gather is deprecated",  # Lightning's own
        "Detected call of `lr_scheduler.step",  # the gradient scaler has left out a first step
    ):
        warnings.filterwarnings("ignore", message=f".*{text}.*")
