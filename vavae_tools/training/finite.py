"""Steps that are finite: clipped gradients, none that is NaN or infinite, and a way back when several in a row are."""

from typing import Any

import lightning as L
import torch
from torch import Tensor

from vavae_tools.errors import UserError
from vavae_tools.training.checkpoints import copied_to_cpu
from vavae_tools.training.progress import say


class FiniteSteps(L.Callback):
    """Clips gradients by their global norm, leaves out a step whose gradients are not finite, and counts these.

    After a few in a row the weights and optimisers go back to the last good state, a copy in the machine's memory.
    From the same state it goes back once; then training ends, with advice.

    Args:
        clip: largest global norm of each optimiser's gradients; 0 does not clip.
        in_a_row: steps left out one after the other before going back. With fp16 four times as many, since its scaler
            finds its scale by leaving out steps.
        every: good steps between two copies.

    Logs `train/gradient_norm` and `train/skipped_steps`.
    """

    def __init__(self, clip: float = 1.0, in_a_row: int = 5, every: int = 200) -> None:
        self.clip, self.in_a_row, self.every = clip, in_a_row, every
        self.skipped = 0
        self._rows: dict[int, int] = {}  # of each optimiser
        self._kept: tuple[int, dict[str, Tensor], list[dict[str, Any]]] | None = None
        self._went_back_to = -1

    def state_dict(self) -> dict[str, int]:
        return {"skipped": self.skipped}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.skipped = state_dict["skipped"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._keep(trainer, module)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        number = next(i for i, known in enumerate(trainer.optimizers) if known is optimizer)
        weights = [weight for group in optimizer.param_groups for weight in group["params"]]
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in weights if weight.grad is not None])
        if self.clip:
            torch.nn.utils.clip_grads_with_norm_(weights, self.clip, norm)
        # The one place where the processor waits for the GPU in a step, as fp16's scaler does anyway. The norm is the
        # same on all processes, so that they decide alike.
        if torch.isfinite(norm):
            self._rows[number] = 0
        else:
            optimizer.zero_grad(set_to_none=True)  # without gradients a step changes nothing
            self.skipped, self._rows[number] = self.skipped + 1, self._rows.get(number, 0) + 1
            self._mend_buffers(module)
        if number == 0:
            module.log_dict({"train/gradient_norm": norm, "train/skipped_steps": float(self.skipped)})

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs, batch, batch_idx) -> None:
        scaled = getattr(trainer.precision_plugin, "scaler", None) is not None
        row = max(self._rows.values(), default=0)
        if row >= self.in_a_row * (4 if scaled else 1):
            self._go_back(trainer, module, row)
        elif not row and trainer.global_step - self._kept[0] >= self.every:
            self._keep(trainer, module)

    def _keep(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        optimizers = [copied_to_cpu(optimizer.state_dict()) for optimizer in trainer.optimizers]
        self._kept = trainer.global_step, copied_to_cpu(dict(module.state_dict())), optimizers

    def _go_back(self, trainer: L.Trainer, module: L.LightningModule, row: int) -> None:
        step, weights, optimizers = self._kept
        advice = "take a smaller --lr, --precision 32 (or bf16 where the card has it), or fewer losses"
        if step == self._went_back_to:
            raise UserError(
                f"Loss or gradients were not finite again after going back to step {step:,}; checkpoints of before are "
                f"whole. Go on with --resume last and {advice}"
            )
        say(
            f"{row} steps in a row without finite gradients (step {trainer.global_step:,}): back to the weights "
            f"of step {step:,}. If it happens again, {advice}"
        )
        module.load_state_dict(weights)
        for optimizer, state in zip(trainer.optimizers, optimizers, strict=True):
            optimizer.load_state_dict(copied_to_cpu(state))
        self._went_back_to, self._rows = step, {}

    def _mend_buffers(self, module: L.LightningModule) -> None:
        """Running statistics that saw a NaN keep it for ever: take them from the last good state."""
        for name, buffer in module.named_buffers():
            if buffer.is_floating_point() and not torch.isfinite(buffer).all() and name in self._kept[1]:
                buffer.copy_(self._kept[1][name])
