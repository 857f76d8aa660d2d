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
    "vt.find_preset(split)": "__import__('dataclasses').replace(vt.find_preset(split), "
    "vavae_epochs=1, dit_steps=4, samples_per_person=2, num_steps=2, previews=1)",
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
}


def shortened(path: Path) -> nbformat.NotebookNode:
    """The notebook with fewer people, images, epochs and steps: its knobs are turned, nothing else."""
    notebook = nbformat.read(path, as_version=4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            for long, short in SHORTER.items():
                cell.source = cell.source.replace(long, short)
    return notebook


def run(path: Path, work: Path, monkeypatch: pytest.MonkeyPatch) -> nbformat.NotebookNode:
    monkeypatch.setenv("VAVAE_WORK", str(work))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    client = NotebookClient(shortened(path), timeout=300, resources={"metadata": {"path": str(path.parent)}})
    return client.execute()


def has_image(notebook: nbformat.NotebookNode) -> bool:
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return any("image/png" in output.get("data", {}) for output in outputs)


def test_five_notebooks_hand_over_to_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each in a work folder of its own, with the outputs of those before attached, as on Kaggle."""
    attached = tmp_path / "input" / "notebooks"
    attached.mkdir(parents=True)
    monkeypatch.setenv("VAVAE_INPUT", str(attached.parent))
    for path in NOTEBOOKS[:5]:
        before, work = written_in(attached), tmp_path / "work" / path.stem
        assert has_image(run(path, work, monkeypatch)), f"{path.name} shows no image"
        assert written_in(attached) == before
        shutil.move(work, attached / path.stem[3:])

    assert json.loads((attached / "data_split/data_split/split_info.json").read_text())["totals"]["val"] == 4
    assert [path.parts[-4] for path in attached.rglob("last.ckpt")] == ["vavae_fine_tuning", "dit_training"]
    assert len(list((attached / "sampling/samples").glob("ID_*/*.png"))) == 4
    evaluation = json.loads((attached / "evaluation/evaluation/evaluation.json").read_text())
    assert evaluation["total"]["generated"] == 4


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
