"""Picture folders, one per person → train/, val/ and split_info.json, without a picture on both sides.

The side of a picture follows from the seed and its name: a hash of both puts each person's pictures in an order, and
the first ones validate. So the order of a folder listing, the number of workers and the place of the input do not
matter, and a picture more moves few others. What belongs together goes together: the pictures of one recording, and
files with the same content, even under two persons.
"""

import errno
import hashlib
import io
import os
import re
import shutil
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, UnidentifiedImageError

from vavae_tools.data.folders import (
    PICTURE_EXTENSIONS,
    can_read,
    counted,
    either,
    labels_of,
    list_folders,
    listed,
    natural_key,
    no_pictures,
    no_such_folder,
    other_files,
    person_folders,
    picture_entries,
)
from vavae_tools.data.split_report import (
    INFO_NAME,
    SIDES,
    Picture,
    SplitReport,
    file_entries,
    read_split_info,
    split_info,
    write_split_info,
)
from vavae_tools.runtime.errors import UserError

# ---- Which side a picture of a split stands on, and what has to stand together. Nothing is read or written here


RecordingOf = Callable[[Picture], str | None]


def choose_sides(
    pictures: Sequence[Picture], val_ratio: float, seed: int, recording_of: RecordingOf = lambda picture: None
) -> dict[str, str]:
    """The side of each picture, by its key. Val's share of a person comes as near to `val_ratio` as whole units allow.

    A person with two units or more has at least one on each side; a single unit goes to train.
    """
    units = _units(pictures, recording_of)
    units_of = defaultdict(list)
    for unit in units:
        for person in {picture.person for picture in unit}:
            units_of[person].append(unit)
    lacking = {}  # how many pictures of a person val still lacks
    for person, n in Counter(picture.person for picture in pictures).items():
        lacking[person] = min(max(int(n * val_ratio + 0.5), 1), n - 1) if len(units_of[person]) > 1 else 0

    in_val = set()  # keys of the units' first pictures
    for unit in sorted(units, key=lambda unit: _rank(seed, unit[0].key)):
        share = Counter(picture.person for picture in unit) if len(unit) > 1 else {unit[0].person: 1}
        if sum(abs(lacking[person]) - abs(lacking[person] - n) for person, n in share.items()) > 0:
            in_val.add(unit[0].key)
            for person, n in share.items():
                lacking[person] -= n
    for person in sorted(units_of, key=natural_key):
        _mend(person, units_of, in_val)
    return {picture.key: SIDES[unit[0].key in in_val] for unit in units for picture in unit}


