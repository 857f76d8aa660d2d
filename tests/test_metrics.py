import math

import pytest
import scipy.linalg
import torch

from vavae_tools.evaluation.metrics import (
    Interval,
    frechet_distance,
    kernel_distance,
    log_spectral_distance,
    mean_kernel_distance,
    nearest,
    neighbourhoods,
    power_spectrum,
    psnr,
    sharpness,
    ssim,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sample_with_moments(n, mean, covariance, seed=0):
    """A sample whose mean and covariance are exactly these."""
    x = normal(n, len(mean), seed=seed)
    x = x - x.mean(0)
    white = torch.linalg.solve_triangular(torch.linalg.cholesky(torch.cov(x.T)), x.T, upper=False)
    return (torch.linalg.cholesky(covariance) @ white).T + mean


def random_covariance(d, seed):
    root = normal(d, d, seed=seed)
    return root @ root.T + 0.1 * torch.eye(d, dtype=torch.float64)


def test_psnr_of_a_constant_offset():
    a, offsets = torch.full((3, 1, 8, 8), -1.0), [0.02, 0.5, 2.0]
    expected = [20 * math.log10(2 / offset) for offset in offsets]
    assert psnr(a, a + torch.tensor(offsets).view(3, 1, 1, 1)).tolist() == pytest.approx(expected, rel=1e-5)


def test_psnr_and_ssim_are_per_image_and_know_equal_ones():
    a = normal(70, 3, 16, 16).clamp(-1, 1).float()
    b = a.clone()
    b[1:] = -a[1:]
    assert psnr(a, b)[0] == math.inf and psnr(a, b)[1:].max() < 10
    assert ssim(a, b).shape == (70,)
    assert ssim(a, b)[0] == pytest.approx(1) and ssim(a, b)[1:].max() < 0
    assert ssim(a[:1], b[:1]).shape == (1,)


def test_sharpness_by_hand_and_of_flat_images():
    ramp, flat = torch.tensor([[[0.0, 0.5], [0.0, 0.5]]]), torch.full((1, 2, 2), 0.25)  # differences ½, ½, 0, 0
    checks = torch.tensor([[[0.0, 0.5], [0.5, 0.0]]])  # all four ½
    assert sharpness(torch.stack([ramp, checks, ramp]), torch.stack([checks, ramp, flat])).tolist() == [2, 0.5, 0]
    assert sharpness(torch.stack([flat, flat]), torch.stack([flat, ramp])).isnan().all()


@pytest.mark.parametrize("size", [16, 15])
def test_power_spectrum_is_exact_on_a_sine(size):
    wave = 0.6 * torch.sin(2 * torch.pi * 4 * torch.arange(size) / size + 0.3)
    images = torch.stack([wave.expand(1, 12, size), 0.5 * wave.expand(1, 12, size)])
    power = power_spectrum(images, 3)
    assert power.shape == (2, size // 2 + 1)
    assert power[0, 3:6].sum().item() == pytest.approx(0.6**2 / 2, rel=1e-5)  # half its squared amplitude
    assert power[0, [0, 1, 2]].max() < 1e-12 and power[0, 4] == pytest.approx(4 * power[0, 3].item(), rel=1e-4)
    torch.testing.assert_close(power[1], power[0] / 4)
    torch.testing.assert_close(power_spectrum(images.mT, 2), power)
    flat = power_spectrum(images, 2)  # nothing changes along the other axis
    assert flat[0, 2:].max() < 1e-12


def test_log_spectral_distance_is_in_decibels_above_what_rounding_hides():
    a = torch.tensor([1.0, 0.1, 0.01])
    assert log_spectral_distance(a, a / 10) == pytest.approx(10)
    assert log_spectral_distance(a, a * torch.tensor([1.0, 1.0, 100.0])) == pytest.approx(20 / 3**0.5)
    assert log_spectral_distance(a * 1e-9, torch.zeros(3)) == 0


def test_frechet_distance_is_the_closed_form_of_two_gaussians():
    mean_a, mean_b = normal(6, seed=1), normal(6, seed=2)
    a, b = random_covariance(6, 3), random_covariance(6, 4)
    root = torch.from_numpy(scipy.linalg.sqrtm((a @ b).numpy()).real)
    expected = ((mean_a - mean_b) ** 2).sum() + (a + b - 2 * root).trace()
    measured = frechet_distance(sample_with_moments(50, mean_a, a, 5), sample_with_moments(80, mean_b, b, 6))
    assert measured == pytest.approx(expected.item(), rel=1e-9)


def test_frechet_distance_with_fewer_images_than_features():
    a = normal(8, 30)
    assert frechet_distance(a, a + 2) == pytest.approx(30 * 4)
    assert frechet_distance(a, a * 3) == pytest.approx(  # only the spread differs: tr (3 − 1)² C + |2 μ|²
        4 * torch.cov(a.T).trace().item() + 4 * a.mean(0).square().sum().item()
    )
    assert frechet_distance(a, normal(9, 30, seed=1)) == pytest.approx(frechet_distance(normal(9, 30, seed=1), a))


def test_kernel_distance_is_unbiased_and_its_interval_holds_the_truth():
    same = [kernel_distance(normal(40, 8, seed=2 * i), normal(40, 8, seed=2 * i + 1), seed=i) for i in range(60)]
    mean = sum(d.value for d in same) / len(same)
    error = torch.tensor([d.value for d in same]).std().item() / math.sqrt(len(same))
    assert abs(mean) < 3 * error
    assert sum(d.low <= 0 <= d.high for d in same) / len(same) > 0.85


def test_kernel_distance_by_hand():
    # k(x, y) = (x y + 1)³ in one dimension; of {0, 1, 2, 3} every subset is a pair, of {1, 1, 1, 1} always (1, 1)
    a, b = torch.tensor([[0.0], [1.0], [2.0], [3.0]]), torch.ones(4, 1)

    def k(x, y):
        return (x * y + 1) ** 3

    pairs = [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    expected = sum(k(x, y) + k(1, 1) - (k(x, 1) + k(y, 1)) for x, y in pairs) / 6
    assert kernel_distance(a, b, subsets=4000).value == pytest.approx(expected, rel=0.1)


def test_mean_kernel_distance_sees_persons_that_are_swapped():
    one, two = normal(40, 8), normal(40, 8, seed=1) + 2
    again, again_two = normal(60, 8, seed=2), normal(60, 8, seed=3) + 2
    same, swapped = (mean_kernel_distance([one, two], x) for x in ([again, again_two], [again_two, again]))
    assert same.low < 0 < same.high and swapped.low > 1
    alone, direct = mean_kernel_distance([one], [again], seed=5), kernel_distance(one, again, seed=5)
    assert (alone.value, alone.low) == pytest.approx((direct.value, direct.low))


def test_nearest_finds_planted_copies():
    others = normal(300, 20)
    wanted = torch.arange(0, 300, 3)
    place, distance = nearest(others[wanted], others)
    assert place.equal(wanted) and distance.max() == 0
    place, distance = nearest(others[wanted] + 0.01, others)
    assert place.equal(wanted)
    torch.testing.assert_close(distance, torch.full((100,), 0.01 * math.sqrt(20)))


def test_nearest_other_row_is_never_the_row_itself():
    rows = (torch.tensor([0.0, 1.0, 1.5, 9.0]) + 100 * torch.arange(40)[:, None]).view(-1, 1)
    place, distance = nearest(rows)
    assert place[:4].tolist() == [1, 2, 1, 2] and distance[:4].tolist() == [1.0, 0.5, 0.5, 7.5]
    assert (place != torch.arange(160)).all()


def test_neighbourhoods_of_equal_sets_and_of_a_missing_mode():
    real, again, far = normal(200, 4, seed=1), normal(200, 4, seed=2), normal(200, 4, seed=3) + 50

    def values(*sets, **k):
        return {name: of.value for name, of in neighbourhoods(*sets, **k).items()}

    names = ("precision", "recall", "density", "coverage")
    assert values(real, real) == pytest.approx(dict.fromkeys(names, 1))
    assert set(values(real, far).values()) == {0}
    alike = neighbourhoods(real, again, k=5)
    assert all(of.value > 0.85 and of.low <= of.value <= of.high <= 1.5 for of in alike.values())
    half = values(torch.cat([real, far]), again, k=5)  # one of two modes: all there is real, half is missing
    assert half["precision"] > 0.85 and half["recall"] == pytest.approx(0.5, abs=0.05)
    assert half["coverage"] == pytest.approx(0.5, abs=0.05)


def test_neighbourhoods_by_hand():
    real, made = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.5], [10.0], [2.9]])
    # to the nearest other: real 1, 1, 2; made 2.4, 7.1, 2.4
    inside = [[1, 0, 0], [1, 0, 0], [0, 0, 1]]  # row: of a real one's sphere
    found = neighbourhoods(real, made, k=1)
    assert found["precision"].value == pytest.approx(2 / 3) and found["coverage"] == Interval(1, 1, 1)
    assert found["precision"].high == 1 and found["precision"].low == pytest.approx(2 / 3 - 1.96 / 3)
    assert found["density"].value == pytest.approx(sum(map(sum, inside)) / 3) and found["recall"].value == 1
