"""The RAE against its authors' code and diffusers': golden cases, every form that weights come in."""

import pytest
import torch
from golden_cases import assert_close, load_case, load_weights
from tiny import refuses
from torch import Tensor

from vavae_tools.autoencoders.rae import image_decoder
from vavae_tools.autoencoders.rae_weights import from_diffusers
from vavae_tools.published.rae import RAEReference, load_rae_encoder_reference, load_rae_reference


@pytest.fixture(scope="module")
def whole() -> tuple[RAEReference, dict[str, Tensor], dict[str, float]]:
    case, io = load_case("rae-decoder")
    config = {**case["constructor"], "statistics": {"mean": io["stat.mean"], "var": io["stat.var"]}}
    model = load_rae_reference(load_weights("rae-decoder"), config)
    return model, io, {"atol": case["tolerance"]["fp32_cpu_abs"]}


def test_encoding_and_decoding(whole):
    model, io, tolerance = whole
    assert_close(model.rae.pixel_values(io["image"]), io["enc.pixel_values"], tolerance)
    assert_close(model.encoder(io["enc.pixel_values"]), io["enc.tokens"], tolerance)
    assert_close(model.encode(io["image"]), io["latent"], tolerance)
    assert_close(model.decode(io["latent"]), io["recon"], tolerance)
    assert_close(model(io["image"]), io["recon"], tolerance)
    assert_close(model.decoder(io["dec.tokens"]).logits, io["dec.logits"], tolerance)
    assert_close(model.unpatchify(io["dec.logits"]), io["dec.pixels"], tolerance)
    assert_close(model.decoder.decoder_pos_embed, io["dec.pos_embed"], tolerance)


def test_noise_on_tokens(whole):
    model, io, tolerance = whole
    assert model.noise_tau == pytest.approx(io["noise.tau"].item())
    assert_close(model.encode(io["image"], io["noise.u"], io["noise.n"]), io["noise.latent_train"], tolerance)
    model.train()
    try:
        torch.manual_seed(5)
        drawn = model.encode(io["image"])
        torch.manual_seed(5)
        u, n = torch.rand(2, 1, 1), torch.randn(2, 16, 32)  # in this order
        torch.testing.assert_close(drawn, model.encode(io["image"], u, n), rtol=0, atol=0)
    finally:
        model.eval()


def test_gradients_of_the_decoder(whole):
    model, io, tolerance = whole
    loss = (model.decode(io["latent"]) - io["grad.target"]).abs().mean()
    assert_close(loss, io["grad.l1"], tolerance)
    loss.backward()
    of_weights = dict(model.decoder.named_parameters())
    names = [name for name in io if name.startswith("grad.") and name not in ("grad.target", "grad.l1")]
    assert len(names) == 5
    for name in names:
        ours = name.removeprefix("grad.").replace("attention.attention.query", "attention.to_q")
        assert_close(of_weights[ours].grad, io[name], {"atol": 1e-8, "rtol": 1e-4})


def test_statistics_may_stand_in_several_places(whole):
    model, io, _ = whole
    config, weights = load_case("rae-decoder")[0]["constructor"], load_weights("rae-decoder")
    both = {"mean": io["stat.mean"], "var": io["stat.var"]}
    for numbers in (both, {"stat": both}):
        found = load_rae_reference(weights, {**config, **numbers})
        torch.testing.assert_close(found.encode(io["image"]), model.encode(io["image"]))
    for start in ("stat.", "latent_"):
        found = load_rae_reference({**weights, **{f"{start}{name}": both[name] for name in both}}, config)
        torch.testing.assert_close(found.encode(io["image"]), model.encode(io["image"]))


def test_without_statistics_latents_are_the_tokens(whole):
    _, io, tolerance = whole
    case, _ = load_case("rae-decoder")
    model = load_rae_reference(load_weights("rae-decoder"), case["constructor"])
    tokens = io["enc.tokens"].transpose(1, 2).reshape(2, 32, 4, 4)
    assert_close(model.encode(io["image"]), tokens, tolerance)
    assert model.decode(torch.zeros(1, 32, 6, 6)).shape == (1, 3, 32, 32)  # another grid is resized
    flat = load_rae_reference(load_weights("rae-decoder"), {**case["constructor"], "reshape_to_2d": False})
    assert_close(flat.encode(io["image"]), io["enc.tokens"], tolerance)
    torch.testing.assert_close(flat.decode(io["enc.tokens"]), model.decode(tokens))


@pytest.mark.parametrize("form", ["bare", "decoder.", "module.", "diffusers"])
def test_the_decoder_alone(whole, form):
    _, io, tolerance = whole
    constructor = load_case("rae-decoder")[0]["constructor"]
    flat = {**constructor["decoder_config"], "patch_size": 8, "image_size": 32, "hidden_size": 32}
    weights = {k: v for k, v in load_weights("rae-decoder").items() if k.startswith("decoder.")}
    if form == "decoder.":
        flat["num_patches"] = 16
    else:
        weights = {k.removeprefix("decoder."): v for k, v in weights.items()}
    if form == "module.":
        weights, flat = {f"module._orig_mod.{k}": v for k, v in weights.items()}, constructor
    elif form == "diffusers":
        for old, new in (("attention.query", "to_q"), ("attention.key", "to_k"), ("attention.value", "to_v")):
            weights = {k.replace(f"attention.{old}", f"attention.{new}"): v for k, v in weights.items()}
        weights = {k.replace("attention.output.dense", "attention.to_out.0"): v for k, v in weights.items()}
        del weights["decoder_pos_embed"]
    model = load_rae_reference(weights, flat)
    assert_close(model(io["dec.tokens"]).logits, io["dec.logits"], tolerance)
    assert_close(model.unpatchify(io["dec.logits"]), io["dec.pixels"], tolerance)
    assert_close(model(io["dec.tokens_other_size"]).logits, io["dec.logits_other_size"], tolerance)


