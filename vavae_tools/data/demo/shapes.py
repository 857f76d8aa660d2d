"""Made-up pictures: one coloured shape each on a grey ground, drawn when they are asked for.

Whoever tries a training out sees at a glance whether it learns: a class is a colour and a shape, and `looks_like` says
by the pixels alone which class a picture shows.
"""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor

from vavae_tools.data.captions import CaptionedDataModule
from vavae_tools.data.images import DecodedPictures, PictureSetDataModule
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "blue": (40, 70, 230),
    "green": (40, 190, 60),
    "yellow": (235, 215, 40),
    "magenta": (215, 50, 215),
    "cyan": (40, 205, 215),
}

_THIRD = 2 * math.pi / 3


def _polygon(x: Tensor, y: Tensor, *normals: float, inner: float) -> Tensor:
    """How far outside the polygon around 0 with these directions of its sides, `inner` from 0 to each."""
    return torch.stack([x * math.cos(a) + y * math.sin(a) for a in normals]).amax(0) - inner


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - 0.94, y - 0.34), torch.maximum(x - 0.34, y - 0.94))


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y: torch.hypot(x, y) - 1,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - math.sqrt(0.5),
    "triangle": lambda x, y: _polygon(x, y, math.pi / 2, math.pi / 2 - _THIRD, math.pi / 2 + _THIRD, inner=0.5),
    "cross": _cross,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.75).abs() - 0.25,
    "diamond": lambda x, y: (x.abs() + y.abs() - 1) * math.sqrt(0.5),
}
"""How far a place (x to the right, y down, in radii from the centre) lies outside each shape; every shape touches the
circle of radius 1 from inside."""

SMALLEST, LARGEST = 0.22, 0.4
"""Radii, of the picture's side."""


def coverage(shapes: Tensor, places: Tensor, radii: Tensor, size: int | tuple[int, int]) -> Tensor:
    """How much of each pixel a shape covers: float32 (N, H, W) in [0, 1], with edges one pixel wide.

    Args:
        shapes: int64 (N,), their places in `SHAPES`.
        places: float (N, 2), (x, y) of the centres, of the picture's width and height: (0, 0) is the top left corner.
        radii: float (N,), of the picture's shorter side.
        size: pixels, one number or (height, width).
    """
    height, width = (size, size) if isinstance(size, int) else size
    size = min(height, width)
    pixels = [(torch.arange(length, dtype=torch.float32) + 0.5) / size for length in (width, height)]
    places = places * (torch.tensor([width, height]) / size)
    covered = torch.empty(len(shapes), height, width)
    for number in shapes.unique().tolist():
        here = shapes == number
        radius = radii[here, None, None]
        x, y = ((pixels[axis] - places[here, axis, None]) for axis in (0, 1))  # (n, W), (n, H)
        x, y = torch.broadcast_tensors(x[:, None, :], y[:, :, None])  # (n, H, W)
        outside = list(SHAPES.values())[number](x / radius, y / radius) * radius * size  # in pixels
        covered[here] = (0.5 - outside).clamp_(0, 1)
    return covered


def draw_shapes(
    shapes: Tensor,
    colours: Tensor,
    places: Tensor,
    radii: Tensor,
    shades: Tensor,
    size: int | tuple[int, int] = 32,
) -> Tensor:
    """Draw one shape into each picture: uint8 (N, 3, H, W).

    Args:
        shapes, colours: int64 (N,), their places in `SHAPES` and `COLOURS`.
        places, radii: see `coverage`.
        shades: float (N,), of the grey ground, 0 black, 1 white.
        size: pixels, one number or (height, width).
    """
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    covered = coverage(shapes, places, radii, size)[:, None]  # (N, 1, H, W)
    ground, colour = 255 * shades[:, None, None, None], palette[colours][:, :, None, None]
    return (ground + covered * (colour - ground)).round_().to(torch.uint8)


