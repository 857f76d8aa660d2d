"""Images while training: reconstructions beside their originals, samples of persons from fixed noise."""

import re
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from textwrap import indent
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from PIL import Image
from torch import Tensor

from vavae_tools.plots import grid_cells, image_grid, labelled_grid, show_inline
from vavae_tools.runtime.console import for_a_cell, in_notebook, log
from vavae_tools.runtime.errors import StoppedAtOnce, one_line
from vavae_tools.runtime.files import atomic_write
from vavae_tools.runtime.machine import release_memory
from vavae_tools.runtime.ranks import failing_together

STRIP = "strip.png"
STRIP_IMAGES = 8  # of each preview, in the strip over training


def preview_epochs(epochs: int, count: int) -> list[int]:
    """Return after which epochs there is a preview: the last one, half of it and so on, or closer to make `count`.

    >>> preview_epochs(800, 5), preview_epochs(30, 8), preview_epochs(2, 4)
    ([50, 100, 200, 400, 800], [1, 2, 3, 4, 7, 11, 18, 30], [1, 2])
    """
    ratio = min(2.0, epochs ** (1 / max(1, count - 1)))
    return sorted({max(1, round(epochs / ratio**i)) for i in range(count)})


@contextmanager
def looking_on(trainer: L.Trainer, module: L.LightningModule, what: str) -> Iterator[None]:
    """Put a module into evaluation mode; an error in this block is said in a line, and ends no training."""
    training = module.training
    module.eval()
    release_memory()  # what training keeps for its next step, images may take meanwhile
    try:
        yield
    except StoppedAtOnce:
        raise
    except Exception as error:  # of any kind: hours of training are worth more than its images
        log(f"{what} left out at step {trainer.global_step:,} ({type(error).__name__}: {one_line(error, 200)})")
    finally:
        module.train(training)
        release_memory()


def made_by_some(trainer: L.Trainer, make: Callable[[], Tensor], what: str) -> Tensor | None:
    """Return images; None in processes that leave it to the first one: those that share a model make them together."""
    together = isinstance(trainer.strategy, ModelParallelStrategy)
    if not trainer.is_global_zero and not together:
        return None
    with torch.inference_mode(), failing_together(what) if together else nullcontext():
        return make()


