import pytest
import torch
from golden_cases import SHARED, assert_close, load_case, load_weights, reference_parameters
from tiny import refuses

from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DDT, DDT_SIZES, DiT, make_denoiser, split_reference_arguments
from vavae_tools.diffusion.solvers import guided_prediction
from vavae_tools.published import load_reference

CASES = sorted({"ddt-a"} | {path.name for path in SHARED.glob("ddt-*")})
TOLERANCE = {"rtol": 1e-4, "atol": 2e-5}
TINY = {"input_size": 4, "in_channels": 3, "hidden_size": (16, 32), "depth": (2, 1), "num_heads": (2, 4)}
MILLIONS = {"S": 196.5, "B": 294.3, "L": 621.7, "XL": 838.7}  # of parameters at 768×16×16, fixed positions included


def split_weak(weights):
    """A case's weights → the model's and those of the weaker one that guides it."""
    weak = {name.removeprefix("__weak__."): tensor for name, tensor in weights.items() if name.startswith("__weak__.")}
    return {name: tensor for name, tensor in weights.items() if not name.startswith("__weak__.")}, weak


def reference(name):
    case, io = load_case(name)
    strong, weak = split_weak(load_weights(name))
    return load_reference("ddt", strong, case["constructor"]), load_reference("ddt", weak, case["weak_constructor"]), io


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_outputs_and_parts_equal_the_reference(name):
    model, _, io = reference(name)
    denoiser, taps = model.denoiser, {}
    first, last, head = (denoiser.blocks[i] for i in (0, denoiser.encoder_depth - 1, denoiser.encoder_depth))
    outputs = {"t_emb": denoiser.t_embedder, "y_emb": model.conditioner, "enc_block0": first, "enc_out": last}
    for name, module in {**outputs, "s_projected": denoiser.s_projector, "dec_block0": head}.items():
        module.register_forward_hook(lambda _, __, out, name=name: taps.update({f"tap.{name}": out}))
    inputs = {"s_in": (first, 0), "c": (first, 1), "s_before_projector": (denoiser.s_projector, 0), "x_in": (head, 0)}
    for name, (module, i) in inputs.items():
        module.register_forward_pre_hook(lambda _, given, name=name, i=i: taps.update({f"tap.{name}": given[i]}))
    assert_close(model(io["x"], io["t"], io["y"]), io["out"], TOLERANCE)
    expected = [key for key in io if key.startswith("tap.")]
    assert expected
    for key in expected:
        assert_close(taps[key].reshape(io[key].shape), io[key], TOLERANCE)
    s = io["tap.s_before_projector"]
    assert_close(model(io["x"], io["t"], io["y"], s=s), io["out_given_s"], TOLERANCE)
    assert_close(denoiser.encode(io["x"], io["t"], model.conditioner(io["y"])), s, TOLERANCE)


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_guidance_equals_the_reference(name):
    model, weak, io = reference(name)
    x, t, y, interval = io["cfg.x"], io["cfg.t"], io["cfg.y"], tuple(io["cfg.interval"].tolist())
    scale = io["cfg.scale"].item()
    assert_close(model.forward_with_cfg(x, t, y, scale), io["cfg.out"], TOLERANCE)
    assert_close(model.forward_with_cfg(x, t, y, scale, interval), io["cfg.out_interval"], TOLERANCE)
    scale = io["ag.scale"].item()
    assert_close(weak(x, t, y), io["ag.weak_out"], TOLERANCE)
    assert_close(model.forward_with_autoguidance(x, t, y, scale, weak), io["ag.out"], TOLERANCE)
    guided = model.forward_with_autoguidance(x, t, y, scale, weak.forward, interval)
    assert_close(guided, io["ag.out_interval"], TOLERANCE)
    refuses("min < max", model.forward_with_cfg, x, t, y, 2.0, (0.5, 0.5))


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_guided_velocities_equal_the_reference(name):
    # this package's own guidance, time by time, in its convention
    model, weak, io = reference(name)
    start, end = io["cfg.interval"].tolist()
    for i in range(len(io["cfg.x"]) // 2):
        rows = slice(i, i + 1)
        y, given = io["cfg.y"][rows], (model.denoiser, io["cfg.x"][rows], 1 - io["cfg.t"][i].item())
        for interval, out in (((0.0, 1.0), "out"), ((1 - end, 1 - start), "out_interval")):
            by_null = model.conditioner(y), model.conditioner.null(1), io["cfg.scale"].item(), interval
            assert_close(-guided_prediction(*given, *by_null), io[f"cfg.{out}"][rows], TOLERANCE)
            by_guide = model.conditioner(y), None, io["ag.scale"].item(), interval, "all", weak.denoiser
            velocity = guided_prediction(*given, *by_guide, weak.conditioner(y))
            assert_close(-velocity, io[f"ag.{out}"][rows], TOLERANCE)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_the_reference(name):
    model, _, io = reference(name)
    loss = model(io["x"], io["t"], io["y"]).square().mean()
    loss.backward()
    assert_close(loss.detach(), io["grad.loss"], TOLERANCE)
    parameters = reference_parameters(model)
    norms = [parameter.grad.norm() for parameter in parameters.values() if parameter.grad is not None]
    assert_close(torch.stack(norms).norm(), io["grad.total_norm"], {"rtol": 1e-4})
    checked = {key.removeprefix("grad.") for key in io if key.startswith("grad.")} - {"loss", "total_norm"}
    assert checked
    for name in checked:
        assert_close(parameters[name].grad, io[f"grad.{name}"], TOLERANCE)
    assert parameters["t_embedder.W"].grad is None


@pytest.mark.parametrize(("size", "millions"), MILLIONS.items())
def test_sizes_have_the_published_parameters(size, millions):
    with torch.device("meta"):
        denoiser = DDT(16, in_channels=768, **DDT_SIZES[size])
        conditioner = ClassConditioner(1000, denoiser.conditioning_size)
    count = sum(p.numel() for p in (*denoiser.parameters(), *conditioner.parameters(), denoiser.enc_pos_embed))
    assert count / 1e6 == pytest.approx(millions, abs=0.05)


def test_a_fresh_model_starts_as_the_reference():
    torch.manual_seed(0)
    model = DDT(**{**TINY, "hidden_size": (128, 256)})
    assert model.t_embedder.mlp[0].weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert model.t_embedder.W.std().item() == pytest.approx(1, rel=0.15) and not model.t_embedder.W.requires_grad
    qkv = model.blocks[0].attn.qkv  # PyTorch's own initialisation of a linear map of 128 features
    assert qkv.weight.abs().max().item() == pytest.approx(1 / 128**0.5, rel=0.01) and qkv.bias.abs().max() > 0


def test_reference_checkpoints_are_unwrapped_and_their_positions_read():
    case, io = load_case("ddt-a")
    weights, _ = split_weak(load_weights("ddt-a"))
    other = {**weights, "pos_embed": weights["pos_embed"] + 1}
    wrapped = {"ema": {f"module._orig_mod.{name}": tensor for name, tensor in other.items()}, "step": 3}
    model, plain = (load_reference("ddt", held, case["constructor"]) for held in (wrapped, {"model": weights}))
    assert not model.training and torch.equal(model.denoiser.enc_pos_embed, other["pos_embed"])
    assert (model(io["x"], io["t"], io["y"]) - plain(io["x"], io["t"], io["y"])).abs().max() > 0.01
    config = {**case["constructor"], "use_pos_embed": False}
    refuses(r"pos_embed is \(1, 16, 32\) .*, None by use_pos_embed", load_reference, "ddt", weights, config)


def test_two_widths_make_a_wide_head():
    wide = make_denoiser({**TINY, "use_qknorm": True, "wo_shift": True, "hidden_size": [16, 32]})
    assert isinstance(wide, DDT) and wide.config.qk_norm and not wide.config.adaln_shift
    one = {"input_size": 4, "in_channels": 3, "hidden_size": 32, "depth": 1, "num_heads": 2}
    narrow = make_denoiser({**one, "use_rope": False, "use_rmsnorm": False})
    assert isinstance(narrow, DiT) and narrow.config.swiglu and not (narrow.config.rope or narrow.config.rms_norm)
    with torch.device("meta"):
        assert make_denoiser({"size": "S", "in_channels": 8}).conditioning_size == 384
        large = make_denoiser({"size": "L", "head": "wide", "depth": [1, 1]})
    assert large.conditioning_size == 1024 and len(large.blocks) == 2


def test_a_models_arguments_are_split():
    config = {"hidden_size": [16, 32], "use_swiglu": False, "depth": [1, 1]}
    denoiser, conditioner = split_reference_arguments({**config, "num_classes": 5, "class_dropout_prob": 0.2})
    assert denoiser == {"hidden_size": (16, 32), "swiglu": False, "depth": (1, 1)}
    assert conditioner == {"num_classes": 5, "hidden_size": 16, "dropout": 0.2}
    assert split_reference_arguments({"size": "XL"})[1] == {"num_classes": 1000, "hidden_size": 1152, "dropout": 0.1}
    assert split_reference_arguments({"size": "S", "head": "wide"})[1]["hidden_size"] == 384
    assert split_reference_arguments({})[1]["hidden_size"] == make_denoiser({"depth": 0}).conditioning_size
    refuses(r"No argument 'use_ropes' .*\(did you mean use_rope\?\)", split_reference_arguments, {"use_ropes": True})
    config = {**TINY, "num_classes": 7, "class_dropout_prob": 0.0}  # and there is no null row
    weights = make_denoiser(split_reference_arguments(config)[0]).state_dict()
    weights["y_embedder.embedding_table.weight"] = torch.ones(7, 16)
    assert load_reference("ddt", weights, config).conditioner.embedding_table.num_embeddings == 7


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**TINY, "use_qk_norm": True}, r"No argument 'use_qk_norm' of DDT \(did you mean use_qknorm\?\)"),
        ({"num_classes": 3}, "num_classes is the conditioner's"),
        ({"size": "1p0B", "head": "wide"}, "with a wide head; there are S, B, L, XL"),
        ({"head": "broad"}, "No head 'broad'; there are wide, text"),
        ({"head": "wide", "hidden_size": 16}, "two numbers"),
    ],
)
def test_wrong_arguments_are_named(config, message):
    refuses(message, make_denoiser, config)
