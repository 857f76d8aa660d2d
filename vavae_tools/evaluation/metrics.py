"""Numbers about images: the likeness of pairs, the distance of sets, the nearest of a set."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vavae_tools.runtime.machine import in_float32

_CHUNK = 64  # images at a time


@in_float32
def psnr(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each pair, dB: (N, C, H, W) in [-1, 1], twice → float32 (N,); equal ones: inf."""
    error = torch.stack([(x.double() - y.double()).square().mean() for x, y in zip(a, b, strict=True)])
    return (10 * torch.log10(4 / error)).float()  # the peak is 2 high


@in_float32
def ssim(a: Tensor, b: Tensor) -> Tensor:
    """Structural similarity (Wang et al. 2004) of each pair: (N, C, H, W) in [-1, 1], twice → float32 (N,).

    Gaussian window of 11 pixels; as usual on [0, 1], since its luminance term has no meaning for a negative mean.
    """
    from torchmetrics.functional.image import structural_similarity_index_measure

    options = {"data_range": 1.0, "reduction": "none"}
    a, b = (((images.clamp(-1, 1) + 1) / 2).split(_CHUNK) for images in (a, b))
    values = [structural_similarity_index_measure(*pair, **options).flatten() for pair in zip(a, b, strict=True)]
    return torch.cat(values)


