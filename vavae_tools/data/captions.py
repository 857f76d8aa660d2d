"""Pictures with sentences about them: COCO, CUB-200-2011, folders of one's own, Hugging Face datasets on the disk."""

import hashlib
from difflib import get_close_matches
from pathlib import Path

from vavae_tools.data import hugging_face
from vavae_tools.data.birds import cub_sides
from vavae_tools.data.captioned import CaptionedDataModule
from vavae_tools.data.captioned_shapes import captioned_shape_data
from vavae_tools.data.coco import coco_sides
from vavae_tools.data.decoded import DecodedPictures
from vavae_tools.data.folders import no_such_folder
from vavae_tools.data.own_captions import dataset_sides, own_sides
from vavae_tools.data.picture_sets import hold_out
from vavae_tools.errors import UserError

DATASETS = ("coco", "cub", "custom", "shapes")


def caption_data(
    dataset_name: str,
    dataset_path: str | Path | None = None,
    image_size: int | tuple[int, int] | None = None,
    num_samples: int | None = None,
    batch_size: int = 16,
    num_workers: int | None = None,
    seed: int = 0,
    val_share: float = 0.05,
    skip_missing: bool = False,
    crop: str = "adm",
    annotations: str | Path | None = None,
    pictures: str | Path | None = None,
    channels: int = 3,
    progress: bool = True,
) -> CaptionedDataModule:
    """Captioned pictures as a data module.

    `dataset_name` says what `dataset_path` is:

    - coco: `annotations/captions_train2017.json` (or another year) and the pictures in `train2017/`,
      `images/train2017/` or `images/`; where val's are there as well, they validate;
    - cub: CUB-200-2011, with captions in `text_c10/` or `text/`, a sentence a line, where they are there, else with
      sentences made from class names and attributes; its test side validates;
    - custom: a folder with `metadata.jsonl` or `.csv` (a file name and a caption, or a list of captions), or with a
      .txt beside each picture, a caption a line, or with `train/` and `validation/` that are such; the jsonl or csv
      itself; or a Hugging Face dataset, as `save_to_disk` writes it;
    - shapes: made up here, see `captioned_shapes`; no path.

    Args:
        image_size: pixels, one number or (height, width); by default 256, of shapes 32.
        num_samples: at most so many pictures of each side, chosen by seed and name, the same on every machine (of
            shapes: how many there are). What is held out is held out of these.
        batch_size, num_workers: see `PictureSetDataModule`.
        seed: of order, choice of captions, `num_samples`, and what is held out.
        val_share: where nothing validates, this share of the pictures is held out; 0 for none.
        skip_missing: leave out pictures that are named but not there, or have no caption, instead of refusing them.
        crop: "adm", the centre (`crops.centre_crop`), or "none", the whole picture resized.
        annotations, pictures: of coco, the file with the captions and the folder with the pictures, where they are not
            found by their usual names.
        channels: 3, or 1 for grey.

    Raises:
        UserError: an unknown name, nothing there, files that cannot be read as what they are, missing pictures, empty
            captions, or settings that cannot be.
    """
    name = str(dataset_name).lower()
    if name not in DATASETS:
        near = get_close_matches(name, DATASETS, 1, 0.4)
        meant = f"; did you mean {near[0]}?" if near else "."
        raise UserError(f"No data set {dataset_name!r}{meant} There are {', '.join(DATASETS)}")
    if num_samples is not None and (not isinstance(num_samples, int) or num_samples < 1):
        raise UserError(f"num_samples {num_samples}: expected a whole number of at least 1, or none for all pictures")
    if not 0 <= val_share < 1:
        raise UserError(f"val_share {val_share:g}: expected a share from 0 to below 1, such as 0.05")
    if name == "shapes":
        size = 32 if image_size is None else image_size
        return captioned_shape_data(num_samples or 10_000, size, batch_size, num_workers or 0, seed, val_share)
    if dataset_path is None:
        raise UserError(f"The data set {name} needs dataset_path, the folder where it lies")
    path = Path(dataset_path).expanduser()
    if not path.is_dir() and not (name == "custom" and path.is_file()):
        raise UserError(f"{path} is a file, expected a folder" if path.is_file() else no_such_folder(path))
    options = {"image_size": image_size or 256, "crop": crop, "channels": channels, "progress": progress}
    notes: list[str] = []
    if name == "custom" and path.is_dir() and hugging_face.is_dataset(path):
        sides = dataset_sides(path, skip_missing, notes, options)
    else:
        if name == "coco":
            found = coco_sides(path, annotations, pictures, notes)
        else:
            found = cub_sides(path, notes) if name == "cub" else own_sides(path, notes)
        sides = [one.side(skip_missing, notes, options) for one in found]
    if num_samples is not None:
        sides = [_some(side, num_samples, seed) for side in sides]
    train, val = sides if len(sides) > 1 else hold_out(sides[0], val_share, seed)
    return CaptionedDataModule(train, val, batch_size, num_workers, seed, notes)


def _some(side: DecodedPictures, count: int, seed: int) -> DecodedPictures:
    """So many of the pictures, those with the least hashes of seed and name."""
    if count >= len(side):
        return side
    ranks = [
        hashlib.blake2b(f"samples {seed}/{name}".encode("utf-8", "surrogateescape")).digest() for name in side.names
    ]
    return side.part(sorted(sorted(range(len(side)), key=ranks.__getitem__)[:count]))
