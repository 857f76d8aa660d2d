"""The panel of notebook 04: its widgets, driven as a browser drives them, and what it leaves."""

import os
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import nbformat
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIZE, contents, tiny_pipeline

import vavae_tools as vt
from vavae_tools.evaluation.panel import SamplingPanel


@pytest.fixture
def panel(split_dir, tmp_path):
    return SamplingPanel(tiny_pipeline(), split_dir, tmp_path / "kept", number=3, num_steps=2, seed=5)


def shown(panel, row: int = 0) -> list[bytes]:
    images = [[part for part in column.children if hasattr(part, "format")] for column in panel.grid.children]
    return [column[row].value for column in images]


def test_the_line_of_code_makes_the_same_images(panel, tmp_path, monkeypatch):
    panel.person.value, panel.steps.value, panel.scale.value, panel.solver.value = "ID_3", 3, 2.5, "heun"
    assert "[&#x27;ID_3&#x27;] * 3" in panel.code.value
    before = shown(panel)
    panel.make_button.click()
    assert shown(panel) != before and type(panel.pipe.scheduler).__name__ == "FlowMatchEulerDiscreteScheduler"
    kept = panel.save()
    monkeypatch.chdir(tmp_path)
    exec(panel.line, {"pipe": tiny_pipeline(), "vt": vt})
    made = [path.read_bytes() for path in sorted((tmp_path / "samples/ID_3").iterdir())]
    assert made == [path.read_bytes() for path in kept] and len(made) == 3


def test_what_is_kept_is_saved_and_what_is_rejected_is_not(panel, tmp_path):
    panel.marks[1].value = False
    assert [mark.description for mark in panel.marks] == ["keep", "reject", "keep"]
    panel.save_button.click()
    names = [f"ID_1/seed5_0000{number}_own2_scale1.25.png" for number in range(3)]
    first = contents(tmp_path / "kept")
    assert sorted(first) == [names[0], names[2]] and "2 of 3 images kept in" in panel.message.value
    panel.steps.value = 4  # other images, beside which those before stay
    panel.make_button.click()
    panel.save_button.click()
    both = contents(tmp_path / "kept")
    assert len(both) == 5 and first.items() <= both.items()
    panel.marks[2].value = False
    panel.save_button.click()
    assert contents(tmp_path / "kept").keys() == both.keys() - {names[2].replace("own2", "own4")}
    assert vt.ImageFolder(tmp_path / "kept", SIZE).names == sorted(both.keys() - {names[2].replace("own2", "own4")})


def test_the_nearest_real_image_is_the_persons_own(panel, split_dir):
    panel.nearest.value = True
    real = {}
    for path in sorted((split_dir / "train/ID_1").iterdir()):
        real[path.name] = np.asarray(Image.open(path).convert("RGB")).astype(float)
    for path, column in zip(panel._files, panel.grid.children, strict=True):
        made = np.asarray(Image.open(path)).astype(float)
        distances = {name: np.sqrt(((image - made) ** 2).mean()) / 127.5 for name, image in real.items()}
        name = min(distances, key=distances.get)
        assert column.children[-1].value == f"{name}\n{distances[name]:.2f}"
    panel.nearest.value = False
    assert all(len(column.children) == 2 for column in panel.grid.children)


def test_what_is_wrong_is_said_beside_the_widgets(panel, monkeypatch):
    before = shown(panel)
    monkeypatch.setattr(panel.pipe.denoiser, "forward", lambda x, *given: torch.full_like(x, torch.nan))
    panel.make_button.click()
    assert re.search("error: 3 of 3 latents are not finite", panel.message.value)
    assert shown(panel) == before and not panel.make_button.disabled
    panel.save_button.click()  # of what is shown
    assert "3 of 3 images kept" in panel.message.value
    panel.pipe.register_to_config(people={"ID_1": 0, "nobody": 1, "ID_3": 2})
    monkeypatch.undo()
    panel.person.options = list(panel.pipe.people)
    panel.person.value = "nobody"
    panel.make_button.click()
    panel.nearest.value = True
    assert "No training images of nobody in" in panel.message.value
    assert shown(panel) != before  # the images are there all the same


# ---- in a browser
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
NOTEBOOK = """import sys
sys.path.insert(0, {tests!r})
import vavae_tools as vt
from tiny import tiny_pipeline
vt.SamplingPanel(tiny_pipeline(), None, "kept", number=3, num_steps=2)"""


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_person_keeps_and_rejects_in_a_browser(here):
    browsers = pytest.importorskip("playwright.sync_api")
    cell = nbformat.v4.new_code_cell(NOTEBOOK.format(tests=str(Path(__file__).parent)))
    python3 = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=python3), here / "panel.ipynb")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}", "--IdentityProvider.token=a"]
    own = {**os.environ, "HOME": str(here), "JUPYTER_CONFIG_DIR": str(here / "config")}
    server = subprocess.Popen([sys.executable, "-m", "jupyterlab", *words], env=own, stderr=subprocess.DEVNULL)
    try:
        with browsers.sync_playwright() as play:
            page = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"]).new_page()
            for _ in range(120):  # until the server answers
                with suppress(browsers.Error):
                    page.goto(f"http://127.0.0.1:{port}/lab/tree/panel.ipynb?token=a")
                    break
                time.sleep(0.5)
            page.locator(".jp-CodeCell .jp-Editor").first.click(timeout=60_000)
            page.keyboard.press("Shift+Enter")
            page.locator("button:has-text('keep')").nth(1).click(timeout=120_000)
            page.locator("button:has-text('reject')").wait_for()
            page.locator("button:has-text('Save the kept')").click()
            page.locator("text=2 of 3 images kept").wait_for()
            page.keyboard.press("Control+s")
            page.wait_for_function("() => !document.querySelector('.jp-mod-dirty')")
    finally:
        server.terminate()
        server.wait()
    assert sorted(contents(here / "kept")) == [f"ID_1/seed0_0000{number}_own2_scale1.25.png" for number in (0, 2)]
    assert any("image/png" in output.get("data", {}) for output in nbformat.read("panel.ipynb", 4).cells[0].outputs)
