"""Made-up images: one coloured shape each on a grey ground, drawn when asked for, with or without captions.

`caption_accuracy` tells by the pixels whether a training learns to follow its prompts.
"""

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vavae_tools.data.captions import CaptionedDataModule
from vavae_tools.data.images import DecodedImages, ImageSetDataModule, Size
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
_PALETTE = torch.tensor(list(COLOURS.values()), dtype=torch.float32)  # (colours, 3)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    facing = (math.pi / 2, math.pi / 2 - 2 * math.pi / 3, math.pi / 2 + 2 * math.pi / 3)  # directions of the sides
    return torch.stack([x * math.cos(a) + y * math.sin(a) for a in facing]).amax(0) - 0.5


def _cross(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.abs(), y.abs()
    return torch.minimum(torch.maximum(x - 0.94, y - 0.34), torch.maximum(x - 0.34, y - 0.94))


SHAPES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "circle": lambda x, y: torch.hypot(x, y) - 1,
    "square": lambda x, y: torch.maximum(x.abs(), y.abs()) - math.sqrt(0.5),
    "triangle": _triangle,
    "cross": _cross,
    "ring": lambda x, y: (torch.hypot(x, y) - 0.75).abs() - 0.25,
    "diamond": lambda x, y: (x.abs() + y.abs() - 1) * math.sqrt(0.5),
}
"""How far a place (x to the right, y down, in radii from the centre) lies outside each shape of radius 1."""
AREAS = (math.pi, 2.0, 3 * math.sqrt(3) / 4, 4 * (2 * 0.94 * 0.34 - 0.34**2), math.pi * (1 - 0.5**2), 2.0)
SMALLEST, LARGEST = 0.22, 0.4  # radii, of the image's side


