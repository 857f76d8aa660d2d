import json

import pytest
import torch
from golden_cases import SHARED, assert_close, folder, load_case, load_weights

from vavae_tools.diffusion.conditioning import ClassConditioner, check_labels
from vavae_tools.diffusion.fused import AddGated, GateBySwish, NormAndModulate, SplitAndRotate
from vavae_tools.diffusion.layers import (
    PatchEmbed,
    SwiGLU,
    half_on_card,
    kept_patches,
    rope_table,
    rotate,
    sincos_table,
)
from vavae_tools.diffusion.solvers import guided_prediction
from vavae_tools.diffusion.transformer import DiT, DiT_SIZES, dit
from vavae_tools.published import load_reference
from vavae_tools.published.lightningdit import split_config, split_state_dict
from vavae_tools.runtime.errors import UserError

KNOWN = {"lightningdit-a", "lightningdit-b", "lightningdit-eps"}  # b is in ../shared only: tests/golden stays small
CASES = sorted(KNOWN | {path.name for path in SHARED.glob("lightningdit-*")})
TINY = {"input_size": 4, "in_channels": 3, "hidden_size": 32, "depth": 2, "num_heads": 2}


def reference(name: str):
    case, tensors = load_case(name)
    return load_reference("lightningdit", load_weights(name), case["constructor"]), case, tensors


def trained(**changes) -> DiT:
    """A tiny model whose weights are not the zeros of a fresh one."""
    torch.manual_seed(0)
    model = DiT(**{**TINY, **changes})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(batch_size: int = 2, height: int = 4, width: int = 4):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch_size, 3, height, width, generator=generator)
    return x, torch.rand(batch_size, generator=generator), torch.randn(batch_size, 32, generator=generator)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_equal_the_reference(name):
    model, case, tensors = reference(name)
    assert_close(model(tensors["x"], tensors["t"], tensors["y"]), tensors["out"], case["tolerance"])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_the_parts_equal_the_reference(name):
    model, case, tensors = reference(name)
    denoiser = model.denoiser
    taps = {}
    for i, block in enumerate(denoiser.blocks):
        block.register_forward_hook(lambda _, __, out, i=i: taps.update({f"tap_block{i}_out": out[2:3]}))
    denoiser.blocks[0].attn.register_forward_hook(lambda _, __, out: taps.update(tap_block0_attn_out=out[2:3]))
    denoiser.x_embedder.register_forward_hook(lambda _, __, out: taps.update(tap_patch_embed_without_pos=out[2:3]))
    denoiser.t_embedder.register_forward_hook(lambda _, __, out: taps.update(tap_t_emb=out))
    model.conditioner.register_forward_hook(lambda _, __, out: taps.update(tap_y_emb=out))
    model(tensors["x"], tensors["t"], tensors["y"])
    expected = [key for key in tensors if key.startswith("tap_")]
    assert expected
    for key in expected:
        assert_close(taps[key], tensors[key], case["tolerance"])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_guidance_on_three_channels_equals_the_reference(name):
    model, case, tensors = reference(name)
    n = len(tensors["cfg_x"]) // 2
    x, labels = tensors["cfg_x"][:n], tensors["cfg_y"][:n]
    for run in case["cfg_cases"]:
        start = run["cfg_interval_start"] if run["cfg_interval"] else 0.0
        velocity = guided_prediction(
            model.denoiser,
            x,
            run["t"],
            model.conditioner(labels),
            model.conditioner.null(n),
            run["cfg_scale"],
            guidance_interval=(start, 1.0),
            guidance_channels="first3",
        )
        assert_close(velocity, tensors[run["output"]][:n], case["tolerance"])


def test_tables_equal_the_reference():
    weights = load_weights("lightningdit-a")
    cos, signed_sin = rope_table(8, 8, 16)
    sign = torch.tensor([-1.0, 1.0]).repeat(8)
    torch.testing.assert_close(sincos_table(8, 8, 64)[None], weights["pos_embed"], rtol=0, atol=1e-6)
    torch.testing.assert_close(cos, weights["feat_rope.freqs_cos"], rtol=0, atol=1e-6)
    torch.testing.assert_close(signed_sin * sign, weights["feat_rope.freqs_sin"], rtol=0, atol=1e-6)


