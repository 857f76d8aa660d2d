"""The denoiser on text: padding counts for nothing, each token and the whole caption count."""

import pytest
import torch
from test_backbone import inputs, trained
from tiny import refuses, same

from vavae_tools.diffusion.conditioning import TextCondition
from vavae_tools.diffusion.dit import TextDiT, make_denoiser
from vavae_tools.diffusion.layers import CrossAttention


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


@pytest.mark.parametrize("junk", [1e4, float("nan")])
@torch.no_grad()
def test_masked_tokens_have_no_influence(junk):
    model, (x, t, condition) = trained(TextDiT), inputs(TextDiT)
    tokens = condition.tokens.masked_fill(~condition.mask[..., None], junk)
    made = model(x, t, condition)
    assert same(model(x, t, TextCondition(condition.vector, tokens, condition.mask)), made)
    cut = TextCondition(condition.vector[:1], condition.tokens[:1, :3], condition.mask[:1, :3])
    torch.testing.assert_close(model(x[:1], t[:1], cut), made[:1])


@torch.no_grad()
def test_text_matters_token_by_token_and_as_a_whole():
    model, (x, t, condition) = trained(TextDiT), inputs(TextDiT)
    made = model(x, t, condition)
    tokens = condition.tokens.clone()
    tokens[0, 1] += 1
    changed = model(x, t, TextCondition(condition.vector, tokens, condition.mask))
    assert (changed[0] - made[0]).abs().max() > 1e-4 and same(changed[1], made[1])
    whole = model(x, t, TextCondition(condition.vector + 1, condition.tokens, condition.mask))
    for other in (whole, model(x, t + 0.1, condition)):
        assert (other - made).abs().max() > 1e-4


def test_a_caption_without_tokens_takes_nothing_from_others_and_no_nan():
    model, (x, t, condition) = trained(TextDiT), inputs(TextDiT)
    mask, tokens = condition.mask * torch.tensor([[False], [True]]), condition.tokens.clone().requires_grad_()
    made = model(x, t, TextCondition(condition.vector, tokens, mask))
    made.square().sum().backward()
    assert made.isfinite().all() and all(w.grad.isfinite().all() for w in model.parameters())
    assert tokens.grad[0].abs().max() == 0 < tokens.grad[1].abs().max()
    other = model(x, t, TextCondition(condition.vector, condition.tokens + 5, mask))
    assert same(other[0], made[0])


def test_numbers_make_it():
    model, (x, t, condition) = trained(TextDiT, input_size=(4, 4)), inputs(TextDiT)
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items() if k[0] != "_"}
    again = make_denoiser(config)
    again.load_state_dict(model.state_dict())
    assert type(again) is TextDiT and same(again(x, t, condition), model(x, t, condition))
    refuses(r"No argument 'dept' of TextDiT \(did you mean depth\?\)", make_denoiser, {"head": "text", "dept": 2})
    with torch.device("meta"):
        assert make_denoiser({"head": "text", "size": "S", "input_size": 8}).conditioning_size == 384
