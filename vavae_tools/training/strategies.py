"""Lightning's FSDP2, for denoisers that no card holds whole, with checkpoints that are whole files as everywhere."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from vavae_tools.checkpoints.resuming import match_names


class Sharded(ModelParallelStrategy):
    """FSDP2: weights, gradients, optimiser and average cut over the devices, as the module's `configure_model` says.

    The first process gathers a checkpoint in its memory and writes it. Training resumes from every kind of checkpoint,
    written by any strategy and number of processes.
    """

    def __init__(self, processes: int) -> None:  # on all machines
        # its own default would cut every tensor over a node's devices and the data over nodes alone
        super().__init__(processes, 1, save_distributed_checkpoint=False)

    def __str__(self) -> str:
        return "fsdp"

    def on_train_start(self) -> None:
        """Make the buffers for whole weights: those made in inference mode, by a preview, nothing else could use."""
        for part in self._parts():
            part.unshard()
            part.reshard()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Cut again what validation and previews left whole: a forward pass keeps its root until a backward one."""
        for part in self._parts():
            part.reshard()

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
    """Return a whole tensor cut over the processes as the weight that it belongs to; other values as they are."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device, like.dtype), like.device_mesh, like.placements)
