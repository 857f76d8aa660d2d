"""Texts: encoded once, without padding, equal ones once; read beside the latents with a caption for each image."""

import hashlib
import json
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import same
from torch import Tensor

from vavae_tools.data import text_states as texts
from vavae_tools.data.captions import CaptionOrder
from vavae_tools.data.latents import LatentFolder
from vavae_tools.data.text_states import TextFolder, TextLatentDataModule, encode_texts, needed_bytes
from vavae_tools.runtime.errors import UserError

DIM, POOLED, MAX_SENTENCES = 4, 3, 8


@dataclass
class States:
    tokens: Tensor
    mask: Tensor
    pooled: Tensor


def numbers(word: str, count: int) -> Tensor:
    """Of a word, the same always, exact in float16."""
    return torch.tensor(list(hashlib.sha256(word.encode()).digest()[:count]), dtype=torch.float32) / 8


class WordEncoder:
    """A state for each word, one before and one after them; it counts what it encodes."""

    dim, pooled_dim, max_tokens = DIM, POOLED, MAX_SENTENCES
    device = torch.device("cpu")

    def to(self, device):
        self.device = torch.device(device)

    def __init__(self, name: str = "a", fails_after: int | None = None, factor: float = 1) -> None:
        self.name, self.encoded, self.fails_after, self.factor = name, [], fails_after, factor

    def words(self, caption: str) -> list[str]:
        return ["<", *caption.split()[: MAX_SENTENCES - 2], ">"]

    def encode(self, captions: list[str]) -> States:
        if self.fails_after is not None and len(self.encoded) >= self.fails_after:
            raise KeyboardInterrupt
        self.encoded += captions
        rows = [torch.stack([numbers(word, DIM) for word in self.words(c)]) * self.factor for c in captions]
        longest = max(map(len, rows)) + 1  # a place of padding even behind the longest
        tokens = torch.full((len(rows), longest, DIM), 99.0)  # which must never be seen
        for row, states in zip(tokens, rows, strict=True):
            row[: len(states)] = states
        lengths = torch.tensor(list(map(len, rows)))
        pooled = torch.stack([numbers(caption, POOLED) for caption in captions])
        return States(tokens, torch.arange(longest) < lengths[:, None], pooled)

    def lengths(self, captions: list[str]) -> tuple[list[int], int]:
        lengths = [len(caption.split()) + 2 for caption in captions]
        return lengths, sum(length > MAX_SENTENCES for length in lengths)

    def digest(self) -> str:
        return self.name


CAPTIONS = {
    "train": [
        ("a red circle", "a circle"),
        ("a blue square on the left", "square", "a circle"),
        ("one two three four five six seven eight",),
        ("a red circle", "x", "y", "z"),
        ("last one here",),
    ],
    "val": [("a red circle", "unused"), ("a green cross",)],
}
DISTINCT = sorted({"", *(c for subset in CAPTIONS.values() for of in subset for c in of)})


def write_latents(path, count: int = 5, val: int = 2) -> LatentFolder:
    """A folder as `encode_latents` writes it; every latent is its row."""
    path.mkdir(parents=True, exist_ok=True)
    names, shards = {}, {}
    for subset, length in (("train", count), ("val", val)):
        rows = torch.arange(length, dtype=torch.float32)[:, None, None, None].expand(-1, 2, 2, 2).contiguous()
        save_file(
            {"latents": rows, "labels": torch.zeros(length, dtype=torch.int64)}, path / f"{subset}-00000.safetensors"
        )
        names[subset], shards[subset] = [f"{subset}/{k}" for k in range(length)], [f"{subset}-00000.safetensors"]
    index = {"key": "k", "weights": "w", "mean": [0.0, 0.0], "std": [1.0, 1.0], "shape": [2, 2, 2], "names": names}
    index |= {"image_size": [16, 16], "flips": False, "people": {"any": 0}, "shards": shards}
    (path / "latents.json").write_text(json.dumps(index))
    return LatentFolder.read(path)


@pytest.fixture
def folder(tmp_path) -> TextFolder:
    return encode_texts(WordEncoder(), CAPTIONS, tmp_path / "texts", progress=False)


def expected(captions: list[str]) -> dict[str, Tensor]:
    """What the encoder says, padded by hand."""
    encoder = WordEncoder()
    longest = max(len(encoder.words(caption)) for caption in captions)
    tokens, mask = torch.zeros(len(captions), longest, DIM), torch.zeros(len(captions), longest, dtype=torch.bool)
    for row, caption in enumerate(captions):
        for place, word in enumerate(encoder.words(caption)):
            tokens[row, place], mask[row, place] = numbers(word, DIM), True
    return {
        "text_tokens": tokens,
        "text_mask": mask,
        "text_pooled": torch.stack([numbers(c, POOLED) for c in captions]),
    }


