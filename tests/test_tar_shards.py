"""Pictures in tar files: found by headers, read by their place, the same as those in folders; what is damaged."""

import gzip
import io
import multiprocessing
import os
import pickle
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vavae_tools.data import images as decoded
from vavae_tools.data.datasets import picture_data
from vavae_tools.data.images import EXTENSIONS
from vavae_tools.data.sources import webdataset as tar_index
from vavae_tools.data.sources.webdataset import index_shard
from vavae_tools.runtime.errors import UserError


def picture(seed: int, kind: str = "png", size: int = 8) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, format={"jpg": "jpeg"}.get(kind, kind))
    return file.getvalue()


def pack(path: Path, members: dict[str, bytes | str], form: int = tarfile.USTAR_FORMAT, mtime: float = 7) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members.items():
            content = content.encode() if isinstance(content, str) else content
            member = tarfile.TarInfo(name)
            member.size, member.mtime = len(content), mtime
            tar.addfile(member, io.BytesIO(content))
    return path


def labelled(count: int, first: int = 0, classes: int = 3) -> dict[str, bytes | str]:
    """`count` pictures with numbers beside them."""
    members = {}
    for i in range(first, first + count):
        members |= {f"{i:05d}.png": picture(i), f"{i:05d}.cls": f"{i % classes}\n"}
    return members


def folders(root: Path, counts: dict[str, int]) -> dict[str, bytes]:
    """A folder per class; what is in it, in its order."""
    found = {}
    for number, (name, count) in enumerate(counts.items()):
        for i in range(count):
            found[f"{name}/{i}.png"] = picture(100 * number + i, size=8 + i % 3)
    for name, content in found.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return found


def sides(data) -> list:
    return [side for side in (data.train_data, data.val_data) if side is not None]