def shape_classes(num_classes: int) -> list[tuple[int, int]]:
    """The (colour, shape) of each label, of about as many shapes as colours.

    >>> [f"{list(COLOURS)[c]} {list(SHAPES)[s]}" for c, s in shape_classes(4)]
    ['red circle', 'blue circle', 'red square', 'blue square']

    Raises:
        UserError: more classes than there are colours times shapes, or none.
    """
    if not 1 <= num_classes <= len(SHAPES) * len(COLOURS):
        raise UserError(f"{num_classes} classes of shapes: expected 1 to {len(SHAPES) * len(COLOURS)}")
    shapes = math.isqrt(num_classes - 1) + 1  # the root, rounded up
    colours = -(-num_classes // shapes)
    return [(label % colours, label // colours) for label in range(num_classes)]


def shape_names(num_classes: int) -> list[str]:
    """What the classes are called.

    >>> shape_names(2)
    ['red_circle', 'red_square']
    """
    return [f"{list(COLOURS)[colour]}_{list(SHAPES)[shape]}" for colour, shape in shape_classes(num_classes)]


class DrawnPictures(DecodedPictures):
    """Pictures that are drawn when they are asked for; each follows from seed, side and number alone.

    A subclass draws them.

    Args:
        names, labels: the first ones stay the same when there are more.
        image_size: pixels, one number or (height, width).
        side: 0 for what trains, 1 for what validates; the pictures of both differ.
        options: of `DecodedPictures`.
    """

    smallest = 8
    """Pixels of the shorter side below which nobody knows what is shown."""

    def __init__(
        self,
        names: Sequence[str],
        labels: Tensor,
        image_size: int | tuple[int, int],
        seed: int = 0,
        side: int = 0,
        title: str = "shapes",
        **options: Any,
    ) -> None:
        if not names:
            raise UserError(f"0 pictures of {title}: at least one is needed")
        super().__init__(names, labels, image_size, title=title, **options)
        self.seed, self.side, self.numbers = seed, side, torch.arange(len(names))

    def resize(self, image_size: int | tuple[int, int]) -> None:
        super().resize(image_size)
        if min(self.image_size) < self.smallest:
            raise UserError(f"image_size {image_size}: {self.title} need at least {self.smallest} pixels")

    def draw(self, numbers: Tensor, draws: Draws) -> Tensor:
        """The pictures of these numbers, uint8 (B, 3, H, W), with their random draws."""
        raise NotImplementedError

    def drawn(self, places: Sequence[int]) -> Tensor:
        """The pictures at these places, uint8 (B, C, H, W)."""
        numbers = self.numbers[torch.as_tensor(places, dtype=torch.int64)]
        pictures = self.draw(numbers, Draws(self.seed, self.side, numbers))
        if self.channels == 3:
            return pictures
        red, green, blue = pictures.int().split(1, dim=1)  # as `in_channels` has it: Pillow's grey
        return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)

    def what_is_stored(self) -> list:
        numbers = hashlib.sha256(self.numbers.numpy().tobytes()).hexdigest()
        return [f"{self.title} 1", len(self), numbers, self.seed, self.side]

    def part(self, places: Sequence[int]) -> Self:
        part = super().part(places)
        part.numbers = self.numbers[torch.as_tensor(places)]
        return part

    def in_memory(self) -> Tensor:
        if self._memory is None:
            self._memory = torch.cat([self.drawn(part) for part in torch.arange(len(self)).split(1024)])
        return self._memory

    def pictures(self, places: Sequence[int]) -> Tensor:
        return self.drawn(places) if self._memory is None else self._memory[torch.as_tensor(places)]


class ShapePictures(DrawnPictures):
    """Pictures of shapes with random place, size and ground; each follows from seed, side and index alone.

    Args:
        count: how many pictures; the first ones stay the same when there are more.
        num_classes: colour × shape, see `shape_classes`; the labels take turns.
        image_size: pixels, one number or (height, width).
        side: 0 for what trains, 1 for what validates; the pictures of both differ.
        channels: 3, or 1 for grey.
    """

    def __init__(
        self,
        count: int,
        num_classes: int = 4,
        image_size: int | tuple[int, int] = 32,
        seed: int = 0,
        side: int = 0,
        channels: int = 3,
    ) -> None:
        called = shape_names(num_classes)
        names = [f"{called[index % num_classes]}/{index:06d}" for index in range(count)]
        super().__init__(names, torch.arange(len(names)) % num_classes, image_size, seed, side, channels=channels)
        self.num_classes = num_classes

    def what_is_stored(self) -> list:
        *pictures, seed, side = super().what_is_stored()
        return [*pictures, self.num_classes, seed, side]

    def draw(self, numbers: Tensor, draws: Draws) -> Tensor:
        radii = SMALLEST + (LARGEST - SMALLEST) * draws.uniform("radius", 1)[:, 0]
        centres = radii[:, None] + (1 - 2 * radii[:, None]) * draws.uniform("place", 2)  # none is cut by an edge
        shades = 0.15 + 0.7 * draws.uniform("shade", 1)[:, 0]
        colours, shapes = torch.tensor(shape_classes(self.num_classes))[numbers % self.num_classes].unbind(1)
        return draw_shapes(shapes, colours, centres, radii, shades, self.image_size)


def shape_data(
    count: int = 10_000,
    num_classes: int = 4,
    image_size: int | tuple[int, int] = 32,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    val_share: float = 0.05,
    channels: int | None = None,
) -> PictureSetDataModule:
    """Shapes as a data module: `count` to train, and `val_share` times as many more to validate.

    Args:
        image_size: pixels, one number or (height, width).
        channels: 3, which is the default, or 1 for grey.

    Raises:
        UserError: numbers that cannot be.
    """
    if not 0 <= val_share < 1:
        raise UserError(f"val_share {val_share:g}: expected a share from 0 to below 1, such as 0.05")
    train = ShapePictures(count, num_classes, image_size, seed, channels=channels or 3)
    validating = math.ceil(count * val_share)
    val = ShapePictures(validating, num_classes, image_size, seed, 1, train.channels) if validating else None
    labels = {name: label for label, name in enumerate(shape_names(num_classes))}
    return PictureSetDataModule(train, val, labels, batch_size, num_workers, seed)


def looks_like(pictures: Tensor, num_classes: int = 4) -> Tensor:
    """Which class pictures show, by their pixels (see `recognise`): labels int64 (N,), −1 for none of them.

    Args:
        pictures: uint8 (N, 3, H, H).
    """
    labels = torch.full((len(COLOURS) + 1, len(SHAPES) + 1), -1)  # the last row and column are for −1
    for label, (colour, shape) in enumerate(shape_classes(num_classes)):
        labels[colour, shape] = label
    colours, shapes, _, _ = recognise(pictures)
    return labels[colours, shapes]


def recognise(pictures: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What was drawn: colours and shapes int64 (N,), both −1 where nothing is seen, places (N, 2), radii (N,).

    The colour is the nearest tint. Its strength, which grey has not, says how far each pixel is covered; every shape is
    drawn with the same area around the same centre, and the one that differs least is it.

    Args:
        pictures: uint8 (N, 3, H, H), like those of `draw_shapes`.
    """
    parts = [_recognise(part) for part in pictures.split(256)]  # few at once: seven pictures are drawn for each
    return tuple(torch.cat(values) for values in zip(*parts, strict=True))


def _recognise(pictures: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pixels, size = pictures.float(), pictures.shape[-1]
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    tints = pixels - pixels.mean(1, keepdim=True)  # (N, 3, H, H), 0 for grey; where c is covered, c · the colour's own
    own = palette - palette.mean(1, keepdim=True)  # (colours, 3)
    tint = (tints * tints.square().sum(1, keepdim=True)).sum((2, 3))  # (N, 3), mostly of the strongest pixels
    colours = torch.nn.functional.cosine_similarity(tint[:, None], own, dim=2).argmax(1)
    covered = torch.einsum("nchw, nc -> nhw", tints, own[colours]) / own[colours].square().sum(1)[:, None, None]
    covered = covered.masked_fill(covered < WEAKEST, 0).clamp(max=1)

    area = covered.mean((1, 2)).clamp_min(1e-6)  # of the picture
    pixel = (torch.arange(size) + 0.5) / size
    places = torch.stack([(covered * pixel).mean((1, 2)), (covered * pixel[:, None]).mean((1, 2))], 1) / area[:, None]
    radii = (area[:, None] / torch.tensor(_AREAS)).sqrt()  # (N, shapes)
    differences = []
    for shape in range(len(SHAPES)):
        drawn = coverage(torch.full((len(pictures),), shape), places, radii[:, shape], size)
        differences.append((drawn - covered).abs().mean((1, 2)) / area)
    least, shapes = torch.stack(differences, 1).min(1)
    radii = radii.gather(1, shapes[:, None])[:, 0]
    seen = (least < MOST_DIFFERENT) & (area > SMALLEST_AREA)
    return colours.where(seen, -1), shapes.where(seen, -1), places, radii


WEAKEST = 0.3
"""Of a pixel: what has less of the colour is noise."""
SMALLEST_AREA = 0.02
"""Of the picture: less than this is a speck."""
MOST_DIFFERENT = 0.5
"""Of a shape's area: what differs more from every shape shows none."""
_AREAS = [
    math.pi,
    2.0,
    3 * math.sqrt(3) / 4,
    4 * (2 * 0.94 * 0.34 - 0.34**2),
    math.pi * (1 - 0.5**2),
    2.0,
]
"""Of the shapes of radius 1, in the order of `SHAPES`."""


# ---- Made-up pictures with sentences about them: one coloured shape each, of a size and at a place that the words name
#
# Whether a training learns to follow its prompts shows by the pixels alone: `judge` says of which share of pictures the
# colour, the shape, the size and the place are those that the captions name.


CAPTION_COLOURS = tuple(COLOURS)
CAPTION_SHAPES = tuple(SHAPES)[:5]
SIZES = {"small": (0.16, 0.19), "large": (0.26, 0.3)}
"""Radii from … to, of the picture's side."""
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}
"""Directions (x, y) from the middle."""
_PHRASES = {
    "left": "on the left",
    "right": "on the right",
    "top": "at the top",
    "bottom": "at the bottom",
    "middle": "in the middle",
}
_SYNONYMS = {"little": "small", "big": "large", "centre": "middle", "center": "middle"}
WORDINGS = (
    "a {size} {colour} {shape} {place}",
    "{place} there is a {size} {colour} {shape}",
    "a {colour} {shape} {place}, it is {size}",
    "a picture of a {other_size} {colour} {shape} {place}",
    "the {shape} {place} is {size} and {colour}",
    "a {size} {colour} {shape}",
    "a {colour} {shape} {place}",
    "a {colour} {shape}",
)
"""The last three do not name all: prompts with fewer words are understood, too."""
EXAMPLE_PROMPTS = (
    "a small red circle on the left",
    "a large blue square in the middle",
    "a small green triangle at the top",
    "a large yellow cross on the right",
    "a small magenta ring at the bottom",
    "a large cyan circle in the middle",
    "a large red triangle at the bottom",
    "a small blue cross on the left",
)
_NEAREST, _JITTER = 0.17, 0.05
"""From the middle, of the picture's side: what stands aside at least, and by how much else places differ."""
_ASIDE = (_NEAREST + _JITTER) / 2
_LARGE = math.sqrt(SIZES["small"][1] * SIZES["large"][0])


@dataclass(frozen=True)
class Named:
    """What a caption names or a picture shows; None for what it does not."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    place: str | None = None

    @property
    def captions(self) -> tuple[str, ...]:
        """The sentences about it, one for each of `WORDINGS`."""
        other_size = {"small": "little", "large": "big"}[self.size]
        words = {"colour": self.colour, "shape": self.shape, "size": self.size, "other_size": other_size}
        return tuple(wording.format(place=_PHRASES[self.place], **words) for wording in WORDINGS)


_WORDS = {
    **{word: ("colour", word) for word in CAPTION_COLOURS},
    **{word: ("shape", word) for word in CAPTION_SHAPES},
    **{word: ("size", word) for word in SIZES},
    **{word: ("place", word) for word in PLACES},
}
_WORDS |= {word: _WORDS[same] for word, same in _SYNONYMS.items()}


def named(caption: str) -> Named:
    """What a caption names, by its words.

    >>> named("a small red circle on the left")
    Named(colour='red', shape='circle', size='small', place='left')
    >>> named("A big ring")
    Named(colour=None, shape='ring', size='large', place=None)
    """
    found = (_WORDS[word] for word in re.findall(r"[a-z]+", caption.lower()) if word in _WORDS)
    return Named(**dict(found))


def vocabulary() -> list[str]:
    """All words of the captions, in alphabetical order: what a tokenizer must know."""
    words = re.findall(r"[a-z]+", " ".join([*WORDINGS, *_PHRASES.values()]))
    return sorted({*words, *_WORDS} - {"colour", "shape", "size", "place", "other"})


class CaptionedShapes(DrawnPictures):
    """Pictures of one shape each, with captions; each follows from seed, side and index alone.

    Args:
        count: how many pictures; the first ones stay the same when there are more.
        image_size: pixels, one number or (height, width).
        side: 0 for what trains, 1 for what validates; the pictures of both differ.

    Attributes:
        shown: what each picture shows.
    """

    smallest = 16

    def __init__(self, count: int, image_size: int | tuple[int, int] = 32, seed: int = 0, side: int = 0) -> None:
        names = [f"{index:06d}" for index in range(count)]
        labels = torch.zeros(len(names), dtype=torch.int64)
        super().__init__(names, labels, image_size, seed, side, "captioned shapes")
        choices = _choices(Draws(seed, side, self.numbers)).tolist()
        kinds = [list(values) for values in (CAPTION_COLOURS, CAPTION_SHAPES, SIZES, PLACES)]
        all_named: dict[tuple[int, ...], Named] = {}
        for choice in map(tuple, choices):  # 300 of them: pictures that show the same share their sentences
            if choice not in all_named:
                all_named[choice] = Named(*(kind[number] for kind, number in zip(kinds, choice, strict=True)))
        captions = {choice: shown.captions for choice, shown in all_named.items()}
        self.shown = [all_named[tuple(choice)] for choice in choices]
        self.captions = [captions[tuple(choice)] for choice in choices]

    def part(self, places: Sequence[int]) -> Self:
        part = super().part(places)
        part.shown = [self.shown[place] for place in places]
        return part

    def draw(self, numbers: Tensor, draws: Draws) -> Tensor:
        colours, forms, sizes, where = _choices(draws).unbind(1)
        smallest, largest = torch.tensor(list(SIZES.values()))[sizes].unbind(1)
        radii = smallest + (largest - smallest) * draws.uniform("radius", 1)[:, 0]
        directions = torch.tensor(list(PLACES.values()), dtype=torch.float32)[where]  # (B, 2)
        aside = _NEAREST + (0.47 - radii - _NEAREST)[:, None] * draws.uniform("aside", 1)  # none touches an edge
        jitter = _JITTER * (2 * draws.uniform("jitter", 2) - 1)
        centres = 0.5 + directions * aside + jitter * (1 - directions.abs())
        shades = 0.4 + 0.2 * draws.uniform("shade", 1)[:, 0]
        return draw_shapes(forms, colours, centres, radii, shades, self.image_size)


def _choices(draws: Draws) -> Tensor:
    """Colour, shape, size, place, by their numbers: int64 (N, 4)."""
    kinds = torch.tensor([len(CAPTION_COLOURS), len(CAPTION_SHAPES), len(SIZES), len(PLACES)])
    return (draws.uniform("what", 4).double() * kinds).long()


def captioned_shape_data(
    count: int = 10_000,
    image_size: int = 32,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    val_share: float = 0.05,
) -> CaptionedDataModule:
    """Captioned shapes as a data module: `count` to train, and `val_share` times as many more to validate.

    Raises:
        UserError: numbers that cannot be.
    """
    if not 0 <= val_share < 1:
        raise UserError(f"val_share {val_share:g}: expected a share from 0 to below 1, such as 0.05")
    train, validating = CaptionedShapes(count, image_size, seed), math.ceil(count * val_share)
    val = CaptionedShapes(validating, image_size, seed, side=1) if validating else None
    return CaptionedDataModule(train, val, batch_size, num_workers, seed)


def seen(pictures: Tensor) -> list[Named]:
    """What pictures show, by their pixels alone: nothing in grey or noise, of a blob that is no shape its colour.

    As `recognise` has it, with what generated pictures need: shapes are compared in several degrees of blur, and
    noise beside the shape is left out instead of being counted as a part of it.

    Args:
        pictures: uint8 (N, 3, H, H).
    """
    return [one for part in pictures.split(256) for one in _seen(part)]  # few at once: many are drawn for each


def _seen(pictures: Tensor) -> list[Named]:
    size = pictures.shape[-1]
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    tints, own = (values - values.mean(1, keepdim=True) for values in (pictures.float(), palette))  # 0 for grey
    tint = (tints * tints.square().sum(1, keepdim=True)).sum((2, 3))  # (N, 3), mostly of the strongest pixels
    colours = torch.nn.functional.cosine_similarity(tint[:, None], own, dim=2).argmax(1)
    covered = torch.einsum("nchw, nc -> nhw", tints, own[colours]) / own[colours].square().sum(1)[:, None, None]
    smooth = torch.nn.functional.avg_pool2d(covered[:, None], 3, 1, 1, count_include_pad=False)
    near = torch.nn.functional.max_pool2d((smooth > WEAKEST).float(), 3, 1, 1)[:, 0]  # (N, H, H)
    covered = covered * near
    strength = (tints.norm(dim=1) * near).sum((1, 2)).clamp_min(1e-6)
    one_colour = (tints * near[:, None]).sum((2, 3)).norm(dim=1) / strength  # 1 where all of it has the same tint

    area = covered.mean((1, 2)).clamp_min(1e-6)  # of the picture
    pixel = (torch.arange(size) + 0.5) / size
    centres = torch.stack([(covered * pixel).mean((1, 2)), (covered * pixel[:, None]).mean((1, 2))], 1) / area[:, None]
    radii = (area[:, None] / torch.tensor(_AREAS[: len(CAPTION_SHAPES)])).sqrt()  # (N, shapes)
    differences = []
    for form in range(len(CAPTION_SHAPES)):
        drawn = coverage(torch.full((len(pictures),), form), centres, radii[:, form], size)
        of_blurs = [(_blurred(drawn, blur * size) - covered).abs().mean((1, 2)) / area for blur in _BLURS]
        differences.append(torch.stack(of_blurs).amin(0))
    least, forms = torch.stack(differences, 1).min(1)
    radii = radii.gather(1, forms[:, None])[:, 0]
    coloured = (area > SMALLEST_AREA) & (one_colour > _ONE_COLOUR)
    shaped = coloured & (least < MOST_DIFFERENT)

    found = []
    rows = (values.tolist() for values in (coloured, shaped, colours, forms, centres - 0.5, radii))
    for is_coloured, is_shaped, colour, form, (x, y), radius in zip(*rows, strict=True):
        if not is_shaped:
            found.append(Named(CAPTION_COLOURS[colour] if is_coloured else None))
            continue
        place = "middle"
        if max(abs(x), abs(y)) > _ASIDE:
            place = ("left", "right")[x > 0] if abs(x) > abs(y) else ("top", "bottom")[y > 0]
        found.append(Named(CAPTION_COLOURS[colour], CAPTION_SHAPES[form], ("small", "large")[radius > _LARGE], place))
    return found


_ONE_COLOUR = 0.7
_BLURS = (0.0, 0.02, 0.04)
"""Standard deviations, of the picture's side."""


def _blurred(drawn: Tensor, deviation: float) -> Tensor:
    """Pictures (N, H, H), blurred by a Gaussian; grey ground around them."""
    if not deviation:
        return drawn
    reach = math.ceil(3 * deviation)
    weights = torch.exp(-((torch.arange(-reach, reach + 1) / deviation) ** 2) / 2)
    weights = (weights / weights.sum())[None, None]  # (1, 1, 2 reach + 1)
    drawn = torch.nn.functional.conv2d(drawn[:, None], weights[..., None], padding=(reach, 0))
    return torch.nn.functional.conv2d(drawn, weights[..., None, :], padding=(0, reach))[:, 0]


def judge_shapes(pictures: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """The shares of pictures that show what their captions name: colour, shape, size, place, and "all" of these.

    A share is that of the pictures whose caption names such a thing; where none does, it is not given.

    Args:
        pictures: uint8 (N, 3, H, H).
        captions: of each picture, the one that it was made by.
    """
    wanted, shown = [named(caption) for caption in captions], seen(pictures)
    right: dict[str, list[bool]] = {"all": []}
    for one, other in zip(wanted, shown, strict=True):
        of_each = {
            field.name: getattr(one, field.name) == getattr(other, field.name)
            for field in fields(Named)
            if getattr(one, field.name) is not None
        }
        for kind, is_right in of_each.items():
            right.setdefault(kind, []).append(is_right)
        if of_each:
            right["all"].append(all(of_each.values()))
    return {kind: sum(values) / len(values) for kind, values in right.items() if values}
