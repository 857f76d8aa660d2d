"""What commit b40a19a wrote is read and gone on with: runs, checkpoints, pipelines, latents, texts.

`benchmarks/old_runs.py` says how tests/fixtures/old_runs was made. It stays as it is.
"""

import gc
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import vavae_tools as vt
from benchmarks import old_runs
from benchmarks.old_runs import RUNS, SAMPLES, SAVED, STEPS, STOPPED, end_of

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # Lightning's, on folders that are not empty
    pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning"),  # a command is run again here
]

KEPT = Path(__file__).parent / "fixtures" / "old_runs"
EXPECTED = json.loads((KEPT / "expected.json").read_text(encoding="utf-8"))
NEAR = 1e-4
"""Relative; other instructions, libraries and numbers of threads make differences up to 2e-6."""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """The images and the split of that day, the same to the byte. Do not write into it."""
    folder = tmp_path_factory.mktemp("old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", sys.argv)
        old_runs.write_data(folder)
    yield folder
    gc.unfreeze()


@pytest.fixture
def run(data, tmp_path, monkeypatch, run_main):
    """Run a command where everything of that day is: what it said."""
    for folder in (data, KEPT):
        shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("VAVAE_WORK", raising=False)
    gc.freeze()  # each training collects garbage several times, which takes a while beside all that is imported

    def run(*words) -> str:
        status, said, err = run_main(lambda: old_runs.run(list(map(str, words))))
        assert status == 0, err
        return said

    return run


def assert_alike(made: Path, kept: Path) -> None:
    """The same images, but for two levels of 255."""
    names = sorted(path.relative_to(kept) for path in kept.rglob("*.png"))
    assert names and names == sorted(path.relative_to(made) for path in made.rglob("*.png"))
    for name in names:
        a, b = (np.asarray(Image.open(folder / name), dtype=int) for folder in (made, kept))
        assert a.shape == b.shape and abs(a - b).max() <= 2, name


def stored() -> dict[Path, tuple[int, bytes]]:
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in Path("latents").rglob("*.*")}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_was_stopped_goes_on(run, data, name):
    """From the middle of an epoch to the end that it would have had, without encoding anything again."""
    folder, before = Path(name), stored()
    if RUNS[name][0] == "train":  # the newest run of its experiment, where runs without --output_dir are
        folder = Path("logs/runs/2025-11-30/12-00-00")
        shutil.copytree(name, folder)
        said = run(*RUNS[name], "ckpt_path=last")
    else:
        said = run(*RUNS[name], "--output_dir", name, "--resume", "last")
        # the next of them finds it there, as a session after this one would, and need not train it
        shutil.copytree(folder / "classifier", data / "vavae_full" / "classifier", dirs_exist_ok=True)
    assert f"resuming after step {STOPPED} of {STEPS}" in said
    assert end_of(folder, KEPT / name / "checkpoints" / "last.ckpt") == pytest.approx(EXPECTED[name], rel=NEAR)
    assert stored() == before
    if name in SAMPLES:
        run("sample", "--checkpoint", folder / "pipeline", *SAMPLES[name], "--output_dir", "made")
        assert_alike(Path("made"), KEPT / "samples" / name / "pipeline")


@pytest.mark.parametrize("path", old_runs.FOLDERS)
def test_folders_and_single_files_are_gone_on_with(run, path):
    name = path.split("/")[0]
    said = run(*RUNS[name], "--output_dir", "again", "--resume", path)
    assert f"resuming after step {SAVED} of {STEPS}" in said
    found = end_of(Path("again"), KEPT / name / "checkpoints" / "last.ckpt")
    assert found == pytest.approx(EXPECTED[name], rel=NEAR)


def test_checkpoints_are_whole_and_become_others(run):
    for name in RUNS:
        assert "damaged" not in run("checkpoints", "verify", name)
    run("checkpoints", "convert", old_runs.FOLDERS[0], "one.ckpt")
    assert f"\nstep {SAVED}, epoch " in run("checkpoints", "inspect", "one.ckpt")


@pytest.mark.parametrize("source", ["pipeline", "checkpoints/last.ckpt"])
@pytest.mark.parametrize("name", SAMPLES)
def test_samples_are_what_they_were(run, name, source):
    run("sample", "--checkpoint", f"{name}/{source}", *SAMPLES[name], "--output_dir", "made")
    assert_alike(Path("made"), KEPT / "samples" / name / Path(source).name)


def test_pipelines_are_loaded_from_python():
    for name in ("vavae_dit", "rae_dit"):
        pipe = vt.load_pipeline(KEPT / name / "pipeline")
        assert len(pipe(labels=["ID_3", 0], num_inference_steps=1, guidance_scale=1.25).images) == 2
    pipe = vt.load_text_pipeline(KEPT / "text_to_image" / "pipeline")
    assert len(pipe("a red 1", num_inference_steps=1).images) == 1
    pipe = vt.load_token_pipeline(KEPT / "token_images" / "pipeline")
    assert len(pipe(num_samples=2, num_inference_steps=1).texts) == 2
