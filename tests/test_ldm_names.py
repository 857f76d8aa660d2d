"""Published weights in and out: names, configurations, golden cases, files of every form, export."""

import json
import shutil

import pytest
import torch
from diffusers import AutoencoderKL
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint
from golden_cases import assert_close, folder, load_case, load_weights
from safetensors.torch import save_file
from tiny import perturb_projections, random_images, refuses, same, tiny_vavae
from torch import Tensor

from vavae_tools.autoencoders.ldm_names import from_reference, reference_config, to_reference, vavae_arguments
from vavae_tools.autoencoders.stable_diffusion import load_stable_diffusion_vae
from vavae_tools.autoencoders.vavae import VAVAE, VAVAE_SIZES, block_types, vavae
from vavae_tools.autoencoders.weights import build_vavae, from_state_dict, load_vavae, read_vavae, with_channels
from vavae_tools.export import export_vavae
from vavae_tools.export import main as export_main
from vavae_tools.published import load_reference
from vavae_tools.runtime.files import read_checkpoint

PUBLISHED = {"double_z": True, "z_channels": 32, "resolution": 256, "in_channels": 3, "out_ch": 3, "ch": 128}
PUBLISHED |= {"ch_mult": [1, 1, 2, 2, 4], "num_res_blocks": 2, "attn_resolutions": [16], "dropout": 0.0}


def arguments(widths: tuple[int, ...], attention_at: tuple[int, ...], blocks: int = 1, channels: int = 3) -> dict:
    """Return a VAVAE's arguments."""
    return {
        **block_types(i in attention_at for i in range(len(widths))),
        **{"in_channels": channels, "out_channels": channels, "latent_channels": 4, "sample_size": 32},
        **{"block_out_channels": widths, "layers_per_block": blocks, "norm_num_groups": 32},
        "mid_block_add_attention": True,
    }


TWO, THREE, NONE = arguments((32, 64), (1,)), arguments((32, 64, 64), (1,), 2), arguments((32, 64), ())
GREY = arguments((32, 64), (1,), channels=1)


def random_weights(config: dict) -> dict[str, Tensor]:
    """Return random weights under the reference's names."""
    generator, weights = torch.Generator().manual_seed(0), VAVAE(**config).state_dict()
    for name, tensor in weights.items():
        spread = 1.5 / max(1, tensor.shape[1:].numel()) ** 0.5 if tensor.ndim > 1 else 0.3
        weights[name] = torch.randn(tensor.shape, generator=generator) * spread + ("norm" in name and "weight" in name)
    return to_reference(weights)


quiet = str  # a log that keeps nothing


def images(channels: int = 3) -> Tensor:
    return random_images((16, 24), seed=1, channels=channels)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vavae", "vavae-b"])
def test_golden(name):
    case, expected = load_case(name)
    model = load_reference("vavae", load_weights(name), {k: case[k] for k in ("ddconfig", "embed_dim")})
    posterior = model.encode(expected["x"]).latent_dist
    drawn = posterior.mean + posterior.std * expected["eps"]
    found = {
        "moments": posterior.parameters,
        "kl": posterior.kl(),
        "sample": drawn,
        "decoded_mode": model.decode(posterior.mode()).sample,
        "decoded_sample": model.decode(drawn).sample,
    }
    for part, value in found.items():
        assert_close(value, expected[part], {"rtol": 1e-4, "atol": 2e-5})  # measured 1.3e-5; the case allows 2e-4


# ---- names and configurations
@pytest.mark.parametrize("config", [TWO, THREE, NONE])
def test_names_are_those_of_diffusers_own_conversion(config):
    weights = random_weights(config)
    known = {name: weight for name, weight in weights.items() if ".attn." not in name}  # but for attention at levels
    ours, theirs = from_reference(known), convert_ldm_vae_checkpoint(known, config)
    assert ours.keys() == theirs.keys() and all(same(ours[name], weight) for name, weight in theirs.items())


