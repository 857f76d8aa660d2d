"""`python -m vavae_tools.sample` as a whole: settings, formats, several processes, and kills."""

import json
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
from test_text_pipeline import text_pipeline
from test_token_pipeline import tiny, with_lengths
from tiny import SIZE, contents, refuses, tiny_pipeline, trained_looking

from vavae_tools.pipelines import writer
from vavae_tools.pipelines.classes import load_pipeline
from vavae_tools.pipelines.tokens import load_token_pipeline
from vavae_tools.pipelines.writer import write_samples, write_texts
from vavae_tools.sample import main

ROOT = Path(__file__).parents[1]
QUICK = ["--num_steps", "2", "--batch_size", "4", "--accelerator", "cpu"]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """pipeline/ and a weaker one, weak/; text/, tokens/ and chats/. Do not write into it."""
    folder = tmp_path_factory.mktemp("models")
    weak = tiny_pipeline()
    trained_looking(weak.denoiser, seed=9)
    of_classes = {"pipeline": tiny_pipeline(), "no_null": tiny_pipeline(dropout=0.0), "weak": weak}
    of_text = {"text": text_pipeline(), "no_null_text": text_pipeline(dropout=0.0)}
    of_tokens = {"tokens": tiny(with_lengths(of_3=1, of_9=1)), "chats": tiny(with_lengths(of_4=1), chats=True)}
    for name, pipe in (of_classes | of_text | of_tokens).items():
        pipe.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(monkeypatch, run_main, tmp_path, models):
    """Run the command here, by default on pipeline/: its exit status, what it printed, and what it said on stderr."""
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    return lambda *words, of="pipeline": run_main(main, *command(models, *words, of=of))


def command(models, *arguments, of="pipeline") -> list[str]:
    return ["--checkpoint", str(models / of), *QUICK, *map(str, arguments)]


def start(models, folder, *arguments, program=("-m", "vavae_tools.sample")) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([python(), *program, *command(models, *arguments)], cwd=folder, env=environment, **streams)


@pytest.mark.parametrize(("of", "words"), [("no_null", ()), ("no_null_text", ("--prompt", "green"))])
def test_without_a_null_condition_images_are_unguided(run, models, tmp_path, of, words):
    words = (*words, "--output_dir", "out", "--num_samples", 3)
    status, out, err = run(*words, of=of)
    assert err.count("sampling") == err.count("\n") > 0 and "\r" not in err  # a bar's states in a file
    assert status == 0 and out.startswith(f"{models / of} was trained without a null condition")
    assert json.loads((tmp_path / "out/samples.json").read_text())["settings"]["guidance_scale"] == 1
    assert run(*words, "--cfg_scale", 1, of=of)[0] == 0  # they are the same
    assert "leave --cfg_scale out" in one_line(run(*words, "--cfg_scale", 2, of=of))
    if of == "no_null_text":
        assert run(*words, "--cfg_scale", 2, "--negative_prompt", "red", "--overwrite", of=of)[0] == 0


def test_the_next_line_names_the_split_of_the_run(run, models, tmp_path):
    (tmp_path / "my run" / ".hydra").mkdir(parents=True)
    (tmp_path / "my run" / ".hydra" / "config.yaml").write_text("data:\n  data_dir: my split\n")
    (tmp_path / "my run" / "pipeline").symlink_to(models / "pipeline")
    said = run("--num_samples", 1, "--checkpoint", "my run/pipeline", "--output_dir", "my images")[1]
    assert said.endswith("--generated_dir 'my images' --data_dir 'my split'\n")


def pixels(folder) -> dict[str, np.ndarray]:
    return {str(path.relative_to(folder)): np.asarray(Image.open(path)) for path in sorted(folder.rglob("*.png"))}


def one_line(outcome) -> str:
    status, _, err = outcome
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


# ---- one process
def test_flags_are_the_arguments_of_the_pipeline(run, models, tmp_path):
    words = ["--num_samples", 4, "--labels", "2,ID_1", "--cfg_scale", 3, "--cfg_interval", "0.1,0.9", "--seed", 5]
    words += ["--guidance_channels", "first3", "--timestep_shift", 0.3, "--output_dir", "flags"]
    status, said, err = run(*words)
    assert status == 0 and said.startswith("written: 4 images of 2 people (flags/ID_1 …)\nnext: python -m vavae_")
    assert "sampling" in err and "4/4" in err
    options = {"guidance_interval": (0.1, 0.9), "guidance_channels": "first3", "timestep_shift": 0.3}
    pipe, labels = load_pipeline(models / "pipeline"), [2, 0, 2, 0]
    write_samples(pipe, labels, "same", 5, num_inference_steps=2, guidance_scale=3.0, batch_size=4, **options)
    assert contents(tmp_path / "flags") == contents(tmp_path / "same")
    assert run(*words)[1] == said


def test_a_guide_and_a_solver(run, models, tmp_path):
    pipe, weak = load_pipeline(models / "pipeline"), load_pipeline(models / "weak")
    guide = weak.denoiser, weak.conditioner
    for flags, scale in (([], 1.42), (["--guide_scale", 2], 2.0)):
        assert run("--num_samples", 3, "--guide", models / "weak", *flags, "--output_dir", f"by{scale}")[0] == 0
        settings = {"num_inference_steps": 2, "guidance_scale": scale, "guide": guide, "batch_size": 4}
        write_samples(pipe, [0, 1, 2], f"same{scale}", **settings)
        assert contents(tmp_path / f"by{scale}") == contents(tmp_path / f"same{scale}")
    assert run("--num_samples", 3, "--cfg_scale", 1, "--output_dir", "euler")[0] == 0
    assert run("--num_samples", 3, "--cfg_scale", 1, "--solver", "heun", "--output_dir", "heun")[0] == 0
    euler, heun = pixels(tmp_path / "euler"), pixels(tmp_path / "heun")
    assert euler.keys() == heun.keys() and any((euler[name] != heun[name]).any() for name in euler)


