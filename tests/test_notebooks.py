"""The notebooks, top to bottom in a kernel, each from the files of the one before; only the lengths are cut."""

import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.usefixtures("forked")
NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))

SHORTER = {
    "vt.find_preset(": "(lambda *given: __import__('dataclasses').replace(vt.find_preset(*given), "
    "vavae_epochs=1, dit_steps=4, samples_per_person=2, previews=1))(",
    "vt.fit_schedule(pipeline_dir,": "vt.fit_schedule(pipeline_dir, (1, 10), images=4,",
    '["experiment=text_dummy"]': '["experiment=text_dummy", "data.num_samples=256", "model.hidden_size=48", '
    '"sampling.num_steps=2"]',
    '["experiment=token_dummy"]': '["experiment=token_dummy", "training.max_steps=4", "model.hidden_size=16", '
    '"model.num_heads=2"]',
    "vt.images_or_walkers(place)": "vt.write_gait_dataset(place.work / 'gait', people=2, images=10, size=64)",
    '"count": 1024': '"count": 64',
    "(800, 2000)": "(4, 4)",
    "else 2000": "else 4",
    "is_right=is_right": "is_right=is_right, num_samples=4, num_inference_steps=2",
    '"num_samples": 4000': '"num_samples": 64',
    "[:64]": "[:4]",
    "seeds=3": "seeds=1, steps=2",
}


def shortened(path: Path, **knobs: str) -> nbformat.NotebookNode:
    """The notebook with fewer people, images, epochs and steps: its knobs are turned, nothing else."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for long, short in (SHORTER | knobs).items():
                cell.source = cell.source.replace(long, short)
    return notebook


def run(path: Path, work: Path, monkeypatch: pytest.MonkeyPatch, **knobs: str) -> nbformat.NotebookNode:
    monkeypatch.setenv("VAVAE_WORK", str(work))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    client = NotebookClient(shortened(path, **knobs), timeout=300, resources={"metadata": {"path": str(path.parent)}})
    return client.execute()


def has_image(notebook: nbformat.NotebookNode) -> bool:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return any("image/png" in output.get("data", {}) for output in outputs)


def test_five_notebooks_hand_over_to_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a work folder of its own, with the outputs of those before attached, as on Kaggle."""
    attached = tmp_path / "input" / "notebooks"
    attached.mkdir(parents=True)
    monkeypatch.setenv("VAVAE_INPUT", str(attached.parent))
    for path in NOTEBOOKS[1:6]:
        before, work = written_in(attached), tmp_path / "work" / path.stem
        notebook = run(path, work, monkeypatch)
        assert has_image(notebook), f"{path.name} shows no image"
        if path.stem == "04_sampling":  # beside the panel's widgets, which a saved notebook does not show
            assert "image/png" in notebook.cells[-2].outputs[-1].data
        assert written_in(attached) == before
        shutil.move(work, attached / path.stem[3:])

    assert json.loads((attached / "data_split/data_split/split_info.json").read_text())["totals"]["val"] == 4
    assert [path.parts[-4] for path in attached.rglob("last.ckpt")] == ["vavae_fine_tuning", "dit_training"]
    assert len(list((attached / "sampling/samples").glob("ID_*/*.png"))) == 4
    evaluation = json.loads((attached / "evaluation/evaluation/evaluation.json").read_text())
    assert evaluation["total"]["generated"] == 4
    gain = json.loads((attached / "evaluation/evaluation/gain.json").read_text())
    assert [score["images"] for score in gain["mixtures"]] == [16, 16, 20, 20, 4]


def test_the_whole_path_in_versions_ends_as_in_one(gait: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time is over in the VA-VAE, then in the DiT; each version has the output of the one before, and no other."""
    short = {"**changes": "**{'vavae_epochs': 2}"}
    at_vavae, at_dit = (
        {"max_time = None": 'max_time = "0:00:30"'},
        {"previews=preset": 'max_time="0:00:30", previews=preset'},
    )
    monkeypatch.setenv("VAVAE_PICTURES", str(gait))
    said = {}
    for name, knobs in {"first": at_vavae, "second": at_dit, "third": {}, "whole": {}}.items():
        attached = tmp_path / {"second": "first", "third": "second"}.get(name, "none")
        monkeypatch.setenv("VAVAE_INPUT", str(attached))
        before = written_in(attached)
        notebook = run(NOTEBOOKS[0], tmp_path / name, monkeypatch, **short, **knobs)
        said[name] = "".join(output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", []))
        assert written_in(attached) == before

    assert "stopped after step 1;" in said["first"] and "vavae has not ended: save another version" in said["first"]
    assert said["first"].count("skipped, since vavae has not ended") == 4
    assert f"resuming {tmp_path / 'first/vavae'} at step 1" in said["second"]
    assert said["second"].count("skipped, since dit has not ended") == 2
    assert "vavae: " in said["third"] and " is done" in said["third"] and "skipped" not in said["third"]
    assert has_image(notebook) and "evaluation: ended after" in said["third"]
    for pattern in ("vavae/vavae/*.safetensors", "dit/pipeline/*/*.safetensors", "samples/*/*.png"):
        made = {path.relative_to(tmp_path / "whole"): path.read_bytes() for path in (tmp_path / "whole").glob(pattern)}
        assert made and all((tmp_path / "third" / path).read_bytes() == content for path, content in made.items())


def written_in(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("stem", "written"),
    [
        ("08_rae_dit", ["rae/decoder/rae/config.json", "rae/dit/pipeline/model_index.json"]),
        ("06_text_to_image", ["text/pipeline/model_index.json"]),
        ("07_token_images", ["tokens/evaluation/evaluation.json"]),
    ],
)
def test_a_notebook_needs_nothing(tmp_path, monkeypatch, stem, written):
    (path,) = (path for path in NOTEBOOKS if path.stem == stem)
    notebook = run(path, tmp_path, monkeypatch)
    assert has_image(notebook) and all((tmp_path / name).is_file() for name in written)
    if stem != "08_rae_dit":  # its last cell shows the bars, or the curve
        assert "image/png" in notebook.cells[-2].outputs[-1].data


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_kept_short_and_without_outputs(path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]

    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert max(len(cell.source.splitlines()) for cell in cells) <= 14
    assert not any(re.search(r"^\s*(def|class|for|while|if) ", cell.source, re.M) for cell in cells), "logic in a cell"
    assert "%run" in cells[0].source and max(map(len, cells[0].source.splitlines())) < 112
