"""Person folders on disk: which there are, in which order, with which label, and the images in them."""

import errno
import os
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

from PIL import Image

from vavae_tools.runtime.errors import UserError, join_first

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg")
EXTENSIONS = (*IMAGE_EXTENSIONS, "bmp", "webp", "tif", "tiff", "ppm", "pgm")
VALIDATION_SUBSETS = ("validation", "valid", "val", "dev", "test")  # the first one there validates
OF_PROGRAMS = (
    *("__macosx", "@eadir", "@tmp", "#recycle", "@recycle", "#snapshot", "@recently-snapshot", "$recycle.bin"),
    *("recycler", "system volume information", "lost+found", "lost.dir", "__pycache__"),
)
_SMALLER = r"(thumb(s|nails?)?|previews?)"  # copies
_THUMBNAILS = re.compile(rf"[\W_]*{_SMALLER}[\W_]*")
_THUMBNAIL = re.compile(rf"^{_SMALLER}[\W_]+|[\W_]+{_SMALLER}([\W_]*\d+x\d+)?$")

_SUBSET = re.compile(
    r"(?P<train>train(ing)?|trn)|(?P<validation>validat(ion|e)|eval(uation)?)|(?P<valid>valid)|(?P<val>val)"
    r"|(?P<dev>dev)|(?P<test>test(ing)?|tst|hold[\W_]*out)"
)
_OTHER_WORDS = r"(set|data|dataset|images|imgs|pictures|split|x|\d+)"
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


def subset_named(name: str) -> str:
    """Return which subset a folder or dataset holds by its name, "train" or one of `VALIDATION_SUBSETS`, or "".

    >>> subset_named("Training"), subset_named("01_test_images"), subset_named("train2017"), subset_named("test3")
    ('train', 'test', 'train', '')
    """
    before, after = rf"^{_OTHER_WORDS}[\W_]+", r"[\W_]*(set|data|images|imgs|pictures|split|[12]\d{3})?$"
    word = re.sub(after, "", re.sub(before, "", name.casefold()))
    return match.lastgroup if (match := _SUBSET.fullmatch(word)) else ""


def choose_subset_names(names: Collection[str], train: str = "train") -> list[str]:
    """Return the name of what trains, then, in the order of `VALIDATION_SUBSETS`, of what validates.

    `train` is a name; only "train" itself is found in other words for it too. Without it the list is empty.
    """
    kinds = {name: subset_named(name) for name in sorted(names)}
    same = [name for name, kind in kinds.items() if name.casefold() == train.casefold() or kind == train]
    if not same:
        return []
    first = train if train in names else same[0]
    others = [name for kind in VALIDATION_SUBSETS for name in (kind, *kinds) if kinds.get(name) == kind]
    return list(dict.fromkeys([first, *(name for name in others if name not in same)]))


def list_folders(
    directory: str | Path, extensions: Collection[str] = IMAGE_EXTENSIONS, passed: list[str] | None = None
) -> dict[str, list[Path]]:
    """Return each person with its images, both in natural order; a folder may be empty. `passed`: `image_entries`."""
    directory = Path(directory)
    if not directory.is_dir():
        raise UserError(no_such_folder(directory))
    found = {}
    for person, names in persons(directory).items():
        entries = (entry for name in names for entry in image_entries(directory / name, extensions, passed))
        found[person] = [Path(entry.path) for entry in entries]
    return found


def persons(directory: str | Path) -> dict[str, list[str]]:
    """Return each person, in natural order, with its folders in `directory`: one, named as the person.

    Folders whose names differ only in how Unicode writes an accent are one person, and a name that is no UTF-8 is read
    as Latin-1.
    """
    same = defaultdict(list)
    for name in person_folders(directory):
        same[unicodedata.normalize("NFC", as_text(name))].append(name)
    found = {as_text(names[0]) if len(names) == 1 else person: names for person, names in same.items()}
    return dict(sorted(found.items(), key=lambda item: natural_key(item[0])))


def refuse_subsets_as_persons(directory: Path, names: Collection[str], hold_folders: bool = False) -> None:
    """Raise a UserError where all or the training one of these folders of images are subsets by their names."""
    kinds = {name: subset_named(name) for name in names}
    subsets = [name for name, kind in kinds.items() if kind]
    if len(subsets) < 2 or not ("train" in kinds.values() or all(kinds.values())):
        return
    if hold_folders:
        found = f"{directory} holds {join_first(f'{name}/' for name in subsets)}, and no person's folder in train/"
        raise UserError(f"{found}: rename the one that trains to train, or name it with data.train_split=NAME")
    first, *_ = subsets = choose_subset_names(subsets) or subsets
    found = f"{join_first(f'{name}/' for name in subsets)} hold images of their own, and are subsets, no persons"
    hint = f"Put each person's images into a folder of their own, as {first}/ID_1, {first}/ID_2 …"
    raise UserError(f"{directory}: {found}. {hint}")


def as_text(name: str) -> str:
    """Return a file's name, read as Latin-1 where it is no UTF-8."""
    return name if name.isascii() or is_utf8(name) else os.fsencode(name).decode("latin-1")


def is_utf8(path: str | Path) -> bool:
    return not any("\ud800" <= letter <= "\udfff" for letter in str(path))


@contextmanager
def folder_errors(folder: str | Path) -> Iterator[None]:
    """Raise a UserError that names a folder which cannot be read: what is in it would be left out in silence."""
    try:
        yield
    except OSError as error:
        where = error.filename or folder
        hint = "make it readable, or move it away"
        raise UserError(f"The folder {where} cannot be read ({error.strerror}): {hint}") from None


