"""A panel in a notebook: make images of a person, see the nearest real ones, keep or reject each by a click."""

import html
from functools import cached_property
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ipywidgets as widgets
import torch
from IPython.display import display
from PIL import Image
from torch import Tensor

from vavae_tools.data.datasets import ImageDataModule
from vavae_tools.diffusion.solvers import solvers_for
from vavae_tools.evaluation.metrics import nearest
from vavae_tools.pipelines.batches import move_to_device
from vavae_tools.pipelines.classes import LatentDiTPipeline
from vavae_tools.pipelines.writer import write_samples
from vavae_tools.plots import as_pixels, show_rows
from vavae_tools.runtime.errors import UserError, in_home
from vavae_tools.runtime.files import atomic_write
from vavae_tools.runtime.machine import find_device

SIDE = 128  # pixels of an image on the screen, about
KEPT, REJECTED = ("keep", "check", "success"), ("reject", "times", "")  # text, icon and style of a mark


class SamplingPanel:
    """Widgets to look for good settings and good images; shown at the end of a cell, it has made a first grid.

    Images are those of `write_samples` with the same arguments: the line below the widgets is the code for them. What
    is saved goes to `output_dir/PERSON/`, where a split and any classifier find it. Below the widgets the grid stands
    once more as a plain image, which a saved notebook still shows.

    Args:
        split: whose training subset the nearest real images are from; None: there is no such button.
    """

    def __init__(
        self,
        pipe: LatentDiTPipeline,
        split: str | Path | None,
        output_dir: str | Path,
        number: int = 8,
        num_steps: int = 50,
        guidance_scale: float = 1.25,
        seed: int = 0,
    ) -> None:
        self.pipe = move_to_device(pipe, find_device()) if pipe.device.type == "cpu" else pipe
        self.split, self.output_dir = split, in_home(output_dir)
        numbers, many = widgets.BoundedIntText, 2**31 - 1
        own = [("the pipeline's own", None)]
        self.person = widgets.Dropdown(options=list(pipe.people), description="person")
        self.number = numbers(number, min=1, max=64, description="images")
        self.steps = numbers(num_steps, min=1, max=1000, description="steps")
        self.scale = widgets.BoundedFloatText(guidance_scale, min=0, max=100, step=0.25, description="guidance")
        self.seed = numbers(seed, min=0, max=many, description="seed")
        self.solver = widgets.Dropdown(
            options=own + [(n, n) for n in solvers_for(pipe.objective)], description="solver"
        )
        self.make_button = widgets.Button(description="Make", icon="refresh", button_style="primary")
        self.nearest = widgets.ToggleButton(description="Nearest real")
        self.save_button = widgets.Button(description="Save the kept", icon="save")
        self.code, self.message = widgets.HTML(), widgets.HTML()
        self.grid = widgets.HBox(layout=widgets.Layout(flex_flow="row wrap"))
        self.marks: list[widgets.ToggleButton] = []
        self._copy = None

        self.settings = (self.person, self.number, self.steps, self.scale, self.seed, self.solver)
        for widget in self.settings:
            widget.layout.width, widget.style.description_width = "240px", "70px"
            widget.observe(lambda change: self._show_code(), "value")
        self.make_button.on_click(lambda button: self._saying(self.make))
        self.save_button.on_click(lambda button: self._saying(self.save))
        self.nearest.observe(lambda change: self._saying(lambda: self._show(change["new"])), "value")
        buttons = [self.make_button, *([] if split is None else [self.nearest]), self.save_button]
        rows = widgets.HBox(self.settings, layout=widgets.Layout(flex_flow="row wrap")), widgets.HBox(buttons)
        self.widget = widgets.VBox([*rows, self.code, self.message, self.grid])
        self._show_code()
        self.make()

    @property
    def line(self) -> str:
        """The code that makes the images for which the widgets stand."""
        swap = f"pipe.swap_solver({self.solver.value!r}); " if self.solver.value else ""
        steps = f"num_inference_steps={self.steps.value}, guidance_scale={self.scale.value:g}"
        labels = f"[{self.person.value!r}] * {self.number.value}"
        return f'{swap}vt.write_samples(pipe, {labels}, "samples", {self.seed.value}, {steps})'

    def make(self) -> None:
        """Make the images, all of which are kept at first."""
        settings = {"num_inference_steps": self.steps.value, "guidance_scale": self.scale.value}
        labels, solver = [self.person.value] * self.number.value, self.pipe.scheduler
        folder = TemporaryDirectory()
        try:
            if self.solver.value:
                self.pipe.swap_solver(self.solver.value)
            self._files = write_samples(self.pipe, labels, folder.name, self.seed.value, **settings)
        finally:
            self.pipe.scheduler = solver
        self._folder = folder  # of the images before is removed with its last mention
        # of other settings an image has another name, so that none is replaced by one that looks otherwise
        self._how = f"{self.solver.value or 'own'}{self.steps.value}_scale{self.scale.value:g}"
        self.marks = [widgets.ToggleButton(value=True) for _ in self._files]
        for mark in self.marks:
            mark.layout.width = f"{SIDE}px"
            mark.observe(lambda change: _describe(change["owner"]), "value")
            _describe(mark)
        self._show(with_nearest=False)
        if self.nearest.value:
            self._show(with_nearest=True)

    def save(self) -> list[Path]:
        """Write the images that are kept and return their paths; of rejected ones what was saved before is removed."""
        kept = []
        for path, mark in zip(self._files, self.marks, strict=True):
            target = self.output_dir / path.parent.name / f"{path.stem}_{self._how}.png"
            if mark.value:
                kept.append(target)
                with atomic_write(target) as partial:
                    partial.write_bytes(path.read_bytes())
            else:
                target.unlink(missing_ok=True)
        self._say(f"{len(kept)} of {len(self.marks)} images kept in {self.output_dir}")
        return kept

    # ---- what is shown
    def _show(self, with_nearest: bool) -> None:
        images = as_pixels([Image.open(path) for path in self._files])
        rows, titles = {self._files[0].parent.name: images}, []
        if with_nearest:
            rows["nearest real"], titles = self._nearest(images)
        columns = []
        for place, mark in enumerate(self.marks):
            shown = [widgets.Image(value=_png(row[place]), format="png") for row in rows.values()]
            captions = [widgets.Label(title) for title in titles[place : place + 1]]
            columns.append(widgets.VBox([shown[0], mark, *shown[1:], *captions]))
        self.grid.children = columns
        self._figure = show_rows({name: row[:8] for name, row in rows.items()}, titles[:8], size=0.6)
        if self._copy is not None:
            self._copy.update(self._figure)

    def _nearest(self, images: Tensor) -> tuple[Tensor, list[str]]:
        """Return the person's nearest training image for each, by its pixels, and its name and distance."""
        person, training = self._files[0].parent.name, self._real.train_data
        places = (training.labels == self._real.labels.get(person, -1)).nonzero().flatten().tolist()
        if not places:
            raise UserError(f"No training images of {person} in {self.split}: choose another person")
        real = training.images(places)
        found, distances = nearest(images.flatten(1), real.flatten(1))
        distances = distances / (127.5 * images[0].numel() ** 0.5)
        names = [Path(training.names[places[i]]).name for i in found.tolist()]
        return real[found], [f"{name}\n{far:.2f}" for name, far in zip(names, distances.tolist(), strict=True)]

    @cached_property
    def _real(self) -> ImageDataModule:
        channels = self.pipe.vae.config.get("in_channels", 3)
        return ImageDataModule(self.split, self.pipe.image_size, channels=channels, progress=False)

    def _show_code(self) -> None:
        self.code.value = f"<pre>{html.escape(self.line)}</pre>"

    def _say(self, text: str, colour: str = "inherit") -> None:
        self.message.value = f'<span style="color: {colour}">{html.escape(text)}</span>'

    def _saying(self, act: Any) -> None:
        """Do what a click asks for, and say what is wrong beside the widgets, where an error would not be seen."""
        self._say("…")
        self.make_button.disabled = self.save_button.disabled = True
        try:
            act()
            if self.message.value.endswith(">…</span>"):
                self._say("")
        except UserError as error:
            self._say(f"error: {error}", "red")
        finally:
            self.make_button.disabled = self.save_button.disabled = False

    def _ipython_display_(self) -> None:
        display(self.widget)
        self._copy = display(self._figure, display_id=True)


def _describe(mark: widgets.ToggleButton) -> None:
    mark.description, mark.icon, mark.button_style = KEPT if mark.value else REJECTED


def _png(image: Tensor) -> bytes:
    """Return one image, uint8 (C, H, W), enlarged by a whole number to about `SIDE` pixels."""
    factor = max(1, round(SIDE / image.shape[1]))
    pixels = image.expand(3, -1, -1).repeat_interleave(factor, 1).repeat_interleave(factor, 2)
    buffer = BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).contiguous().to(torch.uint8).numpy()).save(buffer, format="png")
    return buffer.getvalue()
