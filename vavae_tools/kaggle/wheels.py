"""A dataset for sessions without internet: this package, and wheels of what Kaggle's image lacks of its requirements.

What the image has is never among them: pip finds empty packages of those names and versions, which are removed again.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from vavae_tools.kaggle.session import DATASET
from vavae_tools.runtime.errors import UserError, in_home, join_first, one_line
from vavae_tools.runtime.files import write_json

ROOT = Path(__file__).resolve().parents[2]
PYTHON = "3.12"  # the image's
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
IMAGE = {
    **{"torch": "2.10.0", "torchvision": "0.25.0", "torchaudio": "2.10.0", "numpy": "2.0.2"},
    **{"diffusers": "0.37.1", "transformers": "5.0.0"},
}
"""Versions on Kaggle's image of 2026; newer ones there do no harm."""
ALSO_THERE = ("scipy", "matplotlib", "pillow", "tqdm", "jupyter", "ipywidgets")
"""On every image for notebooks, in versions that are not known."""


def write_wheels(output_dir: str | Path, dataset: str, python: str = PYTHON) -> None:
    """Write a folder for `kaggle datasets create`: wheels, `repository/`, `dataset-metadata.json`.

    The package is in one folder, so that it does not matter how deep Kaggle unpacks it.

    Args:
        dataset: "owner/name" that it is to have on Kaggle.
        python: the image's version.
    """
    output_dir = in_home(output_dir)
    if not DATASET.fullmatch(dataset) or dataset.count("/") > 1:
        raise UserError(f"--dataset {dataset}: expected owner/name with a name of 6 to 50 small letters, digits and -")
    if not re.fullmatch(r"3\.\d+", python):
        raise UserError(f"--python {python}: expected the image's version, such as {PYTHON}")
    marker, package = output_dir / "dataset-metadata.json", output_dir / "repository"
    there = list(output_dir.iterdir()) if output_dir.is_dir() else []
    own = {marker, package, *output_dir.glob("*.whl")} if marker.is_file() else set()  # which another call wrote
    if others := [path.name for path in there if path not in own]:
        raise UserError(f"{output_dir} holds {join_first(sorted(others))}: name another --output_dir")
    if not (ROOT / "requirements.txt").is_file():
        raise UserError(f"No requirements.txt in {ROOT}: run this in a clone of the repository")
    with TemporaryDirectory() as name:
        wheels = _download(lacking(ROOT / "requirements.txt"), Path(name), python)
        shutil.rmtree(output_dir, ignore_errors=True)
        shutil.copytree(ROOT / "vavae_tools", package / "vavae_tools", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copyfile(ROOT / "requirements.txt", package / "requirements.txt")
        for path in wheels:
            shutil.copyfile(path, output_dir / path.name)
    write_json(marker, {"title": dataset.split("/")[1], "id": dataset, "licenses": [{"name": "other"}]})
    size = sum(path.stat().st_size for path in output_dir.rglob("*") if path.is_file())
    print(f"written: {output_dir}: {len(wheels)} wheels for Python {python} and vavae_tools, {size / 1e6:,.1f} MB")
    print(f"next: kaggle datasets create -p {output_dir} -r zip (later: kaggle datasets version -p … -r zip -m NOTE)")


def lacking(requirements: Path) -> list[str]:
    """Return the requirements that Kaggle's image does not have, as far as is known."""
    lines = (line.partition("#")[0].strip() for line in requirements.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line and re.match(r"[\w-]+", line)[0].lower() not in {*IMAGE, *ALSO_THERE}]


def _download(packages: list[str], folder: Path, python: str) -> list[Path]:
    empty, wheels, pinned = folder / "empty", folder / "wheels", folder / "pinned.txt"
    empty.mkdir()
    here = {name: f"{version}+image" for name, version in IMAGE.items()}  # which no index has
    for name, version in here.items():
        write_empty_wheel(empty, name, version)
    pinned.write_text("\n".join(f"{name}=={version}" for name, version in here.items()), encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
    command += ["--dest", str(wheels), "--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    command += [f"--platform={platform}" for platform in PLATFORMS]
    command += [f"--constraint={pinned}", f"--find-links={empty}", *packages]
    environment = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}  # of this machine
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR") or "No module" in line]
        reason = one_line(RuntimeError(" ".join(errors[-1:]) or "pip failed"), 300)
        raise UserError(f"No wheels of {join_first(packages)}: {reason}. This needs pip, and the internet here")
    return sorted(path for path in wheels.glob("*.whl") if not (empty / path.name).is_file())


def write_empty_wheel(folder: Path, name: str, version: str, *needs: str) -> None:
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    metadata = [
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}",
        *(f"Requires-Dist: {each}" for each in needs),
    ]
    with zipfile.ZipFile(folder / f"{name.replace('-', '_')}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "\n".join(metadata) + "\n")
        form = "Wheel-Version: 1.0\nGenerator: vavae_tools\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        wheel.writestr(f"{info}/WHEEL", form)
        wheel.writestr(f"{info}/RECORD", "")