def _units(pictures: Sequence[Picture], recording_of: RecordingOf) -> list[list[Picture]]:
    """What must stay on one side: pictures of one recording of a person or with the same content, taken together."""
    parent = list(range(len(pictures)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first = {}
    for i, picture in enumerate(pictures):
        recording = recording_of(picture)
        for tie in filter(None, (picture.sha256, recording and (picture.person, recording))):
            parent[root(i)] = root(first.setdefault(tie, i))
    units = defaultdict(list)
    for i, picture in enumerate(pictures):
        units[root(i)].append(picture)
    return list(units.values())


def _mend(person: str, units_of: dict[str, list[list[Picture]]], in_val: set[str]) -> None:
    """If all units of a person are on one side, move the smallest that no other person needs there."""

    def side(unit: list[Picture]) -> bool:
        return unit[0].key in in_val

    def may_move(unit: list[Picture]) -> bool:
        others = {picture.person for picture in unit} - {person}
        return all(sum(side(u) == side(unit) for u in units_of[other]) > 1 for other in others)

    units = units_of[person]
    movable = [unit for unit in units if may_move(unit)]
    if len(units) > 1 and len({side(unit) for unit in units}) == 1 and movable:
        in_val ^= {min(movable, key=len)[0].key}


def _rank(seed: int, key: str) -> bytes:
    return hashlib.blake2b(os.fsencode(f"{seed}/{key}"), digest_size=16).digest()


def recordings(group_pattern: str | None, pictures: Sequence[Picture], notes: list[str]) -> RecordingOf:
    """The function that tells a picture's recording from its name; None for a picture on its own."""
    if group_pattern is None:
        return lambda picture: None
    flag = f"--group_pattern {group_pattern!r}"
    try:
        pattern = re.compile(group_pattern)
    except re.error as error:
        raise UserError(f"{flag} is no regular expression: {error}.") from None
    if not pattern.groups:
        raise UserError(f"{flag} has no group. Put the part that names the recording in (…), as in '(rec[0-9]+)_'.")

    def recording_of(picture: Picture) -> str | None:
        match = pattern.search(picture.name)
        return (match[1] or None) if match else None

    alone = [picture.key for picture in pictures if recording_of(picture) is None]
    if len(alone) == len(pictures):
        raise UserError(f"{flag} fits none of the {len(alone):,} names, such as {alone[0]}.")
    if alone:
        notes.append(f"{counted(len(alone), 'name')} without a recording, each on its own: {listed(alone)}")
    return recording_of


__all__ = ["PICTURE_EXTENSIONS", "SplitReport", "labels_of", "list_folders", "read_split_info", "split_folders"]

LINKS = ("copy", "hard", "symbolic")
CHECKS = ("decode", "contents")
MIN_SIDE = 2
"""Pixels: a picture that is narrower or lower than this shows nothing."""


def split_folders(
    input_dir: str | Path,
    output_dir: str | Path,
    train_ratio: float = 0.8,
    val_ratio: float = 0.2,
    seed: int = 0,
    extensions: Sequence[str] = PICTURE_EXTENSIONS,
    link: str = "copy",
    group_pattern: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    progress: bool | None = True,
    check: str = "decode",
) -> SplitReport:
    """Split the person folders in `input_dir` into `output_dir`/train and `output_dir`/val.

    Args:
        link: "copy", "hard" (on one disk; writing into such a file writes into the input's) or "symbolic".
        group_pattern: searched for in the files' names; its first group names the recording.
        overwrite: replace a different split in `output_dir`, once the new one is whole.
        workers: threads; without it one per core, at most 8.
        progress: None shows a bar on a terminal only.
        check: "decode" every picture once, or compare "contents" only, which passes over broken pictures.
    """
    settings = {
        "seed": seed,
        **_checked_ratios(train_ratio, val_ratio),
        "image_extensions": _checked_extensions(extensions),
        "group_pattern": group_pattern,
        "link": _one_of(LINKS, link, "link"),
        "check": _one_of(CHECKS, check, "check"),
    }
    source, target = _checked_places(input_dir, output_dir)
    pictures, notes = _find_pictures(source, settings["image_extensions"])
    recording_of = recordings(group_pattern, pictures, notes)
    workers = min(8, os.cpu_count() or 1) if workers is None else max(1, workers)
    split = _Split(source, target, pictures, settings, recording_of, workers, progress)

    old = _existing_split(target)
    if old is not None:
        difference = split.difference_from(old)
        if difference is None:
            return SplitReport.of(old, target, already_there=True)
        if not overwrite:
            raise UserError(
                f"{target} holds a different split: {difference}. "
                "Choose another --output_dir, or add --overwrite to replace it."
            )
    return SplitReport.of(split.make(notes + _leftovers(target)), target)


# ---- the work
@dataclass
class _Split:
    source: Path
    target: Path
    pictures: list[Picture]
    settings: dict
    recording_of: RecordingOf
    workers: int
    progress: bool | None

    def make(self, notes: list[str]) -> dict:
        """Write the split beside its final place and put it there; returns what split_info.json says."""
        self.target.parent.mkdir(parents=True, exist_ok=True)
        partial = _beside(self.target, "partial")
        shutil.rmtree(partial, ignore_errors=True)  # of a dead process that had our number
        try:
            sides = self._copy(partial) if self.settings["link"] == "copy" else self._link(partial)
            labels = labels_of(self._usable_persons())
            for person in {picture.person for picture in self.pictures} - labels.keys():
                for side in SIDES:
                    (partial / side / person).rmdir()
            settings = {"input_dir": str(self.source.resolve()), **self.settings}
            info = split_info(settings, person_folders(self.source), self.pictures, labels, sides)
            info["warnings"] += notes
            write_split_info(info, partial)
            _put_in_place(partial, self.target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        return info

    def difference_from(self, old: dict) -> str | None:
        """How this split would differ from the one that is there; None if that is the same, and complete."""
        for name, value in self.settings.items():
            if old.get(name) != value:
                return f"it was made with {name} {_shown(old.get(name))}, now {_shown(value)}"
        now = {picture.key: picture.bytes for picture in self.pictures}
        then = {key: entry["bytes"] for key, entry in old["files"].items()}
        changed = {key for key, _ in now.items() ^ then.items()}
        if not changed:
            faults = {entry["sha256"]: old["unreadable"].get(key, "") for key, entry in old["files"].items()}
            self._examine(faults=faults)
            entries = file_entries(self.pictures, self._sides())
            changed = {key for key, entry in entries.items() if entry != old["files"][key]}
        if changed:
            return (
                f"the input changed since, {counted(len(changed), 'file')}: {listed(sorted(changed, key=natural_key))}"
            )
        missing = _missing(self.target, old)
        return f"{counted(len(missing), 'file')} gone or changed: {listed(missing)}" if missing else None

    def _copy(self, partial: Path) -> dict[str, str]:
        """One pass over the data: a picture is written where it belongs, unless it turns out broken or twice there."""
        _check_space(self.target.parent, sum(picture.bytes for picture in self.pictures))
        self._make_folders(partial)
        planned = self._sides(self.pictures)
        self._examine(lambda picture, data: _write_file(f"{partial}/{planned[picture.key]}", picture, data))
        sides = self._sides()
        for key, side in sides.items():
            if side != planned[key]:
                (partial / planned[key] / key).rename(partial / side / key)
        return sides

    def _link(self, partial: Path) -> dict[str, str]:
        make_link = os.link if self.settings["link"] == "hard" else os.symlink
        self._make_folders(partial)
        _try_link(make_link, self.pictures[0].path, partial / "probe")
        self._examine()
        sides = self._sides()
        for picture in self.pictures:
            if not picture.fault:
                make_link(picture.path, f"{partial}/{sides[picture.key]}/{picture.key}")
        return sides

    def _make_folders(self, partial: Path) -> None:
        """Every person stands on both sides, so that listing either gives the same labels."""
        for side in SIDES:
            for person in {picture.person for picture in self.pictures}:
                (partial / side / person).mkdir(parents=True)

    def _sides(self, pictures: Sequence[Picture] | None = None) -> dict[str, str]:
        if pictures is None:
            pictures = [picture for picture in self.pictures if not picture.fault]
        return choose_sides(pictures, self.settings["val_ratio"], self.settings["seed"], self.recording_of)

    def _usable_persons(self) -> set[str]:
        persons = {picture.person for picture in self.pictures if not picture.fault}
        if not persons:
            broken = listed(f"{picture.key}: {picture.fault}" for picture in self.pictures)
            raise UserError(
                f"No picture in {self.source} can be used ({broken}). Check that the files came over whole."
            )
        return persons

    def _examine(
        self, write: Callable[[Picture, bytes], None] | None = None, faults: dict[str, str] | None = None
    ) -> None:
        """Read each picture once: hash, decode and, where asked, write the same bytes. `faults` are known by hash."""
        decode = self.settings["check"] == "decode"
        chosen = self.pictures
        if self.settings["link"] != "copy" and not decode:  # only files of equal length can have equal contents
            length = Counter(picture.bytes for picture in self.pictures)
            chosen = [picture for picture in self.pictures if length[picture.bytes] > 1 or not picture.bytes]

        def examine(picture: Picture) -> None:
            try:
                with io.FileIO(picture.path) as file:
                    data = file.readall()
            except OSError as error:
                picture.fault = f"cannot be read: {error.strerror}"
                return
            picture.fault = "" if data else "an empty file"
            picture.sha256 = hashlib.sha256(data).hexdigest()
            if faults and picture.sha256 in faults:
                picture.fault = faults[picture.sha256]
            elif decode and data:
                picture.fault, picture.size, picture.mode = _decoded(data)
            if write and not picture.fault:
                write(picture, data)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata and very large pictures
            _for_each(examine, chosen, self.workers, "splitting" if write else "checking", self.progress)


def _decoded(data: bytes) -> tuple[str, tuple[int, int] | None, str | None]:
    """A picture's fault (empty if it has none), size and mode; every pixel is decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            size, mode = image.size, image.mode
    except UnidentifiedImageError:
        return "not a picture that Pillow can read", None, None
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error … on broken files
        return f"cannot be decoded: {' '.join(str(error).split())}", None, None
    if min(size) < MIN_SIDE:
        return f"too small: {size[0]}x{size[1]} pixels", None, None
    return "", size, mode


def _for_each(function: Callable, items: Sequence, workers: int, what: str, progress: bool | None) -> None:
    """Call `function` on every item, in threads: reading, hashing, decoding and writing let go of the GIL."""
    from tqdm import tqdm

    def run(chunk: Sequence) -> int:
        for item in chunk:
            function(item)
        return len(chunk)

    chunks = [items[i : i + 32] for i in range(0, len(items), 32)]
    disable = None if progress is None else not progress
    with (
        ThreadPoolExecutor(workers) as pool,
        tqdm(total=len(items), desc=what, unit=" pictures", disable=disable) as bar,
    ):
        try:
            for done in pool.map(run, chunks):
                bar.update(done)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---- files
def _write_file(side_dir: str, picture: Picture, data: bytes) -> None:
    path = f"{side_dir}/{picture.key}"
    with io.FileIO(path, "x") as file:
        left = memoryview(data)
        while left:
            left = left[file.write(left) :]
    os.utime(path, ns=(picture.mtime_ns, picture.mtime_ns))


def _try_link(make_link: Callable, path: str, probe: Path) -> None:
    """Find out before the long work whether the disk makes such links."""
    try:
        make_link(path, probe)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        kind, other = ("hard", "symbolic") if make_link is os.link else ("symbolic", "hard")
        raise UserError(
            f"No {kind} link to {path} can be made in {probe.parent.parent}: {error.strerror}. "
            f"Use --link {other} or --link copy."
        ) from None
    probe.unlink()


def _check_space(directory: Path, needed: int) -> None:
    free = shutil.disk_usage(directory).free
    if needed > free:
        raise UserError(
            f"No space left for the split: {needed / 1e9:,.3f} GB needed, {free / 1e9:,.3f} GB free in {directory}. "
            "Free some space, choose another --output_dir, or use --link."
        )


def _beside(target: Path, word: str) -> Path:
    return target.with_name(f".{target.name}.{word}-{os.getpid()}")


def _put_in_place(partial: Path, target: Path) -> None:
    """Give the whole split its final name; an old one goes only then."""
    old = _beside(target, "old")
    if target.exists():
        try:
            target.rename(old)
        except OSError as error:
            instead = target / "data_split"
            raise UserError(f"{target} cannot be replaced: {error.strerror}. Try --output_dir {instead}") from None
    try:
        partial.rename(target)
    except BaseException:
        if old.exists():
            old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _leftovers(target: Path) -> list[str]:
    found = [folder for word in ("partial", "old") for folder in target.parent.glob(f".{target.name}.{word}-*")]
    return [f"{folder} was left by a run that was stopped, and can be deleted" for folder in sorted(found)]


# ---- what is there
def _find_pictures(source: Path, extensions: list[str]) -> tuple[list[Picture], list[str]]:
    """All pictures in the order of their names, and remarks on what else lies there."""
    if not source.is_dir():
        raise UserError(f"{no_such_folder(source)} Check --input_dir.")
    pictures, notes = [], []
    for person in person_folders(source):
        folder = source / person
        entries = picture_entries(folder, extensions)
        pictures += [_picture(person, entry) for entry in entries]
        if not entries:
            notes.append(f"{person} has no label: it holds no {either(extensions)} picture")
        others = other_files(folder, extensions)
        if others:
            notes.append(f"passed over in {person}: {listed(f'{n:,} .{kind}' for kind, n in others.most_common())}")
        inner = person_folders(folder)
        if inner:
            notes.append(f"the folders in {person} were not looked into: {listed(f'{name}/' for name in inner)}")
    if not pictures and (source / INFO_NAME).is_file():
        raise UserError(f"{source} is a split already. --input_dir is the folder that it was made from.")
    if not pictures:
        raise UserError(no_pictures(source, extensions))
    loose = picture_entries(source, extensions)
    if loose:
        names = listed(entry.name for entry in loose)
        notes.append(f"{counted(len(loose), 'picture')} in no person's folder, passed over: {names}")
    return pictures, notes


def _picture(person: str, entry: os.DirEntry) -> Picture:
    path = str(Path(entry.path).resolve()) if entry.is_symlink() else entry.path
    try:
        stat = entry.stat()
    except FileNotFoundError:  # a link that leads nowhere: reading it will say so
        return Picture(person, entry.name, path, 0, 0)
    return Picture(person, entry.name, path, stat.st_size, stat.st_mtime_ns)


def _existing_split(target: Path) -> dict | None:
    """The split that is in `target`, None if nothing is there; what is no split is never replaced."""
    if not target.exists():
        return None
    if not target.is_dir():
        raise UserError(f"{target} is a file. Choose another --output_dir.")
    names = sorted(path.name for path in target.iterdir())
    if not names:
        return None
    if INFO_NAME not in names:
        raise UserError(f"{target} is no split, it holds {listed(names)}. Choose an --output_dir that is new or empty.")
    info = read_split_info(target)
    own = {f"{entry['side']}/{key}" for key, entry in info["files"].items()}
    foreign = [name for name in names if name not in (*SIDES, INFO_NAME) and not name.startswith(".")]
    foreign += sorted(_split_files(target).keys() - own)
    if foreign:
        raise UserError(
            f"{target} holds more than its split: {listed(foreign)}. Move that away, or choose another --output_dir."
        )
    return info


def _split_files(target: Path) -> dict[str, int]:
    """The files under train/ and val/ with their lengths; −1 for a link that leads nowhere."""
    found = {}
    for side in SIDES:
        for folder, _, names in os.walk(target / side):
            place = Path(folder).relative_to(target).as_posix()
            for name in names:
                path = Path(folder, name)
                if not name.startswith("."):
                    found[f"{place}/{name}"] = path.stat().st_size if path.exists() else -1
    return found


def _missing(target: Path, info: dict) -> list[str]:
    """The files of a split that are gone, or have another length."""
    found = _split_files(target)
    wanted = {f"{e['side']}/{key}": e["bytes"] for key, e in info["files"].items() if e["side"]}
    return [name for name, length in wanted.items() if found.get(name) != length]


# ---- what was asked
def _checked_ratios(train_ratio: float, val_ratio: float) -> dict[str, float]:
    for name, ratio in (("train_ratio", train_ratio), ("val_ratio", val_ratio)):
        if not 0 < ratio < 1:
            raise UserError(f"--{name} {ratio:g} is not between 0 and 1: both sides need pictures. Try 0.8 and 0.2.")
    if abs(train_ratio + val_ratio - 1) > 1e-6:
        raise UserError(
            f"--train_ratio {train_ratio:g} and --val_ratio {val_ratio:g} add up to {train_ratio + val_ratio:g}, "
            f"not to 1. Try --val_ratio {1 - train_ratio:g}"
        )
    return {"train_ratio": train_ratio, "val_ratio": val_ratio}


def _checked_extensions(extensions: str | Sequence[str]) -> list[str]:
    asked = extensions.split(",") if isinstance(extensions, str) else extensions
    wanted = sorted({extension.strip().lower().removeprefix(".") for extension in asked} - {""})
    unknown = [extension for extension in wanted if not can_read(extension)]
    if unknown:
        raise UserError(f"Pillow reads no {either(unknown)} pictures. Use --image_extensions png,jpg,jpeg,bmp,webp …")
    if not wanted:
        raise UserError("--image_extensions names none. Use --image_extensions png,jpg,jpeg")
    return wanted


def _checked_places(input_dir: str | Path, output_dir: str | Path) -> tuple[Path, Path]:
    source, target = Path(input_dir).expanduser(), Path(output_dir).expanduser().resolve()
    real = source.resolve()
    place = None
    if target == real:
        place = "the same folder as"
    elif target.is_relative_to(real):
        place = "inside"
    elif real.is_relative_to(target):
        place = "around"
    if place:
        raise UserError(
            f"--output_dir {target} is {place} --input_dir {source}. Choose one apart from it, such as "
            f"{real.parent / 'data_split'}"
        )
    return source, target


def _one_of(choices: Sequence[str], value: str, flag: str) -> str:
    if value not in choices:
        raise UserError(f"--{flag} {value} is none of {', '.join(choices)}.")
    return value


def _shown(value: object) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)
