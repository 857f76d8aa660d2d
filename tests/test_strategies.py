"""FSDP on two processes of this CPU trains what DDP and one process do, and its checkpoints are everybody's."""

import json
from pathlib import Path

import numpy as np
import pytest
from alike import assert_weights_alike
from forked import torchrun
from PIL import Image
from sharded_training import train
from test_training import KEPT
from tiny import assert_same, last

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
SCRIPT = str(Path(__file__).with_name("sharded_training.py"))


@pytest.fixture(scope="module")
def runs(tmp_path_factory, latents_dir) -> tuple[Path, str]:
    """`cut` never stopped, `stopped` by a signal to the second process and resumed, `again` resumed from `cut`.

    All of them validate, save and make previews on the way, which fail in `failing`.
    """
    folder = tmp_path_factory.mktemp("sharded")
    fsdp = {"strategy": "fsdp", "deterministic": True}

    def job(run: str, **options) -> dict:
        return {"run": str(folder / run), "latents": str(latents_dir), **options}

    jobs = (
        job("cut", saving={"save_every_n_steps": 3}, **fsdp),
        job("stopped", stop=[2, 1], **fsdp),
        job("stopped", resume="last", **fsdp),
        job("again", resume=str(folder / "cut" / "checkpoint-3"), checkpointing=True, **fsdp),
        job("failing", failing=True, **fsdp),
        job("ddp", strategy="ddp"),
    )
    done = torchrun(SCRIPT, json.dumps(jobs))
    assert not done.returncode, done.stderr
    return folder, done.stdout


def test_a_preview_that_fails_in_one_process_alone_ends_them(latents_dir, tmp_path):
    one = {"run": str(tmp_path), "latents": str(latents_dir), "strategy": "fsdp", "failing": "1"}
    done = torchrun(SCRIPT, json.dumps([one]))
    assert done.returncode and "A preview failed in process 2 alone (MemoryError: too little)" in done.stderr


def test_fsdp_resumes_bit_by_bit(runs):
    """After a signal to one process, from a folder, with activation checkpointing or without, after failed previews."""
    folder, said = runs
    stopped = [line for line in said.splitlines() if line.startswith("Stopped after step")]
    assert len(set(stopped)) == 1 and int(stopped[0].split()[3].rstrip(";")) < 8
    for run in ("stopped", "again", "failing"):
        for part in KEPT:
            assert_same(last(folder / run)[part], last(folder / "cut")[part], part)


def test_every_strategy_and_one_process_train_and_show_the_same(runs, latents_dir, tmp_path):
    folder, said = runs
    assert said.count("preview left out") == said.count("(TypeError: ") == 3  # those of `failing`
    wanted, shown = last(folder / "cut"), images(folder / "cut")
    assert list(wanted["optimizer_states"][0]["state"]) == list(range(len(wanted["optimizer_states"][0]["state"])))
    train(str(tmp_path / "one"), str(latents_dir), str(folder / "cut" / "checkpoint-3"), batch_size=8)
    for run in (folder / "ddp", tmp_path / "one"):
        assert_weights_alike(last(run)["state_dict"], wanted["state_dict"])
        found = images(run)
        assert max(found) == 8
        assert all(np.abs(image - shown[step]).max() <= 1 for step, image in found.items())


def images(run: Path) -> dict[int, np.ndarray]:
    """Previews by their step."""
    found = sorted((run / "samples").glob("samples-*.png"))
    return {int(path.stem.rpartition("-")[2]): np.asarray(Image.open(path), int) for path in found}