FULL = json.loads((folder("lightningdit-a") / "full_keys.json").read_text())


@pytest.mark.parametrize("name", FULL)
def test_full_sizes_have_the_published_parameters(name):
    size, patch = name.removeprefix("LightningDiT-").split("/")
    with torch.device("meta"):
        denoiser = dit(size, input_size=16, patch_size=int(patch), in_channels=32)
        conditioner = ClassConditioner(1000, DiT_SIZES[size]["hidden_size"])
    trainable = denoiser.num_parameters() + conditioner.num_parameters()
    assert trainable == FULL[name]["trainable"]
    assert trainable + denoiser.pos_embed.numel() == FULL[name]["parameters"]
    if "keys" in FULL[name]:
        meta = {key: torch.empty(shape, device="meta") for key, shape in FULL[name]["keys"].items()}
        for model, weights in zip((denoiser, conditioner), split_state_dict(meta), strict=True):
            shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
            assert shapes == {key: tensor.shape for key, tensor in weights.items()}


def test_a_fresh_model_returns_exactly_zero():
    x, t, c = inputs()
    assert DiT(**TINY)(x, t, c).abs().max() == 0


def test_initialisation():
    torch.manual_seed(0)
    model = DiT(**{**TINY, "hidden_size": 128})
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    bound = (6 / (128 + 3 * 128)) ** 0.5  # xavier-uniform of 128 → 384
    assert model.blocks[0].attn.qkv.weight.abs().max().item() == pytest.approx(bound, rel=0.01)
    bound = (6 / (3 + 128)) ** 0.5
    assert bound * 0.9 < model.x_embedder.proj.weight.abs().max().item() <= bound
    assert ClassConditioner(1000, 64).embedding_table.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


def test_rotation_keeps_lengths_and_depends_on_distance_only():
    cos, sin = rope_table(5, 7, 16)
    q, k = torch.randn(2, 1, 16).expand(2, 35, 16)
    q_turned, k_turned = rotate(q, cos, sin), rotate(k, cos, sin)
    torch.testing.assert_close(q_turned.norm(dim=-1), q.norm(dim=-1))
    scores = (q_turned @ k_turned.T).view(5, 7, 5, 7)
    torch.testing.assert_close(scores[0, 0, 2, 3], scores[2, 3, 4, 6], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"input_size": (4, 6), "patch_size": 2},
        {"swiglu": False, "rms_norm": False, "qk_norm": True},
        {"rope": False, "adaln_shift": False, "learn_sigma": True},
    ],
)
def test_options_save_and_load(options, tmp_path):
    model = trained(**options).eval()
    x, t, c = inputs(width=6 if options.get("patch_size") else 4)
    out = model(x, t, c)
    assert out.shape == x.shape
    model.save_pretrained(tmp_path)
    assert torch.equal(DiT.from_pretrained(tmp_path)(x, t, c), out)


def test_rows_and_columns_are_told_apart():
    # The transposed model of a transposed picture is another one: the tables treat rows and columns differently.
    x, t, c = inputs()
    model = trained().eval()
    assert not torch.allclose(model(x.mT, t, c), model(x, t, c).mT, atol=1e-3)


@pytest.mark.parametrize("options", [{}, {"rope": False}])
def test_checkpointing_computes_blocks_twice_and_the_same_gradients(options):
    x, t, c = inputs()
    gradients, calls = [], []
    for checkpointing in (False, True):
        model = trained(**options).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        calls.append([])
        model.blocks[0].attn.register_forward_pre_hook(lambda *_: calls[-1].append(1))
        model(x, t, c).square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert [len(c) for c in calls] == [1, 2]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_compiles_without_a_break():
    x, t, c = inputs()
    model = trained().eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x, t, c), model(x, t, c))