def person_folders(directory: str | Path) -> list[str]:
    """Return the names of the folders in `directory`, in natural order.

    Hidden folders, those of programs, and links to where `directory` itself lies are no persons. A link to a folder
    that is gone is refused: a person would be left out in silence.
    """
    with folder_errors(directory), os.scandir(directory) as entries:
        there = [e for e in entries if not is_passed_over(e.name)]
        found = [e for e in there if e.is_dir()]
        for entry in there:
            if entry.is_symlink() and not extension_of(entry.name) and not Path(entry).exists():
                raise FileNotFoundError(errno.ENOENT, f"a link to {Path(entry).readlink()}, which is gone", entry.path)
        here = Path(os.path.realpath(directory)) if any(e.is_symlink() for e in found) else None
    loops = {e.name for e in found if e.is_symlink() and here.is_relative_to(os.path.realpath(e.path))}
    return sorted((e.name for e in found if e.name not in loops), key=natural_key)


def passed_over(directory: str | Path) -> list[str]:
    """Return the paths of folders in `directory` that programs keep beside images, but for hidden ones."""
    with folder_errors(directory), os.scandir(directory) as entries:
        names = (e.name for e in entries if not e.name.startswith(".") and is_passed_over(e.name) and e.is_dir())
        return sorted(f"{Path(directory, name)}/" for name in names)


def note_of_passed(passed: Sequence[str], root: Path) -> list[str]:
    """Return a line about thumbnails and folders of programs in `root` that were left out, if there are any."""
    names = [path.removeprefix(f"{root}/") for path in passed]
    return [f"{len(names):,} passed over, thumbnails or of programs: {join_first(names)}"] if names else []


def is_passed_over(name: str) -> bool:
    """Return whether a folder of this name is hidden, or holds what a program keeps beside images."""
    small = name.casefold()
    return name.startswith(".") or small in OF_PROGRAMS or _THUMBNAILS.fullmatch(small) is not None


def image_entries(folder: str | Path, extensions: Collection[str], passed: list | None = None) -> list[os.DirEntry]:
    """Return the files with these extensions in natural order; a link that leads nowhere is among them.

    Where these are somebody's own, `passed` gets the paths of thumbnails of others among them, which are left out.
    """
    with folder_errors(folder), os.scandir(folder) as entries:
        named = [e for e in entries if extension_of(e.name) in extensions]
        found = [e for e in named if e.is_file() or (e.is_symlink() and not Path(e).exists())]  # no pipe
    if passed is not None:
        copies = _thumbnails([e.name for e in found])
        passed += [str(Path(folder, name)) for name in sorted(copies)]
        found = [e for e in found if e.name not in copies]
    return sorted(found, key=lambda e: natural_key(e.name))


def _thumbnails(names: Collection[str]) -> set[str]:
    """Return which of these are smaller copies of others, as thumb_a.jpg and a.thumb.png are of a.png."""
    stem_of = {name: name.rpartition(".")[0].casefold() for name in names}
    originals = {name: _THUMBNAIL.sub("", stem) for name, stem in stem_of.items()}
    stems = set(stem_of.values())
    return {name for name, original in originals.items() if original != stem_of[name] and original in stems}


def files_below(
    folder: Path,
    extensions: Collection[str],
    root: Path | None = None,
    seen: set[str] | None = None,
    passed: list[str] | None = None,
) -> Iterator[Path]:
    """Yield the files with these extensions at any depth, those of each folder in natural order.

    A folder is looked into once, however many links lead to it (`seen` are those that were), and not through a link
    within `root`, where it is another's. What is no folder has no files. `passed` gets what `image_entries` and
    `passed_over` leave out.
    """
    seen, here = set() if seen is None else seen, os.path.realpath(folder)
    if here not in seen and folder.is_dir():
        seen.add(here)
        if passed is not None:
            passed += passed_over(folder)
        yield from (folder / entry.name for entry in image_entries(folder, extensions, passed))
        for below in (folder / name for name in person_folders(folder)):
            if root is None or not (below.is_symlink() and below.resolve().is_relative_to(root.resolve())):
                yield from files_below(below, extensions, root, seen, passed)


def other_files(folder: str | Path, extensions: Collection[str]) -> Counter:
    with os.scandir(folder) as entries:
        found = [kind for e in entries if (kind := extension_of(e.name)) not in extensions and kind and e.is_file()]
    return Counter(found)


def extension_of(name: str) -> str:
    """Return the extension in small letters, without the dot; a hidden file has none."""
    return "" if name.startswith(".") or "." not in name else name.rpartition(".")[2].lower()


def can_read(extension: str) -> bool:
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
        return f"{found} Try {flag} {best_home(homes, extensions)}"
    others = sum((other_files(folder, extensions) for folder in below), Counter())
    if readable := [kind for kind, _ in others.most_common() if can_read(kind)]:
        kinds = join_first(f"{n:,} .{kind}" for kind, n in others.most_common())
        hint = f"Try --image_extensions {','.join(readable)}"
        return f"No {either(extensions)} image in {directory}; it holds {kinds}. {hint}"
    return f"{found} Expected one folder of {either(extensions)} images per person."


def best_home(folders: Sequence[Path], extensions: Collection[str]) -> Path:
    """Return the folder with most images in person folders; one that trains goes before one that validates."""

    def rank(folder: Path) -> tuple:
        return subset_named(folder.name) in ("", "train"), sum(map(len, list_folders(folder, extensions).values()))

    return max(folders, key=rank)


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
