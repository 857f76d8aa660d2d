"""Person folders on disk: which there are, in which order, with which label, and the images in them."""

import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

from PIL import Image

from vavae_tools.runtime.errors import UserError, join_first

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg")
EXTENSIONS = (*IMAGE_EXTENSIONS, "bmp", "webp", "tif", "tiff", "ppm", "pgm")
VALIDATION_SUBSETS = ("validation", "valid", "val", "dev", "test")  # the first one there validates

_PERSON = re.compile(r"ID_(\d+)")
_DIGITS = re.compile(r"(\d+)")


def natural_key(name: str) -> tuple:
    """Return the key that sorts names as a person does: ID_2 before ID_10."""
    parts = _DIGITS.split(name)  # text, digits, text, digits, …: a text always meets a text, a number a number
    parts[1::2] = map(int, parts[1::2])
    return (parts, name)


def labels_of(names: Iterable[str]) -> dict[str, int]:
    """Return the label of each person folder: k − 1 when all are named `ID_k`, else its place in natural order.

    >>> labels_of(["walker10", "walker2", "ID_7"])
    {'ID_7': 0, 'walker2': 1, 'walker10': 2}
    """
    names = sorted(names, key=natural_key)
    numbers = [int(match[1]) if (match := _PERSON.fullmatch(name)) else 0 for name in names]
    if 0 in numbers:  # another name, or ID_0, whose label would be −1
        return {name: place for place, name in enumerate(names)}
    for (name, number), (other, same) in pairwise(zip(names, numbers, strict=True)):
        if number == same:
            raise UserError(f"The folders {name} and {other} would have the same label. Rename or merge one of them.")
    return {name: number - 1 for name, number in zip(names, numbers, strict=True)}


def list_folders(directory: str | Path, extensions: Collection[str] = IMAGE_EXTENSIONS) -> dict[str, list[Path]]:
    """Return each person folder with its images, both in natural order; a folder may be empty."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(no_such_folder(directory))
    entries = {name: image_entries(directory / name, extensions) for name in person_folders(directory)}
    return {name: [Path(entry.path) for entry in of_person] for name, of_person in entries.items()}


def person_folders(directory: str | Path) -> list[str]:
    """Return the names of the folders in `directory`, in natural order; hidden ones and __MACOSX are no persons."""
    with os.scandir(directory) as entries:
        names = [e.name for e in entries if not e.name.startswith(".") and e.name != "__MACOSX" and e.is_dir()]
    return sorted(names, key=natural_key)


def image_entries(folder: str | Path, extensions: Collection[str]) -> list[os.DirEntry]:
    """Return the files with these extensions in natural order; a link that leads nowhere is among them."""
    with os.scandir(folder) as entries:
        found = [e for e in entries if extension_of(e.name) in extensions and not e.is_dir()]
    return sorted(found, key=lambda e: natural_key(e.name))


def files_below(folder: Path, extensions: Collection[str]) -> Iterator[Path]:
    """Yield the files with these extensions at any depth, those of each folder in natural order."""
    for place, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted((name for name in folders if not name.startswith(".")), key=natural_key)
        yield from (Path(place, name) for name in sorted(names, key=natural_key) if extension_of(name) in extensions)


def other_files(folder: str | Path, extensions: Collection[str]) -> Counter:
    """Return how many files have other extensions, by extension."""
    with os.scandir(folder) as entries:
        found = [kind for e in entries if (kind := extension_of(e.name)) not in extensions and kind and e.is_file()]
    return Counter(found)


def extension_of(name: str) -> str:
    """Return the extension in small letters, without the dot; a hidden file has none."""
    return "" if name.startswith(".") or "." not in name else name.rpartition(".")[2].lower()


def can_read(extension: str) -> bool:
    """Return whether Pillow reads images with this extension."""
    return Image.registered_extensions().get(f".{extension}") in Image.OPEN


def no_such_folder(directory: Path) -> str:
    if directory.exists():
        return f"{directory} is a file, expected the folder that holds the person folders (ID_1, ID_2 …)."
    nearest = next(parent for parent in directory.absolute().parents if parent.is_dir())
    return f"No such folder: {directory}. {nearest} holds {contents(nearest)}."


def explain_no_images(directory: Path, extensions: Sequence[str], flag: str = "--input_dir") -> str:
    """Return why there are no person folders with images in `directory`, and which path to try instead."""
    found = f"No image folder (ID_1, ID_2 …) in {directory}; it holds {contents(directory)}."
    if image_entries(directory, extensions):
        parent = directory.resolve().parent
        if _PERSON.fullmatch(directory.resolve().name) or _person_count(parent, extensions) > 1:
            return f"{found} It looks like one person's folder. Try {flag} {parent}"
        return f"{found} Put each person's images into a folder of their own: {directory}/ID_1, {directory}/ID_2 …"
    below, level = [], [directory]
    for _ in range(4):
        below += level
        level = [folder / name for folder in level for name in person_folders(folder)]
    homes = [folder for folder in below[1:] if _person_count(folder, extensions)]
    if len(homes) > 1 and all(_PERSON.fullmatch(home.name) for home in homes):
        inner = f"{homes[0].name}/{person_folders(homes[0])[0]}/"
        return f"{found} The images lie one level too deep, in {inner} …: put them directly into {homes[0].name}/ …"
    if homes:
        return f"{found} Try {flag} {max(homes, key=lambda home: _person_count(home, extensions))}"
    others = sum((other_files(folder, extensions) for folder in below), Counter())
    if readable := [kind for kind, _ in others.most_common() if can_read(kind)]:
        kinds = join_first(f"{n:,} .{kind}" for kind, n in others.most_common())
        return f"No {either(extensions)} image in {directory}; it holds {kinds}. Try --image_extensions {readable[0]}"
    return f"{found} Expected one folder of {either(extensions)} images per person."


def _person_count(directory: Path, extensions: Collection[str]) -> int:
    return sum(bool(image_entries(directory / name, extensions)) for name in person_folders(directory))


def contents(folder: Path) -> str:
    """Return what a folder holds, in words: "2 folders, a/, b/ and 1 file"."""
    names = person_folders(folder)
    with os.scandir(folder) as entries:
        files = sum(entry.is_file() and not entry.name.startswith(".") for entry in entries)
    parts = [f"{count_of(len(names), 'folder')}, {join_first(f'{name}/' for name in names)}"] if names else []
    parts += [count_of(files, "file")] if files else []
    return " and ".join(parts) or "nothing"


def either(words: Sequence[str]) -> str:
    """Return "png, jpg or jpeg"."""
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def count_of(n: int, word: str) -> str:
    """Return "1 file" or "1,200 files"."""
    return f"{n:,} {word}{'s' * (n != 1)}"
