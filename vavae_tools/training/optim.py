"""Averaged weights and learning rates; and FSDP2, for denoisers that no card holds whole."""

import copy
import math
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim.lr_scheduler import LambdaLR

from vavae_tools.checkpoints.resuming import match_names
from vavae_tools.runtime.errors import check_known


class EMA(nn.Module):
    """A copy of `network` whose weights follow it: average ← average + (1 − decay) · (weights − average).

    What is frozen in `network` is shared, not copied. The decay at step n is min(decay, (1 + n) / (10 + n)), so that
    short runs are not shown noise, and there is nothing to save but the average.
    """

    def __init__(self, network: nn.Module, decay: float = 0.9999) -> None:
        super().__init__()
        self.decay = decay
        frozen = {id(weight): weight for weight in network.parameters() if not weight.requires_grad}
        self.network = copy.deepcopy(network, frozen).requires_grad_(False).eval()

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Follow `network` after optimiser step `step` (1, 2, …); one fused operation for all weights."""
        pairs = zip(self.network.parameters(), network.parameters(), strict=True)
        pairs = [(mine, theirs.detach()) for mine, theirs in pairs if mine is not theirs]
        average, weights = map(list, zip(*pairs, strict=True))
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, weights, 1.0 - decay)
        for mine, theirs in zip(self.network.buffers(), network.buffers(), strict=True):
            mine.copy_(theirs)

    def train(self, mode: bool = True) -> "EMA":
        return super().train(False)  # the average is never trained, whatever the module around it does


def with_warmup(
    optimizer: torch.optim.Optimizer, warmup_steps: int, total_steps: float, decay: str = "cosine"
) -> dict[str, Any]:
    """Return an optimiser and its rate's schedule, as a LightningModule's `configure_optimizers` returns them.

    Warm-up is linear and takes at most a tenth of all steps; then the rate decays to zero along half a "cosine" or
    "linear", or stays ("constant", or without an end: `total_steps` of inf).
    """
    check_known("schedule", decay, ("cosine", "linear", "constant"))
    warmup_steps = min(warmup_steps, total_steps / 10)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if math.isinf(total_steps) or decay == "constant":
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return 1 - progress if decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

    schedule = LambdaLR(optimizer, factor)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class OwnSettings(L.Callback):
    """Keep the optimisers' settings and rates those of this run, where a checkpoint brings others along."""

    def on_fit_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        groups = [each.param_groups for each in trainer.optimizers]
        self._groups = [[{k: v for k, v in group.items() if k != "params"} for group in each] for each in groups]
        self._rates = [getattr(each.scheduler, "base_lrs", None) for each in trainer.lr_scheduler_configs]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        for optimizer, groups in zip(trainer.optimizers, self._groups, strict=True):
            for group, own in zip(optimizer.param_groups, groups, strict=True):
                group.update(own)
                if "fused" in own:
                    for weight in optimizer.state.keys() & set(group["params"]):  # steps are counted where it is fused
                        state = optimizer.state[weight]
                        state["step"] = state["step"].to(weight.device if own["fused"] else "cpu")
        for config, rates in zip(trainer.lr_scheduler_configs, self._rates, strict=True):
            schedule = config.scheduler
            if not isinstance(schedule, LambdaLR):
                continue
            schedule.base_lrs = rates
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            for group, rate, factor in zip(schedule.optimizer.param_groups, rates, factors, strict=True):
                group["lr"] = rate * factor
            schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]


class Sharded(ModelParallelStrategy):
    """FSDP2: weights, gradients, optimiser and average cut over the devices, as the module's `configure_model` says.

    The first process gathers a checkpoint in its memory and writes it whole. Training resumes from every kind of
    checkpoint, written by any strategy and number of processes.
    """

    def __init__(self, processes: int) -> None:  # on all machines
        # its own default would cut every tensor over a node's devices and the data over nodes alone
        super().__init__(processes, 1, save_distributed_checkpoint=False)

    def __str__(self) -> str:
        return "fsdp"

    def on_train_start(self) -> None:
        """Make the buffers for whole weights: a preview would make them in inference mode, for itself alone."""
        for part in self._parts():
            part.unshard()
            part.reshard()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        # validation and previews leave some whole: a forward pass keeps its root until a backward one
        for part in self._parts():
            part.reshard()
        for root in self.lightning_module.ema.network.values():  # also where a preview failed in its forward pass
            root.set_reshard_after_forward(True, recurse=False)
            root.reshard()
            root.set_reshard_after_forward(False, recurse=False)

    def _parts(self) -> list[FSDPModule]:
        return [part for part in self.lightning_module.modules() if isinstance(part, FSDPModule)]

    def lightning_module_state_dict(self) -> dict[str, Any]:
        return self._gathered(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        # by number in the optimiser's own order, as everywhere: Lightning's counts what is frozen, too
        return self._gathered(getattr(optimizer, "optimizer", optimizer).state_dict())

    def _gathered(self, state: dict[str, Any]) -> dict[str, Any]:
        def whole(tensor: Tensor) -> Tensor | None:
            if isinstance(tensor, DTensor):
                tensor = tensor.full_tensor()  # all processes take part; the first one keeps it
            return tensor.detach().cpu() if self.is_global_zero else None

        state = apply_to_collection(state, Tensor, whole)
        return state if self.is_global_zero else {}

    @torch.no_grad()
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = self.checkpoint_io.load_checkpoint(Path(self.broadcast(str(checkpoint_path))))
        own = self.lightning_module.state_dict()
        found = match_names(checkpoint.pop("state_dict"), own)
        cut = {name: _cut_as(value, own[name]) if name in own else value for name, value in found.items()}
        self.lightning_module.load_state_dict(cut, strict=self.lightning_module.strict_loading)
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states", ()), strict=False):
            numbers = [number for group in state["param_groups"] for number in group["params"]]
            own = [weight for group in optimizer.param_groups for weight in group["params"]]
            weights = dict(zip(numbers, own, strict=True))
            cut = {
                number: {name: _cut_as(value, weights[number]) for name, value in of_weight.items()}
                for number, of_weight in state["state"].items()
            }
            optimizer.load_state_dict({**state, "state": cut})
        return checkpoint


def _cut_as(value: Any, like: Tensor) -> Any:
    """Return a whole tensor cut as the weight that it belongs to is; other values as they are."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)
