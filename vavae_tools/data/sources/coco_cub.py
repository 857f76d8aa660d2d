"""COCO (Lin et al. 2014) and CUB-200-2011 (Wah et al. 2011) with their captions, as their archives unpack."""

import json
import re
from collections.abc import Sequence
from pathlib import Path

from vavae_tools.data.captions import NamedImages, missing_images, read_text
from vavae_tools.data.folders import contents, count_of
from vavae_tools.runtime.errors import UserError

# ---- COCO


def coco_subsets(
    root: Path, annotations: str | Path | None, images: str | Path | None, notes: list[str]
) -> list[NamedImages]:
    """Return what trains, and what validates where it is there; `notes` gets remarks.

    Args:
        annotations, images: the captions' file and the images' folder, where they have other than the usual names.
    """
    train = _annotations(root) if annotations is None else _given(root, annotations)
    subsets = [_coco_subset(root, train, images)]
    val = train.with_name(train.name.replace("train", "val"))
    if val != train and val.is_file():
        found = _coco_subset(root, val, images)
        if len(missing_images(found.folder, found.captions)) < len(found.captions):
            subsets.append(found)
        else:
            notes.append(f"none of the images of {val.name} is there: some of {train.name} are held out instead")
    return subsets


def _annotations(root: Path) -> Path:
    for pattern in ("captions_train*.json", "captions*.json"):
        for folder in (root / "annotations", root):
            if found := sorted(folder.glob(pattern)):
                return found[-1]
    found = f"No captions_train2017.json in {root / 'annotations'} or {root}, which holds {contents(root)}"
    raise UserError(f"{found}: put it there, or name the file: data.annotations=FILE")


def _given(root: Path, path: str | Path) -> Path:
    """Return a path as it stands, or below the data set's."""
    path = Path(path).expanduser()
    return path if path.exists() else root / path


def _coco_subset(root: Path, annotations: Path, images: str | Path | None) -> NamedImages:
    captions = read_coco(annotations)
    name = annotations.stem.removeprefix("captions_")
    folders = [root / name, root / "images" / name, root / "images", root]
    if images is not None:
        folders = [_given(root, images) / name, _given(root, images), *folders]
        if not folders[1].is_dir():
            raise UserError(f"No such folder of images: {folders[1]}")
    folder = min(folders, key=lambda folder: len(missing_images(folder, captions)))  # the first of equals
    return NamedImages(folder, annotations, captions)


def read_coco(path: Path) -> dict[str, list[str]]:
    """Return image → captions, of COCO's JSON with captions."""
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): fetch it again") from None
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        captions: dict[str, list[str]] = {name: [] for name in names.values()}
        for annotation in content["annotations"]:
            captions[names[annotation["image_id"]]].append(annotation["caption"])
    except (KeyError, TypeError) as error:
        expected = "images with id and file_name, annotations with the image_id of one of them and caption"
        raise UserError(f"{path} lacks {error} of COCO's captions: expected {expected}") from None
    if not captions:
        raise UserError(f"{path} names no images")
    return captions


# ---- CUB: birds with sentences, written about them or made of their attributes

_TEXT_FOLDERS = ("text_c10", "text", "text/text_c10", "captions", "cvpr2016_cub/text_c10")


def cub_subsets(path: Path, notes: list[str]) -> list[NamedImages]:
    """Return what trains, and what validates, of CUB_200_2011 or the folder that it is in; `notes` gets remarks."""
    root = next((folder for folder in (path, path / "CUB_200_2011") if (folder / "images.txt").is_file()), None)
    if root is None:
        raise UserError(f"No images.txt in {path}, which holds {contents(path)}: expected the folder CUB_200_2011")
    names, subset_of = _numbered_lines(root / "images.txt"), _numbered_lines(root / "train_test_split.txt", False)
    captions = _cub_captions(root, names, notes)
    subsets: dict[str, dict[str, Sequence[str]]] = {"1": {}, "0": {}}  # as train_test_split.txt says it
    for number, name in names.items():
        subset = subset_of.get(number, "1")
        if subset not in subsets:
            raise UserError(f"{root / 'train_test_split.txt'} says {subset!r} of image {number}, expected 1 or 0")
        subsets[subset][name] = captions[number]
    return [NamedImages(root / "images", root / "images.txt", of_subset) for of_subset in subsets.values() if of_subset]


