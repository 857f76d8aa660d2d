"""CUB-200-2011 (Wah et al. 2011): birds with sentences, written about them or made of their attributes."""

import re
from collections.abc import Sequence
from pathlib import Path

from vavae_tools.data.captions import NamedPictures, missing_pictures, read_text
from vavae_tools.data.folders import contents, counted
from vavae_tools.runtime.errors import UserError

SURE = 3
"""Of its certainties: 1 not visible, 2 guessing, 3 probably, 4 definitely."""
_TEXT_FOLDERS = ("text_c10", "text", "text/text_c10", "captions", "cvpr2016_cub/text_c10")


def cub_sides(path: Path, notes: list[str]) -> list[NamedPictures]:
    """What trains, and what validates.

    Args:
        path: CUB_200_2011, or the folder that it lies in.
        notes: gets a line where captions are made up.

    Raises:
        UserError: its files are not there, or not as they should be.
    """
    root = next((folder for folder in (path, path / "CUB_200_2011") if (folder / "images.txt").is_file()), None)
    if root is None:
        raise UserError(f"No images.txt in {path}, which holds {contents(path)}: expected the folder CUB_200_2011")
    names = _numbered_lines(root / "images.txt")
    captions = _cub_captions(root, names, notes)
    sides = {"1": {}, "0": {}}  # as train_test_split.txt says it
    side_of = _numbered_lines(root / "train_test_split.txt") if (root / "train_test_split.txt").is_file() else {}
    for number, name in names.items():
        side = side_of.get(number, "1")
        if side not in sides:
            raise UserError(f"{root / 'train_test_split.txt'} says {side!r} of picture {number}, expected 1 or 0")
        sides[side][name] = captions[number]
    return [NamedPictures(root / "images", root / "images.txt", of_side) for of_side in sides.values() if of_side]


def _numbered_lines(path: Path) -> dict[str, str]:
    """The lines "number what" of a file of CUB."""
    lines = {}
    for place, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            number, _, what = line.strip().partition(" ")
            if not what:
                raise UserError(f"{path}, line {place:,}, is {line.strip()!r}: expected a number and a word")
            lines[number] = what.strip()
    return lines


def _cub_captions(root: Path, names: dict[str, str], notes: list[str]) -> dict[str, Sequence[str]]:
    places = [home / name for home in (root, root.parent) for name in _TEXT_FOLDERS]
    written = {number: str(Path(name).with_suffix(".txt")) for number, name in names.items()}
    captions: dict[str, Sequence[str]] = {}
    for folder in places:
        lacking = set(missing_pictures(folder, written.values())) if folder.is_dir() else set(written.values())
        if len(lacking) < len(set(written.values())):
            there = {number: text for number, text in written.items() if text not in lacking}
            captions = {number: read_text(folder / text).split("\n") for number, text in there.items()}
            captions = {number: lines for number, lines in captions.items() if any(map(str.strip, lines))}
            break
    if len(captions) < len(names):
        made = _bird_captions(root, {number: name for number, name in names.items() if number not in captions})
        notes.append(f"captions of {counted(len(made), 'picture')} of {root} made from class names and attributes")
        captions.update(made)
    return captions


def _bird_captions(root: Path, names: dict[str, str]) -> dict[str, tuple[str, ...]]:
    classes = [root / file for file in ("image_class_labels.txt", "classes.txt")]
    class_of, class_names = (map(_numbered_lines, classes)) if all(map(Path.is_file, classes)) else ({}, {})
    attributes = _sure_attributes(root)
    made = {}
    for number, name in names.items():
        class_name = class_names.get(class_of.get(number), name.partition("/")[0])
        made[number] = bird_sentences(class_name, attributes.get(number, []))
    return made


def _sure_attributes(root: Path) -> dict[str, list[str]]:
    """Picture's number → its attributes that somebody was sure of, as they are called, in their order."""
    labels = root / "attributes" / "image_attribute_labels.txt"
    places = (root / "attributes" / "attributes.txt", root / "attributes.txt", root.parent / "attributes.txt")
    called = next((path for path in places if path.is_file()), None)
    if called is None or not labels.is_file():
        return {}
    names = _numbered_lines(called)
    of_each: dict[str, list[str]] = {}
    # picture, attribute, whether it is there, certainty, seconds: 3.7 million lines, a few with fields too many
    for picture, attribute in re.findall(rf"^(\d+) (\d+) 1 [{SURE}-4]\b", read_text(labels), re.MULTILINE):
        if attribute in names:
            of_each.setdefault(picture, []).append(names[attribute])
    return of_each


_PLURAL = {"wing": "wings", "eye": "eyes", "leg": "legs", "upperparts": "upperparts", "underparts": "underparts"}


def bird_sentences(class_name: str, attributes: Sequence[str]) -> tuple[str, ...]:
    """Sentences about a bird of CUB, by the name of its class and its attributes.

    >>> bird_sentences("149.Brown_Thrasher", ["has_wing_color::brown", "has_size::small_(5_-_9_in)"])
    ('a brown thrasher, a small bird', 'a small bird with brown wings')
    """
    name = re.sub(r"^\d+\.", "", class_name).replace("_", " ").lower()
    values: dict[tuple[str, str], list[str]] = {}
    for attribute in attributes:
        what, _, value = attribute.removeprefix("has_").partition("::")
        part, _, kind = what.rpartition("_")
        value = re.sub(r"\s*\(.*", "", value.replace("_", " ")).replace("-", " ")
        values.setdefault((part.replace("_", " "), kind), []).append(value)
    first = [*values.pop(("", "size"), [])[:1], " and ".join(values.pop(("primary", "color"), []))]
    bird = " ".join(filter(None, [*first, "bird"]))
    phrases = [
        _phrase(part, of_part)
        for (part, kind), of_part in values.items()
        if part and kind in ("color", "pattern", "shape")
    ]
    known = f"{_with_article(name)}, {_with_article(bird)}" if bird != "bird" else _with_article(name)
    sentences = [known]
    for place, start in enumerate(range(0, min(len(phrases), 12), 3)):
        who = _with_article(name if place % 2 else bird)
        sentences.append(f"{who} with {' and '.join(filter(None, _last_apart(phrases[start : start + 3])))}")
    return tuple(sentences)


def _phrase(part: str, values: Sequence[str]) -> str:
    noun = _PLURAL.get(part, part)
    values = [value.removesuffix(noun).strip() for value in values]  # "forked tail", "rounded wings"
    words = f"{' and '.join(values)} {noun}"
    return words if part in _PLURAL else _with_article(words)


def _last_apart(words: Sequence[str]) -> tuple[str, str]:
    return ", ".join(words[:-1]), words[-1]


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