# ---- drawing
def coverage(shapes: Tensor, places: Tensor, radii: Tensor, size: int | Size) -> Tensor:
    """Return how much of each pixel a shape covers: float32 (N, H, W) in [0, 1], with edges one pixel wide.

    Args:
        shapes: int64 (N,), their places in `SHAPES`.
        places: float (N, 2), (x, y) of the centres, of the image's width and height: (0, 0) is the top left corner.
        radii: float (N,), of the image's shorter side.
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
    shapes: Tensor, colours: Tensor, places: Tensor, radii: Tensor, shades: Tensor, size: int | Size = 32
) -> Tensor:
    """Draw one shape into each image, uint8 (N, 3, H, W); see `coverage`.

    Args:
        colours: int64 (N,), their places in `COLOURS`.
        shades: float (N,), of the grey ground, 0 black, 1 white.
    """
    covered = coverage(shapes, places, radii, size)[:, None]  # (N, 1, H, W)
    ground, colour = 255 * shades[:, None, None, None], _PALETTE[colours][:, :, None, None]
    return (ground + covered * (colour - ground)).round_().to(torch.uint8)


def shape_classes(num_classes: int) -> list[tuple[int, int]]:
    """Return the (colour, shape) of each label, of about as many shapes as colours."""
    if not 1 <= num_classes <= len(SHAPES) * len(COLOURS):
        raise UserError(f"{num_classes} classes of shapes: expected 1 to {len(SHAPES) * len(COLOURS)}")
    shapes = math.isqrt(num_classes - 1) + 1  # the root, rounded up
    colours = -(-num_classes // shapes)
    return [(label % colours, label // colours) for label in range(num_classes)]


class DrawnImages(DecodedImages):
    """Images that follow from seed, subset (0 trains, 1 validates) and number alone.

    A subclass has `draw(numbers, draws)`, which returns uint8 (B, 3, H, W).
    """

    title: str
    smallest: int  # pixels of the shorter side: below it nobody knows what is shown

    def __init__(
        self, names: list[str], labels: Tensor, image_size: int | Size, seed: int = 0, subset: int = 0, **options: Any
    ) -> None:
        if not names:
            raise UserError(f"0 images of {self.title}: at least one is needed")
        super().__init__(names, labels, image_size, title=self.title, **options)
        self.seed, self.subset = seed, subset

    def resize(self, image_size: int | Size) -> None:
        super().resize(image_size)
        if min(self.image_size) < self.smallest:
            raise UserError(f"image_size {image_size}: {self.title} need at least {self.smallest} pixels")

    def drawn(self, places: Sequence[int]) -> Tensor:
        numbers = self.rows[torch.as_tensor(places, dtype=torch.int64)]
        images = self.draw(numbers, Draws(self.seed, self.subset, numbers))
        if self.channels == 3:
            return images
        red, green, blue = images.int().split(1, dim=1)  # as `in_channels` has it: Pillow's grey
        return ((19595 * red + 38470 * green + 7471 * blue + 0x8000) >> 16).to(torch.uint8)

    def stored_key(self) -> list:
        numbers = hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()
        return [f"{self.title} 1", len(self), numbers, self.seed, self.subset]

    def in_memory(self) -> Tensor:
        if self._memory is None:
            self._memory = torch.cat([self.drawn(part) for part in torch.arange(len(self)).split(1024)])
        return self._memory

    def images(self, places: Sequence[int]) -> Tensor:
        return self.drawn(places) if self._memory is None else self._memory[torch.as_tensor(places)]


def _subsets(kind: type[DrawnImages], count: int, val_share: float, **options: Any) -> tuple[DrawnImages, Any]:
    """Return `count` images that train, and `val_share` times as many others or None."""
    if not 0 <= val_share < 1:
        raise UserError(f"val_share {val_share:g}: expected a share from 0 to below 1, such as 0.05")
    validating = math.ceil(count * val_share)
    return kind(count, **options), kind(validating, **options, subset=1) if validating else None


# ---- with classes
class ShapeImages(DrawnImages):
    """Shapes with random place, size and ground; the labels, colour × shape (see `shape_classes`), take turns."""

    title, smallest = "shapes", 8

    def __init__(self, count: int, num_classes: int = 4, image_size: int | Size = 32, **options: Any) -> None:
        classes = shape_classes(num_classes)
        self.class_names = [f"{list(COLOURS)[colour]}_{list(SHAPES)[shape]}" for colour, shape in classes]
        names = [f"{self.class_names[index % num_classes]}/{index:06d}" for index in range(count)]
        super().__init__(names, torch.arange(len(names)) % num_classes, image_size, **options)
        self.num_classes = num_classes

    def stored_key(self) -> list:
        *images, seed, subset = super().stored_key()
        return [*images, self.num_classes, seed, subset]

    def draw(self, numbers: Tensor, draws: Draws) -> Tensor:
        radii = SMALLEST + (LARGEST - SMALLEST) * draws.uniform("radius", 1)[:, 0]
        centres = radii[:, None] + (1 - 2 * radii[:, None]) * draws.uniform("place", 2)  # none is cut by an edge
        shades = 0.15 + 0.7 * draws.uniform("shade", 1)[:, 0]
        colours, shapes = torch.tensor(shape_classes(self.num_classes))[numbers % self.num_classes].unbind(1)
        return draw_shapes(shapes, colours, centres, radii, shades, self.image_size)


def shape_data(
    count: int = 10_000,
    num_classes: int = 4,
    image_size: int | Size = 32,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    val_share: float = 0.05,
    channels: int | None = None,
) -> ImageSetDataModule:
    """Return shapes as a data module: `count` to train, and `val_share` times as many more to validate.

    With 1 for `channels` they are grey; None stands for 3.
    """
    options = {"image_size": image_size, "seed": seed, "channels": channels or 3}
    train, val = _subsets(ShapeImages, count, val_share, num_classes=num_classes, **options)
    labels = {name: label for label, name in enumerate(train.class_names)}
    return ImageSetDataModule(train, val, labels, batch_size, num_workers, seed)


# ---- with sentences, which name a colour, a shape, a size and a place
CAPTION_COLOURS = tuple(COLOURS)
CAPTION_SHAPES = tuple(SHAPES)[:5]
SIZES = {"small": (0.16, 0.19), "large": (0.26, 0.3)}  # radii from … to, of the image's side
PLACES = {"left": (-1, 0), "right": (1, 0), "top": (0, -1), "bottom": (0, 1), "middle": (0, 0)}  # x, y from the middle
KINDS = {"colour": CAPTION_COLOURS, "shape": CAPTION_SHAPES, "size": tuple(SIZES), "place": tuple(PLACES)}
_PHRASES = {"left": "on the left", "right": "on the right", "top": "at the top"}
_PHRASES |= {"bottom": "at the bottom", "middle": "in the middle"}
WORDINGS = (
    "a {size} {colour} {shape} {place}",
    "{place} there is a {size} {colour} {shape}",
    "a {colour} {shape} {place}, it is {size}",
    "an image of a {other_size} {colour} {shape} {place}",
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
_WORDS = {word: (kind, word) for kind, words in KINDS.items() for word in words}
_SYNONYMS = {"little": "small", "big": "large", "centre": "middle", "center": "middle"}
_WORDS |= {word: _WORDS[same] for word, same in _SYNONYMS.items()}
_NEAREST, _JITTER = 0.17, 0.05  # of the image's side: how far aside shapes stand at least, how else places differ


@dataclass(frozen=True)
class Named:
    """What a caption names or an image shows; None for what it does not."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    place: str | None = None

    def captions(self) -> tuple[str, ...]:
        words = {**asdict(self), "place": _PHRASES[self.place]}
        words["other_size"] = {"small": "little", "large": "big"}[self.size]
        return tuple(wording.format(**words) for wording in WORDINGS)


