"""The one line that gets a notebook going: what it would ask pip for, and what it says; pip itself is a fake."""

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from vavae_tools import start
from vavae_tools.start import missing_requirements

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(monkeypatch):
    """What is installed: a dict to fill."""
    versions = {"torch": "2.1.0", "numpy": "1.20.0", "tqdm": "4.66.0", "diffusers": "0.30.0", "packaging": "24.0"}

    def version(name):
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    return versions


@pytest.fixture
def pip(monkeypatch):
    """Calls of pip, which fails once `pip.fails` is set."""
    fake = SimpleNamespace(calls=[], constraints=[], fails=False)

    def run(command, **options):
        fake.calls.append(command)
        fake.constraints.append(Path(command[command.index("--constraint") + 1]).read_text().splitlines())
        return SimpleNamespace(returncode=int(fake.fails), stderr="WARNING: retrying\nERROR: No matching distribution")

    monkeypatch.setattr(subprocess, "run", run)
    return fake


@pytest.fixture
def repository(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("PYTHONPATH", "/already/there")
    (tmp_path / "repository").mkdir()
    requirements = "torch>=2.6  # every model\n\n# comment\ntqdm>=4.66\ndiffusers>=0.33\nlightning[extra]>=2.5\n"
    (tmp_path / "repository" / "requirements.txt").write_text(requirements)
    return tmp_path / "repository"


def test_missing_and_old_packages_are_found(installed):
    lines = ["tqdm>=4.66 # bars", "tqdm>=4.67", "diffusers>=0.30,<1", "lightning[extra]>=2.5", "", "  # only words"]
    assert missing_requirements(lines) == ["tqdm>=4.67", "lightning[extra]>=2.5"]
    assert missing_requirements(["torch>=2.6", "numpy>=1.26", "diffusers>=0.33"]) == ["diffusers>=0.33"]
    installed["tqdm"] = "5.0.0.dev3"  # a build of the image's own counts as what it precedes
    assert missing_requirements(["tqdm>=4.66"]) == []


@pytest.mark.parametrize(("running", "missing"), [(True, []), (False, ["jupyter>=1.0", "ipywidgets>=8"])])
def test_a_cell_that_runs_needs_no_jupyter(installed, monkeypatch, running, missing):
    monkeypatch.delitem(sys.modules, "ipykernel", raising=False)
    if running:
        monkeypatch.setitem(sys.modules, "ipykernel", SimpleNamespace())
    assert missing_requirements(["jupyter>=1.0", "ipywidgets>=8"]) == missing


def test_nothing_missing_calls_no_pip(installed, pip, repository, capsys):
    installed.update(diffusers="0.35", lightning="2.6")
    for _ in range(2):
        start.start(repository, [])
        assert pip.calls == [] and capsys.readouterr().out == f"vavae_tools is ready ({repository})\n"
        assert sys.path[0] == str(repository) and sys.path.count(str(repository)) == 1
        assert os.environ["PYTHONPATH"].split(os.pathsep) == [str(repository), "/already/there"]  # for subprocesses


def test_pip_is_asked_for_what_is_missing_and_told_to_keep_torch(installed, pip, repository, capsys):
    start.start(repository, [])
    (command,) = pip.calls
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert command[-2:] == ["diffusers>=0.33", "lightning[extra]>=2.5"]
    assert not any(part.startswith("torch") for part in command) and "--no-index" not in command
    assert pip.constraints == [["torch==2.1.0", "numpy==1.20.0"]]  # also where a dependency would like another
    assert capsys.readouterr().out.startswith("installed: diffusers>=0.33, lightning[extra]>=2.5\nvavae_tools is ready")


def test_attached_wheels_keep_pip_off_the_network(installed, pip, repository, tmp_path):
    wheels = tmp_path / "input" / "my wheels" / "wheels"
    wheels.mkdir(parents=True)
    for name in ("a-1-py3-none-any.whl", "b-1-py3-none-any.whl"):
        (wheels / name).touch()
    start.start(repository, [tmp_path / "input", tmp_path / "nowhere"])
    (command,) = pip.calls
    assert "--no-index" in command and f"--find-links={wheels}" in command


def test_offline_it_says_what_to_do(installed, pip, repository, capsys):
    pip.fails = True
    start.start(repository, [])
    said = capsys.readouterr().out
    assert "Not installed from the network: diffusers>=0.33, lightning[extra]>=2.5." in said
    assert "Switch the internet on, or attach a dataset\nwith their wheels" in said
    assert "ERROR: No matching distribution" in said and "is ready" not in said


def test_it_needs_the_standard_library_only():
    """It runs before anything is installed, as a file of its own."""
    script = f"import runpy, sys; runpy.run_path({str(ROOT / 'vavae_tools' / 'start.py')!r}, run_name='__main__')"
    script += "; print(sorted({'torch', 'numpy', 'lightning', 'diffusers'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, cwd="/")
    assert done.stdout.endswith(f"vavae_tools is ready ({ROOT})\n[]\n"), done.stdout + done.stderr
