"""Folder checkpoints come back bit by bit, are whole or not there, and those of other trainings are resumed from."""

import json
import os
import shutil
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from test_training import Fit, assert_same_run, modules
from test_vavae_training import fit as fit_vavae
from test_vavae_training import new_module
from tiny import assert_same, names, refuses, same, tiny_dit

from vavae_tools.checkpoints.formats import (
    clear_left_overs,
    read_any_format,
    read_folder,
    write_any_format,
    write_folder,
)
from vavae_tools.checkpoints.resuming import check_resumable, checkpoint_info, checkpoints_in, keep_newest, resume_path
from vavae_tools.runtime.errors import UserError
from vavae_tools.training.denoiser_module import DiffusionModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
quiet = pytest.fail  # where there is nothing to say


@pytest.fixture(scope="module")
def dit(split_dir, latents_dir, tmp_path_factory) -> Fit:
    """A DiT's three epochs of four steps, with a checkpoint of each step. Do not write into it."""
    return Fit(tmp_path_factory.mktemp("dit") / "whole", "dit", (split_dir, latents_dir), max_epochs=3)


def after(fit: Fit, step: int) -> dict:
    """As `last.ckpt` was after a step."""
    return torch.load(fit.folder / f"{step:02d}.kept", weights_only=True)


