"""Images and curves as matplotlib figures that need no screen and leave no global state behind.

A figure shows itself at the end of a notebook's cell, or with `display(figure)`; `figure.savefig(path)` writes it.
Images are uint8, or floats in [-1, 1]: (N, C, H, W) with 1 or 3 channels, or a list of Pillow images.
"""

import textwrap
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any
from warnings import catch_warnings, filterwarnings

import torch
import torch.nn.functional as F
from torch import Tensor

from vavae_tools.runtime.console import printable, show_image
from vavae_tools.runtime.files import atomic_write

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 128  # a power of two, so that inches hold whole pixels exactly
_GAP = 6  # screen pixels between images
_LEGEND = {"frameon": False, "loc": "lower left", "bbox_to_anchor": (0, 1)}


def as_pixels(image: Any) -> Tensor:
    """Return one image or a batch of them, in any accepted form, as uint8 (…, C, H, W) on the CPU."""
    from vavae_tools.data.images import to_pixels
    from vavae_tools.data.stored import convert_channels, is_grey

    if isinstance(image, Sequence):
        return torch.stack([as_pixels(one) for one in image])
    if not isinstance(image, Tensor):
        import numpy as np

        array = np.atleast_3d(np.array(convert_channels(image, 1 if is_grey(image) else 3)))
        return torch.from_numpy(array).permute(2, 0, 1)
    image = image.detach().cpu()
    if image.dtype != torch.uint8:
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


