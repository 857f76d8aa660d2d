"""Steps that are finite: clipped gradients, none that is NaN or infinite, and a way back when several in a row are."""

from typing import Any

import lightning as L
import torch
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from vavae_tools.runtime.console import log
from vavae_tools.runtime.errors import UserError

ADVICE_NOT_FINITE = "take a smaller learning rate, --precision 32 (or bf16 where the card has it)"


def has_scaler(trainer: L.Trainer) -> bool:
    """Whether gradients are scaled (fp16), which no fused optimiser may unscale: they are clipped before."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


class FiniteSteps(L.Callback):
    """Clip gradients by their global norm, leave out a step whose gradients are not finite, and count these.

    The optimisers, fused where there is no gradient scaler, leave such a step out on the device, so that the processor
    does not wait. After `in_a_row` (four times as many with fp16, whose scaler leaves out steps itself), weights and
    optimisers go back to the last good state, a copy in the machine's memory; from the same state once, then training
    ends, with `advice`. Logs `train/gradient_norm` and `train/skipped_steps`.

    `clip` is the largest norm of each optimiser's gradients, 0: none, None: the Trainer's `gradient_clip_val`; `every`
    the number of good steps between two copies, `look_every` between two looks at the counts, which are waited for.
    """

    def __init__(
        self, clip: float | None, advice: str, in_a_row: int = 5, every: int = 200, look_every: int = 10
    ) -> None:
        self.clip, self.advice = clip, advice
        self.in_a_row, self.every, self.look_every = in_a_row, every, look_every
        self._skipped = torch.zeros(())
        self._kept_at = self._went_back_to = -1

    def state_dict(self) -> dict[str, int]:
        return {"skipped": int(self._skipped)}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._skipped = torch.tensor(float(state_dict["skipped"]))

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.gradient_clip_algorithm == "value":
            raise UserError("gradient_clip_algorithm=value: gradients are clipped by their norm here, leave it out")
        self._skipped = self._skipped.to(module.device)
        self._rows = torch.zeros(len(trainer.optimizers), device=module.device)  # left out in a row, by optimiser
        self._keep(trainer, module)

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        number = next(i for i, known in enumerate(trainer.optimizers) if known is optimizer)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        clip = (trainer.gradient_clip_val or 0.0) if self.clip is None else self.clip
        if clip:
            clip_grads_with_norm_(weights, clip, norm)
        # the norm is the same on all processes, so that they decide alike
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        bad = ~torch.isfinite(norm)
        if not has_scaler(trainer):
            optimizer.found_inf = bad.float()  # by which a scaler tells a fused optimiser the same
        self._skipped += bad
        self._rows[number] = (self._rows[number] + 1) * bad
        for buffer, last_good in self._buffers:  # running statistics that saw a NaN keep it for ever
            buffer.copy_(torch.where(torch.isfinite(buffer).all(), buffer, last_good))
        if number == 0:
            module.log_dict({"train/gradient_norm": norm, "train/skipped_steps": self._skipped.clone()})

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx) -> None:
        if trainer.global_step % self.look_every:
            return
        row = int(self._rows.max())
        if row >= self.in_a_row * (4 if has_scaler(trainer) else 1):
            self._go_back(trainer, module, row)
        elif not row and trainer.global_step - self._kept_at >= self.every:
            self._keep(trainer, module)

    @torch.no_grad()
    def _keep(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        # what is frozen stays as it is, but for averages, which no gradient trains
        trained = [w for name, w in module.named_parameters() if w.requires_grad or name.startswith("ema.")]
        buffers = [buffer for buffer in module.buffers() if buffer.is_floating_point()]
        self._kept = [(tensor, _copy(tensor)) for tensor in (*trained, *buffers)]
        self._optimizers = [apply_to_collection(dict(each.state), Tensor, _copy) for each in trainer.optimizers]
        statistics = [part for part in module.modules() if getattr(part, "running_mean", None) is not None]
        self._buffers = [(b, b.clone()) for part in statistics for b in (part.running_mean, part.running_var)]
        self._kept_at = trainer.global_step

    @torch.no_grad()
    def _go_back(self, trainer: L.Trainer, module: L.LightningModule, row: int) -> None:
        if self._kept_at == self._went_back_to:
            again = f"Loss or gradients were not finite again after going back to step {self._kept_at:,}"
            raise UserError(f"{again}; earlier checkpoints are whole. Resume with --resume last and {self.advice}")
        row = f"{row} steps in a row without finite gradients (step {trainer.global_step:,})"
        log(f"{row}: back to the weights of step {self._kept_at:,}. If it happens again, {self.advice}")
        for tensor, copy in self._kept:
            _local(tensor).copy_(copy)
        for optimizer, kept in zip(trainer.optimizers, self._optimizers, strict=True):
            for weight in list(optimizer.state):
                if weight not in kept:  # it was not stepped yet
                    del optimizer.state[weight]
                for name, copy in kept.get(weight, {}).items():
                    _local(optimizer.state[weight][name]).copy_(copy)
        self._went_back_to = self._kept_at
        self._rows.zero_()


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor  # this process's part where it is cut


def _copy(tensor: Tensor) -> Any:
    return _local(tensor.detach()).to("cpu", copy=True)