def assert_states(batch: dict[str, Tensor], captions: list[str], dtype: torch.dtype = torch.float32) -> None:
    for name, values in expected(captions).items():
        assert same(batch[name], values if name == "text_mask" else values.to(dtype)), name


def test_only_real_tokens_are_stored_and_equal_captions_once(tmp_path):
    encoder = WordEncoder()
    folder = encode_texts(encoder, CAPTIONS, tmp_path, batch_size=3, progress=False)
    assert encoder.encoded == DISTINCT
    tokens = sum(min(len(c.split()) + 2, MAX_SENTENCES) for c in DISTINCT)
    (name,) = folder.shards
    stored = load_file(tmp_path / name)
    assert stored["tokens"].shape == (tokens, DIM) and stored["tokens"].dtype == torch.float16
    assert stored["pooled"].dtype == torch.float16
    assert (folder.distinct, folder.tokens, folder.cut) == (len(DISTINCT), tokens, 1)
    assert folder.pictures == {"train": 5, "val": 2} and folder.captions == {"train": 11, "val": 3}
    assert TextFolder.read(tmp_path) == folder and "1 cut" in str(folder)


@pytest.mark.parametrize("shard_size", [100, 4, 1])
def test_what_is_read_is_what_was_encoded(tmp_path, monkeypatch, shard_size):
    monkeypatch.setattr(texts, "SHARD_SIZE", shard_size)
    folder = encode_texts(WordEncoder(), CAPTIONS, tmp_path, progress=False)
    assert len(folder.shards) == -(-len(DISTINCT) // shard_size)
    read = TextLatentDataModule(write_latents(tmp_path / "latents"), folder).train_data
    places = torch.tensor([3, 0, len(DISTINCT) - 1, 3, 5])
    assert_states(read.states(places), [DISTINCT[place] for place in places], torch.float16)


def test_needed_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "SHARD_SIZE", 4)
    needed = needed_bytes(WordEncoder(), CAPTIONS)
    folder = encode_texts(WordEncoder(), CAPTIONS, tmp_path / "texts", progress=False)
    stored = [load_file(path) for path in (tmp_path / "texts").glob("*.safetensors")]
    assert needed == sum(values.nbytes for file in stored for values in file.values())
    (tmp_path / "texts" / list(folder.shards)[1]).unlink()
    left = needed_bytes(WordEncoder(), CAPTIONS, tmp_path / "texts")
    rows = 8 * sum(len(of) + 1 for subset in CAPTIONS.values() for of in subset)
    of_shard = sum(2 * DIM * min(len(c.split()) + 2, MAX_SENTENCES) + 2 * POOLED + 8 for c in DISTINCT[4:8])
    assert left == rows + of_shard


