"""Published weights in and out: names, configurations, golden cases, files of every form, export."""

import json
import logging
import os
import re
import sys

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from golden_cases import assert_close, folder, load_case, load_weights
from safetensors.torch import save_file
from tiny import perturb_projections, same, tiny_vavae
from torch import Tensor

from vavae_tools.autoencoders.ldm_names import (
    from_reference,
    infer_config,
    plain_names,
    reference_config,
    to_reference,
    vavae_arguments,
)
from vavae_tools.autoencoders.vavae import VAVAE, VAVAE_SIZES, vavae
from vavae_tools.autoencoders.weights import build_vavae, load_vavae, read_vavae, with_channels
from vavae_tools.export import export_vavae
from vavae_tools.export import main as export_main
from vavae_tools.published import load_reference
from vavae_tools.runtime.errors import UserError, run_command
from vavae_tools.runtime.files import read_checkpoint

PUBLISHED = {
    "double_z": True,
    "z_channels": 32,
    "resolution": 256,
    "in_channels": 3,
    "out_ch": 3,
    "ch": 128,
    "ch_mult": [1, 1, 2, 2, 4],
    "num_res_blocks": 2,
    "attn_resolutions": [16],
    "dropout": 0.0,
}
TWO = {**PUBLISHED, "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "z_channels": 4, "resolution": 32}
THREE = {**TWO, "ch_mult": [1, 2, 2], "num_res_blocks": 2, "resolution": 32}  # attention in the middle level
NONE = {**TWO, "attn_resolutions": []}


def whole(ddconfig: dict) -> dict:
    return {"ddconfig": ddconfig, "embed_dim": ddconfig["z_channels"]}


def quiet(line: str) -> None:
    pass


# ---- a second implementation, in plain torch on the reference's names


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the reference's autoencoder, written down from its description."""
    found = {}
    z, ch, blocks = config["z_channels"], config["ch"], config["num_res_blocks"]
    widths = [ch * m for m in config["ch_mult"]]
    attention = [config["resolution"] // 2**i in config["attn_resolutions"] for i in range(len(widths))]

    def layer(name: str, *shape: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = shape, shape[:1]

    def block(name: str, into: int, out: int) -> None:
        layer(f"{name}.norm1", into)
        layer(f"{name}.conv1", out, into, 3, 3)
        layer(f"{name}.norm2", out)
        layer(f"{name}.conv2", out, out, 3, 3)
        if into != out:
            layer(f"{name}.nin_shortcut", out, into, 1, 1)

    def attend(name: str, width: int) -> None:
        layer(f"{name}.norm", width)
        for part in ("q", "k", "v", "proj_out"):
            layer(f"{name}.{part}", width, width, 1, 1)

    def middle(half: str) -> None:
        block(f"{half}.mid.block_1", widths[-1], widths[-1])
        attend(f"{half}.mid.attn_1", widths[-1])
        block(f"{half}.mid.block_2", widths[-1], widths[-1])

    layer("encoder.conv_in", ch, config["in_channels"], 3, 3)
    into = ch
    for i, out in enumerate(widths):
        for j in range(blocks):
            block(f"encoder.down.{i}.block.{j}", into, out)
            into = out
            if attention[i]:
                attend(f"encoder.down.{i}.attn.{j}", out)
        if i + 1 < len(widths):
            layer(f"encoder.down.{i}.downsample.conv", out, out, 3, 3)
    middle("encoder")
    layer("encoder.norm_out", widths[-1])
    layer("encoder.conv_out", 2 * z, widths[-1], 3, 3)
    layer("decoder.conv_in", widths[-1], z, 3, 3)
    middle("decoder")
    for i in reversed(range(len(widths))):
        for j in range(blocks + 1):
            block(f"decoder.up.{i}.block.{j}", into, widths[i])
            into = widths[i]
            if attention[i]:
                attend(f"decoder.up.{i}.attn.{j}", into)
        if i:
            layer(f"decoder.up.{i}.upsample.conv", into, into, 3, 3)
    layer("decoder.norm_out", ch)
    layer("decoder.conv_out", config["out_ch"], ch, 3, 3)
    layer("quant_conv", 2 * z, 2 * z, 1, 1)
    layer("post_quant_conv", z, z, 1, 1)
    return found


def random_weights(config: dict, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, shape in shapes(config).items():
        spread = 1.5 / max(1, torch.Size(shape[1:]).numel()) ** 0.5 if len(shape) == 4 else 0.3
        weights[name] = torch.randn(shape, generator=generator) * spread + (".norm" in name and "weight" in name)
    return weights


class Reference:
    """The mathematics of the reference's autoencoder."""

    def __init__(self, weights: dict[str, Tensor], config: dict) -> None:
        self.weights, self.levels, self.blocks = weights, len(config["ch_mult"]), config["num_res_blocks"]

    def conv(self, name: str, x: Tensor, **how: int) -> Tensor:
        return F.conv2d(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], **how)

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, 32, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps=1e-6)

    def active(self, name: str, x: Tensor) -> Tensor:
        x = self.norm(name, x)
        return x * torch.sigmoid(x)

    def block(self, name: str, x: Tensor) -> Tensor:
        h = self.conv(f"{name}.conv1", self.active(f"{name}.norm1", x), padding=1)
        h = self.conv(f"{name}.conv2", self.active(f"{name}.norm2", h), padding=1)
        return h + (self.conv(f"{name}.nin_shortcut", x) if f"{name}.nin_shortcut.weight" in self.weights else x)

    def attend(self, name: str, x: Tensor) -> Tensor:
        if f"{name}.q.weight" not in self.weights:
            return x
        h = self.norm(f"{name}.norm", x)
        q, k, v = (self.conv(f"{name}.{part}", h).flatten(2) for part in "qkv")  # (B, C, positions)
        share = torch.softmax(torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5, dim=2)
        h = torch.einsum("bij,bcj->bci", share, v).view_as(x)
        return x + self.conv(f"{name}.proj_out", h)

    def middle(self, half: str, x: Tensor) -> Tensor:
        x = self.attend(f"{half}.mid.attn_1", self.block(f"{half}.mid.block_1", x))
        return self.block(f"{half}.mid.block_2", x)

    def encode(self, x: Tensor) -> Tensor:
        """Pictures → moments."""
        h = self.conv("encoder.conv_in", x, padding=1)
        for i in range(self.levels):
            for j in range(self.blocks):
                h = self.attend(f"encoder.down.{i}.attn.{j}", self.block(f"encoder.down.{i}.block.{j}", h))
            if i + 1 < self.levels:
                h = self.conv(f"encoder.down.{i}.downsample.conv", F.pad(h, (0, 1, 0, 1)), stride=2)
        h = self.active("encoder.norm_out", self.middle("encoder", h))
        return self.conv("quant_conv", self.conv("encoder.conv_out", h, padding=1))

    def decode(self, z: Tensor) -> Tensor:
        h = self.middle("decoder", self.conv("decoder.conv_in", self.conv("post_quant_conv", z), padding=1))
        for i in reversed(range(self.levels)):
            for j in range(self.blocks + 1):
                h = self.attend(f"decoder.up.{i}.attn.{j}", self.block(f"decoder.up.{i}.block.{j}", h))
            if i:
                h = F.interpolate(h, scale_factor=2, mode="nearest")
                h = self.conv(f"decoder.up.{i}.upsample.conv", h, padding=1)
        return self.conv("decoder.conv_out", self.active("decoder.norm_out", h), padding=1)


def pictures(channels: int = 3) -> Tensor:
    return torch.rand(2, channels, 16, 24, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("config", [TWO, THREE, NONE], ids=["two levels", "three levels", "no attention at levels"])
def test_the_same_mathematics(config):
    weights = random_weights(config)
    reference, model = Reference(weights, config), load_reference("vavae", weights, whole(config))
    assert not model.training and model.config.condition_dim == 0
    moments = reference.encode(pictures())
    posterior = model.encode(pictures()).latent_dist
    assert 0.1 < moments.std() < 10
    torch.testing.assert_close(posterior.parameters, moments, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(posterior.mode(), moments.chunk(2, 1)[0], rtol=1e-4, atol=1e-4)
    made = reference.decode(posterior.mode())
    assert 0.1 < made.std() < 10
    torch.testing.assert_close(model.decode(posterior.mode()).sample, made, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vavae", "vavae-b"])
def test_golden(name):
    case, expected = load_case(name)
    model = load_reference("vavae", load_weights(name), {k: case[k] for k in ("ddconfig", "embed_dim")})
    posterior = model.encode(expected["x"]).latent_dist
    drawn = posterior.mean + posterior.std * expected["eps"]
    found = {
        "moments": posterior.parameters,
        "mean": posterior.mean,
        "mode": posterior.mode(),
        "logvar_clamped": posterior.logvar,
        "std": posterior.std,
        "kl": posterior.kl(),
        "sample": drawn,
        "decoded_mode": model.decode(posterior.mode()).sample,
        "decoded_sample": model.decode(drawn).sample,
    }
    for part, value in found.items():
        assert_close(value, expected[part], {"rtol": 1e-4, "atol": 2e-5})  # measured 1.3e-5; the case allows 2e-4
        assert_close(value, expected[part], case["tolerance"])


# ---- names


def test_names_there_and_back():
    weights = random_weights(THREE)
    ours = from_reference(weights)
    assert ours.keys() == VAVAE(**vavae_arguments(whole(THREE))).state_dict().keys()
    assert ours["encoder.down_blocks.1.attentions.1.to_q.weight"].shape == (64, 64)
    assert same(ours["decoder.up_blocks.0.resnets.1.conv2.weight"], weights["decoder.up.2.block.1.conv2.weight"])
    assert same(
        ours["decoder.up_blocks.2.resnets.0.conv_shortcut.bias"], weights["decoder.up.0.block.0.nin_shortcut.bias"]
    )
    back = to_reference(ours)
    assert back.keys() == weights.keys() and all(same(back[name], weights[name]) for name in weights)
    assert list(to_reference(perturb_projections(tiny_vavae()).state_dict())) == list(
        to_reference(tiny_vavae(condition_dim=0).state_dict())
    )


def test_prefixes_of_wrappers_are_removed():
    names = [
        "module.encoder.conv_in.bias",
        "_orig_mod.quant_conv.bias",
        "module._orig_mod.module.decoder.x",
        "a._orig_mod.b",
    ]
    assert list(plain_names(dict.fromkeys(names))) == ["encoder.conv_in.bias", "quant_conv.bias", "decoder.x", "a.b"]
    assert plain_names({"state_dict": {"module.a": 1}, "epoch": 3}) == {"a": 1}
    assert list(plain_names({"my_module.a": 1})) == ["my_module.a"]
    weights = {f"_orig_mod.{name}": tensor for name, tensor in random_weights(TWO).items()}
    model = load_reference("vavae", {"state_dict": weights}, whole(TWO))
    assert same(model.encoder.conv_in.weight, weights["_orig_mod.encoder.conv_in.weight"])


# ---- configurations


def test_the_published_configuration():
    arguments = vavae_arguments(whole(PUBLISHED))
    assert {name: arguments[name] for name in VAVAE_SIZES["f16d32"]} == VAVAE_SIZES["f16d32"]
    assert reference_config({**arguments, "in_channels": 3, "out_channels": 3}) == whole(PUBLISHED)


@pytest.mark.parametrize("config", [TWO, THREE, NONE, {**NONE, "attn_type": "none"}, {**TWO, "in_channels": 1}])
def test_configurations_there_and_back(config):
    arguments = vavae_arguments(whole(config))
    assert reference_config(arguments) == whole(config)
    assert vavae_arguments(reference_config(VAVAE(**arguments).config)) == arguments


def test_attention_stands_by_nominal_resolution():
    arguments = vavae_arguments(whole({**THREE, "resolution": 100, "attn_resolutions": [25, 100]}))
    assert [kind.startswith("Attn") for kind in arguments["down_block_types"]] == [True, False, True]
    assert [kind.startswith("Attn") for kind in arguments["up_block_types"]] == [True, False, True]
    arguments = vavae_arguments(whole({**THREE, "resolution": 50, "attn_resolutions": [50, 24]}))
    assert [kind.startswith("Attn") for kind in arguments["down_block_types"]] == [True, False, False]
    assert [kind.startswith("Attn") for kind in arguments["up_block_types"]] == [False, True, False]  # 12, 24, 48


def test_the_configuration_is_told_by_the_weights():
    with torch.device("meta"):
        weights = to_reference(vavae("f16d32").state_dict())
    config = infer_config(weights)
    assert vavae_arguments(config) == vavae_arguments(whole(PUBLISHED))
    for small in (TWO, THREE, NONE):
        told = vavae_arguments(infer_config(random_weights(small)))
        assert {**told, "sample_size": 32} == vavae_arguments(whole(small))
    without = {k: v for k, v in random_weights(NONE).items() if ".attn_1." not in k}
    assert vavae_arguments(infer_config(without))["mid_block_add_attention"] is False


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"double_z": False}, r"double_z=False: AutoencoderKL has no such network, only double_z=True"),
        ({"tanh_out": True}, "tanh_out=True"),
        ({"resamp_with_conv": False}, "resamp_with_conv=False"),
        ({"use_linear_attn": True}, "use_linear_attn=True"),
        ({"attn_type": "linear"}, "attn_type='linear'"),
        ({"z_channels": 8}, "embed_dim=4 and z_channels=8 differ"),
        ({"ch": 48}, "ch=48: it must be divisible by 32"),
        ({"ch_mult": [2, 2]}, r"ch_mult=\[2, 2\]: .*the first of them 1"),
        ({"ch_mult": [1, 1.5]}, r"ch_mult=\[1, 1.5\]: .*whole numbers"),
        ({"heads": 3, "ch_mul": [1]}, "ddconfig of the reference has no ch_mul, heads; it has attn_resolutions, "),
    ],
)
def test_what_autoencoderkl_cannot_represent(change, message):
    with pytest.raises(UserError, match=message):
        vavae_arguments({"ddconfig": {**TWO, **change}, "embed_dim": 4})


def test_configurations_that_are_none():
    assert vavae_arguments({**whole({**TWO, "dropout": 0.3}), "use_vf": "dinov2"}) == vavae_arguments(whole(TWO))
    with pytest.raises(UserError, match="The configuration of the reference has no embed, size; it has "):
        vavae_arguments({**whole(TWO), "embed": 1, "size": 2})
    with pytest.raises(UserError, match="The configuration lacks embed_dim; it holds ddconfig"):
        vavae_arguments({"ddconfig": TWO})
    with pytest.raises(UserError, match=r"ddconfig lacks ch, ch_mult, .*; it holds z_channels"):
        vavae_arguments({"ddconfig": {"z_channels": 4}, "embed_dim": 4})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_num_groups": 16}, "norm_num_groups=16: the reference has no such network, only norm_num_groups=32"),
        ({"use_quant_conv": False}, "use_quant_conv=False"),
        ({"block_out_channels": (32, 48)}, r"block_out_channels=\[32, 48\]: the reference needs multiples"),
        ({"up_block_types": ["UpDecoderBlock2D"] * 2}, "up_block_types: .*at the same levels"),
        ({"mid_block_add_attention": False}, "mid_block_add_attention=False"),
    ],
)
def test_what_the_reference_cannot_represent(change, message):
    with pytest.raises(UserError, match=message):
        reference_config({**vavae_arguments(whole(TWO)), **change})