def test_names_there_and_back():
    weights = random_weights(THREE)
    ours = from_reference(weights)
    assert ours.keys() == VAVAE(**vavae_arguments(weights)).state_dict().keys()
    assert ours["encoder.down_blocks.1.attentions.1.to_q.weight"].shape == (64, 64)
    assert same(ours["decoder.up_blocks.0.resnets.1.conv2.weight"], weights["decoder.up.2.block.1.conv2.weight"])
    back = to_reference(ours)
    assert back.keys() == weights.keys() and all(same(back[name], weights[name]) for name in weights)
    with_vectors, without = (to_reference(tiny_vavae(condition_dim=dim).state_dict()) for dim in (4, 0))
    assert with_vectors.keys() == without.keys()


def test_the_published_configuration():
    with torch.device("meta"):
        weights = to_reference(vavae("f16d32").state_dict())
    arguments = vavae_arguments(weights)
    assert {name: arguments[name] for name in VAVAE_SIZES["f16d32"]} == VAVAE_SIZES["f16d32"]
    assert reference_config(arguments) == {"ddconfig": PUBLISHED, "embed_dim": 32}


@pytest.mark.parametrize("config", [TWO, THREE, NONE, GREY])
def test_configurations_there_and_back(config):
    assert vavae_arguments(random_weights(config), reference_config(config)) == config
    without = {name: weight for name, weight in random_weights(NONE).items() if ".attn_1." not in name}
    assert reference_config(vavae_arguments(without))["ddconfig"]["attn_type"] == "none"


def test_what_the_other_cannot_represent():
    for change, message in (
        ({"block_out_channels": (32, 48)}, r"block_out_channels=\[32, 48\]: the reference needs multiples"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "at the same levels"),
        ({"mid_block_add_attention": False}, "in the middle"),
    ):
        refuses(message, reference_config, {**TWO, **change})
    weights = random_weights(TWO)
    other = {**weights, "encoder.mid.attn_1.q.weight": torch.zeros(64, 64, 3, 3)}
    refuses(r"size mismatch for encoder\.mid_block\.attentions", load_reference, "vavae", other, {})
    del weights["decoder.conv_out.bias"]
    refuses(r"lacks 1 of the model's weights, the first decoder\.conv_out\.bias", load_reference, "vavae", weights, {})


# ---- files
PARTS = {
    "loss.logvar": torch.zeros(()),
    "loss.perceptual_loss.lin0.model.1.weight": torch.rand(1, 64, 1, 1),
    "loss.discriminator.main.0.weight": torch.rand(4, 3, 4, 4),
    "loss.discriminator.main.3.running_mean": torch.rand(8).double(),
    "loss.discriminator.main.3.num_batches_tracked": torch.tensor(7),
    "foundation_model.model.cls_token": torch.rand(1, 1, 77).half(),
    "linear_proj.weight": torch.rand(6, 4, 1, 1).half(),
}


def training_checkpoint() -> dict:
    return {"state_dict": {**random_weights(TWO), **PARTS}, "epoch": 3, "optimizer_states": [{}]}


@pytest.mark.parametrize("form", ["bare.pt", "wrapped.pt", "plain.safetensors", "training.ckpt"])
def test_every_form_of_published_weights(tmp_path, form):
    weights, path, said = random_weights(TWO), tmp_path / form, []
    if form.endswith(".safetensors"):
        save_file(weights, path)
    else:
        forms = {"bare.pt": weights, "wrapped.pt": {"state_dict": weights}, "training.ckpt": training_checkpoint()}
        torch.save(forms[form], path)
    model = load_vavae(path, 5, 7, log=said.append).eval()
    assert model.config.sample_size == 256 and model.conditions.weight.shape == (7, 5)
    assert all(same(model.state_dict()[name], tensor) for name, tensor in from_reference(weights).items())
    counts = f"VA-VAE weights: {len(weights)} matched, 7 start anew, "
    also = "3 unused, with a discriminator and an alignment projection" if form == "training.ckpt" else "0 unused"
    assert said == [f"{counts}{also} ({path})"]


