"""The split: every rule and every refusal, on images of a few pixels."""

import errno
import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import noise, refuses

from vavae_tools.data import split as split_module
from vavae_tools.data.datasets import ImageDataModule
from vavae_tools.data.folders import labels_of, natural_key
from vavae_tools.data.split import choose_subsets, split_folders
from vavae_tools.data.split_report import ImageEntry, read_split_info
from vavae_tools.runtime.errors import UserError

ROOT = Path(__file__).parents[1]
FORMATS = "png,bmp,webp,tiff"


def image(number: int, size=(8, 8), kind="PNG") -> bytes:
    """An encoded image, different for every number."""
    file = io.BytesIO()
    Image.fromarray(noise(*size, 3, seed=number)).save(file, kind)
    return file.getvalue()


def people(root: Path, *counts: int) -> Path:
    """Folders ID_1, ID_2 … with so many different images each."""
    for k, count in enumerate(counts):
        folder = root / f"ID_{k + 1}"
        folder.mkdir(parents=True)
        for i in range(count):
            (folder / f"p{i}.png").write_bytes(image(1000 * k + i))
    return root


def run(input_dir, output_dir, **options):
    return split_folders(input_dir, output_dir, progress=False, **options)


def subsets(output: Path) -> dict[str, str]:
    """File → subset, as it stands on the disk."""
    return {f"{p.parent.name}/{p.name}": p.parts[-3] for p in output.glob("*/*/*")}


def everything(root: Path) -> dict[str, bytes | None]:
    return {str(p.relative_to(root)): p.read_bytes() if p.is_file() else None for p in sorted(root.rglob("*"))}


def images_of(*counts: int) -> list[ImageEntry]:
    """Images p0 … of the persons A, B …, without files."""
    return [ImageEntry("ABCDEF"[k], f"p{i}", "", 1) for k, count in enumerate(counts) for i in range(count)]


# ---- which subset
def test_each_person_is_divided_by_the_ratio_and_the_info_file_says_how(tmp_path):
    source, out = people(tmp_path / "in", 10, 3), tmp_path / "out"
    report = run(source, out, seed=7)
    assert list(report.counts["ID_1"].values()) == [8, 2, 0] and list(report.counts["ID_2"].values()) == [2, 1, 0]
    assert report.totals == {"train": 10, "val": 3, "left_out": 0} and report.warnings == []
    assert sorted(subsets(out)) == sorted(f"{p.parent.name}/{p.name}" for p in source.glob("*/*"))
    assert len(list(out.glob("*/*/*"))) == 13  # every image once
    info = read_split_info(out)
    assert (info["seed"], info["train_ratio"], info["val_ratio"], info["version"]) == (7, 0.8, 0.2, 1)
    assert info["input_dir"] == str(source) and info["labels"] == {"ID_1": 0, "ID_2": 1}
    assert {key: entry["side"] for key, entry in info["files"].items()} == subsets(out)
    for key, entry in info["files"].items():
        data = (source / key).read_bytes()
        assert entry["sha256"] == hashlib.sha256(data).hexdigest() and entry["bytes"] == len(data)
        assert (out / entry["side"] / key).read_bytes() == data


def test_neither_the_place_nor_the_order_of_creation_nor_the_workers_matter(tmp_path):
    source = people(tmp_path / "in", 15, 15)
    (source / "ID_1/twin.png").write_bytes((source / "ID_2/p3.png").read_bytes())
    moved = tmp_path / "elsewhere" / "moved"
    for path in sorted(source.rglob("*.png"), key=lambda path: path.name[::-1]):
        (moved / path.parent.name).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, moved / path.parent.name)
    run(source, tmp_path / "a", workers=1)
    run(moved, tmp_path / "b", workers=5)
    run(source, tmp_path / "c", seed=1)
    assert subsets(tmp_path / "a") == subsets(tmp_path / "b") != subsets(tmp_path / "c")
    a, b = read_split_info(tmp_path / "a"), read_split_info(tmp_path / "b")
    assert a.pop("input_dir") != b.pop("input_dir")
    assert json.dumps(a) == json.dumps(b)


