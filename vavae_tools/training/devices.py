"""The Trainer for the machine at hand: one or two 16 GB GPUs on Kaggle or Colab, a better card, or a CPU."""

import logging
import os
import warnings
from typing import Any

from vavae_tools.errors import UserError
from vavae_tools.machine import Machine, find_machine


def precision_of(name: str | None, machine: Machine) -> str:
    """`16 | 32 | bf16` as people type it → Lightning's precision; None takes what suits the machine.

    Raises:
        UserError: a precision that this machine cannot do, or does many times slower.
    """
    name = None if name is None else str(name)
    if name is None:
        return {"cpu": "32-true", "t4": "16-mixed", "ampere": "bf16-mixed"}[machine.kind]
    known = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed"}
    name = {long: short for short, long in known.items()}.get(name, name)
    if name not in known:
        raise UserError(f"No precision {name!r}; there are {', '.join(known)}")
    if name == "bf16" and machine.kind == "t4":
        raise UserError(f"{machine.name} has no bf16 (it is emulated and slow): use --precision 16 or 32")
    if name == "16" and machine.kind == "cpu":
        raise UserError("A CPU has no fp16 training: use --precision 32")
    return known[name]


def trainer_settings(
    accelerator: str = "auto",
    devices: int | str = "auto",
    num_nodes: int = 1,
    strategy: str = "auto",
    precision: str | None = None,
    parts_may_go_unused: bool = False,
    gradient_clip_val: float | None = 1.0,
    **lightning: Any,
) -> dict[str, Any]:
    """Arguments for `lightning.Trainer` tuned for one or two GPUs of a borrowed machine.

    Args:
        accelerator: "gpu", "cpu" or "auto".
        devices: how many, or "auto" for all there are; started by torchrun, as many as that says, and nodes too.
        strategy: "auto" takes one process on one device, "ddp" on more; "fsdp" see `sharded`.
        precision: "16", "32", "bf16"; None: fp16 with a scaler on a T4, bf16 from Ampere on, float32 on a CPU.
        parts_may_go_unused: some weights may get no gradient in a step, which plain ddp refuses.
        gradient_clip_val: largest norm of the gradients; None where the module clips.
        lightning: further arguments of `lightning.Trainer`, such as accumulate_grad_batches, taken as they are.

    Raises:
        UserError: more devices than there are, or a precision the machine cannot do.
    """
    if "TORCHELASTIC_RUN_ID" in os.environ:  # torchrun has started the processes already
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        num_nodes = int(os.environ["WORLD_SIZE"]) // devices
    machine = find_machine() if accelerator != "cpu" else Machine("cpu", 1, "CPU")
    if accelerator in ("gpu", "cuda") and machine.kind == "cpu":
        raise UserError("No GPU that torch can use here: take --accelerator cpu, or switch the GPU on in the settings")
    on_gpu = machine.kind != "cpu"
    try:
        count = (machine.devices if on_gpu else 1) if devices == "auto" else int(devices)
    except (TypeError, ValueError):
        raise UserError(f"devices {devices!r}: expected how many, or auto") from None
    if on_gpu and count > machine.devices:
        raise UserError(f"--devices {count}, but this machine has {machine.devices} ({machine.name})")
    if strategy == "auto" and count * num_nodes > 1:
        strategy = "ddp_find_unused_parameters_true" if parts_may_go_unused else "ddp"
    if strategy == "fsdp":
        strategy = sharded(count * num_nodes)
    return {
        "accelerator": "gpu" if on_gpu else "cpu",
        "devices": count,
        "num_nodes": num_nodes,
        "strategy": strategy,
        "precision": precision_of(precision, machine),
        "use_distributed_sampler": False,  # ours cuts the same batches on any number of devices
        "gradient_clip_val": gradient_clip_val,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 10,
        "enable_model_summary": False,
        **lightning,
    }


def sharded(processes: int) -> Any:
    """Weights, gradients, optimiser and average cut over the devices (FSDP2); checkpoints are whole files as ever."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    # its own default would cut every tensor over a node's devices and the data over nodes alone
    return ModelParallelStrategy(processes, 1, save_distributed_checkpoint=False)


def quiet_lightning() -> None:
    """Keep Lightning's advertisements and hints out of the output; what matters is said by the commands."""
    for name in ("utilities.rank_zero", "accelerators.cuda", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{name}").setLevel(logging.WARNING)
    for text in (
        "does not have many workers",  # the data stand in memory
        "The number of training batches",  # fewer than log_every_n_steps: small data
        "isinstance.treespec, LeafSpec",  # Lightning's own
        "exists and is not empty",  # going on in the same folder is meant
        "your dataloader is not resumable",  # its order is, see data/order.py
        "in eval mode at the start of training",  # the averaged weights
    ):
        warnings.filterwarnings("ignore", message=f".*{text}.*")
