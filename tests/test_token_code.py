"""Tokens as cells of pixels: exact both ways, far apart, and the same for ever."""

import hashlib

import pytest
import torch
from tiny import refused

from vavae_tools.data.tokens.code import TokenCode

CODES = [(260, 4, 3), (50257, 4, 3), (152000, 4, 3), (260, 4, 1), (260, 3, 1), (7, 1, 3), (2, 1, 1), (1, 2, 2)]


def drawn_tokens(code: TokenCode, batch: int, img_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(code.num_tokens)
    return torch.randint(code.num_tokens, (batch, code.capacity(img_size)), generator=generator)


def weights(bits: int, length: int) -> torch.Tensor:
    """In how many pixels the other numbers' cells differ from that of 0: for a linear code these are all distances."""
    code = TokenCode(2**bits, 1, length)
    assert code.cells(torch.zeros((), dtype=torch.int64)).eq(-1).all()
    return torch.cat([(code.cells(part) > 0).sum(1) for part in torch.arange(1, 2**bits).split(2**13)])


@pytest.mark.parametrize(("num_tokens", "cell_size", "channels"), CODES)
def test_what_is_drawn_is_read_again(num_tokens, cell_size, channels):
    code = TokenCode(num_tokens, cell_size, channels)
    img_size, cells = 6 * cell_size, 36
    tokens = drawn_tokens(code, 4, img_size)
    lengths = [36, 1, 0, 17]
    there = torch.arange(cells) < torch.tensor(lengths)[:, None]
    images, mask = code.draw(tokens, there, img_size), code.spread_to_pixels(there.float(), img_size)
    assert images.shape == (4, channels, img_size, img_size) and images.dtype == torch.float32
    assert mask.shape == (4, img_size, img_size) and mask.sum((1, 2)).tolist() == [n * cell_size**2 for n in lengths]
    assert torch.equal(images.abs(), mask[:, None].expand_as(images))  # ±1 on tokens, 0 elsewhere
    assert code.decode(images, mask) == [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]
    assert code.decode(0.01 * images.half(), mask)[0] == tokens[0].tolist()  # the contrast does not matter
    assert torch.equal(code.mask_to_cells(mask), there)
    assert TokenCode(**code.config).decode(images, mask)[3] == tokens[3, :17].tolist()


@pytest.mark.parametrize(("num_tokens", "cell_size", "channels"), CODES)
def test_all_cells_differ(num_tokens, cell_size, channels):
    code = TokenCode(num_tokens, cell_size, channels)
    assert code.table.shape == (num_tokens, channels * cell_size**2)
    assert len(torch.unique(code.table, dim=0)) == num_tokens
    assert code.table.abs().eq(1).all()
    some = drawn_tokens(code, 1, 4 * cell_size)
    assert torch.equal(code.drawn(some), code.cells(some))  # looked up, or computed where the table would be large


def test_cells_are_far_apart():
    others = weights(9, 48)
    assert others.min() == 16 and abs(others.double().mean() - 24) < 0.1
    assert weights(16, 48).min() == 10
    assert weights(18, 48).min() == 9
    code = TokenCode(512)  # linear: the cell of a ⊕ b is the product of signs of those of a, b, and 0
    a, b = torch.randint(512, (2, 200), generator=torch.Generator().manual_seed(0))
    assert torch.equal(code.cells(a ^ b), code.cells(a) * code.cells(b) * code.cells(torch.tensor(0)))


def test_a_cell_by_hand():
    """Nine bits name themselves; pixel 9 is the parity of those in 1 + 9²·212 mod 511 = 310 = 100110110₂."""
    numbers = [0, 5, 1 << 3, 1 << 7]
    cells = (TokenCode(260).cells(torch.tensor(numbers)) > 0).int()
    assert cells[1, :10].tolist() == [1, 0, 1, 0, 0, 0, 0, 0, 0, 1]
    for j, column in enumerate([*(1 << j for j in range(9)), *(1 + j * j * 212 % 511 for j in range(9, 48))]):
        assert cells[:, j].tolist() == [(n & column).bit_count() % 2 for n in numbers]


@pytest.mark.parametrize(("num_tokens", "cell_size", "channels", "digest"), [
    (260, 4, 3, "0c345d592155fe56"),
    (50257, 4, 3, "14e24ed6c471d477"),
    (1000, 2, 3, "8d8600730242d8d2"),
])  # fmt: skip
def test_the_code_stays_what_it_was(num_tokens, cell_size, channels, digest):
    """A model's images are read by the code they were drawn with."""
    code = TokenCode(num_tokens, cell_size, channels)
    tokens = (torch.arange(64) * 7919 % num_tokens)[None]
    image = code.draw(tokens, torch.ones(1, 64, dtype=torch.bool), 8 * cell_size)
    assert hashlib.sha256((image > 0).numpy().tobytes()).hexdigest()[:16] == digest


def test_cells_stand_in_reading_order_and_their_pixels_too():
    code = TokenCode(260)
    tokens = torch.tensor([[65, 200, 7]])
    image = code.draw(tokens, torch.ones(1, 3, dtype=torch.bool), 8)[0]
    cells = code.cells(tokens[0])
    for cell, (row, column) in zip(cells, [(0, 0), (0, 4), (4, 0)], strict=True):
        assert torch.equal(image[:, row : row + 4, column : column + 4].flatten(), cell)
    assert not image[:, 4:, 4:].any()
    assert torch.equal(code.cells_of(image[None])[0, :3], cells)
    assert image[1, 2, 4 + 3] == cells[1, 1 * 16 + 2 * 4 + 3]  # channel, row, column
    wide = torch.randn(2, 1, 4, 10, generator=torch.Generator().manual_seed(0))
    cells = TokenCode(16, 2, 1).cells_of(wide)
    assert cells.shape == (2, 10, 4) and torch.equal(TokenCode(16, 2, 1).images(cells, columns=5), wide)


@pytest.mark.parametrize(("num_tokens", "cell_size", "channels"), [(260, 4, 3), (3000, 4, 3), (200, 2, 3)])
@pytest.mark.parametrize("sigma", [0.3, 1.0, 3.0])
def test_the_nearest_is_that_of_brute_force(num_tokens, cell_size, channels, sigma):
    code = TokenCode(num_tokens, cell_size, channels)
    tokens = drawn_tokens(code, 1, 10 * cell_size)[0]
    noise = torch.randn(100, code.length, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noisy = code.cells(tokens).double() + sigma * noise
    nearest = torch.cdist(noisy, code.table.double()).argmin(1)
    assert torch.equal(code.nearest(noisy), nearest)
    assert torch.equal(code.nearest(noisy.view(4, 25, -1)), nearest.view(4, 25))
    hit = (nearest == tokens).double().mean()
    assert hit == 1 if (sigma, cell_size) == (0.3, 4) else hit < 1 if sigma == 3 else True


def test_up_to_seven_wrong_signs_are_mended(monkeypatch):
    """With a distance of 16, seven of 48 signs may be wrong; however many are asked at once."""
    code, tokens = TokenCode(260), torch.arange(260)
    wrong = torch.rand(260, 48, generator=torch.Generator().manual_seed(3)).argsort(1)[:, :7]
    cells = code.cells(tokens)
    noisy = cells.scatter(1, wrong, -cells.gather(1, wrong))
    assert torch.equal(code.nearest(noisy), tokens)
    monkeypatch.setattr("vavae_tools.data.tokens.code._TABLE_LIMIT", 700)
    assert torch.equal(code.nearest(noisy), tokens)


def test_a_cell_is_valid_when_all_signs_are_a_tokens():
    code = TokenCode(260)
    cells = code.cells(torch.arange(260)) * torch.rand(260, 48, generator=torch.Generator().manual_seed(4)).add(0.01)
    assert code.is_valid(cells).all()
    for pixel in range(48):  # the nearest is the same, but it is no cell of a token
        flipped = cells.index_copy(1, torch.tensor([pixel]), -cells[:, [pixel]])
        assert not code.is_valid(flipped).any()
    assert not code.is_valid(code.cells(torch.tensor([259])).index_fill(1, torch.tensor([20]), 0.0)).any()
    assert not code.is_valid(torch.zeros(1, 48)).any()  # grey is no token
    assert not code.is_valid(TokenCode(512).cells(torch.arange(260, 512))).any()  # of numbers there are none of
    assert code.nearest(TokenCode(512).cells(torch.arange(260, 512))).max() < 260


@pytest.mark.parametrize(("call", "says"), [
    (lambda: TokenCode(152_000, 2), "152,000 tokens need 18 bits, a cell of 3×2×2 pixels has 12: take a larger cell_"),
    (lambda: TokenCode(257, 2, 2), "257 tokens need 9 bits"),
    (lambda: TokenCode(0), "0 tokens in 3 channels of 4×4: expected more"),
    (lambda: TokenCode(260).capacity(67), "img_size 67 is no multiple of cell_size 4: take 68 or another one"),
    (lambda: TokenCode(260).capacity(0), "img_size 0 is no multiple of cell_size 4: take 4 or another one"),
    (lambda: TokenCode(260).draw(torch.zeros(1, 5, dtype=torch.int64), torch.ones(1, 5).bool(), 8),
     "5 tokens for an image of 8×8, which has 4 cells"),
])  # fmt: skip
def test_what_does_not_fit_is_said(call, says):
    assert refused(call).startswith(says)
    assert TokenCode(152_000, 3).length == 27 and TokenCode(257, 3, 2).length == 18  # what the lines name fits
    assert TokenCode(256, 2, 2).length == 8  # as many bits as pixels
    assert [TokenCode(260).capacity(size) for size in (4, 64, 256)] == [1, 256, 4096]
