"""Captioned images: COCO, CUB, one's own and Hugging Face's; which are chosen, and what is said of faults."""

import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from tiny import flat

from vavae_tools.data.captions import CaptionOrder
from vavae_tools.data.datasets import caption_data
from vavae_tools.data.loader import EpochOrder


def image(path: Path, value: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    flat(value).save(path)


def read(name: str, path: Path, **options):
    return caption_data(name, path, **{"image_size": 8, "val_share": 0, "progress": False, **options})


def shown(data) -> dict[str, tuple[int, tuple[str, ...]]]:
    """Name → grey and captions, as a subset is read."""
    greys = [int(data[place]["images"].float().mean()) for place in range(len(data))]
    return {name: (grey, captions) for name, grey, captions in zip(data.names, greys, data.captions, strict=True)}


def refused(name: str, path: Path | None, **options) -> str:
    return tiny.refused(read, name, path, **options)


# ---- coco
def coco(root: Path, count: int = 6, year: str = "train2017", folder: str = "train2017", first: int = 0) -> Path:
    images = [{"id": 100 + k, "file_name": f"{k:012d}.png"} for k in range(first, first + count)]
    of_each = [(k, n) for n in range(3) for k in range(first, first + count)]
    captions = [{"image_id": 100 + k, "caption": f" image {k}, \n sentence {n}. "} for k, n in of_each]
    file = root / "annotations" / f"captions_{year}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"images": images, "annotations": captions}))
    for k in range(first, first + count):
        image(root / folder / f"{k:012d}.png", 10 * k)
    return root


@pytest.mark.parametrize("folder", ["train2017", "images", "images/train2017"])
def test_coco(tmp_path, folder):
    data = read("coco", coco(tmp_path, folder=folder))
    assert data.labels == {"any": 0} and data.num_classes == 1 and data.val_data is None and data.notes == []
    sentences = tuple(f"image 4, sentence {n}." for n in range(3))
    assert shown(data.train_data)["000000000004.png"] == (40, sentences)


def test_coco_with_validation(tmp_path):
    coco(coco(tmp_path), 2, "val2017", "val2017", first=20)
    data = read("coco", tmp_path)
    assert list(shown(data.val_data)) == ["000000000020.png", "000000000021.png"] and len(data.train_data) == 6
    (tmp_path / "val2017" / "000000000020.png").unlink()
    assert "captions_val2017.json" in refused("coco", tmp_path)
    (tmp_path / "val2017" / "000000000021.png").unlink()
    data = read("coco", tmp_path, val_share=0.3)  # nobody fetched val's images
    assert len(data.train_data) == 4 and len(data.val_data) == 2 and "val2017" in str(data.notes)


def test_coco_with_files_elsewhere(tmp_path):
    other = (coco(tmp_path / "a") / "annotations" / "captions_train2017.json").rename(tmp_path / "mine.json")
    assert "data.annotations" in refused("coco", tmp_path / "a")
    data = read("coco", tmp_path, annotations=other, images=tmp_path / "a" / "train2017")
    assert shown(data.train_data)["000000000003.png"][0] == 30


def test_missing_images_are_counted_and_left_out_only_when_told(tmp_path):
    coco(tmp_path)
    for k in (1, 4):
        (tmp_path / "train2017" / f"{k:012d}.png").unlink()
    said = refused("coco", tmp_path)
    assert "2 of 6 images" in said and "000000000001.png, 000000000004.png" in said
    assert "data.skip_missing=true" in said
    data = read("coco", tmp_path, skip_missing=True)
    assert [grey for grey, _ in shown(data.train_data).values()] == [0, 20, 30, 50]
    assert "2 of 6" in data.notes[0] and "left out" in data.notes[0] and "\n" not in data.notes[0]
    for path in (tmp_path / "train2017").iterdir():
        path.unlink()
    assert "6 of 6" in refused("coco", tmp_path, skip_missing=True)


def test_coco_files_that_are_none(tmp_path):
    coco(tmp_path)
    file = tmp_path / "annotations" / "captions_train2017.json"
    images = json.loads(file.read_text())["images"]
    for content, words in (
        (b'{"images": [,]}', "no JSON"),
        (b"[1]", "captions"),
        (json.dumps({"images": images, "annotations": [{"image_id": 100, "bbox": []}]}).encode(), "'caption'"),
        (json.dumps({"images": images, "annotations": [{"image_id": 100, "caption": 5}]}).encode(), "000000000000.png"),
        (b'{"images": "\xff"}', "line 1, is no UTF-8"),
    ):
        file.write_bytes(content)
        assert words in refused("coco", tmp_path)


# ---- cub
def cub(root: Path) -> Path:
    root = root / "CUB_200_2011"
    names = ["001.Indigo_Bunting/a.png", "001.Indigo_Bunting/b.png", "002.American_Crow/c.png"]
    for k, name in enumerate(names):
        image(root / "images" / name, 50 * (k + 1))
    (root / "images.txt").write_text("".join(f"{k + 1} {name}\n" for k, name in enumerate(names)))
    (root / "train_test_split.txt").write_text("1 1\n2 0\n3 1\n")
    (root / "attributes").mkdir()
    attributes = ["has_wing_color::blue", "has_wing_color::black", "has_size::small_(5_-_9_in)"]
    attributes += ["has_tail_shape::forked_tail", "has_primary_color::blue", "has_bill_length::shorter_than_head"]
    (root.parent / "attributes.txt").write_text("".join(f"{k + 1} {a}\n" for k, a in enumerate(attributes)))
    (root / "attributes" / "image_attribute_labels.txt").write_text(
        "1 1 1 4 2.0\n1 2 1 3 0 1.5\n1 3 1 4 1\n1 4 1 4 1\n1 5 1 4 1\n1 6 1 4 1\n2 1 1 2 1\n2 4 0 4 1\n3 4 1 3 9\n"
    )
    return root


def test_cub_without_captions_makes_them(tmp_path):
    """Attributes count where they are there (1) and sure (3 or 4)."""
    data = read("cub", cub(tmp_path).parent)
    made = ("an indigo bunting", "a small blue bird with blue and black wing, forked tail")
    assert shown(data.train_data) == {
        "001.Indigo_Bunting/a.png": (50, made),
        "002.American_Crow/c.png": (150, ("an american crow", "a bird with forked tail")),
    }
    assert shown(data.val_data) == {"001.Indigo_Bunting/b.png": (100, ("an indigo bunting",))}
    assert "made from class names" in str(data.notes)


def test_cub_with_captions(tmp_path):
    root = cub(tmp_path)
    for name, text in (("001.Indigo_Bunting/a", "one bird.\n\n two  birds.\n"), ("001.Indigo_Bunting/b", "b\n")):
        (tmp_path / "text_c10" / f"{name}.txt").parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "text_c10" / f"{name}.txt").write_text(text)
    data = read("cub", root, skip_missing=True)
    captions = {name: captions for name, (_, captions) in shown(data.train_data).items()}
    assert captions["001.Indigo_Bunting/a.png"] == ("one bird.", "two birds.")
    assert captions["002.American_Crow/c.png"][0] == "an american crow"  # it alone has no text
    assert data.val_data.captions == [("b",)] and "captions of 1 image" in str(data.notes)


