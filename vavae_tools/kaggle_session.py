"""Carry a training from one Kaggle session to the next.

push: what the next session needs goes into a private Kaggle dataset (made the first time, then its next version).
pull: the newest state comes back, from what is attached or by downloading; then --resume last resumes from it.
kernel: a folder for `kaggle kernels push` with a notebook and its kernel-metadata.json, for two T4 without internet.
wheels: a folder for `kaggle datasets create` with this package and what the image lacks, for sessions without internet.
"""

import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from vavae_tools.runtime.errors import UserError, command_parser, run_command

WHOLE_PATH = Path(__file__).resolve().parents[1] / "notebooks/00_kaggle.ipynb"


def main() -> None:
    parser = command_parser("python -m vavae_tools.kaggle_session", __doc__)
    parser.add_argument("do", choices=["push", "pull", "kernel", "wheels"], help="what is told above")
    add = parser.add_argument_group("push and pull").add_argument
    add("--work", default="outputs", help="folder of the outputs: checkpoints, latents, logs, models")
    add("--message", default="", help="push: notes of the version; without it how far each run is")
    add("--images", "--pictures", action="store_true", help="push: the split's images too, which otherwise stay here")
    add("--wait", type=float, default=600.0, help="push: seconds in which Kaggle must list the new version")
    dataset = "owner/name of the run's dataset (pull: also owner/name/VERSION; without it what is attached); "
    dataset += "kernel: all to attach, such as the one with the wheels, the images, the run's; wheels: its own"
    parser.add_argument_group("all four").add_argument("--dataset", nargs="+", default=[], help=dataset)
    add = parser.add_argument_group("kernel").add_argument
    add("--notebook", default=str(WHOLE_PATH), help="what runs there")
    add("--owner", help="your name on Kaggle; without it the first dataset's owner")
    add("--kernel_source", nargs="+", default=[], help="owner/name of notebooks whose output is attached")
    add("--internet", action="store_true", help="switch it on: for push and pull within the session")
    python = parser.add_argument_group("wheels").add_argument
    python("--python", default="3.12", help="version of the image's")
    add = parser.add_argument_group("kernel and wheels").add_argument
    add("--output_dir", help="folder to write, by default outputs/kernel or outputs/wheels")
    args = parser.parse_args()
    output_dir = args.output_dir or f"outputs/{args.do}"
    if args.do == "kernel":
        write_kernel(args.notebook, output_dir, args.dataset, args.kernel_source, args.owner, args.internet)
        return
    if len(args.dataset) > 1:
        raise UserError(f"--dataset {' '.join(args.dataset)}: {args.do} takes one")

    if args.do == "wheels":
        from vavae_tools.kaggle.wheels import write_wheels

        if not args.dataset:
            raise UserError("--dataset is missing: the owner/name that it is to have, such as your-name/vavae-tools")
        write_wheels(output_dir, args.dataset[0], args.python)
        return
    from vavae_tools.kaggle import session

    work, dataset = Path(args.work), next(iter(args.dataset), None)
    if args.do == "push":
        session.push(work, dataset, args.message, args.images, args.wait)
    else:
        session.pull(work, dataset)


def write_kernel(
    notebook: str | Path,
    output_dir: str | Path,
    datasets: Sequence[str] = (),
    kernel_sources: Sequence[str] = (),
    owner: str | None = None,
    internet: bool = False,
) -> None:
    """Write a folder for `kaggle kernels push`: the notebook and `kernel-metadata.json`.

    One of `datasets` ("owner/name") must hold this repository: only the notebook itself travels. `owner` is by default
    the first dataset's; `internet` is needed only where the session itself pushes or downloads.
    """
    from vavae_tools.runtime.files import write_json

    notebook, output_dir = Path(notebook), Path(output_dir)
    try:
        json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"No notebook {notebook}: expected one such as notebooks/02_vavae_fine_tuning.ipynb") from None
    sources = [*datasets, *kernel_sources]
    for source in sources:
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*/[A-Za-z0-9][A-Za-z0-9-]{4,}", source):
            raise UserError(f"{source!r} is no owner/name, as in the address of a dataset or notebook on Kaggle")
    owner = owner or (sources[0].split("/")[0] if sources else "")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", owner):
        raise UserError(f"--owner {owner or 'is missing'}: your name on Kaggle, as in the address of your profile")
    slug = re.sub(r"[^a-z0-9]+", "-", notebook.stem.lower()).strip("-")
    if not 5 <= len(slug) <= 50:
        raise UserError(f"{notebook.name}: Kaggle's names have 5 to 50 letters, digits and hyphens; {slug!r} is none")
    metadata = {
        **{"id": f"{owner}/{slug}", "title": slug.replace("-", " "), "code_file": notebook.name},
        **{"language": "python", "kernel_type": "notebook", "is_private": True},
        **{"enable_gpu": True, "enable_internet": internet, "machine_shape": "NvidiaTeslaT4"},  # two of them
        **{"dataset_sources": list(datasets), "kernel_sources": list(kernel_sources)},
    }
    write_json(output_dir / "kernel-metadata.json", metadata)
    shutil.copyfile(notebook, output_dir / notebook.name)
    print(f"written: {output_dir / 'kernel-metadata.json'}, {output_dir / notebook.name}")
    print(f"next: kaggle kernels push -p {output_dir} (then kaggle kernels status {metadata['id']})")
    if notebook.name == WHOLE_PATH.name and metadata["id"] not in kernel_sources:
        print(f"to go on where that one stops: write it again with --kernel_source {metadata['id']}, and push")


if __name__ == "__main__":
    run_command(main)
