"""COCO (Lin et al. 2014) with its captions, as its archives unpack."""

import json
from pathlib import Path

from vavae_tools.data.captions import NamedPictures, missing_pictures, read_text
from vavae_tools.data.folders import contents
from vavae_tools.runtime.errors import UserError


def coco_sides(
    root: Path, annotations: str | Path | None, pictures: str | Path | None, notes: list[str]
) -> list[NamedPictures]:
    """What trains, and what validates where it is there.

    Args:
        annotations, pictures: the file with the captions and the folder with the pictures, where they are not found by
            their usual names.
        notes: gets lines about what was left out.

    Raises:
        UserError: no captions, or a file that is not COCO's.
    """
    train = _annotations(root) if annotations is None else _given(root, annotations)
    sides = [_coco_side(root, train, pictures)]
    val = train.with_name(train.name.replace("train", "val"))
    if val != train and val.is_file():
        # where the pictures' folder was given, val's may still stand beside it
        there = [one for one in (_coco_side(root, val, None), _coco_side(root, val, pictures)) if _any_there(one)]
        if there:
            sides.append(there[0])
        else:
            notes.append(f"none of the pictures of {val.name} is there: some of {train.name} are held out instead")
    return sides


def _any_there(found: NamedPictures) -> bool:
    return len(missing_pictures(found.folder, found.captions)) < len(found.captions)


def _annotations(root: Path) -> Path:
    for pattern in ("captions_train*.json", "captions*.json"):
        for folder in (root / "annotations", root):
            found = sorted(folder.glob(pattern))
            if found:
                return found[-1]
    raise UserError(
        f"No captions_train2017.json in {root / 'annotations'} or {root}, which holds {contents(root)}: put it there, "
        "or name the file: data.annotations=FILE"
    )


def _given(root: Path, path: str | Path) -> Path:
    """A path as it stands, or below the data set's."""
    path = Path(path).expanduser()
    return path if path.exists() else root / path


def _coco_side(root: Path, annotations: Path, pictures: str | Path | None) -> NamedPictures:
    captions = read_coco(annotations)
    name = annotations.stem.removeprefix("captions_")
    usual = [root / name, root / "images" / name, root / "images", root]
    folders = usual if pictures is None else [_given(root, pictures) / name, _given(root, pictures)]
    folders = [folder for folder in folders if folder.is_dir()]
    if not folders:
        raise UserError(f"No such folder of pictures: {_given(root, pictures)}")
    return NamedPictures(
        min(folders, key=lambda folder: len(missing_pictures(folder, captions))), annotations, captions
    )


def read_coco(path: Path) -> dict[str, list[str]]:
    """Picture → captions, of COCO's JSON with captions.

    Raises:
        UserError: it is no JSON, or holds something else.
    """
    text = read_text(path)
    try:
        content = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path} is no JSON ({error}): fetch it again") from None
    try:
        names = {image["id"]: image["file_name"] for image in content["images"]}
        captions: dict[str, list[str]] = {name: [] for name in names.values()}
        for annotation in content["annotations"]:
            captions[names[annotation["image_id"]]].append(annotation["caption"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} lacks {error} of COCO's captions: expected images with id and file_name, annotations with the "
            "image_id of one of them and caption, as captions_train2017.json has them"
        ) from None
    if not captions:
        raise UserError(f"{path} names no pictures")
    return captions
