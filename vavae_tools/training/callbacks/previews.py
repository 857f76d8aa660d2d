"""Images while training: reconstructions beside their originals, samples of every person from fixed noise."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from textwrap import indent
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from PIL import Image
from torch import Tensor

from vavae_tools.plots import image_grid, show_inline
from vavae_tools.runtime.console import log
from vavae_tools.runtime.errors import StoppedAtOnce, one_line
from vavae_tools.runtime.files import atomic_write
from vavae_tools.runtime.machine import release_memory
from vavae_tools.runtime.ranks import failing_together


class Previews(L.Callback):
    """Write a grid of images as `NAME-STEP.png` to `folder` and to the loggers, and hand it to `show`, uint8 (3, H, W).

    There is one every so many epochs, and at the end; by default a notebook's cell shows it.
    """

    name = "preview"

    def __init__(self, folder: str | Path, every: int = 1, show: Callable[[Tensor], None] | None = None) -> None:
        self.folder, self.every, self.show = Path(folder), every, show or show_inline

    def grid(self, module: L.LightningModule) -> Tensor:
        raise NotImplementedError

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        epoch = trainer.current_epoch + 1
        last = epoch == trainer.max_epochs or trainer.global_step == trainer.max_steps
        if epoch % self.every and not last:
            return
        together = isinstance(trainer.strategy, ModelParallelStrategy)
        if not trainer.is_global_zero and not together:
            return  # of several processes one makes the images, but those that share a model make them together
        training = module.training
        module.eval()
        release_memory()  # what training keeps for its next step, images may take meanwhile
        try:
            with torch.inference_mode(), failing_together("A preview") if together else nullcontext():
                grid = self.grid(module)
            if trainer.is_global_zero:
                self.keep(trainer, grid)
        except StoppedAtOnce:
            raise
        except Exception as error:  # of any kind: hours of training are worth more than its images
            log(f"preview left out at step {trainer.global_step:,} ({type(error).__name__}: {one_line(error, 200)})")
        finally:
            module.train(training)
            release_memory()

    def keep(self, trainer: L.Trainer, grid: Tensor) -> None:
        image, step = Image.fromarray(grid.permute(1, 2, 0).numpy()), trainer.global_step
        with atomic_write(self.folder / f"{self.name}-{step:06d}.png") as partial:
            image.save(partial, format="png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(self.name, grid, step)
            elif isinstance(logger, WandbLogger):
                logger.log_image(self.name, [image], step=step)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_image(logger.run_id, image, f"{self.name}-{step:06d}.png")
        self.show(grid)


class ReconstructionPreviews(Previews):
    """Show originals, and below them what the module's `reconstructions(batch)` are."""

    name = "reconstructions"

    def __init__(self, batch: dict[str, Tensor], folder: str | Path, every: int = 1, show=None) -> None:
        super().__init__(folder, every, show)
        self.batch = batch

    def grid(self, module: L.LightningModule) -> Tensor:
        rows = [row.cpu() for row in module.reconstructions(self.batch)]
        return image_grid(torch.cat([self.batch["images"], *rows]), columns=len(rows[0]))


class SamplePreviews(Previews):
    """Show samples, from the same noise each time, which `make` returns of the averaged network, row after row."""

    name = "samples"

    def __init__(self, make: Callable[..., Any], columns: int, folder: str | Path, every: int, show=None) -> None:
        super().__init__(folder, every, show)
        self.make, self.columns = make, columns

    def grid(self, module: L.LightningModule) -> Tensor:
        return image_grid(self.make(module.ema.network), columns=self.columns)


class TextPreviews(SamplePreviews):
    """Show images and their texts, which `make` returns: the texts in `folder`, in TensorBoard and on the screen."""

    def __init__(self, *arguments: Any, log: Callable[[str], None] = log, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.log_line, self.texts = log, []

    def grid(self, module: L.LightningModule) -> Tensor:
        images, self.texts = self.make(module.ema.network)
        return image_grid(images, columns=self.columns)

    def keep(self, trainer: L.Trainer, grid: Tensor) -> None:
        super().keep(trainer, grid)
        with atomic_write(self.folder / f"{self.name}-{trainer.global_step:06d}.txt") as partial:
            partial.write_text("\n".join(self.texts) + "\n", encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):  # in Markdown, where four spaces keep lines as they are
                logger.experiment.add_text(self.name, indent("\n".join(self.texts), "    "), trainer.global_step)
        for text in self.texts:
            self.log_line(f"  {' '.join(text.split())[:160]}")
