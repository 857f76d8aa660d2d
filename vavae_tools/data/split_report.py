"""What a split holds: split_info.json, for programs, and a table, for people."""

import json
import shlex
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path

from vavae_tools.data.folders import EXTENSIONS, count_of, labels_of, list_folders
from vavae_tools.runtime.errors import UserError, join_first

SUBSETS = ("train", "val", "test")
INFO_NAME = "split_info.json"
INFO_VERSION = 1
LINES_SHOWN = 20


@dataclass(slots=True)
class ImageEntry:
    person: str
    name: str
    path: str
    bytes: int
    fault: str = ""  # why it is left out; empty for a good image
    sha256: str | None = None
    size: tuple[int, int] | None = None
    pixels: str | None = None  # `stored.pixel_hash`
    turned: bool = False  # stored turned, with an EXIF orientation
    white: int | None = None  # `stored.white_of`

    @property
    def key(self) -> str:
        return f"{self.person}/{self.name}"


@dataclass(frozen=True, repr=False)
class SplitReport:
    """What a split holds. Printed, it is a table of persons, warnings, and what to do next."""

    output_dir: str
    counts: dict[str, dict[str, int]]  # person → {"train": …, "val": …, "left_out": …}, and "test" where there is one
    totals: dict[str, int]
    labels: dict[str, int]
    unreadable: dict[str, str]  # image → why it is left out
    duplicates: list[list[str]]  # files with the same content
    sizes: dict[str, int]  # "widthxheight" → how many images
    warnings: list[str]
    already_there: bool = False

    @classmethod
    def of(cls, info: dict, output_dir: Path, already_there: bool = False) -> "SplitReport":
        known = {field.name: info[field.name] for field in fields(cls) if field.name in info}
        return cls(output_dir=str(output_dir), already_there=already_there, **known)

    def __str__(self) -> str:
        rows = [("person", "label", *(column.replace("_", " ") for column in self.totals))]
        for person, row in self.counts.items():
            rows.append((person, str(self.labels.get(person, "-")), *(f"{n:,}" for n in row.values())))
        rows.append(("total", "", *(f"{n:,}" for n in self.totals.values())))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        lines += ["", *(f"warning: {warning}" for warning in self.warnings)]
        left_out = [f"left out: {key}: {why}" for key, why in self.unreadable.items()]
        for several in (left_out, [f"identical, in one subset: {' = '.join(keys)}" for keys in self.duplicates]):
            more = len(several) - LINES_SHOWN
            lines += [*several[:LINES_SHOWN], *([f"… and {more:,} more (all in {INFO_NAME})"] if more > 0 else [])]
        if self.sizes:
            lines.append("sizes: " + join_first(f"{size} ({n:,})" for size, n in self.sizes.items()))
        done = "already there, left as it is" if self.already_there else "written"
        split = f"{self.totals['train']:,} images to train, {self.totals['val']:,} to validate"
        split += f", {self.totals['test']:,} to test" if "test" in self.totals else ""
        lines.append(f"{done}: {split} ({self.output_dir}; every file's subset is in {INFO_NAME})")
        following = f"--data_dir {shlex.quote(self.output_dir)} --original_vavae small"
        lines.append(f"next: python minimal_training_modification.py {following}")
        return "\n".join(lines).encode(errors="backslashreplace").decode()  # a name may be no text at all

    __repr__ = __str__


def split_info(settings: dict, persons: Sequence[str], images: Sequence[ImageEntry], subsets: dict[str, str]) -> dict:
    """Return what split_info.json says about images that were looked at and given a subset."""
    columns = (*(SUBSETS if settings["test_ratio"] else SUBSETS[:2]), "left_out")
    counts = {person: dict.fromkeys(columns, 0) for person in persons}
    twins = defaultdict(list)
    for image in images:
        counts[image.person][subsets.get(image.key, "left_out")] += 1
        if image.sha256 and not image.fault:
            twins[image.pixels or image.sha256].append(image)
    duplicates = [group for group in twins.values() if len(group) > 1]
    sizes = Counter(image.size for image in images if image.size)
    return {
        "version": INFO_VERSION,
        **settings,
        "labels": labels_of({image.person for image in images if not image.fault}),
        "counts": counts,
        "totals": {column: sum(row[column] for row in counts.values()) for column in columns},
        "warnings": _remarks(counts, duplicates) + _readings(images),
        "unreadable": {image.key: image.fault for image in images if image.fault},
        "duplicates": [[image.key for image in group] for group in duplicates],
        "sizes": {f"{width}x{height}": n for (width, height), n in sizes.most_common()},
        "files": file_entries(images, subsets),
    }


def file_entries(images: Sequence[ImageEntry], subsets: dict[str, str]) -> dict[str, dict]:
    """Return every file's subset (None: left out), length, hash (None: no other is as long) and, decoded, pixels'."""
    known = ((p, {"pixels": p.pixels} if p.pixels else {}) for p in images)
    return {p.key: {"side": subsets.get(p.key), "bytes": p.bytes, "sha256": p.sha256, **more} for p, more in known}


