"""The RAE: encoders of transformers' folders, latents, folders, files of a person, errors."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from tiny import random_images as images
from tiny import refuses, same, tiny_vit
from torch import Tensor, nn

from vavae_tools.autoencoders.rae import RAE, RAE_SIZES, image_decoder, tiny_rae
from vavae_tools.autoencoders.rae_weights import fit, load_rae, read_rae_folder

SMALL = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32, "patch_size": 8}
DECODER = {"decoder_hidden_size": 16, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
DECODER |= {"decoder_intermediate_size": 16, "decoder_patch_size": 4}


def small_rae(grid: int = 4, seed: int = 0, **changes) -> RAE:
    torch.manual_seed(seed)
    return RAE(**{"encoder_config": SMALL, "encoder_input_size": 8 * grid, **DECODER, **changes}).eval()


def statistics(rae: RAE, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rae.latent_shape, generator=generator), torch.rand(rae.latent_shape, generator=generator) + 0.1


def same_weights(a: nn.Module, b: nn.Module) -> bool:
    mine, others = a.state_dict(), b.state_dict()
    return mine.keys() == others.keys() and all(torch.equal(mine[name], others[name]) for name in mine)


@pytest.fixture
def said() -> list[str]:
    return []


# ---- transformers' folders made here
def transformers_model(kind: str) -> nn.Module:
    own = {"intermediate_size": 24} if kind in ("siglip", "mae") else {}
    return tiny_vit(KINDS[kind][2], **SMALL, **own)


KINDS = {  # our class, leading tokens that are no patches, transformers' class
    "registers": ("Dinov2withNorm", 5, "Dinov2WithRegisters"),
    "dinov2": ("Dinov2withNorm", 1, "Dinov2"),
    "siglip": ("SigLIPwithNorm", 0, "SiglipVision"),
    "mae": ("MAEwithNorm", 1, "ViTMAE"),
}


def expected_tokens(model: nn.Module, kind: str, pixel_values: Tensor) -> Tensor:
    """The tokens by transformers' own last layer and a norm without affine, which undoes the one with."""
    options = {} if kind in ("registers", "dinov2") else {"interpolate_pos_encoding": True}
    if kind == "mae":
        model.config.mask_ratio = 0.0
        options["noise"] = torch.arange((pixel_values.shape[2] // 8) ** 2).expand(len(pixel_values), -1)
    norm = model.post_layernorm if kind == "siglip" else model.layernorm
    nn.init.ones_(norm.weight)
    nn.init.zeros_(norm.bias)
    with torch.no_grad():
        return model(pixel_values, **options).last_hidden_state[:, KINDS[kind][1] :]


@pytest.mark.parametrize(("kind", "size"), [("registers", 24), ("dinov2", 64), ("siglip", 24), ("mae", 64)])
def test_a_folders_encoder_gives_patch_tokens_without_the_last_norms_weights(tmp_path, said, kind, size):
    model = transformers_model(kind)
    norm = model.post_layernorm if kind == "siglip" else model.layernorm
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    model.save_pretrained(tmp_path)
    rae = load_rae(KINDS[kind][0], tmp_path, size, decoder=DECODER, log=said.append)
    x = images(size)
    torch.testing.assert_close(rae.encoder(x), expected_tokens(model, kind, x), rtol=0, atol=1e-5)
    assert rae.latent_shape == (16, size // 8, size // 8)
    assert any("RAE encoder" in line and "0 missing, 0 unused" in line for line in said), said
    assert said[-1] == "decoder starts anew: reconstructions will be noise until it is trained"


def test_the_whole_siglip_folder_and_its_preprocessor(tmp_path, said):
    from transformers import SiglipConfig, SiglipModel

    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    model = SiglipModel(SiglipConfig(text_config=text, vision_config={**SMALL, "intermediate_size": 24})).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}')
    rae = load_rae("siglip2", tmp_path, 32, decoder=DECODER, log=said.append)
    vision = model.vision_model
    torch.testing.assert_close(rae.encoder(images()), expected_tokens(vision, "siglip", images()))
    assert rae.config.image_mean == [0.1, 0.2, 0.3] and rae.config.image_std == [0.4, 0.5, 0.6]


# ---- the model
def test_published_sizes():
    # 86.4, 304.2 and 415.4 million weights at 256 tokens of width 768, the table of positions among them
    for size, millions in (("ViTB", 86.4), ("ViTL", 304.2), ("ViTXL", 415.4)):
        numbers = {name.replace("decoder_patch", "patch"): value for name, value in RAE_SIZES[size].items()}
        with torch.device("meta"):
            decoder = image_decoder(16, hidden_size=768, **numbers)
        assert sum(p.numel() for p in decoder.state_dict().values()) / 1e6 == pytest.approx(millions, abs=0.05), size


@pytest.mark.parametrize(("grid", "patch"), [(3, 4), (32, 2)])
def test_shapes_follow_from_grid_and_patches(grid, patch):
    rae = small_rae(grid, decoder_patch_size=patch)
    assert rae.latent_shape == (16, grid, grid)
    assert (rae.downsampling, rae.image_size) == (patch, grid * patch)
    latents = rae.encode(images(20)).latent
    assert latents.shape == (2, 16, grid, grid)
    assert rae.decode(latents).sample.shape == (2, 3, grid * patch, grid * patch)
    assert rae.decode(latents, return_dict=False)[0].equal(rae(images(20)))


def test_element_statistics_normalise_with_the_epsilon_counted_once():
    rae = small_rae()
    raw = rae.encode(images()).latent
    reconstructed = rae.decode(raw).sample
    mean, var = statistics(rae)
    var[0] = 0.0
    rae.set_statistics(mean, var)
    latents = rae.encode(images()).latent
    torch.testing.assert_close(latents, (raw - mean) / (var + 1e-5).sqrt())
    torch.testing.assert_close(rae.decode(latents).sample, reconstructed, rtol=0, atol=1e-4)
    assert rae.has_own_statistics
    assert rae.normalise(latents) is latents and rae.denormalise(latents) is latents
    rae.set_statistics(None, None)
    torch.testing.assert_close(rae.encode(images()).latent, raw / (1 + 1e-5) ** 0.5, rtol=0, atol=1e-7)


def test_statistics_per_channel_are_those_of_every_autoencoder():
    rae = small_rae(latents_mean=[0.5] * 16, latents_std=[2.0] * 16)
    raw = rae.encode_images(images(), torch.tensor([0, 1]), lambda *sizes: torch.randn(2, *sizes))
    assert not rae.has_own_statistics
    torch.testing.assert_close(rae.normalise(raw), (raw - 0.5) / 2)
    torch.testing.assert_close(rae.decode_latents((raw - 0.5) / 2), rae.decode(raw).sample, rtol=0, atol=1e-5)
    refuses("carries no latent statistics", small_rae().decode_latents, raw)


def test_the_encoder_is_frozen_and_stays_in_evaluation_mode():
    rae = small_rae(encoder_config={**SMALL, "hidden_dropout_prob": 0.5}).train()
    assert not any(module.training for module in rae.encoder.modules())
    assert {name.split(".")[0] for name, p in rae.named_parameters() if p.requires_grad} == {"decoder"}
    latents = rae.encode(images()).latent
    assert not latents.requires_grad
    rae.decode(latents).sample.square().mean().backward()
    assert rae.decoder.decoder_pred.weight.grad.abs().sum() > 0


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        rae = small_rae(decoder_num_hidden_layers=2).train()
        if checkpointing:
            rae.enable_gradient_checkpointing()
        rae(images()).square().mean().backward()
        gradients.append({name: p.grad for name, p in rae.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 20
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-5, atol=1e-8)


# ---- folders
class OnePart(DiffusionPipeline):
    def __init__(self, vae: RAE) -> None:
        super().__init__()
        self.register_modules(vae=vae)


@pytest.mark.parametrize("cls", ["Dinov2withNorm", "SigLIPwithNorm", "MAEwithNorm"])
def test_a_saved_rae_comes_back_bit_by_bit_also_in_a_pipeline(tmp_path, cls):
    rae = small_rae(3, encoder_cls=cls, latents_mean=[0.0] * 16, latents_std=[2.0] * 16)
    rae.set_statistics(*statistics(rae))
    rae.save_pretrained(tmp_path)
    whole = load_rae(encoder_checkpoint_path=tmp_path, log=lambda line: None)
    OnePart(rae).save_pretrained(tmp_path / "pipe")
    part = OnePart.from_pretrained(tmp_path / "pipe", low_cpu_mem_usage=False).vae
    for back in (RAE.from_pretrained(tmp_path), read_rae_folder(tmp_path), whole, part):
        assert same_weights(rae, back) and back.has_own_statistics
        assert torch.equal(back(images()), rae(images()))


def test_a_folder_of_another_transformers_version_comes_back(tmp_path):
    from safetensors.torch import load_file

    rae = small_rae(encoder_cls="MAEwithNorm")
    rae.save_pretrained(tmp_path)
    path = tmp_path / "diffusion_pytorch_model.safetensors"
    former = {}
    for name, tensor in load_file(path).items():
        if name.startswith("encoder."):
            name = name.replace("model.layers.", "model.encoder.layer.").replace("mlp.fc1", "intermediate.dense")
            name = name.replace("attention.q_proj", "attention.attention.query").replace("mlp.fc2", "output.dense")
        former[name] = tensor
    assert former.keys() != load_file(path).keys()
    save_file(former, path)
    assert same_weights(read_rae_folder(tmp_path), rae)
    path.unlink()
    refuses(f"No weights in {tmp_path}", read_rae_folder, tmp_path)


def test_diffusers_own_folder(tmp_path, said):
    from diffusers import AutoencoderRAE

    torch.manual_seed(0)
    numbers = {"encoder_hidden_size": 64, "encoder_num_hidden_layers": 1, "encoder_input_size": 224, "patch_size": 2}
    decoder = {name: value for name, value in DECODER.items() if name != "decoder_patch_size"}
    std = torch.rand(64, 16, 16) + 0.5
    theirs = AutoencoderRAE(**numbers, **decoder, latents_mean=torch.randn(64, 16, 16), latents_std=std).eval()
    theirs.save_pretrained(tmp_path)
    rae = load_rae(encoder_config_path=tmp_path, log=said.append)
    colours = (images() + 1) / 2
    with torch.no_grad():
        latents = theirs.encode(colours).latent
        torch.testing.assert_close(rae.encode(images()).latent * std / (std + 1e-5), latents, rtol=0, atol=2e-5)
        torch.testing.assert_close(rae.decode(latents).sample, theirs.decode(latents).sample * 2 - 1, rtol=0, atol=1e-4)
    assert len(said) == 1 and "its own settings hold: Dinov2withNorm, 224 pixels → latents 64×16×16" in said[0]


# ---- a person's files
def authors_weights(rae: RAE) -> dict[str, Tensor]:
    """A whole RAE under the authors' names, with what their files hold beside it."""
    named = {}
    for name, tensor in rae.state_dict().items():
        name = name.replace("encoder.model.", "encoder.encoder.") if name.startswith("encoder.") else name
        for ours, theirs in (("to_q", "query"), ("to_k", "key"), ("to_v", "value")):
            name = name.replace(f"attention.{ours}", f"attention.attention.{theirs}")
        named[name.replace("attention.to_out.0", "attention.output.dense")] = tensor.clone()
    return {**named, "encoder.encoder.layernorm.weight": torch.full((16,), 7.0)}


def load(said: list[str], **changes) -> RAE:
    return load_rae(**{"encoder_input_size": 32, "decoder": DECODER, "log": said.append, **changes})


@pytest.fixture
def config_path(tmp_path):
    path = tmp_path / "encoder" / "config.json"
    path.parent.mkdir()
    path.write_text(json.dumps({**SMALL, "model_type": "dinov2_with_registers"}))
    return path


def test_stray_files_and_weights_that_find_no_place(tmp_path, config_path, said):
    encoder, folder = small_rae(seed=4).encoder.model, config_path.parent
    weights = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    save_file(weights, folder / "model.safetensors")
    for name in ("model_old", "model.fp16", "adapter_model"):
        save_file({name: 0 * tensor for name, tensor in weights.items()}, folder / f"{name}.safetensors")
    back = load(said, encoder_config_path=folder)
    assert all(same(tensor, weights[name]) for name, tensor in back.encoder.model.state_dict().items())
    more = {name.replace("layer.0.", "layer.7."): tensor.clone() for name, tensor in weights.items()}
    save_file({**more, **weights}, folder / "model.safetensors")
    refuses(r"find no place in this model \(layers\.7", load, said, encoder_config_path=folder)


@pytest.mark.parametrize(
    ("part", "prefix"),
    [("ema", ""), ("model", "module."), ("state_dict", "_orig_mod.module."), ("state_dict", "rae."), (None, "")],
)
def test_a_whole_rae_in_a_checkpoint(tmp_path, config_path, said, part, prefix):
    rae = small_rae(seed=4)
    weights = {prefix + name: tensor for name, tensor in authors_weights(rae).items()}
    weights["epoch"] = torch.tensor(3)
    path = tmp_path / "ep-last.pt"
    torch.save({part: weights, "epoch": 3, "step": 7} if part else weights, path)
    back = load(said, encoder_config_path=config_path, encoder_checkpoint_path=path)
    assert same_weights(back, rae)
    place = f"{path}, {part}" if part else str(path)
    count = len(rae.encoder.model.state_dict())
    assert said[0].startswith(f"RAE encoder: {count} weights matched, 0 missing")
    assert said[0].endswith(f"({place})") and said[1].startswith("RAE decoder: ") and len(said) == 2


def test_averaged_weights_are_preferred_to_the_live_ones(tmp_path, config_path, said):
    live, averaged = authors_weights(small_rae(seed=1)), authors_weights(small_rae(seed=2))
    of_lightning = {f"ema.rae.{k}": v for k, v in averaged.items()} | {f"rae.{k}": v for k, v in live.items()}
    torch.save({"state_dict": of_lightning}, tmp_path / "both.pt")
    rae = load(said, encoder_config_path=config_path, encoder_checkpoint_path=tmp_path / "both.pt")
    assert same_weights(rae, small_rae(seed=2))


def test_an_extracted_decoder_and_statistics(tmp_path, config_path, said):
    rae = small_rae(seed=4)
    weights = {k.removeprefix("decoder."): v for k, v in authors_weights(rae).items() if k.startswith("decoder.")}
    torch.save(weights, tmp_path / "model.pt")
    mean, _ = statistics(rae)
    torch.save({"mean": mean, "var": None}, tmp_path / "stat.pt")
    files = {"decoder_path": tmp_path / "model.pt", "statistics_path": tmp_path / "stat.pt"}
    back = load(said, encoder_config_path=config_path, **files)
    assert same_weights(back.decoder, rae.decoder)
    assert torch.equal(back.statistics_mean, mean) and torch.equal(back.statistics_var, torch.ones(16, 4, 4))
    assert said[0].startswith("encoder starts anew") and len(said) == 2
    larger = load(said, encoder_config_path=config_path, encoder_input_size=48, decoder_path=tmp_path / "model.pt")
    assert torch.equal(larger.decoder.decoder_pos_embed, small_rae(6).decoder.decoder_pos_embed)


# ---- what a person can do wrong
def test_wrong_numbers_and_shapes_are_one_line():
    rae = small_rae()
    refuses(r"\(2, 1, 16, 16\).* 3 channels", rae.encode, torch.zeros(2, 1, 16, 16))
    refuses("square", rae.encode, torch.zeros(2, 3, 16, 24))
    refuses(r"\(1, 16, 3, 3\).* 16×4×4", rae.decode, torch.zeros(1, 16, 3, 3))
    refuses("patches of 8", rae.encoder, torch.zeros(1, 3, 20, 16))
    refuses(r"\(16,\).* 16×4×4", rae.set_statistics, torch.zeros(16), None)
    refuses("'ViTH'.* ViTXL", load_rae, decoder="ViTH")
    for message, changes in (
        ("30 .*24 or 32", {"encoder_input_size": 30}),
        ("'CLIP'.* Dinov2withNorm", {"encoder_cls": "CLIP"}),
        ("encoder_cls=MAEwithNorm", {"encoder_config": {**SMALL, "model_type": "vit_mae"}}),
        ("'bert'.* dinov2", {"encoder_config": {**SMALL, "model_type": "bert"}}),
        ("16 .*3 attention heads", {"encoder_config": {**SMALL, "num_attention_heads": 3}}),
        ("16 .*3", {"decoder_num_attention_heads": 3}),
    ):
        refuses(message, small_rae, **changes)


def test_wrong_files_are_one_line(tmp_path, config_path, said):
    empty = tmp_path / "empty"
    empty.mkdir()
    torch.save({"model": {"conv.weight": torch.zeros(1)}}, tmp_path / "other.pt")
    torch.save({"mean": None, "var": None}, tmp_path / "none.pt")
    save_file({"mean": torch.zeros(3, 4, 4)}, tmp_path / "stat.safetensors")
    for message, changes in (
        ("No folder", {"encoder_config_path": tmp_path / "no"}),
        ("config.json is missing", {"encoder_config_path": empty}),
        ("No checkpoint", {"encoder_checkpoint_path": tmp_path / "no.pt"}),
        ("no decoder_hidden_size", {"decoder": config_path}),
        ("conv.weight", {"encoder_checkpoint_path": tmp_path / "other.pt"}),
        ("No weights in", {"encoder_checkpoint_path": empty}),
        ("no statistics", {"statistics_path": tmp_path / "none.pt"}),
        (r"\(3, 4, 4\).* 16×4×4", {"statistics_path": tmp_path / "stat.safetensors"}),
        ("'dinov2_with_registers'.* encoder_cls=Dinov2withNorm", {"encoder_cls": "mae"}),
    ):
        refuses(message, load, said, **{"encoder_config_path": config_path, **changes})


def test_weights_of_another_architecture_are_named(tmp_path, config_path, said):
    larger = authors_weights(small_rae(encoder_config={**SMALL, "image_size": 48}))
    tiny = {f"decoder.{name}": tensor for name, tensor in tiny_rae().decoder.state_dict().items()}
    for message, place, weights in (
        (r"position_embeddings is \(1, 37, 16\), expected \(1, 17, 16\)", "encoder_checkpoint_path", larger),
        ("another encoder", "encoder_checkpoint_path", authors_weights(small_rae(encoder_cls="MAEwithNorm"))),
        ("no decoder.* only encoder", "decoder_path", transformers_model("registers").state_dict()),
        ("take decoder=tiny", "decoder_path", tiny),
    ):
        torch.save(weights, tmp_path / "whole.pt")
        refuses(message, load, said, encoder_config_path=config_path, **{place: tmp_path / "whole.pt"})
    refuses("lacks .* of the model.s weights", fit, small_rae().decoder, {"decoder_norm.bias": torch.zeros(16)})
