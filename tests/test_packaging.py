"""What is installed: one list of requirements, a core that needs no notebook, a wheel that works by itself."""

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

from vavae_tools import __main__ as console

ROOT = Path(__file__).parents[1]


def run(*command, **options) -> str:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=120, **options)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_requirements_are_those_of_the_package_with_notebooks_and_kaggle():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines())
    wanted = [*project["dependencies"], *extras["notebooks"], *extras["kaggle"], *extras["rae"]]
    assert sorted(filter(None, lines)) == sorted(wanted)
    assert extras["all"] == [f"vavae_tools[{','.join(name for name in extras if name not in ('all', 'tests'))}]"]


def test_the_core_imports_without_what_only_some_need():
    absent = {"jupyter", "IPython", "ipywidgets", "kaggle", "kagglehub", "peft"}
    script = (
        f"import sys\nfor name in {absent!r}: sys.modules[name] = None\n"
        "import vavae_tools\nfor name in {*vavae_tools.__all__} - {'SamplingPanel'}: getattr(vavae_tools, name)\n"
        "print('all there')"
    )
    assert run(sys.executable, "-c", script, cwd=ROOT) == "all there\n"


def test_a_wheel_works_by_itself(gait, tmp_path):
    source, target = tmp_path / "source", tmp_path / "installed"
    shutil.copytree(ROOT / "vavae_tools", source / "vavae_tools", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    offline = "--no-deps", "--no-build-isolation", "--disable-pip-version-check", "-q"
    run(sys.executable, "-m", "pip", "install", *offline, "--target", target, source)  # by way of a wheel
    environment = {**os.environ, "PYTHONPATH": str(target)}
    assert {path.name for path in target.iterdir() if path.suffix != ".dist-info"} == {"vavae_tools", "bin"}
    said = run(target / "bin/vavae-tools", "split", "--input_dir", gait, cwd=tmp_path, env=environment)
    assert "written: 24 images to train, 6 to validate" in said
    script = (
        "import vavae_tools as vt; vt.load_vavae('small', log=print); print(vt.__file__)\n"
        "import sys; sys.argv = ['train', '--print_config', 'trainer=ddp']\n"
        "from vavae_tools.train import main; main()"
    )
    said = run(sys.executable, "-c", script, cwd=tmp_path, env=environment)
    assert str(target) in said and "strategy: ddp" in said  # which an alias's file says


def test_commands_are_known_by_name(fault, run_main):
    assert "No command 'evalute' (did you mean evaluate?)" in fault(console.main, "evalute")
    status, out, _ = run_main(console.main, "--version")
    assert status == 0 and "torch " in out
