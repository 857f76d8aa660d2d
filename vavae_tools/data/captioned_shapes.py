"""Made-up pictures with sentences about them: one coloured shape each, of a size and at a place that the words name.

Whether a training learns to follow its prompts shows by the pixels alone: `judge` says of which share of pictures the
colour, the shape, the size and the place are those that the captions name.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Self

import torch
from torch import Tensor

from vavae_tools.data import shapes
from vavae_tools.data.captioned import Captioned, CaptionedDataModule
from vavae_tools.draws import Draws
from vavae_tools.errors import UserError

COLOURS = tuple(shapes.COLOURS)
SHAPES = tuple(shapes.SHAPES)[:5]
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
    **{word: ("colour", word) for word in COLOURS},
    **{word: ("shape", word) for word in SHAPES},
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


class CaptionedShapes(Captioned, shapes.DrawnPictures):
    """Pictures of one shape each, with captions; each follows from seed, side and index alone.

    Args:
        count: how many pictures; the first ones stay the same when there are more.
        image_size: pixels.
        side: 0 for what trains, 1 for what validates; the pictures of both differ.

    Attributes:
        shown: what each picture shows.
    """

    def __init__(self, count: int, image_size: int = 32, seed: int = 0, side: int = 0) -> None:
        title = "captioned shapes"
        shapes.check_drawn(title, count, image_size, 16)
        names = [f"{index:06d}" for index in range(count)]
        super().__init__(names, torch.zeros(count, dtype=torch.int64), image_size, seed, side, title)
        choices = _choices(Draws(seed, side, self.numbers)).tolist()
        kinds = [list(values) for values in (COLOURS, SHAPES, SIZES, PLACES)]
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
        return shapes.draw_shapes(forms, colours, centres, radii, shades, self.image_size[0])


def _choices(draws: Draws) -> Tensor:
    """Colour, shape, size, place, by their numbers: int64 (N, 4)."""
    kinds = torch.tensor([len(COLOURS), len(SHAPES), len(SIZES), len(PLACES)])
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

    As `shapes.recognise` has it, with what generated pictures need: shapes are compared in several degrees of blur, and
    noise beside the shape is left out instead of being counted as a part of it.

    Args:
        pictures: uint8 (N, 3, H, H).
    """
    return [one for part in pictures.split(256) for one in _seen(part)]  # few at once: many are drawn for each


def _seen(pictures: Tensor) -> list[Named]:
    size = pictures.shape[-1]
    palette = torch.tensor(list(shapes.COLOURS.values()), dtype=torch.float32)
    tints, own = (values - values.mean(1, keepdim=True) for values in (pictures.float(), palette))  # 0 for grey
    tint = (tints * tints.square().sum(1, keepdim=True)).sum((2, 3))  # (N, 3), mostly of the strongest pixels
    colours = torch.nn.functional.cosine_similarity(tint[:, None], own, dim=2).argmax(1)
    covered = torch.einsum("nchw, nc -> nhw", tints, own[colours]) / own[colours].square().sum(1)[:, None, None]
    smooth = torch.nn.functional.avg_pool2d(covered[:, None], 3, 1, 1, count_include_pad=False)
    near = torch.nn.functional.max_pool2d((smooth > shapes.WEAKEST).float(), 3, 1, 1)[:, 0]  # (N, H, H)
    covered = covered * near
    strength = (tints.norm(dim=1) * near).sum((1, 2)).clamp_min(1e-6)
    one_colour = (tints * near[:, None]).sum((2, 3)).norm(dim=1) / strength  # 1 where all of it has the same tint

    area = covered.mean((1, 2)).clamp_min(1e-6)  # of the picture
    pixel = (torch.arange(size) + 0.5) / size
    centres = torch.stack([(covered * pixel).mean((1, 2)), (covered * pixel[:, None]).mean((1, 2))], 1) / area[:, None]
    radii = (area[:, None] / torch.tensor(shapes._AREAS[: len(SHAPES)])).sqrt()  # (N, shapes)
    differences = []
    for form in range(len(SHAPES)):
        drawn = shapes.coverage(torch.full((len(pictures),), form), centres, radii[:, form], size)
        of_blurs = [(_blurred(drawn, blur * size) - covered).abs().mean((1, 2)) / area for blur in _BLURS]
        differences.append(torch.stack(of_blurs).amin(0))
    least, forms = torch.stack(differences, 1).min(1)
    radii = radii.gather(1, forms[:, None])[:, 0]
    coloured = (area > shapes.SMALLEST_AREA) & (one_colour > _ONE_COLOUR)
    shaped = coloured & (least < shapes.MOST_DIFFERENT)

    found = []
    rows = (values.tolist() for values in (coloured, shaped, colours, forms, centres - 0.5, radii))
    for is_coloured, is_shaped, colour, form, (x, y), radius in zip(*rows, strict=True):
        if not is_shaped:
            found.append(Named(COLOURS[colour] if is_coloured else None))
            continue
        place = "middle"
        if max(abs(x), abs(y)) > _ASIDE:
            place = ("left", "right")[x > 0] if abs(x) > abs(y) else ("top", "bottom")[y > 0]
        found.append(Named(COLOURS[colour], SHAPES[form], ("small", "large")[radius > _LARGE], place))
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
