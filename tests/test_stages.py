"""The stages of one session: what is done, what goes on, what is skipped, and the hours of each."""

import time
from pathlib import Path

import pytest
import torch

import vavae_tools as vt
from vavae_tools.pipelines.classes import load_pipeline
from vavae_tools.recipes import stages
from vavae_tools.recipes.presets import Preset
from vavae_tools.recipes.stages import Stages, estimate_hours

QUIET = {"log": lambda line: None}
SHORT = {"batch_size": 8, "previews": 0, **QUIET}
SIZE = {"hidden_size": 16, "depth": 1, "num_heads": 1, "patch_size": 2}


@pytest.fixture
def place(gait, tmp_path):
    return vt.find_paths(gait, tmp_path / "work", [])


@pytest.fixture
def said() -> list[str]:
    return []


def test_after_a_stage_that_has_not_ended_nothing_begins(place, said):
    stages = Stages(place, {"samples": 0.5}, "0:10", said.append)
    assert stages.run("latents", lambda *given, **named: (given, named), 1, a=2) == ((1,), {"a": 2})
    assert stages.run("samples", lambda until: []) is None
    assert stages.run("evaluation", pytest.fail) is None and stages.unfinished == "samples"
    assert said[0] == "latents: ended after 0.0 min"
    assert said[1].startswith("samples: 30.0 min in all, as estimated; the session has ")
    assert said[1].endswith(" min left: it may end in another version")
    assert said[2].startswith("samples has not ended: save another version of this notebook")
    assert said[3] == "evaluation: skipped, since samples has not ended"
    assert stages.run("samples", lambda until: [1]) == [1] and stages.run("evaluation", lambda: 2) == 2


def test_without_time_no_stage_begins(place, said):
    stages = Stages(place, {}, "0:10", said.append)
    stages.end = time.time() - 1
    assert stages.run("evaluation", lambda: 2) == 2  # has the minutes that are kept
    assert stages.run("latents", pytest.fail) is None and said[1].startswith("latents has not ended")


@pytest.mark.parametrize(("max_time", "passed"), [("1:30", ("1:30:00", "1:29:59")), ("0", (None,))])
def test_a_training_gets_the_time_that_is_left(place, split_dir, max_time, passed):
    given = {}

    def train(data, output_dir, **settings):
        given.update(settings, data=data)
        return output_dir / "vavae"

    Stages(place, {}, max_time, **QUIET).run("vavae", train, split_dir, place.vavae)
    assert given["data"] == split_dir and given["resume"] is None and given["max_time"] in passed


def test_a_training_that_is_done_is_carried_into_the_next_version(gait, split_dir, tmp_path, said):
    first = vt.find_paths(gait, tmp_path / "first", [])
    train = vt.fine_tune_vavae, split_dir
    made = Stages(first, **QUIET).run("vavae", *train, first.vavae, "small", image_size=16, max_steps=2, **SHORT)
    second = vt.find_paths(gait, tmp_path / "second", [tmp_path / "first"])
    vt.split_folders(gait, second.split, progress=False)
    found = Stages(second, log=said.append).run("vavae", pytest.fail, split_dir)
    assert made == first.vavae / "vavae" and found == second.vavae / "vavae"
    assert said == [f"vavae: {made} is done"] and (second.vavae / "run.json").is_file()
    assert (second.vavae / "train.log").read_text() == (first.vavae / "train.log").read_text()
    assert Stages(second, **QUIET).plot("vavae").axes and Stages(second, **QUIET).plot("dit") is None
    third = vt.find_paths(gait, tmp_path / "third", [tmp_path / "second"])  # the first one's output is gone
    assert Stages(third, **QUIET).run("vavae", pytest.fail, split_dir) == third.vavae / "vavae"


def test_a_stopped_training_is_not_done(place, split_dir, said):
    vt.split_folders(place.images, place.split, progress=False)
    stages = Stages(place, {"vavae": 2.0, "dit": 1.0}, "0:00:30", said.append)
    train = vt.fine_tune_vavae, split_dir, place.vavae, "small"
    assert stages.run("vavae", *train, image_size=16, max_steps=3, **SHORT) is None
    assert (place.vavae / "vavae/config.json").is_file() and stages.unfinished == "vavae"
    again = Stages(place, {"vavae": 2.0, "dit": 1.0}, log=said.append)
    assert "vavae      2.0 h" in str(again) and "in all 3.0 h" in str(again)
    assert again.run("vavae", *train, image_size=16, max_steps=3, **SHORT) == place.vavae / "vavae"
    assert "resuming" in said[-2] and said[-1].startswith("vavae: ended after")
    assert "vavae       done" in str(again) and "in all 1.0 h" in str(again)


def test_samples_end_in_time_and_the_same_call_makes_the_rest(latents_dir, vavae_dir, tmp_path, capsys):
    pipe = load_pipeline(vt.train_dit(latents_dir, vavae_dir, tmp_path / "dit", SIZE, max_steps=1, **SHORT))
    call = {"num_inference_steps": 1, "batch_size": 2}

    assert vt.write_samples(pipe, [0, 1, 2, 0, 1], tmp_path / "s", until=time.time() - 1, **call) == []
    assert "5 of 5 images are not made yet" in capsys.readouterr().out
    written = vt.write_samples(pipe, [0, 1, 2, 0, 1], tmp_path / "s", until=time.time() + 600, **call)
    whole = vt.write_samples(pipe, [0, 1, 2, 0, 1], tmp_path / "whole", **call)
    assert len(written) == 5
    assert [path.read_bytes() for path in written] == [path.read_bytes() for path in whole]


def test_hours_follow_from_the_preset(split_dir: Path):
    torch.manual_seed(0)
    numbers = {"image_size": 16, "vavae_batch_size": 4, "dit_batch_size": 4, "dit": SIZE}
    hours = estimate_hours(Preset("here", **numbers, vavae_epochs=100, dit_steps=1000), split_dir)
    assert list(hours) == ["vavae", "dit", "samples"] and all(0 < value < 1 for value in hours.values())


def test_low_rank_training_is_timed_as_it_is(split_dir: Path, monkeypatch):
    trained = []
    monkeypatch.setattr(stages, "_seconds", lambda compute, model: trained.append(trainable(model)) or 1.0)
    numbers = {"image_size": 16, "vavae_batch_size": 4, "dit_batch_size": 4, "dit": SIZE}
    for init in (None, {"weights": "x.pt", "lora_rank": 2}):
        estimate_hours(Preset("here", **numbers, dit_init=init), split_dir)
    _, whole, _, _, additions, _ = trained
    assert 0 < additions < whole / 2


def trainable(model: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
