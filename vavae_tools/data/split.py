"""Image folders, one per person → train/, val/, test/ and split_info.json, without an image in two of them.

A hash of the seed and its name puts each person's images in an order, and the first ones validate: an image more moves
few others. The images of one recording stay together, and files with the same content, even under two persons.
"""

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from filelock import FileLock
from PIL import Image, UnidentifiedImageError

from vavae_tools.data import folders, split_report
from vavae_tools.data.folders import IMAGE_EXTENSIONS, count_of, either, natural_key
from vavae_tools.data.split_report import INFO_NAME, SUBSETS, ImageEntry, SplitReport
from vavae_tools.data.stored import pixel_hash, turn_upright, white_of
from vavae_tools.runtime.errors import UserError, in_home, join_first, one_line

RecordingOf = Callable[[ImageEntry], str | None]
LINKS = ("copy", "hard", "symbolic")
CHECKS = ("decode", "contents")
TEST_RATIO, IMAGES_TO_TEST = 0.2, 25  # five each to test, and as many as before to train with 75 in place of 60


def choose_subsets(
    images: Sequence[ImageEntry],
    val_ratio: float,
    seed: int | str,
    recording_of: RecordingOf = lambda image: None,
    test_ratio: float = 0,
) -> dict[str, str]:
    """Return the subset of each image by its key.

    The test subset is taken first, as val is from what is then left.

    Val's share of a person comes as near to `val_ratio` as whole units allow. A person with two units or more has at
    least one in each subset; a single unit goes to train.
    """
    if test_ratio:
        of_test = choose_subsets(images, test_ratio, f"{seed}/test", recording_of)
        rest = [image for image in images if of_test[image.key] != "val"]
        of_rest = choose_subsets(rest, val_ratio / (1 - test_ratio), seed, recording_of)
        return {image.key: of_rest.get(image.key, "test") for image in images}
    units = _units(images, recording_of)
    units_of = defaultdict(list)
    for unit in units:
        for person in {image.person for image in unit}:
            units_of[person].append(unit)
    lacking = {}  # how many images of a person val still lacks
    for person, n in Counter(image.person for image in images).items():
        lacking[person] = min(max(int(n * val_ratio + 0.5), 1), n - 1) if len(units_of[person]) > 1 else 0

    def hashed(unit: list[ImageEntry]) -> bytes:
        return hashlib.blake2b(os.fsencode(f"{seed}/{unit[0].key}"), digest_size=16).digest()

    in_val = set()  # keys of the units' first images
    for unit in sorted(units, key=hashed):
        share = Counter(image.person for image in unit) if len(unit) > 1 else {unit[0].person: 1}
        if sum(abs(lacking[person]) - abs(lacking[person] - n) for person, n in share.items()) > 0:
            in_val.add(unit[0].key)
            for person, n in share.items():
                lacking[person] -= n
    for person in sorted(units_of, key=natural_key):
        _balance_person(person, units_of, in_val)
    return {image.key: SUBSETS[unit[0].key in in_val] for unit in units for image in unit}


