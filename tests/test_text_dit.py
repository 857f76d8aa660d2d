"""The denoiser on text, and what it is told: padding counts for nothing, the empty prompt is the null."""

import pytest
import torch
from tiny import same, trained_looking

from vavae_tools.diffusion.clip import TextStates, tiny_text_encoder
from vavae_tools.diffusion.factory import make_denoiser
from vavae_tools.diffusion.text_conditioning import TextCondition, TextConditioner
from vavae_tools.diffusion.text_dit import CrossAttention, TextDiT
from vavae_tools.runtime.errors import UserError

TINY = {"input_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2}


def trained(**changes) -> TextDiT:
    torch.manual_seed(0)
    return trained_looking(TextDiT(**{**TINY, **changes}))


def inputs(batch_size: int = 2, length: int = 5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch_size, 3, 4, 4, generator=generator)
    vector = torch.randn(batch_size, 32, generator=generator)
    tokens = torch.randn(batch_size, length, 32, generator=generator)
    mask = torch.arange(length) < torch.tensor([[3], [length]])[:batch_size]
    return x, torch.rand(batch_size, generator=generator), TextCondition(vector, tokens, mask)


def test_cross_attention_is_that_of_torch():
    torch.manual_seed(0)
    ours, theirs = CrossAttention(32, 4, False, True), torch.nn.MultiheadAttention(32, 4, batch_first=True)
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([ours.q.weight, ours.kv.weight]))
        theirs.in_proj_bias.copy_(torch.cat([ours.q.bias, ours.kv.bias]))
        theirs.out_proj.load_state_dict(ours.proj.state_dict())
    x, text, mask = torch.randn(2, 7, 32), torch.randn(2, 5, 32), torch.arange(5) < torch.tensor([[3], [5]])
    made = ours(x, text, mask[:, None, None], torch.ones(2, 1, 1, dtype=torch.bool))
    torch.testing.assert_close(made, theirs(x, text, text, key_padding_mask=~mask)[0])


def test_it_begins_with_blocks_that_change_nothing_and_an_output_of_zero():
    torch.manual_seed(0)
    model, (x, t, condition) = TextDiT(**TINY), inputs()
    seen = []
    model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.blocks[-1].register_forward_hook(lambda _, given, made: seen.append(made))
    assert same(model(x, t, condition), torch.zeros_like(x)) and same(*seen)


@pytest.mark.parametrize("junk", [1e4, float("nan")])
@torch.no_grad()
def test_masked_tokens_have_no_influence(junk):
    model, (x, t, condition) = trained(), inputs()
    tokens = condition.tokens.masked_fill(~condition.mask[..., None], junk)
    made = model(x, t, condition)
    assert same(model(x, t, TextCondition(condition.vector, tokens, condition.mask)), made)
    cut = TextCondition(condition.vector[:1], condition.tokens[:1, :3], None)
    torch.testing.assert_close(model(x[:1], t[:1], cut), made[:1])


@torch.no_grad()
def test_text_matters_token_by_token_and_as_a_whole():
    model, (x, t, condition) = trained(), inputs()
    made = model(x, t, condition)
    tokens = condition.tokens.clone()
    tokens[0, 1] += 1
    changed = model(x, t, TextCondition(condition.vector, tokens, condition.mask))
    assert (changed[0] - made[0]).abs().max() > 1e-4 and same(changed[1], made[1])
    whole = model(x, t, TextCondition(condition.vector + 1, condition.tokens, condition.mask))
    assert (whole - made).abs().max() > 1e-4
    later = model(x, t + 0.1, condition)
    assert (later - made).abs().max() > 1e-4


def test_a_caption_without_tokens_takes_nothing_from_others_and_no_nan():
    model, (x, t, condition) = trained(), inputs()
    mask = condition.mask.clone()
    mask[0] = False
    tokens = condition.tokens.clone().requires_grad_()
    made = model(x, t, TextCondition(condition.vector, tokens, mask))
    made.square().sum().backward()
    assert made.isfinite().all() and all(w.grad.isfinite().all() for w in model.parameters())
    assert tokens.grad[0].abs().max() == 0 < tokens.grad[1].abs().max()
    other = model(x, t, TextCondition(condition.vector, condition.tokens + 5, mask))
    assert same(other[0], made[0])


@pytest.mark.parametrize("changes", [{}, {"qk_norm": True}, {"swiglu": False, "rope": False, "rms_norm": False}])
def test_checkpointed_gradients_are_the_same(changes):
    model, (x, t, condition) = trained(**changes), inputs()
    gradients = []
    for checkpointing in (False, True):
        (model.enable_gradient_checkpointing if checkpointing else model.disable_gradient_checkpointing)()
        model.zero_grad()
        model(x, t, condition).square().sum().backward()
        gradients.append([weight.grad.clone() for weight in model.parameters()])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)
    assert all(gradient.abs().max() > 0 for gradient in gradients[0])


def test_under_autocast_it_is_nearly_the_same():
    model, (x, t, condition) = trained(), inputs()
    expected = model(x, t, condition)
    with torch.autocast("cpu", torch.bfloat16):
        made = model(x, t, condition)
    assert (made.float() - expected).abs().max() < 0.05 * expected.abs().max()


def test_compiled_blocks_give_the_same():
    model, (x, t, condition) = trained(), inputs()
    expected = model(x, t, condition)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(x, t, condition), expected)


