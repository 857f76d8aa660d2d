"""Saving beside training, in time, within the disk; and what a run says of itself."""

import json
import threading
import time
from collections import namedtuple
from functools import partial
from pathlib import Path

import lightning as L
import pytest
import torch
from filelock import FileLock
from test_training import Fit, assert_same_run
from tiny import SIZE, refuses, tiny_dit

from vavae_tools.checkpoints.formats import write_folder
from vavae_tools.checkpoints.resuming import best_checkpoint, resume_path
from vavae_tools.data.latents import LatentDataModule
from vavae_tools.recipes.vavae import fine_tune_vavae
from vavae_tools.runtime.errors import Stopped, UserError, run_command
from vavae_tools.training.callbacks import checkpointing as checkpoints
from vavae_tools.training.callbacks.checkpointing import AtomicCheckpointIO
from vavae_tools.training.config import SaveConfig, session_end
from vavae_tools.training.denoiser_module import DiffusionModule
from vavae_tools.training.run import fit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def data(split_dir, latents_dir):
    return split_dir, latents_dir


# ---- beside training


def test_a_checkpoint_holds_the_weights_of_its_moment(tmp_path, monkeypatch):
    """The step goes on while the thread writes; the next save waits for it."""
    may_write, save = threading.Event(), torch.save

    def slow(checkpoint, path):
        may_write.wait(10)
        save(checkpoint, path)

    monkeypatch.setattr(checkpoints.torch, "save", slow)
    writer, weights = AtomicCheckpointIO(), torch.zeros(3)
    writer.save_checkpoint({"state_dict": {"w": weights}, "plain": [1, (2, "x")]}, str(tmp_path / "last.ckpt"))
    weights.add_(1.0)  # a step
    assert not (tmp_path / "last.ckpt").exists()
    may_write.set()
    writer.save_checkpoint({"state_dict": {"w": weights}}, str(tmp_path / "last.ckpt"))
    writer.teardown()
    former, last = (torch.load(tmp_path / f"{name}.ckpt", weights_only=True) for name in ("previous", "last"))
    assert former == {"state_dict": {"w": former["state_dict"]["w"]}, "plain": [1, (2, "x")]}
    assert former["state_dict"]["w"].tolist() == [0, 0, 0] and last["state_dict"]["w"].tolist() == [1, 1, 1]
    assert writer.seconds > 0 and sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_room_is_made_on_a_full_disk(tmp_path, monkeypatch):
    """First what `last.ckpt` was before, then periodic folders but the newest; never `last.ckpt`."""
    folder, said = tmp_path / "checkpoints", []
    folder.mkdir()
    for name in ("last.ckpt", "previous.ckpt", "best-000-0.1.ckpt"):
        torch.save({"global_step": 1}, folder / name)
    for step in (3, 6):
        checkpoint = {"state_dict": {"w": torch.zeros(3)}, "global_step": step, "epoch": 0}
        write_folder(checkpoint, tmp_path / f"checkpoint-{step}")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(checkpoints.shutil, "disk_usage", lambda path: usage(0, 0, 2**20))
    writer = AtomicCheckpointIO(said.append)
    writer.save_checkpoint({"w": torch.zeros(3)}, str(folder / "last.ckpt"))
    writer.wait()
    assert "previous.ckpt is removed (last.ckpt stays)" in said[0] and "checkpoint-3 is removed" in said[1]
    assert torch.load(folder / "last.ckpt", weights_only=True)["w"].tolist() == [0, 0, 0]
    assert (folder / "best-000-0.1.ckpt").is_file()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-6"]


# ---- in time


def test_session_end(tmp_path):
    now = time.time()
    assert session_end("1:30") - now == pytest.approx(5400, abs=5)
    assert session_end("2") - now == pytest.approx(7200, abs=5)
    assert session_end("0:00:30") - now == pytest.approx(30, abs=5)
    assert session_end(None, tmp_path / "none") is None and session_end("0") is None
    here = session_end(None, tmp_path, tmp_path)  # as old as the folder
    assert here - now == pytest.approx(12 * 3600 - 15 * 60, abs=60)
    refuses("--max_time 'noon': expected hours:minutes", session_end, "noon")


