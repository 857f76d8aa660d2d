"""What several test files share: thirty tiny simulated images of three people, their split, their latents."""

import gc
import os
import subprocess
import sys
from pathlib import Path

import pytest
from forked import python, start_server


def pytest_configure(config):
    if not hasattr(config, "workerinput"):  # xdist's workers share the one of the process that started them
        config.forks = start_server()


def pytest_unconfigure(config):
    if getattr(config, "forks", None):
        config.forks.stdin.close()
        try:
            config.forks.wait(10)
        except subprocess.TimeoutExpired:  # a worker of some data loader, which lives till the end, has that pipe, too
            config.forks.kill()


@pytest.fixture(scope="module", autouse=True)
def nothing_that_stays_is_garbage():
    """Trainings look for garbage: in what they made, not in all that was imported, which takes half a second each."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def forked(monkeypatch):
    """What this test starts by `sys.executable`, itself or through the package, starts at once."""
    monkeypatch.setattr(sys, "executable", python())


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Run a command's `main` here: its exit status, what it printed, and what it said on stderr."""
    from vavae_tools.runtime.errors import run_command

    def run(main, *words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["command", *map(str, words)])
        capsys.readouterr()
        status = 0
        try:
            run_command(main)
        except SystemExit as exit:
            status = exit.code
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder of its own to run in, where subprocesses find the package and the tests."""
    tests = Path(__file__).parent
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PYTHONPATH", f"{tests.parent}{os.pathsep}{tests}")
    return tmp_path


@pytest.fixture
def fault(here, run_main):
    """The one line that a command says where it cannot go on."""

    def run(main, *words) -> str:
        status, _, err = run_main(main, *words)
        assert status == 2 and err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return run


@pytest.fixture(scope="session")
def gait(tmp_path_factory) -> Path:
    """A folder of three simulated walkers with ten images of 16×16 each. Do not write into it."""
    from tiny import PEOPLE, SIZE

    from vavae_tools.data.demo.gait import write_gait_dataset

    folder = tmp_path_factory.mktemp("gait") / "images"
    return write_gait_dataset(folder, PEOPLE, 10, SIZE, workers=1, progress=False)


@pytest.fixture(scope="session")
def split_dir(gait, tmp_path_factory) -> Path:
    """Its split: 24 images to train, 6 to validate. Do not write into it."""
    from vavae_tools.data.split import split_folders

    folder = tmp_path_factory.mktemp("split") / "data_split"
    split_folders(gait, folder, progress=False)
    return folder


@pytest.fixture(scope="session")
def vavae_dir(tmp_path_factory) -> Path:
    """A VA-VAE's folder that knows the statistics of `latents_dir`. Do not write into it."""
    from tiny import perturb_projections, tiny_vavae

    folder = tmp_path_factory.mktemp("vavae") / "vavae"
    perturb_projections(tiny_vavae()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def latents_dir(split_dir, vavae_dir, tmp_path_factory) -> Path:
    """The split's latents by that VA-VAE, mirrored ones too. Do not write into it."""
    from vavae_tools.recipes.dit import encode_split

    folder = tmp_path_factory.mktemp("latents") / "latents"
    encode_split(split_dir, vavae_dir, folder, flips=True, log=lambda line: None)
    return folder


@pytest.fixture
def data(split_dir, latents_dir) -> tuple[Path, Path]:
    return split_dir, latents_dir


@pytest.fixture
def train(here, capsys):
    """Train here by the words of a command line: what it said."""
    from vavae_tools.train import train as run

    def train(*words: str) -> str:
        capsys.readouterr()
        run(*words)
        return capsys.readouterr().out

    return train
