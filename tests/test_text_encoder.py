"""The frozen text encoder: transformers' own numbers, words told apart, folders that are not what they say."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from forked import python
from tiny import refuses, same

from vavae_tools.diffusion.clip import load_text_encoder, tiny_text_encoder

FORMS = ("a {} circle at the top left", "one small {} ring", "a large {} square in the middle", "a tiny {} cross below")
SENTENCES = [form.format(colour) for form in FORMS for colour in ("red", "blue", "green", "yellow")]


@pytest.fixture(scope="module")
def encoder():
    return tiny_text_encoder(SENTENCES)


@pytest.fixture
def folder(encoder, tmp_path):
    encoder.save(tmp_path / "clip")
    return tmp_path / "clip"


def test_states_are_those_of_transformers(encoder):
    captions = ["a tiny red circle", "", "one small blue ring at the top left"]
    states = encoder.encode(captions)
    rows = encoder.tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = encoder.model(**rows)
    assert same(states.mask, rows["attention_mask"].bool())
    torch.testing.assert_close(states.tokens[states.mask], expected.last_hidden_state[states.mask])
    torch.testing.assert_close(states.pooled, expected.pooler_output)
    assert states.mask.sum(1).tolist() == [6, 2, 10] and states.tokens.shape == (3, 10, encoder.dim)
    alone = encoder.encode(captions[:1])  # padding changes nothing
    torch.testing.assert_close(states.tokens[:1, :6], alone.tokens)
    torch.testing.assert_close(states.pooled[:1], alone.pooled)
    rows = states[torch.tensor([2, 0])]
    assert len(rows) == 2 and same(rows.pooled, states.pooled[[2, 0]])


def test_long_captions_are_cut_and_counted_and_keep_their_end():
    encoder = tiny_text_encoder(["red green blue"], max_tokens=5)
    lengths, cut = encoder.lengths(["red", "red green blue", "red green blue red", ""])
    assert (lengths, cut) == ([3, 5, 6, 2], 1)
    states = encoder.encode(["red green blue red", "red green blue"])
    assert states.tokens.shape[1] == 5 and same(states.pooled[0], states.pooled[1])
    torch.testing.assert_close(states.pooled, states.tokens[:, 4])


def test_every_word_is_one_token_and_others_are_spelled(encoder):
    words = {word for sentence in SENTENCES for word in sentence.split()}
    assert all(encoder.tokenizer.tokenize(word) == [f"{word}</w>"] for word in words)
    spelled = encoder.tokenizer.tokenize("Xyzzy ß")
    assert "".join(spelled[:-1]).startswith("xyzzy</w>") and len(spelled) > 3
    assert encoder.tokenizer.unk_token_id not in encoder.tokenizer("Xyzzy ß")["input_ids"][1:-1]


def test_the_digest_knows_weights_and_tokenizer_but_not_what_was_asked(encoder, folder):
    before = encoder.digest()
    encoder.encode(["red", "a very long caption " * 30])
    assert encoder.digest() == before == load_text_encoder(folder).digest() == tiny_text_encoder(SENTENCES).digest()
    other = load_text_encoder(folder)
    other.model.final_layer_norm.bias[0] += 1e-3
    others = (other, tiny_text_encoder(SENTENCES, seed=1), tiny_text_encoder([*SENTENCES, "extra"]))
    assert len({before, *(each.digest() for each in others)}) == 4
    code = "from test_text_encoder import *; print(tiny_text_encoder(SENTENCES).digest())"  # in another process, too
    command = [python(), "-c", code]
    told = subprocess.run(command, cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout
    assert told.split()[-1] == before


def test_folders_of_all_kinds_give_the_same_states(encoder, folder, tmp_path):
    from transformers import CLIPConfig, CLIPModel

    expected = encoder.encode(SENTENCES[:4])

    def check(source):
        states = load_text_encoder(source).encode(SENTENCES[:4])
        assert same(states.tokens, expected.tokens) and same(states.pooled, expected.pooled)

    check(folder)
    pipeline = tmp_path / "stable-diffusion"
    encoder.model.save_pretrained(pipeline / "text_encoder")
    encoder.tokenizer.save_pretrained(pipeline / "tokenizer")
    check(pipeline)
    check(pipeline / "text_encoder")

    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    vision["image_size"] = 32
    whole = CLIPModel(CLIPConfig(text_config=encoder.model.config.to_dict(), vision_config=vision))
    loaded = getattr(whole.text_model, "text_model", whole.text_model).load_state_dict(encoder.model.state_dict())
    assert not loaded.missing_keys
    whole.save_pretrained(tmp_path / "whole")
    encoder.tokenizer.save_pretrained(tmp_path / "whole")
    check(tmp_path / "whole")


def test_a_tokenizer_of_two_files_as_stable_diffusion_has_it(encoder, folder, tmp_path):
    described = json.loads((folder / "tokenizer.json").read_text())["model"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()
    (folder / "vocab.json").write_text(json.dumps(described["vocab"]))
    pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in described["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *pairs]) + "\n")
    states = load_text_encoder(folder).encode(SENTENCES)
    assert same(states.tokens, encoder.encode(SENTENCES).tokens)


def test_a_folder_that_is_not_what_it_should_be(encoder, folder, tmp_path):
    (tmp_path / "empty").mkdir()
    tiny_text_encoder(SENTENCES, num_layers=1).save(tmp_path / "shallow")
    shutil.copy(folder / "config.json", tmp_path / "shallow" / "config.json")
    encoder.model.save_pretrained(tmp_path / "alone")
    tiny_text_encoder([*SENTENCES, "many other words which the model does not know"]).tokenizer.save_pretrained(folder)
    for name, message in (
        ("nowhere", "No folder .*nowhere of a text encoder"),
        ("empty", "No weights in .*empty: expected model.safetensors"),
        ("shallow", r"lacks .* weights, the first .*layers\.1"),
        ("alone", r"a text encoder without a tokenizer: tokenizer\.json"),
        (folder.name, "they belong to different models"),
    ):
        refuses(message, load_text_encoder, tmp_path / name)