def named(caption: str) -> Named:
    """Return what a caption names, by its words.

    >>> named("a small red circle on the left")
    Named(colour='red', shape='circle', size='small', place='left')
    >>> named("A big ring")
    Named(colour=None, shape='ring', size='large', place=None)
    """
    return Named(**dict(_WORDS[word] for word in re.findall(r"[a-z]+", caption.lower()) if word in _WORDS))


def vocabulary() -> list[str]:
    """Return all words of the captions, in alphabetical order: what a tokenizer must know."""
    words = re.findall(r"[a-z]+", " ".join([*WORDINGS, *_PHRASES.values()]))
    return sorted({*words, *_WORDS} - {*KINDS, "other"})


class CaptionedShapes(DrawnImages):
    """Shapes with sentences about them, of which the first names all that is shown."""

    title, smallest = "captioned shapes", 16

    def __init__(self, count: int, image_size: int | Size = 32, seed: int = 0, subset: int = 0) -> None:
        names = [f"{index:06d}" for index in range(count)]
        super().__init__(names, torch.zeros(len(names), dtype=torch.int64), image_size, seed, subset)
        choices = _choices(Draws(seed, subset, self.rows)).tolist()
        shown = [Named(*(words[number] for words, number in zip(KINDS.values(), row, strict=True))) for row in choices]
        captions = {one: one.captions() for one in set(shown)}  # 300: images that show the same share their sentences
        self.captions = [captions[one] for one in shown]

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
    """Return colour, shape, size, place, by their numbers: int64 (N, 4)."""
    return (draws.uniform("what", 4).double() * torch.tensor([len(words) for words in KINDS.values()])).long()


def captioned_shape_data(
    count: int = 10_000,
    image_size: int = 32,
    batch_size: int = 64,
    num_workers: int = 0,
    seed: int = 0,
    val_share: float = 0.05,
) -> CaptionedDataModule:
    train, val = _subsets(CaptionedShapes, count, val_share, image_size=image_size, seed=seed)
    return CaptionedDataModule(train, val, batch_size, num_workers, seed)


# ---- seeing
MIN_TINT = 0.3  # of a pixel: what has less of the colour is noise
SMALLEST_AREA = 0.02  # of the image: less than this is a speck
MAX_DIFFERENCE = 0.5  # of a shape's area: what differs more from every shape shows none
MIN_COLOUR_PURITY = 0.7  # of the strength of all tints: what has less in common is of several colours
BLURS = (0.0, 0.02, 0.04)  # standard deviations, of the image's side


def seen(images: Tensor) -> list[Named]:
    """Return what images uint8 (N, 3, H, H) show: nothing in noise, of a blob that is no shape its colour.

    The colour is the nearest tint. Its strength, which grey has not, tells how far each pixel is covered, and noise
    beside the shape is left out. Every shape is drawn with the same area around the same centre, in several degrees of
    blur, and the one that differs least is it.
    """
    return [one for part in images.split(256) for one in _seen(part)]  # few at once: many are drawn for each


