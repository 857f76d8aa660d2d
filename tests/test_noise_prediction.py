"""Noise prediction: diffusers' schedule in our time, and objectives by name."""

import pytest
import torch
from diffusers import DDPMScheduler
from tiny import same

from vavae_tools.diffusion.objectives import FlowMatching, NoisePrediction, make_objective, objective_of, time_of
from vavae_tools.runtime.errors import UserError

ALL = torch.arange(1000)


def batch(count: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, count, 2, 2, 2, generator=generator).unbind(0)


def shares(objective: NoisePrediction, t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """√ᾱ and √(1 − ᾱ), from the betas alone."""
    n = objective.num_timesteps
    if objective.betas == "linear":
        betas = torch.linspace(objective.beta_start, objective.beta_end, n, dtype=torch.float64)
    else:
        betas = torch.linspace(objective.beta_start**0.5, objective.beta_end**0.5, n, dtype=torch.float64) ** 2
    alpha = (1 - betas).cumprod(0)[objective.timestep_of(t)].view(-1, 1, 1, 1)
    return alpha.sqrt().float(), (1 - alpha).sqrt().float()


def test_every_timestep_comes_back_from_its_time():
    objective = NoisePrediction()
    t = time_of(ALL)
    assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1 and (t.diff() < 0).all()
    assert same(objective.timestep_of(t), ALL)
    assert time_of(999) == pytest.approx(t[-1].item()) and time_of(0) == pytest.approx(t[0].item())
    assert objective.timestep_of(torch.tensor([0.0, 1.0])).tolist() == [999, 0]


def test_uniform_draws_fall_on_every_timestep_equally_often():
    objective = NoisePrediction()
    draws = (torch.arange(4000) + 0.5) / 4000
    assert objective.time_draws == "uniform"
    assert objective.timestep_of(objective.sample_time(draws)).bincount().tolist() == [4] * 1000
    assert objective.timestep_of(objective.sample_time(torch.tensor([1 - 2.0**-24, 2.0**-24]))).tolist() == [999, 0]


@pytest.mark.parametrize("betas", ["scaled_linear", "linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_it_is_the_formula_and_diffusers_scheduler(betas, prediction):
    objective, (data, noise) = NoisePrediction(prediction, betas), batch()
    t = time_of(ALL)
    alpha, sigma = shares(objective, t)
    noisy = objective.add_noise(data, noise, t)
    torch.testing.assert_close(noisy, alpha * data + sigma * noise, rtol=0, atol=2e-5)
    target = noise if prediction == "epsilon" else alpha * noise - sigma * data
    torch.testing.assert_close(objective.target(data, noise, t), target, rtol=0, atol=2e-5)
    scheduler = DDPMScheduler(
        beta_schedule=betas, beta_start=objective.beta_start, beta_end=objective.beta_end, prediction_type=prediction
    )
    assert same(noisy, scheduler.add_noise(data, noise, ALL))
    if prediction == "v_prediction":
        assert same(objective.target(data, noise, t), scheduler.get_velocity(data, noise, ALL))


def test_the_schedule_of_stable_diffusion():
    objective = NoisePrediction()
    assert (objective.beta_start, objective.beta_end, objective.betas) == (0.00085, 0.012, "scaled_linear")
    alpha, sigma = shares(objective, time_of(torch.tensor([999])))
    assert sigma.item() / alpha.item() == pytest.approx(14.6146, abs=1e-4)  # the published largest sigma


def test_the_loss_is_the_mean_squared_error_of_what_the_denoiser_says():
    data, noise = batch(6)
    t = time_of(torch.tensor([0, 10, 200, 500, 800, 999]))
    objective = NoisePrediction()
    seen = []

    def denoiser(x, t, conditioning):
        seen.append((x, t, conditioning))
        return torch.full_like(x, 0.5)

    loss, parts = objective(denoiser, data, "words", noise, t)
    assert loss.item() == pytest.approx((noise - 0.5).square().mean().item()) == pytest.approx(parts["mse"].item())
    x, at, conditioning = seen[0]
    assert same(x, objective.add_noise(data, noise, t)) and same(at, t) and conditioning == "words"
    each = objective.squared_error(torch.full_like(data, 0.5), data, noise, t)
    assert each.shape == (6,) and each.mean().item() == pytest.approx(loss.item())
    by_v = NoisePrediction("v_prediction")
    perfect, _ = by_v(lambda x, t, _: by_v.target(data, noise, t), data, None, noise, t)
    assert perfect == 0


def test_half_precision_predictions_are_compared_in_float32():
    data, noise = batch(2)
    t = time_of(torch.tensor([3, 700]))
    loss, _ = NoisePrediction().loss(noise.bfloat16(), data, noise, t)
    assert loss.dtype == torch.float32 and 0 < loss < 1e-4


def test_objectives_by_name_and_from_what_they_keep():
    for name in ("epsilon", "v_prediction"):
        objective = make_objective(name, betas="linear", beta_end=0.01)
        assert objective.prediction == name and objective.beta_start == 0.0001 and objective.beta_end == 0.01
        again = objective_of(objective.config)
        assert type(again) is NoisePrediction and again.config == objective.config
        assert same(again.scheduler.alphas_cumprod, objective.scheduler.alphas_cumprod)
    flow = make_objective("flow_matching", time="uniform", cosine_weight=0)
    assert type(flow) is FlowMatching and type(objective_of(flow.config)) is FlowMatching
    assert objective_of(flow.config).config == flow.config


@pytest.mark.parametrize(
    ("name", "numbers", "said"),
    [
        ("ddpm", {}, "No objective 'ddpm'; there are flow_matching, epsilon, v_prediction, sample"),
        ("epsilon", {"cosine_weight": 1}, "The objective epsilon has no cosine_weight; it has betas"),
        ("flow_matching", {"betas": "linear"}, "flow_matching has no betas; it has cosine_weight"),
        ("epsilon", {"betas": "cosine"}, "betas='cosine' is unknown"),
        ("epsilon", {"beta_end": 1.5}, "beta_end=1.5.*rise between 0 and 1"),
    ],
)
def test_objectives_that_cannot_be(name, numbers, said):
    with pytest.raises(UserError, match=said):
        make_objective(name, **numbers)
    with pytest.raises(UserError, match="prediction='sample' is unknown"):
        NoisePrediction("sample")