def _remarks(counts: dict[str, dict[str, int]], duplicates: list[list[ImageEntry]]) -> list[str]:
    """Return what a person should know before training on the split."""
    remarks = []
    used = {person: {subset: n for subset, n in row.items() if subset in SUBSETS} for person, row in counts.items()}
    usable = [person for person, row in used.items() if any(row.values())]
    if len(usable) == 1:
        remarks.append(f"there is one person only ({usable[0]}): a classifier needs two")
    for person, row in counts.items():
        if person not in usable and row["left_out"]:
            remarks.append(f"{person} has no label: none of its images can be used ({row['left_out']:,} left out)")
        elif person in usable and not all(used[person].values()):
            there, missing = ([subset for subset, n in used[person].items() if bool(n) == has] for has in (True, False))
            there, missing, count = " and ".join(there), " and ".join(missing), sum(used[person].values())
            if count == 1:
                remarks.append(f"{person} has one image: it is in {there}, and {missing} has none")
                continue
            number = count_of(count, "image")
            why = f"it has {number}" if count < len(row) - 1 else f"its {number} are identical or of one recording"
            why += f", all in {there}"
            remarks.append(f"{person} has nothing in {missing}: {why}")
    shared = [group for group in duplicates if len({image.person for image in group}) > 1]
    if shared:
        names = join_first(" = ".join(image.key for image in group) for group in shared)
        remarks.append(f"{count_of(len(shared), 'image')} under more than one person, so mislabelled: {names}")
    return remarks


def _readings(images: Sequence[ImageEntry]) -> list[str]:
    remarks = []
    if turned := sum(image.turned for image in images):
        remarks.append(f"{count_of(turned, 'image')} stored turned (EXIF orientation), read upright")
    if deep := Counter(image.white for image in images if image.white):
        kinds = join_first(f"{white:,} ({n:,})" for white, n in deep.most_common())
        rule = f"the largest, {max(deep):,}, is white for all" if len(deep) > 1 else "it is read as white"
        remarks.append(f"{count_of(deep.total(), 'image')} of more than 8 bits, with numbers up to {kinds}: {rule}")
    return remarks


def read_split_info(directory: str | Path) -> dict:
    path = Path(directory) / INFO_NAME
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
        version = info["version"]
    except (FileNotFoundError, NotADirectoryError):
        raw = Path(directory).is_dir() and any(list_folders(directory, EXTENSIONS).values())
        source, target = (directory, "data_split") if raw else ("…", directory)
        command = f"python data_split.py --input_dir {shlex.quote(str(source))} --output_dir {shlex.quote(str(target))}"
        found = f"No {INFO_NAME} in {directory}: it is no split{', but holds images' * raw}. Make one with {command}"
        raise UserError(f"{found}, and name {target}") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{path} is damaged. Remove {directory} and make the split again.") from None
    if version != INFO_VERSION:
        raise UserError(f"{path} has version {version}, expected {INFO_VERSION}. Make the split again.")
    return info


def is_simulated(split: str | Path) -> bool:
    """Return whether a split is of the walkers that `write_gait_dataset` simulates."""
    info = read_split_info(split)
    return info.get("simulated", (Path(info["input_dir"]) / "gait.json").is_file())


def existing_split(target: Path) -> tuple[dict, list[str]] | None:
    """Return the split that is in `target`, and its files that are gone or have another length; None if it is empty.

    Raises:
        UserError: something else is there, which is never replaced.
    """
    if target.exists() and not target.is_dir():
        raise UserError(f"{target} is a file. Choose another --output_dir.")
    names = sorted(path.name for path in target.iterdir()) if target.exists() else []
    if not names:
        return None
    if INFO_NAME not in names:
        found = f"{target} is no split, it holds {join_first(names)}"
        raise UserError(f"{found}. Choose an --output_dir that is new or empty.")
    info = read_split_info(target)
    there = {}
    for path in chain.from_iterable((target / subset).rglob("*") for subset in SUBSETS):
        if path.is_symlink() or (path.is_file() and not path.name.startswith(".")):
            there[path.relative_to(target).as_posix()] = path.stat().st_size if path.exists() else -1
    own = {f"{entry['side']}/{key}": entry["bytes"] for key, entry in info["files"].items() if entry["side"]}
    foreign = [name for name in names if name not in (*SUBSETS, INFO_NAME) and not name.startswith(".")]
    foreign += sorted(there.keys() - own.keys())
    if foreign:
        hint = "Move that away, or choose another --output_dir."
        raise UserError(f"{target} holds more than its split: {join_first(foreign)}. {hint}")
    return info, [name for name, length in own.items() if there.get(name) != length]