def test_weights_that_do_not_fit_their_configuration():
    weights = random_weights(TWO)
    with pytest.raises(UserError, match=r"state_dict is of another architecture: \S+ is \(.*\), expected \("):
        load_reference("vavae", weights, whole({**TWO, "ch_mult": [1, 1]}))
    with pytest.raises(UserError, match=r"state_dict lacks \d+ of the model's weights, the first "):
        load_reference("vavae", weights, whole({**TWO, "num_res_blocks": 2}))
    weights["encoder.mid.attn_1.q.weight"] = torch.zeros(64, 64, 3, 3)
    with pytest.raises(UserError, match=r"to_q.weight is \(64, 64, 3, 3\), expected \(64, 64\)"):
        load_reference("vavae", weights, whole(TWO))


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
    model = load_vavae(path, 5, 7, say=said.append).eval()
    assert model.config.sample_size == 256 and model.conditions.weight.shape == (7, 5)
    with torch.no_grad():
        torch.testing.assert_close(
            model.encode(pictures()).latent_dist.parameters,
            Reference(weights, TWO).encode(pictures()),
            rtol=1e-4,
            atol=1e-4,
        )
    counts = f"VA-VAE weights: {len(weights)} matched, 7 start anew, "
    if form == "training.ckpt":
        assert said == [f"{counts}3 unused, with a discriminator and an alignment projection ({path})"]
    else:
        assert said == [f"{counts}0 unused ({path})"]


