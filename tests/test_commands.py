"""The commands as people type them: the whole path on tiny images, and one line for everything that is wrong."""

import importlib
import os
import re
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forked import python
from PIL import Image
from tiny import SIZE, assert_same_training, contents, tiny_vavae

import vavae_tools
from vavae_tools.recipes.vavae import fine_tune_vavae
from vavae_tools.runtime.errors import run_command

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, on folders that are not empty

ROOT = Path(__file__).parents[1]
FINE_TUNE = ["--condition_dim", "4", "--image_size", str(SIZE), "--batch_size", "6"]
TINY_DIT = ["--hidden_size", "16", "--depth", "1", "--num_heads", "2", "--patch_size", "4", "--batch_size", "8"]
SCRIPTS = {"split": "data_split.py", "fine_tune": "minimal_training_modification.py"}
COMMANDS = ("train", "sample", "evaluate", "select", "export", "checkpoints", "kaggle_session")
MODULES = {name: f"vavae_tools.{name}" for name in COMMANDS} | {"checkpoints": "vavae_tools.checkpoints.__main__"}


def main_of(name: str):
    if name in SCRIPTS:
        return runpy.run_path(str(ROOT / SCRIPTS[name]))["main"]
    return importlib.import_module(MODULES[name]).main


@pytest.fixture
def run(monkeypatch, run_main, tmp_path):
    """Run a command by its name, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VAVAE_WORK", raising=False)
    return lambda name, *words: run_main(main_of(name), *words)


# ---- the whole path


@pytest.fixture(scope="module")
def killed_and_resumed(split_dir, vavae_dir, tmp_path_factory) -> tuple[Path, str]:
    """`minimal_training_modification.py` ended by SIGKILL while it writes, then `--resume last`: outputs and stdout."""
    folder = tmp_path_factory.mktemp("killed")
    arguments = ["--data_dir", str(split_dir), "--original_vavae", str(vavae_dir), *FINE_TUNE]
    arguments += ["--max_epochs", "4", "--output_dir", "outputs"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(torch.get_num_threads())}
    script = str(ROOT / SCRIPTS["fine_tune"])
    often = ["--save_every_minutes", "0"]  # a checkpoint after each step
    with (folder / "log.txt").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, script, *arguments, *often], cwd=folder, env=environment, stdout=log, stderr=log
        )
        last = folder / "outputs" / "checkpoints" / "last.ckpt"
        deadline = time.monotonic() + 120
        while not (last.is_file() and len(list(last.parent.glob("best-*"))) == 1):  # into the second epoch
            assert process.poll() is None and time.monotonic() < deadline, (folder / "log.txt").read_text()
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.wait()
    step = torch.load(last, weights_only=True)["global_step"]
    assert 3 <= step < 16, "it was killed too late to show anything"
    streams = {"capture_output": True, "text": True, "timeout": 300}
    done = subprocess.run([python(), script, *arguments, "--resume", "last"], cwd=folder, env=environment, **streams)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"resuming after step {step} of 16" in done.stdout
    return folder / "outputs", done.stdout


def test_fine_tuning_writes_what_it_says(killed_and_resumed):
    outputs, said = killed_and_resumed
    names = sorted(path.name for path in (outputs / "checkpoints").iterdir())
    assert names[0].startswith("best-00") and names[1:] == ["last.ckpt", "previous.ckpt"]
    assert {path.name for path in (outputs / "vavae").iterdir()} >= {"config.json"}
    assert list((outputs / "reconstructions").glob("*.png")) and list((outputs / "lightning_logs").rglob("events*"))
    assert "Training a VA-VAE of 3 people of 0." in said and "on 24 images: " in said and "steps of 6, " in said
    assert re.search(r"^CPU, \d+ cores: one process, float32, compile off, batch 6 per device, 0 workers$", said, re.M)
    assert re.search(r"^throughput +[\d.,]+ images/s", said, re.M)
    assert f"outputs/vavae is made of {names[0]}, step " in said
    assert said.splitlines()[-1].startswith("next: python -m vavae_tools.train --data_dir ")


def test_killed_and_resumed_equals_never_stopped(killed_and_resumed, split_dir, vavae_dir, tmp_path):
    outputs, _ = killed_and_resumed
    said = []
    numbers = {"condition_dim": 4, "image_size": SIZE, "batch_size": 6, "max_epochs": 4}
    fine_tune_vavae(split_dir, tmp_path, vavae_dir, show=lambda grid: None, log=said.append, **numbers)
    assert_same_training(outputs, tmp_path)
    best, other = (next((folder / "checkpoints").glob("best-*")) for folder in (outputs, tmp_path))
    assert best.name == other.name
    assert contents(outputs / "vavae") == contents(tmp_path / "vavae")
    steps = [line.split()[1] for line in said if line.startswith("step ")]
    assert steps == [f"{step}/16" for step in range(1, 17)]


@pytest.fixture(scope="module")
def trained(killed_and_resumed, split_dir, tmp_path_factory) -> Path:
    """`python -m vavae_tools.train` on it: the folder with dit/ and the rest."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shutil.copytree(killed_and_resumed[0] / "vavae", "outputs/vavae")
        arguments = ["--data_dir", str(split_dir), *TINY_DIT, "--max_steps", "7", "--flips"]
        arguments += ["--output_dir", "outputs/dit"]
        patch.setattr(sys, "argv", ["train", *arguments])
        run_command(main_of("train"))
    return folder


