"""Latents that know what is in an image: their alignment with a frozen vision foundation model (Yao & Wang 2025)."""

import hashlib
import math
from functools import cached_property, partial
from pathlib import Path
from typing import Protocol

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vavae_tools.autoencoders.encoders import patch_tokens, silent_loading
from vavae_tools.data.encoded import Rows, Store, agree, cut, encode, open_shard
from vavae_tools.data.images import DecodedImages, to_unit
from vavae_tools.runtime.console import print_beside_bars
from vavae_tools.runtime.errors import UserError, contents, in_home
from vavae_tools.runtime.files import free_bytes, load_model, read_json, weights_digest
from vavae_tools.runtime.machine import Computing, in_float32
from vavae_tools.runtime.ranks import Ranks

LARGEST_CACHE = 8 * 2**30  # bytes on the disk: features of 16,000 images on a grid of 16×16 by a ViT-L

MODEL_TYPES = {"dinov2": "Dinov2Model", "dinov2_with_registers": "Dinov2WithRegistersModel", "vit_mae": "ViTMAEModel"}


class Foundation(Protocol):
    """A frozen encoder of images; `digest` is a hash of all that its features follow from."""

    channels: int
    digest: str

    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return features (B, channels, h, w) for a grid (h, w), without a graph, of images (B, C, H, W) in [-1, 1]."""


class TransformersFoundation:
    """The patch tokens after the last layer's norm of a ViT from transformers; a `Foundation`.

    As the reference does, images keep the range [-1, 1], without the model's own mean and standard deviation, and are
    resized (bilinear) so that its patches fall on the grid asked for: 224 pixels for 16×16 patches of 14. Position
    embeddings are resampled as the reference's library timm does it, not as transformers, whose way depends on its
    version. It is no `nn.Module`, so it stays in evaluation mode and out of the checkpoints of what holds it.

    Args:
        model: Dinov2Model, Dinov2WithRegistersModel or ViTMAEModel; it is changed in place.
    """

    def __init__(self, model: nn.Module) -> None:
        config = model.config
        self.model = model.float().eval().requires_grad_(False)
        self.channels: int = config.hidden_size
        self.patch_size: int = config.patch_size
        if config.model_type == "vit_mae":
            config.mask_ratio = 0.0  # every patch is seen
        embeddings = model.embeddings
        embeddings.interpolate_pos_encoding = partial(_positions, embeddings.position_embeddings, self.patch_size)

    def to(self, device: str | torch.device) -> "TransformersFoundation":
        self.model.to(device)
        return self

    @torch.no_grad()
    def __call__(self, images: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return features float32 (B, channels, h, w) of images (B, C, H, W) in [-1, 1], in RGB or grey."""
        height, width = grid
        size = (height * self.patch_size, width * self.patch_size)
        images = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False)
        tokens = patch_tokens(self.model, images.expand(-1, 3, -1, -1), height * width)
        return rearrange(tokens, "b (h w) c -> b c h w", h=height).float()

    @cached_property
    def digest(self) -> str:
        config = self.model.config
        settings = (config.model_type, config.num_attention_heads, config.hidden_act, config.layer_norm_eps)
        return hashlib.sha256(f"{settings} {self.patch_size} {weights_digest(self.model)}".encode()).hexdigest()


