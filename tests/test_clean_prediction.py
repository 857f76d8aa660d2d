import pytest
import torch

from vavae_tools.diffusion.objectives import CleanPrediction, FlowMatching, hiding_noise, with_known
from vavae_tools.runtime.errors import UserError

T = torch.tensor([0.5])
"""A time, which this loss does not look at, nor at the noise."""


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_loss_is_the_mean_over_the_pixels_of_the_mask():
    prediction, data = torch.tensor([[[[1.0, 2.0]], [[3.0, 9.0]]]]), torch.zeros(1, 2, 1, 2)  # (1, 2, 1, 2)
    mask = torch.tensor([[[1.0, 0.0]]])
    assert CleanPrediction().loss(prediction, data, data, T, mask)[0].item() == (1 + 9) / 2
    assert CleanPrediction("pixels").loss(prediction, data, data, T, mask)[0].item() == 1 + 9  # C times as much
    assert CleanPrediction().loss(prediction, data, data, T, mask, torch.tensor(5.0))[0].item() == (1 + 9) / 10


def test_with_a_full_mask_it_is_the_mean_squared_error():
    prediction, data = numbers(2, 3, 4, 4), numbers(2, 3, 4, 4, seed=1)
    loss, parts = CleanPrediction().loss(prediction, data, data, T, torch.ones(2, 4, 4))
    torch.testing.assert_close(loss, torch.nn.functional.mse_loss(prediction, data))
    assert parts["mse"] == loss and not parts["mse"].requires_grad


def test_an_empty_mask_costs_nothing_and_breaks_nothing():
    prediction = numbers(2, 3, 4, 4).requires_grad_()
    data = numbers(2, 3, 4, 4, seed=1)
    loss, _ = CleanPrediction().loss(prediction, data, data, T, torch.zeros(2, 4, 4))
    loss.backward()
    assert loss == 0 and torch.equal(prediction.grad, torch.zeros(2, 3, 4, 4))


def test_what_half_precision_predicts_is_compared_in_float32():
    prediction = torch.full((1, 1, 64, 64), 300.0, dtype=torch.float16)  # whose square float16 cannot hold
    data = torch.zeros(1, 1, 64, 64)
    assert CleanPrediction().loss(prediction, data, data, T, torch.ones(1, 64, 64))[0] == 90_000


@pytest.mark.parametrize("times", [{}, {"time": "lognorm", "time_mean": -0.5, "time_std": 2.0}, {"time_shift": 4.0}])
def test_noise_and_times_are_those_of_flow_matching(times):
    ours, flow = CleanPrediction(**times), FlowMatching(**{"time": "uniform", **times})
    data, noise, draws = numbers(5, 3, 2, 2), numbers(5, 3, 2, 2, seed=1), torch.rand(5)
    assert ours.time_draws == flow.time_draws == ("normal" if "time" in times else "uniform")
    t = ours.sample_time(draws)
    assert torch.equal(t, flow.sample_time(draws))
    assert torch.equal(ours.add_noise(data, noise, t), flow.add_noise(data, noise, t))
    assert CleanPrediction(**ours.config).config == ours.config == {**CleanPrediction().config, **times}


def test_known_pixels_are_seen_clean_and_do_not_count():
    data, noise, t = numbers(2, 3, 4, 4), numbers(2, 3, 4, 4, seed=1), torch.tensor([0.2, 0.7])
    mask, known = torch.zeros(2, 4, 4), torch.zeros(2, 4, 4)
    mask[:, :2], known[:, 0] = 1, 1
    seen = {}

    def denoiser(x, t, conditioning, kept):
        seen.update(x=x, t=t, conditioning=conditioning, kept=kept)
        return torch.zeros(2, 4, 4, 4)  # and a channel that nobody asked for

    loss, _ = CleanPrediction()(denoiser, data, "text", noise, t, mask, known)
    assert torch.equal(seen["x"][:, :3, 0], data[:, :, 0]) and torch.equal(seen["x"][:, 3], known)
    assert torch.equal(seen["x"][:, :3, 1:], CleanPrediction().add_noise(data, noise, t)[:, :, 1:])
    assert torch.equal(seen["kept"] > 0, mask > 0) and seen["conditioning"] == "text" and torch.equal(seen["t"], t)
    torch.testing.assert_close(loss, data[:, :, 1].square().mean())
    # what a chat asks is no part of the mask, but attended to
    CleanPrediction()(denoiser, data, "text", noise, t, mask - known, known)
    assert torch.equal(seen["kept"] > 0, mask > 0)
    assert torch.equal(with_known(data, noise, torch.ones(2, 4, 4))[:, :3], noise)


def test_what_is_unknown_is_named():
    with pytest.raises(UserError, match="normalised='C' is unknown; it is 'channels' or 'pixels'"):
        CleanPrediction("C")
    with pytest.raises(UserError, match="time='cosine' is unknown; it is 'lognorm' or 'uniform'"):
        CleanPrediction(time="cosine")


@pytest.mark.parametrize("length", [48, 192])
def test_where_noise_hides_a_cell_its_token_is_told_now_and_then(length):
    """At this noise an orthogonal code of as many pixels is told from one other in most cases, from 255 in few."""
    noise = hiding_noise(length)
    assert noise == 0.6 * length**0.5
    apart = (
        length / 2
    ) ** 0.5 / noise  # half the distance of two cells that differ in half of the pixels, in deviations
    one = torch.special.ndtr(torch.tensor(apart)).item()
    assert 0.85 < one < 0.95 and one**255 < 1e-6