# ---- custom
def jsonl(root: Path, records: list, name: str = "metadata.jsonl") -> Path:
    root.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record, ensure_ascii=False) for record in records]
    (root / name).write_text("\n".join(lines), encoding="utf-8")
    return root


def test_custom_jsonl(tmp_path):
    for k in range(3):
        image(tmp_path / "images" / f"{k}.png", k)
    records = [
        {"file_name": "images/0.png", "text": "a cat\u2028here"},  # an end of a line to str.splitlines
        "",
        {"file_name": "images\\1.png", "text": ["one", " two "], "width": 8},
        {"image": "./images/2.png", "caption": "Straße"},
        {"file_name": "images/0.png", "text": "again"},
    ]
    data = read("custom", jsonl(tmp_path, records))
    assert shown(data.train_data) == {
        "images/0.png": (0, ("a cat here", "again")),
        "images/1.png": (1, ("one", "two")),
        "images/2.png": (2, ("Straße",)),
    }
    assert read("custom", tmp_path / "metadata.jsonl").fingerprint() == data.fingerprint()


@pytest.mark.parametrize("delimiter", [",", ";", "\t"])
def test_custom_table(tmp_path, delimiter):
    """Which may write accents in another way than the files."""
    rows = [["width", "Caption", '"File_Name"'], ["8", '"red, round"', "Jos\u00e9/\u00e9.png"]]
    rows.append(["8", '"[""a"", ""b""]"', "1.png"])
    (tmp_path / "list.csv").write_text("\ufeff" + "\r\n".join(map(delimiter.join, rows)) + "\r\n", encoding="utf-8")
    for value, name in enumerate(("Jose\u0301/e\u0301.png", "1.png")):
        image(tmp_path / name, value)
    expected = {"Jose\u0301/e\u0301.png": (0, ("red, round",)), "1.png": (1, ("a", "b"))}
    assert shown(read("custom", tmp_path).train_data) == expected