def test_half_precision_stays_near_float32():
    x, t, c = inputs()
    model = trained(qk_norm=True).eval()
    with torch.no_grad():
        full = model(x, t, c)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model(x, t, c).float()
        half = model.bfloat16()(x, t, c.bfloat16()).float()
    assert (mixed - full).norm() < 0.02 * full.norm()
    assert (half - full).norm() < 0.05 * full.norm()


def test_large_activations_do_not_overflow_in_half_precision():
    # A square of 300 is more than float16 holds: the norm must be computed in float32.
    model = trained().eval()
    norm = model.blocks[0].norm1.half()
    assert norm(torch.full((1, 32), 300.0, dtype=torch.float16)).isfinite().all()


def test_wrong_inputs_are_named():
    x, t, c = inputs()
    model = DiT(**TINY)
    with pytest.raises(UserError, match=r"3×4×2 .* 3×4×4"):
        model(x[..., :2], t, c)
    with pytest.raises(UserError, match=r"\(2, 1, 4, 4\), of these latents it is \(2, 4, 4\)"):
        model(x, t, c, mask=torch.ones(2, 1, 4, 4))
    with pytest.raises(UserError, match="positions='line'"):
        DiT(**TINY, positions="line")
    with pytest.raises(UserError, match="patches of 3×3"):
        DiT(**{**TINY, "patch_size": 3})
    with pytest.raises(UserError, match="num_heads 5"):
        DiT(**{**TINY, "num_heads": 5})
    with pytest.raises(UserError, match="S, B, L, XL"):
        dit("XXL")


@pytest.mark.parametrize(
    "options", [{}, {"rope": False}, {"qk_norm": True}, {"positions": "sequence", "patch_size": 2}]
)
def test_what_is_masked_is_neither_attended_to_nor_answered(options):
    model = trained(**options)
    p, (x, t, c) = model.patch_size, inputs(height=4)
    mask = torch.zeros(2, 4, 4)
    mask[0, :, :2], mask[1, 1, 3] = 1, 1  # of the second sample one patch alone
    other = x.clone()
    covered = torch.nn.functional.max_pool2d(mask[:, None], p).repeat_interleave(p, 2).repeat_interleave(p, 3)
    other[(covered == 0).expand_as(other)] = 1e3
    made = model(x, t, c, mask)
    assert torch.equal(made, model(other, t, c, mask))
    assert torch.equal(made != 0, (covered > 0).expand_as(made))
    # a model whose grid is the left half alone says the same of it, where places do not depend on the grid
    assert not torch.allclose(made, model(x, t, c) * covered)
    torch.testing.assert_close(model(x, t, c, torch.ones(2, 4, 4)), model(x, t, c))


def test_half_of_a_picture_is_answered_as_a_picture_of_that_half():
    torch.manual_seed(0)
    whole, half = DiT(**TINY), DiT(**{**TINY, "input_size": (2, 4)})
    for parameter in whole.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    half.load_state_dict(whole.state_dict())
    x, t, c = inputs()
    mask = torch.zeros(2, 4, 4)
    mask[:, :2] = 1
    torch.testing.assert_close(whole(x, t, c, mask)[:, :, :2], half(x[:, :, :2], t, c))
    kept = kept_patches(mask, 1)
    assert kept.places.tolist() == [list(range(8))] * 2 and kept.there.all()
    assert torch.equal(whole(x, t, c, kept), whole(x, t, c, mask))
    short = torch.zeros(2, 4, 4)
    short[0, 3], short[1, 0, 1] = 1, 1
    assert kept_patches(short, 1).there.tolist() == [[True] * 4, [True, False, False, False]]
    assert kept_patches(short, 1).places[:, 0].tolist() == [12, 1]


def test_in_reading_order_places_follow_each_other_across_rows():
    model = DiT(**TINY, positions="sequence")
    cos, sin = rope_table(1, 16, 16)
    assert torch.equal(model.rope_cos, cos) and torch.equal(model.rope_sin, sin)
    assert torch.equal(model.pos_embed[0], sincos_table(1, 16, 32))
    assert model.pos_embed[0].unique(dim=0).shape[0] == 16


