"""What denoisers are told: labels and captions, and the null that stands for any of them."""

import pytest
import torch
from tiny import refuses, same, trained_looking

from vavae_tools.diffusion.clip import TextStates, tiny_text_encoder
from vavae_tools.diffusion.conditioning import ClassConditioner, TextCondition, TextConditioner


def test_dropping_all_labels_is_the_null(tmp_path):
    conditioner, labels = ClassConditioner(5, 8, dropout=0.2), torch.arange(5)
    assert same(conditioner(labels, drop=torch.ones(5, dtype=torch.bool)), conditioner.null(5))
    assert same(conditioner(labels, drop=torch.zeros(5)), conditioner(labels))
    mixed = conditioner(labels, drop=labels == 2)
    assert same(mixed[2], conditioner.null(1)[0]) and same(mixed[3], conditioner(labels)[3])
    conditioner.save_pretrained(tmp_path)
    loaded = ClassConditioner.from_pretrained(tmp_path)
    assert loaded.dropout == 0.2 and same(loaded(labels), conditioner(labels))
    without = ClassConditioner(5, 8, dropout=0.0)
    assert without.embedding_table.num_embeddings == 5
    refuses("no null", without.null, 2)


@pytest.fixture(scope="module")
def encoder():
    return tiny_text_encoder(["a red circle", "one blue square"], dim=16)


@pytest.fixture
def text(encoder) -> TextConditioner:
    torch.manual_seed(2)
    made = trained_looking(TextConditioner(16, 16, 32))
    made.set_empty(encoder.encode([""]))
    return made


@torch.no_grad()
def test_the_empty_prompt_is_the_null_and_what_is_dropped(encoder, text):
    states = encoder.encode(["a red circle", "one blue square", ""])
    null, empty = text.null(2), text(encoder.encode([""]))
    for name in ("vector", "tokens", "mask"):
        assert same(getattr(null, name)[1:], getattr(empty, name))
    dropped = text(states, torch.tensor([True, False, True]))
    kept = text(states)
    assert same(dropped.mask[0], kept.mask[2]) and dropped.mask.sum(1).tolist() == [2, 5, 2]
    torch.testing.assert_close(dropped.vector, torch.stack([kept.vector[2], kept.vector[1], kept.vector[2]]))
    torch.testing.assert_close(dropped.tokens[:, :2], kept.tokens[[2, 1, 2], :2])
    both = TextCondition.cat([text(encoder.encode(["a red circle"])), null])
    assert len(both) == 3 and both.mask.sum(1).tolist() == [5, 2, 2] and both.tokens.shape == (3, 5, 32)
    assert same(both[1:].vector, null.vector)


def test_shorter_captions_than_the_empty_prompt_and_states_in_half_precision(encoder):
    text = TextConditioner(16, 16, 32, empty_length=6)
    text.set_empty(TextStates(torch.ones(1, 6, 16), torch.ones(1, 6, dtype=torch.bool), torch.ones(1, 16)))
    states = encoder.encode(["red", "blue"])
    made = text(states, torch.tensor([True, False]))
    assert made.tokens.shape == (2, 6, 32) and made.mask.sum(1).tolist() == [6, 3]
    half = text(TextStates(states.tokens.half(), states.mask, states.pooled.half()))
    assert half.vector.dtype == torch.float32
    torch.testing.assert_close(half.tokens, text(states).tokens, rtol=0.01, atol=0.01)


def test_the_empty_prompt_is_saved_beside_the_weights(text, tmp_path):
    text.save_pretrained(tmp_path)
    again = TextConditioner.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert same(again.null(3).tokens, text.null(3).tokens)
    fresh = TextConditioner(**{k: v for k, v in text.config.items() if k[0] != "_"})
    refuses("does not know the empty prompt", fresh.null, 1)
    fresh.load_state_dict(text.state_dict())
    assert same(fresh.null(1).vector, text.null(1).vector)