def test_this_split_stays_what_it_is_from_version_to_version():
    chosen = choose_subsets(images_of(10), 0.2, seed=0)
    assert [key for key, subset in chosen.items() if subset == "val"] == ["A/p4", "A/p8"]
    for count, val in [(1, 0), (2, 1), (3, 1), (7, 1), (8, 2), (150, 30)]:
        assert list(choose_subsets(images_of(count), 0.2, 0).values()).count("val") == val
    for seed in range(20):  # an image more leaves nearly all others where they are
        before, after = choose_subsets(images_of(50), 0.2, seed), choose_subsets(images_of(51), 0.2, seed)
        assert sum(before[key] != after[key] for key in before) <= 1


# ---- what belongs together
@pytest.mark.parametrize("seed", range(4))
def test_the_same_pixels_stand_on_one_side_whatever_the_file(tmp_path, seed):
    source = people(tmp_path / "in", 4, 4)
    for path in sorted(source.glob("*/*")):
        copied, turned, info = Image.open(path), Image.Exif(), PngInfo()
        turned[274] = 6
        info.add_text("Creation Time", path.name)
        copied.save(path.with_name(f"{path.stem}_again.png"), pnginfo=info)
        copied.save(path.with_suffix(".bmp"))
        copied.convert("RGBA").save(path.with_suffix(".webp"), lossless=True)
        copied.transpose(Image.Transpose.ROTATE_90).save(path.with_suffix(".tiff"), exif=turned)
    shutil.copy(source / "ID_1/p0.png", source / "ID_2/other.jpg")
    report = run(source, tmp_path / "out", seed=seed, extensions=f"{FORMATS},jpg")
    assert sorted(map(len, report.duplicates)) == [5] * 7 + [6]
    sides = subsets(tmp_path / "out")
    assert all(len({sides[key] for key in group}) == 1 for group in report.duplicates) and len(set(sides.values())) == 2
    mislabelled, turned = report.warnings
    assert "1 image under more than one person, so mislabelled: ID_1/p0.bmp = " in mislabelled
    assert turned == "8 images stored turned (EXIF orientation), read upright"


def test_a_split_from_before_pixels_were_compared_is_the_same_unless_they_leak(tmp_path):
    source, out, key = people(tmp_path / "in", 4, 4), tmp_path / "out", "ID_1/p0.bmp"
    Image.open(source / "ID_1/p0.png").save(source / key)
    run(source, out, extensions=FORMATS)
    info = read_split_info(out)
    for entry in info["files"].values():
        del entry["pixels"]
    (out / "split_info.json").write_text(json.dumps(info))
    assert run(source, out, extensions=FORMATS).already_there
    side = info["files"][key]["side"]
    other = info["files"][key]["side"] = "val" if side == "train" else "train"
    (out / side / key).rename(out / other / key)
    (out / "split_info.json").write_text(json.dumps(info))
    refused(tmp_path, f"same pixels stand in both subsets: {key}", source, extensions=FORMATS)


def test_a_recording_stays_on_one_side(tmp_path):
    source = people(tmp_path / "in", 20, 20)
    for path in list(source.glob("*/*")):
        path.rename(path.with_name(f"rec{int(path.stem[1:]) // 4}_{path.name}"))
    (source / "ID_1/alone.png").write_bytes(image(50))
    report = run(source, tmp_path / "out", group_pattern=r"^(rec\d+)_")
    assert report.warnings == ["1 name without a recording, each on its own: ID_1/alone.png"]
    assert len({(key.rpartition("_")[0], side) for key, side in subsets(tmp_path / "out").items()}) == 10 + 1
    assert report.counts["ID_2"] == {"train": 16, "val": 4, "left_out": 0}  # one recording of four


