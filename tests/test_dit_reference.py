"""DiT's own weights, against an implementation of others: diffusers' DiTTransformer2DModel."""

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import Timesteps

from vavae_tools.diffusion.dit import DiT, split_reference_arguments
from vavae_tools.published.denoisers import DENOISERS, PlainDiT, load_denoiser

CONFIG = {"input_size": 8, "hidden_size": 32, "depth": 2, "num_heads": 4, "num_classes": 5}
OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "proj_out_1": "final_layer.adaLN_modulation.1",
    "proj_out_2": "final_layer.linear",
}
BLOCK = {  # diffusers' name in a block → DiT's
    "norm1.linear": "adaLN_modulation.1",
    "attn1.to_out.0": "attn.proj",
    "ff.net.0.proj": "mlp.fc1",
    "ff.net.2": "mlp.fc2",
}


def diffusers_dit() -> DiTTransformer2DModel:
    torch.manual_seed(0)
    numbers = {"num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 8, "num_layers": 2}
    numbers |= {"sample_size": 8, "patch_size": 2, "num_embeds_ada_norm": 5, "norm_eps": 1e-6}
    model = DiTTransformer2DModel(**numbers).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    first = model.transformer_blocks[0].norm1.emb
    for block in model.transformer_blocks:  # it embeds time and class in every block, DiT once
        block.norm1.emb.load_state_dict(first.state_dict())
        # and its frequencies go down to 1/10000 at 128, where DiT's would be at the 129th
        block.norm1.emb.time_proj = Timesteps(256, flip_sin_to_cos=True, downscale_freq_shift=0)
    return model


def as_published(model: DiTTransformer2DModel) -> dict[str, torch.Tensor]:
    """Its weights under DiT's names."""
    theirs, embedding, names = model.state_dict(), "transformer_blocks.0.norm1.emb", dict(OUTSIDE)
    names |= {f"{embedding}.timestep_embedder.linear_{n}": f"t_embedder.mlp.{2 * n - 2}" for n in (1, 2)}
    blocks = range(len(model.transformer_blocks))
    for i in blocks:
        names |= {f"transformer_blocks.{i}.{source}": f"blocks.{i}.{target}" for source, target in BLOCK.items()}
    ours = {"pos_embed": model.pos_embed.pos_embed.clone()}
    ours["y_embedder.embedding_table.weight"] = theirs[f"{embedding}.class_embedder.embedding_table.weight"]
    for part in ("weight", "bias"):
        ours |= {f"{target}.{part}": theirs[f"{source}.{part}"] for source, target in names.items()}
        for i in blocks:
            heads = [theirs[f"transformer_blocks.{i}.attn1.to_{letter}.{part}"] for letter in "qkv"]
            ours[f"blocks.{i}.attn.qkv.{part}"] = torch.cat(heads)
    return ours


def loaded(**changes) -> tuple[PlainDiT, DiTTransformer2DModel]:
    theirs = diffusers_dit()
    return load_denoiser("dit", {"ema": as_published(theirs)}, {**CONFIG, **changes}), theirs


@torch.no_grad()
def test_outputs_equal_diffusers_and_guidance_is_on_three_channels_of_the_first_halfs_x():
    ours, theirs = loaded()
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([0, 17, 500, 999]), torch.tensor([0, 4, 2, 5])
    expected = theirs(x, timestep=t, class_labels=y).sample
    assert expected.shape == (4, 8, 8, 8) and expected.abs().max() > 0.5
    torch.testing.assert_close(ours(x, t, y), expected, rtol=0, atol=1e-5)
    x, t, y = torch.randn(4, 4, 8, 8), torch.tensor([300, 700, 300, 700]), torch.tensor([0, 4, 5, 5])
    twice = torch.cat([x[:2], x[:2]])
    conditional, null = theirs(twice, timestep=t, class_labels=y).sample.chunk(2)
    guided = (null + 4 * (conditional - null))[:, :3]
    expected = torch.cat([torch.cat([guided, conditional[:, 3:]], 1), torch.cat([guided, null[:, 3:]], 1)])
    torch.testing.assert_close(ours.forward_with_cfg(x, t, y, 4.0), expected, rtol=0, atol=5e-5)


def test_the_defaults_are_those_of_dit_xl_2():
    denoiser, conditioner = split_reference_arguments(DENOISERS["dit"][1])
    with torch.device("meta"):
        model = DiT(**denoiser)
    count = sum(tensor.numel() for tensor in (*model.parameters(), model.pos_embed))
    assert model.latent_shape == (4, 32, 32)
    assert count + 1001 * conditioner["hidden_size"] == 675_129_632  # 675 M (Peebles & Xie 2023)


def test_without_variance_there_are_as_many_channels():
    theirs = as_published(diffusers_dit())
    rows = torch.arange(16 * 2).view(4, 8)[:, :4].flatten()  # per token: (row, column, channel)
    for part in ("weight", "bias"):
        theirs[f"final_layer.linear.{part}"] = theirs[f"final_layer.linear.{part}"][rows]
    ours, both = load_denoiser("dit", theirs, {**CONFIG, "learn_sigma": False}), loaded()[0]
    x, t, y = torch.randn(2, 4, 8, 8), torch.tensor([3, 900]), torch.tensor([1, 5])
    torch.testing.assert_close(ours(x, t, y), both(x, t, y)[:, :4], rtol=0, atol=1e-6)