def small(number: float = 1.0, step: int = 7) -> dict:
    """The parts of Lightning's checkpoint, at a size that takes no time."""
    weights = OrderedDict({"network.a": torch.full((3,), number), "ema.network.a": torch.full((3,), number / 2)})
    state = {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {
        "epoch": 2,
        "global_step": step,
        "state_dict": weights,
        "optimizer_states": [state],
        "lr_schedulers": [],
        "loops": {"fit_loop": {}},
        "hyper_parameters": {"betas": [0.9, 0.99], "size": (8, 8), "name": None},
    }


# ---- as it was


def test_a_folder_holds_a_checkpoint_bit_by_bit(tmp_path, dit):
    folder = write_folder(after(dit, 6), tmp_path / "run" / "checkpoint-6")
    files = ["ema_model.pt", "model.pt", "optimizer.pt", "scheduler.pt", "trainer.pt", "training_state.json"]
    assert names(folder) == files and names(tmp_path / "run") == ["checkpoint-6"]
    loaded = {name: torch.load(folder / name, weights_only=True) for name in files[:-1]}
    keys = DiffusionModule(*tiny_dit()).network.state_dict(prefix="network.").keys()
    assert loaded["model.pt"].keys() == loaded["ema_model.pt"].keys() == keys
    assert_same(loaded["optimizer.pt"], after(dit, 6)["optimizer_states"])
    state = json.loads((folder / "training_state.json").read_text())
    assert (state["global_step"], state["current_epoch"]) == (6, 1) and sorted(state["files"]) == files[:-1]
    assert_same(read_folder(folder, quiet), after(dit, 6))
    assert checkpoint_info(folder).damage() is None and checkpoint_info(folder).step == 6

    checkpoint = {"state_dict": {"vavae.w": torch.ones(2)}, "optimizer_states": [], "global_step": 1}
    folder = write_folder(checkpoint, tmp_path / "checkpoint-1")  # what there is none of has no file
    assert names(folder) == ["model.pt", "trainer.pt", "training_state.json"]
    assert_same(read_folder(folder, quiet), checkpoint)


def test_names_are_written_without_what_wraps_the_model(tmp_path):
    weights = {"module.network._orig_mod.a": torch.ones(1), "ema.network._orig_mod.a": torch.zeros(1)}
    folder = write_folder({**small(), "state_dict": weights}, tmp_path / "checkpoint-7")
    assert read_folder(folder, quiet)["state_dict"] == {"network.a": torch.ones(1), "ema.network.a": torch.zeros(1)}
    weights["network.a"] = torch.ones(1)
    refuses("have the same name", write_folder, {**small(), "state_dict": weights}, tmp_path / "checkpoint-8")
    assert names(tmp_path) == ["checkpoint-7"]


@pytest.mark.parametrize("step", [3, 8])  # within an epoch, at its end
def test_a_dit_resumes_from_a_folder_as_if_never_stopped(tmp_path, data, dit, step):
    folder = write_folder(after(dit, step), tmp_path / f"checkpoint-{step}")
    check_resumable(folder, modules("dit", *data)[0])
    assert_same_run(Fit(tmp_path / "run", "dit", data, folder, max_epochs=3), dit)


def test_two_optimisers_resume_from_a_folder_of_ours_and_of_elsewhere(tmp_path, split_dir):
    _, last, seen = fit_vavae(tmp_path / "whole", split_dir, new_module(), max_epochs=2)
    ours = torch.load(tmp_path / "whole" / "checkpoints" / "06.kept", weights_only=True)
    ours = write_folder(ours, tmp_path / "checkpoint-6")
    assert len(torch.load(ours / "optimizer.pt", weights_only=True)) == 2
    theirs, said = tmp_path / "checkpoint-epoch-0", []
    theirs.mkdir()
    kept = torch.load(tmp_path / "whole" / "checkpoints" / "04.kept", weights_only=True)
    for part, key in {"model": "state_dict", "optimizer": "optimizer_states", "scheduler": "lr_schedulers"}.items():
        torch.save(kept[key], theirs / f"{part}.pt")
    found = read_folder(theirs, said.append)
    assert (found["epoch"], found["global_step"]) == (1, 4)  # from its name, and as the optimiser counted
    assert [line.split()[-1] for line in said] == ["name", "them"]
    for folder, step in ((ours, 6), (theirs, 4)):
        module = new_module()
        check_resumable(folder, module)
        _, resumed, rest = fit_vavae(tmp_path / f"run-{step}", split_dir, module, folder, max_epochs=2)
        assert rest == seen[step:]
        for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
            assert_same(resumed[part], last[part], part)


# ---- whole or not there


def killed_at(moment: int, folder: Path) -> bool:
    """Write `folder` in a process that ends, without any cleaning up, before its n-th change; True if it did."""
    process = os.fork()
    if process:
        return os.waitpid(process, 0)[1] != 0
    count = 0

    def counted(function):
        def call(*arguments, **named):
            nonlocal count
            count += 1
            if count == moment:
                os._exit(9)
            return function(*arguments, **named)

        return call

    os.fsync, os.rename = counted(os.fsync), counted(os.rename)
    torch.save, shutil.rmtree = counted(torch.save), counted(shutil.rmtree)
    write_folder(small(2.0, step=8), folder)
    os._exit(0)


@pytest.mark.parametrize("again", [False, True])
def test_a_kill_at_any_moment_leaves_no_half_of_a_folder(tmp_path, again):
    """A new name is whole or not there; one that is written again is the former or the new, but between two renames."""
    folder, moment, steps = tmp_path / "checkpoint-8", 0, []
    while True:
        moment += 1
        if again:
            write_folder(small(1.0), folder)
        ended = killed_at(moment, folder)
        steps.append(None)
        if folder.exists():
            found = read_folder(folder, quiet)
            assert checkpoint_info(folder).damage() is None
            assert_same(found, small(1.0) if found["global_step"] == 7 else small(2.0, step=8))
            steps[-1] = found["global_step"]
        clear_left_overs(tmp_path)
        assert names(tmp_path) == ["checkpoint-8"] * (steps[-1] is not None)
        if not ended:
            break
        shutil.rmtree(folder, ignore_errors=True)
    assert moment > 10 and steps[-2:] == [8, 8] and steps[0] == (7 if again else None)
    assert not again or steps.count(None) == 1


def test_what_cannot_be_written_leaves_what_was_there(tmp_path, monkeypatch):
    folder = write_folder(small(), tmp_path / "checkpoint-7")
    save = torch.save

    def full(value, path):
        if path.name == "optimizer.pt":
            path.write_bytes(b"half")
            raise RuntimeError("[enforce fail at inline_container.cc:668] . unexpected pos 64 vs 0\nmore")
        save(value, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(UserError, match=r"checkpoint-7 could not be written \(.* MB free\): .* was there is whole"):
        write_folder(small(2.0), folder)
    assert_same(read_folder(folder, quiet), small())
    assert names(tmp_path) == ["checkpoint-7"]
    (tmp_path / "images").mkdir()
    with pytest.raises(UserError, match=r"exists and is no checkpoint \(no model\.pt\): name another folder"):
        write_folder(small(), tmp_path / "images")


@pytest.mark.parametrize("name", ["last.ckpt", "checkpoint-7/model.pt", "checkpoint-7/trainer.pt"])
def test_a_change_is_found_or_changes_nothing(tmp_path, name):
    """Of the bytes between the records: whatever is not called damaged is read as it was written."""
    path = write_any_format(small(), tmp_path / name.split("/")[0])
    file, passed = tmp_path / name, 0
    contents = file.read_bytes()
    for place in range(0, len(contents), 13):
        changed = bytearray(contents)
        changed[place] ^= 1
        file.write_bytes(changed)
        if checkpoint_info(path).damage() is None:
            assert_same(read_any_format(path, quiet), small())
            passed += 1
    assert 0 < passed < len(contents) / 13 / 2
    file.write_bytes(contents)
    tensor = contents.find(b"\x00\x00\x80\x3f" * 3) + 2
    if tensor > 2:
        file.write_bytes(contents[:tensor] + b"\x81" + contents[tensor + 1 :])
        assert "other contents than were written (" in checkpoint_info(path).damage()
    for length in (0, 1, 30, len(contents) - 1):
        file.write_bytes(contents[:length])
        in_folder = f"{file.name}: {length:,} bytes, expected {len(contents):,}"
        no_zip = "it is neither a zip nor a pickle of torch.save"
        assert checkpoint_info(path).damage() == (in_folder if path.is_dir() else no_zip)
    file.unlink()
    assert checkpoint_info(path).damage().endswith("missing")


# ---- from elsewhere


def foreign_folder(folder: Path, checkpoint: dict, state: dict | None, *, wrap="module._orig_mod.", without=()) -> Path:
    """As another program would write it: other names, one state_dict each, no list of files."""
    weights = checkpoint["state_dict"]
    trained = {k.removeprefix("network."): v for k, v in weights.items() if not k.startswith("ema.")}
    average = {k.removeprefix("ema.network."): v for k, v in weights.items() if k.startswith("ema.")}
    parts = {
        "model": {wrap + name: tensor for name, tensor in trained.items()},
        "ema_model": {**average, "n_averaged": torch.tensor(8)},
        "optimizer": checkpoint["optimizer_states"][0],
        "scheduler": checkpoint["lr_schedulers"][0],
    }
    folder.mkdir()
    for part, value in parts.items():
        if part not in without:
            torch.save(value, folder / f"{part}.pt")
    if state is not None:
        (folder / "training_state.json").write_text(json.dumps(state))
    return folder


def checked_fit(folder: Path, data: tuple[Path, Path], resume: Path, **length) -> Fit:
    """As `train_dit` resumes: the module that was checked is the one that is trained."""
    module, latents, metric = modules("dit", *data)
    check_resumable(resume, module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("test_training.modules", lambda *arguments: (module, latents, metric))
        return Fit(folder, "dit", data, resume, **length)


@pytest.mark.parametrize(
    ("kind", "length"), [("folder", {"max_epochs": 3}), ("pth", {"max_steps": 12, "max_epochs": -1})]
)
def test_what_another_training_wrote_goes_on_with_the_next_epoch(tmp_path, data, dit, kind, length):
    """With everything in it, that is the run that was never stopped, although names and containers are others."""
    foreign = foreign_folder(tmp_path / "checkpoint-8", after(dit, 8), {"epoch": 1, "global_step": 8})
    if kind == "pth":
        parts = {path.stem: torch.load(path, weights_only=True) for path in foreign.glob("*.pt")}
        keys = {"model_state_dict": "model", "ema": "ema_model", "optimizer_state_dict": "optimizer"}
        named = {key: parts[part] for key, part in {**keys, "scheduler": "scheduler"}.items()}
        foreign = tmp_path / "checkpoint_epoch_1.pth"
        torch.save({**named, "epoch": 1, "global_step": 8}, foreign)
    assert read_any_format(foreign, quiet)["epoch"] == 2
    resumed = checked_fit(tmp_path / "run", data, foreign, **length)
    assert resumed.seen == dit.seen[8:] and resumed.trainer.global_step == 12
    assert_same_run(resumed, dit)


def test_what_is_missing_is_logged_and_starts_anew(tmp_path, data, dit):
    parts = ("optimizer", "scheduler", "ema_model")
    foreign = foreign_folder(tmp_path / "weights", after(dit, 8), None, without=parts)
    said = []
    found = read_folder(foreign, said.append)
    assert said == [
        f"{foreign} has no training_state.json: starting at epoch 0",
        f"{foreign}: optimizer.pt is not there: the optimiser starts anew",
        f"{foreign}: scheduler.pt is not there: the learning rate's schedule starts anew",
        f"{foreign}: ema_model.pt is not there: the average of the weights, where there is one, starts anew from them",
    ]
    assert (found["epoch"], found["global_step"], found["optimizer_states"], found["lr_schedulers"]) == (0, 0, [], [])
    module, _, _ = modules("dit", *data)
    check_resumable(foreign, module)
    module.load_state_dict(found["state_dict"])
    trained, weights = after(dit, 8)["state_dict"], module.state_dict()
    assert all(same(weights[name], trained[name.removeprefix("ema.")]) for name in weights)
    resumed = checked_fit(tmp_path / "run", data, foreign, max_epochs=1)
    assert resumed.seen == dit.seen[:4] and resumed.last["global_step"] == 4


def test_parts_that_were_taken_out_of_our_folder_start_anew(tmp_path, dit):
    folder = write_folder(after(dit, 6), tmp_path / "checkpoint-6")
    for part in ("optimizer", "ema_model"):
        (folder / f"{part}.pt").unlink()
    said = []
    found = read_folder(folder, said.append)
    assert len(said) == 2 and f"{folder} has no optimizer.pt: the optimiser starts anew" in said
    assert found["optimizer_states"] == [] and found["loops"] == after(dit, 6)["loops"]
    (folder / "trainer.pt").unlink()
    found = read_folder(folder, said.append)
    assert f"{folder} has no trainer.pt: the place in the epoch is lost, and the next epoch begins" in said
    assert (found["epoch"], found["global_step"]) == (2, 6)


@pytest.mark.parametrize(
    ("name", "state", "place"),
    [
        ("checkpoint-5000", None, (0, 5000)),
        ("checkpoint-5000", {"epoch": 3}, (4, 5000)),
        ("checkpoint-epoch-118", {"current_epoch": 7, "epoch": 6, "global_step": 80, "best": "a"}, (8, 80)),
        ("weights", {"epoch": 7.0, "step": 80}, (8, 80)),
    ],
)
def test_the_place_comes_from_the_state_or_the_name(tmp_path, name, state, place):
    (tmp_path / name).mkdir()
    torch.save({"network.a": torch.ones(1)}, tmp_path / name / "model.pt")
    if state:
        (tmp_path / name / "training_state.json").write_text(json.dumps(state))
    said = []
    found = read_folder(tmp_path / name, said.append)
    assert (found["epoch"], found["global_step"]) == place
    assert (len(said) == 4) == (state is None)


def test_schedulers_scalers_and_weights_alone_of_single_files(tmp_path):
    said = []
    torch.save({"model": {"a": torch.ones(1)}, "scheduler": {"T_max": 3}, "epoch": 1}, tmp_path / "a.pth")
    assert read_any_format(tmp_path / "a.pth", said.append)["lr_schedulers"] == []
    assert f"{tmp_path / 'a.pth'}: scheduler cannot be used here: the learning rate's schedule starts anew" in said
    torch.save({"net": {"a": torch.ones(1)}, "scaler": {"scale": 4.0}, "epoch": torch.tensor(3)}, tmp_path / "a.pth")
    found = read_any_format(tmp_path / "a.pth", said.append)
    assert found["MixedPrecision"] == {"scale": 4.0} and found["epoch"] == 4
    torch.save({"a": torch.ones(1)}, tmp_path / "checkpoint_epoch_50.pth")
    assert read_any_format(tmp_path / "checkpoint_epoch_50.pth", said.append)["epoch"] == 50


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_what_cannot_be_read_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = Path("checkpoint-1")

    def refused(path: Path | str, message: str) -> None:
        refuses(message, read_any_format, path, lambda line: None)

    refused(folder, "No checkpoint checkpoint-1")
    folder.mkdir()
    torch.save({}, folder / "optimizer.pt")
    refused(folder, r"it holds optimizer\.pt, expected model\.pt")
    for contents, message in [
        ({"a": Malicious()}, "more than tensors and plain values"),
        ({"a": 1}, r"its model\.pt holds no tensors by name"),
        ([1], r"its model\.pt holds no tensors by name"),
    ]:
        torch.save(contents, folder / "model.pt")
        refused(folder, message)
    (folder / "model.pt").write_bytes((folder / "model.pt").read_bytes()[:-30])
    refused(folder, r"model\.pt is damaged or no checkpoint")
    torch.save({"a": torch.ones(1)}, folder / "model.pt")
    (folder / "training_state.json").write_text("{")
    refused(folder, r"training_state\.json: no JSON object")
    torch.save({"lr": 1}, "a.pth")
    refused("a.pth", r"a\.pth has no weights: it holds lr, expected one of model, model_state_dict")
    assert not Path("executed").exists()


def test_folders_that_only_others_read_are_refused_in_one_line(tmp_path):
    """Of processes' parts, as an older version wrote them, and of DeepSpeed, which resumes by its own strategy."""
    parts, deepspeed = tmp_path / "parts" / "last.ckpt", tmp_path / "last.ckpt"
    for file in (parts / "checkpoint.pt", deepspeed / "checkpoint" / "mp_rank_00_model_states.pt"):
        file.parent.mkdir(parents=True)
        torch.save({}, file)
    refuses(r"make one file .* consolidate \S+/last\.ckpt\)$", read_any_format, parts, print)
    refuses("was written by DeepSpeed: resume from it with --strategy deepspeed", read_any_format, deepspeed, print)
    assert resume_path("last", tmp_path) == deepspeed
    check_resumable(deepspeed, DiffusionModule(*tiny_dit()))


# ---- which stay


def run_folder(run: Path) -> Path:
    """Periodic checkpoints of steps 1 to 4, the last one damaged, and what every run has."""
    for step in range(1, 5):
        write_folder(small(step=step), run / f"checkpoint-{step}")
    torch.save(small(step=5), run / "checkpoint_epoch_9.pth")
    (run / "checkpoint-4" / "model.pt").write_bytes(b"half")
    (run / "checkpoints").mkdir()
    for name in ("last.ckpt", "previous.ckpt", "best-001-0.5000.ckpt"):
        torch.save(small(step=6), run / "checkpoints" / name)
    return run


@pytest.mark.parametrize(("keep", "stay"), [(0, []), (2, ["checkpoint-3", "checkpoint_epoch_9.pth"])])
def test_the_newest_whole_ones_stay(tmp_path, keep, stay):
    run = run_folder(tmp_path / "run")
    assert len(checkpoints_in(run)) == len(checkpoints_in(run / "checkpoints")) == 8
    keep_newest(run, keep)
    assert names(run) == sorted([*stay, "checkpoints"])
    assert names(run / "checkpoints") == ["best-001-0.5000.ckpt", "last.ckpt", "previous.ckpt"]


def test_the_only_whole_one_stays(tmp_path):
    run = run_folder(tmp_path / "run")
    path = run / "checkpoint-3" / "model.pt"
    path.write_bytes(bytes(path.stat().st_size))  # damage of the same length
    keep_newest(run, 2, thoroughly=True)
    assert names(run) == ["checkpoint-2", "checkpoint_epoch_9.pth", "checkpoints"]
    shutil.rmtree(run / "checkpoints")
    keep_newest(run, 0)
    assert names(run) == ["checkpoint_epoch_9.pth"]
    (run / "checkpoint_epoch_9.pth").write_bytes(b"half")
    assert keep_newest(run, 0) == [] and names(run) == ["checkpoint_epoch_9.pth"]  # nothing is whole
    refuses("--keep -1", keep_newest, run, -1)