def test_recordings_and_twins_are_taken_together():
    images = images_of(6)
    images[0].sha256 = images[2].sha256 = "x"  # recordings 0 1 | 2 3 | 4 5; an image is in the first two
    for seed in range(10):
        chosen = choose_subsets(images, 0.3, seed, lambda p: str(int(p.name[1:]) // 2))
        assert len({chosen[f"A/p{i}"] for i in range(4)}) == 1
        assert chosen["A/p4"] == chosen["A/p5"] == "val" != chosen["A/p0"]


@pytest.mark.parametrize("seed", range(10))
def test_persons_who_share_images_have_both_sides(seed):
    images = images_of(2, 2, 1, 9)
    images[0].sha256 = images[2].sha256 = "x"  # A/p0 = B/p0
    images[1].sha256 = images[3].sha256 = images[4].sha256 = "y"  # A/p1 = B/p1 = C/p0
    chosen = choose_subsets(images, 0.2, seed)
    assert chosen["A/p0"] == chosen["B/p0"] != chosen["A/p1"] == chosen["B/p1"] == chosen["C/p0"]
    assert [subset for key, subset in chosen.items() if key[0] == "D"].count("val") == 2


# ---- what is named in the report
def test_what_cannot_be_used_is_left_out_and_named(tmp_path):
    source = people(tmp_path / "in", 5, 5)
    broken = {
        "ID_1/cut.jpg": (image(77, (64, 64), "JPEG")[:2000], "cannot be decoded: image file is truncated"),
        "ID_1/empty.jpg": (b"", "an empty file"),
        "ID_1/text.png": (b"no image", "not an image that Pillow can read"),
        "ID_2/cut.png": (image(78, (64, 64))[:-400], "cannot be decoded: "),
        "ID_2/dot.png": (image(79, (1, 1)), "too small: 1x1 pixels"),
    }
    for key, (data, _) in broken.items():
        (source / key).write_bytes(data)
    (source / "ID_2/gone.png").symlink_to(tmp_path / "nowhere.png")
    report = run(source, tmp_path / "out")
    (source / "ID_2/gone.png").unlink()
    broken["ID_2/gone.png"] = (b"", "cannot be read: No such file or directory")
    assert report.unreadable.keys() == broken.keys()
    assert all(
        report.unreadable[key].startswith(why) and f"left out: {key}: {why}" in str(report)
        for key, (_, why) in broken.items()
    )
    assert report.totals == {"train": 8, "val": 2, "left_out": 6} and len(subsets(tmp_path / "out")) == 10
    info = read_split_info(tmp_path / "out")
    assert info["unreadable"] == report.unreadable and info["files"]["ID_1/cut.jpg"]["side"] is None
    report = run(source, tmp_path / "contents", check="contents", link="hard")  # passes over all but empty files
    assert report.unreadable == {"ID_1/empty.jpg": "an empty file"} and report.sizes == {}


def test_persons_without_a_subset_and_other_files_are_named(tmp_path):
    source = people(tmp_path / "in", 3, 0, 1, 1)
    for k, name in ((3, "Anna"), (4, "anna")):
        (source / f"ID_{k}").rename(source / name)
    shutil.copy(source / "anna/p0.png", source / "anna/again.png")
    (source / "Anna/p.webp").write_bytes(image(9, kind="WEBP"))
    (source / "ID_1/notes.txt").write_text("x")
    (source / "ID_1/session").mkdir()
    (source / "stray.png").write_bytes(image(90))
    (source / ".ipynb_checkpoints").mkdir()
    report = run(source, tmp_path / "out")
    assert report.warnings == [
        "Anna has one image: it is in train, and val has none",
        "anna has nothing in val: its 2 images are identical or of one recording, all in train",
        "passed over in Anna: 1 .webp (--image_extensions jpeg,jpg,png,webp reads images)",
        "passed over in ID_1: 1 .txt",
        "the folders in ID_1 were not looked into: session/",
        "ID_2 has no label: it holds no jpeg, jpg or png image",
        "Anna and anna are taken for 2 persons: rename one if they are the same",
        "1 image in no person's folder, passed over: stray.png",
    ]
    assert report.labels == {"Anna": 0, "ID_1": 1, "anna": 2}
    for subset in ("train", "val"):  # so that a listing of either gives the same labels
        assert sorted(p.name for p in (tmp_path / "out" / subset).iterdir()) == ["Anna", "ID_1", "anna"]


def test_the_report_is_a_table_and_says_what_is_next(tmp_path):
    source = people(tmp_path / "in", *[5] * 10)
    Path(os.fsdecode(os.fsencode(source) + b"/ID_1/\xff.png")).write_bytes(b"a name that is no text")
    lines = str(run(source, tmp_path / "my out")).splitlines()
    assert lines[0].split() == ["person", "label", "train", "val", "left", "out"]
    assert [line.split()[0] for line in lines[1:11]] == [f"ID_{k}" for k in range(1, 11)]  # ID_2 before ID_10
    assert len({len(line) for line in lines[:12]}) == 1 and lines[11].split() == ["total", "40", "10", "1"]
    assert any("ID_1/ÿ.png" in line for line in lines)
    following = f"--data_dir '{tmp_path}/my out' --original_vavae small"
    assert lines[-1] == f"next: python minimal_training_modification.py {following}"


# ---- labels and folders
def test_labels():
    assert labels_of(["ID_31", "ID_1", "ID_2"]) == {"ID_1": 0, "ID_2": 1, "ID_31": 30}
    assert labels_of(["ID_0", "ID_1"]) == {"ID_0": 0, "ID_1": 1}
    assert labels_of(["ID_10", "ID_2", "x"]) == {"ID_2": 0, "ID_10": 1, "x": 2}
    refuses("ID_01 and ID_1 would have the same label", labels_of, ["ID_1", "ID_01"])
    assert sorted(["b", "a10", "a2", "2", "10", "a"], key=natural_key) == ["2", "10", "a", "a2", "a10", "b"]


def test_one_name_written_in_several_ways_is_one_person(tmp_path):
    source = tmp_path / "in"
    for number, name in enumerate((b"Jos\xc3\xa9", b"Jose\xcc\x81", b"Jos\xe9", b"Ana")):
        folder = Path(os.fsdecode(os.fsencode(source) + b"/" + name))
        folder.mkdir(parents=True)
        for i in range(3):
            (folder / f"p{i}.png").write_bytes(image(10 * number + i))
    report = run(source, tmp_path / "out")
    assert report.labels == {"Ana": 0, "Jos\u00e9": 1} and report.totals == {"train": 9, "val": 3, "left_out": 0}
    assert report.warnings == ["José is what the folders Jose\\u0301 and Jos\\xe9 and Jos\\udce9 can be read as"]
    assert len(subsets(tmp_path / "out")) == 12 and all(path.stat().st_size for path in tmp_path.rglob("*.png"))
    assert run(source, tmp_path / "out").already_there
    written = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9")
    refused(tmp_path, "is no UTF-8, which training needs", source, Path(written))


def test_what_programs_keep_beside_images_is_no_person(tmp_path):
    source = people(tmp_path / "in", 3, 3)
    for name in ("@eaDir", "_thumbs", "lost+found", ".cache"):
        shutil.copytree(source / "ID_1", source / name)
    (source / "loop").symlink_to("..")
    (source / "here").symlink_to(".")
    os.mkfifo(source / "ID_1/pipe.png")
    for copy in ("thumb_p0.jpg", "p1.thumb.png", "._p2.png"):
        (source / "ID_1" / copy).write_bytes(image(7))
    shutil.copytree(source / "ID_2", source / "ID_2/Previews")
    report = run(source, tmp_path / "out")
    assert report.labels == {"ID_1": 0, "ID_2": 1} and report.totals == {"train": 4, "val": 2, "left_out": 0}
    passed = "6 passed over, thumbnails or of programs: @eaDir/, _thumbs/, lost+found/ and 3 more"
    assert report.warnings == [passed]


@pytest.mark.parametrize("read", [ImageDataModule, lambda source: run(source, source.parent / "out")])
def test_a_folder_that_cannot_be_read_does_not_vanish(tmp_path, monkeypatch, read):
    source, scandir = people(tmp_path / "in", 3, 3), os.scandir

    def refusing(folder):
        if Path(folder).name == "ID_2":
            raise PermissionError(errno.EACCES, "Permission denied", str(folder))
        return scandir(folder)

    with monkeypatch.context() as patch:
        patch.setattr(os, "scandir", refusing)
        refuses(r"The folder .*ID_2 cannot be read \(Permission denied\): make it", read, source)
    (source / "ID_3").symlink_to("/gone")
    refuses(r"The folder .*ID_3 cannot be read \(a link to /gone, which is gone\): make it", read, source)


def test_images_of_other_formats_alone_are_taken(tmp_path):
    for path in sorted(people(tmp_path / "in", 4, 4).glob("*/*")):
        Image.open(path).save(path.with_suffix(".webp"))
        path.unlink()
    report = run(tmp_path / "in", tmp_path / "out")
    assert report.totals == {"train": 6, "val": 2, "left_out": 0}
    assert report.warnings == ["there is no png, jpg or jpeg image: those that end in webp are taken"]
    assert run(tmp_path / "in", tmp_path / "out").already_there


def in_subsets(root: Path, names) -> tuple[Path, Path]:
    """Folders with so named ones of people in them, and of images."""
    for name in names:
        people(root / "deep" / name, 2, 2)
        (people(root / "flat", 2) / "ID_1").rename(root / "flat" / name)
    return root / "deep", root / "flat"


@pytest.mark.parametrize("beside", ["", "ID_1", "ID_2"])
def test_what_validates_does_not_train_where_nothing_is_named_train(tmp_path, beside):
    deep, flat = in_subsets(tmp_path, ("Test", "val"))
    if beside:
        shutil.copytree(deep / "val/ID_1", deep / beside)
    words = f"Test holds the folders {beside} as" if beside else "holds Test/, val/, and no person's folder in train/"
    refuses(words, ImageDataModule, deep)
    refuses("Test/, val/ hold images of their own, and are subsets, no persons", ImageDataModule, flat)
    refused(tmp_path, "are subsets, no persons", flat)


@pytest.mark.parametrize(
    "names",
    [
        *(("Train", "Test"), ("training", "testing"), ("TRAIN_SET", "Val"), ("01_train", "02_test")),
        *(("x_trn", "hold-out"), ("images_train", "images_test"), ("train2017", "val2017")),
    ],
)
def test_subsets_are_no_persons(tmp_path, names):
    deep, flat = in_subsets(tmp_path, names)
    refused(tmp_path, f"{names[0]}/, {names[1]}/ hold images of their own, and are subsets, no persons", flat)
    refused(tmp_path, f"Try --input_dir {deep}/{names[0]}", deep)
    refuses("are subsets, no persons", ImageDataModule, flat)
    data = ImageDataModule(deep)
    assert (data.train_data.folder.name, data.val_data.folder.name) == names and data.labels == {"ID_1": 0, "ID_2": 1}


# ---- a test subset
def test_a_test_subset_is_kept_from_both_and_names_nothing_else(tmp_path):
    source = people(tmp_path / "in", 20, 20, 2)
    report = run(source, tmp_path / "out", test_ratio=0.2)
    assert report.totals == {"train": 27, "val": 6, "test": 9, "left_out": 0}
    assert report.counts["ID_1"] == {"train": 13, "val": 3, "test": 4, "left_out": 0}
    assert report.warnings == ["ID_3 has nothing in val: it has 2 images, all in train and test"]
    assert "27 images to train, 6 to validate, 9 to test" in str(report) and " val  test  left out" in str(report)
    info = json.loads((tmp_path / "out/split_info.json").read_text())
    assert (info["train_ratio"], info["val_ratio"], info["test_ratio"]) == (0.64, 0.16, 0.2)
    assert run(source, tmp_path / "out", test_ratio=0.2).already_there
    refused(tmp_path, "it was made with test_ratio 0.2, now 0", source, tmp_path / "out")
    data = ImageDataModule(tmp_path / "out", 16, progress=False)
    assert [len(each) for each in (data.train_data, data.val_data, data.test_data)] == [27, 6, 9]
    names = [set(each.names) for each in (data.train_data, data.val_data, data.test_data)]
    assert not names[0] & names[1] and not names[2] & (names[0] | names[1])
    known = data.fingerprint()
    next((tmp_path / "out/test/ID_1").iterdir()).unlink()
    assert ImageDataModule(tmp_path / "out", 16, progress=False).fingerprint() == known  # it is of what trains


@pytest.mark.parametrize(("fewest", "tested"), [(24, 0), (25, 5)])
def test_a_notebooks_split_has_a_test_subset_where_there_are_images_enough(tmp_path, fewest, tested):
    report = run(people(tmp_path / "in", fewest, 30), tmp_path / "out", test_ratio=None)
    assert report.counts["ID_1"].get("test", 0) == tested and (tmp_path / "out/test").is_dir() == bool(tested)


def test_one_recording_is_in_one_of_three_subsets(tmp_path):
    source = tmp_path / "in" / "ID_1"
    source.mkdir(parents=True)
    for i in range(40):
        (source / f"rec{i // 4}_{i % 4}.png").write_bytes(image(i))
    run(tmp_path / "in", tmp_path / "out", test_ratio=0.3, group_pattern="(rec[0-9]+)_")
    where = {}
    for path in (tmp_path / "out").glob("*/*/*.png"):
        where.setdefault(path.name.partition("_")[0], set()).add(path.parts[-3])
    assert len(where) == 10 and all(len(subset) == 1 for subset in where.values())
    assert sorted(subset for each in where.values() for subset in each).count("test") == 3


@pytest.mark.parametrize(
    ("names", "warns"),
    [
        (["walk1_{}", "walk2_{}"], True),
        (["2024-05-01 a-{}", "2024-05-02 a-{}"], True),
        (["walk_{}"], False),
        (["{}"], False),
        (["p{}", "q{}"], False),
    ],
)
def test_names_that_look_like_recordings_are_pointed_at(tmp_path, names, warns):
    for person in (1, 2):
        (tmp_path / f"in/ID_{person}").mkdir(parents=True)
        for j, name in enumerate(names):
            for i in range(3):
                (tmp_path / f"in/ID_{person}" / f"{name.format(i)}.png").write_bytes(image(100 * person + 10 * j + i))
    (found,) = run(tmp_path / "in", tmp_path / "out").warnings or [""]
    assert ("may be parts of one recording" in found) == warns
    if warns:
        pattern = shlex.split(found)[-1]
        assert not run(tmp_path / "in", tmp_path / "groups", group_pattern=pattern).warnings[1:]


# ---- links
@pytest.mark.parametrize("check", ["decode", "contents"])
@pytest.mark.parametrize("link", ["hard", "symbolic"])
def test_links_give_the_same_split_as_copies(tmp_path, monkeypatch, link, check):
    monkeypatch.chdir(tmp_path)
    source = people(Path("in"), 6, 6)
    (source / "ID_1/via.png").symlink_to("../ID_2/p0.png")
    run(source, tmp_path / "copies", check=check)
    run(source, tmp_path / "links", link=link, check=check)
    assert subsets(tmp_path / "links") == subsets(tmp_path / "copies")
    for path in (tmp_path / "links").glob("*/*/*.png"):
        original = source / path.parent.name / path.name
        assert path.samefile(original) and path.is_symlink() == (link == "symbolic")


# ---- refusals
def refused(tmp_path: Path, words: str, input_dir: Path, output_dir: Path | None = None, **options) -> None:
    """The call raises a `UserError` with these words in it and changes nothing on the disk."""
    before = everything(tmp_path)
    refuses(re.escape(words), run, input_dir, output_dir or tmp_path / "out", **options)
    assert everything(tmp_path) == before


def test_folders_that_are_none_and_what_to_try_instead(tmp_path):
    source = people(tmp_path / "in", 2)
    people(tmp_path / "zip" / "images", 3, 3)
    for k in (1, 2):
        people(tmp_path / f"deep/ID_{k}", 2)
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/a.png").write_bytes(image(1))
    for folder, words in (
        ("inn", f"No such folder: {tmp_path}/inn. {tmp_path} holds 4 folders, deep/, flat/, in/ and 1 more."),
        ("in/ID_1/p0.png", "is a file"),
        ("in/ID_1", f"It looks like one person's folder. Try --input_dir {tmp_path}/in"),
        ("zip", f"in {tmp_path}/zip; it holds 1 folder, images/. Try --input_dir {tmp_path}/zip/images"),
        ("deep", "too deep, in ID_1/ID_1/"),
        ("flat", f"into a folder of their own: {tmp_path}/flat/ID_1"),
    ):
        refused(tmp_path, words, tmp_path / folder)
    (source / "ID_1/x.txt").write_text("")
    words = f"No bmp or jpg image in {source}; it holds 2 .png, 1 .txt. Try --image_extensions png"
    refused(tmp_path, words, source, extensions=("jpg", "bmp"))
    for path in source.glob("ID_1/*.png"):
        path.write_bytes(b"x")
    refused(tmp_path, "can be used (ID_1/p0.png: not an image", source)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"train_ratio": 0.7, "val_ratio": 0.2}, "--train_ratio 0.7 and --val_ratio 0.2: expected numbers"),
        ({"test_ratio": 1}, "--test_ratio 1: expected a share from 0 to below 1"),
        (
            {"train_ratio": 0.6, "test_ratio": 0.1},
            "--train_ratio 0.6 and --val_ratio 0.2 and --test_ratio 0.1: expected",
        ),
        ({"train_ratio": 1.2, "val_ratio": -0.2}, "--train_ratio 1.2"),
        ({"extensions": "png,xyz"}, "Pillow reads no xyz images"),
        ({"extensions": " ,"}, "--image_extensions"),
        ({"link": "move"}, "--link move is none of copy, hard, symbolic"),
        ({"check": "none"}, "--check none is none of decode, contents"),
        ({"group_pattern": "("}, "is no regular expression"),
        ({"group_pattern": "rec"}, "has no group"),
        ({"group_pattern": "(rec)"}, "fits none of the 3 names, such as ID_1/p0.png"),
    ],
)
def test_settings_that_cannot_be(tmp_path, options, words):
    refused(tmp_path, words, people(tmp_path / "in", 3), **options)