def test_the_default_is_the_configuration_of_the_issue():
    with torch.device("meta"):
        model = TextDiT()
    assert model.latent_shape == (4, 32, 32) and (model.rows, len(model.blocks)) == (16, 16)
    assert model.blocks[0].attn.num_heads == 12 and model.conditioning_size == 768
    d, hidden = 768, 2048
    linear = [(d, 3 * d), (d, d), (d, d), (d, 2 * d), (d, d), (d, 2 * hidden), (hidden, d), (d, 9 * d)]
    block = sum(a * b + b for a, b in linear) + 3 * d
    embedders = (16 * d + d) + (256 * d + d) + (d * d + d)
    last = d + (d * 16 + 16) + (d * 2 * d + 2 * d)
    assert model.num_parameters() == 16 * block + embedders + last


def test_numbers_make_it_and_bring_it_back(tmp_path):
    model, (x, t, condition) = trained(input_size=(4, 4)), inputs()
    model.save_pretrained(tmp_path)
    assert same(TextDiT.from_pretrained(tmp_path, low_cpu_mem_usage=False)(x, t, condition), model(x, t, condition))
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items() if k[0] != "_"}
    again = make_denoiser(config)
    again.load_state_dict(model.state_dict())
    assert type(again) is TextDiT and same(again(x, t, condition), model(x, t, condition))
    with torch.device("meta"):
        assert make_denoiser({"head": "text", "size": "S", "input_size": 8}).conditioning_size == 384
        assert make_denoiser({"head": "text"}).num_parameters() == TextDiT().num_parameters()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"input_size": 5}, "cannot be cut into patches of 2×2"),
        ({"num_heads": 3}, "the heads must divide it"),
        ({"time_embed": "x"}, "time_embed='x' is unknown"),
        ({"head": "wide"}, "head='wide' of a TextDiT"),
    ],
)
def test_numbers_that_cannot_be(changes, said):
    with pytest.raises(UserError, match=said):
        TextDiT(**{**TINY, **changes})
    with pytest.raises(UserError, match="TextDiT has no argument dept; the nearest one is depth"):
        make_denoiser({"head": "text", "dept": 2})


# ---- what it is told


@pytest.fixture(scope="module")
def encoder():
    return tiny_text_encoder(["a red circle", "one blue square"], dim=16)


def conditioner(encoder, **changes) -> TextConditioner:
    torch.manual_seed(2)
    made = trained_looking(TextConditioner(16, 16, 32, **changes))
    made.set_empty(encoder.encode([""]))
    return made


@torch.no_grad()
def test_the_empty_prompt_is_the_null_and_what_is_dropped(encoder):
    text = conditioner(encoder)
    states = encoder.encode(["a red circle", "one blue square", ""])
    null, empty = text.null(2), text(encoder.encode([""]))
    for name in ("vector", "tokens", "mask"):
        assert same(getattr(null, name)[1:], getattr(empty, name))
    dropped = text(states, torch.tensor([True, False, True]))
    kept = text(states)
    assert same(dropped.mask[0], kept.mask[2]) and dropped.mask.sum(1).tolist() == [2, 5, 2]
    torch.testing.assert_close(dropped.vector, torch.stack([kept.vector[2], kept.vector[1], kept.vector[2]]))
    torch.testing.assert_close(dropped.tokens[:, :2], kept.tokens[[2, 1, 2], :2])
    model, x, t = trained(), *inputs(3)[:2]
    torch.testing.assert_close(model(x, t, dropped)[0], model(x[:1], t[:1], text.null(1))[0])


def test_shorter_captions_than_the_empty_prompt_and_states_in_half_precision(encoder):
    text = TextConditioner(16, 16, 32, empty_length=6)
    text.set_empty(TextStates(torch.ones(1, 6, 16), torch.ones(1, 6, dtype=torch.bool), torch.ones(1, 16)))
    states = encoder.encode(["red", "blue"])
    made = text(states, torch.tensor([True, False]))
    assert made.tokens.shape == (2, 6, 32) and made.mask.sum(1).tolist() == [6, 3]
    half = text(TextStates(states.tokens.half(), states.mask, states.pooled.half()))
    assert half.vector.dtype == torch.float32
    torch.testing.assert_close(half.tokens, text(states).tokens, rtol=0.01, atol=0.01)


def test_the_empty_prompt_is_saved_beside_the_weights(encoder, tmp_path):
    text = conditioner(encoder)
    text.save_pretrained(tmp_path)
    again = TextConditioner.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert same(again.null(3).tokens, text.null(3).tokens)
    fresh = TextConditioner(**{k: v for k, v in text.config.items() if k[0] != "_"})
    with pytest.raises(UserError, match="does not know the empty prompt"):
        fresh.null(1)
    with pytest.raises(UserError, match="does not know the empty prompt"):
        fresh(encoder.encode(["red"]), torch.tensor([True]))
    assert fresh(encoder.encode(["red"])).vector.shape == (1, 32)
    fresh.load_state_dict(text.state_dict())
    assert same(fresh.null(1).vector, text.null(1).vector)
    with pytest.raises(UserError, match=r"this conditioner was made for \(1, L, 16\)"):
        text.set_empty(encoder.encode(["", ""]))
    assert {name for name, _ in text.named_parameters()}.isdisjoint({"empty_tokens", "empty_pooled"})


def test_conditions_one_after_the_other(encoder):
    text = conditioner(encoder)
    both = TextCondition.cat([text(encoder.encode(["a red circle"])), text.null(2)])
    assert len(both) == 3 and both.mask.sum(1).tolist() == [5, 2, 2] and both.tokens.shape == (3, 5, 32)
    assert same(both[1:].vector, text.null(2).vector)
