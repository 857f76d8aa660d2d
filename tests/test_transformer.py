import json

import pytest
import torch
from golden_cases import SHARED, assert_close, folder, load_case, load_weights
from test_backbone import TINY, inputs, trained
from tiny import refuses

from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DiT, DiT_SIZES
from vavae_tools.diffusion.layers import rope_table, select_tokens, sincos_table
from vavae_tools.diffusion.solvers import guided_prediction
from vavae_tools.published import load_reference
from vavae_tools.published.denoisers import split_state_dict

KNOWN = {"lightningdit-a", "lightningdit-b", "lightningdit-eps"}  # b is in ../shared only: tests/golden stays small
CASES = sorted(KNOWN | {path.name for path in SHARED.glob("lightningdit-*")})


def reference(name: str):
    case, tensors = load_case(name)
    return load_reference("lightningdit", load_weights(name), case["constructor"]), case, tensors


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_and_parts_equal_the_reference(name):
    model, case, tensors = reference(name)
    denoiser, taps = model.denoiser, {}
    tapped = {f"block{i}_out": block for i, block in enumerate(denoiser.blocks)}
    tapped |= {"block0_attn_out": denoiser.blocks[0].attn, "patch_embed_without_pos": denoiser.x_embedder}
    for key, module in {**tapped, "t_emb": denoiser.t_embedder, "y_emb": model.conditioner}.items():
        rows = slice(2, 3) if key in tapped else slice(None)
        module.register_forward_hook(lambda _, __, out, key=key, rows=rows: taps.update({f"tap_{key}": out[rows]}))
    assert_close(model(tensors["x"], tensors["t"], tensors["y"]), tensors["out"], case["tolerance"])
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
        by = model.conditioner(labels), model.conditioner.null(n), run["cfg_scale"], (start, 1.0), "first3"
        velocity = guided_prediction(model.denoiser, x, run["t"], *by)
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
        denoiser = DiT(16, int(patch), 32, **DiT_SIZES[size])
        conditioner = ClassConditioner(1000, DiT_SIZES[size]["hidden_size"])
    trainable = denoiser.num_parameters() + conditioner.num_parameters()
    assert trainable == FULL[name]["trainable"]
    assert trainable + denoiser.pos_embed.numel() == FULL[name]["parameters"]
    if "keys" in FULL[name]:
        meta = {key: torch.empty(shape, device="meta") for key, shape in FULL[name]["keys"].items()}
        for model, weights in zip((denoiser, conditioner), split_state_dict(meta), strict=True):
            shapes = {key: tensor.shape for key, tensor in model.state_dict().items()}
            assert shapes == {key: tensor.shape for key, tensor in weights.items()}


def test_initialisation():
    torch.manual_seed(0)
    model = DiT(**{**TINY[DiT], "hidden_size": 128})
    for weight in (model.t_embedder.mlp[0].weight, ClassConditioner(1000, 64).embedding_table.weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.05)
    for weight, features in ((model.blocks[0].attn.qkv.weight, 128 + 384), (model.x_embedder.proj.weight, 3 + 128)):
        assert weight.abs().max().item() == pytest.approx((6 / features) ** 0.5, rel=0.1)  # Xavier-uniform
    assert all((p == 0).all() for name, p in model.named_parameters() if name.endswith("bias"))


@pytest.mark.parametrize(
    "options", [{}, {"rope": False}, {"qk_norm": True}, {"positions": "sequence", "patch_size": 2}]
)
def test_what_is_masked_is_neither_attended_to_nor_answered(options):
    model = trained(DiT, **options)
    p, (x, t, c) = model.patch_size, inputs(DiT)
    mask = torch.zeros(2, 4, 4)
    mask[0, :, :2], mask[1, 1, 3] = 1, 1  # of the second sample one patch alone
    other = x.clone()
    covered = torch.nn.functional.max_pool2d(mask[:, None], p).repeat_interleave(p, 2).repeat_interleave(p, 3)
    other[(covered == 0).expand_as(other)] = 1e3
    made = model(x, t, c, mask)
    assert torch.equal(made, model(other, t, c, mask))
    assert torch.equal(made != 0, (covered > 0).expand_as(made))
    assert not torch.allclose(made, model(x, t, c) * covered)
    torch.testing.assert_close(model(x, t, c, torch.ones(2, 4, 4)), model(x, t, c))
    refuses(r"\(2, 1, 4, 4\), of these latents it is \(2, 4, 4\)", model, x, t, c, mask=torch.ones(2, 1, 4, 4))


def test_half_of_an_image_is_answered_as_an_image_of_that_half():
    whole, half, (x, t, c) = trained(DiT), DiT(**{**TINY[DiT], "input_size": (2, 4)}), inputs(DiT)
    half.load_state_dict(whole.state_dict())
    mask = torch.zeros(2, 4, 4)
    mask[:, :2] = 1
    torch.testing.assert_close(whole(x, t, c, mask)[:, :, :2], half(x[:, :, :2], t, c))
    kept = select_tokens(mask, 1)
    assert kept.indices.tolist() == [list(range(8))] * 2 and kept.valid.all()
    assert torch.equal(whole(x, t, c, kept), whole(x, t, c, mask))
    mask[:], mask[0, 3], mask[1, 0, 1] = 0, 1, 1
    short = select_tokens(mask, 1)
    assert short.valid.tolist() == [[True] * 4, [True, False, False, False]] and short.indices[:, 0].tolist() == [12, 1]


def test_in_reading_order_positions_follow_each_other_across_rows():
    model = DiT(**TINY[DiT], positions="sequence")
    assert torch.equal(model.rope_table, rope_table(1, 16, 16))
    assert torch.equal(model.pos_embed[0], sincos_table(1, 16, 32))


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        ("lightning", {}, r"there are lightningdit"),
        ("lightningdit", {"hiden_size": 3}, "No argument 'hiden_size' of the model"),
        ("lightningdit", {"depth": 3}, "The state_dict lacks 14 of the model's weights"),
        ("lightningdit", {"input_size": 8}, r"pos_embed is \(1, 16, 32\)"),
    ],
)
def test_reference_errors_say_what_is_known(kind, changes, message):
    constructor = load_case("lightningdit-eps")[0]["constructor"]
    refuses(message, load_reference, kind, load_weights("lightningdit-eps"), {**constructor, **changes})