def test_output_that_is_no_place_for_a_split(tmp_path):
    source = people(tmp_path / "in", 3)
    (tmp_path / "link").symlink_to(source)
    for target in (source, source / "split", tmp_path, tmp_path / "link/split"):
        refused(tmp_path, "are in each other", source, target)
    for folder in ("out", "empty"):
        (tmp_path / folder).mkdir()
    (tmp_path / "out/thesis.tex").write_text("mine")
    refused(tmp_path, "is no split, it holds thesis.tex", source, overwrite=True)
    refused(tmp_path, "is a file", source, tmp_path / "out/thesis.tex", overwrite=True)
    run(source, tmp_path / "empty", extensions=".PNG, png", train_ratio=1 - 1 / 3, val_ratio=0.3333333)
    refused(tmp_path, "is a split already", tmp_path / "empty", tmp_path / "again")


# ---- a split that is there already
@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("check", ["decode", "contents"])
def test_the_same_split_is_left_as_it_is(tmp_path, monkeypatch, check, overwrite):
    source = people(tmp_path / "in", 4, 4)
    (source / "ID_1/broken.png").write_bytes(b"")
    first = run(source, tmp_path / "out", check=check)
    before = {p: p.stat().st_ino for p in (tmp_path / "out").rglob("*")}
    monkeypatch.setattr(split_module, "_decoded", lambda data: pytest.fail("known images are not decoded again"))
    again = run(source, tmp_path / "out", check=check, overwrite=overwrite)
    assert again == replace(first, already_there=True) and "already there, left as it is" in str(again)
    assert {p: p.stat().st_ino for p in (tmp_path / "out").rglob("*")} == before


