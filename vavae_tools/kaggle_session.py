"""Carry a training from one Kaggle session to the next.

push: what the next session needs goes into a private Kaggle dataset (made the first time, then its next version).
pull: the newest state comes back, from what is attached or by downloading; then --resume last goes on from it.
kernel: a folder for `kaggle kernels push` with a notebook and its kernel-metadata.json, for two T4 without internet.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path

from vavae_tools.runtime.errors import UserError, run_command

SHAPE = "NvidiaTeslaT4"
"""What Kaggle calls two T4."""


def main() -> None:
    class Page(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    parser = argparse.ArgumentParser(
        prog="python -m vavae_tools.kaggle_session", description=__doc__, formatter_class=Page, allow_abbrev=False
    )
    parser.add_argument("do", choices=["push", "pull", "kernel"], help="what is told above")
    add = parser.add_argument_group("push and pull").add_argument
    add("--work", default="outputs", help="folder of the outputs: checkpoints, latents, logs, models")
    add("--message", default="", help="push: notes of the version; without it how far each run is")
    add("--pictures", action="store_true", help="push: the split's images too, which otherwise stay here")
    add("--wait", type=float, default=600.0, help="push: seconds in which Kaggle must list the new version")
    none = argparse.SUPPRESS
    both = parser.add_argument_group("all three").add_argument
    both(
        "--dataset",
        nargs="+",
        default=none,
        help="owner/name of the run's dataset (pull: also owner/name/VERSION; without it what is attached); kernel: "
        "all to attach, such as the one with this repository, the images, the run's",
    )
    add = parser.add_argument_group("kernel").add_argument
    add("--notebook", default=none, help="such as notebooks/02_vavae_fine_tuning.ipynb")
    add("--output_dir", default="outputs/kernel", help="folder to write, ready for kaggle kernels push")
    add("--owner", default=none, help="your name on Kaggle; without it the first dataset's owner")
    add("--kernel_source", nargs="+", default=none, help="owner/name of notebooks whose output is attached")
    add("--internet", action="store_true", help="switch it on: for push and pull within the session")
    given = vars(parser.parse_args())
    datasets = given.get("dataset", [])
    if given["do"] == "kernel":
        if "notebook" not in given:
            raise UserError("--notebook is missing: name one, such as notebooks/02_vavae_fine_tuning.ipynb")
        write_kernel(
            given["notebook"],
            given["output_dir"],
            datasets,
            given.get("kernel_source", []),
            given.get("owner"),
            given["internet"],
        )
        return
    if len(datasets) > 1:
        raise UserError(f"--dataset {' '.join(datasets)}: {given['do']} takes one")

    from vavae_tools.kaggle.session import pull_session, push_session

    dataset = datasets[0] if datasets else None
    if given["do"] == "push":
        push_session(given["work"], dataset, given["message"], given["pictures"], given["wait"], optional=False)
    else:
        pull_session(given["work"], dataset, optional=False)


def write_kernel(
    notebook: str | Path,
    output_dir: str | Path,
    datasets: Sequence[str] = (),
    kernel_sources: Sequence[str] = (),
    owner: str | None = None,
    internet: bool = False,
    log: Callable[[str], None] = print,
) -> Path:
    """Write a folder for `kaggle kernels push`: a copy of the notebook and `kernel-metadata.json`.

    Args:
        datasets: "owner/name" of what is attached. One must hold this repository: only the notebook itself travels.
        kernel_sources: "owner/name" of notebooks whose output is attached.
        owner: name on Kaggle, by default the first dataset's owner.
        internet: needed only where the session itself pushes or downloads.

    Returns:
        The metadata's path.

    Raises:
        UserError: no notebook, or names that Kaggle's client does not take.
    """
    from vavae_tools.runtime.files import atomic_write, write_json

    notebook, output_dir = Path(notebook), Path(output_dir)
    try:
        text = notebook.read_text(encoding="utf-8")
        json.loads(text)["cells"]
    except FileNotFoundError:
        raise UserError(f"No notebook {notebook}: expected one such as notebooks/02_vavae_fine_tuning.ipynb") from None
    except (ValueError, KeyError, TypeError, IsADirectoryError):
        raise UserError(f"{notebook} is no notebook: expected a file with cells, as Jupyter writes it") from None
    for source in (*datasets, *kernel_sources):
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*/[A-Za-z0-9][A-Za-z0-9-]{4,}", source):
            raise UserError(f"{source!r} is no owner/name, as in the address of a dataset or notebook on Kaggle")
    owner = owner or next((source.split("/")[0] for source in (*datasets, *kernel_sources)), None)
    if not owner or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", owner):
        raise UserError(f"--owner {owner or 'is missing'}: your name on Kaggle, as in the address of your profile")
    slug = re.sub(r"[^a-z0-9]+", "-", notebook.stem.lower()).strip("-")
    if not 5 <= len(slug) <= 50:
        raise UserError(f"{notebook.name}: Kaggle's names have 5 to 50 letters, digits and hyphens; {slug!r} is none")
    metadata = {
        "id": f"{owner}/{slug}",
        "title": slug.replace("-", " "),
        "code_file": notebook.name,
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_internet": internet,
        "machine_shape": SHAPE,
        "dataset_sources": list(datasets),
        "kernel_sources": list(kernel_sources),
        "competition_sources": [],
        "model_sources": [],
    }
    with atomic_write(output_dir / notebook.name) as partial:
        partial.write_text(text, encoding="utf-8")
    path = output_dir / "kernel-metadata.json"
    write_json(path, metadata)
    log(f"written: {path}, {output_dir / notebook.name}")
    log(f"next: kaggle kernels push -p {output_dir} (then kaggle kernels status {metadata['id']})")
    return path


if __name__ == "__main__":
    run_command(main)
