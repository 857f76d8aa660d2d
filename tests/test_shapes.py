"""Made-up shapes: how they are drawn, and that a look at the pixels finds again what names and captions say."""

import math
import re

import pytest
import torch
from tiny import refuses
from torch import Tensor

from vavae_tools.data.demo import shapes
from vavae_tools.data.demo.shapes import CaptionedShapes, Named, ShapeImages, caption_accuracy, named, seen, shape_data
from vavae_tools.data.images import ImageSetDataModule

DRAWN = CaptionedShapes(1000)
FULL = [captions[0] for captions in DRAWN.captions]


# ---- drawing


def test_a_square_and_its_ground_are_exact():
    """A square of half the subset in the middle of 32 pixels covers pixels 8 … 23."""
    half = torch.tensor([0.25 * math.sqrt(2)])
    square, blue = (
        torch.tensor([list(table).index(name)]) for table, name in ((shapes.SHAPES, "square"), (shapes.COLOURS, "blue"))
    )
    image = shapes.draw_shapes(square, blue, torch.tensor([[0.5, 0.5]]), half, torch.tensor([0.4]), 32)[0]
    expected = torch.full((3, 32, 32), 102, dtype=torch.uint8)
    expected[:, 8:24, 8:24] = torch.tensor(shapes.COLOURS["blue"], dtype=torch.uint8)[:, None, None]
    assert torch.equal(image, expected)


@pytest.mark.parametrize("shape", range(len(shapes.SHAPES)))
def test_every_shape_has_its_area_around_its_place(shape):
    place, radius = torch.tensor([[0.4, 0.55]]), torch.tensor([0.35])
    covered = shapes.coverage(torch.tensor([shape]), place, radius, 64)[0]
    assert covered.mean().item() == pytest.approx(shapes.AREAS[shape] * 0.35**2, rel=0.02)
    pixel = (torch.arange(64) + 0.5) / 64
    centre = (covered * pixel).sum() / covered.sum(), (covered * pixel[:, None]).sum() / covered.sum()
    torch.testing.assert_close(torch.stack(centre), place[0], rtol=0, atol=0.005)
    outside = torch.hypot(pixel - 0.4, pixel[:, None] - 0.55) > 0.35 + 1 / 64
    assert covered[outside].max() == 0


def test_images_follow_from_seed_side_and_index_alone():
    data = ShapeImages(60, 6, 24, seed=3)
    assert data.labels.tolist() == [index % 6 for index in range(60)]
    batch = data.get_batch([41, 7])
    assert batch["images"].shape == (2, 3, 24, 24) and batch["images"].dtype == torch.uint8
    assert batch["labels"].tolist() == [5, 1] and batch["index"].tolist() == [41, 7]
    assert torch.equal(data[7]["images"], batch["images"][1])
    assert torch.equal(ShapeImages(2000, 6, 24, seed=3)[41]["images"], batch["images"][0])
    assert torch.equal(data.in_memory()[[41, 7]], batch["images"])
    assert torch.equal(data.get_batch([41, 7])["images"], batch["images"])  # now from memory
    for other in (ShapeImages(60, 6, 24, seed=4), ShapeImages(60, 6, 24, seed=3, subset=1)):
        assert not torch.equal(other[41]["images"], batch["images"][0])


def test_classes_are_different_pairs():
    for count in (1, 2, 5, 7, 36):
        pairs = shapes.shape_classes(count)
        assert len(set(pairs)) == count and max(map(max, pairs)) < 6


@pytest.mark.parametrize("size", [16, 48])
def test_class_images_show_what_their_names_say(size):
    data = ShapeImages(360, 36, size)
    wanted = [name.split("/")[0] for name in data.names]
    found = [f"{one.colour}_{one.shape}" for one in seen(data.in_memory())]
    right = [a == b for a, b in zip(wanted, found, strict=True) if not a.endswith("diamond")]
    assert sum(right) >= 0.98 * len(right)


# ---- seeing and naming


def generated_looking(images: Tensor, blur: float, noise: float) -> Tensor:
    """With the faults that generated images have."""
    weights = torch.exp(-(torch.arange(-4, 5.0) ** 2) / (2 * blur**2))
    weights = (weights / weights.sum()).expand(3, 1, 1, -1)
    soft = torch.nn.functional.pad(images.float(), (4, 4, 4, 4), mode="replicate")
    soft = torch.nn.functional.conv2d(soft, weights, groups=3)
    soft = torch.nn.functional.conv2d(soft, weights.transpose(2, 3), groups=3)
    soft += noise * torch.randn(soft.shape, generator=torch.Generator().manual_seed(0))
    return soft.round().clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize(("blur", "noise"), [(0.01, 0), (0.7, 8), (1.0, 8), (0.01, 16)])
def test_real_ones_are_judged_right(blur, noise):
    shares = caption_accuracy(generated_looking(DRAWN.in_memory(), blur, noise), FULL)
    assert shares.keys() == {"all", "colour", "shape", "size", "place"}
    assert min(shares.values()) >= 0.99, shares