# ---- the same as in folders


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("above", ["", "./", "train/"])
def test_a_tar_of_class_folders_is_read_as_the_folders(tmp_path, form, above):
    """Same classes, names, sides held out, order, batches."""
    members = list(folders(tmp_path / "f", {"ape": 7, "zebra": 5, "né": 3}).items())
    members.sort(key=lambda member: ["ape", "né", "zebra"].index(member[0].split("/")[0]))
    for number, start in enumerate((0, 6, 11)):
        part = members[start : (*(6, 11), None)[number]]
        pack(tmp_path / "t" / f"p-{number}.tar", {above + name: content for name, content in part}, form, mtime=1.5)
    a, b = (picture_data(tmp_path / kind, 8, batch_size=4, val_share=0.2, seed=3) for kind in "ft")
    assert a.labels == b.labels == {"ape": 0, "né": 1, "zebra": 2}
    for files, tars in zip(sides(a), sides(b), strict=True):
        assert tars.names == files.names and torch.equal(tars.labels, files.labels)
        assert [tars.shards[n].read(*place) for n, *place in tars.stored(range(len(tars)))] == [
            path.read_bytes() for path in files.paths
        ]
    for one, other in zip([*a.train_dataloader()], [*b.train_dataloader()], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_from_the_disk_are_those_from_memory(tmp_path, monkeypatch, workers):
    pack(tmp_path / "0.tar", labelled(9))
    pack(tmp_path / "1.tar", labelled(8, first=9))
    batches = []
    for limit in (2**30, 0):
        monkeypatch.setattr(decoded, "MEMORY_LIMIT", limit)
        data = picture_data(tmp_path, 8, batch_size=4, num_workers=workers, val_share=0.2)
        batches.append([*data.train_dataloader(), *data.val_dataloader()])
        assert (data.train_data._memory is None) == (limit == 0)
    assert len(batches[0]) == len(batches[1]) == 4
    for one, other in zip(*batches, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def _fingerprint(data, places, queue) -> None:
    queue.put(data.__getitems__(places)["pictures"].sum((1, 2, 3)).tolist())


def test_processes_read_at_the_same_time(tmp_path, monkeypatch):
    """From a file that is open already, without a place in it that they would share."""
    pack(tmp_path / "0.tar", labelled(20))
    data = picture_data(tmp_path, 8, val_share=0).train_data
    expected = data.in_memory().sum((1, 2, 3)).tolist()
    data._memory = None
    monkeypatch.setattr(decoded, "MEMORY_LIMIT", 0)
    assert data.__getitems__([0])["pictures"].sum() == expected[0]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    processes = [context.Process(target=_fingerprint, args=(data, range(20), queue)) for _ in range(2)]
    for process in processes:
        process.start()
    found = [queue.get() for _ in processes]
    for process in processes:
        process.join()
    assert found == [expected, expected]
    sent = pickle.loads(pickle.dumps(data))  # as to a process that is started anew
    assert sent.__getitems__(range(20))["pictures"].sum((1, 2, 3)).tolist() == expected and sent.names == data.names


def test_only_the_pictures_of_a_batch_are_read(tmp_path, monkeypatch):
    pack(tmp_path / "0.tar", labelled(10))
    monkeypatch.setattr(decoded, "MEMORY_LIMIT", 0)
    data = picture_data(tmp_path, 8, val_share=0).train_data
    asked = []
    real = os.pread
    monkeypatch.setattr(os, "pread", lambda number, size, at: asked.append((at, size)) or real(number, size, at))
    data.__getitems__([7, 2])
    assert asked == [(int(data.offsets[place]), int(data.sizes[place])) for place in (7, 2)]


def test_more_shards_than_may_stay_open(tmp_path, monkeypatch):
    for number in range(12):
        pack(tmp_path / f"{number}.tar", labelled(1, first=number))
    cached = tar_index.functools.lru_cache(maxsize=3)(tar_index._opened.__wrapped__)
    monkeypatch.setattr(tar_index, "_opened", cached)
    data = picture_data(tmp_path, 8, val_share=0, progress=False).train_data
    assert [int(row[0, 0, 0]) for row in data.in_memory()] == [
        np.asarray(Image.open(io.BytesIO(picture(i))))[0, 0, 0] for i in range(12)
    ]
    assert sum(os.path.realpath(link).startswith(str(tmp_path)) for link in Path("/proc/self/fd").iterdir()) == 3


# ---- labels


def read_labels(data) -> dict[str, int]:
    return dict(zip(data.train_data.names, data.train_data.labels.tolist(), strict=True))


@pytest.mark.parametrize(
    ("beside", "labels", "classes"),
    [
        ({"cls": ("2", "0")}, [2, 0], {"0": 0, "2": 2}),
        ({"json": ('{"label": 1, "w": 3}', '{"label": 0}')}, [1, 0], {"0": 0, "1": 1}),
        ({"json": ('{"class": 1}', '{"class": 4}')}, [1, 4], {"1": 1, "4": 4}),
        ({"json": ('{"class_name": "wolf"}', '{"class_name": "ape"}')}, [1, 0], {"ape": 0, "wolf": 1}),
        ({"json": ('{"label": "ID_5"}', '{"class": "ID_2"}')}, [4, 1], {"ID_2": 1, "ID_5": 4}),
        (
            {"json": ('{"label": 5, "class_name": "ape"}', '{"label": 3, "class_name": "wolf"}')},
            [5, 3],
            {"wolf": 3, "ape": 5},
        ),
        ({"cls": ("1", "0"), "json": ('{"caption": "x"}', "[]")}, [1, 0], {"0": 0, "1": 1}),
        ({"cls": ("1", "0"), "json": ('{"label": 8}', '{"label": 9}')}, [1, 0], {"0": 0, "1": 1}),
        ({"cls": ("1", "0"), "txt": ("a", "b"), "mask.png": (picture(3), picture(4))}, [1, 0], {"0": 0, "1": 1}),
    ],
)
@pytest.mark.parametrize("together", [True, False])
def test_labels_beside_the_pictures(tmp_path, beside, labels, classes, together):
    """Also where what belongs together does not stand together, as in a tar that was packed from a folder."""
    keys = ("x/a", "x/b")
    members = [(f"{key}.{kind}", texts[k]) for k, key in enumerate(keys) for kind, texts in beside.items()]
    pictures = [(f"{key}.JPG", picture(k, "jpg")) for k, key in enumerate(keys)]
    members = [*members[::-1], *pictures] if not together else [*pictures[:1], *members, pictures[1]]
    data = picture_data(pack(tmp_path / "s.tar", dict(members)).parent, 8, val_share=0)
    assert read_labels(data) == dict(zip(("x/a.JPG", "x/b.JPG"), labels, strict=True)) and data.labels == classes
    assert data.num_classes == max(labels) + 1


def test_numbers_are_named_by_folders_that_go_with_them(tmp_path):
    members = {"n02/1.png": picture(1), "n02/1.cls": "0", "n01/2.png": picture(2), "n01/2.cls": "1"}
    assert picture_data(pack(tmp_path / "s.tar", members).parent, 8).labels == {"n02": 0, "n01": 1}
    members |= {"n01/3.png": picture(3), "n01/3.cls": "0"}
    assert picture_data(pack(tmp_path / "s.tar", members, mtime=8).parent, 8).labels == {"0": 0, "1": 1}


def test_pictures_of_all_kinds_and_what_is_none(tmp_path):
    members = {f"c/{kind}.{kind}": picture(1, kind) for kind in ("jpg", "png", "webp", "bmp")}
    members |= {"c/a.b.png": picture(2), "c/._jpg.jpg": "resource fork", "__MACOSX/c/x.jpg": "", "c/readme.txt": "hi"}
    data = picture_data(pack(tmp_path / "s.tar", members).parent, 8, val_share=0).train_data
    assert data.names == ["c/jpg.jpg", "c/png.png", "c/webp.webp", "c/bmp.bmp", "c/a.b.png"]
    first = data.in_memory()[1].permute(1, 2, 0).numpy()
    assert np.array_equal(first, np.asarray(Image.open(io.BytesIO(picture(1)))))


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_names_of_any_length(tmp_path, form):
    names = ["a/" + "d" * 60 + "/" + "x" * n + ".png" for n in (30, 31, 60, 90)]
    names += [] if form == tarfile.USTAR_FORMAT else ["a/" + "y" * 300 + ".png", "a/日本.png"]
    found = index_shard(pack(tmp_path / "s.tar", {n: picture(i) for i, n in enumerate(names)}, form), EXTENSIONS)
    assert found.names == names
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert [(m.offset_data, m.size) for m in tar] == list(zip(found.offsets, found.sizes, strict=True))


def test_tars_of_the_system_are_read(tmp_path):
    members = folders(tmp_path / "f", {"a": 3, "b": 2})
    subprocess.run(["tar", "-cf", tmp_path / "s.tar", "-C", tmp_path / "f", "."], check=True)
    subprocess.run(["tar", "-cf", tmp_path / "two.tar", "-C", tmp_path / "f", "a", "-C", ".", "b"], check=True)
    for name in ("s.tar", "two.tar"):
        data = picture_data(tmp_path / name, 8, val_share=0)
        stored = dict(zip(data.train_data.names, data.train_data.stored(range(5)), strict=True))
        assert {name: data.train_data.shards[0].read(*place) for name, (_, *place) in stored.items()} == members


def test_tars_one_after_the_other_in_a_file(tmp_path):
    one, two = (pack(tmp_path / f"{i}.tar", labelled(2, first=2 * i)).read_bytes() for i in range(2))
    (tmp_path / "both").mkdir()
    (tmp_path / "both" / "s.tar").write_bytes(one + two)
    data = picture_data(tmp_path / "both", 8, val_share=0)
    assert read_labels(data) == {"00000.png": 0, "00001.png": 1, "00002.png": 2, "00003.png": 0}


# ---- sides


def test_sides_in_folders_of_shards(tmp_path):
    pack(tmp_path / "train" / "0.tar", labelled(4, classes=2))
    pack(tmp_path / "val" / "0.tar", labelled(2, classes=2))  # the same keys, which two sides may have
    pack(tmp_path / "test" / "0.tar", labelled(3, classes=2))
    data = picture_data(tmp_path, 8)
    assert len(data.train_data) == 4 and data.val_data.labels.tolist() == [0, 1] and data.labels == {"0": 0, "1": 1}
    assert data.val_data.title == f"{tmp_path.name}, val"
    swapped = picture_data(tmp_path, 8, train_split="test", val_share=0)
    assert len(swapped.train_data) == 3 and len(swapped.val_data) == 2


@pytest.mark.parametrize(
    ("pattern", "train", "val"),
    [
        ("", 5, 1),
        ("{set-train,set-val}-{000..001}.tar", None, None),
        ("set-*.tar", 5, 1),
        ("set-train-{000..001}.tar", 5, 0),
        ("{set-train-000,set-val-000}.tar", 2, 1),
        ("set-train-001.tar", 3, 0),
        ("*-train-00[1-9].tar", 3, 0),
    ],
)
def test_sides_in_names_of_shards(tmp_path, pattern, train, val):
    pack(tmp_path / "set-train-000.tar", labelled(2, classes=1))
    pack(tmp_path / "set-train-001.tar", labelled(3, first=2, classes=1))
    pack(tmp_path / "set-val-000.tar", labelled(1, first=2, classes=1))
    if train is None:
        with pytest.raises(UserError, match=r"1 of the 4 shards .* are not there: .*set-val-001\.tar$"):
            picture_data(tmp_path / pattern, 8)
        return
    data = picture_data(tmp_path / pattern, 8, val_share=0)
    assert [len(side) for side in sides(data)] == [train, val][: 1 + bool(val)]


def test_shards_without_sides_have_a_share_held_out(tmp_path):
    for number in range(4):
        pack(tmp_path / f"{number}.tar", labelled(30, first=30 * number))
    data = picture_data(tmp_path, 8, val_share=0.1)
    assert data.val_data.labels.bincount().tolist() == [4, 4, 4] and len(data.train_data) == 108
    assert not set(data.train_data.names) & set(data.val_data.names)
    other = picture_data(tmp_path, 8, val_share=0.1, seed=1)
    assert other.val_data.names != data.val_data.names == picture_data(tmp_path, 8, val_share=0.1).val_data.names
    for place in (0, 5, 11):
        name = data.val_data.names[place]
        expected = np.asarray(Image.open(io.BytesIO(picture(int(name[:5])))))
        assert np.array_equal(data.val_data[place]["pictures"].permute(1, 2, 0).numpy(), expected)


def test_folders_beside_a_tar_stay_folders(tmp_path):
    folders(tmp_path, {"a": 2, "b": 1})
    pack(tmp_path / "backup.tar", labelled(4))
    assert picture_data(tmp_path, 8, val_share=0).labels == {"a": 0, "b": 1}
    (tmp_path / "c").mkdir()
    (tmp_path / "logs").mkdir()
    pack(tmp_path / "c" / "backup.tar", labelled(4))
    assert picture_data(tmp_path / "c", 8, use_hf_dataset=False).labels == {"0": 0, "1": 1, "2": 2}


# ---- by what they are known


@pytest.mark.parametrize("change", [None, "moved", "a picture", "a label", "its time", "a shard more", "seed"])
def test_the_fingerprint_tells_shards_apart(tmp_path, change):
    folder = tmp_path / "d"
    members = [labelled(6), labelled(6, first=6)]
    for number in range(2):
        pack(folder / f"{number}.tar", members[number])
    before, options = picture_data(folder, 8).fingerprint(), {}
    if change == "moved":
        folder = folder.rename(tmp_path / "elsewhere")
        os.utime(folder / "0.tar", (1, 1))
    elif change == "a picture":  # another one of the same length: PNGs of noise are stored as they are
        members[1]["00008.png"] = picture(99)
        assert len(picture(99)) == len(picture(8))
    elif change == "a label":
        members[1]["00008.cls"] = "1\n"
    elif change == "a shard more":
        pack(folder / "2.tar", labelled(1, first=20))
    elif change == "seed":
        options["seed"] = 1
    if change in ("a picture", "a label", "its time"):
        pack(folder / "1.tar", members[1], mtime=8 if change == "its time" else 7)
        os.utime(folder / "1.tar", (1, 1))
    assert (picture_data(folder, 8, **options).fingerprint() == before) == (change in (None, "moved"))


def test_the_index_is_kept_and_made_again_for_another_file(tmp_path, monkeypatch):
    path = pack(tmp_path / "s.tar", labelled(4) | {"00001.json": '{"class_name": "one"}'})
    made, real = [], tar_index._make_index
    monkeypatch.setattr(tar_index, "_make_index", lambda *a: made.append(1) or real(*a))
    first, again = (index_shard(path, EXTENSIONS) for _ in range(2))
    assert len(made) == 1 and (tmp_path / ".s.tar.index").is_file()
    assert again.shard == first.shard and again.names == first.names and again.words == first.words == ["one"]
    for name in ("offsets", "sizes", "numbers", "word"):
        assert np.array_equal(getattr(first, name), getattr(again, name)), name
    pack(path, labelled(3))
    assert len(index_shard(path, EXTENSIONS).names) == 3 and len(made) == 2
    (tmp_path / ".s.tar.index").write_bytes((tmp_path / ".s.tar.index").read_bytes()[:200])
    assert len(index_shard(path, EXTENSIONS).names) == 3 and len(made) == 3
    assert len(index_shard(path, ("jpg", "png")).names) == 3 and len(made) == 4


def test_where_nothing_may_be_written_the_index_is_made_each_time(tmp_path, monkeypatch):
    pack(tmp_path / "s.tar", labelled(4))

    def refuse(path):
        raise PermissionError(13, "not allowed", str(path))

    monkeypatch.setattr(tar_index, "written_whole", refuse)
    for _ in range(2):
        assert len(picture_data(tmp_path, 8, val_share=0).train_data) == 4
    assert [path.name for path in tmp_path.iterdir()] == ["s.tar"]


def test_a_shard_that_changes_under_its_reader_is_named(tmp_path, monkeypatch):
    path = pack(tmp_path / "s.tar", labelled(4))
    monkeypatch.setattr(decoded, "MEMORY_LIMIT", 0)
    data = picture_data(tmp_path, 8, val_share=0, channels=3).train_data
    pack(path, labelled(3))
    with pytest.raises(UserError, match=r"The shard .*s\.tar was changed or taken away while it was read"):
        data[0]
    path.unlink()
    with pytest.raises(UserError, match=r"The shard .*s\.tar was changed or taken away"):
        data[0]


# ---- what cannot be


def damaged(tmp_path: Path, how: str) -> Path:
    path = pack(tmp_path / "s.tar", labelled(3))
    content = path.read_bytes()
    header = content.index(b"00001.png")
    if how == "gzip":
        content = gzip.compress(content)
    elif how == "in a picture":
        content = content[: header + 512 + 70]
    elif how == "in a header":
        content = content[: header + 100]
    elif how == "between two":
        content = content[:header]
    elif how == "a header":
        content = content[: header + 3] + b"?" + content[header + 4 :]
    elif how == "no tar":
        content = b"\0\1picture" * 200
    elif how == "lfs":
        content = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n".ljust(600)
    elif how == "zeros":
        content += bytes(2**21)
    elif how == "empty":
        content = b""
    elif how == "nothing in it":
        content = bytes(10240)
    path.write_bytes(content)
    return tmp_path


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("gzip", r"s\.tar is compressed \(gzip\): unpack it"),
        ("in a picture", r"The tar file .*s\.tar is cut off \(\d,\d\d\d bytes\)"),
        ("in a header", r"s\.tar is cut off"),
        ("between two", r"s\.tar is cut off"),
        ("empty", r"s\.tar is cut off \(0 bytes\)"),
        ("a header", r"s\.tar is damaged at byte 2,048, where no header is: copy it again"),
        ("no tar", r"s\.tar is no tar file"),
        ("lfs", r"s\.tar is a pointer of Git LFS"),
        ("zeros", r"s\.tar ends in more than a megabyte of zeros"),
        ("nothing in it", r"s\.tar holds no picture \(.*\); it holds nothing else"),
    ],
)
def test_damaged_tars_are_named(tmp_path, how, message):
    with pytest.raises(UserError, match=message) as error:
        picture_data(damaged(tmp_path, how), 8)
    assert "\n" not in str(error.value) and not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.png": b"", "a.cls": "1", "b.png": b""}, r"b\.png of .*s\.tar has no label, while others there have one"),
        ({"a.png": b"", "a.cls": "dog"}, r"a\.cls of .*s\.tar says 'dog', expected the class as a whole number"),
        ({"a.png": b"", "a.cls": "-1"}, r"a\.cls of .*s\.tar says '-1', expected"),
        ({"a.png": b"", "a.json": '{"label": -1}'}, r"a\.json of .*s\.tar says label -1, expected"),
        ({"a.png": b"", "a.json": "{"}, r"a\.json of .*s\.tar is no JSON: '{'"),
        ({"a.png": b"", "a.jpg": b"", "a.cls": "1"}, r"s\.tar holds two pictures of one key, a\.png and a\.jpg"),
        (
            {"a.1.png": b"", "a.1.cls": "1", "b.png": b"", "b.cls": "1"},
            r"a\.1\.png of .*s\.tar: a key ends at the first",
        ),
        ({"a.npy": b"", "b.npy": b"", "c.txt": b""}, r"s\.tar holds no picture .* it holds 2 \.npy, 1 \.txt"),
        (
            {"a.png": b"", "a.txt": "a dog"},
            r"a\.png of .*s\.tar has no class: expected KEY\.cls or KEY\.json with label",
        ),
        ({"x/a.png": b"", "b.png": b""}, r"b\.png of .*s\.tar has no class"),
        (
            {"a.png": b"", "a.json": '{"label": 1}', "b.png": b"", "b.json": '{"label": "x"}'},
            r"a\.png of .*s\.tar has a number as label, and others the name",
        ),
    ],
)
def test_members_that_do_not_go_together(tmp_path, members, message):
    pack(tmp_path / "s.tar", members)
    with pytest.raises(UserError, match=message) as error:
        picture_data(tmp_path, 8)
    assert "\n" not in str(error.value)