def test_an_interrupted_encoding_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "SHARD_SIZE", 4)
    whole = encode_texts(WordEncoder(), CAPTIONS, tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        encode_texts(WordEncoder(fails_after=6), CAPTIONS, tmp_path / "killed", batch_size=2, progress=False)
    with pytest.raises(UserError, match="encode them first"):
        TextFolder.read(tmp_path / "killed")
    encoder = WordEncoder()
    resumed = encode_texts(encoder, CAPTIONS, tmp_path / "killed", progress=False)
    assert encoder.encoded == DISTINCT[4:]  # the first shard was whole
    assert (resumed.key, resumed.tokens, resumed.cut) == (whole.key, whole.tokens, whole.cut)
    for name in (*whole.shards, texts.CAPTIONS):
        one, other = load_file(whole.path / name), load_file(resumed.path / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_stale_texts_are_never_used_and_others_are_encoded_once(folder):
    again = WordEncoder()
    assert encode_texts(again, CAPTIONS, folder.path, progress=False) == folder and again.encoded == []
    other = WordEncoder("b")
    changed = encode_texts(other, CAPTIONS, folder.path, progress=False)
    assert other.encoded == DISTINCT and changed.key != folder.key
    fewer = {"train": CAPTIONS["train"][:2]}
    third = WordEncoder("b")
    smaller = encode_texts(third, fewer, folder.path, progress=False)
    assert smaller.pictures == {"train": 2} and len(third.encoded) == smaller.distinct == 5
    swapped = {"train": fewer["train"][::-1]}
    fourth = WordEncoder("b")
    encode_texts(fourth, swapped, folder.path, progress=False)
    assert fourth.encoded == []  # the same captions of other images: only who has which is written anew
    data = load_file(folder.path / texts.CAPTIONS)
    distinct = sorted({"", *sum(fewer["train"], ())})
    assert [distinct[place] for place in data["train.places"]] == [*fewer["train"][1], *fewer["train"][0]]


def test_faults(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="Image 1 of the subset train has no caption"):
        encode_texts(WordEncoder(), {"train": [("a",), ()]}, tmp_path, progress=False)
    for factor in (1e6, float("nan"), float("inf")):
        with pytest.raises(UserError, match="States of this WordEncoder"):
            encode_texts(WordEncoder(factor=factor), CAPTIONS, tmp_path / str(factor), progress=False)
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr("vavae_tools.data.encoded.shutil.disk_usage", lambda path: usage)
    encoder = WordEncoder()
    with pytest.raises(UserError, match="No space: States of this WordEncoder need"):
        encode_texts(encoder, CAPTIONS, tmp_path / "full", progress=False)
    assert encoder.encoded == []
    (tmp_path / texts.INDEX).write_text("{")
    with pytest.raises(UserError, match="damaged"):
        TextFolder.read(tmp_path)


# ---- beside the latents


def test_batches_have_latents_and_their_captions(folder, tmp_path):
    data = TextLatentDataModule(write_latents(tmp_path / "latents"), folder, batch_size=2, seed=3)
    for epoch in range(6):
        data.train_dataloader()
        loader = data.train_dataloader()
        loader.sampler.set_epoch(epoch)
        order = CaptionOrder(torch.tensor([2, 3, 1, 4, 1]), 2, 3)
        order.set_epoch(epoch)
        pairs = list(order)
        for start, batch in zip((0, 2), loader, strict=True):
            now = pairs[start : start + 2]
            assert batch["index"].tolist() == [index for index, _ in now] == batch["latents"][:, 0, 0, 0].tolist()
            assert batch["latents"].dtype == torch.float32 and batch["labels"].tolist() == [0, 0]
            captions = [CAPTIONS["train"][index][number] for index, number in now]
            assert_states(batch, captions, torch.float16)  # on its way to the device
            assert_states(data.transfer_batch_to_device(batch, torch.device("cpu"), 0), captions)


def test_validation_has_first_captions(folder, tmp_path):
    data = TextLatentDataModule(write_latents(tmp_path / "latents"), folder, batch_size=2)
    for _ in range(2):
        (batch,) = data.val_dataloader()
        assert_states(batch, ["a red circle", "a green cross"], torch.float16)
    assert_states(data.val_data.__getitems__([0, 1]), ["a red circle", "a green cross"])
    one = data.train_data[(1, 2)]
    assert_states({name: value[None] for name, value in one.items()}, ["a circle"])


def test_texts_of_other_images_are_refused(tmp_path, folder):
    latents = write_latents(tmp_path / "latents", 4)
    with pytest.raises(UserError, match=r"5 images of the subset train, .* latents of 4 other ones"):
        TextLatentDataModule(latents, folder)
    latents = write_latents(tmp_path / "latents")
    named = encode_texts(WordEncoder(), CAPTIONS, tmp_path / "a", latents.names, progress=False)
    assert len(TextLatentDataModule(latents, named).train_data) == 5
    names = {**latents.names, "train": latents.names["train"][::-1]}
    other = encode_texts(WordEncoder(), CAPTIONS, tmp_path / "b", names, progress=False)
    with pytest.raises(UserError, match="latents of 5 other ones"):
        TextLatentDataModule(latents, other)


def test_batches_resume_with_the_very_captions(folder, tmp_path):
    """Within the second epoch of two steps; other captions are refused."""
    latents = write_latents(tmp_path / "latents")
    order = CaptionOrder(torch.tensor([2, 3, 1, 4, 1]), 2, 1)
    order.set_epoch(1)
    state = {"epoch": 1, "batches_done": 1, "seed": 1, "samples": 5, "samples per step": 2, "captions": 11}
    data = TextLatentDataModule(latents, folder, 2, seed=1)
    data.load_state_dict(state)
    (batch,) = data.train_dataloader()
    assert batch["index"].tolist() == [index for index, _ in list(order)[2:]]
    assert_states(batch, [CAPTIONS["train"][index][number] for index, number in list(order)[2:]], torch.float16)
    with pytest.raises(UserError, match="captions = 16, here it is 11"):
        data.load_state_dict({**state, "captions": 16})
