"""Get the package going in a notebook, by one line: `%run` this file, wherever the repository lies.

Puts the repository on the path and installs what is missing of its requirements, from attached wheels or the network.
Never torch: Kaggle's and Colab's own build fits their GPUs, another one may not. Standard library only.
"""

import os
import sys

# Run as a file, its own folder is searched first, where select.py would be taken for Python's.
sys.path[:] = [folder for folder in sys.path if folder != os.path.dirname(os.path.abspath(__file__))]

import importlib.metadata
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

KEPT = ("torch", "torchvision", "torchaudio", "numpy")
"""Never replaced where they are installed: other packages of the image were built against them."""

OF_NOTEBOOKS = ("jupyter", "ipywidgets")
"""Not needed by name where a cell runs already, as on Kaggle, which has their parts."""


def missing_requirements(lines: Iterable[str]) -> list[str]:
    """The requirements that are not installed, or too old; those in `KEPT` count as good in any version.

    >>> missing_requirements(["pip>=1.0  # always there", "no-such-package>=2", ""])
    ['no-such-package>=2']
    """
    from packaging.requirements import Requirement  # comes with pip's own tools, jupyter and torch's neighbours

    missing = []
    for text in filter(None, (line.split("#")[0].strip() for line in lines)):
        requirement = Requirement(text)
        if requirement.name in OF_NOTEBOOKS and "ipykernel" in sys.modules:
            continue
        version = _installed(requirement.name)
        good = requirement.name in KEPT or requirement.specifier.contains(version or "0", prereleases=True)
        if version is None or not good:
            missing.append(text)
    return missing


def start(repository: Path, input_roots: Sequence[Path] = (Path("/kaggle/input"),)) -> None:
    """Make `import vavae_tools` work here and in subprocesses; says in one line what could not be installed."""
    if str(repository) not in sys.path:
        sys.path.insert(0, str(repository))
        os.environ["PYTHONPATH"] = os.pathsep.join([str(repository), *filter(None, [os.environ.get("PYTHONPATH")])])
    requirements = repository / "requirements.txt"
    lines = requirements.read_text(encoding="utf-8").splitlines() if requirements.is_file() else []
    if missing := missing_requirements(lines):
        kept = [f"{name}=={version}" for name in KEPT if (version := _installed(name))]
        wheels = sorted({wheel.parent for root in input_roots for wheel in root.rglob("*.whl")})
        offline = ["--no-index", *(f"--find-links={folder}" for folder in wheels)] if wheels else []
        with tempfile.TemporaryDirectory() as folder:
            constraint = Path(folder) / "kept.txt"
            constraint.write_text("\n".join(kept))
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--constraint", str(constraint)]
            done = subprocess.run([*command, *offline, *missing], capture_output=True, text=True, check=False)
        if done.returncode:
            source = f"the attached wheels ({wheels[0]})" if wheels else "the network"
            print(f"Not installed from {source}: {', '.join(missing)}. Switch the internet on, or attach a dataset")
            print("with their wheels (python -m vavae_tools.kaggle_session wheels), and run this cell again.")
            print(*done.stderr.strip().splitlines()[-2:], sep="\n")
            return
        print("installed: " + ", ".join(missing))
    print(f"vavae_tools is ready ({repository})")


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    start(Path(__file__).resolve().parents[1])
