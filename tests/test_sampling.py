import pytest
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from golden_cases import assert_close, load_case, load_weights
from tiny import refuses

from vavae_tools.diffusion.objectives import FlowMatching, make_objective
from vavae_tools.diffusion.solvers import guided_prediction, lay_out, make_solver, sample, solvers_for, time_grid
from vavae_tools.published import load_reference

SOLVERS = {name: make_solver(name) for name in solvers_for(FlowMatching())}


@pytest.mark.parametrize("i", range(4))
def test_sampling_equals_the_reference(i):
    case, io = load_case("sampling")
    run = case["runs"][i]
    constructor = load_case("lightningdit-a")[0]["constructor"]
    model = load_reference("lightningdit", load_weights("lightningdit-a"), constructor)
    given, seen = (io["noise"], model.conditioner(io["y"]), model.conditioner.null(len(io["y"]))), []
    settings = {"num_inference_steps": run["num_steps"] - 1, "timestep_shift": run["timestep_shift"]}  # grid points
    settings |= {"guidance_scale": run["cfg_scale"] or 1.0, "guidance_channels": "first3"}
    settings["guidance_interval"] = (run["cfg_interval_start"] or 0.0, 1.0)
    keep = lambda _, t, x: seen.append((t, x.clone()))  # noqa: E731
    out = sample(model.denoiser, FlowMatchEulerDiscreteScheduler(), *given, callback=keep, **settings)
    times, states = zip(*seen, strict=True)
    assert times == pytest.approx(run["t_evaluated"], abs=2e-7) and len(states) == run["euler_steps_done"]
    assert_close(out, io[run["output"]], case["tolerance"])
    assert_close(states[0], io[f"state_after_step1_{i}"], case["tolerance"])
    assert_close(states[run["state_middle_index"] - 1], io[f"state_middle_{i}"], case["tolerance"])


def test_grids_equal_the_reference():
    _, io = load_case("transport")
    for key in (key for key in io if key.startswith("tgrid_")):
        shift, points = key.removeprefix("tgrid_shift").split("_n")
        solver, times = lay_out(SOLVERS["euler"], int(points) - 1, float(shift))
        torch.testing.assert_close(torch.tensor([*times, 1.0]), io[key], rtol=0, atol=1e-6)
        assert solver.sigmas[-1] == 0
    for given in ((1, 1.0, 0.0), (7, 0.3, 0.0), (5, 1 / 6.93, 0.001), (4, 0.0, 0.2)):
        (solver, times), grid = lay_out(SOLVERS["euler"], *given), time_grid(*given)
        torch.testing.assert_close(grid, 1 - solver.sigmas, rtol=0, atol=1e-6)
        torch.testing.assert_close(grid[:-1], torch.tensor(times), rtol=0, atol=1e-6)
    plain = lay_out(SOLVERS["euler"], 7)[1]
    assert plain == lay_out(SOLVERS["euler"], 7, 1.0)[1] == lay_out(SOLVERS["euler"], 7, 0.0)[1]
    own = FlowMatchEulerDiscreteScheduler(shift=4.0)  # which holds unless another one is given
    assert lay_out(own, 7)[1] == lay_out(SOLVERS["euler"], 7, 0.25)[1]
    assert own.config.shift == 4.0 and len(own.timesteps) == 1000  # and it is left as it was


def constant(x, t, conditioning, mask=None):
    """A velocity of the condition's value everywhere."""
    return conditioning[:, :, None, None].expand_as(x)


@pytest.mark.parametrize("steps", [1, 6])
def test_euler_is_exact_on_a_constant_velocity_and_leaves_the_last_noise_in(steps):
    noise, velocity = torch.randn(2, 3, 4, 4), torch.randn(2, 3)
    for last in (0.0, 0.1):
        out = sample(constant, SOLVERS["euler"], noise, velocity, None, steps, timestep_shift=0.25, last_noise=last)
        left = 4 * last / (1 + 3 * last)  # shifted
        torch.testing.assert_close(out, noise + (1 - left) * velocity[:, :, None, None], rtol=1e-5, atol=1e-5)


MEAN, STD = 1.5, 0.4


def telling(objective, data_of):
    """A denoiser that says what data it expects, data_of(x, t, alpha, sigma, conditioning), as the objective has it."""

    def denoiser(x, t, conditioning, mask=None):
        alpha, sigma = (share.to(x.dtype) for share in objective.shares(t.view(-1, 1, 1, 1)))
        data = data_of(x, t, alpha, sigma, conditioning)
        return objective.target(data, (x - alpha * data) / sigma, t)

    return denoiser


def best(objective):
    """The best denoiser for data ~ N(MEAN, STD²), whose flow takes noise z to MEAN + STD·z."""

    def data_of(x, t, alpha, sigma, conditioning):
        return MEAN + alpha * STD**2 * (x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)

    return telling(objective, data_of)


gaussian = best(FlowMatching())


def error_on_gaussian_data(name, steps, objective):
    noise, solver = torch.linspace(-2, 2, 16).view(1, 1, 4, 4), make_solver(name, objective)
    out = sample(best(objective), solver, noise, torch.zeros(1, 1), None, steps, objective=objective)
    alpha, sigma = objective.shares(torch.zeros(1))  # a schedule begins with a little data
    expected = MEAN + STD * (noise - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2).sqrt()
    return (out - expected).abs().max().item()