def test_custom_text_beside(tmp_path):
    for k, name in enumerate(("b/10.png", "b/2.JPG", "a.png")):
        image(tmp_path / name, 0)
        (tmp_path / name).with_suffix(".txt").write_text(f"caption {k}\n\nother {k}\n")
    (tmp_path / "readme.txt").write_text("about")
    data = read("custom", tmp_path)
    assert {name: captions for name, (_, captions) in shown(data.train_data).items()} == {
        "a.png": ("caption 2", "other 2"),
        "b/2.JPG": ("caption 1", "other 1"),
        "b/10.png": ("caption 0", "other 0"),
    }
    assert "1 .txt file" in str(data.notes)
    (tmp_path / "b" / "10.txt").unlink()
    assert "1 image" in refused("custom", tmp_path) and "b/10.png" in refused("custom", tmp_path)
    assert len(read("custom", tmp_path, skip_missing=True).train_data) == 2


def test_custom_subsets_and_empty_captions(tmp_path):
    for subset, value in (("train", 1), ("validation", 2)):
        image(tmp_path / subset / "x.png", value)
        jsonl(tmp_path / subset, [{"file_name": "x.png", "text": subset}])
    data = read("custom", tmp_path, val_share=0.3)
    assert shown(data.train_data) == {"x.png": (1, ("train",))}
    assert shown(data.val_data) == {"x.png": (2, ("validation",))}
    for k in range(3):
        image(tmp_path / f"{k}.png", k)
    jsonl(tmp_path, [{"file_name": f"{k}.png", "text": text} for k, text in enumerate(("a", " ", ["", "c"]))])
    said = refused("custom", tmp_path)
    assert "1.png" in said and "2.png" not in said and "data.skip_missing=true" in said
    data = read("custom", tmp_path, skip_missing=True)
    assert data.train_data.captions == [("a",), ("c",)] and data.train_data.names == ["0.png", "2.png"]
    assert "1.png" in data.notes[0]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("metadata.jsonl", b'{"file_name": "0.png", "text": "a"}\n{"file_name": ', "line 2, is no JSON"),
        ("metadata.jsonl", b'{"file_name": "0.png", "text": "a"}\n\n[1]', "line 3, is a list"),
        ("metadata.jsonl", b'{"file_name": "0.png", "txt": "a"}', "no column for captions, only file_name, txt"),
        ("metadata.jsonl", b'{"file_name": 3, "text": "a"}', "line 1: the file name is 3"),
        ("metadata.jsonl", b'{"file_name": "0.png", "text": 3}', "0.png"),
        ("metadata.jsonl", b'{"file_name": "0.png"}\n\xe9', "line 2, is no UTF-8"),
        ("metadata.jsonl", b"", "is empty"),
        ("metadata.csv", b"file_name,text\n0.png,a\n0.png,red, round\n", "line 3, has 3 fields"),
        ("metadata.csv", b'file_name,text\n0.png,"a\n', "cannot be read as a table"),
    ],
)
def test_damaged_lists(tmp_path, name, content, words):
    (tmp_path / name).write_bytes(content)
    said = refused("custom", tmp_path)
    assert words in said and name in said


def test_nothing_there(tmp_path):
    assert "coco, cub, custom, shapes" in refused("flowers", tmp_path)
    assert "dataset_path" in refused("coco", None)
    assert "No such folder" in refused("cub", tmp_path / "none")
    image(tmp_path / "0.png")
    assert "metadata.jsonl" in refused("custom", tmp_path)
    assert "num_samples" in refused("shapes", None, num_samples=0) and "val_s" in refused("shapes", None, val_share=1)
    for name in ("a.csv", "b.csv"):
        (tmp_path / name).write_text("file_name,text\n0.png,a\n")
    assert "a.csv, b.csv" in refused("custom", tmp_path)