def test_dropping_all_labels_is_the_null():
    conditioner = ClassConditioner(5, 8)
    labels = torch.arange(5)
    assert torch.equal(conditioner(labels, drop=torch.ones(5, dtype=torch.bool)), conditioner.null(5))
    assert torch.equal(conditioner(labels, drop=torch.zeros(5)), conditioner(labels))
    mixed = conditioner(labels, drop=labels == 2)
    assert torch.equal(mixed[2], conditioner.null(1)[0]) and torch.equal(mixed[3], conditioner(labels)[3])


def test_conditioner_saves_and_loads(tmp_path):
    conditioner = ClassConditioner(5, 8, dropout=0.2)
    conditioner.save_pretrained(tmp_path)
    loaded = ClassConditioner.from_pretrained(tmp_path)
    assert loaded.dropout == 0.2 and torch.equal(loaded(torch.arange(5)), conditioner(torch.arange(5)))


def test_without_dropout_there_is_no_null():
    conditioner = ClassConditioner(5, 8, dropout=0.0)
    assert conditioner.embedding_table.num_embeddings == 5
    with pytest.raises(UserError, match="no null"):
        conditioner.null(2)
    with pytest.raises(UserError, match="no null"):
        conditioner(torch.arange(2), drop=torch.ones(2))


def test_labels_that_do_not_exist_are_named():
    check_labels([0, 4], 5)
    check_labels(torch.tensor([0, 4]), 5)
    for wrong in (5, -1):
        with pytest.raises(UserError, match=f"Label {wrong} .* 0 to 4"):
            check_labels(torch.tensor([0, wrong]), 5)


def test_reference_checkpoints_are_unwrapped():
    case, _ = load_case("lightningdit-eps")
    weights = load_weights("lightningdit-eps")
    wrapped = {f"module._orig_mod.{key}": tensor.half() for key, tensor in weights.items()}
    model = load_reference("lightningdit", {"model": {}, "ema": wrapped, "config": {}}, case["constructor"])
    assert not model.training
    expected = weights["final_layer.linear.weight"].half().float()
    assert torch.equal(model.denoiser.final_layer.linear.weight, expected)


def test_reference_errors_say_what_is_known():
    case, _ = load_case("lightningdit-eps")
    weights = load_weights("lightningdit-eps")
    with pytest.raises(UserError, match=r"known kinds: .*lightningdit"):
        load_reference("lightning", weights, case["constructor"])
    with pytest.raises(UserError, match="no argument hiden_size"):
        split_config({"hiden_size": 3})
    with pytest.raises(UserError, match="do not fit"):
        load_reference("lightningdit", weights, {**case["constructor"], "depth": 3})
    with pytest.raises(UserError, match=r"pos_embed is \(1, 16, 32\)"):
        load_reference("lightningdit", weights, {**case["constructor"], "input_size": 8})


def in_double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("tokens", [1, 3])
def test_gradients_written_by_hand_are_the_derivatives(tokens):
    # one conditioning for all tokens, or one for each, as a DDT's decoder has
    torch.manual_seed(0)
    x, y, gain, shift = in_double(2, 3, 4), in_double(2, 3, 4), in_double(2, tokens, 4), in_double(2, tokens, 4)
    assert torch.autograd.gradcheck(NormAndModulate.apply, (x, gain, shift, 1e-6))
    assert torch.autograd.gradcheck(NormAndModulate.apply, (x, gain, None, 1e-6))
    assert torch.autograd.gradcheck(AddGated.apply, (x, gain, y))
    assert torch.autograd.gradcheck(GateBySwish.apply, (in_double(2, 3, 8),))
    table = [part.double() for part in rope_table(1, 3, 4)]
    assert torch.autograd.gradcheck(lambda qkv: SplitAndRotate.apply(qkv, *table), (in_double(2, 3, 3, 2, 4),))


@pytest.mark.parametrize("options", [{}, {"adaln_shift": False}, {"qk_norm": True}, {"rope": False}])
def test_by_hand_and_by_the_plain_formulas_a_step_is_the_same(options, monkeypatch):
    x, t, c = inputs()
    results = []
    for plainly in (False, True):
        if plainly:
            for module in ("layers", "fused"):
                monkeypatch.setattr(f"vavae_tools.diffusion.{module}.by_hand", lambda *_: False)
        model = trained(**options).train()
        conditioning = c.clone().requires_grad_()
        out = model(x, t, conditioning)
        out.square().mean().backward()
        results.append([out, conditioning.grad, *(p.grad for p in model.parameters())])
    largest = max(gradient.abs().max() for gradient in results[1][1:])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * largest.item())


