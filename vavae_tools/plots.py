"""Images and curves as matplotlib figures that need no screen and leave no global state behind.

A figure shows itself at the end of a notebook's cell, or with `display(figure)`; `figure.savefig(path)` writes it.
Images are uint8, or floats in [-1, 1]: (N, C, H, W) with 1 or 3 channels, or a list of Pillow images.
"""

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vavae_tools.runtime.console import for_a_cell, in_notebook, send_image
from vavae_tools.runtime.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


DPI = 128  # a power of two, so that inches hold whole pixels exactly
_GAP = 6  # screen pixels between images
_LINE = 20  # screen pixels of a line of text


def as_pixels(image: Any) -> Tensor:
    """Return one image or a batch of them, in any accepted form, as uint8 (…, C, H, W) on the CPU."""
    if not isinstance(image, Tensor):
        if isinstance(image, Sequence):
            return torch.stack([as_pixels(p) for p in image])
        import numpy as np

        from vavae_tools.data.images import in_channels, is_grey

        array = torch.from_numpy(np.array(in_channels(image, 1 if is_grey(image) else 3)))
        return array.permute(2, 0, 1) if array.ndim == 3 else array[None]
    image = image.detach().cpu()
    if image.dtype != torch.uint8:
        from vavae_tools.data.images import to_pixels

        image = to_pixels(image)
    if image.ndim < 3 or image.shape[-3] not in (1, 3):
        raise ValueError(f"Expected images (…, 1 or 3, H, W), got {tuple(image.shape)}")
    return image


