"""What `--resume` finds, judges and refuses, and the command that looks after checkpoints."""

import re
import shutil
import sys
from argparse import Namespace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_folder_checkpoints import Malicious, run_folder, small
from test_vavae_training import new_module
from tiny import assert_same, names, refuses, tiny_dit, tiny_vavae

from vavae_tools.checkpoints.__main__ import main
from vavae_tools.checkpoints.formats import read_any_format, write_any_format, write_folder
from vavae_tools.checkpoints.resuming import check_resumable, resume_path
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import read_checkpoint, read_saved
from vavae_tools.training.autoencoder_module import VAVAEModule
from vavae_tools.training.denoiser_module import DiffusionModule


def saved(path: Path, step: int = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(small(step=step), path)
    return path


def flipped(path: Path, place: int) -> Path:
    contents = bytearray(path.read_bytes())
    contents[place] ^= 1
    path.write_bytes(contents)
    return path


# ---- which one


def test_last_is_the_one_before_where_it_is_damaged(tmp_path):
    run = tmp_path / "run"
    last = saved(run / "checkpoints" / "last.ckpt", 9)
    previous = saved(run / "checkpoints" / "previous.ckpt", 8)
    best = saved(run / "checkpoints" / "best-003-0.5000.ckpt", 4)
    folder = write_folder(small(step=6), run / "checkpoint-6")
    said = []

    def found(resume="last", place=run):
        said.clear()
        return resume_path(str(resume), place, said.append)

    assert found() == found(place=run / "checkpoints") == last and said == []
    flipped(last, last.read_bytes().index(b"\x00\x00\x80\x3f" * 3) + 2)
    assert found() == found(run) == previous
    reason = "other contents than were written (last/data/0)"
    assert said == [f"{last} is damaged ({reason}): resuming from {previous}, step 8"]
    last.unlink()
    previous.write_bytes(b"PK half of it")
    assert found() == folder
    (folder / "trainer.pt").unlink()
    assert found() == best and said[0].count("is damaged") == 2
    best.unlink()
    refuses(r"previous\.ckpt is damaged .* nothing else is there to resume from", found)


def test_a_runs_folder_is_its_newest_checkpoint(tmp_path):
    run = run_folder(tmp_path / "run")
    for name in names(run / "checkpoints"):
        (run / "checkpoints" / name).unlink()
    assert resume_path(str(run), tmp_path / "other") == run / "checkpoint_epoch_9.pth"
    assert resume_path(str(run / "checkpoint-2"), tmp_path / "other") == run / "checkpoint-2"
    (run / "checkpoint_epoch_9.pth").unlink()
    said = []
    assert resume_path(str(run), tmp_path / "other", said.append) == run / "checkpoint-3"  # 4 is damaged
    assert len(said) == 1 and "checkpoint-4 is damaged (model.pt: 4 bytes, expected" in said[0]


@pytest.mark.parametrize(
    ("resume", "message"),
    [
        ("run/checkpoint-5", r"^No checkpoint run/checkpoint-5; run holds checkpoints, checkpoint-\d, "),
        ("empty", r"^empty is no checkpoint: it is empty, expected model\.pt as in a checkpoint's folder, or last\."),
        ("empty/none", "^No checkpoint empty/none; empty is empty$"),
        ("run/checkpoint-4", r"^run/checkpoint-4 is damaged \(model\.pt: 4 bytes, expected"),
        ("half.ckpt", r"^half\.ckpt is damaged or no checkpoint: it is neither"),
        ("code.ckpt", "^code.ckpt holds more than tensors and plain values, so it is not opened"),
        ("last", r"^No checkpoint nowhere/last\.ckpt; \. holds"),
    ],
)
def test_what_cannot_be_resumed_from_is_told_in_one_line(tmp_path, monkeypatch, resume, message):
    monkeypatch.chdir(tmp_path)
    run_folder(Path("run"))
    Path("empty").mkdir()
    contents = saved(Path("half.ckpt")).read_bytes()
    Path("half.ckpt").write_bytes(contents[: len(contents) // 2])
    torch.save({"state_dict": {}, "extra": Malicious()}, "code.ckpt")
    with pytest.raises(UserError, match=message) as error:
        resume_path(resume, Path("nowhere"), pytest.fail)
    assert "\n" not in str(error.value) and not Path("executed").exists()


# ---- whose


def dit(**changes) -> DiffusionModule:
    return DiffusionModule(*tiny_dit(**changes))


def weights_of(module, **named) -> dict:
    return {"state_dict": module.state_dict(), "optimizer_states": [], "loops": {}, **named}


@pytest.mark.parametrize(
    ("found", "here", "message"),
    [
        (new_module, lambda: VAVAEModule(tiny_vavae()), r"discriminator\.\S+ is \(.*\), expected not there, .* more "),
        (dit, lambda: VAVAEModule(tiny_vavae()), "none of its names is known here: weights to start from are no"),
        (lambda: VAVAEModule(tiny_vavae(num_conditions=4)), lambda: VAVAEModule(tiny_vavae()), "number of people"),
    ],
)
@pytest.mark.parametrize("kind", ["a.ckpt", "folder"])
def test_a_checkpoint_of_another_model_says_what_differs(tmp_path, kind, found, here, message):
    path = write_any_format(weights_of(found()), tmp_path / kind)
    refuses(f"is of another model: .*{message}.* Resume with the settings of that run", check_resumable, path, here())


def test_weights_alone_and_optimisers_of_other_weights_are_refused(tmp_path):
    def state(tensors):
        group = {"lr": 0.1, "params": list(range(len(tensors)))}
        return {"state": {i: {"exp_avg": t} for i, t in enumerate(tensors)}, "param_groups": [group]}

    module, path = dit(), tmp_path / "a.ckpt"
    torch.save({"state_dict": module.state_dict()}, path)
    refuses(r"a\.ckpt has no optimizer_states", check_resumable, path, module)
    trained = list(module.network.parameters())
    torch.save(weights_of(module, optimizer_states=[state(trained)]), path)
    check_resumable(path, module)
    for tensors in (trained[1:], [torch.zeros(77), *trained[1:]]):
        torch.save(weights_of(module, optimizer_states=[state(tensors)]), path)
        refuses(f"optimisers' state is of {len(tensors)} tensors of weights, here", check_resumable, path, module)


@pytest.mark.parametrize("wrap", ["", "module.", "_orig_mod.network."])
def test_a_compiled_network_takes_plain_names_and_the_reverse(tmp_path, wrap):
    """Names are matched by what they are without `_orig_mod.` and `module.`, there and here."""
    here, there = dit(), dit(seed=5)
    here.network["denoiser"] = torch.nn.ModuleDict({"_orig_mod": here.network["denoiser"]})  # as torch.compile names it
    plain = there.network.state_dict()
    torch.save({"model": {wrap + name: tensor for name, tensor in plain.items()}, "epoch": 1}, tmp_path / "a.pth")
    check_resumable(tmp_path / "a.pth", here)
    here.load_state_dict(read_any_format(tmp_path / "a.pth", lambda line: None)["state_dict"])
    loaded = {k.replace("_orig_mod.", ""): v for k, v in here.network.state_dict().items()}
    assert_same(loaded, dict(plain))
    here.load_state_dict({name: torch.zeros_like(t) for name, t in here.state_dict().items()})  # own names as ever
    assert not any(weights.any() for weights in here.parameters())


# ---- the command


@pytest.fixture
def run(here, run_main):
    """Run the command here: its status, the lines it printed, and what it said on stderr."""

    def run(*words) -> tuple[int, list[str], str]:
        status, out, err = run_main(main, *words)
        return status, out.splitlines(), err

    return run


def test_list_is_a_table(run):
    run_folder(Path("run"))
    saved(Path("run/own.ckpt"), 12_345)
    status, lines, _ = run("list", "run")
    assert status == 0 and len(lines) == 10
    table = [line.split() for line in lines]
    assert table[1][:4] == ["own.ckpt", "12,345", "2", "-"] and table[1][-1] == "whole"
    assert ["checkpoints/best-001-0.5000.ckpt", "6", "2", "0.5000"] in [row[:4] for row in table]
    damaged = next(line for line in lines if line.startswith("checkpoint-4"))
    assert "damaged: model.pt: 4 bytes, expected" in damaged


def test_inspect_says_what_is_in_it(run):
    torch.save({**small(), "run": {"versions": {"torch": "2.9"}, "command": ["train.py", "--lr", "1"]}}, "last.ckpt")
    size = f"{Path('last.ckpt').stat().st_size / 1e6:.2f} MB"
    of_network = [f"{part}: 3 weights in 1 tensors, float32" for part in ("network.a", "ema")]
    of_run = ["optimiser 0: 1 tensors, lr 0.1", "versions: lightning -, torch 2.9", "command: train.py --lr 1"]
    settings = ["  betas: [0.9, 0.99]", "  size: (8, 8)", "  name: None"]
    lines = [f"last.ckpt: {size}, whole", "step 7, epoch 2", *of_network, *of_run, *settings]
    assert run("inspect", "last.ckpt") == (0, lines, "")


def test_prune_says_what_goes_and_what_is_freed(run):
    run_folder(Path("run"))
    before = names(Path("run"))
    status, lines, _ = run("prune", "run", "--keep", "2", "--dry_run")
    assert status == 0 and names(Path("run")) == before
    assert [line.split()[2] for line in lines[:-1]] == [f"run/checkpoint-{step}" for step in (4, 2, 1)]
    assert lines[-1].endswith(" MB would be freed by 3 checkpoints")
    _, lines, _ = run("prune", "run", "--keep", "2")
    assert lines[0].startswith("removed: run/checkpoint-4 (") and lines[-1].endswith(" MB freed by 3 checkpoints")
    assert names(Path("run")) == ["checkpoint-3", "checkpoint_epoch_9.pth", "checkpoints"]


def test_convert_there_and_back(run):
    saved(Path("last.ckpt"))
    for source, destination in [("last.ckpt", "folder"), ("folder", "a.pth"), ("a.pth", "back.ckpt")]:
        assert run("convert", source, destination) == (0, [f"written: {destination} (from {source})"], "")
    assert_same(torch.load("back.ckpt", weights_only=True), small())
    status, _, error = run("convert", "last.ckpt", "back.ckpt")
    assert status == 2 and error == "error: back.ckpt exists already: name another place, or remove it\n"
    shutil.copy("last.ckpt", "half.ckpt")
    flipped(Path("half.ckpt"), Path("half.ckpt").read_bytes().index(b"\x00\x00\x80\x3f" * 3))
    status, _, error = run("convert", "half.ckpt", "other")
    assert status == 2 and "half.ckpt is damaged" in error and not Path("other").exists()


def absent_classes() -> dict[str, type]:
    """Classes of a module that is not there any more when their objects are read; omegaconf's have contents."""
    made: dict[str, type] = {}
    for name, base in {
        "Net": "torch.nn.Sequential",
        "Config": "dict",
        "Mode": "enum.Enum",
        "Node": "object",
        "Tensor": "torch.Tensor",
    }.items():
        exec(f"import torch, enum\nclass {name}({base}): {'A = 1' if name == 'Mode' else 'pass'}", made)
        made[name].__module__ = "absent"
    return made


@pytest.mark.parametrize("form", [{}, {"pickle_protocol": 4}, {"_use_new_zipfile_serialization": False}])
@pytest.mark.filterwarnings("ignore:.*source code for container")
def test_the_advised_command_opens_what_is_refused(run, monkeypatch, form):
    absent, weights = absent_classes(), {"w": torch.arange(4.0)}
    around = {"args": Namespace(lr=0.5), "step": np.int64(7), "path": Path("a/b")}
    around |= {"when": datetime(2026, 1, 2), "config": absent["Config"](x=1), "mode": absent["Mode"].A}
    around["c"], around["tensor"] = absent["Node"](), torch.ones(2).as_subclass(absent["Tensor"])
    around["c"].__dict__ = {"_content": {"a": [absent["Node"]()]}, "_metadata": absent["Mode"].A}
    around["c"]._content["a"][0]._val = 1
    layer = torch.nn.Linear(2, 2)
    cases = {"around": {"model": weights, **around}, "arrays": {"model": {"w": np.arange(4.0)}}}
    cases |= {"module": absent["Net"](layer), "inside": {"ema": absent["Net"](layer)}}
    Path("input").mkdir()
    monkeypatch.setitem(sys.modules, "absent", SimpleNamespace(**absent))
    for name, held in cases.items():
        torch.save(held, f"input/{name}.pt", **form)
    torch.save({"model": weights, "code": Malicious()}, "input/code.pt")
    monkeypatch.delitem(sys.modules, "absent")
    made = {}
    for name in (*cases, "code"):
        with pytest.raises(UserError, match="holds more than tensors") as error:
            read_checkpoint(f"input/{name}.pt")
        command = re.search(r"run python -m vavae_tools.checkpoints (.*) and name (.*)", str(error.value))
        assert run(*command[1].split())[0] == 0
        made[name] = read_checkpoint(command[2])
    plain = {
        "args": {"lr": 0.5},
        "c": {"a": [1]},
        "tensor": torch.ones(2),
        "step": 7,
        "path": "a/b",
        "when": "2026-01-02 00:00:00",
    }
    assert_same(made["around"], {"model": weights, **plain, "config": {"x": 1}, "mode": None})
    assert_same(made["arrays"], {"model": {"w": torch.arange(4.0, dtype=torch.float64)}})
    of_layer = {f"0.{name}": tensor for name, tensor in layer.state_dict().items()}
    assert_same(made["module"], of_layer)
    assert_same(made["inside"], {"ema": of_layer})
    assert names(Path("input")) == sorted(f"{name}.pt" for name in made) and not Path("executed").exists()


def test_of_a_checkpoints_folder_all_files_are_opened_on_trust(run):
    write_folder(small(), "folder")
    torch.save({"state": {}, "args": Namespace(a=1)}, "folder/optimizer.pt")
    refuses(r"vavae_tools\.checkpoints trust folder folder\.plain and name", read_saved, "folder/optimizer.pt")
    assert run("trust", "folder", "folder.plain")[1] == ["written: folder.plain (from folder)"]
    assert read_saved("folder.plain/optimizer.pt") == {"state": {}, "args": {"a": 1}}
    assert names(Path("folder.plain")) == names(Path("folder"))
    before = names(Path())
    Path("folder/scheduler.pt").write_bytes(b"damaged")
    assert run("trust", "folder", "other.plain")[0] == 2 and names(Path()) == before


def test_verify_ends_with_a_status(run):
    run_folder(Path("run"))
    status, lines, error = run("verify", "run")
    assert status == 2 and len(lines) == 8 and sum(line.endswith(": whole") for line in lines) == 7
    assert error.startswith("error: 1 of 8 in run damaged: checkpoint-4. Remove them; ") and error.count("\n") == 1
    shutil.rmtree("run/checkpoint-4")
    assert run("verify", "run")[::2] == (0, "")
    assert run("verify", "run/checkpoint-1") == (0, ["run/checkpoint-1: whole"], "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("list nowhere", "No checkpoints in nowhere: it is not there; expected a run's folder with last.ckpt"),
        ("inspect .", ". is no checkpoint: it is empty, expected model.pt"),
        ("convert nowhere a.ckpt", "No checkpoint nowhere"),
    ],
)
def test_bad_input_is_answered_by_one_line(run, line, message):
    status, _, error = run(*line.split())
    assert status == 2 and error.startswith("error: ") and error.count("\n") == 1 and message in error
