"""`train.log`: that its lines are what Lightning has logged, where they stand, and what is said when training ends."""

import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import lightning as L
import pytest
import torch
from alike import curves
from lightning.pytorch.callbacks import Checkpoint
from test_throughput import train as train_quietly
from tiny import new_dit

from vavae_tools.data.latents import LatentDataModule
from vavae_tools.runtime.errors import Stopped, UserError
from vavae_tools.training.callbacks.checkpointing import checkpoint_callbacks
from vavae_tools.training.callbacks.progress import NAME, Progress, TrainLog
from vavae_tools.training.config import SaveConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d)  (\w+) +(.*)")
NUMBER = r"([\d.e+-]+)"
STEP = re.compile(
    rf" *(\d+)/(\d+)  epoch (\d+) +loss +{NUMBER}  lr +{NUMBER} +([\d.]+) steps/s +([\d:]+) left +([\d.]+) GB RAM"
)


def train(folder: Path, latents: Path, log: TrainLog, callbacks=(), resume=None, steps=12, validate=False, **settings):
    """On 24 latents, four of them a batch: six batches an epoch."""
    settings = {"limit_val_batches": 1.0 if validate else 0, "log_every_n_steps": 3, "max_steps": steps, **settings}
    settings["enable_checkpointing"] = any(isinstance(callback, Checkpoint) for callback in callbacks)
    data = LatentDataModule(latents, batch_size=4, seed=1)
    return train_quietly(new_dit(seed=1), data, folder, [log, *callbacks], resume=resume, **settings)


def lines(folder: Path) -> list[tuple[str, str]]:
    """(what about, text) of each; times are checked."""
    found = [LINE.fullmatch(line) for line in (folder / NAME).read_text(encoding="utf-8").splitlines() if line]
    assert all(found)
    assert [line[1] for line in found] == sorted(line[1] for line in found)
    return [(line[2], line[3]) for line in found]


def steps(folder: Path) -> list[tuple[int, int, int, float, float]]:
    """(step, total, epoch, loss, lr) of each line of a step; numbers in the curves are one less."""
    found = [STEP.fullmatch(text) for about, text in lines(folder) if about == "step"]
    assert all(found) and all(float(line[6]) > 0 and float(line[8]) > 0.01 for line in found)
    return [(*map(int, line.groups()[:3]), float(line[4]), float(line[5])) for line in found]


def test_a_line_holds_its_own_steps_values(tmp_path, latents_dir):
    train(tmp_path, latents_dir, TrainLog(tmp_path, 3), steps=11)
    loss, lr = (dict(curves(tmp_path)[name]) for name in ("train/loss", "train/lr"))
    seen = steps(tmp_path)
    assert [line[:3] for line in seen] == [(3, 11, 1), (6, 11, 1), (9, 11, 2), (11, 11, 2)]
    logged = [3, 6, 9, 9]  # the last step is none that Lightning logs
    assert [line[3] for line in seen] == pytest.approx([loss[step - 1] for step in logged], rel=1e-4)
    assert [line[4] for line in seen] == pytest.approx([lr[step - 1] for step in logged], rel=1e-3)
    assert len({line[3] for line in seen}) == 3


