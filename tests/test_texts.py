"""Texts: encoded once, without padding, equal ones once; read beside the latents with a caption for each image."""

import hashlib
import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import refuses, same
from torch import Tensor

from vavae_tools.data import text_states as texts
from vavae_tools.data.captions import CaptionOrder
from vavae_tools.data.latents import LatentFolder
from vavae_tools.data.text_states import TextFolder, TextLatentDataModule, encode_texts, needed_bytes

DIM, POOLED, MAX_SENTENCES = 4, 3, 8


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

    def encode(self, captions: list[str]) -> SimpleNamespace:
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
        return SimpleNamespace(tokens=tokens, mask=torch.arange(longest) < lengths[:, None], pooled=pooled)

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
    names = {"train": [f"train/{k}" for k in range(count)], "val": [f"val/{k}" for k in range(val)]}
    shards = {subset: [f"{subset}-00000.safetensors"] for subset in names}
    for subset, of_subset in names.items():
        rows = torch.arange(float(len(of_subset)))[:, None, None, None].expand(-1, 2, 2, 2).contiguous()
        labels = torch.zeros(len(of_subset), dtype=torch.int64)
        save_file({"latents": rows, "labels": labels}, path / shards[subset][0])
    statistics = [0.0, 0.0], [1.0, 1.0]
    folder = LatentFolder(path, "k", "w", *statistics, (2, 2, 2), (16, 16), False, {"any": 0}, names, shards)
    folder.write()
    return folder


@pytest.fixture
def folder(tmp_path) -> TextFolder:
    return encode_texts(WordEncoder(), CAPTIONS, tmp_path / "texts", progress=False)


def assert_states(batch: dict[str, Tensor], captions: list[str], dtype: torch.dtype = torch.float32) -> None:
    """They are what the encoder says, padded by hand."""
    words = [WordEncoder().words(caption) for caption in captions]
    longest = max(map(len, words))
    rows = [[numbers(word, DIM) for word in of] + [torch.zeros(DIM)] * (longest - len(of)) for of in words]
    assert same(batch["text_tokens"], torch.stack([torch.stack(row) for row in rows]).to(dtype))
    assert same(batch["text_mask"], torch.tensor([[place < len(of) for place in range(longest)] for of in words]))
    assert same(batch["text_pooled"], torch.stack([numbers(caption, POOLED) for caption in captions]).to(dtype))


def test_only_real_tokens_are_stored_and_equal_captions_once(tmp_path):
    encoder = WordEncoder()
    folder = encode_texts(encoder, CAPTIONS, tmp_path, batch_size=3, progress=False)
    assert encoder.encoded == DISTINCT
    tokens = sum(min(len(c.split()) + 2, MAX_SENTENCES) for c in DISTINCT)
    (name,) = folder.shards
    stored = load_file(folder.path / name)
    assert stored["tokens"].shape == (tokens, DIM) and stored["tokens"].dtype == stored["pooled"].dtype == torch.float16
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
    stored = [load_file(path) for path in folder.path.glob("*.safetensors")]
    assert needed == sum(values.nbytes for file in stored for values in file.values())
    (folder.path / list(folder.shards)[1]).unlink()
    left = needed_bytes(WordEncoder(), CAPTIONS, tmp_path / "texts")
    rows = 8 * sum(len(of) + 1 for subset in CAPTIONS.values() for of in subset)
    of_shard = sum(2 * DIM * min(len(c.split()) + 2, MAX_SENTENCES) + 2 * POOLED + 8 for c in DISTINCT[4:8])
    assert left == rows + of_shard


