import copy

import pytest
import torch
from golden_cases import assert_close, load_case, load_weights

from vavae_tools.diffusion.objectives import FlowMatching, score_from_velocity, shift_noise, time_shift_of
from vavae_tools.published import load_reference
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError


def test_path_target_and_loss_equal_the_reference():
    case, io = load_case("transport")
    objective, tolerance = FlowMatching(cosine_eps=1e-8), case["tolerance"]
    data, noise, t = io["x1"], io["x0"], io["t"]
    assert_close(objective.add_noise(data, noise, t), io["xt"], tolerance)
    assert_close(objective.target(data, noise), io["ut"], tolerance)

    prediction = io["model_output"].clone().requires_grad_()
    loss, parts = objective.loss(prediction, data, noise, t)
    assert_close(loss.detach(), io["total_loss"][0], tolerance)
    assert_close(parts["mse"], io["loss"].mean(), tolerance)
    assert_close(parts["cosine"], io["cos_loss"].mean(), tolerance)
    loss.backward()
    assert_close(prediction.grad, io["grad_of_total_wrt_model_output"], tolerance)
    for i in range(len(t)):  # sample by sample
        _, parts = objective.loss(*(tensor[i : i + 1] for tensor in (io["model_output"], data, noise, t)))
        assert_close(parts["mse"], io["loss"][i], tolerance)
        assert_close(parts["cosine"], io["cos_loss"][i], tolerance)


def test_score_equals_the_reference():
    case, io = load_case("transport")
    score = score_from_velocity(io["model_output"][1:-1], io["xt"][1:-1], io["t"][1:-1])
    assert_close(score, io["score_from_velocity"], case["tolerance"])


