"""FSDP on two processes of this CPU: what it trains, and checkpoints that no process holds whole."""

import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from alike import assert_weights_alike
from forked import python
from PIL import Image
from sharded_training import train
from test_training import KEPT
from tiny import assert_same

from vavae_tools.checkpoints.__main__ import consolidate_checkpoint, verify_checkpoints
from vavae_tools.checkpoints.formats import look_at, read_any, whole
from vavae_tools.checkpoints.resuming import resume_path
from vavae_tools.runtime.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
HERE = Path(__file__).parent
CUT = {"strategy": "fsdp", "sharded_checkpoints": True, "deterministic": True}


def on_two_processes(*jobs: dict) -> subprocess.CompletedProcess:
    command = [python(), "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    path = os.pathsep.join([str(HERE), str(HERE.parent)])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command += [str(HERE / "sharded_training.py"), json.dumps(jobs)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, latents_dir) -> tuple[Path, str]:
    """`cut` never stopped, `stopped` by a signal to the second process and resumed, `whole` resumed from `cut`.

    All of them validate, save and make previews on the way.
    """
    folder = tmp_path_factory.mktemp("sharded")

    def job(run: str, **options) -> dict:
        return {"run": str(folder / run), "latents": str(latents_dir), **options}

    done = on_two_processes(
        job("cut", saving={"save_every_n_steps": 3}, **CUT),
        job("stopped", at=["SIGTERM", 2, 1], **CUT),
        job("stopped", resume="last", **CUT),
        job("whole", resume=str(folder / "cut" / "checkpoint-3"), checkpointing=True, strategy="fsdp"),
        job("ddp", strategy="ddp"),
        job("unused", strategy="ddp_find_unused_parameters_true"),
        job("cut_again", resume=str(folder / "whole" / "checkpoints"), steps=9, **CUT),
        job("full", at=["a full disk", 3, 1], saving={"save_every_n_steps": 2}, **CUT),
    )
    assert done.returncode and "[rank0]: Traceback" not in done.stderr, "the last of them alone fails: a full disk"
    return folder, done.stdout + done.stderr


def last(run: Path) -> dict:
    return read_any(run / "checkpoints" / "last.ckpt", print)


def test_a_signal_to_one_process_stops_all_and_it_goes_on_bit_by_bit(runs):
    folder, said = runs
    stopped = [line for line in said.splitlines() if line.startswith("Stopped after step")]
    assert len(set(stopped)) == 1 and int(stopped[0].split()[3].rstrip(";")) < 8
    for part in KEPT:
        assert_same(last(folder / "stopped")[part], last(folder / "cut")[part], part)


def test_a_folder_of_parts_holds_what_a_file_would(runs):
    """Gathered or in parts, with activation checkpointing or without: the same weights, average and moments."""
    folder, _ = runs
    assert (folder / "cut" / "checkpoints" / "last.ckpt").is_dir()
    assert (folder / "whole" / "checkpoints" / "last.ckpt").is_file()
    for part in KEPT:
        assert_same(last(folder / "whole")[part], last(folder / "cut")[part], part)
    assert last(folder / "cut_again")["global_step"] == 9


def test_every_strategy_trains_and_shows_the_same(runs):
    folder, said = runs
    assert "preview left out" not in said
    wanted, shown = last(folder / "cut")["state_dict"], pictures(folder / "cut")
    for run in ("whole", "ddp", "unused"):
        assert_weights_alike(last(folder / run)["state_dict"], wanted)
        found = pictures(folder / run)
        assert max(found) == 8 and len(found) > 1
        for step, picture in found.items():
            assert np.abs(picture - shown[step]).max() <= 1, (run, step)


def pictures(run: Path) -> dict[int, np.ndarray]:
    """Previews by their step."""
    found = sorted((run / "samples").glob("*.png"))
    return {int(path.stem.rpartition("-")[2]): np.asarray(Image.open(path), int) for path in found}


def test_no_process_writes_what_belongs_to_another(runs):
    parts = [runs[0] / "cut" / "checkpoint-6" / f"part-{number}-of-2.pt" for number in (1, 2)]
    sizes = [sum(rows.numel() for rows in torch.load(part, weights_only=True).values()) for part in parts]
    found = read_any(parts[0].parent, print)
    moments = [v for state in found["optimizer_states"][0]["state"].values() for n, v in state.items() if n != "step"]
    cut = [*(v for n, v in found["state_dict"].items() if v.is_floating_point()), *moments]
    assert sum(sizes) == sum(tensor.numel() for tensor in cut)
    assert max(sizes) < 0.6 * sum(sizes)


def test_the_consolidated_file_goes_on_without_fsdp(runs, latents_dir, tmp_path):
    folder, said = runs[0], []
    file = consolidate_checkpoint(folder / "cut" / "checkpoint-3", tmp_path / "3.ckpt", said.append)
    for run, resume in (("from_3", str(file)), ("from_parts", str(folder / "cut" / "checkpoint-3"))):
        train(str(tmp_path / run), str(latents_dir), resume, batch_size=8)
        assert_weights_alike(last(tmp_path / run)["state_dict"], last(folder / "cut")["state_dict"])
    file = consolidate_checkpoint(folder / "cut" / "checkpoints" / "last.ckpt", say=said.append)
    assert file.name == "last-whole.ckpt" and said[-1].startswith(f"written: {file}")
    loaded = torch.load(file, weights_only=True)
    assert list(loaded["optimizer_states"][0]["state"]) == list(range(len(loaded["optimizer_states"][0]["state"])))
    with pytest.raises(UserError, match=r"last-whole\.ckpt exists already"):
        consolidate_checkpoint(folder / "cut" / "checkpoints" / "last.ckpt")
    file.unlink()
    with pytest.raises(UserError, match="is whole already: any strategy goes on from it"):
        consolidate_checkpoint(folder / "whole" / "checkpoints" / "last.ckpt")


def test_a_full_disk_of_one_process_is_said_by_all_and_leaves_the_former(runs):
    folder, said = runs
    assert said.count("error: ") == 2 and "checkpoint-4 could not be written" in said and "No space left" in said
    left = sorted(path.name for path in (folder / "full").iterdir() if path.name.startswith(("checkpoint-", ".")))
    assert left[-1] == "checkpoint-2" and whole(folder / "full" / "checkpoint-2") is None


def test_a_kill_as_a_folder_gets_its_name_leaves_the_former(tmp_path, latents_dir):
    run = tmp_path / "killed"
    job = {"run": str(run), "latents": str(latents_dir), "saving": {"save_every_minutes": 0.0}, **CUT}
    assert on_two_processes({**job, "at": ["killed as a folder gets its name", 6, 0]}).returncode
    path = resume_path("last", run)
    assert path == run / "checkpoints" / "last.ckpt" and look_at(path).step < 8
    assert look_at(run / "checkpoints" / "previous.ckpt").step < look_at(path).step
    verify_checkpoints(run, lambda line: None)


def test_a_damaged_part_is_found_and_the_former_taken(runs, tmp_path):
    import shutil

    run, said = tmp_path / "run", []
    shutil.copytree(runs[0] / "cut", run)
    part = run / "checkpoints" / "last.ckpt" / "part-2-of-2.pt"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert resume_path("last", run, said.append) == run / "checkpoint-6" and "part-2-of-2.pt: other contents" in said[0]
    part.unlink()
    with pytest.raises(UserError, match=r"last\.ckpt is damaged \(part-2-of-2\.pt: missing\)"):
        read_any(part.parent, print)
