"""Tokens as squares of an image and back: a linear code, one cell per token, in reading order."""

import math
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from vavae_tools.runtime.errors import UserError

_TABLE_LIMIT = 2**24
"""Numbers in a table of cells, or of distances."""


class TokenCode:
    """Each token number is a square cell of pixels that are −1 or 1; cells stand row by row, from the left.

    A cell's n = channels · cell_size² pixels (channel by channel, row by row) are the bits of a linear code: pixel j is
    the parity of those bits of the number that column j of the code names. With b bits for all numbers, columns 0 to
    b − 1 name one bit each, so that different numbers always look different; the others, 1 + (j²·s mod (2ᵇ − 1)) with s
    nearest to (√2 − 1)·(2ᵇ − 1), name many, so that cells differ in many pixels: of n = 48 in 16 or more for b = 9 (260
    tokens), in 10 or more for b = 16 (50,257), in 9 or more for b = 18 (152,000), and in 24 on average.

    Args:
        cell_size: a cell's side in pixels.
    """

    def __init__(self, num_tokens: int, cell_size: int = 4, channels: int = 3) -> None:
        bits, self.length = max(1, (num_tokens - 1).bit_length()), channels * cell_size**2
        if num_tokens < 1 or cell_size < 1 or channels < 1:
            raise UserError(f"{num_tokens} tokens in {channels} channels of {cell_size}×{cell_size}: expected more")
        if bits > self.length:
            fitting = math.isqrt(-(-bits // channels) - 1) + 1
            cell = f"a cell of {channels}×{cell_size}×{cell_size} pixels has {self.length}"
            hint = f"enough for {2**self.length:,}: take cell_size {fitting} or larger, or more channels"
            raise UserError(f"{num_tokens:,} tokens need {bits} bits, {cell}, {hint}")
        self.num_tokens, self.cell_size, self.channels = num_tokens, cell_size, channels
        self.config = {"num_tokens": num_tokens, "cell_size": cell_size, "channels": channels}
        """The constructor's arguments: TokenCode(**config) is equal."""
        self._bits = bits
        largest = 2**bits - 1
        spread = round(largest * (math.sqrt(2) - 1))
        self._columns = torch.tensor([2**j if j < bits else 1 + j**2 * spread % largest for j in range(self.length)])

    def capacity(self, img_size: int) -> int:
        """Return how many tokens a square image of this side has."""
        size = self.cell_size
        if img_size < 1 or img_size % size:
            near = max(size, round(img_size / size) * size)
            raise UserError(f"img_size {img_size} is no multiple of cell_size {size}: take {near} or another one")
        return (img_size // size) ** 2

    def cells(self, tokens: Tensor) -> Tensor:
        """Return the pixels of token numbers int64 (...): float32 −1 or 1 (..., n)."""
        bits = tokens[..., None] & self._columns.to(tokens.device)
        for shift in (32, 16, 8, 4, 2, 1):  # the parity of all bits ends up in the last
            bits = bits ^ (bits >> shift)
        return (bits & 1).float() * 2 - 1

    def drawn(self, tokens: Tensor) -> Tensor:
        """Return `cells`, looked up where that is a small table."""
        if self.num_tokens * self.length > _TABLE_LIMIT:
            return self.cells(tokens)
        return F.embedding(tokens, self.table.to(tokens.device))

    @cached_property
    def table(self) -> Tensor:
        """All cells, float32 (num_tokens, n)."""
        return self.cells(torch.arange(self.num_tokens))

    def draw(self, tokens: Tensor, there: Tensor, img_size: int) -> Tensor:
        """Draw token numbers int64 (B, L) as images (B, C, H, W); where `there` (B, L) is false the cell is 0, grey."""
        capacity, length = self.capacity(img_size), tokens.shape[1]
        if length > capacity:
            found = f"{length:,} tokens for an image of {img_size}×{img_size}, which has {capacity:,} cells"
            raise UserError(f"{found}: cut the text, or take a larger img_size")
        cells = F.pad(self.drawn(tokens) * there[..., None], (0, 0, 0, capacity - length))
        return self.images(cells, img_size // self.cell_size)

    def images(self, cells: Tensor, columns: int) -> Tensor:
        """Put cells (B, L, n), whole rows of them, together to images (B, C, H, W)."""
        p = self.cell_size
        cells = cells.unflatten(1, (-1, columns)).unflatten(3, (self.channels, p, p))  # (B, h, w, C, p, q)
        return cells.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)

    def cells_of(self, images: Tensor) -> Tensor:
        """Cut images (B, C, H, W) into cells (B, L, n): the reverse of `images`."""
        p = self.cell_size
        cells = images.unflatten(3, (-1, p)).unflatten(2, (-1, p))  # (B, C, h, p, w, q)
        return cells.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)

    def spread_to_pixels(self, of_cells: Tensor, img_size: int) -> Tensor:
        """Spread a number for each of the first cells (B, L) over pixels (B, H, W); 0 for the other cells."""
        side, p = img_size // self.cell_size, self.cell_size
        of_cells = F.pad(of_cells, (0, side**2 - of_cells.shape[1])).unflatten(1, (side, side))
        return of_cells.repeat_interleave(p, 1).repeat_interleave(p, 2)

    def mask_to_cells(self, mask: Tensor) -> Tensor:
        """Return which cells have any pixel in a mask (B, H, W): bool (B, L)."""
        return F.max_pool2d(mask[:, None].float(), self.cell_size).flatten(1) > 0

    def nearest(self, cells: Tensor) -> Tensor:
        """Return the tokens whose cells are nearest to cells (..., n), all of the same length: int64 (...)."""
        rows = cells.reshape(-1, self.length).float()
        found, valid = self._by_signs(rows)
        others = rows[~valid]  # no cell can be nearer than one that has all the signs
        if len(others):
            table = self.table.to(rows.device).T
            parts = others.split(max(1, _TABLE_LIMIT // self.num_tokens))
            found[~valid] = torch.cat([(part @ table).argmax(1) for part in parts])
        return found.view(cells.shape[:-1])

    def is_valid(self, cells: Tensor) -> Tensor:
        """Return whether the signs of all of a cell's pixels (..., n) are those of one token: bool (...)."""
        return self._by_signs(cells)[1]

    def _by_signs(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return the numbers that the first pixels show, int64 (...), and whether all other signs are that token's."""
        numbers = ((cells[..., : self._bits] > 0) << torch.arange(self._bits, device=cells.device)).sum(-1)
        return numbers, (numbers < self.num_tokens) & (cells * self.cells(numbers) > 0).all(-1)

    def decode(self, images: Tensor, mask: Tensor) -> list[list[int]]:
        """Read images (B, C, H, W) and their masks (B, H, W): token numbers, exact of clean ones, else the nearest."""
        found, there = self.nearest(self.cells_of(images)), self.mask_to_cells(mask)
        return [tokens[kept].tolist() for tokens, kept in zip(found, there, strict=True)]