@pytest.mark.parametrize("grid", [3, 16, 32])
def test_positions_are_sines_of_whole_numbers_on_every_grid(grid):
    width, numbers = 24, {"decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
    numbers |= {"decoder_intermediate_size": 8, "patch_size": 2}
    decoder = image_decoder(grid, hidden_size=8, decoder_hidden_size=width, **numbers)
    omega = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    rows = [torch.zeros(width, dtype=torch.float64)]  # the class token
    for r in range(grid):
        for c in range(grid):
            rows.append(torch.cat([(c * omega).sin(), (c * omega).cos(), (r * omega).sin(), (r * omega).cos()]))
    torch.testing.assert_close(decoder.decoder_pos_embed, torch.stack(rows).float()[None], rtol=0, atol=1e-6)


# ---- encoders
def test_mae_and_siglip():
    case, io = load_case("rae-encoders")
    model = load_rae_reference(load_weights("rae-encoders"), case["constructor"])
    tolerance = {"atol": case["tolerance"]["fp32_cpu_abs"]}
    assert_close(model.mae(io["pixel_values"]), io["mae.tokens"], tolerance)
    assert_close(model(io["pixel_values"])["siglip2"], io["siglip2.tokens"], tolerance)


@pytest.mark.parametrize(("name", "cls"), [("mae", "MAEwNorm"), ("siglip2", "SigLIP2wNorm")])
@pytest.mark.parametrize("names", ["of transformers 5", "of transformers 4"])
def test_one_encoder_alone(name, cls, names):
    case, io = load_case("rae-encoders")
    weights = {k: v for k, v in load_weights("rae-encoders").items() if k.startswith(f"{name}.")}
    if names == "of transformers 4":
        weights = {former(k.removeprefix(f"{name}.model."), name): v for k, v in weights.items()}
    config = {"encoder": cls, "encoder_config": case["constructor"][name]["config"]}
    model = load_rae_encoder_reference(weights, config)
    tolerance = {"atol": case["tolerance"]["fp32_cpu_abs"]}
    assert_close(model(io["pixel_values"]), io[f"{name}.tokens"], tolerance)


def former(name: str, kind: str) -> str:
    """A weight's name as transformers 4 wrote it, in a file of the whole model."""
    if kind == "siglip2":
        return f"vision_model.{name}"
    name = name.replace("layers.", "encoder.layer.")
    for new, old in (("q_proj", "attention.query"), ("k_proj", "attention.key"), ("v_proj", "attention.value")):
        name = name.replace(f"attention.{new}", f"attention.{old}")
    name = name.replace("attention.o_proj", "attention.output.dense")
    return "vit." + name.replace("mlp.fc1", "intermediate.dense").replace("mlp.fc2", "output.dense")


# ---- diffusers
def test_diffusers_weights_give_the_authors_latents():
    case, io = load_case("rae-diffusers")
    model = load_rae_reference(load_weights("rae-diffusers"), case["constructor"])
    tolerance = {"atol": case["tolerance"]["fp32_cpu_abs"]}
    with torch.no_grad():
        latent = model.encode(io["image"])
        assert_close(latent, io["latent_reference"], tolerance)
        # diffusers adds the epsilon twice: its latents are ours by std / (std + 1e-5)
        std = load_weights("rae-diffusers")["_latents_std"]
        assert_close(latent * std / (std + 1e-5), io["latent_diffusers"], tolerance)
        assert (latent - io["latent_diffusers"]).abs().max() > 3e-4
        assert_close(model.decode(io["latent_reference"]), io["recon_reference"], tolerance)
        assert_close(model.decode(io["latent_diffusers"]), io["recon_diffusers"], tolerance)


def test_diffusers_scaling_factor_and_statistics_per_channel():
    case, io = load_case("rae-diffusers")
    weights = load_weights("rae-diffusers")
    constructor = {**case["constructor"], "scaling_factor": 0.5}
    plain = from_diffusers(case["constructor"], weights)
    scaled = from_diffusers(constructor, weights)
    images = io["image"] * 2 - 1
    torch.testing.assert_close(scaled.encode(images).latent, 0.5 * plain.encode(images).latent)
    weights["_latents_mean"], weights["_latents_std"] = torch.zeros(1), torch.full((64, 1, 1), 2.0)
    per_channel = from_diffusers(case["constructor"], weights)
    tokens = per_channel.tokens(io["image"]).transpose(1, 2).reshape(1, 64, 16, 16)
    torch.testing.assert_close(per_channel.encode(images).latent, tokens / 2)


def test_numbers_and_weights_that_do_not_fit_are_one_line():
    constructor, weights = load_case("rae-decoder")[0]["constructor"], load_weights("rae-decoder")
    without = {name: weight for name, weight in weights.items() if name != "encoder.encoder.embeddings.cls_token"}
    for state_dict, config, message in (
        (weights, {**constructor, "decoder_config": {}}, "no decoder_hidden_size"),
        (weights, {**constructor, "decoder_patch_size": 4}, r"decoder_pred\.bias is \(192,\), expected \(48,\)"),
        (weights, {**constructor, "mean": torch.zeros(3, 4, 4)}, "this RAE's latents are 32×4×4"),
        (without, constructor, r"lacks 1 .*embeddings\.cls_token"),
        ({"conv.weight": torch.zeros(1)}, {}, r"neither a decoder .* they are conv\.weight"),
    ):
        refuses(message, load_rae_reference, state_dict, config)
