"""Made-up pictures: one coloured shape each on a grey ground, drawn when they are asked for.

Whoever tries a training out sees at a glance whether it learns: a class is a colour and a shape, and `looks_like` says
by the pixels alone which class a picture shows.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Self

import torch
from torch import Tensor

from vavae_tools.data.decoded import DecodedPictures
from vavae_tools.data.picture_sets import PictureSetDataModule
from vavae_tools.draws import Draws
from vavae_tools.errors import UserError

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


def coverage(shapes: Tensor, places: Tensor, radii: Tensor, size: int) -> Tensor:
    """How much of each pixel a shape covers: float32 (N, size, size) in [0, 1], with edges one pixel wide.

    Args:
        shapes: int64 (N,), their places in `SHAPES`.
        places: float (N, 2), (x, y) of the centres, of the picture's side: (0, 0) is the top left corner.
        radii: float (N,), of the picture's side.
        size: pixels.
    """
    pixel = (torch.arange(size, dtype=torch.float32) + 0.5) / size
    covered = torch.empty(len(shapes), size, size)
    for number in shapes.unique().tolist():
        here = shapes == number
        radius = radii[here, None, None]
        x, y = ((pixel - places[here, axis, None]) for axis in (0, 1))  # (n, size) each
        x, y = torch.broadcast_tensors(x[:, None, :], y[:, :, None])  # (n, size, size)
        outside = list(SHAPES.values())[number](x / radius, y / radius) * radius * size  # in pixels
        covered[here] = (0.5 - outside).clamp_(0, 1)
    return covered


def draw_shapes(
    shapes: Tensor, colours: Tensor, places: Tensor, radii: Tensor, shades: Tensor, size: int = 32
) -> Tensor:
    """Draw one shape into each picture: uint8 (N, 3, size, size).

    Args:
        shapes, colours: int64 (N,), their places in `SHAPES` and `COLOURS`.
        places, radii: see `coverage`.
        shades: float (N,), of the grey ground, 0 black, 1 white.
        size: pixels.
    """
    palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32)
    covered = coverage(shapes, places, radii, size)[:, None]  # (N, 1, size, size)
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
        image_size: pixels.
        side: 0 for what trains, 1 for what validates; the pictures of both differ.
    """

    def __init__(
        self, names: Sequence[str], labels: Tensor, image_size: int, seed: int = 0, side: int = 0, title: str = "shapes"
    ) -> None:
        super().__init__(names, labels, image_size, title=title)
        self.seed, self.side, self.numbers = seed, side, torch.arange(len(names))

    def draw(self, numbers: Tensor, draws: Draws) -> Tensor:
        """The pictures of these numbers, uint8 (B, 3, H, W), with their random draws."""
        raise NotImplementedError

    def drawn(self, places: Sequence[int]) -> Tensor:
        """The pictures at these places, uint8 (B, 3, H, W)."""
        numbers = self.numbers[torch.as_tensor(places, dtype=torch.int64)]
        return self.draw(numbers, Draws(self.seed, self.side, numbers))

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


def check_drawn(what: str, count: int, image_size: int, smallest: int) -> None:
    """Say what cannot be drawn.

    Raises:
        UserError: fewer pictures than one, or an `image_size` that is no whole number of at least `smallest` pixels.
    """
    if not isinstance(image_size, int) or image_size < smallest:
        raise UserError(f"image_size {image_size}: {what} need one number of at least {smallest} pixels")
    if count < 1:
        raise UserError(f"{count} pictures of shapes: at least one is needed")


class ShapePictures(DrawnPictures):
    """Pictures of shapes with random place, size and ground; each follows from seed, side and index alone.

    Args:
        count: how many pictures; the first ones stay the same when there are more.
        num_classes: colour × shape, see `shape_classes`; the labels take turns.
        image_size: pixels.
        side: 0 for what trains, 1 for what validates; the pictures of both differ.
    """

    def __init__(self, count: int, num_classes: int = 4, image_size: int = 32, seed: int = 0, side: int = 0) -> None:
        check_drawn("shapes", count, image_size, 8)
        called = shape_names(num_classes)
        names = [f"{called[index % num_classes]}/{index:06d}" for index in range(count)]
        super().__init__(names, torch.arange(count) % num_classes, image_size, seed, side)
        self.num_classes = num_classes

    def what_is_stored(self) -> list:
        *pictures, seed, side = super().what_is_stored()
        return [*pictures, self.num_classes, seed, side]

    def draw(self, numbers: Tensor, draws: Draws) -> Tensor:
        radii = SMALLEST + (LARGEST - SMALLEST) * draws.uniform("radius", 1)[:, 0]
        centres = radii[:, None] + (1 - 2 * radii[:, None]) * draws.uniform("place", 2)  # none is cut by an edge
        shades = 0.15 + 0.7 * draws.uniform("shade", 1)[:, 0]
        colours, shapes = torch.tensor(shape_classes(self.num_classes))[numbers % self.num_classes].unbind(1)
        return draw_shapes(shapes, colours, centres, radii, shades, self.image_size[0])


def shape_data(
    count: int = 10_000,
    num_classes: int = 4,
    image_size: int = 32,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    val_share: float = 0.05,
) -> PictureSetDataModule:
    """Shapes as a data module: `count` to train, and `val_share` times as many more to validate.

    Raises:
        UserError: numbers that cannot be.
    """
    if not 0 <= val_share < 1:
        raise UserError(f"val_share {val_share:g}: expected a share from 0 to below 1, such as 0.05")
    train = ShapePictures(count, num_classes, image_size, seed)
    validating = math.ceil(count * val_share)
    val = ShapePictures(validating, num_classes, image_size, seed, side=1) if validating else None
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
