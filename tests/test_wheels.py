"""The dataset of wheels: what pip is asked for, with an index of empty packages in place of the real one."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from vavae_tools.kaggle import wheels
from vavae_tools.kaggle.wheels import IMAGE, lacking, write_empty_wheel, write_wheels
from vavae_tools.kaggle_session import main


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """All that is there to download; with torch, which nothing may take, and without what torch needs."""
    folder = tmp_path / "index"
    folder.mkdir()
    needs = {
        "lightning": ["torch>=2", "pytorch-lightning", "numpy"],
        "torch": ["nvidia-cudnn"],
        "kaggle": ["kagglesdk"],
    }
    names = "lightning safetensors einops torchmetrics tensorboard cloudpickle filelock kaggle pytorch-lightning"
    for name, version in [*dict.fromkeys([*names.split(), "kagglesdk"], "99.0").items(), *IMAGE.items()]:
        write_empty_wheel(folder, name, version, *needs.get(name, []))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.chdir(tmp_path)
    return folder


def test_wheels_of_what_the_image_lacks_and_the_package(index, tmp_path, run_main):
    for _ in range(2):  # and again, over what it wrote
        status, out, err = run_main(main, "wheels", "--dataset", "me/vavae-tools")
        assert status == 0, err
    folder = tmp_path / "outputs/wheels"
    assert "10 wheels for Python 3.12" in out and "next: kaggle datasets create -p outputs/wheels -r zip" in out
    found = {path.name.partition("-")[0] for path in folder.glob("*.whl")}
    assert {"lightning", "pytorch_lightning", "kaggle", "kagglesdk"} <= found and not found & {*IMAGE, "nvidia_cudnn"}
    metadata = json.loads((folder / "dataset-metadata.json").read_text())
    assert metadata == {"title": "vavae-tools", "id": "me/vavae-tools", "licenses": [{"name": "other"}]}
    assert (folder / "repository/vavae_tools/start.py").is_file()
    assert (folder / "repository/requirements.txt").is_file() and not list(folder.rglob("__pycache__"))


def test_pip_is_asked_for_the_images_python_and_platform(monkeypatch, tmp_path):
    asked, done = [], SimpleNamespace(returncode=0, stderr="")
    monkeypatch.setattr(wheels.subprocess, "run", lambda command, **options: asked.append(command) or done)
    write_wheels(tmp_path / "wheels", "me/vavae-tools", "3.13")
    (command,) = asked
    assert command[1:4] == ["-m", "pip", "download"] and "--python-version=3.13" in command
    assert "--only-binary=:all:" in command and "--platform=manylinux_2_28_x86_64" in command
    assert "lightning>=2.6" in command
    assert not any(word.startswith(("torch>", "numpy", "diffusers")) for word in command)


def test_what_the_image_lacks(tmp_path):
    file = tmp_path / "requirements.txt"
    file.write_text("torch>=2.6  # every model\n\n# words\nLightning>=2.6\nscipy\ntorchmetrics\n")
    assert lacking(file) == ["Lightning>=2.6", "torchmetrics"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--dataset is missing: the owner/name that it is to have"),
        (["--dataset", "run"], "--dataset run: expected owner/name"),
        (["--dataset", "me/vavae-tools", "--python", "3"], "--python 3: expected the image's version, such as 3.12"),
        (["--dataset", "me/vavae-tools", "--output_dir", "index"], r"index holds .*: name another --output_dir"),
        (["--dataset", "me/vavae-tools", "--output_dir", "mine"], r"mine holds a\.jpg: name another --output_dir"),
        (["--dataset", "me/vavae-tools"], "No wheels of lightning>=2.6, .*No matching distribution.*needs pip"),
    ],
)
def test_what_cannot_be_is_one_line_and_somebodys_dataset_stays(index, tmp_path, fault, words, said):
    next(index.glob("kagglesdk*")).unlink()
    (tmp_path / "mine").mkdir()
    for name in ("dataset-metadata.json", "a.jpg"):
        (tmp_path / "mine" / name).write_text("mine")
    assert re.search(said, fault(main, "wheels", *words)) and not Path("outputs").exists()
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["a.jpg", "dataset-metadata.json"]