def test_a_different_split_is_replaced_only_when_asked_and_a_users_file_is_never_lost(tmp_path):
    source = people(tmp_path / "in", 6)
    run(source, tmp_path / "out")
    refused(tmp_path, "holds a different split: it was made with seed 0, now 3", source, seed=3)
    refused(tmp_path, "image_extensions jpeg,jpg,png, now png", source, extensions=("png",))
    old = (source / "ID_1/p0.png").read_bytes()
    (source / "ID_1/p0.png").write_bytes(old[:-1] + bytes([old[-1] ^ 1]))  # of equal length
    refused(tmp_path, "the input changed since, 1 file: ID_1/p0.png", source)
    (source / "ID_1/p0.png").write_bytes(old)
    (source / "ID_1/new.png").write_bytes(image(99))
    refused(tmp_path, "the input changed since, 1 file: ID_1/new.png", source)
    assert run(source, tmp_path / "out", seed=3, overwrite=True).totals["train"] == 6
    assert read_split_info(tmp_path / "out")["seed"] == 3
    lost = next((tmp_path / "out/train").rglob("*.png"))
    lost.unlink()
    refused(tmp_path, f"1 file gone or changed: train/ID_1/{lost.name}", source, seed=3)
    run(source, tmp_path / "out", seed=3, overwrite=True)
    assert lost.exists() and sorted(p.name for p in tmp_path.iterdir()) == ["in", "out"]
    (tmp_path / "out/train/ID_1/mine.png").write_bytes(b"mine")
    refused(tmp_path, "holds more than its split: train/ID_1/mine.png", source, overwrite=True, seed=1)