def test_hugging_face_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(np.full((8, 8, 3), 20 * k, dtype=np.uint8)) for k in range(4)]

    def made(values: list, column: str):
        features = datasets.Features({"image": datasets.Image(), column: datasets.Value("string")})
        if isinstance(values[0], list):
            features[column] = datasets.Sequence(datasets.Value("string"))
        return datasets.Dataset.from_dict({"image": images, column: values}, features=features)

    made(["a", "b", "c", "d"], "text").save_to_disk(tmp_path / "one")
    data = read("custom", tmp_path / "one")
    assert list(shown(data.train_data).values()) == [(20 * k, (caption,)) for k, caption in enumerate("abcd")]

    train, test = made([["a", "b"], ["c"], [""], ["d"]], "captions"), made([["v"]] * 4, "captions")
    datasets.DatasetDict(train=train, test=test).save_to_disk(tmp_path / "two")
    assert "000002" in refused("custom", tmp_path / "two")
    data = read("custom", tmp_path / "two", skip_missing=True)
    assert list(shown(data.train_data).values()) == [(0, ("a", "b")), (20, ("c",)), (60, ("d",))]
    assert len(data.val_data) == 4
    made(["a"] * 4, "title").save_to_disk(tmp_path / "three")
    assert "image, title" in refused("custom", tmp_path / "three")


# ---- which images, which captions
def test_a_subset_follows_from_seed_and_names(tmp_path):
    coco(tmp_path, 40)
    few = [read("coco", tmp_path, num_samples=count).train_data.names for count in (10, 20, 100)]
    assert [len(names) for names in few] == [10, 20, 40] and set(few[0]) < set(few[1])
    assert list(few[0]) == sorted(few[0]) != list(few[2])[:10]
    assert list(read("coco", tmp_path, num_samples=10, seed=1).train_data.names) != list(few[0])
    data = read("coco", tmp_path, num_samples=20, train_split=0.75)
    assert (len(data.train_data), len(data.val_data)) == (15, 5)
    assert {*data.train_data.names, *data.val_data.names} == set(few[1])


def test_captions_are_chosen_by_seed_epoch_and_image_alone():
    counts = torch.arange(50) % 5 + 1

    def chosen(epoch: int, **options) -> list[tuple[int, int]]:
        order = CaptionOrder(counts, 50 // options.get("world_size", 1), **options)
        order.set_epoch(epoch)
        return list(order)

    alone = chosen(3)
    plain = EpochOrder(50, 50)
    plain.set_epoch(3)
    assert [index for index, _ in alone] == list(plain)
    assert dict(alone) == {**dict(chosen(3, rank=0, world_size=2)), **dict(chosen(3, rank=1, world_size=2))}
    assert dict(alone) != dict(chosen(4)) and dict(alone) != dict(chosen(3, seed=1))
    shares = torch.zeros(50, 5)
    for epoch in range(400):
        for index, number in chosen(epoch):
            shares[index, number] += 1 / 400
    expected = (torch.arange(5) < counts[:, None]) / counts[:, None]
    assert shares[expected == 0].max() == 0  # none that an image does not have
    assert (shares - expected).abs().max() < 0.1  # four standard deviations of 400 draws


def test_batches_have_their_captions(tmp_path):
    data = read("coco", coco(tmp_path), batch_size=3, seed=5, num_samples=6, val_share=0.3)
    data.val_data.captions = [captions[::-1] for captions in data.val_data.captions]
    (batch,) = data.train_dataloader()
    pairs = list(CaptionOrder(data.train_data.caption_counts, 3, 5))
    assert list(zip(batch["index"].tolist(), batch["captions"], strict=True)) == [
        (index, data.train_data.captions[index][number]) for index, number in pairs
    ]
    greys = [10 * int(data.train_data.names[index][:-4]) for index, _ in pairs]
    assert batch["images"].float().mean((1, 2, 3)).tolist() == greys
    (batch,) = data.val_dataloader()
    assert batch["captions"] == [captions[0] for captions in data.val_data.captions]


def test_fingerprints(tmp_path):
    """The module's holds images and captions, a subset's the images alone, by which latents are known."""
    image(tmp_path / "0.png", 1)
    data, other = (read("custom", jsonl(tmp_path, [{"file_name": "0.png", "text": text}])) for text in "ab")
    before = other.train_data.fingerprint()
    assert data.fingerprint() != other.fingerprint() and data.train_data.fingerprint() == before
    assert read("custom", tmp_path).fingerprint() == other.fingerprint()
    Image.effect_noise((8, 8), 90).save(tmp_path / "0.png")
    assert read("custom", tmp_path).train_data.fingerprint() != before
