"""Lightning's private names that `lightning_inside` stands on, one test each: what a new version may break."""

from collections.abc import Callable

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from vavae_tools.training import lightning_inside


class Line(L.LightningModule):
    """Learns by one optimiser, or by two in each step; `look` is called at each batch."""

    def __init__(self, look: Callable[["Line"], object] = lambda module: None, optimisers: int = 1) -> None:
        super().__init__()
        self.network, self.count, self.look = nn.Linear(1, 1), optimisers, look
        self.automatic_optimization = optimisers == 1

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor | None:
        self.look(self)
        if self.automatic_optimization:
            return self.network(batch).square().mean()
        first, second = self.optimizers()
        lightning_inside.exclude_from_global_step(second)
        for optimiser in (first, second):
            optimiser.zero_grad()
            self.manual_backward(self.network(batch).square().mean())
            optimiser.step()
        return None

    def configure_optimizers(self) -> list[torch.optim.Optimizer]:
        return [torch.optim.SGD(self.parameters(), 0.1) for _ in range(self.count)]


def trained(module: Line, **settings: object) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet, **settings)
    trainer.fit(module, DataLoader(torch.ones(6, 1)))
    return trainer


def test_is_gathering_says_after_which_batches_no_step_is_made():
    found: list[bool] = []
    module = Line(lambda module: found.append(lightning_inside.is_gathering(module.trainer)))
    trainer = trained(module, accumulate_grad_batches=3)
    assert found == [True, True, False, True, True, False] and trainer.global_step == 2


def test_logged_step_is_the_step_of_the_values():
    found: list[int] = []
    trained(Line(lambda module: found.append(lightning_inside.logged_step(module.trainer))), accumulate_grad_batches=3)
    assert found == [0, 0, 0, 1, 1, 1]


def test_exclude_from_global_step_leaves_one_of_two_optimisers_out():
    assert trained(Line(optimisers=2)).global_step == 6


def test_leave_sigterm_to_us_replaces_what_the_loop_asks():
    asked: list[str] = []

    class Early(L.Callback):
        def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
            assert callable(trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor)
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: asked.append("before")
            lightning_inside.leave_sigterm_to_us(trainer)

    trained(Line(), callbacks=[Early()])
    assert not asked
