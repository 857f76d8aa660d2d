"""Lightning's strategies for denoisers that no card holds whole, FSDP2 and ZeRO-2 of DeepSpeed; whole checkpoints."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from vavae_tools.checkpoints.formats import begin_folder, described, finish_folder, main_file, not_written, save_part
from vavae_tools.checkpoints.resuming import as_own, open_any
from vavae_tools.checkpoints.sharded import CHECKPOINT, OF_DEEPSPEED, Cut, cut_off, mapped, part_name
from vavae_tools.runtime.errors import UserError
from vavae_tools.training.callbacks.checkpointing import former_of, make_room
from vavae_tools.training.lightning_inside import saves_parts, unwrapped


class WholeFolders:
    """Of a strategy: a checkpoint's folder that all processes write, whole under its name or not there at all."""

    def write_together(
        self, checkpoint: dict[str, Any], path: str | Path, write: Callable[[Path], dict[str, Any]], size: int
    ) -> None:
        """Have each process write its files of a checkpoint's folder; training stands still meanwhile.

        Args:
            checkpoint: of which step and epoch are noted.
            write: called in each process with the folder → its files by name, and what `described` says of them; where
                none names any, those that are there count.
            size: bytes that this process will write.

        Raises:
            UserError: one of the processes cannot write; then all raise, so that none waits for it.
        """
        began = time.monotonic()
        path = Path(self.broadcast(str(path)))
        needed = sum(self._together(path, lambda: size))

        def begin() -> str | None:
            if not self.is_global_zero:
                return None
            make_room(path, needed, self.checkpoint_io.say)
            return str(begin_folder(path))

        partial = Path(self._together(path, begin)[0])
        files = {name: file for found in self._together(path, lambda: write(partial)) for name, file in found.items()}

        def finish() -> None:
            if not self.is_global_zero:
                return
            listed = files or _described_files(partial)
            missing = [name for name in files if not (partial / name).is_file()]
            if missing:
                raise UserError(
                    f"{path.parent} is not the same folder on all machines ({', '.join(missing)} is elsewhere): name "
                    "one that all see as output_dir, or leave sharded_checkpoints off"
                )
            finish_folder(partial, path, checkpoint, listed, former_of(path))

        self._together(path, finish)
        self.checkpoint_io.seconds = max(self.checkpoint_io.seconds, time.monotonic() - began)

    def _together(self, path: Path, work: Callable[[], Any]) -> list[Any]:
        """What `work` gives in each of the processes; what it raises in one of them is raised in all."""
        given, fault = None, None
        try:
            given = work()
        except UserError as error:
            fault = str(error)
        except (OSError, RuntimeError) as error:  # torch.save says RuntimeError where the disk is full
            fault = str(not_written(path, error))
        found: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(found, (given, fault))
        faults = [fault for _, fault in found if fault]
        if faults:
            raise UserError(faults[0])
        return [given for given, _ in found]


def _described_files(folder: Path) -> dict[str, dict[str, Any]]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): described(path) for path in files}


