"""How a picture of any size becomes one of the size wanted: its middle, or the whole of it."""

from collections.abc import Callable

from PIL import Image

from vavae_tools.errors import UserError

Size = tuple[int, int]
"""(height, width) in pixels"""


def centre_crop(picture: Image.Image, size: Size) -> Image.Image:
    """The middle of a picture, as large as can be, as class-to-image models see ImageNet (Dhariwal & Nichol 2021).

    Halved by averages while it stays at least as large as asked for, so that no pixel is passed over; then resized
    bicubically until it just covers `size`; then what lies over is cut off, equally on both sides.
    """
    height, width = size
    while picture.height >= 2 * height and picture.width >= 2 * width:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = max(height / picture.height, width / picture.width)
    covering = (round(picture.width * scale), round(picture.height * scale))
    picture = picture.resize(covering, Image.Resampling.BICUBIC)  # a copy where nothing is to be done
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def resize_whole(picture: Image.Image, size: Size) -> Image.Image:
    """The whole picture, resized bicubically: its axes keep their ends, as those of a spectrogram must."""
    return picture.resize((size[1], size[0]), Image.Resampling.BICUBIC)


CROPS: dict[str, Callable[[Image.Image, Size], Image.Image]] = {"adm": centre_crop, "none": resize_whole}


def check_crop(crop: str) -> None:
    """
    Raises:
        UserError: no such way to crop.
    """
    if crop not in CROPS:
        raise UserError(f"No crop {crop!r}; there are {', '.join(CROPS)}")
