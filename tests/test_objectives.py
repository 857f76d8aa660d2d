import copy

import pytest
import torch
from golden_cases import assert_close, load_case, load_weights

from vavae_tools.convert import load_reference
from vavae_tools.diffusion.objectives import FlowMatching, score_from_velocity
from vavae_tools.draws import Draws
from vavae_tools.errors import UserError


def test_path_target_and_loss_equal_the_reference():
    case, io = load_case("transport")
    objective, tolerance = FlowMatching(), case["tolerance"]
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