def _seen(images: Tensor) -> list[Named]:
    size = images.shape[-1]
    tints, own = (values - values.mean(1, keepdim=True) for values in (images.float(), _PALETTE))  # 0 for grey
    tint = (tints * tints.square().sum(1, keepdim=True)).sum((2, 3))  # (N, 3), mostly of the strongest pixels
    colours = F.cosine_similarity(tint[:, None], own, dim=2).argmax(1)
    covered = torch.einsum("nchw, nc -> nhw", tints, own[colours]) / own[colours].square().sum(1)[:, None, None]
    smooth = F.avg_pool2d(covered[:, None], 3, 1, 1, count_include_pad=False)
    near = F.max_pool2d((smooth > MIN_TINT).float(), 3, 1, 1)[:, 0]  # (N, H, H)
    covered = covered * near
    strength = (tints.norm(dim=1) * near).sum((1, 2)).clamp_min(1e-6)
    one_colour = (tints * near[:, None]).sum((2, 3)).norm(dim=1) / strength  # 1 where all of it has the same tint

    area = covered.mean((1, 2)).clamp_min(1e-6)  # of the image
    pixel = (torch.arange(size) + 0.5) / size
    centres = torch.stack([(covered * pixel).mean((1, 2)), (covered * pixel[:, None]).mean((1, 2))], 1) / area[:, None]
    radii = (area[:, None] / torch.tensor(AREAS[: len(CAPTION_SHAPES)])).sqrt()  # (N, shapes)
    differences = []
    for form in range(len(CAPTION_SHAPES)):
        drawn = coverage(torch.full((len(images),), form), centres, radii[:, form], size)
        of_blurs = [(_blurred(drawn, blur * size) - covered).abs().mean((1, 2)) / area for blur in BLURS]
        differences.append(torch.stack(of_blurs).amin(0))
    least, forms = torch.stack(differences, 1).min(1)
    is_large = radii.gather(1, forms[:, None])[:, 0] > math.sqrt(SIZES["small"][1] * SIZES["large"][0])
    coloured = (area > SMALLEST_AREA) & (one_colour > MIN_COLOUR_PURITY)
    shaped = coloured & (least < MAX_DIFFERENCE)

    found = []
    rows = (values.tolist() for values in (coloured, shaped, colours, forms, is_large, centres - 0.5))
    for is_coloured, is_shaped, colour, form, large, centre in zip(*rows, strict=True):
        named = (CAPTION_COLOURS[colour], CAPTION_SHAPES[form], ("small", "large")[large], _place_of(*centre))
        found.append(Named(*named) if is_shaped else Named(named[0] if is_coloured else None))
    return found


def _place_of(x: float, y: float) -> str:
    if max(abs(x), abs(y)) <= (_NEAREST + _JITTER) / 2:
        return "middle"
    return ("left", "right")[x > 0] if abs(x) > abs(y) else ("top", "bottom")[y > 0]


def _blurred(drawn: Tensor, deviation: float) -> Tensor:
    if not deviation:
        return drawn
    reach = math.ceil(3 * deviation)
    weights = torch.exp(-((torch.arange(-reach, reach + 1) / deviation) ** 2) / 2)
    weights = (weights / weights.sum())[None, None]  # (1, 1, 2 reach + 1)
    drawn = F.conv2d(drawn[:, None], weights[..., None], padding=(reach, 0))
    return F.conv2d(drawn, weights[..., None, :], padding=(0, reach))[:, 0]


def caption_accuracy(images: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """Return the shares of images uint8 (N, 3, H, H) that show what their captions name: each kind, and "all" of it.

    Each is a share of the images whose captions name such a thing, and is left out where none does.
    """
    right: dict[str, list[bool]] = {kind: [] for kind in ("all", *KINDS)}
    for caption, shown in zip(captions, seen(images), strict=True):
        wanted = {kind: word for kind, word in asdict(named(caption)).items() if word is not None}
        of_each = {kind: getattr(shown, kind) == word for kind, word in wanted.items()}
        if of_each:
            of_each["all"] = all(of_each.values())
        for kind, is_right in of_each.items():
            right[kind].append(is_right)
    return {kind: sum(values) / len(values) for kind, values in right.items() if values}
