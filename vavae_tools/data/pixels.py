"""The one place where pixels become numbers in [-1, 1] and pictures again, and where files of pictures are written."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vavae_tools.errors import UserError
from vavae_tools.files import written_whole


def to_unit(pixels: Tensor) -> Tensor:
    """Pixels uint8 0…255 → float32 in [-1, 1], any shape."""
    return pixels.float().div_(127.5).sub_(1.0)


def to_pixels(pictures: Tensor) -> Tensor:
    """Pictures in [-1, 1] (what lies outside is clipped) → uint8 0…255, rounded, any shape."""
    return pictures.float().add(1.0).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def is_grey(picture: Image.Image) -> bool:
    """Whether a Pillow picture is stored in grey: black and white, 8, 16 or 32 bits, with or without alpha."""
    return Image.getmodebase(picture.mode) == "L"


def in_channels(picture: Image.Image, channels: int) -> Image.Image:
    """A Pillow picture with 3 channels (RGB) or 1 (grey, mode L), 8 bits each.

    Of 16 bits, 65,535 becomes white, and what lies above it in 32 bits too. Alpha is dropped: a transparent pixel keeps
    the colour that it is stored with.
    """
    if picture.mode.startswith("I"):  # integers of 16 or 32 bits, of which Pillow's own conversion makes 255 white
        array = (np.asarray(picture).clip(0, 65535).astype(np.uint32) + 128) // 257
        picture = Image.fromarray(array.astype(np.uint8))
    return picture.convert("RGB" if channels == 3 else "L")


def save_picture(pixels: Tensor, path: Path) -> None:
    """Write one picture, uint8 (C, H, W), under `path` (its ending names the format); it is whole or not there."""
    array = pixels.permute(1, 2, 0).cpu().numpy()
    picture = Image.fromarray(array.squeeze(2) if array.shape[2] == 1 else array)
    with written_whole(path) as partial:
        picture.save(partial, format=Image.registered_extensions()[path.suffix.lower()], quality=95)


@contextmanager
def readable(name: str | Path) -> Iterator[None]:
    """Name the picture that cannot be decoded.

    Raises:
        UserError: in place of what Pillow raises.
    """
    try:
        yield
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(
            f"{name} cannot be read as a picture ({error}): take it out or put a whole one there; data_split.py names "
            "such files and leaves them out"
        ) from None
