"""`python -m vavae_tools.sample` as a whole: settings, formats, several processes, and kills."""

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
from forked import python
from on_ranks import children, gone
from PIL import Image
from tiny import SIZE, tiny_pipeline, trained_looking

from vavae_tools.pipelines import writer as sample_sets
from vavae_tools.pipelines.classes import load_pipeline
from vavae_tools.pipelines.writer import write_samples
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.ranks import Ranks
from vavae_tools.sample import main

ROOT = Path(__file__).parents[1]
QUICK = ["--num_steps", "2", "--batch_size", "4", "--accelerator", "cpu"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """pipeline/ and a weaker one, weak/. Do not write into it."""
    folder = tmp_path_factory.mktemp("models")
    tiny_pipeline().save_pretrained(folder / "pipeline")
    weak = tiny_pipeline()
    trained_looking(weak.denoiser, seed=9)
    weak.save_pretrained(folder / "weak")
    return folder


@pytest.fixture
def run(monkeypatch, run_main, tmp_path, models):
    """Run the command here: its exit status, what it printed, and what it said on stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return lambda *words: run_main(main, *command(models, *words))


def command(models, *arguments) -> list[str]:
    return ["--checkpoint", str(models / "pipeline"), *QUICK, *map(str, arguments)]


def start(models, folder, *arguments, program=("-m", "vavae_tools.sample")) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [python(), *program, *command(models, *arguments)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def pixels(folder) -> dict[str, np.ndarray]:
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


def one_line(outcome) -> str:
    status, _, err = outcome
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


# ---- one process


def test_flags_are_the_arguments_of_the_pipeline(run, models, tmp_path):
    pipe = load_pipeline(models / "pipeline")
    status, said, err = run(
        *["--num_samples", 4, "--labels", "2,ID_1", "--cfg_scale", 3, "--cfg_interval", "0.1,0.9", "--seed", 5],
        *["--guidance_channels", "first3", "--timestep_shift", 0.3, "--output_dir", "flags"],
    )
    assert status == 0 and said.startswith("written: 4 pictures of 2 people (flags/ID_1 …)\nnext: python -m vavae_")
    assert err.startswith("sampling: 4 pictures made in 0:00:0") and err.count("\n") == 1 and "pictures/s" in err
    options = {"guidance_interval": (0.1, 0.9), "guidance_channels": "first3", "timestep_shift": 0.3}
    labels = [2, 0, 2, 0]
    write_samples(pipe, labels, "same", 5, num_inference_steps=2, guidance_scale=3.0, batch_size=4, **options)
    assert contents(tmp_path / "flags") == contents(tmp_path / "same")
    status, said, err = run(
        *["--num_samples", 4, "--labels", "2,ID_1", "--cfg_scale", 3, "--cfg_interval", "0.1,0.9", "--seed", 5],
        *["--guidance_channels", "first3", "--timestep_shift", 0.3, "--output_dir", "flags"],
    )
    assert said.startswith("written: 4 pictures") and "0 pictures made" in err and "4 were there" in err


def test_a_guide_and_a_solver(run, models, tmp_path):
    pipe, weak = load_pipeline(models / "pipeline"), load_pipeline(models / "weak")
    guide = weak.denoiser, weak.conditioner
    for flags, scale in (([], 1.42), (["--guide_scale", 2], 2.0)):
        assert run("--num_samples", 3, "--guide", models / "weak", *flags, "--output_dir", f"by{scale}")[0] == 0
        write_samples(
            pipe, [0, 1, 2], f"same{scale}", num_inference_steps=2, guidance_scale=scale, guide=guide, batch_size=4
        )
        assert contents(tmp_path / f"by{scale}") == contents(tmp_path / f"same{scale}")
    assert run("--num_samples", 3, "--cfg_scale", 1, "--output_dir", "euler")[0] == 0
    assert run("--num_samples", 3, "--cfg_scale", 1, "--solver", "heun", "--output_dir", "heun")[0] == 0
    euler, heun = pixels(tmp_path / "euler"), pixels(tmp_path / "heun")
    assert euler.keys() == heun.keys() and any((euler[name] != heun[name]).any() for name in euler)


def test_pictures_of_other_settings_are_refused_and_replaced(run, tmp_path):
    assert run("--num_samples", 6)[0] == 0
    before = contents(tmp_path)
    said = one_line(run("--num_samples", 3, "--cfg_scale", 2))
    assert "outputs/samples holds pictures of other settings (cfg_scale or guide_scale 1.25 there, 2.0 here)" in said
    assert "another --output_dir, or replace them by --overwrite" in said and contents(tmp_path) == before
    assert run("--num_samples", 3, "--cfg_scale", 2, "--overwrite")[0] == 0
    assert run("--num_samples", 3, "--cfg_scale", 2, "--output_dir", "new")[0] == 0
    assert contents(tmp_path / "outputs" / "samples") == contents(tmp_path / "new")


def test_a_precision_by_its_flag(run, tmp_path):
    assert run("--num_samples", 3)[0] == run("--num_samples", 3, "--precision", "bf16", "--output_dir", "half")[0] == 0
    whole, half = pixels(tmp_path / "outputs" / "samples"), pixels(tmp_path / "half")
    assert whole.keys() == half.keys() and any((whole[name] != half[name]).any() for name in whole)
    said = one_line(run("--num_samples", 3, "--precision", 32, "--output_dir", "half"))
    assert "half holds pictures of other settings (precision bf16 there, 32 here)" in said
    assert "A CPU has no fp16: use --precision 32" in one_line(run("--precision", 16))


def test_a_class_list_names_the_folders(run, tmp_path):
    (tmp_path / "names.txt").write_text("\ufeffJosé Müller\nben\n李\n", encoding="utf-8")
    status, said, _ = run("--num_samples", 3, "--labels", "2,0", "--class_list", "names.txt", "--output_dir", "out")
    assert status == 0 and "of 2 people (out/José Müller …)" in said
    assert sorted(pixels(tmp_path / "out")) == [
        "José Müller/seed0_00000.png",
        "李/seed0_00000.png",
        "李/seed0_00001.png",
    ]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            "anna\nben",
            "The class list has 2 names, the model 3 classes: write one line for each, from label 0 (ID_1) to",
        ),
        ("anna\nben\ncarl\ndora", "The class list has 4 names, the model 3 classes"),
        ("", "The class list has 0 names"),
        ("anna\nben\nanna", "names somebody twice"),
        ("anna\n../ben\ncarl", "'../ben' cannot be the name of a folder"),
        (b"\xff\xfe\x00", "is no text in UTF-8"),
    ],
)
def test_a_class_list_that_does_not_fit(run, tmp_path, names, message):
    (tmp_path / "names.txt").write_bytes(names if isinstance(names, bytes) else names.encode())
    assert message in one_line(run("--class_list", "names.txt"))
    assert list(tmp_path.iterdir()) == [tmp_path / "names.txt"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--guide nowhere", "No checkpoint nowhere"),
        ("--guide nowhere --cfg_scale 2", "--cfg_scale 2 with --guide: a guide takes the null condition's place"),
        ("--guide_scale 2", "--guide_scale 2 without --guide"),
        ("--cfg_scale nan", "no number to guide by"),
        ("--weights live", "holds the averaged weights alone"),
        ("--devices 0", "--devices 0: expected how many, at least one, or auto"),
        ("--devices some", "--devices some: expected how many, at least one, or auto"),
        ("--timestep_shift -1", "it is above 0"),
    ],
)
def test_bad_input_is_answered_by_one_line(run, tmp_path, line, message):
    assert message in one_line(run(*line.split()))
    assert list(tmp_path.iterdir()) == []


# ---- several processes


def test_two_processes_killed_and_gone_on_by_one_equal_one(run, models, tmp_path):
    amount = ["--num_samples", 600]
    assert run(*amount, "--output_dir", "whole")[0] == 0
    process = start(models, tmp_path, *amount, "--output_dir", "parts", "--devices", 2)
    parts = tmp_path / "parts"
    deadline = time.monotonic() + 120
    while len(list(parts.rglob("*.png"))) < 30:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0]
        time.sleep(0.01)
    ranks = children(process.pid)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert len(ranks) == 2
    assert gone(ranks)  # nobody is left behind
    there = len(list(parts.rglob("*.png")))
    assert there < 600, "it was killed too late to show anything"
    status, _, err = run(*amount, "--output_dir", "parts")
    assert status == 0 and f"; {there} were there" in err
    assert contents(parts) == contents(tmp_path / "whole")


def test_two_processes_of_torchrun_write_the_same_npz(run, models, tmp_path):
    amount = ["--num_samples", 9, "--format", "npz"]
    status, said, _ = run(*amount, "--output_dir", "one")
    name = f"samples_9x{SIZE}x{SIZE}x3.npz"
    assert status == 0 and said.splitlines()[0] == f"written: 9 pictures (one/{name})" and "evaluator" in said
    program = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "vavae_tools.sample")
    process = start(models, tmp_path, *amount, "--output_dir", "two", program=program)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and said.count(f"written: 9 pictures (two/{name})") == 1, said
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_path_is_sampled_on_all_devices(models, tmp_path, monkeypatch, forked):
    pipe, settings = load_pipeline(models / "pipeline"), {"num_inference_steps": 2, "batch_size": 4}
    alone = write_samples(pipe, ["ID_2", 0] * 5, tmp_path / "alone", 3, **settings)
    one = write_samples(models / "pipeline", ["ID_2", 0] * 5, tmp_path / "one", 3, **settings)
    monkeypatch.setattr(sample_sets, "several_processes", lambda: 2)
    two = write_samples(models / "pipeline", ["ID_2", 0] * 5, tmp_path / "two", 3, **settings)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "alone")
    for written, folder in ((alone, "alone"), (one, "one"), (two, "two")):
        assert [path.relative_to(tmp_path / folder) for path in written] == [
            path.relative_to(tmp_path / "two") for path in two
        ]
    with pytest.raises(UserError, match="Nobody called 'ID_9'"):
        write_samples(models / "pipeline", ["ID_9"], tmp_path / "two", **settings)


def test_one_alone_shares_with_itself():
    ranks = Ranks()
    assert ranks.share("plan", [1]) == [1]
    assert [ranks.add("made", 3), ranks.add("made", 2), ranks.add("ended", 0)] == [3, 5, 0]
