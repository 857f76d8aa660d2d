"""Every script of `benchmarks/` runs, at tiny size and as far as a CPU goes; memory.py and old_runs.py have tests."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from importlib import import_module
from types import SimpleNamespace

import pytest
import tiny  # noqa: F401  (one thread)
from forked import fork_of

from benchmarks import dit_step, kills, text_step, token_step, versions
from benchmarks.gpu_check import Setup, main, run
from vavae_tools.recipes.config import compose, read_command_line

NUMBERS = {"hidden_size": 32, "depth": 1, "num_heads": 2}
WIDTHS, CLIP = (32, 32, 32, 32), (64, 1, 2)


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("gait_speed --images 1 --workers 1", "ratio of times"),
        ("vectors --data_dir SPLIT --epochs 1 --kl_weights 1 --image_size 16 --latent_channels 2", "| both | 2 | 1 |"),
        (
            "low_data --data_dir IMAGES --images_per_person 2 --test_images 4 --checkpoints last 1 --vavae_epochs 1 "
            "--dit_steps 6 --depth 1 --batch_size 2 --samples_per_person 2 --shares 1 --seeds 1 --steps 1",
            "2 | 1 | real + 1 generated | ",
        ),
        ("saving_cost --megabytes 2 --saves 1 --steps 1", "2 MB: a step waits"),
        ("split_speed --images 50 --size 32 --rounds 1", "decoded, hard links"),
        ("dit_step --sizes small --repeats 1", "ours, where it goes: "),
        ("text_step --image_size 32 --batch_size 1 --repeats 1", "encoding each time"),
        ("token_step --batch_size 1 --cell_size 8 --repeats 1", "1,024 cells"),
        ("two_processes --turns 1 --steps 10 --batch_size 1", "two processes do × "),
        ("vavae_step --image_size 32 --batch_size 1 --steps 1 --turns 1 --disc_width 8", "ratio "),
        ("pretrain_small vavae --people 1 --images 2 --steps 1 --batch_size 1 --output_dir O", "written: O/weights"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_a_script_runs_at_tiny_size(here, gait, split_dir, forked, monkeypatch, run_main, command, said):
    copies = SimpleNamespace(split=SimpleNamespace(), ratio=lambda source, output, **_: shutil.copytree(source, output))
    monkeypatch.setitem(sys.modules, "splitfolders", copies)  # which the tests' requirements leave out
    monkeypatch.setitem(sys.modules, "splitfolders.split", copies.split)
    monkeypatch.setitem(dit_step.SIZES, "small", (NUMBERS, 1))
    monkeypatch.setitem(token_step.SIZES, "small", NUMBERS)
    monkeypatch.setitem(text_step.SIZES, "small", text_step.Size(NUMBERS, WIDTHS, CLIP, 32, 1))
    name, *words = command.replace("SPLIT", str(split_dir)).replace("IMAGES", str(gait)).split()
    status, out, err = run_main(import_module(f"benchmarks.{name}").main, *words)
    assert not status and said in out, err


@pytest.mark.filterwarnings("ignore")
def test_killed_trainings_end_as_those_never_stopped(here, forked, monkeypatch, run_main):
    monkeypatch.setattr(subprocess.Popen, "kill", lambda self: os.kill(fork_of(self.pid), signal.SIGKILL))
    status, out, err = run_main(kills.main, "--kills", 2, "--seconds", 0.1, "--seed", 1, "--tiny")
    assert not status, err
    for kind in ("VA-VAE", "DiT"):
        end = rf"{kind}: 1 kills, (\d+) of \1 runs identical, 0 damaged last.ckpt, 0 files left over"
        assert re.search(end, out), out


def test_the_path_of_versions_has_only_keys_that_exist(here, monkeypatch):
    monkeypatch.setattr(versions, "run", lambda name, command, folder: True)
    monkeypatch.setattr(versions, "installed", lambda freeze: {versions._name(floor): "1" for floor in versions.FLOORS})
    assert versions.check("python3", list(versions.FLOORS), here) == []
    for words in versions.PATH.values():
        if words.startswith(versions.TRAIN):
            compose(read_command_line(shlex.split(words.removeprefix(versions.TRAIN))))


def test_checks_run_and_end_in_one_json(run_main):
    status, out, err = run_main(main, "--device", "cpu", "--tiny", "--only", "ssim", "sampling", "vavae_light")
    found = json.loads(out)
    assert status == 0 and {"ssim_in_autocast", "sampling", "vavae_light_batch_8", "seconds"} == found.keys()
    assert found["ssim_in_autocast"]["of_equal_images"] == 1
    assert found["sampling"]["32"]["levels_off"] == 0
    assert found["vavae_light_batch_8"]["weights_finite"] and found["vavae_light_batch_8"]["ms_a_step"] > 0
    assert "sampling" in err


def test_a_fault_is_an_answer():
    def fails(setup: Setup) -> dict:
        raise RuntimeError("no kernel image")

    result = run(Setup("cpu", tiny=True), fails, cap=True)
    assert result["error"] == "RuntimeError: no kernel image" and result["seconds"] == pytest.approx(0, abs=1)
