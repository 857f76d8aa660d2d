"""What DiT, DDT and TextDiT share: a start at zero, saving, checkpointing, half precision, compilation, refusals."""

import pytest
import torch
from tiny import refuses, same, trained_looking

from vavae_tools.diffusion.conditioning import TextCondition
from vavae_tools.diffusion.dit import DDT, DiT, TextDiT
from vavae_tools.diffusion.layers import Backbone, SwiGLU, rope_table, rotate

TINY = {
    DiT: {"input_size": 4, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2},
    DDT: {"input_size": 4, "in_channels": 3, "hidden_size": (32, 64), "depth": (2, 1), "num_heads": (2, 4)},
    TextDiT: {"input_size": 4, "in_channels": 3, "patch_size": 2, "hidden_size": 32, "depth": 2, "num_heads": 2},
}
OPTIONS = [
    (DiT, {}),
    (DiT, {"input_size": (4, 6), "patch_size": 2, "positions": "sequence"}),
    (DiT, {"swiglu": False, "rms_norm": False, "qk_norm": True}),
    (DiT, {"rope": False, "adaln_shift": False, "learn_sigma": True, "time_embed": "fourier", "reversed_time": True}),
    (DDT, {}),
    (DDT, {"input_size": (4, 6), "patch_size": 2}),
    (DDT, {"patch_size": [1, 1], "rope": False, "adaln_shift": False, "pos_embed": False}),
    (TextDiT, {}),
    (TextDiT, {"qk_norm": True, "swiglu": False, "rope": False, "rms_norm": False}),
]
KINDS = pytest.mark.parametrize("kind", TINY)


def trained(kind: type[Backbone], **changes) -> Backbone:
    torch.manual_seed(0)
    return trained_looking(kind(**{**TINY[kind], **changes}))


def inputs(kind: type[Backbone], width: int = 4) -> tuple:
    generator = torch.Generator().manual_seed(1)
    x, t = torch.randn(2, 3, 4, width, generator=generator), torch.rand(2, generator=generator)
    condition = torch.randn(2, 32, generator=generator)
    if kind is TextDiT:
        tokens, mask = torch.randn(2, 5, 32, generator=generator), torch.arange(5) < torch.tensor([[3], [5]])
        condition = TextCondition(condition, tokens, mask)
    return x, t, condition


def gradients(model: Backbone, given: tuple, kind: torch.dtype | None = None) -> list[torch.Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", kind or torch.bfloat16, enabled=kind is not None):
        loss = model(*given).float().square().mean()
    loss.backward()
    return [weight.grad.clone() for weight in model.parameters() if weight.requires_grad]


@KINDS
def test_a_fresh_model_passes_x_on_and_returns_exactly_zero(kind):
    model, seen = kind(**TINY[kind]), []
    model.blocks[0].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    model.blocks[1].register_forward_hook(lambda _, given, made: seen.append(made))
    x, t, condition = inputs(kind)
    assert same(model(x, t, condition), torch.zeros_like(x)) and same(*seen)


@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_options_save_and_load(kind, options, tmp_path):
    model, given = trained(kind, **options), inputs(kind, width=6 if "input_size" in options else 4)
    made = model(*given)
    assert made.shape == given[0].shape and made.abs().min() > 0
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path, low_cpu_mem_usage=False)
    assert same(loaded(*given), made) and loaded.latent_shape == given[0].shape[1:] and loaded.conditioning_size == 32