def test_nothing_is_seen_where_nothing_is():
    generator = torch.Generator().manual_seed(0)
    for least, most in ((0, 256), (100, 156), (128, 129)):
        noise = torch.randint(least, most, (60, 3, 32, 32), generator=generator, dtype=torch.uint8)
        assert set(seen(noise)) == {Named()}


def test_a_blob_has_a_colour_alone():
    image = torch.full((1, 3, 32, 32), 128, dtype=torch.uint8)
    red = torch.tensor([220, 40, 40], dtype=torch.uint8)[:, None, None]
    image[0, :, 4:28, 14:18] = image[0, :, 4:8, 2:18] = image[0, :, 24:28, 14:30] = red  # a Z
    assert seen(image) == [Named("red")]
    assert caption_accuracy(image, ["a small red circle"]) == {"all": 0, "colour": 1, "shape": 0, "size": 0}


def test_each_kind_is_judged_for_itself():
    """One image, drawn by hand: a large yellow cross at the top left edge of the middle."""
    numbers = shapes.CAPTION_SHAPES.index("cross"), shapes.CAPTION_COLOURS.index("yellow"), [0.5, 0.3], 0.28, 0.5
    image = shapes.draw_shapes(*(torch.tensor([number]) for number in numbers))
    assert seen(image) == [Named("yellow", "cross", "large", "top")]
    found = caption_accuracy(image, ["a small yellow ring at the top"])
    assert found == {"all": 0, "colour": 1, "shape": 0, "size": 0, "place": 1}
    assert caption_accuracy(image, ["a yellow cross"]) == {"all": 1, "colour": 1, "shape": 1}
    assert caption_accuracy(image, ["hello"]) == {}
    found = caption_accuracy(image.expand(2, -1, -1, -1), ["a yellow cross", "red"])
    assert found == {"all": 0.5, "colour": 0.5, "shape": 1}


def test_sentences_name_what_is_drawn():
    for captions in DRAWN.captions[:300]:
        shown = named(captions[0])
        assert None not in vars(shown).values() and len(set(captions)) == len(captions) >= 5
        for caption in captions:
            said = named(caption)
            assert (said.colour, said.shape) == (shown.colour, shown.shape)
            assert said.size in (shown.size, None) and said.place in (shown.place, None)


def test_words():
    assert named("a big cyan RING in the centre.") == Named("cyan", "ring", "large", "middle")
    assert named("a photograph of a redwood forest, topmost") == named("") == Named()


def test_the_vocabulary_has_every_word_and_no_other():
    used = {word for captions in DRAWN.captions for caption in captions for word in re.findall(r"[a-z]+", caption)}
    assert used <= set(shapes.vocabulary()) and set(shapes.vocabulary()) - used <= {"centre", "center"}


def test_each_image_follows_from_seed_subset_and_index():
    more, part = CaptionedShapes(1200), DRAWN.part([7, 3])
    assert torch.equal(more.images([999, 5]), DRAWN.images([999, 5])) and more.captions[:1000] == DRAWN.captions
    assert torch.equal(part.in_memory(), DRAWN.images([7, 3])) and part.captions[1] == DRAWN.captions[3]
    for other in (CaptionedShapes(1000, seed=1), CaptionedShapes(1000, subset=1)):
        assert other.captions != DRAWN.captions and other.fingerprint() != DRAWN.fingerprint()
        assert not torch.equal(other.images([0]), DRAWN.images([0]))


def test_shapes_as_a_data_module():
    data = shape_data(20, image_size=16, batch_size=8, val_share=0.2)
    assert isinstance(data, ImageSetDataModule) and data.num_classes == 4
    assert data.labels == {"red_circle": 0, "blue_circle": 1, "red_square": 2, "blue_square": 3}
    batches = list(data.train_dataloader())
    assert [batch["images"].shape for batch in batches] == [(8, 3, 16, 16)] * 2
    assert (len(data.train_data), len(data.val_data), data.train_data.channels) == (20, 4, 3)
    train, val = (set(map(bytes, subset.in_memory().numpy())) for subset in (data.train_data, data.val_data))
    assert len(train) == 20 and not train & val
    assert shape_data(20, val_share=0).val_data is None
    prints = {shape_data(*arguments).fingerprint() for arguments in ((20,), (21,), (20, 5), (20, 4, 16))}
    assert len(prints | {shape_data(20, seed=1).fingerprint()}) == 5
    assert shape_data(20).fingerprint() in prints


@pytest.mark.parametrize(("options", "message"), [
    ({"num_classes": 37}, "37 classes of shapes: expected 1 to 36"),
    ({"count": 0}, "0 images of shapes"),
    ({"image_size": (32, 7)}, "at least 8 pixels"),
    ({"val_share": 1.5}, "val_share 1.5"),
])  # fmt: skip
def test_shapes_that_cannot_be(options, message):
    refuses(message, shape_data, **options)