def test_links_and_doubles_in_a_tar(tmp_path):
    path = pack(tmp_path / "s.tar", {"c/a.png": picture(0)})
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("c/b.png")
        link.type, link.linkname = tarfile.LNKTYPE, "c/a.png"
        tar.addfile(link)
    with pytest.raises(UserError, match=r"c/b\.png of .*s\.tar is a link: pack the shard again"):
        picture_data(tmp_path, 8)
    pack(path, {"c/a.png": picture(0)})
    with tarfile.open(path, "a") as tar:
        tar.addfile(tarfile.TarInfo("c/a.png"))
    with pytest.raises(UserError, match=r"s\.tar holds c/a\.png twice"):
        picture_data(tmp_path, 8)


def test_a_member_that_is_no_picture_is_named_with_its_shard(tmp_path):
    pack(tmp_path / "s.tar", {"a/1.png": picture(0), "a/2.png": "no picture"})
    with pytest.raises(UserError, match=r"a/2\.png of .*s\.tar cannot be read as a picture"):
        picture_data(tmp_path, 8, val_share=0).train_data.in_memory()


def test_shards_that_do_not_go_together(tmp_path):
    pack(tmp_path / "a" / "0.tar", labelled(2))
    pack(tmp_path / "a" / "1.tar", labelled(2, first=1))
    with pytest.raises(UserError, match=r"Two shards hold the key 00001, .*0\.tar and 1\.tar"):
        picture_data(tmp_path / "a", 8)
    pack(tmp_path / "b" / "0.tar", labelled(2))
    pack(tmp_path / "b" / "1.tar", {"x/9.png": picture(1)})
    with pytest.raises(UserError, match=r"b/1\.tar has no labels, while 0\.tar has"):
        picture_data(tmp_path / "b", 8)
    pack(tmp_path / "c" / "train.tar", labelled(4, classes=2))
    pack(tmp_path / "c" / "val.tar", labelled(4, classes=3))
    with pytest.raises(
        UserError, match=r"What validates in .*c holds 2, which is no class of the training side \(0, 1\)"
    ):
        picture_data(tmp_path / "c", 8)
    pack(tmp_path / "c" / "more.tar", labelled(1))
    with pytest.raises(UserError, match=r"more\.tar is of no side, while train\.tar trains"):
        picture_data(tmp_path / "c", 8)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "0.tar.gz").write_bytes(b"")
    with pytest.raises(UserError, match=r"0\.tar\.gz is compressed: unpack it"):
        picture_data(tmp_path / "d", 8)
    with pytest.raises(UserError, match=r"No shard .*nothing-\*\.tar; .* holds 4 folders"):
        picture_data(tmp_path / "nothing-*.tar", 8)
    with pytest.raises(UserError, match=r"0\.tar is no Hugging Face dataset; it names tar files"):
        picture_data(tmp_path / "a" / "0.tar", 8, use_hf_dataset=True)