def test_the_log_begins_and_ends_with_what_the_run_is(tmp_path, latents_dir, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/there/train.py", "data_dir=my images", "model.lr=1e-4"])
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", find_spec("vavae_tools.train"))
    train(tmp_path, latents_dir, TrainLog(tmp_path, 6, machine="a machine, of a kind"))
    found = lines(tmp_path)
    assert [about for about, _ in found] == ["command", "versions", "machine", "begin", "step", "step", "end"]
    said = dict(found)
    assert said["command"] == "python -m vavae_tools.train 'data_dir=my images' model.lr=1e-4"
    assert f"torch {torch.__version__}" in said["versions"] and f"lightning {L.__version__}" in said["versions"]
    assert said["machine"] == "a machine, of a kind" and said["begin"] == "12 steps to go"
    assert re.fullmatch(r"12 steps in \d:\d\d:\d\d, at step 12 of 12", said["end"])


def test_accumulated_batches_are_one_step(tmp_path, latents_dir):
    train(tmp_path, latents_dir, TrainLog(tmp_path, 2), steps=4, accumulate_grad_batches=3, log_every_n_steps=1)
    loss = dict(curves(tmp_path)["train/loss"])
    assert [line[:3] for line in steps(tmp_path)] == [(2, 4, 1), (4, 4, 2)]
    assert [line[3] for line in steps(tmp_path)] == pytest.approx([loss[1], loss[3]], rel=1e-4)


def test_validation_and_checkpoints_have_lines(tmp_path, latents_dir):
    saving = SaveConfig(save_every_minutes=60, save_every_n_steps=5)
    callbacks = checkpoint_callbacks(tmp_path / "checkpoints", "val/loss", saving)
    trainer = train(tmp_path, latents_dir, TrainLog(tmp_path, 100), callbacks, validate=True)
    found = lines(tmp_path)
    validated = [text for about, text in found if about == "val"]
    loss = dict(curves(tmp_path)["val/loss"])
    assert [re.match(r" *(\d+)/12  epoch (\d)", text).groups() for text in validated] == [("6", "1"), ("12", "2")]
    assert [float(text.rpartition(" ")[2]) for text in validated] == pytest.approx(list(loss.values()), rel=1e-4)
    saved = [tuple(text.split("  step ")) for about, text in found if about == "saved"]
    assert (str(tmp_path / "checkpoint-5"), "5") in saved and (str(tmp_path / "checkpoint-10"), "10") in saved
    best = [path for path, _ in saved if "best-" in path]
    assert Path(best[-1]).is_file() and best[-1] == str(trainer.checkpoint_callback.best_model_path)
    assert saved[-1] == (str(tmp_path / "checkpoints" / "last.ckpt"), "12") and found[-1][0] == "end"
    assert found[-2][0] == "saved"  # the last one too, before the end


class StopAt(L.Callback):
    def __init__(self, step: int, error: BaseException) -> None:
        self.step, self.error = step, error

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == self.step:
            raise self.error


def test_what_goes_on_is_appended_and_says_so(tmp_path, latents_dir):
    callbacks = checkpoint_callbacks(
        tmp_path / "checkpoints", None, SaveConfig(save_every_minutes=60, save_every_n_steps=4)
    )
    stop = Stopped("Stopped after step 7; go on with --resume last")
    train(tmp_path, latents_dir, TrainLog(tmp_path, 3), [*callbacks, StopAt(7, stop)])
    first = (tmp_path / NAME).read_text()
    about, text = lines(tmp_path)[-1]
    assert about == "stopped" and re.fullmatch(
        r"Stopped after step 7; go on with --resume last \(7 steps in \d:\d\d:\d\d, at step 7 of 12\)", text
    )
    train(tmp_path, latents_dir, TrainLog(tmp_path, 3), resume=tmp_path / "checkpoint-4")
    assert (tmp_path / NAME).read_text().startswith(first + "\n")
    found = lines(tmp_path)
    assert [text for about, text in found if about == "begin"] == ["12 steps to go", "resuming after step 4 of 12"]
    assert [line[0] for line in steps(tmp_path)] == [3, 6, 6, 9, 12]
    assert found[-1][1].startswith("8 steps in")
    before, again = (line for line in steps(tmp_path) if line[0] == 6)
    assert before == again  # the same step, the same values


def test_a_fault_is_the_last_line(tmp_path, latents_dir):
    with pytest.raises(UserError, match="two"):
        train(tmp_path, latents_dir, TrainLog(tmp_path, 3), [StopAt(2, UserError("of two\nlines"))])
    about, text = lines(tmp_path)[-1]
    assert about == "failed" and re.fullmatch(r"UserError: of two lines \(2 steps in [\d:]+, at step 2 of 12\)", text)


@pytest.mark.skipif(os.getuid() == 0 and not Path("/dev/full").exists(), reason="needs a disk that is full")
def test_a_full_disk_does_not_end_training(tmp_path, latents_dir):
    (tmp_path / NAME).symlink_to("/dev/full")
    said = []
    trainer = train(tmp_path, latents_dir, TrainLog(tmp_path, 3, said.append))
    assert trainer.global_step == 12
    assert said == [f"{tmp_path / NAME} cannot be written (No space left on device): training continues without it"]


def test_batches_that_are_gathered_make_one_line_a_step(tmp_path, latents_dir):
    said = []
    train(tmp_path, latents_dir, TrainLog(tmp_path, 1), [Progress(said.append)], steps=3, accumulate_grad_batches=2)
    assert [line.split()[1] for line in said] == ["1/3", "2/3", "3/3"]