def test_what_a_training_checkpoint_holds(tmp_path, monkeypatch):
    torch.save(training_checkpoint(), tmp_path / "last.ckpt")
    converted = []
    to_float = Tensor.float
    with monkeypatch.context() as context:
        context.setattr(Tensor, "float", lambda tensor: converted.append(tensor.numel()) or to_float(tensor))
        found = read_vavae(tmp_path / "last.ckpt")
    assert 77 not in converted and 24 in converted  # of the foundation model nothing is copied, of the projection it is
    assert set(found.discriminator) == {"main.0.weight", "main.3.running_mean", "main.3.num_batches_tracked"}
    assert same(found.discriminator["main.3.num_batches_tracked"], torch.tensor(7))
    assert found.discriminator["main.3.running_mean"].dtype == torch.float32
    assert same(found.projection, PARTS["linear_proj.weight"].float())
    assert found.unused == (
        "loss.logvar",
        "loss.perceptual_loss.lin0.model.1.weight",
        "foundation_model.model.cls_token",
    )
    assert found.source == tmp_path / "last.ckpt" and found.config["latent_channels"] == 4
    assert {tensor.dtype for tensor in found.weights.values()} == {torch.float32}


def test_a_projection_from_the_foundation_model_to_the_latents_is_none(tmp_path):
    state = {**random_weights(TWO), "linear_proj.weight": torch.rand(4, 6, 1, 1), "linear_proj.bias": torch.rand(4)}
    torch.save(state, tmp_path / "forward.ckpt")
    found = read_vavae(tmp_path / "forward.ckpt")
    assert found.projection is None and found.unused == ("linear_proj.weight", "linear_proj.bias")