def test_an_interrupted_encoding_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(texts, "SHARD_SIZE", 4)
    whole = encode_texts(WordEncoder(), CAPTIONS, tmp_path / "whole", progress=False)
    with pytest.raises(KeyboardInterrupt):
        encode_texts(WordEncoder(fails_after=6), CAPTIONS, tmp_path / "killed", batch_size=2, progress=False)
    refuses("encode them first", TextFolder.read, tmp_path / "killed")
    encoder = WordEncoder()
    resumed = encode_texts(encoder, CAPTIONS, tmp_path / "killed", progress=False)
    assert encoder.encoded == DISTINCT[4:]  # the first shard was whole
    assert (resumed.key, resumed.tokens, resumed.cut) == (whole.key, whole.tokens, whole.cut)
    for name in (*whole.shards, texts.CAPTIONS):
        one, other = load_file(whole.path / name), load_file(resumed.path / name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_stale_texts_are_never_used_and_others_are_encoded_once(folder):
    def encode(name, captions):
        encoder = WordEncoder(name)
        return encode_texts(encoder, captions, folder.path.parent, progress=False), encoder.encoded

    assert encode("a", CAPTIONS) == (folder, [])
    changed, encoded = encode("b", CAPTIONS)
    assert encoded == DISTINCT and changed.key != folder.key
    fewer = {"train": CAPTIONS["train"][:2]}
    smaller, encoded = encode("b", fewer)
    assert smaller.pictures == {"train": 2} and len(encoded) == smaller.distinct == 5
    other, encoded = encode("b", {"train": fewer["train"][::-1]})
    assert encoded == []  # the same captions of other images: only who has which is written anew
    data = load_file(other.path / texts.CAPTIONS)
    distinct = sorted({"", *sum(fewer["train"], ())})
    assert [distinct[place] for place in data["train.places"]] == [*fewer["train"][1], *fewer["train"][0]]


def test_faults(tmp_path, monkeypatch):
    says = "Image 1 of the subset train has no caption"
    refuses(says, encode_texts, WordEncoder(), {"train": [("a",), ()]}, tmp_path, progress=False)
    for factor in (1e6, float("nan"), float("inf")):
        encoder = WordEncoder(factor=factor)
        refuses("States of this WordEncoder", encode_texts, encoder, CAPTIONS, tmp_path / str(factor), progress=False)
    monkeypatch.setattr("vavae_tools.data.encoded.free_bytes", lambda path: 100)
    encoder = WordEncoder()
    says = "No space: States of this WordEncoder need"
    refuses(says, encode_texts, encoder, CAPTIONS, tmp_path / "full", progress=False)
    assert encoder.encoded == []
    (tmp_path / texts.INDEX).write_text("{")
    refuses("damaged", TextFolder.read, tmp_path)


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
    (batch,) = data.val_dataloader()
    assert_states(batch, ["a red circle", "a green cross"], torch.float16)
    assert_states(data.val_data.get_batch([0, 1]), ["a red circle", "a green cross"])
    one = data.train_data[(1, 2)]
    assert_states({name: value[None] for name, value in one.items()}, ["a circle"])


def test_texts_of_other_images_are_refused(tmp_path, folder):
    latents = write_latents(tmp_path / "latents", 4)
    refuses(r"5 images of the subset train, .* latents of 4 other ones", TextLatentDataModule, latents, folder)
    latents = write_latents(tmp_path / "latents")
    named = encode_texts(WordEncoder(), CAPTIONS, tmp_path / "a", latents.names, progress=False)
    assert len(TextLatentDataModule(latents, named).train_data) == 5
    names = {**latents.names, "train": latents.names["train"][::-1]}
    other = encode_texts(WordEncoder(), CAPTIONS, tmp_path / "b", names, progress=False)
    refuses("latents of 5 other ones", TextLatentDataModule, latents, other)


@pytest.mark.parametrize("name", ["tokens-00000.safetensors", texts.CAPTIONS])
def test_files_of_another_encoding_are_refused(tmp_path, folder, name):
    others = {**CAPTIONS, "train": CAPTIONS["train"][::-1]}
    other = encode_texts(WordEncoder("b"), others, tmp_path / "b", progress=False)
    (folder.path / name).write_bytes((other.path / name).read_bytes())
    says = rf"{name} is of another encoding than texts\.json beside it: delete both"
    refuses(says, TextLatentDataModule, write_latents(tmp_path / "latents"), folder)


def test_texts_of_an_earlier_version_are_read(tmp_path, folder):
    """Neither index nor captions say whose the files are."""
    index = json.loads((folder.path / texts.INDEX).read_text())
    del index["keys"]
    (folder.path / texts.INDEX).write_text(json.dumps(index))
    save_file(load_file(folder.path / texts.CAPTIONS), folder.path / texts.CAPTIONS)
    latents, encoder = write_latents(tmp_path / "latents"), WordEncoder()
    former = encode_texts(encoder, CAPTIONS, folder.path.parent, progress=False)
    assert encoder.encoded == [] and len(TextLatentDataModule(latents, former).train_data) == 5


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
    refuses("captions = 16, here it is 11", data.load_state_dict, {**state, "captions": 16})