def test_score_of_the_true_velocity_is_that_of_the_noise():
    data, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.1, 0.5, 0.9])
    objective = FlowMatching()
    score = score_from_velocity(objective.target(data, noise), objective.add_noise(data, noise, t), t)
    torch.testing.assert_close(score, -noise / (1 - t.view(-1, 1, 1, 1)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("source", ["torch", "draws"])
def test_times_have_the_reference_quantiles(source):
    case, _ = load_case("transport")
    objective, count = FlowMatching(), 200_000
    assert objective.time_draws == "normal"
    if source == "torch":
        draws = torch.randn(count, generator=torch.Generator().manual_seed(0))
    else:
        draws = getattr(Draws(seed=0, epoch=0, samples=torch.arange(count)), objective.time_draws)("time")
    t = objective.sample_time(draws)
    for p, expected in case["lognorm_quantiles_1M_samples"]["mu=0,sigma=1"].items():
        assert t.quantile(float(p)).item() == pytest.approx(expected, abs=0.005)


def test_uniform_times_are_the_draws():
    objective = FlowMatching(time="uniform")
    draws = torch.rand(5)
    assert objective.time_draws == "uniform" and torch.equal(objective.sample_time(draws), draws)
    with pytest.raises(UserError, match="'lognorm' or 'uniform'"):
        FlowMatching(time="normal")


@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_targets_are_the_derivative_of_the_path(path):
    objective = FlowMatching(path=path)
    data, noise = torch.randn(2, 3, 4, 4).double(), torch.randn(2, 3, 4, 4).double()
    t, step = torch.tensor([0.2, 0.9], dtype=torch.float64), 1e-6
    rate = (objective.add_noise(data, noise, t + step) - objective.add_noise(data, noise, t - step)) / (2 * step)
    torch.testing.assert_close(objective.target(data, noise, t), rate, rtol=1e-6, atol=1e-6)
    ends = [objective.add_noise(data, noise, torch.full((2,), end, dtype=torch.float64)) for end in (0.0, 1.0)]
    torch.testing.assert_close(torch.stack(ends), torch.stack([noise, data]))
    score = score_from_velocity(rate, objective.add_noise(data, noise, t), t, path)
    sigma = 1 - t if path == "linear" else torch.cos(t * torch.pi / 2)
    torch.testing.assert_close(score, -noise / sigma.view(-1, 1, 1, 1), rtol=1e-5, atol=1e-5)


def test_the_variance_preserving_path_keeps_variance():
    data, noise = torch.randn(1, 1, 200, 200), torch.randn(1, 1, 200, 200)
    for t in (0.1, 0.5, 0.8):
        mixed = FlowMatching(path="gvp").add_noise(data, noise, torch.tensor([t]))
        assert mixed.var().item() == pytest.approx(1, abs=0.03)


def test_paths_and_settings_that_do_not_exist_are_named():
    data, t = torch.randn(2, 3, 4, 4), torch.rand(2)
    with pytest.raises(UserError, match="path='vp' is unknown; it is 'linear' or 'gvp'"):
        FlowMatching(path="vp")
    with pytest.raises(UserError, match="give target its t"):
        FlowMatching(path="gvp").target(data, data)
    with pytest.raises(UserError, match="path='GVP'"):
        score_from_velocity(data, data, t, path="GVP")
    with pytest.raises(UserError, match="time_shift=0"):
        FlowMatching(time_shift=0)
    for wrong in (0, 1.5):
        with pytest.raises(UserError, match="largest_noise"):
            FlowMatching(largest_noise=wrong)


def test_the_shift_depends_on_the_size_of_latents():
    assert time_shift_of((768, 16, 16)) == pytest.approx(6.928203230275509)
    assert time_shift_of((768, 32, 32)) == pytest.approx(13.856406460551018)
    assert time_shift_of((4, 32, 32)) == 1
    r = torch.linspace(0, 1, 9)
    assert torch.equal(shift_noise(r, 1.0), r)
    torch.testing.assert_close(shift_noise(shift_noise(r, 3.0), 1 / 3.0), r)  # the inverse is that of 1/s
    # the same of every signal is hidden: σ/α grows s-fold
    ratio = shift_noise(r[1:-1], 5.0) / (1 - shift_noise(r[1:-1], 5.0))
    torch.testing.assert_close(ratio, 5 * r[1:-1] / (1 - r[1:-1]))


@pytest.mark.parametrize("time", ["lognorm", "uniform"])
def test_shifted_times_are_plain_times_moved_to_the_noise(time):
    plain, shifted = FlowMatching(time=time), FlowMatching(time=time, time_shift=4.0)
    assert plain.time_draws == shifted.time_draws
    draws = getattr(Draws(0, 0, torch.arange(100)), plain.time_draws)("time")
    t, moved = plain.sample_time(draws), shifted.sample_time(draws)
    torch.testing.assert_close(moved, t / (4 - 3 * t))
    assert (moved < t).all()


@pytest.mark.parametrize("mean", [0.0, 0.7])
def test_truncated_times_are_the_plain_ones_that_are_kept(mean):
    # many draws of the plain distribution with the noisiest thrown away have the same quantiles
    limit, count = 0.8, 100_000
    uniform = Draws(0, 0, torch.arange(count)).uniform("time")
    truncated = FlowMatching(time_mean=mean, time_std=1.5, largest_noise=limit)
    assert truncated.time_draws == "uniform"
    t = truncated.sample_time(uniform)
    assert (1 - t).max() <= limit + 1e-6
    plain = FlowMatching(time_mean=mean, time_std=1.5).sample_time(Draws(1, 0, torch.arange(count)).normal("time"))
    kept = plain[1 - plain <= limit]
    for p in (0.1, 0.5, 0.9):
        assert t.quantile(p).item() == pytest.approx(kept.quantile(p).item(), abs=0.01)
    flat = FlowMatching(time="uniform", largest_noise=limit).sample_time(uniform)
    torch.testing.assert_close(1 - flat, limit * uniform)


def test_an_objective_is_made_again_from_its_config():
    assert FlowMatching(**FlowMatching().config).config == FlowMatching().config
    other = {
        "cosine_weight": 0.0,
        "time": "uniform",
        "time_mean": 0.5,
        "time_std": 0.8,
        "cosine_eps": 1e-2,
        "time_shift": 6.9,
        "largest_noise": 0.999,
        "path": "gvp",
    }
    assert FlowMatching(**other).config == other


def test_without_its_weight_the_direction_is_not_computed():
    data, noise, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.rand(3)
    wrong = torch.randn(3, 2, 4, 4)
    for path in ("linear", "gvp"):
        objective = FlowMatching(cosine_weight=0, path=path)
        loss, parts = objective.loss(wrong, data, noise, t)
        assert set(parts) == {"mse"} and torch.equal(loss, parts["mse"])
        errors = objective.squared_error(wrong, data, noise, t)
        assert errors.shape == (3,)
        torch.testing.assert_close(errors.mean(), loss)
        one = objective.loss(wrong[1:2], data[1:2], noise[1:2], t[1:2])[0]
        torch.testing.assert_close(errors[1], one)


def test_ends_of_the_path():
    data, noise = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    assert torch.equal(FlowMatching().add_noise(data, noise, torch.zeros(2)), noise)
    assert torch.equal(FlowMatching().add_noise(data, noise, torch.ones(2)), data)


def test_the_true_velocity_has_no_loss_and_the_weight_counts():
    data, noise, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.rand(2)
    loss, _ = FlowMatching().loss(data - noise, data, noise, t)
    assert loss.abs() < 1e-6
    wrong = torch.randn(2, 3, 4, 4)
    loss, parts = FlowMatching(cosine_weight=0.3).loss(wrong, data, noise, t)
    torch.testing.assert_close(loss, parts["mse"] + 0.3 * parts["cosine"])
    loss, parts = FlowMatching().loss(wrong.half(), data.half(), noise.half(), t)
    assert loss.dtype == parts["mse"].dtype == torch.float32


def test_cosine_eps_tames_the_gradient_of_a_fresh_model():
    data, noise, t = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4), torch.rand(2)
    for eps, low, high in ((1e-8, 1e5, float("inf")), (1e-2, 0, 10)):
        prediction = torch.zeros(2, 3, 4, 4, requires_grad=True)
        FlowMatching(cosine_eps=eps).loss(prediction, data, noise, t)[0].backward()
        assert low < prediction.grad.abs().max() < high
    wrong = torch.randn(2, 3, 4, 4)
    losses = [FlowMatching(cosine_eps=eps).loss(wrong, data, noise, t)[0] for eps in (1e-8, 1e-2)]
    assert torch.equal(*losses)


def test_three_training_steps_equal_the_reference():
    case, io = load_case("train_step")
    constructor = load_case("lightningdit-a")[0]["constructor"]
    settings, tolerance = case["settings"], case["tolerance"]
    model = load_reference("lightningdit", load_weights("lightningdit-a"), constructor).train()
    ema = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=settings["lr"],
        betas=settings["betas"],
        weight_decay=settings["weight_decay"],
        eps=settings["eps"],
    )
    objective = FlowMatching()
    checked = 0
    for step, expected in enumerate(case["losses"]):
        data, noise, t, labels, drop = (io[f"{name}_{step}"] for name in ("x1", "x0", "t", "y", "drop"))
        loss, parts = objective(model.denoiser, data, model.conditioner(labels, drop), noise, t)
        assert loss.item() == pytest.approx(expected["total"], rel=tolerance["loss"]["rtol"])
        assert parts["mse"].item() == pytest.approx(expected["mse"], rel=tolerance["loss"]["rtol"])
        assert parts["cosine"].item() == pytest.approx(expected["cos"], rel=tolerance["loss"]["rtol"])
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            for name, parameter in named(model).items():
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
        for name, parameter in named(source).items():
            if prefix + name in io:
                assert_close(parameter.detach(), io[prefix + name], tolerance["params"])
                checked += 1
    assert checked == sum(key.startswith(("grad0.", "param_after.", "ema_after.")) for key in io)


def named(model):
    """Parameters under the reference's names."""
    return {
        name.replace("conditioner.", "y_embedder.").removeprefix("denoiser."): parameter
        for name, parameter in model.named_parameters()
    }