@pytest.mark.parametrize(("form", "count"), [("f16d32_vfdinov2", 741), ("f16d32_ldm", 398)])
def test_checkpoints_of_the_published_training_load_whole(tmp_path, form, count):
    keys = json.loads((folder("vavae") / "full_keys.json").read_text())[form]
    assert len(keys) == count
    with torch.device("meta"):  # shapes without their memory
        state = {name: torch.empty(shape) for name, shape in keys.items()}
        model = load_reference("vavae", state, whole(PUBLISHED))
    own = [name for name in keys if name.startswith(("encoder", "decoder", "quant", "post_quant"))]
    assert len(model.state_dict()) == len(own) == len(from_reference(state))

    state = {name: torch.zeros(()).expand(shape) for name, shape in keys.items()}  # a number each, also on the disk
    torch.save({"state_dict": state}, tmp_path / "last.ckpt")
    found, said = read_vavae(tmp_path / "last.ckpt"), []
    assert (tmp_path / "last.ckpt").stat().st_size < 1e6
    assert found.weights.keys() == model.state_dict().keys()
    assert all(found.weights[name].shape == tensor.shape for name, tensor in model.state_dict().items())
    assert len(found.discriminator) == 22 and len(own) + 22 + len(found.unused) == count - (count == 741)
    assert (found.projection is not None) == (count == 741)
    found.weights.update({name: tensor.to("meta") for name, tensor in found.weights.items()})
    with torch.device("meta"):
        build_vavae(found, say=said.append)
    assert said[0].startswith(
        f"VA-VAE weights: {len(own)} matched, 0 start anew, {len(found.unused)} unused, with a disc"
    )


