"""Saving beside training, in time, within the disk; and what a run says of itself."""

import json
import threading
import time
from collections import namedtuple
from pathlib import Path

import lightning as L
import pytest
import torch
from filelock import FileLock
from PIL import Image
from test_experiments import SMALL
from test_training import Fit, assert_same_run
from tiny import SIZE, last, noise, refuses, tiny_dit

from vavae_tools.checkpoints.formats import write_folder
from vavae_tools.checkpoints.resuming import best_checkpoint, resume_path
from vavae_tools.data.latents import LatentDataModule
from vavae_tools.recipes.vavae import fine_tune_vavae
from vavae_tools.runtime.console import log
from vavae_tools.runtime.errors import Stopped, run_command
from vavae_tools.training.callbacks import checkpointing as checkpoints
from vavae_tools.training.callbacks.checkpointing import AtomicCheckpointIO
from vavae_tools.training.config import SaveConfig, session_end
from vavae_tools.training.denoiser_module import DiffusionModule
from vavae_tools.training.run import fit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture
def tune(split_dir, vavae_dir):
    """Fine-tune in a folder, four steps an epoch."""

    def tune(folder, max_epochs=1, data_dir=split_dir, original=vavae_dir, **settings):
        settings = {"image_size": SIZE, "batch_size": 6, "log": lambda line: None, **settings}
        return fine_tune_vavae(data_dir, folder, original, max_epochs=max_epochs, **settings)

    return tune


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


def test_a_stopped_training_leaves_a_model_and_status_0(tune, tmp_path, capsys):
    run_command(lambda: tune(tmp_path, 9, saving=SaveConfig(max_time="0:00:01"), log=log))
    assert "stopped after step 1; go on with --resume last" in capsys.readouterr().out
    assert (tmp_path / "vavae" / "config.json").is_file() and (tmp_path / "checkpoints" / "last.ckpt").is_file()


def test_folders_every_few_steps_and_epochs(tune, tmp_path):
    tune(tmp_path, 4, saving={"save_every_n_steps": 3, "save_every_n_epochs": 2, "keep_last": 3})
    names = sorted(path.name for path in tmp_path.glob("checkpoint-*"))
    assert names == ["checkpoint-12", "checkpoint-15", "checkpoint-epoch-4"]
    state = json.loads((tmp_path / "checkpoint-epoch-4" / "training_state.json").read_text())
    assert state["global_step"] == 16


def test_a_run_that_was_moved_knows_its_best(tune, tmp_path):
    tune(tmp_path / "run", 3, saving={"keep_best": 2})
    of_run = {path.name for path in (tmp_path / "run" / "checkpoints").glob("best-*")}
    best = min(of_run, key=lambda name: float(name.removesuffix(".ckpt").split("-")[2]))
    (tmp_path / "run").rename(tmp_path / "moved")
    changed = {"lr": 5.0, "saving": {"keep_best": 1, "allow_changes": True}}  # no epoch is better
    for folder, resume in (("new", f"{tmp_path}/moved/checkpoints/last.ckpt"), ("moved", "last")):
        tune(tmp_path / folder, 4, resume=resume, **changed)
        assert len(of_run) == 2 and [p.name for p in (tmp_path / folder / "checkpoints").glob("best-*")] == [best]


def test_a_folder_is_one_runs(tune, tmp_path):
    tune(tmp_path)
    refuses(r"holds a run \(best-000.*, last.ckpt\): resume it .* or add --overwrite", tune, tmp_path, seed=1)
    of_former = [tmp_path / name for name in ("vavae/mark", "evaluation.json", "reconstructions/preview-000009.png")]
    for path in (*of_former, other := tmp_path / "latents/mark"):
        path.parent.mkdir(exist_ok=True)
        path.touch()
    for own in ("vavae", "checkpoints/last.ckpt"):
        said = f"--overwrite would replace .*{own}, which this run begins with"
        refuses(said, tune, tmp_path, original=tmp_path / own, overwrite=True)
    said = []
    tune(tmp_path, seed=1, overwrite=True, previews=0, log=said.append)
    assert len(list((tmp_path / "checkpoints").glob("best-*"))) == 1
    assert other.exists() and not any(path.exists() for path in of_former)
    assert not said[-1].endswith(", ") and "reconstructions/" not in said[-1]
    nothing = r"^Nothing is left to train: .*last\.ckpt is at step 4 of 4; take more"
    refuses(nothing, tune, tmp_path / "new", seed=1, resume=str(tmp_path / "checkpoints" / "last.ckpt"))
    with FileLock(tmp_path / ".lock"):
        refuses(r"Another training writes into .*: wait for its end", tune, tmp_path, resume="last")