def _units(images: Sequence[ImageEntry], recording_of: RecordingOf) -> list[list[ImageEntry]]:
    """Return what must stay together: images of one recording of a person or with the same content."""
    parent = list(range(len(images)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first = {}
    for i, image in enumerate(images):
        recording = recording_of(image)
        for tie in filter(None, (image.sha256, image.pixels, recording and (image.person, recording))):
            parent[root(i)] = root(first.setdefault(tie, i))
    units = defaultdict(list)
    for i, image in enumerate(images):
        units[root(i)].append(image)
    return list(units.values())


def _balance_person(person: str, units_of: dict[str, list[list[ImageEntry]]], in_val: set[str]) -> None:
    """If all units of a person are in one subset, move the smallest that no other person needs there."""
    units = units_of[person]
    here = units[0][0].key in in_val
    if len(units) < 2 or any((unit[0].key in in_val) != here for unit in units):
        return

    def may_move(unit: list[ImageEntry]) -> bool:
        others = {image.person for image in unit} - {person}
        return all(sum((u[0].key in in_val) == here for u in units_of[other]) > 1 for other in others)

    if movable := list(filter(may_move, units)):
        in_val ^= {min(movable, key=len)[0].key}


def _recordings(group_pattern: str | None, images: Sequence[ImageEntry], notes: list[str]) -> RecordingOf:
    if group_pattern is None:
        notes += _look_like_recordings(images)
        return lambda image: None
    flag = f"--group_pattern {group_pattern!r}"
    try:
        pattern = re.compile(group_pattern)
    except re.error as error:
        raise UserError(f"{flag} is no regular expression: {error}.") from None
    if not pattern.groups:
        raise UserError(f"{flag} has no group. Put the part that names the recording in (…), as in '(rec[0-9]+)_'.")

    def recording_of(image: ImageEntry) -> str | None:
        match = pattern.search(image.name)
        return (match[1] or None) if match else None

    alone = [image.key for image in images if recording_of(image) is None]
    if len(alone) == len(images):
        raise UserError(f"{flag} fits none of the {len(alone):,} names, such as {alone[0]}.")
    if alone:
        notes.append(f"{count_of(len(alone), 'name')} without a recording, each on its own: {join_first(alone)}")
    return recording_of


_RUNNING = r"^(.+?)[-_ .]+[0-9]+\.[^.]+$"  # recording_017.png


def _look_like_recordings(images: Sequence[ImageEntry]) -> list[str]:
    """Return a line where most persons have several names with running numbers, of three images each or more."""
    series = defaultdict(lambda: defaultdict(list))
    for image in images:
        if match := re.search(_RUNNING, image.name):
            series[image.person][match[1]].append(image.name)
    several = [found for found in series.values() if len(found) > 1 and min(map(len, found.values())) > 2]
    if not several or len(several) < len({image.person for image in images}) / 2:
        return []
    (first, names), (second, _) = sorted(several[0].items())[:2]
    found = f"names such as {names[0]} and {names[1]} may be parts of one recording, {first} (another is {second})"
    why = "what validates would be all but known. If they are, keep them together with"
    return [f"{found}: {why} --group_pattern {shlex.quote(_RUNNING)}"]


def split_folders(
    input_dir: str | Path,
    output_dir: str | Path,
    train_ratio: float = 0.8,
    val_ratio: float = 0.2,
    seed: int = 0,
    extensions: Sequence[str] = IMAGE_EXTENSIONS,
    link: str = "copy",
    group_pattern: str | None = None,
    overwrite: bool = False,
    workers: int | None = None,
    progress: bool | None = True,
    check: str = "decode",
    test_ratio: float | None = 0.0,
) -> SplitReport:
    """Split the person folders in `input_dir` into `output_dir`/train and `output_dir`/val.

    Args:
        test_ratio: share of each person's images for `output_dir`/test, which nothing trains on or is chosen by; by
            default there is none; None: `TEST_RATIO` where each person has `IMAGES_TO_TEST`. Where train_ratio and
            val_ratio add up to 1 without it, both become smaller.
        link: "copy", "hard" (on one disk; writing into such a file writes into the input's) or "symbolic".
        group_pattern: searched for in the files' names; its first group names the recording.
        overwrite: replace a different split in `output_dir`, once the new one is whole.
        progress: None shows a bar on a terminal only.
        check: "decode" every image once, or compare "contents" only, which passes over broken images.
    """
    for flag, value, choices in (("link", link, LINKS), ("check", check, CHECKS)):
        if value not in choices:
            raise UserError(f"--{flag} {value} is none of {', '.join(choices)}.")
    asked = {"seed": seed, **_ratios(train_ratio, val_ratio, test_ratio or 0)}
    asked |= {"image_extensions": _checked_extensions(extensions), "group_pattern": group_pattern}
    asked |= {"link": link, "check": check}
    source, target = in_home(input_dir).absolute(), in_home(output_dir).resolve()
    real = source.resolve()
    if target.is_relative_to(real) or real.is_relative_to(target):
        hint = f"Choose another --output_dir, such as {real.parent / 'data_split'}"
        raise UserError(f"--output_dir {target} and --input_dir {source} are in each other. {hint}")
    if not folders.is_utf8(target):
        raise UserError(f"--output_dir {str(target)!a} is no UTF-8, which training needs. Choose another name.")
    others = _only_others(source) if asked["image_extensions"] == sorted(IMAGE_EXTENSIONS) else []
    asked["image_extensions"] = others or asked["image_extensions"]
    images, notes = _find_images(source, asked["image_extensions"])
    if test_ratio is None and min(Counter(image.person for image in images).values()) >= IMAGES_TO_TEST:
        asked |= _ratios(train_ratio, val_ratio, TEST_RATIO)
    if others:
        absent = f"there is no {either(IMAGE_EXTENSIONS)} image"
        notes.append(f"{absent}: those that end in {join_first(others, 9)} are taken")
    recording_of = _recordings(group_pattern, images, notes)
    workers = max(1, workers or min(8, os.cpu_count() or 1))
    split = _Split(source, target, images, asked, recording_of, workers, progress)

    name = hashlib.sha256(os.fsencode(f"{Path.home()} {target}")).hexdigest()[:16]  # this user's, on this machine
    with FileLock(Path(tempfile.gettempdir()) / f"vavae_tools_split_{name}.lock"):
        if existing := split_report.existing_split(target):
            difference = split.difference_from(*existing)
            if difference is None:
                return SplitReport.of(existing[0], target, already_there=True)
            if not overwrite:
                hint = "Choose another --output_dir, or add --overwrite to replace it."
                raise UserError(f"{target} holds a different split: {difference}. {hint}")
        return SplitReport.of(split.make(notes), target)


def _ratios(train_ratio: float, val_ratio: float, test_ratio: float) -> dict[str, float]:
    if not 0 <= test_ratio < 1:
        raise UserError(f"--test_ratio {test_ratio:g}: expected a share from 0 to below 1, such as 0.2")
    if test_ratio and abs(train_ratio + val_ratio - 1) <= 1e-6:
        train_ratio, val_ratio = (round(ratio * (1 - test_ratio), 9) for ratio in (train_ratio, val_ratio))
    if min(train_ratio, val_ratio) <= 0 or not abs(train_ratio + val_ratio + test_ratio - 1) <= 1e-6:
        found = f"--train_ratio {train_ratio:g} and --val_ratio {val_ratio:g}"
        found += f" and --test_ratio {test_ratio:g}" if test_ratio else ""
        raise UserError(f"{found}: expected numbers above 0 that add up to 1, such as 0.8 and 0.2")
    return {"test_ratio": test_ratio, "train_ratio": train_ratio, "val_ratio": val_ratio}


@dataclass
class _Split:
    source: Path
    target: Path
    images: list[ImageEntry]
    settings: dict
    recording_of: RecordingOf
    workers: int
    progress: bool | None

    def make(self, notes: list[str]) -> dict:
        """Write the split beside its final place and move it there; return what split_info.json says."""
        partial, old = (self.target.with_name(f".{self.target.name}.{word}") for word in ("partial", "old"))
        shutil.rmtree(partial, ignore_errors=True)  # of a run that was killed
        try:
            info = self._write(partial)
            info["warnings"] += notes
            files = ",\n".join(f"    {json.dumps(key)}: {json.dumps(entry)}" for key, entry in info["files"].items())
            head = json.dumps({**info, "files": {}}, indent=2).removesuffix("{}\n}")  # each file is one line
            (partial / INFO_NAME).write_text(f"{head}{{\n{files}\n  }}\n}}\n", encoding="utf-8")
            shutil.rmtree(old, ignore_errors=True)
            if self.target.exists():
                self.target.rename(old)
            partial.rename(self.target)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(old, ignore_errors=True)
        return info

    def _write(self, partial: Path) -> dict:
        """Copy or link each image to where it belongs in one pass; move those that broken ones and copies displace."""
        planned = self._subsets(with_faults=True)
        persons = {image.person for image in self.images}
        subsets = SUBSETS if self.settings["test_ratio"] else SUBSETS[:2]
        homes = [partial / subset / person for subset in subsets for person in persons]
        for home in homes:  # every person is in all, so that listing either gives the same labels
            home.mkdir(parents=True)

        def write(image: ImageEntry, data: bytes) -> None:
            path, kind = f"{partial}/{planned[image.key]}/{image.key}", self.settings["link"]
            if kind == "copy":
                with io.BufferedWriter(io.FileIO(path, "x")) as file:  # Path.open takes a fifth more time
                    file.write(data)
                return
            try:
                (os.link if kind == "hard" else os.symlink)(image.path, path)
            except OSError as error:
                problem = f"No {kind} link to {image.path} can be made in {self.target.parent}: {error.strerror}"
                raise UserError(f"{problem}. Use --link {'symbolic' if kind == 'hard' else 'hard'} or copy.") from None

        self._examine(write)
        subsets = self._subsets()
        for key, subset in subsets.items():
            if subset != planned[key]:
                (partial / planned[key] / key).rename(partial / subset / key)
        if not subsets:
            broken = join_first(f"{image.key}: {image.fault}" for image in self.images)
            raise UserError(f"No image in {self.source} can be used ({broken}). Check that the files are whole.")
        simulated = (self.source / "gait.json").is_file()
        settings = {"input_dir": str(self.source.resolve()), "simulated": simulated, **self.settings}
        info = split_report.split_info(settings, list(folders.persons(self.source)), self.images, subsets)
        for home in homes:
            if home.name not in info["labels"]:
                home.rmdir()
        return info

    def difference_from(self, old: dict, missing: list[str]) -> str | None:
        """Return how this split differs from an existing one, of which files may be missing; None if it does not."""
        for name, value in self.settings.items():
            before = old.get(name, 0 if name == "test_ratio" else None)  # an older split says nothing of it
            if before != value:
                was, now = (",".join(one) if isinstance(one, list) else one for one in (before, value))
                return f"it was made with {name} {was}, now {now}"
        then, faults, decode = old["files"], old["unreadable"], self.settings["check"] == "decode"
        known = {e["sha256"]: {"fault": faults.get(key, ""), "pixels": e.get("pixels")} for key, e in then.items()}
        self._examine(known={sha256: what for sha256, what in known.items() if any(what.values()) or not decode})
        now = split_report.file_entries(self.images, self._subsets())

        def differing(*what: str) -> list[str]:
            values = ([[entries.get(key, {}).get(name) for name in what] for entries in (now, then)] for key in keys)
            return [key for key, (new, old) in zip(keys, values, strict=True) if new != old]

        keys = sorted(now.keys() | then.keys(), key=natural_key)
        if changed := differing("bytes", "sha256"):
            return f"the input changed since, {count_of(len(changed), 'file')}: {join_first(changed)}"
        if changed := differing("side"):  # it is of before pixels were compared
            return f"files with the same pixels stand in both subsets: {join_first(changed)} belong elsewhere"
        return f"{count_of(len(missing), 'file')} gone or changed: {join_first(missing)}" if missing else None

    def _subsets(self, with_faults: bool = False) -> dict[str, str]:
        images = [image for image in self.images if with_faults or not image.fault]
        ratios = {name: self.settings[name] for name in ("val_ratio", "test_ratio")}
        return choose_subsets(images, seed=self.settings["seed"], recording_of=self.recording_of, **ratios)

    def _examine(self, write: Callable | None = None, known: dict[str, dict] | None = None) -> None:
        """Read each image once: hash, decode and, where asked, write the same bytes. `known` is by hash."""
        from tqdm.auto import tqdm  # not for --help

        decode = self.settings["check"] == "decode"
        read_all = decode or self.settings["link"] == "copy"
        length = Counter(image.bytes for image in self.images)

        def examine(part: Sequence[ImageEntry]) -> int:
            for image in part:
                data = b""
                if read_all or length[image.bytes] > 1 or not image.bytes:  # equal contents have equal lengths
                    try:
                        data = Path(image.path).read_bytes()
                    except OSError as error:
                        image.fault = f"cannot be read: {error.strerror}"
                        continue
                    image.fault = "" if data else "an empty file"
                    image.sha256 = hashlib.sha256(data).hexdigest()
                    found = (known or {}).get(image.sha256) or (_decoded(data) if decode and data else {})
                    for name, value in found.items():
                        setattr(image, name, value)
                if write and not image.fault:
                    write(image, data)
            return len(part)

        parts = [self.images[start : start + 32] for start in range(0, len(self.images), 32)]
        disable = None if self.progress is None else not self.progress
        bar = tqdm(total=len(self.images), desc="splitting" if write else "checking", unit=" images", disable=disable)
        with warnings.catch_warnings(), ThreadPoolExecutor(self.workers) as pool, bar:
            warnings.simplefilter("ignore")  # Pillow's remarks on odd metadata and very large images
            for done in pool.map(examine, parts):  # reading, hashing, decoding and writing let go of the GIL
                bar.update(done)


def _decoded(data: bytes) -> dict[str, Any]:
    """Return an image's fault (empty if it has none), or else how it is read; every pixel is decoded."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            turned = turn_upright(image)
            image.load()
            if min(image.size) < 2:
                return {"fault": f"too small: {image.width}x{image.height} pixels"}
            white, pixels = white_of(image), pixel_hash(image)
            return {"size": image.size, "turned": turned, "white": white, "pixels": pixels}
    except UnidentifiedImageError:
        return {"fault": "not an image that Pillow can read"}
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error … on broken files
        return {"fault": f"cannot be decoded: {one_line(error)}"}


def _only_others(source: Path) -> list[str]:
    """Return what the images end in where none of them has one of the usual endings."""
    if not source.is_dir() or any(folders.list_folders(source, IMAGE_EXTENSIONS).values()):
        return []
    names = (path.name for paths in folders.list_folders(source, folders.EXTENSIONS).values() for path in paths)
    return sorted({folders.extension_of(name) for name in names})


def _find_images(source: Path, extensions: list[str]) -> tuple[list[ImageEntry], list[str]]:
    """Return all images in the order of their names, and remarks on what else is there."""
    if not source.is_dir():
        raise UserError(f"{folders.no_such_folder(source)} Check --input_dir.")
    images, notes, passed = [], [], folders.passed_over(source)
    for person, names in folders.persons(source).items():
        if names != [person]:
            written = " and ".join(ascii(name)[1:-1] for name in names)
            notes.append(f"{person} is what the folder{'s' * (len(names) > 1)} {written} can be read as")
        taken = set()
        for entry in (entry for name in names for entry in folders.image_entries(source / name, extensions, passed)):
            path = str(Path(entry.path).resolve()) if entry.is_symlink() else entry.path
            with folders.folder_errors(source):
                length = entry.stat().st_size if entry.is_file() else 0  # of a link that leads nowhere, which is read
            stem, dot, ending = folders.as_text(entry.name).rpartition(".")
            free = (f"{stem}{f'_{n}' * (n > 1)}{dot}{ending}" for n in count(1))  # in two folders of one person
            taken.add(own := next(name for name in free if name not in taken))
            images.append(ImageEntry(person, own, path, length))
        if not taken:
            notes.append(f"{person} has no label: it holds no {either(extensions)} image")
        if others := sum((folders.other_files(source / name, extensions) for name in names), Counter()):
            kinds = join_first(f"{n:,} .{kind}" for kind, n in others.most_common())
            more = ",".join([*extensions, *(kind for kind in others if folders.can_read(kind))])
            hint = f" (--image_extensions {more} reads images)" if more != ",".join(extensions) else ""
            notes.append(f"passed over in {person}: {kinds}{hint}")
        if inner := [f"{below}/" for name in names for below in folders.person_folders(source / name)]:
            notes.append(f"the folders in {person} were not looked into: {join_first(inner)}")
        passed += [path for name in names for path in folders.passed_over(source / name)]
    if not images and (source / INFO_NAME).is_file():
        raise UserError(f"{source} is a split already. --input_dir is the folder that it was made from.")
    if not images:
        raise UserError(folders.explain_no_images(source, extensions))
    with_images = list(dict.fromkeys(image.person for image in images))
    folders.refuse_subsets_as_persons(source, with_images)
    alike = defaultdict(list)
    for person in with_images:
        alike[person.casefold()].append(person)
    for names in alike.values():
        if len(names) > 1:
            notes.append(f"{' and '.join(names)} are taken for {len(names)} persons: rename one if they are the same")
    notes += folders.note_of_passed(passed, source)
    if loose := [entry.name for entry in folders.image_entries(source, extensions)]:
        notes.append(f"{count_of(len(loose), 'image')} in no person's folder, passed over: {join_first(loose)}")
    return images, notes


def _checked_extensions(extensions: str | Sequence[str]) -> list[str]:
    asked = extensions.split(",") if isinstance(extensions, str) else extensions
    wanted = sorted({extension.strip().lower().removeprefix(".") for extension in asked} - {""})
    unknown = [extension for extension in wanted if not folders.can_read(extension)]
    if unknown or not wanted:
        problem = f"--image_extensions {','.join(asked)}: Pillow reads no {either(unknown or ['such'])} images"
        raise UserError(f"{problem}. Use --image_extensions png,jpg,jpeg,bmp,webp …")
    return wanted