def test_files_that_are_no_vavae(tmp_path):
    torch.save({"model": {"x": torch.ones(1)}, "ema": {}, "opt": {}, "config": 1}, tmp_path / "dit.pt")
    with pytest.raises(
        UserError,
        match=r"dit\.pt is no checkpoint of VA-VAE training and no published VA-VAE: it has no "
        r"encoder\.conv_in\.weight among its 4 entries \(model, ema, opt …\)$",
    ):
        read_vavae(tmp_path / "dit.pt")
    save_file({"blocks.0.weight": torch.ones(1)}, tmp_path / "dit.safetensors")
    with pytest.raises(
        UserError, match=r"it has no encoder\.conv_in\.weight among its 1 entries \(blocks\.0\.weight\)$"
    ):
        read_vavae(tmp_path / "dit.safetensors")
    tiny_vavae().save_pretrained(tmp_path / "ours")
    with pytest.raises(UserError, match=r"these are diffusers' names: name the folder with their config\.json"):
        read_vavae(tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(UserError, match=r"Name the file itself: .*dit\.pt"):
        read_vavae(tmp_path)


def test_weights_of_strange_shapes(tmp_path):
    weights = random_weights(TWO)
    for change, message in (
        ({"encoder.conv_in.weight": torch.zeros(32)}, r"encoder\.conv_in\.weight is \(32,\), expected a convolution"),
        (
            {"encoder.down.1.block.0.conv1.weight": torch.zeros(40, 32, 3, 3)},
            r"have \[32, 40\] channels, expected mult",
        ),
        ({"encoder.conv_out.weight": torch.zeros(4, 64, 3, 3)}, "double_z=False"),
        (
            {"decoder.up.0.block.1.conv2.weight": torch.zeros(32, 32, 1, 1)},
            r"is \(32, 32, 1, 1\), expected \(32, 32, 3",
        ),
    ):
        torch.save({**weights, **change}, tmp_path / "v.pt")
        with pytest.raises(UserError, match=message):
            load_vavae(tmp_path / "v.pt", say=quiet)


@pytest.mark.parametrize("name", ["v.pt", "v.safetensors"])
def test_truncated_files(tmp_path, name):
    path = tmp_path / name
    (save_file if name.endswith("safetensors") else torch.save)(random_weights(TWO), path)
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(UserError, match=rf"{name} (is damaged or no checkpoint|cannot be read)"):
        read_vavae(path)


class Malicious:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_code_is_refused_and_the_way_round_it_works(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    weights = random_weights(TWO)
    torch.save({"state_dict": weights, "callbacks": Malicious()}, "foreign.ckpt")
    with pytest.raises(UserError, match="more than tensors and plain values") as refused:
        read_vavae("foreign.ckpt")
    assert not (tmp_path / "executed").exists()
    exec(re.search(r'python -c "(.*)" and name foreign\.plain\.pt', str(refused.value))[1])
    assert read_vavae("foreign.plain.pt").weights.keys() == from_reference(weights).keys()


# ---- grey pictures


@torch.no_grad()
def test_a_grey_model_is_the_one_of_equal_channels_averaged(tmp_path):
    torch.save(training_checkpoint(), tmp_path / "last.ckpt")
    rgb, grey = load_vavae(tmp_path / "last.ckpt", say=quiet), load_vavae(tmp_path / "last.ckpt", say=quiet, channels=1)
    assert (grey.config.in_channels, grey.config.out_channels) == (1, 1)
    assert same(grey.encoder.conv_in.weight, rgb.encoder.conv_in.weight.sum(1, keepdim=True))
    assert same(grey.decoder.conv_out.weight, rgb.decoder.conv_out.weight.mean(0, keepdim=True))
    assert same(grey.decoder.conv_out.bias, rgb.decoder.conv_out.bias.mean(0, keepdim=True))
    x = pictures(1)
    expected = rgb.encode(x.expand(-1, 3, -1, -1)).latent_dist.parameters
    torch.testing.assert_close(grey.encode(x).latent_dist.parameters, expected, rtol=1e-4, atol=1e-4)
    z = expected.chunk(2, 1)[0]
    made = rgb.decode(z).sample.mean(1, keepdim=True)
    torch.testing.assert_close(grey.decode(z).sample, made, rtol=1e-4, atol=1e-4)
    found = read_vavae(tmp_path / "last.ckpt")
    first = with_channels(found, 1).discriminator["main.0.weight"]
    assert same(first, found.discriminator["main.0.weight"].sum(1, keepdim=True))
    assert same(with_channels(found, 3).weights["encoder.conv_in.weight"], found.weights["encoder.conv_in.weight"])


@torch.no_grad()
def test_a_model_for_colours_from_a_grey_one(tmp_path):
    torch.save(random_weights({**TWO, "in_channels": 1, "out_ch": 1}), tmp_path / "grey.pt")
    grey, rgb = load_vavae(tmp_path / "grey.pt", say=quiet), load_vavae(tmp_path / "grey.pt", say=quiet, channels=3)
    assert same(rgb.encoder.conv_in.weight, (grey.encoder.conv_in.weight / 3).expand(-1, 3, -1, -1))
    assert same(rgb.decoder.conv_out.weight, grey.decoder.conv_out.weight.expand(3, -1, -1, -1))
    assert same(rgb.decoder.conv_out.bias, grey.decoder.conv_out.bias.expand(3))
    x = pictures(1)
    expected = grey.encode(x).latent_dist.parameters
    torch.testing.assert_close(
        rgb.encode(x.expand(-1, 3, -1, -1)).latent_dist.parameters, expected, rtol=1e-4, atol=1e-4
    )
    torch.save(random_weights(TWO), tmp_path / "rgb.pt")
    for channels in (2, 0):
        with pytest.raises(UserError, match=rf"channels={channels}: weights for 3 channels can become weights for 1"):
            load_vavae(tmp_path / "rgb.pt", channels=channels)


# ---- export


STATISTICS = {"latents_mean": (0.5, -1.0, 0.0, 2.0), "latents_std": (1.0, 2.0, 3.0, 4.0)}


def published_like(folder) -> VAVAE:
    """A model with vectors and statistics that the reference can represent, and its folder."""
    model = perturb_projections(VAVAE(**vavae_arguments(whole(TWO)), condition_dim=4, num_conditions=3, **STATISTICS))
    model.save_pretrained(folder)
    return model.eval()


@torch.no_grad()
def test_export_for_the_reference(tmp_path):
    model, said = published_like(tmp_path / "vavae"), []
    path = tmp_path / "out" / "vavae.pt"
    assert export_vavae(tmp_path / "vavae", "reference", path, said.append) == [path, tmp_path / "out/latents_stats.pt"]
    written = read_checkpoint(path)
    assert list(written) == ["state_dict"] and written["state_dict"].keys() == shapes(TWO).keys()
    assert all(tuple(written["state_dict"][name].shape) == shape for name, shape in shapes(TWO).items())
    assert {(type(t), t.dtype, t.is_contiguous()) for t in written["state_dict"].values()} == {
        (Tensor, torch.float32, True)
    }
    reference = Reference(written["state_dict"], TWO)
    posterior = model.encode(pictures()).latent_dist
    torch.testing.assert_close(reference.encode(pictures()), posterior.parameters, rtol=1e-4, atol=1e-4)
    made = model.decode(posterior.mean).sample
    torch.testing.assert_close(reference.decode(posterior.mean), made, rtol=1e-4, atol=1e-4)
    statistics = read_checkpoint(tmp_path / "out" / "latents_stats.pt")
    assert statistics["mean"].tolist() == [[[[0.5]], [[-1.0]], [[0.0]], [[2.0]]]] and statistics["std"].shape == (
        1,
        4,
        1,
        1,
    )
    assert said[:2] == [
        "left out: the vectors of 3 people; this is the model with no vector",
        f"written: {path}, {tmp_path / 'out' / 'latents_stats.pt'}",
    ]
    assert (
        said[2].startswith("next: LightningDiT's tokenizer is f16d32 alone") and "'attn_resolutions': [16]" in said[2]
    )
    again = load_vavae(path, say=quiet)
    assert all(same(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_model_without_statistics_or_vectors_is_exported_without(tmp_path):
    torch.save(random_weights(TWO), tmp_path / "v.pt")
    said = []
    assert export_vavae(tmp_path / "v.pt", "reference", tmp_path / "w.pt", said.append) == [tmp_path / "w.pt"]
    assert [line.split(":")[0] for line in said] == ["written", "next"]
    before, after = (read_checkpoint(tmp_path / name) for name in ("v.pt", "w.pt"))
    assert all(same(after["state_dict"][name], tensor) for name, tensor in before.items())


@torch.no_grad()
def test_export_for_diffusers(tmp_path, caplog):
    model, said = published_like(tmp_path / "vavae"), []
    written = export_vavae(tmp_path / "vavae", "diffusers", tmp_path / "plain", said.append)
    assert sorted(path.name for path in (tmp_path / "plain").iterdir()) == sorted(path.name for path in written)
    config = json.loads((tmp_path / "plain" / "config.json").read_text())
    assert config["_class_name"] == "AutoencoderKL" and config["latents_std"] == [1.0, 2.0, 3.0, 4.0]
    assert said[0].startswith("left out: the vectors of 3 people") and said[-1].startswith(
        "next: from diffusers import"
    )
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        plain = AutoencoderKL.from_pretrained(tmp_path / "plain", low_cpu_mem_usage=False)
        assert caplog.messages == []
        AutoencoderKL.from_pretrained(tmp_path / "vavae", low_cpu_mem_usage=False)
        assert "condition_dim" in caplog.text  # what the plain folder avoids
    finally:
        logger.removeHandler(caplog.handler)
    posterior, expected = (m.encode(pictures()).latent_dist for m in (plain, model))
    assert same(posterior.parameters, expected.parameters)
    assert same(plain.decode(posterior.mean).sample, model.decode(posterior.mean).sample)
    assert same(load_vavae(tmp_path / "plain", say=quiet).encoder.conv_in.weight, model.encoder.conv_in.weight)


def test_the_published_size_goes_into_the_tokenizer(tmp_path, monkeypatch):
    with torch.device("meta"):
        model = vavae("f16d32")
    monkeypatch.setattr("vavae_tools.autoencoders.weights.load_vavae", lambda *arguments, **options: model)
    monkeypatch.setattr("torch.save", lambda value, path: path.touch())
    said = []
    export_vavae("anywhere", "reference", tmp_path / "v.pt", said.append)
    assert said[-1] == f"next: in LightningDiT, ckpt_path: {tmp_path / 'v.pt'} in tokenizer/configs/vavae_f16d32.yaml"


def test_the_export_command(tmp_path, monkeypatch, capsys):
    published_like(tmp_path / "vavae")
    tiny_vavae().save_pretrained(tmp_path / "tiny")
    monkeypatch.chdir(tmp_path)

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["export", *line.split()])
        status = 0
        try:
            run_command(export_main)
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    assert run("--vavae vavae --format reference --output v.pt")[0] == 0
    status, out, _ = run("--vavae v.pt --format diffusers --output plain")
    assert status == 0 and out.splitlines()[0].startswith("written: plain/config.json, plain/diffusion_pytorch_model")
    for line, message in (
        ("--vavae nowhere --format diffusers --output d", "No VA-VAE at nowhere"),
        ("--vavae vavae --format diffusers --output vavae", "--output vavae is the VA-VAE itself: name another place"),
        ("--vavae v.pt --format reference --output v.pt", "--output v.pt is the VA-VAE itself"),
        (
            "--vavae vavae --format reference --output plain",
            "--output plain is a folder, expected a file such as plain/",
        ),
        ("--vavae vavae --format diffusers --output v.pt", "v.pt is a file, expected a folder"),
        ("--vavae tiny --format reference --output t.pt", "norm_num_groups=4: the reference has no such network"),
        ("--vavae vavae --format onnx --output t", "invalid choice"),
    ):
        status, _, err = run(line)
        assert status == 2 and message in err.splitlines()[-1], err
    assert not (tmp_path / "t.pt").exists()


def test_a_full_disk_is_said(tmp_path, monkeypatch):
    torch.save(random_weights(TWO), tmp_path / "v.pt")

    def full(value, path):
        raise RuntimeError("basic_ios::clear: iostream error")

    monkeypatch.setattr("torch.save", full)
    with pytest.raises(UserError, match=r"w\.pt could not be written \(basic_ios.*\): free some space"):
        export_vavae(tmp_path / "v.pt", "reference", tmp_path / "w.pt", quiet)
    assert [path.name for path in tmp_path.iterdir()] == ["v.pt"]
