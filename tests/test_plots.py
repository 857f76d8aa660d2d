from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from vavae_tools import plots
from vavae_tools.data.images import to_unit
from vavae_tools.plots import as_pixels, picture_grid, plot_bars, show_inline, show_picture, show_pictures, show_rows


def some_pictures(n=5, channels=3, height=16, width=24):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator)


def drawn(figure):
    """What a notebook would show: uint8 (H, W, 3)."""
    return np.asarray(Image.open(BytesIO(figure._repr_png_())).convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3])
def test_every_form_of_a_picture_is_the_same_pixels(channels):
    pictures = some_pictures(channels=channels)
    pillow = [Image.fromarray(p.permute(1, 2, 0).squeeze(2).numpy()) for p in pictures]
    for form in (pictures, to_unit(pictures), list(pictures), pillow, to_unit(pictures).requires_grad_()):
        assert as_pixels(form).equal(pictures)


def test_pillow_pictures_keep_their_kind():
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for picture in (Image.fromarray(grey * 257), Image.fromarray(grey.astype(np.uint8)).convert("LA")):
        assert as_pixels(picture)[0].equal(torch.from_numpy(grey.astype(np.uint8))) and len(as_pixels(picture)) == 1
    assert as_pixels(Image.new("P", (4, 4))).shape == (3, 4, 4)


def test_a_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"\(2, 7, 8, 8\)"):
        as_pixels(torch.zeros(2, 7, 8, 8))


@pytest.mark.parametrize("channels", [1, 3])
def test_picture_grid_of_five_has_each_at_its_place_on_white(channels):
    pictures = some_pictures(channels=channels)
    grid = picture_grid(pictures, columns=3, gap=2)
    assert grid.shape == (3, 2 * 16 + 2, 3 * 24 + 2 * 2) and grid.dtype == torch.uint8
    for i, picture in enumerate(pictures):
        top, left = i // 3 * 18, i % 3 * 26
        assert grid[:, top : top + 16, left : left + 24].equal(picture.expand(3, -1, -1))
    assert (grid[:, 18:, 52:] == 255).all() and (grid[:, 16:18] == 255).all()
    assert picture_grid(pictures[:1], columns=1).shape == (3, 16, 24)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_notebook_shows_a_picture_while_it_runs(channels, monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setattr(display, "display", shown.append)
    picture = some_pictures(1, channels)[0]
    monkeypatch.setattr(plots, "in_notebook", lambda: False)
    show_inline(picture)
    assert not shown
    monkeypatch.setattr(plots, "in_notebook", lambda: True)
    show_inline(picture)
    assert np.array_equal(np.asarray(shown[0]), picture.expand(3, -1, -1).permute(1, 2, 0))


def test_grey_pictures_are_shown_in_grey():
    pictures = some_pictures(3, channels=1)
    assert len(pictures.unique()) > 200
    for figure in (show_pictures(pictures, size=0.4), show_rows({"": pictures}, size=0.4)):
        shown = drawn(figure)
        for ax, picture in zip(figure.axes, pictures, strict=True):
            box = ax.get_position()
            left, top = round(box.x0 * shown.shape[1]), round((1 - box.y1) * shown.shape[0])
            large = picture.expand(3, -1, -1).permute(1, 2, 0).repeat_interleave(3, 0).repeat_interleave(3, 1).numpy()
            assert np.array_equal(shown[top : top + 48, left : left + 72], large)


def test_show_pictures_shows_five_and_only_five_enlarged_by_a_whole_number():
    pictures = some_pictures()
    figure = show_pictures(pictures, columns=3, titles=["a", "b", "c", "d", "e"], size=0.4)
    assert len(figure.axes) == 5 and [ax.get_title() for ax in figure.axes] == ["a", "b", "c", "d", "e"]
    assert all(len(ax.images) == 1 and not ax.axison for ax in figure.axes)
    shown = drawn(figure)
    for ax, picture in zip(figure.axes, pictures, strict=True):
        box = ax.get_position()
        left, top = round(box.x0 * shown.shape[1]), round((1 - box.y1) * shown.shape[0])
        large = picture.permute(1, 2, 0).repeat_interleave(3, 0).repeat_interleave(3, 1).numpy()  # 51 of 16: 3
        assert np.array_equal(shown[top : top + 48, left : left + 72], large)


def test_show_picture_takes_and_returns_axes():
    ax = show_picture(some_pictures(1)[0], title="one")
    assert ax.get_title() == "one" and len(ax.images) == 1
    figure = show_pictures(some_pictures(2))
    assert show_picture(some_pictures(1, 1)[0], figure.axes[1], cmap="viridis") is figure.axes[1]
    assert figure.axes[1].images[-1].get_cmap().name == "viridis"
    drawn(ax.figure)


def test_show_rows_names_its_rows_which_may_differ_in_length():
    figure = show_rows({"original": some_pictures(3), "reconstruction": some_pictures(2)}, ["x", "y", "z"], gap_after=2)
    assert len(figure.axes) == 5 and [text.get_text() for text in figure.texts] == ["original", "reconstruction"]
    assert [ax.get_title() for ax in figure.axes] == ["x", "y", "z", "", ""]
    drawn(figure)
    with pytest.raises(ValueError, match="No pictures"):
        show_rows({"nothing": []})


def test_bars_have_labelled_axes():
    bars = plot_bars({"real": [100, 90], "generated": [50, 80]}, ["ID_1", "ID_2"], "named rightly, %")
    assert bars.axes[0].get_ylabel() == "named rightly, %"
    drawn(bars)
    assert [bar.get_height() for bar in bars.axes[0].patches] == [100, 90, 50, 80]


def test_figures_leave_pyplot_alone():
    import matplotlib.pyplot as plt

    drawn(show_pictures(some_pictures()))
    drawn(plot_bars({"real": [1.0]}, ["ID_1"], "named rightly, %"))
    assert not plt.get_fignums()
