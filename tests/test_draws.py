"""Draws depend on seed, epoch, sample and name, on nothing else."""

import zlib

import pytest
import torch
from scipy import stats

from vavae_tools.runtime.draws import Draws


def draws(seed=0, epoch=0, samples=(0, 1, 2)) -> Draws:
    return Draws(seed, epoch, torch.tensor(samples))


def test_numbers_stay_what_they_were():
    """A changed hash would change every run that is resumed with it."""
    made = draws(7, 3, [0, 17])
    expected = torch.tensor([[0.09453195, 0.50798231], [0.56302506, 0.11743158]])
    torch.testing.assert_close(made.uniform("time", 2), expected, rtol=0, atol=2e-7)
    expected = torch.tensor([[-0.71831137, -0.23842403, -1.13230312], [0.76197016, 0.41916919, -1.59418654]])
    torch.testing.assert_close(made.normal("noise", 3), expected, rtol=0, atol=2e-6)


def test_bits_are_those_of_splitmix64():
    """The published algorithm in whole numbers that do not wrap around by themselves."""
    golden, most = 0x9E3779B97F4A7C15, 2**64 - 1

    def mix(x: int) -> int:
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & most
        x = (x ^ x >> 27) * 0x94D049BB133111EB & most
        return x ^ x >> 31

    # its well-known first numbers for seed 1234567
    assert [mix(1234567 + n * golden & most) for n in (1, 2)] == [6457827717110365317, 3203168211198807973]
    for seed, epoch, sample, name in [(0, 0, 0, "noise"), (7, 3, 17, "time"), (2**40, 999, 10**6, "flip")]:
        key = mix((mix((sample * golden + mix(seed)) & most) + epoch * 2 + 1) & most)
        key = mix(key ^ zlib.crc32(name.encode()))
        expected = [mix(key + n * golden & most) for n in (1, 2, 3)]
        assert [bits & most for bits in draws(seed, epoch, [sample])._bits(name, 3)[0].tolist()] == expected


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_what_else_is_in_the_batch_or_was_drawn_before_does_not_matter(kind):
    def draw(samples, shape=(2, 3)):
        return getattr(draws(1, 2, samples), kind)("noise", *shape)

    whole = draw(range(10))
    assert torch.equal(whole[[7, 2, 7]], draw([7, 2, 7]))
    assert torch.equal(whole[4:5], draw([4]))
    made = draws(1, 2, range(10))
    made.uniform("something else", 100), made.normal("noise", 2, 3)
    assert torch.equal(whole, getattr(made, kind)("noise", 2, 3))
    torch.manual_seed(123)
    assert torch.equal(whole, draw(range(10)))


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_a_longer_draw_starts_with_the_shorter_one(kind):
    def draw(count):
        return getattr(draws(), kind)("noise", count)

    assert torch.equal(draw(4), draw(7)[:, :4]) and draws().normal("n").shape == (3,)
    assert draw(0).shape == (3, 0)


def many(kind: str, seed=0, epoch=0, name="noise", first=0) -> torch.Tensor:
    """100,000 numbers: 1,000 samples with 100 each."""
    return getattr(Draws(seed, epoch, torch.arange(first, first + 1000)), kind)(name, 100).double()


@pytest.mark.parametrize(("kind", "distribution"), [("uniform", stats.uniform), ("normal", stats.norm)])
def test_distribution(kind, distribution):
    numbers = many(kind).flatten()
    assert stats.kstest(numbers.numpy(), distribution.cdf).pvalue > 0.001
    for power in range(1, 5):  # the first four moments, within five standard errors
        values = numbers**power
        error = values.std() / len(values) ** 0.5
        assert abs(values.mean() - distribution.moment(power)) < 5 * error
    one_per_sample = getattr(Draws(0, 0, torch.arange(20_000)), kind)("time")  # how times and dropouts are drawn
    assert stats.kstest(one_per_sample.double().numpy(), distribution.cdf).pvalue > 0.001


@pytest.mark.parametrize("kind", ["uniform", "normal"])
def test_seeds_epochs_names_and_samples_are_independent(kind):
    others = [{"seed": 1}, {"seed": 2**40}, {"epoch": 1}, {"epoch": 2}, {"name": "time"}, {"name": "esion"}]
    sets = [many(kind, **other) for other in ({}, *others, {"first": 1000})]
    sets.append(many(kind)[:, torch.arange(1, 101) % 100])  # neighbours within a sample
    sets.append(many(kind)[torch.arange(1, 1001) % 1000])  # and the sample beside
    correlation = torch.corrcoef(torch.stack([numbers.flatten() for numbers in sets])).fill_diagonal_(0)
    assert correlation.abs().max() < 5 / 100_000**0.5
    by_sample = torch.corrcoef(many(kind)).fill_diagonal_(0)  # 1,000 samples against each other
    assert by_sample.abs().max() < 6 / 100**0.5
    assert abs(by_sample.std() - 0.1) < 0.005


def test_no_two_samples_share_numbers():
    keys = torch.cat([Draws(seed, epoch, torch.arange(5000))._keys for seed in range(3) for epoch in range(3)])
    assert len(keys.unique()) == len(keys)


@pytest.mark.parametrize("bits", [-1, 0, 2**63 - 1, -(2**63)])
def test_extreme_bits_stay_inside(monkeypatch, bits):
    """0 < uniform < 1 and finite normals even where the hash is all ones or all zeros."""
    monkeypatch.setattr(Draws, "_bits", lambda self, name, count: torch.full((1, count), bits))
    uniform, normal = draws().uniform("u", 2), draws().normal("n", 2)
    assert (uniform > 0).all() and (uniform < 1).all()
    assert normal.isfinite().all()