@pytest.mark.parametrize("checkpoint", ["pipeline", "checkpoints/last.ckpt"])
def test_sampling_writes_a_folder_for_each_person(run, trained, checkpoint, tmp_path):
    arguments = ["--checkpoint", trained / "outputs" / "dit" / checkpoint, "--num_samples", "5", "--num_steps", "2"]
    status, said, _ = run("sample", *arguments, "--labels", "0,ID_3", "--seed", "4", "--cfg_interval", "0.1,1")
    assert status == 0
    written = sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.png"))
    expected = {"ID_1": 3, "ID_3": 2}  # spread evenly
    assert written == [f"outputs/samples/{name}/seed4_{n:05d}.png" for name in expected for n in range(expected[name])]
    assert said.startswith("written: 5 images of 2 people (outputs/samples/ID_1 …)\nnext: python -m vavae_tools.eval")
    assert Image.open(tmp_path / written[0]).size == (SIZE, SIZE)


# ---- --help


FLAGS = {  # SPEC §2
    "split": ["input_dir", "output_dir", "train_ratio", "val_ratio", "image_extensions"],
    "fine_tune": [
        *["data_dir", "original_vavae", "condition_dim", "kl_weight", "batch_size", "max_epochs", "lr", "devices"],
        *["num_nodes", "strategy", "accelerator", "precision", "output_dir", "recipe", "foundation_model", "monitor"],
    ],
    "sample": ["checkpoint", "num_samples", "cfg_scale", "num_steps", "labels", "class_list", "output_dir"],
    "export": ["vavae", "format", "output"],
    "kaggle_session": ["work", "dataset", "message", "pictures", "notebook", "output_dir", "internet"],
}


@pytest.mark.parametrize("name", [*SCRIPTS, *MODULES])
def test_help_is_a_page_with_every_flag_and_comes_at_once(name):
    script = (
        "import runpy, sys\n"
        "sys.argv = ['command', '--help']\n"
        "try:\n    {call}\n"
        "finally:\n    heavy = {{'torch', 'lightning', 'diffusers', 'numpy'}} & set(sys.modules)\n"
        "    print(sorted(heavy), file=sys.stderr)"
    )
    if name in SCRIPTS:
        call = f"runpy.run_path({str(ROOT / SCRIPTS[name])!r}, run_name='__main__')"
    else:
        call = f"runpy.run_module({MODULES[name]!r}, run_name='__main__')"
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    streams, environment = {"capture_output": True, "text": True}, {**os.environ, "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-c", script.format(call=call)]
    done = subprocess.run(call, timeout=60, cwd=ROOT, env=environment, **streams)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and done.stdout.startswith("usage: ") and done.stderr == "[]\n", done.stderr
    assert after.ru_utime - before.ru_utime < 1  # of the processor's time: a busy machine changes little
    flags = [line for line in done.stdout.splitlines() if re.match(r"  --|    [a-z]+ ", line)]  # or commands
    assert len(flags) >= 3 and all(re.search(rf"--{flag}\b", done.stdout) for flag in FLAGS.get(name, []))
    assert name != "fine_tune" or all(word in done.stdout for word in ("16, 32, bf16", "deepspeed", "null: light"))