def test_what_a_training_checkpoint_holds(tmp_path):
    torch.save(training_checkpoint(), tmp_path / "last.ckpt")
    found = read_vavae(tmp_path / "last.ckpt")
    averaged = from_state_dict({**training_checkpoint(), "ema": random_weights(TWO)})
    for discriminator in (found.discriminator, averaged.discriminator):
        assert set(discriminator) == {"main.0.weight", "main.3.running_mean", "main.3.num_batches_tracked"}
    assert same(found.projection, PARTS["linear_proj.weight"])
    assert "loss.perceptual_loss.lin0.model.1.weight" in found.unused and len(found.unused) == 3
    of_features = {"linear_proj.weight": torch.rand(4, 6, 1, 1)}  # to the latents, which is another projection
    found = from_state_dict({**random_weights(TWO), **of_features})
    assert found.projection is None and found.unused == ("linear_proj.weight",)


@pytest.mark.parametrize(("form", "count"), [("f16d32_vfdinov2", 741), ("f16d32_ldm", 398)])
def test_checkpoints_of_the_published_training_load_whole(tmp_path, form, count):
    keys = json.loads((folder("vavae") / "full_keys.json").read_text())[form]
    assert len(keys) == count
    with torch.device("meta"):  # shapes without their memory
        state = {name: torch.empty(shape) for name, shape in keys.items()}
        model = load_reference("vavae", state, {"ddconfig": PUBLISHED, "embed_dim": 32})
    own = [name for name in keys if name.startswith(("encoder", "decoder", "quant", "post_quant"))]
    assert len(model.state_dict()) == len(own) == len(from_reference(state))

    state = {name: torch.zeros(()).expand(shape) for name, shape in keys.items()}  # a number each, also on the disk
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    found, said = read_vavae(tmp_path / "last.ckpt"), []
    assert found.weights.keys() == model.state_dict().keys()
    assert len(found.discriminator) == 22 and len(own) + 22 + len(found.unused) == count - (count == 741)
    assert (found.projection is not None) == (count == 741)
    found.weights.update({name: tensor.to("meta") for name, tensor in found.weights.items()})
    with torch.device("meta"):
        build_vavae(found, log=said.append)
    assert f"{len(own)} matched, 0 start anew, {len(found.unused)} unused, with a disc" in said[0]


def test_files_that_are_no_vavae(tmp_path):
    torch.save({"model": {"x": torch.ones(1)}, "ema": {}, "opt": {}, "config": 1}, tmp_path / "dit.pt")
    save_file({"blocks.0.weight": torch.ones(1)}, tmp_path / "dit.safetensors")
    tiny_vavae().save_pretrained(tmp_path / "ours")
    shutil.copy(tmp_path / "ours" / "diffusion_pytorch_model.safetensors", tmp_path)
    for name, message in (
        ("dit.pt", r"it has no encoder\.conv_in\.weight among its 4 entries \(model, ema, opt and 1 more\)"),
        ("dit.safetensors", r"among its 1 entries \(blocks\.0\.weight\)$"),
        (".", r"it holds diffusion_pytorch_model\.saf.* or the name of a \.pt"),
        (
            "diffusion_pytorch_model.safetensors",
            r"has no config\.json beside it.*copy it from where the weights are from",
        ),
    ):
        refuses(message, read_vavae, tmp_path / name)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", ["vae.pt", "vae", "sd"])
def test_weights_that_are_not_finite_are_named(tmp_path, name, value):
    model = AutoencoderKL(**TWO)
    model.decoder.conv_out.bias.data[1] = value
    save = (
        model.save_pretrained if name != "vae.pt" else lambda path: torch.save(to_reference(model.state_dict()), path)
    )
    save(tmp_path / name)
    load = load_stable_diffusion_vae if name == "sd" else load_vavae
    refuses(rf"1 weights of .*{name} are not finite \(decoder\.conv_out\.bias", load, tmp_path / name)


