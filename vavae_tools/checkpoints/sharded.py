"""Checkpoints that no process has to hold whole: folders of FSDP, with each process's part, and those of DeepSpeed.

torch.distributed.checkpoint is not used for them: its `.metadata` is a pickle that is executed where it is read, and so
are the plain values in its files. Here a part is a file of plain tensors, read with `weights_only=True` as all others.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import read_checkpoint, read_saved

CHECKPOINT = "checkpoint.pt"
"""Lightning's checkpoint, with a tensor without contents for each one that is cut."""
OF_DEEPSPEED = "checkpoint/mp_rank_00_model_states.pt"
"""Under the tag that Lightning gives it."""
DEEPSPEEDS_OWN = {
    *("module", "buffer_names", "optimizer", "param_shapes", "frozen_param_shapes", "shared_params"),
    *("frozen_param_fragments", "lr_scheduler", "data_sampler", "random_ltd", "sparse_tensor_module_names"),
    *("skipped_steps", "global_steps", "global_samples", "dp_world_size", "mp_world_size", "ds_config", "ds_version"),
}


class Cut:
    """A tensor that lies in parts of its rows, in order, in several files, and is read as far as it is asked for."""

    def __init__(self, pieces: list[Tensor]) -> None:
        self.pieces = pieces
        self.shape = torch.Size([sum(len(piece) for piece in pieces), *pieces[0].shape[1:]])

    def rows(self, start: int, stop: int) -> Tensor:
        found, begin = [], 0
        for piece in self.pieces:
            found.append(piece[max(0, start - begin) : max(0, stop - begin)])
            begin += len(piece)
        return torch.cat(found)

    def whole(self) -> Tensor:
        return torch.cat(self.pieces)


def part_name(rank: int, size: int) -> str:
    """
    >>> part_name(0, 2)
    'part-1-of-2.pt'
    """
    return f"part-{rank + 1}-of-{size}.pt"


def cut_off(checkpoint: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Lightning's checkpoint → itself with empty ("meta") tensors where they are cut over processes, and own rows.

    The rows are named by the way to their tensor, such as "optimizer_states/0/state/3/exp_avg".
    """
    from torch.distributed.tensor import DTensor

    rows: dict[str, Tensor] = {}

    def empty(way: str, tensor: Any) -> Any:
        if isinstance(tensor, DTensor):
            rows[way] = tensor.to_local().detach().to("cpu")
            return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
        return tensor.detach().to("cpu") if isinstance(tensor, Tensor) else tensor

    return mapped(empty, checkpoint), rows


def open_parts(folder: Path) -> dict[str, Any]:
    """Lightning's checkpoint from a folder of FSDP, with a `Cut` for each tensor that is cut.

    Raises:
        UserError: the parts are not those of this checkpoint.
    """
    checkpoint = read_checkpoint(folder / CHECKPOINT)
    size = len(list(folder.glob("part-*.pt")))
    parts = [read_checkpoint(folder / part_name(rank, size)) for rank in range(size)]

    def joined(way: str, tensor: Any) -> Any:
        if not (isinstance(tensor, Tensor) and tensor.is_meta):
            return tensor
        pieces = [part[way] for part in parts if way in part]
        if len(pieces) != size or (cut := Cut(pieces)).shape != tensor.shape:
            raise UserError(f"{folder} is damaged: its {size} parts do not make up {way}; take another checkpoint")
        return cut

    return mapped(joined, checkpoint)


def whole_tensors(checkpoint: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint with all tensors in memory."""
    return mapped(lambda way, value: value.whole() if isinstance(value, Cut) else value, checkpoint)


def mapped(change: Callable[[str, Any], Any], value: Any, way: str = "") -> Any:
    """A checkpoint with `change(way, leaf)` in the place of each leaf of its dicts and lists."""
    begin = f"{way}/" if way else ""
    if isinstance(value, dict):
        return type(value)((key, mapped(change, item, f"{begin}{key}")) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(mapped(change, item, f"{begin}{number}") for number, item in enumerate(value))
    return change(way, value)


def read_deepspeed(folder: Path, say: Callable[[str], None]) -> dict[str, Any]:
    """Lightning's checkpoint from a folder of DeepSpeed's ZeRO-2 as `strategies.Zero2` writes it.

    There all weights are whole and in float32; the optimiser's state, cut into DeepSpeed's own form, is left behind.
    """
    saved = read_saved(folder / OF_DEEPSPEED)
    if not isinstance(saved, dict) or not isinstance(saved.get("module"), dict):
        raise UserError(f"{folder} has no weights: {OF_DEEPSPEED} lacks 'module', as DeepSpeed's ZeRO-2 writes it")
    say(f"{folder} is DeepSpeed's, which alone reads its optimiser's state: with another strategy it starts anew")
    rest = {name: value for name, value in saved.items() if name not in DEEPSPEEDS_OWN}
    return {**rest, "state_dict": saved["module"], "optimizer_states": []}