def _numbered_lines(path: Path, required: bool = True) -> dict[str, str]:
    """Return the lines "number what" of a file of CUB."""
    lines = {}
    for place, line in enumerate(read_text(path).split("\n") if required or path.is_file() else [], 1):
        if line.strip():
            number, _, what = line.strip().partition(" ")
            if not what:
                raise UserError(f"{path}, line {place:,}, is {line.strip()!r}: expected a number and a word")
            lines[number] = what.strip()
    return lines


def _cub_captions(root: Path, names: dict[str, str], notes: list[str]) -> dict[str, Sequence[str]]:
    """Return image's number → captions: those of the first folder with texts, made up for images without."""
    captions: dict[str, Sequence[str]] = {}
    for folder in (home / name for home in (root, root.parent) for name in _TEXT_FOLDERS):
        texts = {number: folder / Path(name).with_suffix(".txt") for number, name in names.items()}
        if folder.is_dir() and (there := {number: text for number, text in texts.items() if text.is_file()}):
            lines = {number: read_text(text).split("\n") for number, text in there.items()}
            captions = {number: of_image for number, of_image in lines.items() if any(map(str.strip, of_image))}
            break
    if lacking := {number: name for number, name in names.items() if number not in captions}:
        notes.append(f"captions of {count_of(len(lacking), 'image')} of {root} made from class names and attributes")
        attributes = _certain_attributes(root)
        for number, name in lacking.items():  # in the folder of its class
            captions[number] = bird_sentences(name.partition("/")[0], attributes.get(number, []))
    return captions


def _certain_attributes(root: Path) -> dict[str, list[str]]:
    """Return image's number → the names of its attributes that somebody was certain of, in their order."""
    labels = root / "attributes" / "image_attribute_labels.txt"
    places = (root / "attributes" / "attributes.txt", root / "attributes.txt", root.parent / "attributes.txt")
    called = next((path for path in places if path.is_file()), None)
    if called is None or not labels.is_file():
        return {}
    names = _numbered_lines(called)
    of_each: dict[str, list[str]] = {}
    # image, attribute, whether it is there, certainty (3 probably, 4 definitely), seconds: 3.7 million lines
    for image, attribute in re.findall(r"^(\d+) (\d+) 1 [34]\b", read_text(labels), re.MULTILINE):
        if attribute in names:
            of_each.setdefault(image, []).append(names[attribute])
    return of_each


def bird_sentences(class_name: str, attributes: Sequence[str]) -> tuple[str, ...]:
    """Return sentences about a bird of CUB, by the name of its class and its attributes, of which each names three.

    >>> bird_sentences("149.Brown_Thrasher", ["has_wing_color::brown", "has_size::small_(5_-_9_in)"])
    ('a brown thrasher', 'a small bird with brown wing')
    """
    name = re.sub(r"^\d+\.", "", class_name).replace("_", " ").lower()
    values: dict[tuple[str, str], list[str]] = {}
    for attribute in attributes:
        what, _, value = attribute.removeprefix("has_").replace("_", " ").partition("::")
        part, _, kind = what.rpartition(" ")
        values.setdefault((part, kind), []).append(re.sub(r"\s*\(.*", "", value).replace("-", " "))
    known = [*values.pop(("", "size"), [])[:1], *values.pop(("primary", "color"), [])[:1]]
    phrases = [
        f"{' and '.join(of_part).removesuffix(part).strip()} {part}"  # of a tail the value is "forked tail"
        for (part, kind), of_part in values.items()
        if part and kind in ("color", "pattern", "shape")
    ]
    who = f"a {' '.join([*known, 'bird'])}"
    name = f"{'an' if name[0] in 'aeiou' else 'a'} {name}"
    return name, *(f"{who} with {', '.join(phrases[start : start + 3])}" for start in range(0, len(phrases), 3))
