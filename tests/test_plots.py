from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from vavae_tools.data.images import to_unit
from vavae_tools.plots import as_pixels, image_grid, plot_bars, show_images, show_inline, show_rows
from vavae_tools.runtime import console


def some_images(n=5, channels=3, height=16, width=24):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, channels, height, width), dtype=torch.uint8, generator=generator)


def drawn(figure):
    """What a notebook would show: uint8 (H, W, 3)."""
    return np.asarray(Image.open(BytesIO(figure._repr_png_())).convert("RGB"))


@pytest.mark.parametrize("channels", [1, 3])
def test_every_form_of_a_image_is_the_same_pixels(channels):
    images = some_images(channels=channels)
    pillow = [Image.fromarray(p.permute(1, 2, 0).squeeze(2).numpy()) for p in images]
    for form in (images, to_unit(images), list(images), pillow, to_unit(images).requires_grad_()):
        assert as_pixels(form).equal(images)


def test_pillow_images_keep_their_kind():
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    for image in (Image.fromarray(grey * 257), Image.fromarray(grey.astype(np.uint8)).convert("LA")):
        assert as_pixels(image)[0].equal(torch.from_numpy(grey.astype(np.uint8))) and len(as_pixels(image)) == 1
    assert as_pixels(Image.new("P", (4, 4))).shape == (3, 4, 4)
    with pytest.raises(ValueError, match=r"\(2, 7, 8, 8\)"):
        as_pixels(torch.zeros(2, 7, 8, 8))


@pytest.mark.parametrize("channels", [1, 3])
def test_image_grid_of_five_has_each_at_its_place_on_white(channels):
    images = some_images(channels=channels)
    grid = image_grid(images, columns=3, gap=2)
    assert grid.shape == (3, 2 * 16 + 2, 3 * 24 + 2 * 2) and grid.dtype == torch.uint8
    for i, image in enumerate(images):
        top, left = i // 3 * 18, i % 3 * 26
        assert grid[:, top : top + 16, left : left + 24].equal(image.expand(3, -1, -1))
    assert (grid[:, 18:, 52:] == 255).all() and (grid[:, 16:18] == 255).all()
    assert image_grid(images[:1], columns=1).shape == (3, 16, 24)


@pytest.mark.parametrize("text", ["from $5 to $6_", r"$\frac{", "J\udcfcrg", "\x00\x1b[1m", "赤い鳥"])
@pytest.mark.filterwarnings("error")
def test_any_text_can_be_a_title_or_a_name(text):
    images = some_images(2)
    for figure in (
        show_images(images, titles=[text] * 2),
        show_rows({text: images}),
        plot_bars({text: [1]}, [text], text),
    ):
        assert drawn(figure).std() > 0


@pytest.mark.parametrize("channels", [1, 3])
def test_a_notebook_shows_an_image_while_it_runs(channels, monkeypatch):
    display = pytest.importorskip("IPython.display")
    shown = []
    monkeypatch.setattr(display, "display", lambda image, **_: shown.append(image.data))
    image = some_images(1, channels)[0]
    monkeypatch.setattr(console, "in_notebook", lambda: False)
    show_inline(image)
    assert not shown
    monkeypatch.setattr(console, "in_notebook", lambda: True)
    show_inline(image)
    assert np.asarray(Image.open(BytesIO(shown[0]))).shape == (*image.shape[1:], 3)


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 2064, 2064), (3, 400, 6000)])
def test_an_image_in_a_cell_is_small_even_if_it_is_noise(shape):
    noise = torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made = console.small_jpeg(Image.fromarray(noise.permute(1, 2, 0).numpy()))
    assert len(made) <= console.JPEG_BYTES and Image.open(BytesIO(made)).format == "JPEG"


@pytest.mark.parametrize("channels", [1, 3])
def test_show_images_shows_five_and_only_five_enlarged_by_a_whole_number(channels):
    images = some_images(channels=channels)
    figure = show_images(images, columns=3, titles=["a", "b", "c", "d", "e"], size=0.4)
    assert len(figure.axes) == 5 and [ax.get_title() for ax in figure.axes] == ["a", "b", "c", "d", "e"]
    assert all(len(ax.images) == 1 and not ax.axison for ax in figure.axes)
    shown = drawn(figure)
    for ax, image in zip(figure.axes, images, strict=True):
        box = ax.get_position()
        left, top = round(box.x0 * shown.shape[1]), round((1 - box.y1) * shown.shape[0])
        pixels = image.expand(3, -1, -1).permute(1, 2, 0)  # grey ones in grey
        large = pixels.repeat_interleave(3, 0).repeat_interleave(3, 1).numpy()  # 51 of 16: 3
        assert np.array_equal(shown[top : top + 48, left : left + 72], large)


def test_show_rows_names_its_rows_which_may_differ_in_length():
    figure = show_rows({"original": some_images(3), "reconstruction": some_images(2)}, ["x", "y", "z"], gap_after=2)
    assert len(figure.axes) == 5 and [text.get_text() for text in figure.texts] == ["original", "reconstruction"]
    assert [ax.get_title() for ax in figure.axes] == ["x", "y", "z", "", ""]
    drawn(figure)
    with pytest.raises(ValueError, match="No images"):
        show_rows({"nothing": []})
    bars = plot_bars({"real": [100, 90], "generated": [50, 80]}, ["ID_1", "ID_2"], "accuracy, %")
    assert [bar.get_height() for bar in bars.axes[0].patches] == [100, 90, 50, 80]


def test_former_public_names_work_with_a_warning():
    import vavae_tools as vt

    for name, now in vt._FORMER.items():
        with pytest.warns(FutureWarning, match=f"{name} is now called {now}"):
            assert getattr(vt, name) is getattr(vt, now)
    with pytest.raises(AttributeError, match="vavae_tools has no 'show_photos'"):
        vt.show_photos  # noqa: B018