HALVES = {"encoder only": ([1, 0], [0, 0]), "decoder only": ([0, 0], [0, 1]), "different levels": ([1, 0], [0, 1])}


@pytest.mark.parametrize("name", HALVES)
def test_attention_in_one_half_only(name):
    weights = random_weights({**TWO, **block_types(*HALVES[name])})
    found = from_state_dict(weights)
    assert {k: found.config[k] for k in block_types([])} == block_types(*HALVES[name])
    build_vavae(found, log=quiet)


def test_weights_that_find_no_place_are_an_error_that_names_them(tmp_path):
    weights = random_weights(TWO)
    for extra in ("decoder.up.0.block.2.conv3.weight", "encoder.temb.dense.0.weight", "decoder.conv_in.scale"):
        more, said = {**weights, extra: torch.ones(3)}, "1 weights of state_dict find no place in this model"
        refuses(rf"{said} \({extra[:7]}", load_reference, "vavae", more, {})
    AutoencoderKL(**THREE).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for change, message in (
        ({"layers_per_block": 1}, "find no place in this model"),
        ({"_class_name": "AsymmetricAutoencoderKL"}, "holds a AsymmetricAutoencoderKL, expected a VAVAE"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        refuses(message, load_vavae, tmp_path, log=quiet)


@pytest.mark.parametrize(
    ("name", "value"), [("tanh_out", True), ("resamp_with_conv", False), ("attn_type", "linear"), ("double_z", False)]
)
def test_what_leaves_no_trace_in_weights_is_refused(name, value):
    given = random_weights(TWO), {"ddconfig": {name: value}}
    refuses(f"{name} is {value!r}, and AutoencoderKL has only", load_reference, "vavae", *given)


def zeros(weights: dict) -> dict:
    return {name: 0 * tensor for name, tensor in weights.items()}


def behind(prefix: str, weights: dict) -> dict:
    return {prefix + name: tensor for name, tensor in weights.items()}


def half(weights: dict, part: str, of: bool = True) -> dict:
    return {name: tensor if name.startswith(part) == of else 0 * tensor for name, tensor in weights.items()}


FORMS = {
    "first_stage_model": lambda w: {"state_dict": behind("first_stage_model.", w) | behind("cond_stage.", zeros(w))},
    "model": lambda w: {"model": w, "epoch": 3},
    "wrapped": lambda w: {"net": {"module": behind("vae._orig_mod.", w)}},
    "diffusers' names": lambda w: {"vae": from_reference(w)},
    "LDM's average": lambda w: {"state_dict": zeros(w) | {f"model_ema.{k.replace('.', '')}": v for k, v in w.items()}},
    "Lightning's average": lambda w: {"state_dict": w, "current_model_state": zeros(w)},
    "average of a part": lambda w: {
        "model": half(w, "decoder.", False),
        "ema": {k: v for k, v in w.items() if k.startswith("decoder.")},
    },
    "EMA beside its model": lambda w: {"ema": behind("ema_model.", w) | behind("online_model.", zeros(w))},
    "without quant_conv": lambda w: {"model": {k: v for k, v in w.items() if "quant_conv" not in k}},
}
AVERAGES = ("state_dict_ema", "emaModel", "model-ema", "EMA", "avg_model", "swa_state_dict", "polyak", "vae_ema")
FORMS |= {name: lambda w, name=name: {"model": zeros(w), name: {"module": w}} for name in AVERAGES}


@pytest.mark.parametrize("form", FORMS)
def test_every_training_s_file_of_an_autoencoder(tmp_path, form):
    weights = random_weights(TWO)
    torch.save(FORMS[form](weights), tmp_path / "vae.ckpt")
    model = load_vavae(tmp_path / "vae.ckpt", log=quiet)
    expected = from_reference(weights)
    assert all(same(tensor, expected[name]) for name, tensor in model.state_dict().items())
    assert len(expected) - len(model.state_dict()) == (4 if form == "without quant_conv" else 0)


def test_several_models_of_one_form_are_not_chosen_from_in_silence():
    weights = random_weights(TWO)
    for names in (("ema_0.99", "ema_0.9999"), ("teacher", "student"), ("model", "net")):
        said = rf"holds several models of this form \({', '.join(names)}\): save the one"
        refuses(said, from_state_dict, dict.fromkeys(names, weights))


@pytest.mark.parametrize(
    "form",
    [
        *("fp16", "bf16", "sharded", "sharded fp16", "bin", "sharded bin", "in vae", "stray"),
        *("file", "no index, sharded", "sharded, one of them", "sharded, its index", "in vae, pipeline's index"),
    ],
)
def test_every_folder_of_diffusers_weights(tmp_path, form, capfd):
    torch.manual_seed(0)
    model, folder = AutoencoderKL(**TWO), tmp_path / "vae"
    variant = {"fp16": "fp16", "sharded fp16": "fp16", "bf16": "bf16"}.get(form)
    shards = {"max_shard_size": "200KB"} if "sharded" in form else {}
    model.save_pretrained(folder, safe_serialization="bin" not in form, variant=variant, **shards)
    assert "sharded" not in form or len(list(folder.glob("*-of-*"))) > 1
    if form.startswith("no index"):
        next(folder.glob("*.index.json")).unlink()
    source = tmp_path if form == "in vae" else folder
    if form == "stray":
        zeros = {name: 0 * tensor for name, tensor in model.state_dict().items()}
        for name in ("diffusion_pytorch_model_old", "diffusion_pytorch_model.fp16", "diffusion_pytorch_model.old"):
            save_file(zeros, folder / f"{name}.safetensors")
    (tmp_path / "model_index.json").touch()
    named = {"file": "vae/*.safetensors", "one of them": "vae/*1-of-*", "its index": "vae/*.index.json"}
    if pattern := {**named, "pipeline's index": "model_index.json"}.get(form.split(", ")[-1]):
        source = next(tmp_path.glob(pattern))
    capfd.readouterr()
    for load in (lambda: load_vavae(source, log=quiet), lambda: load_stable_diffusion_vae(folder)):
        found = load().state_dict()
        assert all(same(found[name], tensor) for name, tensor in model.state_dict().items())
    assert capfd.readouterr() == ("", "")
    if form == "sharded":
        next(folder.glob("*-of-*")).unlink()
        refuses(r"is not whole, \d+ of its \d+ files of weights are there", load_vavae, folder)


# ---- grey images
@torch.no_grad()
def test_a_grey_model_is_the_one_of_equal_channels_averaged(tmp_path):
    torch.save(training_checkpoint(), tmp_path / "last.ckpt")
    rgb, grey = load_vavae(tmp_path / "last.ckpt", log=quiet), load_vavae(tmp_path / "last.ckpt", log=quiet, channels=1)
    assert (grey.config.in_channels, grey.config.out_channels) == (1, 1)
    x = images(1)
    expected = rgb.encode(x.expand(-1, 3, -1, -1)).latent_dist.parameters
    torch.testing.assert_close(grey.encode(x).latent_dist.parameters, expected, rtol=1e-4, atol=1e-4)
    z = expected.chunk(2, 1)[0]
    made = rgb.decode(z).sample.mean(1, keepdim=True)
    torch.testing.assert_close(grey.decode(z).sample, made, rtol=1e-4, atol=1e-4)
    found = read_vavae(tmp_path / "last.ckpt")
    first = with_channels(found, 1).discriminator["main.0.weight"]
    assert same(first, found.discriminator["main.0.weight"].sum(1, keepdim=True))


@torch.no_grad()
def test_a_model_for_colours_from_a_grey_one(tmp_path):
    torch.save(random_weights(GREY), tmp_path / "grey.pt")
    grey, rgb = load_vavae(tmp_path / "grey.pt", log=quiet), load_vavae(tmp_path / "grey.pt", log=quiet, channels=3)
    assert same(rgb.decoder.conv_out.weight, grey.decoder.conv_out.weight.expand(3, -1, -1, -1))
    assert same(rgb.decoder.conv_out.bias, grey.decoder.conv_out.bias.expand(3))
    found, expected = rgb.encode(images(1).expand(-1, 3, -1, -1)), grey.encode(images(1))
    torch.testing.assert_close(found.latent_dist.parameters, expected.latent_dist.parameters, rtol=1e-4, atol=1e-4)
    refuses("channels=2: weights for 3 channels can .* 1", with_channels, from_state_dict(random_weights(TWO)), 2)


# ---- export
STATISTICS = {"latents_mean": (0.5, -1.0, 0.0, 2.0), "latents_std": (1.0, 2.0, 3.0, 4.0)}


def published_like(folder) -> VAVAE:
    """A model with vectors and statistics that the reference can represent, and its folder."""
    model = perturb_projections(VAVAE(**TWO, condition_dim=4, num_conditions=3, **STATISTICS))
    model.save_pretrained(folder)
    return model.eval()


def test_export_for_the_reference(tmp_path, capsys):
    model, path = published_like(tmp_path / "vavae"), tmp_path / "out" / "vavae.pt"
    assert export_vavae(tmp_path / "vavae", "reference", path) == [path, tmp_path / "out/latents_stats.pt"]
    said = capsys.readouterr().out.splitlines()
    written = read_checkpoint(path)
    assert list(written) == ["state_dict"] and written["state_dict"].keys() == random_weights(TWO).keys()
    assert {(t.dtype, t.is_contiguous()) for t in written["state_dict"].values()} == {(torch.float32, True)}
    statistics = read_checkpoint(tmp_path / "out" / "latents_stats.pt")
    assert statistics["mean"].flatten().tolist() == [0.5, -1, 0, 2] and statistics["std"].shape == (1, 4, 1, 1)
    assert said[0].startswith("left out: the vectors of 3 people") and "'attn_resolutions': [16]" in said[2]
    again = load_vavae(path, log=quiet)
    assert all(same(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


@torch.no_grad()
def test_export_for_diffusers(tmp_path, caplog):
    model = published_like(tmp_path / "vavae")
    written = export_vavae(tmp_path / "vavae", "diffusers", tmp_path / "plain")
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == sorted(path.name for path in written)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL" and config["latents_std"] == [1.0, 2.0, 3.0, 4.0]
    plain = AutoencoderKL.from_pretrained(tmp_path / "plain", low_cpu_mem_usage=False)
    assert caplog.messages == []
    posterior, expected = (m.encode(images()).latent_dist for m in (plain, model))
    assert same(posterior.parameters, expected.parameters)
    assert same(plain.decode(posterior.mean).sample, model.decode(posterior.mean).sample)
    assert same(load_vavae(tmp_path / "plain", log=quiet).encoder.conv_in.weight, model.encoder.conv_in.weight)


def test_the_export_command(tmp_path, monkeypatch, run_main):
    published_like(tmp_path / "vavae")
    tiny_vavae().save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)
    assert run_main(export_main, *["--vavae", "vavae", "--format", "reference", "--output", "v.pt"])[0] == 0
    status, out, _ = run_main(export_main, *["--vavae", "v.pt", "--format", "diffusers", "--output", "plain"])
    assert status == 0 and out.splitlines()[0].startswith("written: plain/config.json, plain/diffusion_pytorch_model")
    for line, message in (
        ("--vavae vavae --format diffusers --output vavae", "--output vavae is the VA-VAE itself: name another place"),
        ("--vavae vavae --format reference --output plain", "--output plain is a folder, expected a file such as"),
        ("--vavae vavae --format diffusers --output v.pt", "v.pt is a file, expected a folder"),
        ("--vavae tiny --format reference --output t.pt", "norm_num_groups=4: the reference has no such network"),
    ):
        status, _, err = run_main(export_main, *line.split())
        assert status == 2 and message in err.splitlines()[-1], err
    assert not (tmp_path / "t.pt").exists()