def gradients(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbours, in both axes together: (N, C, H, W) → float64 (N,)."""
    of_each = ([image.double().diff(dim=dim).abs().flatten() for dim in (-2, -1)] for image in images)
    return torch.stack([torch.cat(both).mean() for both in of_each])


@in_float32
def sharpness(a: Tensor, b: Tensor) -> Tensor:
    """Return how sharp each `b` is beside its `a`: (N, C, H, W) in [-1, 1], twice → float32 (N,).

    The `gradients` of `b` as a multiple of those of `a`: 1 is as sharp, less is blurred or pale, more is noisier. NaN
    where `a` is one flat colour.
    """
    of_a, of_b = gradients(a), gradients(b)
    return torch.where(of_a > 0, of_b / of_a, torch.nan).float()


@in_float32
def power_spectrum(images: Tensor, axis: int) -> Tensor:
    """Return each image's mean power at 0, 1, … cycles along an axis: (N, C, H, W) → float64 (N, size // 2 + 1).

    Under a Hann window, without which the step between an image's two edges would hide how little a blurred one has of
    many cycles. A sine's power, half its squared amplitude, lies in its own place and the two beside it.
    """
    images = images.double().movedim(axis, -1)
    size = images.shape[-1]
    window = torch.hann_window(size, dtype=torch.float64)  # its mean square is 3/8
    power = torch.fft.rfft(images * window, norm="forward").abs().square().flatten(1, -2).mean(dim=1) / 0.375
    power[:, 1 : (size + 1) // 2] *= 2  # of the same cycles backwards
    return power


def log_spectral_distance(a: Tensor, b: Tensor) -> float:
    """Return the root of the mean squared difference of two power spectra (K,) in dB; below rounding to 8 bits is 0."""
    least = (2 / 255) ** 2 / 12 / (2 * len(a))  # of an image in [-1, 1] that is rounded
    apart = [10 * of.double().clamp_min(least).log10() for of in (a, b)]
    return (apart[0] - apart[1]).square().mean().sqrt().item()


@in_float32
def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Fréchet distance of two Gaussians fitted to features (N, D), as in FID (Heusel et al. 2017).

    |μa − μb|² + tr Ca + tr Cb − 2 tr (Ca Cb)^½, with n − 1 in the covariances. It is biased upwards where n is small:
    compare it only with distances of sets of the same sizes.
    """
    a, b = a.double(), b.double()
    between = (a.mean(0) - b.mean(0)).square().sum()
    a, b = ((x - x.mean(0)) / math.sqrt(len(x) - 1) for x in (a, b))
    # With C = RᵀR, CaCb = Raᵀ(Ra Rbᵀ)Rb has the squared singular values of Ra Rbᵀ as its eigenvalues: no root of a
    # matrix that may have no inverse, and no complex numbers.
    a, b = (torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x for x in (a, b))
    cross = torch.linalg.svdvals(a @ b.T).sum()
    return max(0.0, (between + a.square().sum() + b.square().sum() - 2 * cross).item())


@dataclass(frozen=True)
class Interval:
    """A value, and the interval that holds what an endless number of images would give, 19 times in 20."""

    value: float
    low: float
    high: float

    def __format__(self, form: str) -> str:
        return f"{self.value:{form}} [{self.low:{form}}, {self.high:{form}}]"

    def __str__(self) -> str:
        return f"{self.value:.3g} [{self.low:.2g}, {self.high:.2g}]"


@in_float32
def kernel_distance(a: Tensor, b: Tensor, subsets: int = 100, subset_size: int = 1000, seed: int = 0) -> Interval:
    """Kernel distance of features (N, D), 4 or more, as in KID (Bińkowski et al. 2018): unbiased also of small sets.

    Below 0 means: no difference seen.
    The squared maximum mean discrepancy under (x·y / D + 1)³, averaged over random subsets: half of each set, no more
    than `subset_size`. They also give the interval, as a jackknife that leaves out all but a subset (Shao & Wu 1989).
    """
    sizes = [min(subset_size, len(x) // 2) for x in (a, b)]
    generator, drawn = torch.Generator().manual_seed(seed), []
    for _ in range(subsets):
        rows = [torch.randperm(len(x), generator=generator)[:size] for x, size in zip((a, b), sizes, strict=True)]
        x, y = a[rows[0]].double(), b[rows[1]].double()
        of_x, of_y, between = ((u @ v.T / u.shape[1] + 1) ** 3 for u, v in ((x, x), (y, y), (x, y)))
        within = sum((of.sum() - of.trace()) / (len(of) * (len(of) - 1)) for of in (of_x, of_y))
        drawn.append(within - 2 * between.mean())
    values = torch.stack(drawn)
    of_all = max(size / (len(x) - size) for x, size in zip((a, b), sizes, strict=True))  # 1 for halves
    value, spread = values.mean().item(), values.std().item() * math.sqrt(of_all)
    return Interval(value, value - 1.96 * spread, value + 1.96 * spread)


def mean_kernel_distance(a: Sequence[Tensor], b: Sequence[Tensor], seed: int = 0) -> Interval:
    """Kernel distance person by person, averaged: `a[i]` and `b[i]` hold features (N, D) of the same person.

    Of all persons in one set it would come out too low: sets with a fixed number of each person's images are more
    alike than chance makes them.
    """
    each = [kernel_distance(x, y, seed=seed) for x, y in zip(a, b, strict=True)]
    value = sum(d.value for d in each) / len(each)
    half = math.sqrt(sum(((d.high - d.low) / 2) ** 2 for d in each)) / len(each)
    return Interval(value, value - half, value + half)


@in_float32
def neighbourhoods(real: Tensor, made: Tensor, k: int = 3) -> dict[str, Interval]:
    """Return by features (N, D), more than k each, how the sets lie in each other; 1 is best, a density may be more.

    - precision: the share of `made` within the distance of some of `real` to its k-th nearest other one, which is one
      to be taken for real; recall: the same the other way round (Kynkäänniemi et al. 2019).
    - density: how many of these spheres hold an image of `made`, over k; coverage: the share of spheres that hold any
      (Naeem et al. 2020). Both mind outliers less.

    An interval is that of the images that are counted; where the others lie is taken as given.
    """
    inside = within_reach(real, made, k)
    counted = {
        "precision": inside.any(dim=0),
        "recall": within_reach(made, real, k).any(dim=0),
        "density": inside.sum(dim=0) / k,
        "coverage": inside.any(dim=1),
    }
    found = {}
    for name, values in counted.items():
        mean, spread = values.double().mean().item(), 1.96 * values.double().std().item() / math.sqrt(len(values))
        most = math.inf if name == "density" else 1.0
        found[name] = Interval(mean, max(0.0, mean - spread), min(most, mean + spread))
    return found


@in_float32
def within_reach(real: Tensor, made: Tensor, k: int = 3) -> Tensor:
    """Return bool (N, M): is each of `made` (M, D) nearer to each of `real` (N, D) than the k-th other real one."""
    real, made = real.double(), made.double()
    reach = torch.cdist(real, real).kthvalue(k + 1, dim=1).values  # the nearest one is itself
    return torch.cdist(real, made) < reach[:, None]


def copy_limit(features: Tensor) -> float:
    """Return the distance below which one training image in a hundred has another one; 0 of a single image."""
    return nearest(features)[1].quantile(0.01).item() if len(features) > 1 else 0.0


@in_float32
def nearest(a: Tensor, b: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return the place of the nearest row of `b` for each of `a` (N, D), int64 (N,), and its distance, float32 (N,).

    Without `b`: the nearest other row of `a`.
    """
    a = a.double()
    others = a if b is None else b.double()
    squares, places = others.square().sum(1), []
    for number, rows in enumerate(a.split(_CHUNK)):
        squared = squares - 2 * rows @ others.T  # |row|² is the same for all
        if b is None:
            squared.diagonal(number * _CHUNK).fill_(torch.inf)
        places.append(squared.argmin(dim=1))
    place = torch.cat(places)
    return place, (a - others[place]).square().sum(1).sqrt().float()


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return the lines of a table: the first column to the left, the others to the right.

    >>> print("\\n".join(aligned([("", "dB"), ("own", "31.4")])))
           dB
    own  31.4
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{'>' if place else '<'}{width}}}" for place, width in enumerate(widths))
    return [form.format(*row).rstrip() for row in rows]


def plain(report: Any) -> dict[str, Any]:
    """Return the fields of a dataclass without its `figures` as plain values, for JSON."""
    return {name: value for name, value in asdict(replace(report, figures={})).items() if name != "figures"}


def percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"
