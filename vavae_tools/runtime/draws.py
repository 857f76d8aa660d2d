"""Random numbers that follow from (seed, epoch, sample, name) and from nothing else: no state to save, no order.

Each is a hash of a counter, as in Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
"""

import math
import zlib

import torch
from torch import Tensor

_GOLDEN = -7046029254386353131  # 2⁶⁴ / golden ratio as a signed integer, splitmix64's step
_MIX_1, _MIX_2 = -4658895280553007687, -7723592293110705685  # splitmix64's multipliers (Steele, Lea, Flood 2014)


def _shift_right(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts int64 arithmetically; the hash wants zeros


def _mix(x: Tensor) -> Tensor:
    """Splitmix64's finaliser on int64, which wraps around as unsigned numbers do."""
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


class Draws:
    """The random numbers of one step, a row for each of `samples`: places in the data set, int64 (B,)."""

    def __init__(self, seed: int, epoch: int, samples: Tensor) -> None:
        state = _mix(samples.to(torch.int64) * _GOLDEN + _mix(torch.tensor(seed)).item())
        self._keys = _mix(state + epoch * 2 + 1)  # (B,)

    def _bits(self, name: str, count: int) -> Tensor:
        keys = _mix(self._keys ^ zlib.crc32(name.encode()))
        counter = torch.arange(1, count + 1, device=keys.device) * _GOLDEN
        return _mix(keys[:, None] + counter)  # (B, count)

    def uniform(self, name: str, *shape: int) -> Tensor:
        """Uniform in (0, 1): float32 (B, *shape); `name` tells independent draws of one sample apart."""
        bits = self._bits(name, math.prod(shape))
        # 23 bits: of 24, the largest + 0.5 would be rounded to 1
        return ((_shift_right(bits, 41).float() + 0.5) * 2.0**-23).view(len(bits), *shape)

    def normal(self, name: str, *shape: int) -> Tensor:
        """Standard normal (Box–Muller, two numbers from each 64 bits): float32 (B, *shape)."""
        count = math.prod(shape)
        bits = self._bits(name, (count + 1) // 2)
        radius = (-2 * torch.log((_shift_right(bits, 32).float() + 0.5) * 2.0**-32).clamp(max=0)).sqrt()
        angle = (bits & 0xFFFFFFFF).float() * (2 * math.pi * 2.0**-32)
        pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)
        return pairs[:, :count].reshape(len(bits), *shape)