def test_the_best_is_what_the_last_checkpoint_knows(tune, tmp_path):
    """Not one of steps that were left when the run resumed from an earlier checkpoint."""
    tune(tmp_path, 3, saving={"keep_best": -1})
    (first,) = (tmp_path / "checkpoints").glob("best-000-*")
    tune(tmp_path, 2, resume=str(first), lr=5.0, saving={"keep_best": -1, "allow_changes": True})
    assert list((tmp_path / "checkpoints").glob("best-002-*")) and best_checkpoint(tmp_path / "checkpoints") == first


def test_fit_keeps_what_another_run_left(tmp_path, latents_dir):
    def run(**options):
        data, cpu = LatentDataModule(latents_dir, 6), {"accelerator": "cpu", "devices": 1}
        return fit(DiffusionModule(*tiny_dit()), data, tmp_path, 2, devices=cpu, log=lambda line: None, **options)

    made = run()
    refuses(r'holds a run \(last\.ckpt\): .* \(in Python resume="last" or overwrite=True\)', run)
    with FileLock(tmp_path / ".lock"):
        refuses("Another training writes into", run, overwrite=True)
    assert run(overwrite=True) == made


def test_what_the_disk_refuses_is_one_line_in_a_cell_too(tune, tmp_path):
    (tmp_path / "run").touch()
    refuses("run is a file, expected a folder: name another one", tune, tmp_path / "run")


# ---- what a run says of itself


def test_other_settings_or_data_are_named(tune, tmp_path, gait):
    from vavae_tools.data.split import split_folders

    run, said = tmp_path / "run", []
    tune(run)
    record = json.loads((run / "run.json").read_text())
    assert record["settings"]["lr"] == 2e-3 and record["settings"]["recipe"] == "light"
    assert "torch" in record["versions"] and record["command"] and len(record["data"]) == 64
    of_before = {"max_epochs": 2, "resume": "last"}
    changed = r"other settings: lr was 0.002, is 0.001\. Go on .* --allow_changes"
    refuses(changed, tune, run, lr=1e-3, **of_before)
    split_folders(gait, tmp_path / "other", seed=7, progress=False)
    refuses("the data are others", tune, run, data_dir=tmp_path / "other", **of_before)
    tune(run, lr=1e-3, saving=SaveConfig(allow_changes=True), log=said.append, **of_before)
    assert "changed on going on: lr was 0.002, is 0.001" in said
    assert last(run)["lr_schedulers"][0]["base_lrs"] == [1e-3]  # and not only in run.json
    assert not (run / "checkpoints" / "last-v1.ckpt").exists()


FOLDER = ["experiment=dit_dummy", *SMALL, "train.batch_size=4", "train.max_steps=2", "output_dir=run"]
FOLDER += ["train.previews=0"]


def test_what_lightning_refuses_is_said_before_anything_is_encoded(train, split_dir):
    for argument, said in (
        ("trainer.limit_train_batches=2.5", "invalid value 2.5 for limit_train_batches"),
        ("trainer.profiler=none", "When passing string value for the `profiler` parameter"),
        ("trainer.barebones=true", "barebones=True"),
    ):
        refuses(said, train, *FOLDER, f"data.data_dir={split_dir}", argument)
        assert not Path("run").exists() and not Path("logs/latents").exists()


def test_other_data_or_batches_than_the_runs_are_refused_before_they_are_encoded(train, tmp_path):
    for seed, (name, length) in enumerate({"first": 8, "second": 8, "fewer": 6}.items()):
        for place, array in enumerate(noise(2 * length, 8, 8, seed=seed)):
            (tmp_path / name / f"person {place % 2}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / name / f"person {place % 2}" / f"{place}.png")
    words = [*FOLDER, "data.val_share=0.25", "data.latents_dir=latents"]
    train(*words, f"data.data_dir={tmp_path / 'first'}")
    made = set(Path("latents").rglob("*.safetensors"))
    for changes, said in (
        ("second", "other settings: the data are others. Go on with those of that run, or with --allow_changes"),
        ("fewer --allow_changes", "was written with samples = 12, here it is 8"),
        ("first train.batch_size=5", "has steps of 4 images, here they are of 5: take --batch_size 4"),
    ):
        folder, *others = changes.split()
        refuses(said, train, *words, f"data.data_dir={tmp_path / folder}", *others, "resume=last")
        assert set(Path("latents").rglob("*.safetensors")) == made
    assert "changed on going on: the data are others" in train(
        *words, f"data.data_dir={tmp_path / 'second'}", "train.max_steps=3", "resume=last", "--allow_changes"
    )