def test_texts_and_images_of_prompts(run, models, tmp_path):
    status, said, _ = run("--prompt", "a\x85b", "c", "--seed", 5, "--output_dir", "out", of="tokens")
    pipe = load_token_pipeline(models / "tokens")
    written = write_texts(pipe, "same", ["a\x85b", "c"], seed=5, batch_size=4, num_inference_steps=2)
    assert status == 0 and contents(tmp_path / "out") == contents(tmp_path / "same")
    rows = [json.loads(line) for line in written.read_text(encoding="utf-8").split("\n")[:-1]]
    shown = [f"  {' '.join(row['text'].split())}" for row in rows]
    assert said.split("\n") == [*shown, "written: 2 texts (out/texts.jsonl), out/grid.png", ""]
    words = ("--prompt", "hi", "--num_samples", 9, "--output_dir", "chats")
    assert run(*words, of="chats")[1] == run(*words, of="chats")[1]
    status, said, _ = run("--prompt", "green", "red", "--num_samples", 3, "--output_dir", "text", of="text")
    assert status == 0 and said == "written: 3 images of 2 prompts (text/00000.png …), text/grid.png\n"


def test_a_class_list_names_the_folders(run, tmp_path):
    (tmp_path / "names.txt").write_text("\ufeffJosé Müller\nben\n李\n", encoding="utf-8")
    status, said, _ = run("--num_samples", 3, "--labels", "2,0", "--class_list", "names.txt", "--output_dir", "out")
    assert status == 0 and "of 2 people (out/José Müller …)" in said
    names = ["José Müller/seed0_00000.png", "李/seed0_00000.png", "李/seed0_00001.png"]
    assert sorted(pixels(tmp_path / "out")) == names
    (tmp_path / "names.txt").write_text("anna\nben\ncarl\ndora")
    assert "The class list has 4 names, the model 3 classes" in one_line(run("--class_list", "names.txt"))
    (tmp_path / "names.txt").write_text("anna\n../ben\ncarl")
    assert "'../ben' cannot be the name of a folder" in one_line(run("--class_list", "names.txt"))


@pytest.mark.parametrize(
    ("of", "line", "message"),
    [
        ("pipeline", "--guide nowhere --cfg_scale 2", "--cfg_scale 2 with --guide: a guide takes the null condition's"),
        ("pipeline", "--guide_scale 2", "--guide_scale 2 without --guide"),
        ("pipeline", "--cfg_scale nan", "no number to guide by"),
        ("pipeline", "--weights live", "holds the averaged weights alone"),
        ("pipeline", "--precision 16", "A CPU has no fp16: use --precision 32"),
        ("pipeline", "--prompt x", "pipeline makes images of classes, for which --prompt has no meaning: leave it"),
        ("text", "--prompt x --labels 0 --format npz", "images from sentences, for which --labels, --format has no"),
        ("text", "", 'makes images from sentences: say which, with --prompt "…"'),
        ("tokens", "--cfg_scale 2 --format npz", "makes texts, for which --format, --cfg_scale has no meaning"),
        ("tokens", "--solver ddpm", "No solver 'ddpm' for flow matching or sample (did you mean dpm++?); there"),
        ("chats", "", "This model answers: give it prompts"),
    ],
)
def test_bad_input_is_answered_by_one_line(run, tmp_path, of, line, message):
    assert message in one_line(run(*line.split(), of=of))
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
    assert len(ranks) == 2 and gone(ranks)  # nobody is left behind
    there = len(list(parts.rglob("*.png")))
    assert there < 600, "it was killed too late to show anything"
    status, _, err = run(*amount, "--output_dir", "parts")
    assert status == 0 and f"{there}/600" in err
    assert contents(parts) == contents(tmp_path / "whole")


def test_two_processes_of_torchrun_write_the_same_npz(run, models, tmp_path):
    amount = ["--num_samples", 9, "--format", "npz"]
    status, said, _ = run(*amount, "--output_dir", "one")
    name = f"samples_9x{SIZE}x{SIZE}x3.npz"
    assert status == 0 and said.splitlines()[0] == f"written: 9 images (one/{name})" and "evaluator" in said
    program = ("-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "vavae_tools.sample")
    process = start(models, tmp_path, *amount, "--output_dir", "two", program=program)
    said, _ = process.communicate(timeout=240)
    assert process.returncode == 0 and said.count(f"written: 9 images (two/{name})") == 1, said
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_a_path_is_sampled_on_all_devices(models, tmp_path, monkeypatch, forked):
    pipe, settings = load_pipeline(models / "pipeline"), {"num_inference_steps": 2, "batch_size": 4}
    alone = write_samples(pipe, ["ID_2", 0] * 5, tmp_path / "alone", 3, **settings)
    one = write_samples(models / "pipeline", ["ID_2", 0] * 5, tmp_path / "one", 3, **settings)
    monkeypatch.setattr(writer, "several_processes", lambda: 2)
    two = write_samples(models / "pipeline", ["ID_2", 0] * 5, tmp_path / "two", 3, **settings)
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents(tmp_path / "alone")
    assert [path.name for path in alone] == [path.name for path in one] == [path.name for path in two]
    refuses("Nobody called 'ID_9'", write_samples, models / "pipeline", ["ID_9"], tmp_path / "two", **settings)
