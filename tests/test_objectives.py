"""Objectives: paths, times, targets and losses against the references, formulas and diffusers' schedule."""

import copy

import pytest
import torch
from golden_cases import assert_close, load_case, load_weights, reference_parameters
from tiny import refuses, same

from vavae_tools.diffusion import objectives
from vavae_tools.diffusion.objectives import (
    FlowMatching,
    NoisePrediction,
    SamplePrediction,
    make_objective,
    objective_of,
)
from vavae_tools.published import load_reference
from vavae_tools.runtime.draws import Draws

ALL = torch.arange(1000)


def numbers(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_path_target_and_loss_equal_the_reference():
    case, io = load_case("transport")
    objective, tolerance = FlowMatching(cosine_eps=1e-8), case["tolerance"]
    data, noise, t = io["x1"], io["x0"], io["t"]
    assert_close(objective.add_noise(data, noise, t), io["xt"], tolerance)
    assert_close(objective.target(data, noise, t), io["ut"], tolerance)
    told = objectives.unmix(io["model_output"][1:-1], io["xt"][1:-1], t[1:-1])[1]
    assert_close(-told / (1 - t[1:-1].view(-1, 1, 1, 1)), io["score_from_velocity"], tolerance)

    prediction = io["model_output"].clone().requires_grad_()
    loss, parts = objective.loss(prediction, data, noise, t)
    assert_close(loss.detach(), io["total_loss"][0], tolerance)
    assert_close(parts["mse"], io["loss"].mean(), tolerance)
    assert_close(parts["cosine"], io["cos_loss"].mean(), tolerance)
    loss.backward()
    assert_close(prediction.grad, io["grad_of_total_wrt_model_output"], tolerance)


def test_times_have_the_reference_quantiles():
    case, _ = load_case("transport")
    objective, draws = FlowMatching(), Draws(seed=0, epoch=0, samples=torch.arange(200_000))
    assert objective.time_distribution == "normal"
    t = objective.sample_time(draws.normal("time"))
    for p, expected in case["lognorm_quantiles_1M_samples"]["mu=0,sigma=1"].items():
        assert t.quantile(float(p)).item() == pytest.approx(expected, abs=0.005)
    objective, uniform = FlowMatching(time="uniform"), draws.uniform("time")
    assert objective.time_distribution == "uniform" and same(objective.sample_time(uniform), uniform)


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_targets_are_the_derivative_of_the_path(path):
    objective, t, step = FlowMatching(path=path), torch.tensor([0.2, 0.9], dtype=torch.float64), 1e-6
    data, noise = numbers(2, 3, 4, 4).double(), numbers(2, 3, 4, 4, seed=1).double()
    rate = (objective.add_noise(data, noise, t + step) - objective.add_noise(data, noise, t - step)) / (2 * step)
    torch.testing.assert_close(objective.target(data, noise, t), rate, rtol=1e-6, atol=1e-6)
    ends = [objective.add_noise(data, noise, torch.full((2,), end, dtype=torch.float64)) for end in (0.0, 1.0)]
    torch.testing.assert_close(torch.stack(ends), torch.stack([noise, data]))
    told = objectives.unmix(rate, objective.add_noise(data, noise, t), t, path)
    torch.testing.assert_close(torch.stack(told), torch.stack([data, noise]), rtol=1e-5, atol=1e-5)
    if path == "gvp":  # it keeps the variance
        alpha, sigma = objective.shares(torch.linspace(0, 1, 9))
        torch.testing.assert_close(alpha**2 + sigma**2, torch.ones(9))


def test_the_shift_depends_on_the_size_of_latents():
    assert objectives.time_shift_of((768, 16, 16)) == pytest.approx(6.928203230275509)
    assert objectives.time_shift_of((4, 32, 32)) == 1
    r = torch.linspace(0, 1, 9)
    shifted = objectives.shift_noise(r, 5.0)
    torch.testing.assert_close(objectives.shift_noise(shifted, 1 / 5.0), r)  # the inverse is that of 1/s
    # the same of every signal is hidden: σ/α grows s-fold
    torch.testing.assert_close((shifted / (1 - shifted))[1:-1], (5 * r / (1 - r))[1:-1])


@pytest.mark.parametrize("time", ["lognorm", "uniform"])
def test_shifted_times_are_plain_times_moved_to_the_noise(time):
    plain, shifted = FlowMatching(time=time), FlowMatching(time=time, time_shift=4.0)
    draws = getattr(Draws(0, 0, torch.arange(100)), plain.time_distribution)("time")
    t = plain.sample_time(draws)
    torch.testing.assert_close(shifted.sample_time(draws), t / (4 - 3 * t))
    assert plain.time_distribution == shifted.time_distribution


@pytest.mark.parametrize("mean", [0.0, 0.7])
def test_truncated_times_are_the_plain_ones_that_are_kept(mean):
    # many draws of the plain distribution with the noisiest thrown away have the same quantiles
    limit, count = 0.8, 100_000
    uniform = Draws(0, 0, torch.arange(count)).uniform("time")
    truncated = FlowMatching(time_mean=mean, time_std=1.5, largest_noise=limit)
    assert truncated.time_distribution == "uniform"
    t = truncated.sample_time(uniform)
    assert (1 - t).max() <= limit + 1e-6
    plain = FlowMatching(time_mean=mean, time_std=1.5).sample_time(Draws(1, 0, torch.arange(count)).normal("time"))
    kept = plain[1 - plain <= limit]
    for p in (0.1, 0.5, 0.9):
        assert t.quantile(p).item() == pytest.approx(kept.quantile(p).item(), abs=0.01)
    flat = FlowMatching(time="uniform", largest_noise=limit).sample_time(uniform)
    torch.testing.assert_close(1 - flat, limit * uniform)


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_the_weight_of_the_direction_counts(path):
    data, noise, wrong, t = *(numbers(3, 2, 4, 4, seed=i) for i in range(3)), torch.rand(3)
    loss, parts = FlowMatching(cosine_weight=0, path=path).loss(wrong, data, noise, t)
    assert set(parts) == {"mse"} and same(loss, parts["mse"])
    loss, parts = FlowMatching(cosine_weight=0.3, path=path).loss(wrong, data, noise, t)
    torch.testing.assert_close(loss, parts["mse"] + 0.3 * parts["cosine"])
    objective = FlowMatching(path=path)
    assert objective.loss(objective.target(data, noise, t), data, noise, t)[0].abs() < 1e-6
    loss, parts = objective.loss(wrong.half(), data.half(), noise.half(), t)
    assert loss.dtype == parts["mse"].dtype == torch.float32


def test_three_training_steps_equal_the_reference():
    case, io = load_case("train_step")
    constructor = load_case("lightningdit-a")[0]["constructor"]
    settings, tolerance = case["settings"], case["tolerance"]
    model = load_reference("lightningdit", load_weights("lightningdit-a"), constructor).train()
    ema, objective, checked = copy.deepcopy(model), FlowMatching(), 0
    of_adam = {name: settings[name] for name in ("lr", "betas", "weight_decay", "eps")}
    optimizer = torch.optim.AdamW(model.parameters(), **of_adam)
    for step, expected in enumerate(case["losses"]):
        data, noise, t, labels, drop = (io[f"{name}_{step}"] for name in ("x1", "x0", "t", "y", "drop"))
        loss, parts = objective(model.denoiser, data, model.conditioner(labels, drop), noise, t)
        for found, name in ((loss, "total"), (parts["mse"], "mse"), (parts["cosine"], "cos")):
            assert found.item() == pytest.approx(expected[name], rel=tolerance["loss"]["rtol"])
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in reference_parameters(model).items() if step == 0 else ():
            if f"grad0.{name}" in io:
                assert_close(parameter.grad, io[f"grad0.{name}"], tolerance["gradients"])
                checked += 1
            norm = case["gradient_norms_step0"][name]
            assert parameter.grad.norm().item() == pytest.approx(norm, rel=1e-3, abs=1e-6)
        optimizer.step()
        with torch.no_grad():
            for averaged, parameter in zip(ema.parameters(), model.parameters(), strict=True):
                averaged.lerp_(parameter, 1 - settings["ema_decay"])
    for prefix, source in (("param_after.", model), ("ema_after.", ema)):
        for name, parameter in reference_parameters(source).items():
            if prefix + name in io:
                assert_close(parameter.detach(), io[prefix + name], tolerance["params"])
                checked += 1
    assert checked == sum(key.startswith(("grad0.", "param_after.", "ema_after.")) for key in io)


# ---- the clean image, of the pixels of a mask alone
def test_the_loss_is_the_mean_over_the_pixels_of_the_mask():
    prediction, data = torch.tensor([[[[1.0, 2.0]], [[3.0, 9.0]]]]), torch.zeros(1, 2, 1, 2)  # (1, 2, 1, 2)
    mask, t = torch.tensor([[[1.0, 0.0]]]), torch.tensor([0.5])
    assert SamplePrediction().loss(prediction, data, data, t, mask)[0].item() == (1 + 9) / 2
    assert SamplePrediction("pixels").loss(prediction, data, data, t, mask)[0].item() == 1 + 9  # C times as much
    assert SamplePrediction().loss(prediction, data, data, t, mask, torch.tensor(5.0))[0].item() == (1 + 9) / 10
    empty = prediction.clone().requires_grad_()
    loss = SamplePrediction().loss(empty, data, data, t, torch.zeros(1, 1, 2))[0]
    loss.backward()
    assert loss == 0 and same(empty.grad, torch.zeros_like(empty))
    large = torch.full((1, 1, 64, 64), 300.0, dtype=torch.float16)  # whose square float16 cannot hold
    assert SamplePrediction().loss(large, large * 0, large, t, torch.ones(1, 64, 64))[0] == 90_000


@pytest.mark.parametrize("length", [48, 192])
def test_where_noise_hides_a_cell_its_token_is_told_now_and_then(length):
    """At this noise an orthogonal code of as many pixels is told from one other in most cases, from 255 in few."""
    # half the distance of two cells that differ in half of the pixels, in deviations
    apart = (length / 2) ** 0.5 / objectives.noise_level_hiding_a_token(length)
    one = torch.special.ndtr(torch.tensor(apart)).item()
    assert 0.85 < one < 0.95 and one**255 < 1e-6


# ---- noise and v, on diffusers' schedule
def test_every_timestep_comes_back_from_its_time():
    objective, t, draws = NoisePrediction(), objectives.time_of(ALL), (torch.arange(4000) + 0.5) / 4000
    assert t.dtype == torch.float32 and t.min() > 0 and t.max() < 1 and (t.diff() < 0).all()
    assert same(objective.timestep_of(t), ALL)
    assert objective.timestep_of(torch.tensor([0.0, 1.0])).tolist() == [999, 0]
    assert objective.time_distribution == "uniform"  # and its draws fall on every timestep equally often
    assert objective.timestep_of(objective.sample_time(draws)).bincount().tolist() == [4] * 1000
    assert objective.timestep_of(objective.sample_time(torch.tensor([1 - 2.0**-24, 2.0**-24]))).tolist() == [999, 0]


@pytest.mark.parametrize("betas", ["scaled_linear", "linear"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_noise_and_v_are_the_formulas(betas, prediction):
    objective, t = NoisePrediction(prediction, betas), objectives.time_of(ALL)
    data, noise = numbers(1000, 2, 2, 2), numbers(1000, 2, 2, 2, seed=1)
    power = 0.5 if betas == "scaled_linear" else 1.0
    rising = torch.linspace(objective.beta_start**power, objective.beta_end**power, 1000, dtype=torch.float64)
    kept = (1 - rising ** (1 / power)).cumprod(0).view(-1, 1, 1, 1)
    alpha, sigma = kept.sqrt().float(), (1 - kept).sqrt().float()
    noisy, target = objective.add_noise(data, noise, t), objective.target(data, noise, t)
    torch.testing.assert_close(noisy, alpha * data + sigma * noise, rtol=0, atol=2e-5)
    expected = noise if prediction == "epsilon" else alpha * noise - sigma * data
    torch.testing.assert_close(target, expected, rtol=0, atol=2e-5)
    if betas == "scaled_linear":  # Stable Diffusion's published largest sigma
        assert (sigma[-1] / alpha[-1]).item() == pytest.approx(14.6146, abs=1e-4)


# ---- by name
def test_objectives_by_name_and_from_what_they_keep():
    names = {"flow_matching": FlowMatching, "sample": SamplePrediction, "x0": SamplePrediction}
    names |= dict.fromkeys(("epsilon", "v_prediction", "v"), NoisePrediction)
    for name, kind in names.items():
        objective = make_objective(name, betas=None)
        again = objective_of(objective.config)
        assert type(objective) is type(again) is kind and again.config == objective.config
    assert make_objective("v").config == make_objective("v_prediction").config
    objective = make_objective("epsilon", betas="linear", beta_end=0.01)
    betas = {"betas": "linear", "beta_start": 0.0001, "beta_end": 0.01}
    assert objective.config == {"prediction": "epsilon", **betas, "num_timesteps": 1000}
    other = {"cosine_weight": 0.0, "time": "uniform", "time_mean": 0.5, "time_std": 0.8, "cosine_eps": 1e-2}
    other |= {"time_shift": 6.9, "largest_noise": 0.999, "path": "gvp"}
    assert objective_of(other).config == other
    assert objective_of({}).config == FlowMatching().config  # checkpoints that tell nothing


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("ddpm", {}, "No objective 'ddpm'; there are flow_matching, epsilon, v_prediction, sample"),
        ("flow_maching", {}, r"No objective 'flow_maching' \(did you mean flow_matching\?\); there are flow_matching"),
        ("epsilon", {"cosine_weight": 1}, "No argument 'cosine_weight' of the objective epsilon; there are betas"),
        ("flow_matching", {"time_shft": 1}, r"'time_shft' .* \(did you mean time_shift\?\); there are cosine_weight"),
        ("flow_matching", {"largest_noise": 1.5}, "largest_noise=1.5"),
    ],
)
def test_objectives_that_cannot_be(name, settings, message):
    refuses(message, make_objective, name, **settings)