def image_grid(images: Any, columns: int, gap: int = 2) -> Tensor:
    """Return images one beside the other on white, row by row: uint8 (3, H', W')."""
    images = as_pixels(images)
    height, width = images.shape[2:]
    rows = -(-len(images) // columns)
    grid = torch.full((3, rows * (height + gap) - gap, columns * (width + gap) - gap), 255, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (height + gap), i % columns * (width + gap)
        grid[:, top : top + height, left : left + width] = image
    return grid


def show_image(image: Any, ax: "Axes | None" = None, title: str | None = None, **imshow: Any) -> "Axes":
    """Draw one image, without ticks, on `ax` or on a figure of its own; further arguments go to `imshow`."""
    pixels = as_pixels(image)
    if ax is None:
        return _lay_out([[pixels]], [[title or ""]], size=2.0).axes[0]
    if "cmap" not in imshow:
        pixels = pixels.expand(3, -1, -1)  # matplotlib's own grey is one too dark at every tenth value
    array = pixels.permute(1, 2, 0).numpy()
    imshow = {"vmin": 0, "vmax": 255, "aspect": "auto", **imshow}
    ax.imshow(array.squeeze(2) if array.shape[2] == 1 else array, **imshow)
    ax.set_axis_off()
    if title:
        ax.set_title(title, fontsize=9, pad=4)
    return ax


def show_images(images: Any, columns: int = 8, titles: Sequence[str] | None = None, size: float = 1.0) -> "Figure":
    """Show images row by row, with a title for each.

    Args:
        size: height of an image in inches; small ones are enlarged by a whole number, so that nothing is blurred.
    """
    images = list(as_pixels(images))
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    texts = [list(titles)[i : i + columns] for i in range(0, len(images), columns)] if titles else None
    return _lay_out(rows, texts, size=size)


def show_rows(
    rows: Mapping[str, Any], titles: Sequence[str] | None = None, gap_after: int | None = None, size: float = 1.0
) -> "Figure":
    """Show a named row for each entry, such as {"original": …, "reconstruction": …}.

    Args:
        titles: above the first row, one for each column.
        gap_after: a wider space stands after this many columns.
        size: height of an image in inches.
    """
    images = [list(as_pixels(row)) if len(row) else [] for row in rows.values()]
    texts = [list(titles), *([] for _ in images[1:])] if titles else None
    return _lay_out(images, texts, list(rows), gap_after, size)


def plot_bars(groups: Mapping[str, Sequence[float]], names: Sequence[str], y_label: str) -> "Figure":
    """Plot bars for each of `names`, one of every group: {"real": [98.0, …], "generated": [91.0, …]}."""
    figure = new_figure((max(4.0, 1.5 + 0.35 * len(names) * len(groups)), 3.2))
    ax = figure.add_subplot()
    width = 0.8 / len(groups)
    for i, (group, values) in enumerate(groups.items()):
        places = [place + (i - (len(groups) - 1) / 2) * width for place in range(len(names))]
        ax.bar(places, values, width * 0.92, label=group)
    ax.set_xticks(range(len(names)), names, rotation=90 if len(names) > 12 else 0)
    ax.set_ylabel(y_label)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(groups))
    return figure


def plot_followed(images: Mapping[str, Tensor], prompts: Sequence[str]) -> "Figure | None":
    """Plot how many of each group's images show the colour, shape, size and place that their prompts name.

    Args:
        images: uint8 (N, 3, H, H) by the group's name, one for each prompt.

    Returns:
        None where no prompt is about shapes.
    """
    from vavae_tools.data.demo.shapes import caption_accuracy

    found = {name: caption_accuracy(made, prompts) for name, made in images.items()}
    kinds = list(next(iter(found.values())))
    groups = {name: [100 * shares[kind] for kind in kinds] for name, shares in found.items()}
    return plot_bars(groups, kinds, "images that follow, %") if kinds else None


def new_figure(size: tuple[float, float], tight: bool = True) -> "Figure":
    """Return an empty figure of (width, height) inches that a notebook shows without pyplot."""
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        def _repr_png_(self) -> bytes:
            buffer = BytesIO()
            self.savefig(buffer, format="png", dpi=self.dpi)
            return buffer.getvalue()

    return NotebookFigure(size, dpi=DPI, facecolor="white", layout="constrained" if tight else None)


def save_figures(figures: "Mapping[str, Figure]", folder: Path) -> None:
    """Write each figure as `NAME.png`, whole."""
    for name, figure in figures.items():
        with atomic_write(folder / f"{name}.png") as partial:
            figure.savefig(partial, format="png")


def _wrapped(title: str, width: int) -> str:
    """Return a title in lines that are no wider than its image in pixels; one that has lines already as it is."""
    fitting = max(8, width // 8)  # a letter of this size
    return title if "\n" in title or len(title) <= fitting else textwrap.fill(title, fitting)


def _lay_out(
    rows: list[list[Tensor]],
    titles: list[list[str]] | None = None,
    labels: list[str] | None = None,
    gap_after: int | None = None,
    size: float = 1.0,
) -> "Figure":
    """Place images to the pixel, which matplotlib's own layouts do not."""
    first = next((row[0] for row in rows if row), None)
    if first is None:
        raise ValueError("No images to show")
    height, interpolation = size * DPI, "auto"
    if height > first.shape[1]:
        interpolation = "nearest"
        height = round(height / first.shape[1]) * first.shape[1]
    width = round(height * first.shape[2] / first.shape[1])
    height = round(height)
    left = _GAP + (10 * max(map(len, labels)) if labels else 0)
    titles = [[_wrapped(title, width) for title in row] for row in titles] if titles else None
    tops, y = [], 0
    for i in range(len(rows)):
        lines = max((t.count("\n") + 1 for t in titles[i] if t), default=0) if titles else 0
        y += _GAP + lines * _LINE
        tops.append(y)
        y += height
    columns = max(map(len, rows))
    lefts = [left + i * (width + _GAP) + (3 * _GAP if gap_after and i >= gap_after else 0) for i in range(columns)]
    full_width, full_height = lefts[-1] + width + _GAP, y + _GAP

    figure = new_figure((full_width / DPI, full_height / DPI), tight=False)
    for i, row in enumerate(rows):
        for j, image in enumerate(row):
            box = (lefts[j], full_height - tops[i] - height, width, height)
            relative = [v / (full_height if k % 2 else full_width) for k, v in enumerate(box)]
            title = titles[i][j] if titles and j < len(titles[i]) else None
            show_image(image, figure.add_axes(relative), title, interpolation=interpolation)
        if labels:
            middle = 1 - (tops[i] + height / 2) / full_height
            figure.text((left - _GAP) / full_width, middle, labels[i], ha="right", va="center", fontsize=9)
    return figure


def show_inline(pixels: Tensor) -> None:
    """Show one image, uint8 (1 or 3, H, W), below a notebook's cell while it runs; elsewhere do nothing."""
    if not in_notebook() and not for_a_cell():
        return
    from PIL import Image

    image = Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy())
    if for_a_cell():
        send_image(image)
    else:
        from IPython.display import display

        display(image)


def plot_curves(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
) -> "Figure":
    """Plot lines over the same x, one for each entry, such as {"cells": [0.2, 0.9, …]}, with their names above."""
    figure = new_figure((5.0, 3.4))
    ax = figure.add_subplot()
    for name, values in curves.items():
        ax.plot(x, values, marker="o", markersize=3, label=name)
    ax.set_xlabel(x_label)
    ax.set_ylabel(y_label)
    if y_range is not None:
        margin = 0.03 * (y_range[1] - y_range[0])  # a line along the edge is seen whole
        ax.set_ylim(y_range[0] - margin, y_range[1] + margin)
    ax.grid(alpha=0.3)
    ax.spines[["top", "right"]].set_visible(False)
    ax.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(curves))
    return figure