def test_training_ends_in_time_and_goes_on_exactly(tmp_path, data, monkeypatch):
    whole = Fit(tmp_path / "whole", "dit", data, max_epochs=3)

    class Late(L.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_step == 5:
                trainer.checkpoint_callbacks[-1].until = time.time() + 30  # less than what is kept for the end

    with pytest.raises(Stopped, match="time is nearly over: stopped after step 6; go on with --resume last"):
        Fit(tmp_path / "run", "dit", data, callbacks=[Late()], minutes=99, max_epochs=3)
    last = resume_path("last", tmp_path / "run" / "checkpoints")
    assert_same_run(Fit(tmp_path / "run", "dit", data, last, max_epochs=3), whole)


def test_a_stopped_training_leaves_a_model_and_status_0(split_dir, vavae_dir, tmp_path, capsys):
    numbers = {"image_size": SIZE, "batch_size": 6, "max_epochs": 9, "saving": SaveConfig(max_time="0:00:01")}
    run_command(lambda: fine_tune_vavae(split_dir, tmp_path, vavae_dir, **numbers))
    assert "stopped after step 1; go on with --resume last" in capsys.readouterr().out
    assert (tmp_path / "vavae" / "config.json").is_file() and (tmp_path / "checkpoints" / "last.ckpt").is_file()


def test_folders_every_few_steps_and_epochs(tmp_path, split_dir, vavae_dir):
    saving = {"save_every_n_steps": 3, "save_every_n_epochs": 2, "keep_last": 3}
    numbers = {"image_size": SIZE, "batch_size": 6, "max_epochs": 4, "log": lambda line: None}
    fine_tune_vavae(split_dir, tmp_path, vavae_dir, saving=saving, **numbers)
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-12", "checkpoint-15", "checkpoint-epoch-4"]
    state = json.loads((tmp_path / "checkpoint-epoch-4" / "training_state.json").read_text())
    assert state["global_step"] == 16


def test_a_run_that_was_moved_knows_its_best(split_dir, vavae_dir, tmp_path):
    numbers = {"image_size": SIZE, "batch_size": 6, "log": lambda line: None}
    fine_tune_vavae(split_dir, tmp_path / "run", vavae_dir, max_epochs=3, saving={"keep_best": 2}, **numbers)
    of_run = {path.name for path in (tmp_path / "run" / "checkpoints").glob("best-*")}
    best = min(of_run, key=lambda name: float(name.removesuffix(".ckpt").split("-")[2]))
    (tmp_path / "run").rename(tmp_path / "moved")
    changed = {"lr": 5.0, "saving": {"keep_best": 1, "allow_changes": True}, **numbers}  # no epoch is better
    for folder, resume in (("new", "moved/checkpoints/last.ckpt"), ("moved", "last")):
        resume = str(tmp_path / resume) if "/" in resume else resume
        fine_tune_vavae(split_dir, tmp_path / folder, vavae_dir, max_epochs=4, resume=resume, **changed)
        assert len(of_run) == 2 and [p.name for p in (tmp_path / folder / "checkpoints").glob("best-*")] == [best]


def test_a_folder_is_one_runs(split_dir, vavae_dir, tmp_path):
    numbers = {"image_size": SIZE, "batch_size": 6, "max_epochs": 1, "log": lambda line: None}
    fine_tune_vavae(split_dir, tmp_path, vavae_dir, **numbers)
    with pytest.raises(UserError, match=r"holds a run \(best-000.*, last.ckpt\): resume it .* or add --overwrite"):
        fine_tune_vavae(split_dir, tmp_path, vavae_dir, seed=1, **numbers)
    of_former = [tmp_path / name for name in ("vavae/mark", "evaluation.json", "reconstructions/preview-000009.png")]
    for path in (*of_former, other := tmp_path / "latents/mark"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for own in ("vavae", "checkpoints/last.ckpt"):
        again = partial(fine_tune_vavae, split_dir, tmp_path, tmp_path / own, overwrite=True, **numbers)
        refuses(f"--overwrite would replace .*{own}, which this run begins with", again)
    said = []
    numbers = {**numbers, "previews": 0, "log": said.append}
    fine_tune_vavae(split_dir, tmp_path, vavae_dir, seed=1, overwrite=True, **numbers)
    assert len(list((tmp_path / "checkpoints").glob("best-*"))) == 1
    assert other.exists() and not any(path.exists() for path in of_former)
    assert not said[-1].endswith(", ") and "reconstructions/" not in said[-1]
    new, last = tmp_path / "new", str(tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError, match=r"^Nothing is left to train: .*last\.ckpt is at step 4 of 4; take more"):
        fine_tune_vavae(split_dir, new, vavae_dir, seed=1, resume=last, **numbers)
    with (
        FileLock(tmp_path / ".lock"),
        pytest.raises(UserError, match=r"Another training writes into .*: wait for its end"),
    ):
        fine_tune_vavae(split_dir, tmp_path, vavae_dir, resume="last", **numbers)


def test_the_best_is_what_the_last_checkpoint_knows(split_dir, vavae_dir, tmp_path):
    """Not one of steps that were left when the run resumed from an earlier checkpoint."""
    numbers = {"image_size": SIZE, "batch_size": 6, "log": lambda line: None}
    run, allowed = tmp_path / "run", {"keep_best": -1, "allow_changes": True}
    fine_tune_vavae(split_dir, run, vavae_dir, max_epochs=3, saving={"keep_best": -1}, **numbers)
    (first,) = (run / "checkpoints").glob("best-000-*")
    fine_tune_vavae(split_dir, run, vavae_dir, max_epochs=2, resume=str(first), lr=5.0, saving=allowed, **numbers)
    assert list((run / "checkpoints").glob("best-002-*")) and best_checkpoint(run / "checkpoints") == first


def test_fit_keeps_what_another_run_left(tmp_path, latents_dir):
    def run(**options):
        data, cpu = LatentDataModule(latents_dir, 6), {"accelerator": "cpu", "devices": 1}
        return fit(DiffusionModule(*tiny_dit()), data, tmp_path, 2, devices=cpu, log=lambda line: None, **options)

    last = run()
    refuses(r'holds a run \(last\.ckpt\): .* \(in Python resume="last" or overwrite=True\)', run)
    with FileLock(tmp_path / ".lock"), pytest.raises(UserError, match="Another training writes into"):
        run(overwrite=True)
    assert run(overwrite=True) == last


def test_what_the_disk_refuses_is_one_line_in_a_cell_too(split_dir, vavae_dir, tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(UserError, match="run is a file, expected a folder: name another one"):
        fine_tune_vavae(split_dir, tmp_path / "run", vavae_dir, log=lambda line: None)


# ---- what a run says of itself


def test_other_settings_or_data_are_named(split_dir, vavae_dir, tmp_path, gait):
    from vavae_tools.data.split import split_folders

    said = []
    numbers = {"image_size": SIZE, "batch_size": 6, "max_epochs": 1, "log": said.append}
    fine_tune_vavae(split_dir, tmp_path / "run", vavae_dir, **numbers)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["settings"]["lr"] == 2e-3 and record["settings"]["recipe"] == "light"
    assert "torch" in record["versions"] and record["command"] and len(record["data"]) == 64
    numbers |= {"max_epochs": 2, "resume": "last"}
    with pytest.raises(UserError, match=r"other settings: lr was 0.002, is 0.001\. Go on .* --allow_changes"):
        fine_tune_vavae(split_dir, tmp_path / "run", vavae_dir, lr=1e-3, **numbers)
    split_folders(gait, tmp_path / "other", seed=7, progress=False)
    refuses("the data are others", fine_tune_vavae, tmp_path / "other", tmp_path / "run", vavae_dir, **numbers)
    allowed = SaveConfig(allow_changes=True)
    fine_tune_vavae(split_dir, tmp_path / "run", vavae_dir, lr=1e-3, saving=allowed, **numbers)
    assert "changed on going on: lr was 0.002, is 0.001" in said
    saved = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert saved["lr_schedulers"][0]["base_lrs"] == [1e-3]  # and not only in run.json
    assert not Path(tmp_path / "run" / "checkpoints" / "last-v1.ckpt").exists()
