"""A schedule fitted to a model: nearer to its fine path than evenly spaced steps, and used wherever it is kept."""

import json

import pytest
import torch
from test_sample_command import models, one_line, run  # noqa: F401
from test_sampling import MEAN, STD, gaussian
from tiny import contents, refuses, tiny_pipeline

from vavae_tools.diffusion.objectives import make_objective
from vavae_tools.diffusion.solvers import AdamsScheduler, lay_out, make_solver, sample
from vavae_tools.diffusion.variations import Start
from vavae_tools.pipelines.classes import load_pipeline
from vavae_tools.pipelines.schedule import _cheapest, fit_schedule


def end(scheduler, steps, noise=None, **options):
    noise = torch.linspace(-2, 2, 16).view(1, 1, 4, 4) if noise is None else noise
    return sample(gaussian, scheduler, noise, torch.zeros(len(noise), 1), None, steps, **options), noise


def test_adams_is_exact_on_a_straight_velocity():
    """A velocity that grows linearly in time along the path: one step of Euler's, and exact ones after it."""
    falling = lambda x, t, c, mask=None: (2 * t).view(-1, 1, 1, 1).expand_as(x)  # noqa: E731
    x = sample(falling, make_solver("adams"), torch.zeros(1, 1, 2, 2), torch.zeros(1, 1), None, 4)
    torch.testing.assert_close(x, torch.full_like(x, 1 - 0.25**2))  # what the first step left out


@pytest.fixture(scope="module")
def fitted():
    pipe = tiny_pipeline()
    return pipe, fit_schedule(pipe, (2, 3, 5), guidance_scale=2.0, images=8)


def test_a_fitted_schedule_is_nearer_than_even_steps(fitted):
    pipe, errors = fitted
    noise, labels = pipe.noise(7, torch.arange(12)), torch.arange(12) % 3  # which it has not seen

    def made(scheduler, steps):
        told = pipe.conditioner(labels), pipe.conditioner.null(12)
        return sample(pipe.denoiser, scheduler, noise, *told, steps, guidance_scale=2.0, objective=pipe.objective)

    fine = made(make_solver("euler"), 250)
    for steps, error in errors.items():
        away = [(made(solver, steps) - fine).square().mean().sqrt() for solver in (pipe.scheduler, make_solver())]
        assert away[0] < away[1] / 2, (steps, away)
        assert away[0] < 3 * error * fine.std() + 0.01 and error < 0.5
    assert list(errors) == sorted(errors, key=errors.get, reverse=True)  # more steps are nearer
    again = tiny_pipeline()
    assert fit_schedule(again, (2, 3, 5), guidance_scale=2.0, images=8) == errors
    assert set(again.scheduler.config.fitted) == {"2", "3", "5"}
    assert again.scheduler.config.fitted == pipe.scheduler.config.fitted


def test_what_a_schedule_is(fitted):
    scheduler = fitted[0].scheduler
    for steps in (2, 3, 5):
        solver, times = lay_out(scheduler, steps)
        assert len(times) == steps and times == sorted(times) and times[0] == 0 and solver.sigmas[-1] == 0
    assert lay_out(scheduler, 4)[1] == lay_out(make_solver("adams"), 4)[1]  # none was fitted
    assert lay_out(scheduler, 5, 0.3)[1] == lay_out(make_solver("adams"), 5, 0.3)[1]  # another was asked for
    x, noise = end(scheduler, 5, start=Start(torch.zeros(1, 1, 4, 4), 1.0))
    assert torch.equal(x, end(scheduler, 5)[0])
    near, _ = end(scheduler, 5, start=Start(MEAN + STD * noise, 1e-3))
    torch.testing.assert_close(near, MEAN + STD * noise, atol=0.01, rtol=0)


def test_the_way_that_costs_least():
    cost = torch.full((4, 4, 4), torch.inf, dtype=torch.float64)
    for i in range(4):
        for j in range(i + 1, 4):
            cost[: i + 1, i, j] = (j - i) ** 2
    cost[0, 1, 3] = 0.5  # right after the step from 0 to 1
    assert _cheapest(cost, 1) == [0, 3] and _cheapest(cost, 2) == [0, 1, 3] and _cheapest(cost, 3) == [0, 1, 2, 3]


def test_the_command_keeps_it_and_takes_it(run, models, tmp_path):  # noqa: F811
    pipe = load_pipeline(models / "pipeline")
    pipe.save_pretrained(tmp_path / "p")
    before = contents(tmp_path / "p")
    few = ["--checkpoint", tmp_path / "p", "--num_samples", 2]
    status, out, err = run(*few, "--fit_schedule", "--num_steps", 5, "--output_dir", "a")
    assert status == 0 and out.startswith("fitted steps, kept in "), err
    changed = {name for name, data in contents(tmp_path / "p").items() if before.get(name) != data}
    assert {"model_index.json", "scheduler/scheduler_config.json"} <= changed
    assert not [name for name in changed if name.endswith(".safetensors")]
    read = load_pipeline(tmp_path / "p")
    assert isinstance(read.scheduler, AdamsScheduler) and read.usual_steps == 10 and pipe.usual_steps == 50
    assert run(*few, "--num_steps", 5, "--output_dir", "b")[0] == 0
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    assert json.loads(a.pop("samples.json")) == json.loads(b.pop("samples.json")) and a == b
    read.save_pretrained(tmp_path / "q")
    assert load_pipeline(tmp_path / "q").scheduler.config.fitted == read.scheduler.config.fitted
    assert run(*few, "--num_steps", 5, "--solver", "euler", "--output_dir", "c")[0] == 0
    assert json.loads((tmp_path / "c/samples.json").read_text())["settings"]["solver"]["name"].startswith("FlowMatch")
    assert "its solver is adams" in one_line(run("--fit_schedule", "--solver", "heun"))
    assert "at least one step" in one_line(run("--num_steps", -2))


def test_wrong_requests_are_named():
    pipe = tiny_pipeline()
    refuses(r"steps \(0, 5\): expected numbers from 1 to 25", fit_schedule, pipe, (0, 5))
    refuses("at least 4 are needed", fit_schedule, pipe, images=2)
    pipe = tiny_pipeline()
    pipe.register_to_config(objective=make_objective("epsilon").config)
    refuses("this model predicts noise", fit_schedule, pipe)
