"""Images as files store them → upright, of 8 bits; without torch, which the split has no need of."""

import hashlib
from contextlib import suppress

from PIL import ExifTags, Image, ImageOps


def is_grey(image: Image.Image) -> bool:
    """Return whether an image is stored in grey, of any depth, with or without alpha."""
    return Image.getmodebase(image.mode) == "L"


def turn_upright(image: Image.Image) -> bool:
    """Turn a newly opened image in place as its EXIF orientation says, and return whether it said so."""
    turned = False
    with suppress(Exception):  # of any class where its EXIF is damaged: then it is taken as it is stored
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        if turned:
            image.load()  # a TIFF is turned here
            ImageOps.exif_transpose(image, in_place=True)
    return turned


WHITES = (1, *(4**k - 1 for k in range(1, 17)))  # 1, 3, 15, 63, 255, 1,023 … 2^32 − 1


def white_of(image: Image.Image) -> int | None:
    """Return the least of `WHITES` that holds an image of more than 8 bits, integer or float; None for 8 bits."""
    if image.mode[0] not in "IF":
        return None
    import numpy as np  # not for --help

    low, high = np.asarray(image).min(), np.asarray(image).max()
    if not (low >= 0 and high <= WHITES[-1]):  # NaN too
        raise ValueError(f"numbers from {low:g} to {high:g}, expected 0 for black to {WHITES[-1]:,}: save it in 8 bits")
    return next(white for white in WHITES if high <= white * (1.01 if image.mode[0] == "F" else 1))


def convert_channels(image: Image.Image, channels: int, white: int | None = None) -> Image.Image:
    """Return an image with 3 channels or 1, 8 bits each; alpha is dropped, and of more bits `white` becomes 255."""
    if own := white_of(image):
        import numpy as np

        array = np.asarray(image).astype(np.float64) * (255 / (white or own))
        image = Image.fromarray((array + 0.5).clip(0, 255).astype(np.uint8))
    return image.convert("RGB" if channels == 3 else "L")


def pixel_hash(image: Image.Image) -> str:
    """Return a hash of what training sees of an image, upright, whatever its file's format and metadata are."""
    turn_upright(image)
    digest = hashlib.blake2b(f"{image.size}".encode(), digest_size=16)
    digest.update(convert_channels(image, 3).tobytes())
    return digest.hexdigest()