class Previews(L.Callback):
    """Write a grid of images as `NAME-STEP.png` to `folder` and to the loggers, and hand it to `show`, uint8 (3, H, W).

    There is one after each of `epochs` and at the end; a notebook's cell shows it by default. What `show` gets is
    enlarged, with step, epoch and the rows' names. At the end `strip.png` has a row of each preview in `folder`.
    """

    name = "preview"
    columns = 1  # images in a row

    def __init__(
        self, folder: str | Path, epochs: Collection[int] = (), show: Callable[[Tensor], None] | None = None
    ) -> None:
        self.folder, self.epochs, self.show = Path(folder), epochs, show or show_inline
        self.rows: Sequence[str] = ()  # their names
        self.titles: Sequence[str] = ()  # of the columns
        self.begun, self.made = 0, set()  # the step at which this session began, and those of its previews

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.begun = trainer.global_step

    def images(self, module: L.LightningModule) -> Tensor:
        """Return images, row by row: uint8 (N, C, H, W)."""
        raise NotImplementedError

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.current_epoch + 1 not in self.epochs and not _is_last(trainer):
            return
        with looking_on(trainer, module, "preview"):
            images = made_by_some(trainer, partial(self.images, module), "A preview")
            if images is not None and trainer.is_global_zero:
                self.keep(trainer, images)

    def keep(self, trainer: L.Trainer, images: Tensor) -> None:
        grid, step = image_grid(images, self.columns), trainer.global_step
        image = Image.fromarray(grid.permute(1, 2, 0).numpy())
        with atomic_write(self.folder / f"{self.name}-{step:06d}.png") as partial:
            image.save(partial, format="png")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_image(self.name, grid, step)
            elif isinstance(logger, WandbLogger):
                logger.log_image(self.name, [image], step=step)
            elif isinstance(logger, MLFlowLogger):
                logger.experiment.log_image(logger.run_id, image, f"{self.name}-{step:06d}.png")
        self.made.add(step)
        if self.show is not show_inline or in_notebook() or for_a_cell():  # else nobody sees it
            title = f"{self.name} after step {step:,}, epoch {trainer.current_epoch + 1:,}"
            self.show(labelled_grid(images, self.columns, self.rows, title, self.titles))
        if _is_last(trainer):
            self.keep_strip(images)

    def keep_strip(self, images: Tensor) -> None:
        """Write and show a row of each preview of this run that has as many images, as large, as the last."""
        count, found = len(images), {}
        for path in self.folder.glob(f"{self.name}-*.png"):
            step = re.fullmatch(r"\d+", path.stem.removeprefix(f"{self.name}-"))
            if step and (int(step[0]) <= self.begun or int(step[0]) in self.made):  # others are of a run before
                with Image.open(path) as file:
                    grid = torch.from_numpy(np.array(file.convert("RGB"))).permute(2, 0, 1)  # (3, H', W')
                if (cells := grid_cells(grid, count, self.columns, images.shape[2:])) is not None:
                    found[int(step[0])] = cells
        chosen, above = self.strip_places(count), self.strip_above()
        rows = {f"step {step:,}": cells[chosen] for step, cells in sorted(found.items())}
        if above:
            rows = {"originals": found[max(found)][above], **rows}
        of_rows = [self.rows[place // self.columns] for place in chosen] if self.rows and not above else []
        title, shown = f"{self.name} over training", torch.cat(list(rows.values()))
        strip = labelled_grid(shown, len(chosen), list(rows), title, self.titles or of_rows)
        with atomic_write(self.folder / STRIP) as partial:
            Image.fromarray(strip.permute(1, 2, 0).numpy()).save(partial, format="png")
        self.show(strip)

    def strip_places(self, count: int) -> list[int]:
        """Return which images of a preview stand in the strip: the first ones of every row."""
        rows = -(-count // self.columns)
        each = max(1, STRIP_IMAGES // rows)
        return [place for place in range(count) if place % self.columns < each]

    def strip_above(self) -> list[int]:
        """Return which images stand above all rows of the strip."""
        return []


def _is_last(trainer: L.Trainer) -> bool:
    """Return whether training ends with this epoch."""
    return trainer.current_epoch + 1 == trainer.max_epochs or trainer.global_step == trainer.max_steps


class ReconstructionPreviews(Previews):
    """Show originals, and below them what the module's `reconstructions(batch)` are."""

    name = "reconstructions"

    def __init__(
        self, batch: dict[str, Tensor], folder: str | Path, epochs: Collection[int] = (), show=None, people=None
    ) -> None:
        super().__init__(folder, epochs, show)
        self.batch, self.columns = batch, len(batch["images"])
        names = {label: name for name, label in (people or {}).items()}  # people: name → label
        self.titles = [names.get(label, "") for label in batch.get("labels", torch.empty(0)).tolist()]

    def images(self, module: L.LightningModule) -> Tensor:
        made = [row.cpu() for row in module.reconstructions(self.batch)]
        self.rows = ["original", *(["own vector", "another's", "no vector"] if len(made) == 3 else ["reconstruction"])]
        return torch.cat([self.batch["images"], *made])

    def strip_places(self, count: int) -> list[int]:
        return list(range(self.columns, 2 * self.columns))[:STRIP_IMAGES]

    def strip_above(self) -> list[int]:
        return list(range(self.columns))[:STRIP_IMAGES]


class SamplePreviews(Previews):
    """Show samples, from the same noise each time, which `make` returns of the averaged network, row after row."""

    name = "samples"

    def __init__(
        self,
        make: Callable[..., Any],
        columns: int,
        folder: str | Path,
        epochs: Collection[int] = (),
        show=None,
        rows: Sequence[str] = (),
    ) -> None:
        super().__init__(folder, epochs, show)
        self.make, self.columns, self.rows = make, columns, rows

    def images(self, module: L.LightningModule) -> Tensor:
        return self.make(module.ema.network)


class TextPreviews(SamplePreviews):
    """Show images and their texts, which `make` returns: the texts in `folder`, in TensorBoard and on the screen."""

    def __init__(self, *arguments: Any, log: Callable[[str], None] = log, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.log_line, self.texts = log, []

    def images(self, module: L.LightningModule) -> Tensor:
        images, self.texts = self.make(module.ema.network)
        return images

    def keep(self, trainer: L.Trainer, images: Tensor) -> None:
        super().keep(trainer, images)
        with atomic_write(self.folder / f"{self.name}-{trainer.global_step:06d}.txt") as partial:
            partial.write_text("\n".join(self.texts) + "\n", encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):  # in Markdown, where four spaces keep lines as they are
                logger.experiment.add_text(self.name, indent("\n".join(self.texts), "    "), trainer.global_step)
        for text in self.texts:
            self.log_line(f"  {' '.join(text.split())[:160]}")