def test_the_package_imports_nothing_heavy_and_all_its_names_are_there():
    script = (
        "import sys, vavae_tools, vavae_tools.runtime.launch\n"
        "assert not {'torch', 'lightning', 'diffusers', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert set(vavae_tools.__all__) <= set(dir(vavae_tools))\n"
        "try:\n    vavae_tools.nonsense\n"
        "except AttributeError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("vavae_tools has no 'nonsense'; it offers write_gait_dataset, split_folders, ")
    names: dict = {}
    exec("from vavae_tools import *", names)
    assert all(callable(names[name]) for name in vavae_tools.__all__)


# ---- bad input


@pytest.fixture(scope="module")
def things(split_dir, vavae_dir, tmp_path_factory) -> dict[str, str]:
    """Paths for the commands below."""
    folder = tmp_path_factory.mktemp("things")
    torch.save({"state_dict": {}, "hyper_parameters": {"denoiser_config": {}}}, folder / "dit.ckpt")
    other = {"vavae." + name: weights for name, weights in tiny_vavae(condition_dim=0).state_dict().items()}
    torch.save({"state_dict": other, "optimizer_states": [], "loops": {}}, folder / "other.ckpt")
    (folder / "file").write_text("a file")
    (folder / "link").symlink_to("nowhere")
    return {"here": str(folder), "split": str(split_dir), "vavae": str(vavae_dir)}


TUNE = "--data_dir {split} --original_vavae {vavae} --condition_dim 4 --max_epochs 1"
BAD_FINE_TUNING = {
    "--data_dir nowhere": "No such folder: nowhere.",
    "": "run data_split.py first, or name it with --data_dir",
    TUNE + " --original_vavae nowhere": "No VA-VAE at nowhere",
    TUNE + " --original_vavae {here}/dit.ckpt": "dit.ckpt is no checkpoint of VA-VAE training",
    TUNE + " --resume last": "No checkpoint outputs/checkpoints/last.ckpt",
    TUNE + " --resume {here}/other.ckpt": "other.ckpt is of another model",
    TUNE + " --image_size 17": "--image_size 17 does not fit this VA-VAE: it must be divisible by 2",
    TUNE + " --lpips_weights {here}/other.ckpt": "other.ckpt: 0 of the 26 tensors of LPIPS's VGG16",
    TUNE + " --recipe staged --max_epochs 2": "needs at least one for each stage",
}
TRAIN = "--data_dir {split} --vavae {vavae} --hidden_size 16 --depth 1 --num_heads 2"
BAD_TRAINING = {
    "--data_dir {split} --vavae {vavae} --hidden_size 30 --num_heads 4": "hidden_size",
    "--data_dir {split} --vavae {vavae} --patch_size 3": "input_size 8×8 cannot be cut into patches of 3×3",
    TRAIN + " --latents_dir {here}/new init.weights=nowhere.pt": "No checkpoint nowhere.pt",
    TRAIN + " --latents_dir {here}/new model.num_classes=2": "num_classes 2, but 3 in the data",
    TRAIN + " --latents_dir {here}/new --logger nonsense": "No logger 'nonsense' (did you mean none?); there are tens",
    TRAIN + " --latents_dir {here}/new init.lora_rank=2": "init.lora_rank is of weights to start from",
    TRAIN + " trainer.check_val_every_n_epoch=0": "--check_val_every_n_epoch 0: expected how many, at least one",
    TRAIN + " --latents_dir {here}/new --resume {here}/other.ckpt": "other.ckpt is of another model",
    "--data_dir {split} --vavae {vavae} --latents_dir {here}/file": "file is a file, expected a folder",
    "--data_dir {split} --vavae {vavae} --latents_dir {here}/link": "link is a link to nowhere, which is not there",
}
BAD = [("fine_tune", *case) for case in BAD_FINE_TUNING.items()]
BAD += [("train", *case) for case in BAD_TRAINING.items()]


@pytest.mark.parametrize(("name", "line", "message"), BAD)
def test_bad_input_is_answered_by_one_line(fault, monkeypatch, things, name, line, message):
    monkeypatch.delenv("VAVAE_WORK", raising=False)
    before = contents(Path(things["here"]))
    assert message in fault(main_of(name), *line.format(**things).split())
    assert contents(Path(things["here"])) == before
