"""RAE's time, objective and sampling, and its LightningDiT, against its own numbers."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from golden_cases import SHARED, assert_close, load_case, load_weights
from test_ddt import reference as ddt_reference
from tiny import refuses

from vavae_tools.diffusion.dit import make_denoiser, split_reference_arguments
from vavae_tools.diffusion.objectives import FlowMatching, shift_noise, time_shift_of, unmix
from vavae_tools.diffusion.solvers import guided_prediction, lay_out, make_solver, sample, time_grid
from vavae_tools.published.denoisers import RAELightningDiT, load_denoiser, read_latent_statistics

CASES = sorted({"rae-transport"} | {path.name for path in SHARED.glob("rae-transport*")})
LIGHTNING_PRECISIONS = sorted({"rae-lightningdit"} | {path.name for path in SHARED.glob("rae-lightningdit*")})
TOLERANCE = {"atol": 5e-5}
EULER = FlowMatchEulerDiscreteScheduler()


def reference(name):
    case, (model, weak, io) = load_case(name)[0], ddt_reference(name)
    return case, io, model, weak, case["transport"]["time_dist_shift"]


def objective_of(distribution: str, shift: float) -> FlowMatching:
    """RAE's, by its own name of the times' distribution."""
    name, *numbers = distribution.split("_")
    if name == "uniform":
        return FlowMatching(cosine_weight=0, time="uniform", largest_noise=0.999, time_shift=shift)
    mean, std = map(float, numbers)
    return FlowMatching(cosine_weight=0, time_mean=-mean, time_std=std, largest_noise=0.999, time_shift=shift)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_objective_equals_the_reference(name):
    _, io, model, _, shift = reference(name)
    distributions = sorted({key.split(".")[1] for key in io if key.startswith("loss.")})
    assert len(distributions) >= 2
    data, condition = io["x1_data"], model.conditioner(io["y"])
    for distribution in distributions:
        values = {key.removeprefix(f"loss.{distribution}."): io[key] for key in io if f".{distribution}." in key}
        objective, noise = objective_of(distribution, shift), values["x0_noise"]
        assert objective.time_distribution == "uniform"
        before_shift = objective_of(distribution, 1.0).sample_time(values["U"])
        assert_close(1 - before_shift, values["t_raw"], {"atol": 2e-6})
        assert_close(1 - objective.sample_time(values["U"]), values["t"], {"atol": 2e-6})
        t = 1 - values["t"]
        noisy = objective.add_noise(data, noise, t)
        assert_close(noisy, values["xt"], TOLERANCE)
        assert_close(-objective.target(data, noise, t), values["target_ut"], TOLERANCE)
        prediction = model.denoiser(noisy, t, condition)
        assert_close(-prediction, values["pred"], TOLERANCE)
        loss, parts = objective(model.denoiser, data, condition, noise, t)
        assert_close(loss, values["loss_per_sample"].mean(), TOLERANCE)
        assert set(parts) == {"mse"}


@pytest.mark.parametrize("name", CASES)
def test_shift_path_and_score_equal_the_reference(name):
    case, io, _, _, shift = reference(name)
    assert_close(shift_noise(io["shift.t_in"], shift), io["shift.t_out"], {"atol": 1e-6})
    data, noise, t = io["x1_data"], io["loss.logit-normal_0_1.x0_noise"], 1 - io["gvp.t"]
    objective = FlowMatching(path="gvp")
    assert_close(objective.add_noise(data, noise, t), io["gvp.xt"], TOLERANCE)
    assert_close(-objective.target(data, noise, t), io["gvp.ut"], TOLERANCE)
    noise = unmix(-io["conv.v"], io["conv.x"], 1 - io["conv.t"])[1]
    assert_close(-noise / io["conv.t"].view(-1, 1, 1, 1), io["conv.score"], TOLERANCE)
    dimensions = case["transport"]["time_dist_shift_dim"]
    assert time_shift_of((dimensions,), case["transport"]["time_dist_shift_base"]) == pytest.approx(shift)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_euler_and_guidance_equal_the_reference(name):
    case, io, model, weak, shift = reference(name)
    noise, condition = io["ode.z"], model.conditioner(io["ode.y"])
    steps = case["sampler"]["ode_num_points"] - 1
    grid = {"num_inference_steps": steps, "timestep_shift": 1 / shift, "last_noise": 0.001}
    solver, times = lay_out(EULER, **grid)
    assert_close(solver.sigmas, io["ode.t_grid"], {"atol": 1e-6})
    assert_close(1 - time_grid(steps, 1 / shift, 0.001), io["ode.t_grid"], {"atol": 1e-6})
    assert_close(1 - torch.tensor(times), io["ode.t_grid"][:-1], {"atol": 1e-6})

    states = [noise]
    sample(model.denoiser, EULER, noise, condition, callback=lambda i, t, x: states.append(x), **grid)
    assert_close(torch.stack(states), io["ode.traj"], TOLERANCE)

    def guided(scale, **by):
        return sample(model.denoiser, EULER, noise, condition, guidance_scale=scale.item(), **by, **grid)

    by_null = {"null": model.conditioner.null(len(noise))}
    assert_close(guided(io["ode.cfg_scale"], **by_null), io["ode.cfg_final"], TOLERANCE)
    by_null["guidance_interval"] = (1 - 0.9, 1 - 0.3)  # the reference's 0.3 to 0.9
    assert_close(guided(io["ode.cfg_scale"], **by_null), io["ode.cfg_interval_final"], TOLERANCE)
    by_guide = {"guide": weak.denoiser, "guide_conditioning": weak.conditioner(io["ode.y"])}
    assert_close(guided(io["ode.ag_scale"], **by_guide), io["ode.ag_final"], TOLERANCE)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_midpoint_and_stochastic_sampling_equal_the_reference(name):
    case, io, model, _, shift = reference(name)
    noise, condition = io["ode.z"], model.conditioner(io["ode.y"])
    grid = {"num_inference_steps": case["sampler"]["ode_num_points"] - 1, "timestep_shift": 1 / shift}
    made = sample(model.denoiser, make_solver("midpoint"), noise, condition, last_noise=0.001, **grid)
    assert_close(made, io["ode.midpoint_final"], TOLERANCE)

    settings, states = case["sampler"]["sde"], []
    solver, times = lay_out(make_solver("sde"), settings["num_steps"], 1 / shift, settings["last_step_size"])
    solver.set_begin_index(0)
    x = noise
    for timestep, t, increment in zip(solver.timesteps, times[:-1], io["sde.noise"], strict=False):
        x = solver.step(-guided_prediction(model.denoiser, x, t, condition), timestep, x, variance_noise=increment)[0]
        states.append(x)
    # the reference's last step is that of an x with as much noise as before the shift
    solver.sigmas = torch.tensor([settings["last_step_size"], 0.0])
    solver.set_begin_index(0)
    velocity = guided_prediction(model.denoiser, x, 1 - settings["last_step_size"], condition)
    states.append(solver.step(-velocity, solver.timesteps[0], x)[0])
    assert_close(torch.stack(states), io["sde.traj"], TOLERANCE)


@pytest.mark.parametrize("name", LIGHTNING_PRECISIONS)
@torch.no_grad()
def test_raes_lightningdit_equals_the_reference(name):
    case, io = load_case(name)
    model = load_denoiser("lightningdit", load_weights(name), case["constructor"])
    assert isinstance(model, RAELightningDiT)
    out = model(io["x"], io["t"], io["y"])
    assert_close(out, io["out"], {"atol": 2e-5})
    assert_close(-model.denoiser(io["x"], 1 - io["t"], model.conditioner(io["y"])), out, {"atol": 2e-5})
    scale = io["cfg.scale"].item()
    guided = model.forward_with_cfg(io["cfg.x"], io["cfg.t"], io["cfg.y"], scale, [])
    assert_close(guided, io["cfg.out"], {"atol": 2e-5})


SMALL = {"input_size": 4, "in_channels": 3, "hidden_size": 16, "depth": 1, "num_heads": 2, "num_classes": 4}


@torch.no_grad()
def test_raes_lightningdit_guides_outside_its_list_and_inside_its_interval():
    torch.manual_seed(0)
    denoiser = make_denoiser({**split_reference_arguments(SMALL)[0], "time_embed": "fourier"})
    for parameter in denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    table = {"y_embedder.embedding_table.weight": torch.randn(5, 16)}
    model = load_denoiser("rae_lightningdit", {**denoiser.state_dict(), **table}, SMALL)
    x, y = torch.randn(2, 3, 4, 4), torch.tensor([1, 4])
    x = x[:1].repeat(2, 1, 1, 1)
    for t, inside in ((0.3, True), (0.6, False), (0.2, True)):
        t = torch.full((2,), t)
        conditional, null = model(x, t, y).chunk(2)
        for interval, other, scale in (
            ((), 0.0, 3),
            ([(0.2, 0.6)], 0.0, 1 if inside else 3),
            ([(0.9, 1.0), (0.2, 0.6)], 2.0, 2 if inside else 3),
            ((0.2, 0.5), 0.0, 3 if inside else 1),
        ):
            expected = (null + scale * (conditional - null)).repeat(2, 1, 1, 1)
            by_null = model.forward_with_cfg(x, t, y, 3.0, interval, other)
            weaker = lambda x, t, y: model(x, t, torch.full_like(y, 4))  # noqa: E731  (with the null label)
            by_weaker = model.forward_with_autoguidance(x, t, y, 3.0, weaker, interval, other)
            for made in (by_null, by_weaker):
                torch.testing.assert_close(made, expected, rtol=1e-5, atol=1e-5)


def test_latent_statistics_are_read(tmp_path):
    case, io = load_case("latent_stats")
    path = tmp_path / "latents_stats.pt"
    torch.save({"mean": io["mean"], "std": io["std"]}, path)
    mean, std = map(torch.tensor, read_latent_statistics(path))
    normal = (io["latents"][1] - mean[:, None, None]) / std[:, None, None]
    assert_close(normal * case["latent_multiplier"], io["item1_plain"], case["tolerance"])
    ones = torch.ones(1, 4, 1, 1)
    for saved, said in (
        ({"mean": ones, "var": ones}, r"holds mean \(1, 4, 1, 1\), var .* expected mean and std"),
        ({"mean": ones, "std": torch.zeros(1, 4, 1, 1)}, "std of 0"),
        ({"mean": ones * float("nan"), "std": ones}, "not finite"),
    ):
        torch.save(saved, path)
        refuses(said, read_latent_statistics, path)
