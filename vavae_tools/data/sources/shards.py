"""WebDataset or parquet shards → a dataset on the disk, read by Hugging Face's `datasets`.

    python -m vavae_tools.data.sources.shards SHARDS OUTPUT

SHARDS is a folder of .tar files (`KEY.jpg` with `KEY.cls`, `KEY.json` or `KEY.txt`, or a folder per class) or of
.parquet files. The words train, validation and test in the names of files or folders tell the subsets apart.
"""

import re
import shutil
import tarfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vavae_tools.data.folders import EXTENSIONS, VALIDATION_SUBSETS, extension_of, no_such_folder, subset_named
from vavae_tools.data.sources.hugging_face import column_values, datasets_library
from vavae_tools.runtime.errors import UserError, command_parser, join_first, one_line, run_command

if TYPE_CHECKING:
    from datasets import Dataset

MAX_END_BYTES = 2**20  # bytes of zeros after a tar's last member; a file with more was not written to its end


def refuse_shards(path: Path) -> None:
    """Raise a UserError that names the command where a path or a folder is one of tar shards."""
    if ".tar" in path.name or (path.is_dir() and any(path.rglob("*.tar"))):
        command = f"python -m vavae_tools.data.sources.shards {path if path.is_dir() else path.parent} OUTPUT"
        raise UserError(f"{path} holds tar shards: make a dataset of them with {command}, and name OUTPUT instead")


def convert_shards(shards: Path, output: Path) -> "dict[str, Dataset]":
    """Write a folder of shards as a dataset, of tars with the columns image, label, text; the disk must hold both."""
    if not shards.is_dir():
        raise UserError(no_such_folder(shards))
    if output.exists():
        raise UserError(f"{output} is there already: name a new folder")
    datasets = datasets_library(f"{shards} is a folder of shards")
    files = sorted(shards.rglob("*.tar")) or sorted(shards.rglob("*.parquet"))
    if not files:
        raise UserError(f"No .tar and no .parquet files in {shards}")
    is_tar, of_subset = files[0].suffix == ".tar", _by_subset(shards, files)
    counts = {subset: sum(map(_count_images, paths)) for subset, paths in of_subset.items() if is_tar}
    names = {subset: list(map(str, paths)) for subset, paths in of_subset.items()}
    partial = output.with_name(f".{output.name}.partial")
    try:
        found = datasets.load_dataset("webdataset" if is_tar else "parquet", data_files=names, cache_dir=str(partial))
        for subset, count in counts.items():
            found[subset] = _in_columns(found[subset], count, f"{shards}, {subset}")
        found.save_to_disk(str(partial / "dataset"))
        (partial / "dataset").rename(output)
    except (ValueError, TypeError, LookupError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"{shards} cannot be read ({one_line(error.__cause__ or error)})") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return dict(found)


def _by_subset(shards: Path, files: Sequence[Path]) -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        words = set(map(subset_named, re.split(r"[^a-z]+", path.relative_to(shards).as_posix().lower())))
        found[next((name for name in ("train", *VALIDATION_SUBSETS) if name in words), "")].append(path)
    if found.keys() == {""}:
        return {"train": found[""]}
    if "" in found or "train" not in found:
        raise UserError(f"{join_first(found.get('', files))}: put train, val or test into every name, or into none")
    return found


def _count_images(path: Path) -> int:
    """Return how many images a tar file holds; `tarfile` ends in silence at a damaged header."""
    try:
        with tarfile.open(path, "r:") as tar:
            names = [member.name.rpartition("/")[2] for member in tar if member.isfile()]
            tar.fileobj.seek(tar.offset)
            after = tar.fileobj.read(MAX_END_BYTES + 1)
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} is damaged or no plain tar file ({error}): copy it again or unpack it") from None
    if not tarfile.BLOCKSIZE <= len(after) <= MAX_END_BYTES or after.strip(b"\0"):
        raise UserError(f"The tar file {path} is damaged or cut off at byte {tar.offset:,}: copy it again")
    return sum(extension_of(name) in EXTENSIONS and name.count(".") == 1 for name in names)


def _in_columns(dataset: "Dataset", images: int, where: str) -> "Dataset":
    image = next((column for column in dataset.column_names if column.lower() in EXTENSIONS), None)
    keys = column_values(dataset, "__key__")
    found = 0 if image is None else len(keys) - dataset.data.column(image).null_count
    if found != images or found != len(keys):
        hint = "Pack KEY.jpg and KEY.cls, .json or .txt one after the other, with the same endings everywhere"
        raise UserError(f"{where}: of {images:,} images {found:,} are found, in {len(keys):,} samples. {hint}")
    labels, is_captioned = _labels(dataset, keys), "txt" in dataset.column_names
    is_labelled = labels.count(None) < len(labels)
    if None in labels and (is_labelled or not is_captioned):
        raise UserError(f"{where}: {keys[labels.index(None)]} has no label: expected its .cls, or .json with a label")
    dataset = dataset.rename_columns({image: "image", **({"txt": "text"} if is_captioned else {})})
    dataset = dataset.select_columns(["image", "text"] if is_captioned else ["image"])
    return dataset.add_column("label", labels) if is_labelled else dataset


def _labels(dataset: "Dataset", keys: Sequence[str]) -> list[int | str | None]:
    """Return what .cls, else .json, says of each image; where neither is there, the name of its folder."""
    if "cls" in dataset.column_names:
        return column_values(dataset, "cls")
    if "json" in dataset.column_names:
        fields = [value if isinstance(value, dict) else {} for value in column_values(dataset, "json")]
        named = ([each.get(name) for name in ("label", "class_name", "class")] for each in fields)
        labels = [next((value for value in values if value is not None), None) for values in named]
        if any(label is not None for label in labels):
            return labels
    return [key.rpartition("/")[0].rpartition("/")[2] or None for key in keys]


def main() -> None:
    about = "Make a dataset on the disk of WebDataset or parquet shards."
    parser = command_parser("python -m vavae_tools.data.sources.shards", about)
    parser.add_argument("shards", type=Path, help="folder of .tar or .parquet files")
    parser.add_argument("output", type=Path, help="new folder, for data.data_dir")
    args = parser.parse_args()
    for subset, dataset in convert_shards(args.shards, args.output).items():
        print(f"{subset}: {len(dataset):,} images with the columns {', '.join(dataset.column_names)}")
    print(f"next: data.data_dir={args.output}")


if __name__ == "__main__":
    run_command(main)