def grid_cells(grid: Tensor, count: int, columns: int, size: Sequence[int], gap: int = 2) -> Tensor | None:
    """Return the images of an `image_grid`, (count, 3, H, W) for a size (H, W); None where it has another shape."""
    (height, width), rows = size, -(-count // columns)
    if grid.shape[1:] != (rows * (height + gap) - gap, columns * (width + gap) - gap):
        return None
    corners = [(i // columns * (height + gap), i % columns * (width + gap)) for i in range(count)]
    return torch.stack([grid[:, top : top + height, left : left + width] for top, left in corners])


def show_images(images: Any, columns: int = 8, titles: Sequence[str] | None = None, size: float = 1.0) -> "Figure":
    """Show images row by row, with a title for each; `size` is an image's height in inches.

    Small ones are enlarged by a whole number, so that nothing is blurred.
    """
    images, titles = list(as_pixels(images)), list(titles or [])
    starts = range(0, len(images), columns)
    return _lay_out([images[i : i + columns] for i in starts], [titles[i : i + columns] for i in starts], size=size)


def show_rows(
    rows: Mapping[str, Any], titles: Sequence[str] | None = None, gap_after: int | None = None, size: float = 1.0
) -> "Figure":
    """Show a named row for each entry, such as {"original": …, "reconstruction": …}; `size` is as of `show_images`.

    Titles stand above the columns, and a wider space after `gap_after` of them.
    """
    images = [list(as_pixels(row)) if len(row) else [] for row in rows.values()]
    return _lay_out(images, [list(titles or []), *([] for _ in images[1:])], list(rows), gap_after, size)


def labelled_grid(images: Tensor, columns: int, rows: Sequence[str], title: str, titles: Sequence[str] = ()) -> Tensor:
    """Return a grid with a title, its rows' names and titles above its columns: uint8 (3, H', W').

    Images are enlarged by a whole number, or made smaller, to about 128 pixels. It is drawn as one image, ten times as
    fast as `show_rows`.
    """
    height, width = images.shape[2:]
    factor = DPI / height
    if factor > 1:
        images = images.repeat_interleave(round(factor), 2).repeat_interleave(round(factor), 3)
    else:
        smaller = F.interpolate(images.float(), (DPI, max(1, round(width * factor))), mode="area")
        images = smaller.round().to(torch.uint8)
    grid, (height, width) = image_grid(images, columns, _GAP), images.shape[2:]
    rows, titles = (
        [textwrap.fill(row, 24) for row in rows],
        [textwrap.fill(each, max(8, width // 8)) for each in titles],
    )
    left = _GAP + 10 * max((len(line) for row in rows for line in row.split("\n")), default=0)
    above = 24 + 20 * max((each.count("\n") + 1 for each in titles if each), default=0)
    full_width = max(left + grid.shape[2] + _GAP, 10 * len(title) + 2 * _GAP)
    full_height = above + grid.shape[1] + _GAP
    figure = new_figure((full_width / DPI, full_height / DPI), tight=False)
    figure.figimage(grid.permute(1, 2, 0).numpy(), left, _GAP)
    figure.text(_GAP / full_width, 1 - 12 / full_height, title, va="center", fontsize=10)
    for i, row in enumerate(rows):
        middle = 1 - (above + i * (height + _GAP) + height / 2) / full_height
        figure.text((left - _GAP) / full_width, middle, row, ha="right", va="center", fontsize=9)
    for i, each in enumerate(titles):
        middle = (left + i * (width + _GAP) + width / 2) / full_width
        figure.text(middle, 1 - (above - 4) / full_height, each, ha="center", va="bottom", fontsize=9)
    return as_pixels(as_image(figure))


def plot_bars(groups: Mapping[str, Sequence[float]], names: Sequence[str], y_label: str) -> "Figure":
    """Plot bars for each of `names`, one of every group: {"real": [98.0, …], "generated": [91.0, …]}."""
    ax = _axes((max(4.0, 1.5 + 0.35 * len(names) * len(groups)), 3.2))
    places, width = range(len(names)), 0.8 / len(groups)
    for i, (group, values) in enumerate(groups.items()):
        aside = (i - (len(groups) - 1) / 2) * width
        ax.bar([place + aside for place in places], values, width * 0.92, label=group)
    ax.set_xticks(places, [printable(name) for name in names], rotation=90 if len(names) > 12 else 0)
    ax.set_ylabel(y_label)
    ax.legend(**_LEGEND, ncols=len(groups))
    return ax.figure


def plot_intervals(values: Mapping[str, tuple[float, float, float]], x_label: str) -> "Figure":
    """Plot a point for each name, and its interval: {"real": (value, low, high), …}, from top to bottom."""
    ax = _axes((6.0, 0.8 + 0.3 * len(values)))
    for row, (value, low, high) in enumerate(values.values()):
        ax.errorbar(value, row, xerr=[[value - low], [high - value]], fmt="o", color=f"C{row % 10}", capsize=3)
    ax.set_yticks(range(len(values)), [printable(name) for name in values])
    ax.invert_yaxis()
    ax.set_xlabel(x_label)
    ax.grid(axis="x", alpha=0.3)
    return ax.figure


def plot_confusions(shares: Mapping[str, Tensor], names: Sequence[str]) -> "Figure":
    """Plot for each kind of image a matrix (P, P): percent of a person's images (rows) that are named as each."""
    side = max(2.6, 0.38 * len(names) + 1.2)
    figure = new_figure((side * len(shares), side))
    for place, (kind, matrix) in enumerate(shares.items()):
        ax = figure.add_subplot(1, len(shares), place + 1)
        ax.imshow(matrix, cmap="Blues", vmin=0, vmax=100)
        for row, column in matrix.isfinite().nonzero().tolist() if len(names) <= 12 else ():
            value = matrix[row, column].item()
            ax.text(column, row, f"{value:.0f}", ha="center", va="center", fontsize=8, color="wk"[value < 50])
        ax.set(title=f"{kind} images, %", xlabel="named as", ylabel="person" if place == 0 else "")
        ax.set_xticks(range(len(names)), names, rotation=90)
        ax.set_yticks(range(len(names)), names if place == 0 else [])
    return figure


def plot_calibration(bins: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> "Figure":
    """Plot accuracy over confidence, both in percent, for each kind of image; on the diagonal they agree."""
    ax = _axes((4.0, 3.6))
    ax.plot([0, 100], [0, 100], color="grey", linewidth=1, linestyle=":")
    for kind, (confidence, accuracy) in bins.items():
        ax.plot(confidence, accuracy, marker="o", label=kind)
    ax.set(xlabel="the classifier's confidence, %", ylabel="accuracy, %", xlim=(-2, 102), ylim=(-2, 102))
    ax.legend(**_LEGEND, ncols=len(bins))
    return ax.figure


def plot_crosses(points: Mapping[tuple[str, str, str], Sequence[tuple]], x_label: str, y_label: str) -> "Figure":
    """Plot points with two intervals each, by name, kind and mark: {("ID_1", "real", "x"): ((x, low, high), …)}."""
    ax, names = _axes((5.0, 4.0)), list(dict.fromkeys(name for name, *_ in points))
    for (name, kind, mark), of in points.items():
        (x, y), errors = zip(*((value, [[value - low], [high - value]]) for value, low, high in of), strict=True)
        style = {"fmt": mark, "color": f"C{names.index(name) % 10}", "alpha": 0.8, "elinewidth": 0.7}
        ax.errorbar(x, y, xerr=errors[0], yerr=errors[1], label=f"{printable(name)}, {kind}", **style)
    ax.set(xlabel=x_label, ylabel=y_label, xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    ax.grid(alpha=0.3)
    ax.legend(frameon=False, fontsize=7, loc="upper left", bbox_to_anchor=(1, 1))
    return ax.figure


def plot_followed(images: Mapping[str, Tensor], prompts: Sequence[str]) -> "Figure | None":
    """Plot how many images show the colour, shape, size and place that their prompts name; None of other prompts.

    Images are uint8 (N, 3, H, H) by the group's name, one for each prompt.
    """
    from vavae_tools.data.demo.shapes import caption_accuracy

    found = {name: caption_accuracy(made, prompts) for name, made in images.items()}
    kinds = list(next(iter(found.values())))
    groups = {name: [100 * shares[kind] for kind in kinds] for name, shares in found.items()}
    return plot_bars(groups, kinds, "images that follow, %") if kinds else None


def new_figure(size: tuple[float, float], tight: bool = True) -> "Figure":
    """Return an empty figure of (width, height) inches that a notebook shows without pyplot."""
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    class NotebookFigure(Figure):
        def draw(self, renderer: Any) -> None:
            for text in self.findobj(Text):  # people's names and prompts, which are no formulas
                text.set_parse_math(False)
                text.set_text(printable(text.get_text()))
            with catch_warnings():
                filterwarnings("ignore", "Glyph .* missing")  # of scripts that matplotlib's own font does not have
                super().draw(renderer)

        def _repr_png_(self) -> bytes:
            buffer = BytesIO()
            self.savefig(buffer, format="png", dpi=self.dpi)
            return buffer.getvalue()

    return NotebookFigure(size, dpi=DPI, facecolor="white", layout="constrained" if tight else None)


def _axes(size: tuple[float, float]) -> "Axes":
    ax = new_figure(size).add_subplot()
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def save_figures(figures: "Mapping[str, Figure]", folder: Path) -> None:
    """Write each figure as `NAME.png`, whole."""
    for name, figure in figures.items():
        with atomic_write(folder / f"{name}.png") as partial:
            figure.savefig(partial, format="png")


def _lay_out(
    rows: list[list[Tensor]],
    titles: list[list[str]],
    labels: Sequence[str] = (),
    gap_after: int | None = None,
    size: float = 1.0,
) -> "Figure":
    """Place images to the pixel, which matplotlib's own layouts do not."""
    first = next((row[0] for row in rows if row), None)
    if first is None:
        raise ValueError("No images to show")
    scale = size * DPI / first.shape[1]
    interpolation, scale = ("nearest", round(scale)) if scale > 1 else ("auto", scale)
    height, width = (round(scale * pixels) for pixels in first.shape[1:])
    fitting = max(8, width // 8)  # letters of this size above an image
    titles = [[title if "\n" in title else textwrap.fill(title, fitting) for title in row] for row in titles]
    tops, bottom = [], 0
    for row in titles:
        tops.append(bottom + _GAP + 20 * max((title.count("\n") + 1 for title in row if title), default=0))
        bottom = tops[-1] + height
    left = _GAP + 10 * max(map(len, labels), default=0)
    columns = range(max(map(len, rows)))
    lefts = [left + i * (width + _GAP) + (3 * _GAP if gap_after and i >= gap_after else 0) for i in columns]
    full_width, full_height = lefts[-1] + width + _GAP, bottom + _GAP

    figure = new_figure((full_width / DPI, full_height / DPI), tight=False)
    for i, row in enumerate(rows):
        lowest = 1 - (tops[i] + height) / full_height
        for j, image in enumerate(row):
            ax = figure.add_axes([lefts[j] / full_width, lowest, width / full_width, height / full_height])
            # matplotlib's own grey is one too dark at every tenth value
            ax.imshow(image.expand(3, -1, -1).permute(1, 2, 0).numpy(), aspect="auto", interpolation=interpolation)
            ax.set_axis_off()
            if j < len(titles[i]):
                ax.set_title(titles[i][j], fontsize=9, pad=4)
        if labels:
            middle = lowest + height / 2 / full_height
            figure.text((left - _GAP) / full_width, middle, labels[i], ha="right", va="center", fontsize=9)
    return figure


def show_inline(pixels: Tensor) -> None:
    """Show one image, uint8 (1 or 3, H, W), below a notebook's cell while it runs; elsewhere do nothing."""
    from PIL import Image

    show_image(Image.fromarray(pixels.expand(3, -1, -1).permute(1, 2, 0).numpy()))


def as_image(figure: "Figure") -> Any:
    """Return a figure as a Pillow image."""
    from PIL import Image

    return Image.open(BytesIO(figure._repr_png_())).convert("RGB")


def plot_curves(
    x: Sequence[float],
    curves: Mapping[str, Sequence[float]],
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
) -> "Figure":
    """Plot lines over the same x, one for each entry, such as {"cells": [0.2, 0.9, …]}, with their names above."""
    ax = _axes((5.0, 3.4))
    for name, values in curves.items():
        ax.plot(x, values, marker="o", markersize=3, label=name)
    ax.set(xlabel=x_label, ylabel=y_label)
    if y_range is not None:
        margin = 0.03 * (y_range[1] - y_range[0])  # a line along the edge is seen whole
        ax.set_ylim(y_range[0] - margin, y_range[1] + margin)
    ax.grid(alpha=0.3)
    ax.legend(**_LEGEND, ncols=len(curves))
    return ax.figure