class Sharded(WholeFolders, ModelParallelStrategy):
    """FSDP2: weights, gradients, optimiser and average cut over the devices, as the module's `configure_model` says.

    Goes on from every kind of checkpoint, written by any number of processes: each one reads its own rows.

    Args:
        processes: on all machines.
        sharded_checkpoints: write a folder with each process's part, in place of one whole file for which the first
            process gathers everything in its memory. One file is simpler, and the default.
    """

    def __init__(self, processes: int, sharded_checkpoints: bool = False) -> None:
        # its own default would cut every tensor over a node's devices and the data over nodes alone
        super().__init__(processes, 1, save_distributed_checkpoint=sharded_checkpoints)

    def __str__(self) -> str:
        return "fsdp" + (" with sharded checkpoints" if saves_parts(self) else "")

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
        return self._for_checkpoint(self.lightning_module.state_dict())

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        # by number in the optimiser's own order, as everywhere: Lightning's counts what is frozen, too
        return self._for_checkpoint(unwrapped(optimizer).state_dict())

    def _for_checkpoint(self, state: dict[str, Any]) -> dict[str, Any]:
        if saves_parts(self):
            return state

        def gathered(way: str, value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if isinstance(value, DTensor):
                value = value.full_tensor()  # all take part; the first one keeps it
            return value.detach().cpu() if self.is_global_zero else None

        whole = mapped(gathered, state)
        return whole if self.is_global_zero else {}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        if not saves_parts(self):
            if self.is_global_zero:
                self.checkpoint_io.save_checkpoint(checkpoint, filepath)
            return
        rest, rows = cut_off(checkpoint)

        def write(folder: Path) -> dict[str, Any]:
            name = part_name(self.global_rank, self.world_size)
            files = {name: save_part({way: tensor.contiguous() for way, tensor in rows.items()}, folder / name)}
            if self.is_global_zero:
                files[CHECKPOINT] = save_part(rest, folder / CHECKPOINT)
            return files

        self.write_together(checkpoint, filepath, write, sum(tensor.nbytes for tensor in rows.values()))

    @torch.no_grad()
    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        checkpoint = open_any(Path(self.broadcast(str(checkpoint_path))))
        own = self.lightning_module.state_dict()
        found = as_own(checkpoint.pop("state_dict"), own)
        placed = {name: placed_as(value, own[name]) if name in own else value for name, value in found.items()}
        self.lightning_module.load_state_dict(placed, strict=self.lightning_module.strict_loading)
        for optimizer, state in zip(self.optimizers, checkpoint.pop("optimizer_states", ()), strict=False):
            optimizer.load_state_dict(_placed_state(state, optimizer))
        return checkpoint


def placed_as(value: Tensor | Cut, like: Tensor) -> Tensor:
    """A whole or cut tensor of a checkpoint → cut over the processes as `like`, of which each reads its own rows."""
    if not isinstance(like, DTensor):
        return value.whole() if isinstance(value, Cut) else value
    own, processes = like.to_local(), like.device_mesh.size()
    each = -(-like.shape[0] // processes)  # FSDP2 cuts rows, as torch.chunk does
    start = min(like.shape[0], each * like.device_mesh.get_local_rank())
    stop = start + own.shape[0]
    rows = value.rows(start, stop) if isinstance(value, Cut) else value[start:stop]
    rows = rows.to(own.device, own.dtype, copy=True)  # not the file's memory
    return DTensor.from_local(
        rows, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def _placed_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """An optimiser's state whose tensors are cut as the weights that they belong to."""
    ids = [number for group in state["param_groups"] for number in group["params"]]
    weights = dict(zip(ids, (weight for group in optimizer.param_groups for weight in group["params"]), strict=True))

    def placed(number: int, value: Any) -> Any:
        alike = isinstance(value, (Tensor, Cut)) and value.shape == weights[number].shape
        return placed_as(value, weights[number].detach()) if alike else value

    states = {
        number: {name: placed(number, value) for name, value in of_weight.items()}
        for number, of_weight in state["state"].items()
    }
    return {**state, "state": states}


class AutocastInside(DeepSpeedPrecision):
    """Weights and inputs stay float32, and DeepSpeed's engine runs the network under autocast.

    Its own bf16 would cast everything, the average too, whose small steps bf16 rounds away.
    """

    def convert_input(self, data: Any) -> Any:
        return data


class Zero2(WholeFolders, DeepSpeedStrategy):
    """DeepSpeed's ZeRO-2: gradients and the optimiser's state cut over the devices. Written without a GPU at hand.

    Its checkpoints are folders that DeepSpeed reads by pickle, code and all: go on from your own only. Weights and
    average are whole in them, and `python -m vavae_tools.checkpoints consolidate` takes them out, without running
    anything of theirs.

    Args:
        precision: Lightning's "32-true" or "bf16-mixed".
    """

    def __init__(self, precision: str = "32-true") -> None:
        super().__init__(stage=2, precision_plugin=AutocastInside(precision))

    def __str__(self) -> str:
        return "deepspeed (ZeRO-2)"

    def _format_config(self) -> None:
        self._format_batch_size_and_grad_accum_config()
        if self.precision_plugin.precision == "bf16-mixed":
            self.config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        def write(folder: Path) -> dict[str, Any]:
            DeepSpeedStrategy.save_checkpoint(self, checkpoint, str(folder))
            return {}

        # 4 bytes each of weights and average, 12 of the optimiser's copy and moments
        size = 2.5 * sum(tensor.nbytes for tensor in self.lightning_module.state_dict().values())
        self.write_together(checkpoint, filepath, write, int(size / self.world_size))

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        path = Path(checkpoint_path)
        if not path.is_dir() or main_file(path) != OF_DEEPSPEED:
            raise UserError(
                f"{path} was not written by --strategy deepspeed, which goes on from its own folders alone: take "
                f"--strategy ddp or fsdp, or start from its weights with init.weights={path}"
            )
        return super().load_checkpoint(checkpoint_path, weights_only)
