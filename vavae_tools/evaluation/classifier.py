"""Who is it? A small network that learns the persons from real images, and then judges made ones.

In its features distances between sets of images are measured: the usual Inception network has seen photographs alone.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import ConcatDataset
from tqdm.auto import tqdm

from vavae_tools.data.images import DecodedImages, to_unit
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.files import atomic_write
from vavae_tools.runtime.machine import in_float32

BATCH_SIZE = 64
_FORM = 1  # of network and recipe; another form is another cache key


class PersonClassifier(nn.Module):
    """Four blocks of two convolutions, each halving the image; mean over places; one linear layer."""

    def __init__(self, num_classes: int, image_size: tuple[int, int], channels: int = 3) -> None:
        super().__init__()
        blocks, before = [], channels
        stride = 2 * max(1, min(image_size) // 64)  # so that 256 pixels cost about as much as 64
        for width in (16, 32, 64, 128):
            blocks += [*_convolution(before, width, stride), *_convolution(width, width, 1)]
            before, stride = width, 2
        self.blocks, self.head = nn.Sequential(*blocks), nn.Linear(before, num_classes)

    @in_float32
    def features(self, x: Tensor) -> Tensor:
        """Return features (B, D) of images (B, C, H, W) in [-1, 1]."""
        return self.blocks(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    @torch.inference_mode()
    def judge(self, images: Tensor | DecodedImages, batch_size: int = 256) -> tuple[Tensor, Tensor]:
        """Images, uint8 (N, C, H, W) or a folder of them → features (N, D) and labels (N,) on the CPU."""
        self.eval()
        features, labels = [], []
        for rows in torch.arange(len(images)).split(batch_size):
            batch = images[rows] if isinstance(images, Tensor) else images.get_batch(rows.tolist())["images"]
            features.append(self.features(to_unit(batch.to(self.head.weight.device))))
            labels.append(self.head(features[-1]).argmax(dim=1))
        return torch.cat(features).cpu(), torch.cat(labels).cpu()


def _convolution(before: int, after: int, stride: int) -> list[nn.Module]:
    kernel = max(3, stride + 1)  # strides leave no pixel unseen
    convolution = nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(after), nn.SiLU(inplace=True)]


def train_classifier(
    train: DecodedImages | Sequence[DecodedImages],
    num_classes: int,
    steps: int | None = None,
    seed: int = 0,
    device: str | torch.device = "cpu",
    progress: bool = True,
    masks: bool = False,
) -> PersonClassifier:
    """Train a classifier on images; the same images and seed give the same weights on one machine.

    Args:
        train: one set of images, or several of one size that are taken together.
        masks: hide bands of time and frequency from it, as SpecAugment does.
    """
    train = _Together([train] if isinstance(train, DecodedImages) else train)
    steps = default_steps(len(train)) if steps is None else steps
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = PersonClassifier(num_classes, train.image_size, train.channels)
    model = model.to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=max(steps, 2))
    generator, order = torch.Generator().manual_seed(seed), torch.empty(0, dtype=torch.int64)
    for step in tqdm(range(steps), "training the classifier", unit="step", disable=None if progress else True):
        if len(order) < min(BATCH_SIZE, len(train)):
            order = torch.randperm(len(train), generator=generator)
        index, order = order[:BATCH_SIZE], order[BATCH_SIZE:]
        batch = train.get_batch(index)
        draws = Draws(seed, step, index.to(device))
        x = augment(batch["images"].to(device), draws)
        x = mask_bands(x, draws) if masks else x
        loss = F.cross_entropy(model(x), batch["labels"].to(device), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def default_steps(images: int) -> int:
    """Return the steps of ten passes over the data, no fewer than 100 steps, and no more than 2,000."""
    return min(max(100, 10 * images // BATCH_SIZE), 2000)


def augment(images: Tensor, draws: Draws) -> Tensor:
    """Images uint8 (B, C, H, W) → in [-1, 1], a little earlier or later, louder or softer, and noisier.

    Never mirrored: a time–frequency image is not its mirror.
    """
    width = images.shape[3]
    shift = ((draws.uniform("shift", 1) * 2 - 1) * width / 16).round().long()  # (B, 1)
    columns = (torch.arange(width, device=images.device) - shift).clamp(0, width - 1)  # the edge is repeated
    images = images.gather(3, columns[:, None, None, :].expand_as(images))
    gain = 1 + 0.1 * (draws.uniform("gain", 1, 1, 1) * 2 - 1)
    noise = draws.normal("noise", 1, *images.shape[2:]) * (0.08 * draws.uniform("noise level", 1, 1, 1))
    return ((to_unit(images) + 1) * gain - 1 + noise).contiguous(memory_format=torch.channels_last)


def mask_bands(x: Tensor, draws: Draws, count: int = 2, share: float = 0.2) -> Tensor:
    """Set bands of rows and of columns to an image's mean, as in SpecAugment (Park et al. 2019).

    Args:
        x: (B, C, H, W).
        count: bands in each of the two directions.
        share: of an axis, which a band is at most wide.
    """
    mean = x.mean(dim=(1, 2, 3), keepdim=True)
    for dim, name in ((2, "frequency"), (3, "time")):
        size, shape = x.shape[dim], [1, 1, 1, 1]
        shape[dim] = -1
        places = torch.arange(size, device=x.device)
        width = draws.uniform(f"{name} width", count, 1) * share * size  # (B, count, 1)
        start = draws.uniform(f"{name} start", count, 1) * (size - width)
        hidden = ((places >= start) & (places < start + width)).any(dim=1)  # (B, size)
        x = torch.where(hidden.view(len(x), *shape[1:]), mean, x)
    return x


class _Together:
    """Several sets of images as one."""

    def __init__(self, parts: Sequence[DecodedImages]) -> None:
        self.parts, (self.image_size, self.channels) = parts, (parts[0].image_size, parts[0].channels)
        self._joined = ConcatDataset(parts)

    def __len__(self) -> int:
        return len(self._joined)

    def get_batch(self, index: Tensor) -> dict[str, Tensor]:
        if len(self.parts) == 1:
            return self.parts[0].get_batch(index)
        images = [self._joined[place] for place in index.tolist()]
        return {name: torch.stack([image[name] for image in images]) for name in ("images", "labels")}


def cached_classifier(
    train: DecodedImages, num_classes: int, folder: str | Path, seed: int = 0, **training: Any
) -> PersonClassifier:
    """Return this seed's classifier in `folder`, if these very images and this recipe made it; else train it there."""
    path = Path(folder) / f"classifier{f'_{seed}' if seed else ''}.safetensors"
    settings = [_FORM, num_classes, seed, train.image_size, train.channels, train.labels.tolist()]
    digest = hashlib.sha256(json.dumps(settings).encode())
    for part in train.contents():
        digest.update(part)
    with suppress(SafetensorError, OSError), safe_open(path, framework="pt") as file:
        if (file.metadata() or {}).get("key") == digest.hexdigest():
            model = PersonClassifier(num_classes, train.image_size, train.channels)
            model.load_state_dict({name: file.get_tensor(name) for name in sorted(file.keys())})
            return model.to(device=training.get("device"), memory_format=torch.channels_last).eval()
    model = train_classifier(train, num_classes, seed=seed, **training)
    with atomic_write(path) as partial:
        save_file({n: t.contiguous() for n, t in model.state_dict().items()}, partial, {"key": digest.hexdigest()})
    return model