def _positions(table: Tensor, patch_size: int, tokens: Tensor, height: int, width: int) -> Tensor:
    """Return position embeddings (1, 1 + h·w, D) for images of height × width pixels, in the model's place."""
    grid = (height // patch_size, width // patch_size)
    side = math.isqrt(table.shape[1] - 1)
    if grid == (side, side):
        return table
    patches = rearrange(table[:, 1:], "1 (h w) c -> 1 c h w", h=side)
    patches = F.interpolate(patches, size=grid, mode="bicubic", align_corners=False, antialias=True)
    return torch.cat([table[:, :1], rearrange(patches, "1 c h w -> 1 (h w) c")], dim=1)


def load_foundation(folder: str | Path) -> TransformersFoundation:
    """Load a frozen DINOv2 (with or without registers) or ViT-MAE from its folder in transformers' format."""
    import transformers

    folder = in_home(folder)
    config = folder / "config.json"
    if not config.is_file():
        instead = "name a folder such as facebook/dinov2-large's (config.json, model.safetensors), or take vf_weight 0"
        raise UserError(f"No vision foundation model in {folder}, which {contents(config.parent)}: {instead}")
    model_type = read_json(config).get("model_type")
    if model_type not in MODEL_TYPES:
        expected = f"one of {', '.join(MODEL_TYPES)}, in transformers' format (timm's is another)"
        raise UserError(f"{folder} holds a model of type {model_type!r}, expected {expected}")
    with silent_loading():
        return TransformersFoundation(load_model(getattr(transformers, MODEL_TYPES[model_type]), folder))


@in_float32
def alignment_loss(
    projected: Tensor, features: Tensor, distance_margin: float = 0.0, cosine_margin: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Return two means that say how far latents are from a foundation model's features; their sum is VA-VAE's VF loss.

    The marginal distance-matrix similarity compares, inside each image, the cosines between all pairs of positions;
    the marginal cosine similarity compares each position's vector itself. Differences up to the margins cost nothing.

    Args:
        projected: latents brought to the features' channels, (B, channels, h, w).
        features: (B, channels, h, w); no gradient flows there.
    """
    features = features.detach()
    difference = _similarities(projected) - _similarities(features)  # (B, h·w, h·w)
    distance = F.relu(difference.abs() - distance_margin).mean()
    cosine = F.relu(1 - cosine_margin - F.cosine_similarity(features, projected, dim=1)).mean()
    return distance, cosine


def _similarities(features: Tensor) -> Tensor:
    unit = F.normalize(features.flatten(2), dim=1)  # (B, C, N)
    return unit.transpose(1, 2) @ unit


def foundation_features(
    foundation: Foundation,
    data: DecodedImages,
    grid: tuple[int, int],
    path: str | Path,
    device: str | torch.device = "cpu",
    batch_size: int = 32,
    progress: bool = True,
    ranks: Ranks | None = None,
) -> Rows | None:
    """Return the features of all images, float16 rows (channels, h, w), computed once and kept in shards.

    Args:
        foundation: is on `device`.
        grid: (h, w) of the latents.
        path: of a safetensors file; the shards are beside it, under its name with a number.
        ranks: those that all call this, and share the work.

    Returns:
        None where they take more than `LARGEST_CACHE` or the disk has: compute the features of each batch as it comes.
    """
    path, ranks, row_bytes = Path(path), ranks or Ranks(), 2 * foundation.channels * math.prod(grid)
    store = Store(path.parent, path.stem)

    def look() -> tuple[str, bool]:
        path.unlink(missing_ok=True)  # one file held them all before there were shards
        settings = (1, foundation.digest, tuple(grid), data.image_size, data.channels)  # 1: the features' form
        key = hashlib.sha256(str(settings).encode())
        for part in data.contents():
            key.update(part)
        needed = store.clear(cut(path.stem, len(data), row_bytes, batch_size, key.hexdigest()))
        return key.hexdigest(), len(data) * row_bytes <= LARGEST_CACHE and needed <= free_bytes(path.parent)

    key, fits = agree(ranks, look, foundation.digest)
    if not fits:
        return None
    shards = cut(path.stem, len(data), row_bytes, batch_size, key)
    encode(
        store,
        {path.stem: shards},
        {path.stem: data},
        lambda _, batch: {"features": foundation(to_unit(batch["images"].to(device)), grid)},
        Computing(None, device, f"Features of this {type(foundation).__name__}", print_beside_bars),
        batch_size,
        ranks=ranks,
        progress=progress,
    )
    return Rows([open_shard(path.parent / name)["features"] for name in shards])