def test_patches_are_embedded_as_by_the_convolution():
    torch.manual_seed(0)
    embed = PatchEmbed(2, 3, 8)
    x = torch.randn(2, 3, 4, 6)
    tokens = embed(x)
    torch.testing.assert_close(tokens, embed.proj(x).flatten(2).mT)
    assert tokens.is_contiguous()  # what follows inherits its order in memory


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"qk_norm": True}, {"adaln_shift": False}])
def test_a_step_under_autocast_stays_near_float32(options, dtype, monkeypatch):
    attended = []
    attention = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda *qkv, **mask: attended.append({x.dtype for x in qkv}) or attention(*qkv, **mask),
    )
    x, t, c = inputs()
    gradients = []
    for enabled in (False, True):
        model = trained(**options).train()
        seen = []
        model.blocks[1].register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].dtype))
        with torch.autocast("cpu", dtype, enabled=enabled):
            loss = model(x, t, c).float().square().mean()
        loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert seen == [torch.float32]  # the residual stream
    assert attended == [{torch.float32}] * 2 + [{dtype}] * 2
    assert gradients[1].dtype == torch.float32
    assert (gradients[1] - gradients[0]).norm() < (0.01 if dtype == torch.float16 else 0.05) * gradients[0].norm()


def test_checkpointing_under_autocast_gives_the_same_gradients():
    x, t, c = inputs()
    gradients = []
    for checkpointing in (False, True):
        model = trained(qk_norm=True).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(x, t, c).float().square().mean()
        loss.backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.slow
def test_a_compiled_step_equals_the_eager_one():
    pytest.importorskip("torch._inductor")
    x, t, c = inputs()
    results = []
    for compiled in (False, True):
        model = trained().train()
        if compiled:
            model.compile_repeated_blocks(fullgraph=True)
        out = model(x, t, c)
        out.square().mean().backward()
        results.append([out, *(p.grad for p in model.parameters())])
    largest = max(gradient.abs().max() for gradient in results[0][1:])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5 * max(1, largest.item()))


@pytest.mark.parametrize("hidden", [21, 24, 2 * 2730 // 4])
def test_zeros_behind_a_width_change_nothing(hidden):
    """As on a card in half precision; here in float64, where the order of sums does not show."""
    torch.manual_seed(0)
    mlp, x = SwiGLU(8, hidden).double(), torch.randn(2, 5, 8, dtype=torch.float64, requires_grad=True)
    assert (hidden + mlp.lacking) % 8 == 0 <= mlp.lacking < 8
    found = []
    for way in (mlp, lambda x: mlp.padded(x, torch.float64)):
        made = way(x)
        found.append((made, *torch.autograd.grad(made.square().sum(), [x, *mlp.parameters()])))
    for plain, padded in zip(*found, strict=True):
        torch.testing.assert_close(padded, plain, rtol=1e-12, atol=1e-12)


def test_which_products_are_padded(monkeypatch):
    many, few = (torch.empty(count, 256, 8, device="meta") for count in (16, 15))

    class OnCard:  # a tensor's place and form
        def __init__(self, x, dtype=torch.float32):
            self.device, self.shape, self.dtype = torch.device("cuda"), x.shape, dtype

    assert half_on_card(many) is None and half_on_card(OnCard(many)) is None
    assert half_on_card(OnCard(many, torch.float16)) == torch.float16
    assert half_on_card(OnCard(few, torch.float16)) is None
    monkeypatch.setattr(torch, "is_autocast_enabled", lambda device: True)
    monkeypatch.setattr(torch, "get_autocast_dtype", lambda device: torch.bfloat16)
    assert half_on_card(OnCard(many)) == torch.bfloat16 and half_on_card(OnCard(few)) is None