@pytest.mark.parametrize("precision", [None, torch.bfloat16])
@pytest.mark.parametrize(("kind", "options"), OPTIONS)
def test_checkpointing_computes_blocks_twice_and_the_same_gradients(kind, options, precision):
    model, given, calls = trained(kind, **options).train(), inputs(kind, 6 if "input_size" in options else 4), []
    for block in model.blocks:
        block.attn.register_forward_pre_hook(lambda *_: calls.append(1))
    plain = gradients(model, given, precision)
    once = len(calls)
    model.enable_gradient_checkpointing()
    again = gradients(model, given, precision)
    assert len(calls) == 3 * once and all(same(one, other) for one, other in zip(plain, again, strict=True))
    assert all(gradient.abs().max() > 0 for gradient in plain)


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
@KINDS
def test_a_step_under_autocast_stays_near_float32(kind, precision, monkeypatch):
    attended, residual, attention = [], [], torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *qkv, **mask: attended.append({x.dtype for x in qkv}) or attention(*qkv, **mask),
    )
    model, given = trained(kind, qk_norm=True).train(), inputs(kind)
    model.blocks[1].register_forward_pre_hook(lambda _, given: residual.append(given[0].dtype))
    exact, mixed = (torch.cat([g.flatten() for g in gradients(model, given, k)]) for k in (None, precision))
    half = len(attended) // 2
    assert attended == [{torch.float32}] * half + [{precision}] * half and residual == [torch.float32] * 2
    assert mixed.dtype == torch.float32
    assert (mixed - exact).norm() < (0.01 if precision == torch.float16 else 0.05) * exact.norm()


@KINDS
@torch.no_grad()
def test_compiles_without_a_break(kind):
    model, given = trained(kind), inputs(kind)
    expected = model(*given)
    torch.testing.assert_close(torch.compile(model, fullgraph=True, backend="eager")(*given), expected)
    model.compile_repeated_blocks(backend="eager", fullgraph=True)
    torch.testing.assert_close(model(*given), expected)


@pytest.mark.slow
def test_a_compiled_step_equals_the_eager_one():
    pytest.importorskip("torch._inductor")
    model, given = trained(DiT).train(), inputs(DiT)
    eager = gradients(model, given)
    model.compile_repeated_blocks(fullgraph=True)
    largest = max(gradient.abs().max().item() for gradient in eager)
    for one, other in zip(eager, gradients(model, given), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * max(1, largest))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (DiT, {"patch_size": 3}, "patches of 3×3"),
        (DiT, {"num_heads": 5}, "num_heads 5"),
        (DiT, {"time_embed": "x"}, "No time_embed 'x'; there are sinusoidal"),
        (DDT, {"patch_size": [2, 1]}, "patch_size 2 and 1"),
        (DDT, {"num_heads": (3, 4)}, "encoder's hidden_size 32 with num_heads 3"),
        (DDT, {"num_heads": (2, 32)}, "head's hidden_size 64 with num_heads 32"),
        (DDT, {"hidden_size": 32}, "hidden_size is 32, expected two numbers"),
    ],
)
def test_wrong_settings_are_named(kind, changes, message):
    refuses(message, kind, **{**TINY[kind], **changes})


@KINDS
def test_latents_of_another_shape_are_named(kind):
    x, t, condition = inputs(kind)
    refuses(r"3×4×2 .* 3×4×4", kind(**TINY[kind]), x[..., :2], t, condition)


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    q, k = torch.randn(2, 1, 16).expand(2, 35, 16)
    q_turned, k_turned = (rotate(part, *rope_table(5, 7, 16)) for part in (q, k))
    torch.testing.assert_close(q_turned.norm(dim=-1), q.norm(dim=-1))
    scores = (q_turned @ k_turned.T).view(5, 7, 5, 7)
    torch.testing.assert_close(scores[0, 0, 2, 3], scores[2, 3, 4, 6], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [21, 24, 2 * 2730 // 4])
def test_zeros_behind_a_width_change_nothing(hidden):
    """As on a card in half precision; here in float64, where the order of sums does not show."""
    torch.manual_seed(0)
    mlp, x = SwiGLU(8, hidden).double(), torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    assert (hidden + mlp.lacking) % 8 == 0 <= mlp.lacking < 8
    ways = mlp(x), mlp.padded(x, torch.float64)
    found = [(made, *torch.autograd.grad(made.square().sum(), [x, *mlp.parameters()])) for made in ways]
    for plain, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-12)
