"""Images and masks that pipelines are given."""

from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from vavae_tools.data.images import to_pixels
from vavae_tools.data.stored import convert_channels
from vavae_tools.runtime.errors import UserError


def pixels_of(image: Any, channels: int, size: tuple[int, int]) -> Tensor:
    """Return uint8 (N, C, H, W) of one image or several.

    Args:
        image: Pillow images of any size and mode, which are converted and resized as training's are, or a tensor
            (C, H, W) or (N, C, H, W), uint8 or in [-1, 1].
        size: (H, W).
    """
    if isinstance(image, Tensor):
        pixels = image[None] if image.ndim == 3 else image
        if pixels.shape[1:] != (channels, *size) or not len(pixels):
            raise UserError(f"image has the shape {tuple(image.shape)}, expected (N, {channels}, {size[0]}, {size[1]})")
        return pixels if pixels.dtype == torch.uint8 else to_pixels(pixels)
    images = [convert_channels(ImageOps.exif_transpose(one), channels) for one in _pillow(image, "image")]
    return _stacked([one.resize(size[::-1], Image.Resampling.BICUBIC) for one in images])


def latent_mask(mask_image: Any, size: tuple[int, int], downsampling: int, name: str = "mask_image") -> Tensor:
    """Return where latents are made anew, bool (N, 1, h, w): wherever any of their pixels is white.

    Args:
        mask_image: one for all or one for each, Pillow images of the size (H, W), or a tensor (H, W), (N, H, W) or
            (N, 1, H, W), bool, uint8 or from 0 to 1.
    """
    if isinstance(mask_image, Tensor):
        mask = mask_image.reshape(-1, 1, *mask_image.shape[-2:])
        white = mask > (127 if mask.dtype == torch.uint8 else 0.5)
    else:
        masks = _pillow(mask_image, name)
        other = [one.size[::-1] for one in masks if one.size[::-1] != size]
        white = torch.zeros(1, 1, *other[0]) > 0 if other else _stacked([one.convert("L") for one in masks]) > 127
    if white.shape[2:] != size:
        (height, width), expected = white.shape[2:], f"{size[0]}×{size[1]} as the images"
        raise UserError(f"{name} has {height}×{width} pixels, expected {expected}: resize it (height × width)")
    if not white.flatten(1).any(1).all():
        raise UserError(f"{name} is black everywhere, so nothing would change: paint white what is made anew")
    return F.max_pool2d(white.float(), downsampling) > 0


def _pillow(image: Any, what: str) -> list[Image.Image]:
    images = list(image) if isinstance(image, list | tuple) else [image]
    others = [type(one).__name__ for one in images if not isinstance(one, Image.Image)]
    if others or not images:
        raise UserError(
            f"{what} is {(others or ['an empty list'])[0]}, expected Pillow images (Image.open) or a tensor"
        )
    return images


def _stacked(images: list[Image.Image]) -> Tensor:
    return torch.from_numpy(np.stack([np.atleast_3d(one) for one in images])).permute(0, 3, 1, 2)


def for_each(given: Tensor, count: int, what: str) -> Tensor:
    """Return rows of what is given, one for all or one for each of `count` labels."""
    if len(given) not in (1, count):
        raise UserError(f"{len(given)} {what}s for {count} labels: give one for all, or one for each")
    return given.expand(count, *given.shape[1:])