def test_of_two_splits_at_once_into_one_folder_one_is_written(tmp_path):
    source = people(tmp_path / "in", 30, 30)
    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(run, source, tmp_path / "out", seed=seed, workers=1) for seed in range(4)]
    (written,) = [seed for seed, one in enumerate(running) if one.exception() is None]
    assert read_split_info(tmp_path / "out")["seed"] == written and len(subsets(tmp_path / "out")) == 60
    words = f"holds a different split: it was made with seed {written}, now "
    others = [one.exception() for seed, one in enumerate(running) if seed != written]
    assert all(isinstance(error, UserError) and words in str(error) for error in others)


def test_a_damaged_or_missing_info_file(tmp_path):
    for content, words in (("", "is damaged"), ("{", "is damaged"), ('{"version": 99}', "has version 99, expected 1")):
        (tmp_path / "split_info.json").write_text(content)
        refuses(words, read_split_info, tmp_path)
    source = people(tmp_path / "in", 1)
    refuses(f"but holds images. Make one with .* --input_dir {source} --output_dir data_split", read_split_info, source)


# ---- a full disk
@pytest.mark.parametrize("fault", [OSError(errno.ENOSPC, "No space left"), KeyboardInterrupt()])
def test_a_full_disk_or_a_stop_leaves_nothing_half(tmp_path, monkeypatch, fault):
    source, write = people(tmp_path / "in", 20), io.FileIO
    run(source, tmp_path / "out")
    before = everything(tmp_path)

    def failing(path, mode):
        if path.endswith("ID_1/p9.png"):
            raise fault
        return write(path, mode)

    with monkeypatch.context() as patch, pytest.raises(type(fault)):
        patch.setattr(split_module.io, "FileIO", failing)
        run(source, tmp_path / "out", seed=1, overwrite=True, workers=4)
    assert everything(tmp_path) == before
    (tmp_path / ".out.partial" / "train").mkdir(parents=True)  # of a run that was killed
    run(source, tmp_path / "out", seed=1, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "out"]


# ---- the command
def test_the_command_as_people_type_it(here):
    for path in sorted(people(here / "in", 4, 4).glob("*/*")):
        path.rename(path.with_name(f"rec{int(path.stem[1:]) // 2}_{path.name}"))
    asked = "--input_dir in --train_ratio 0.8 --val_ratio 0.2 --image_extensions png,jpg,jpeg --seed 5 --link symbolic"
    asked += r" --group_pattern (rec\d) --check contents --workers 2 --overwrite"
    for words, status, said in (
        (asked, 0, "written: 4 images to train, 4 to validate"),
        (asked, 0, "already there"),
        ("--input_dir in --seed 1", 2, ""),
    ):
        command = [sys.executable, str(ROOT / "data_split.py"), *words.split()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == status and said in done.stdout
        assert done.stderr.count("\n") == done.stderr.startswith("error: ") == bool(status)
    info = read_split_info("data_split")  # where --output_dir is not given
    wanted = {"seed": 5, "link": "symbolic", "group_pattern": r"(rec\d)", "check": "contents"}
    assert {key: info[key] for key in wanted} == wanted