@pytest.mark.parametrize("name", ["flow_matching", "epsilon", "v", "x0", "gvp"])
def test_every_solver_that_fits_goes_where_the_flow_goes(name):
    objective = FlowMatching(path="gvp") if name == "gvp" else make_objective(name)
    fitting = solvers_for(objective)
    expected = {"discrete": ["dpm++", "unipc", "ddpm", "ddim"], "gvp": ["euler", "heun", "adams", "midpoint", "sde"]}
    assert fitting == expected.get(objective.path, ["euler", "heun", "adams", "midpoint", "sde", "dpm++", "unipc"])
    for solver in set(fitting) - {"sde", "ddpm"}:  # which go their own ways
        coarse, fine = (error_on_gaussian_data(solver, steps, objective) for steps in (20, 100))
        assert fine < max(coarse / 3, 2e-3) and fine < 0.05, solver


def test_solvers_converge_at_their_order():
    error = {name: [error_on_gaussian_data(name, steps, FlowMatching()) for steps in (16, 32)] for name in SOLVERS}
    for name, order in (("euler", 1), ("heun", 2), ("adams", 1.6), ("midpoint", 2)):
        assert error[name][0] / error[name][1] > 0.9 * 2**order
    assert max(error["dpm++"][0], error["unipc"][0]) < error["euler"][0] / 4


def test_model_calls_are_counted():
    calls = []

    def counted(x, *given):
        calls.append(len(x))
        return gaussian(x, *given)

    for name, solver in SOLVERS.items():
        calls.clear()
        sample(counted, solver, torch.randn(2, 1, 4, 4), torch.zeros(2, 1), num_inference_steps=8)
        assert calls == [2] * {"heun": 15, "midpoint": 16}.get(name, 8), name


@pytest.mark.parametrize("by_guide", [False, True])
def test_guidance_formula(by_guide):
    x, condition, other = torch.randn(2, 4, 3, 3), torch.randn(2, 4), torch.randn(2, 4)
    strong, weak = constant(x, None, condition), constant(x, None, other)
    by = {"guide": constant, "guide_conditioning": other} if by_guide else {"null": other}

    def guided(scale, t=0.5, **settings):
        return guided_prediction(constant, x, t, condition, guidance_scale=scale, **by, **settings)

    torch.testing.assert_close(guided(3.0), weak + 3 * (strong - weak))
    first3 = guided(3.0, guidance_channels="first3")
    torch.testing.assert_close(first3[:, :3], (weak + 3 * (strong - weak))[:, :3])
    assert torch.equal(first3[:, 3:], strong[:, 3:]) and torch.equal(guided(1.0), strong)
    assert torch.equal(guided(3.0, 0.1, guidance_interval=(0.125, 1.0)), strong)
    assert torch.equal(guided(3.0, 0.9, guidance_interval=(0.0, 0.8)), strong)
    below = torch.tensor(0.7).item()  # in float32 it is a little less: an interval that begins there must include it
    assert not torch.equal(guided(3.0, below, guidance_interval=(0.7, 1.0)), strong)
    half = guided_prediction(constant, x, 0.5, condition, None, 2.0, guide=lambda x, t, c: 0.5 * constant(x, t, c))
    torch.testing.assert_close(half, 1.5 * strong)  # by default the guide has the same conditions


def test_what_a_solver_computes_stays_float32_inside_of_autocast():
    """Of third order UniPC multiplies matrices, which autocast would do in half precision."""
    flow = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
    solver, noise = UniPCMultistepScheduler(solver_order=3, **flow), torch.randn(1, 2, 4, 4)
    alone = sample(gaussian, solver, noise, torch.zeros(1, 1), num_inference_steps=5)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sample(gaussian, solver, noise, torch.zeros(1, 1), num_inference_steps=5), alone)


@pytest.mark.parametrize(
    ("objective", "solver"),
    [(FlowMatching(), "sde"), (FlowMatching(path="gvp"), "sde"), (make_objective("epsilon"), "ddpm")],
)
def test_stochastic_samples_have_the_data_distribution(objective, solver):
    noise = torch.randn(100, 1, 10, 10, generator=torch.Generator().manual_seed(0))
    solver = make_solver(solver, objective)
    out = sample(best(objective), solver, noise, torch.zeros(100, 1), num_inference_steps=250, objective=objective)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert out.std().item() == pytest.approx(STD, rel=0.06)
    assert abs(torch.corrcoef(torch.stack([out.flatten(), noise.flatten()]))[0, 1]) < 0.9  # the start is forgotten


@pytest.mark.parametrize("name", ["sde", "ddpm"])
def test_the_noise_on_the_way_is_the_samples_own(name):
    objective = make_objective("flow_matching" if name == "sde" else "epsilon")
    noise, condition = torch.randn(3, 1, 4, 4), torch.zeros(3, 1)
    made = sample(best(objective), make_solver(name, objective), noise, condition, None, 8)
    alone = sample(best(objective), make_solver(name, objective), noise[1:2], condition[:1], None, 8)
    torch.testing.assert_close(alone, made[1:2])
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2, 1)]
    same_start = noise[:1].expand(3, -1, -1, -1)
    made = sample(best(objective), make_solver(name, objective), same_start, condition, None, 8, generators=generators)
    assert torch.equal(made[0], made[2]) and not torch.allclose(made[0], made[1], atol=1e-3)


@pytest.mark.parametrize(
    ("solver", "options", "message"),
    [
        (SOLVERS["euler"], {"guidance_scale": 2.0}, "null"),
        (SOLVERS["euler"], {"guidance_channels": "three"}, "No guidance_channels 'three'; there are all, first3"),
        (DPMSolverMultistepScheduler(), {"objective": FlowMatching()}, "does not solve flow matching"),
        (SOLVERS["euler"], {"num_inference_steps": 0}, "at least one step"),
        (SOLVERS["euler"], {"timestep_shift": -1}, "timestep_shift=-1"),
    ],
)
def test_wrong_requests_are_named(solver, options, message):
    refuses(message, sample, constant, solver, torch.randn(1, 2, 3, 3), torch.randn(1, 2), **options)
