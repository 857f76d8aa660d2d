"""The VA-VAE: AutoencoderKL bit by bit until its projections have learned, and what it can be loaded from."""

import json

import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tiny import SIZE, TWO_LEVELS, perturb_projections, random_images, refuses, same, tiny_dit, tiny_vavae

from vavae_tools.autoencoders.vavae import VAVAE, reconstruct, vavae
from vavae_tools.autoencoders.weights import build_vavae, load_vavae, read_condition_file, read_vavae
from vavae_tools.data.images import ImageFolder
from vavae_tools.runtime.errors import contents


def images(*size: int) -> torch.Tensor:
    return random_images(size or SIZE, batch=3, seed=1)


def plain_copy(model: VAVAE, **changes) -> AutoencoderKL:
    """diffusers' own model with the same weights."""
    plain = AutoencoderKL(**TWO_LEVELS, **changes)
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if k in plain.state_dict()})
    return plain.eval()


LABELS = torch.tensor([2, 0, 1])


def small() -> VAVAE:
    return vavae("small", condition_dim=4, num_conditions=3)


quiet = str  # a log that keeps nothing


# ---- the model
@torch.no_grad()
@pytest.mark.parametrize("attention", [True, False])
def test_with_fresh_projections_it_is_autoencoderkl_bit_by_bit(attention):
    changes = {"mid_block_add_attention": attention}
    model = tiny_vavae(**changes).eval()
    plain = plain_copy(model, **changes)
    assert plain.state_dict().keys() == tiny_vavae(condition_dim=0, **changes).state_dict().keys()
    x, vectors = images(), model.condition_vectors(LABELS)
    assert vectors.abs().min() > 0
    expected = plain.encode(x).latent_dist
    for condition in (None, vectors):
        posterior = model.encode(x, condition=condition).latent_dist
        assert same(posterior.parameters, expected.parameters)
        assert same(model.decode(expected.mean, condition=condition).sample, plain.decode(expected.mean).sample)
        assert same(model.decode(expected.mean, False, condition=condition)[0], plain.decode(expected.mean, False)[0])
        assert same(model.encode(x, False, condition=condition)[0].mean, expected.mean)


@torch.no_grad()
def test_trained_projections_let_the_vector_into_both_halves():
    model = perturb_projections(tiny_vavae()).eval()
    x, vectors = images(), model.condition_vectors(LABELS)
    without = model.encode(x).latent_dist.mean
    with_vectors = model.encode(x, condition=vectors).latent_dist.mean
    others = model.encode(x, condition=model.condition_vectors(LABELS.flip(0))).latent_dist.mean
    changed = (with_vectors - others).abs().amax(dim=(1, 2, 3))
    assert changed[0] > 0.01 and changed[1] == 0 and changed[2] > 0.01  # the middle one kept its vector
    assert (with_vectors - without).abs().max() > 0.01
    assert (model.decode(without, condition=vectors).sample - model.decode(without).sample).abs().max() > 0.01
    keep = torch.tensor([True, False, True])
    dropped = model.encode(x, condition=model.condition_vectors(LABELS, keep)).latent_dist.mean
    torch.testing.assert_close(dropped[1], without[1])  # a dropped vector is the model without vectors
    assert same(dropped[[0, 2]], with_vectors[[0, 2]])


@torch.no_grad()
def test_images_need_not_be_square_nor_levels_of_one_width():
    model = perturb_projections(small()).eval()
    vectors = model.condition_vectors(LABELS)
    posterior = model.encode(images(16, 24), condition=vectors).latent_dist
    assert posterior.mean.shape == (3, 8, 4, 6)
    assert model.decode(posterior.mean, condition=vectors).sample.shape == (3, 3, 16, 24)


def test_gradient_checkpointing_changes_no_gradient():
    gradients = []
    for checkpointing in (False, True):
        model = perturb_projections(tiny_vavae()).train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        vectors = model.condition_vectors(LABELS)
        posterior = model.encode(images(), condition=vectors).latent_dist
        model.decode(posterior.mean, condition=vectors).sample.square().mean().backward()
        gradients.append({name: weights.grad for name, weights in model.named_parameters() if weights.grad is not None})
    assert gradients[0].keys() == gradients[1].keys() and len(gradients[0]) > 50
    torch.testing.assert_close(gradients[1], gradients[0])
    for projections in ("encoder_projections", "decoder_projections"):  # two levels and the middle
        assert all(gradients[0][f"{projections}.{level}.weight"].any() for level in range(3))


def test_normalising():
    model = tiny_vavae(latents_mean=(1.0, -2.0), latents_std=(0.5, 4.0))
    z = torch.tensor([1.5, 2.0]).view(1, 2, 1, 1).expand(1, 2, 4, 4)
    assert torch.equal(model.normalise(z), torch.ones(1, 2, 4, 4))
    torch.testing.assert_close(model.denormalise(model.normalise(z)), z)
    refuses("carries no latent statistics", tiny_vavae().normalise, z)


def test_named_sizes():
    """The published model's numbers of parameters (golden/SPEC.md §6), without their memory."""
    with torch.device("meta"):
        model = vavae("f16d32")
    assert model.downsampling == 16

    def count(part):
        return sum(weights.numel() for weights in part.parameters())

    assert (round(count(model.encoder) / 1e6, 2), round(count(model.decoder) / 1e6, 2)) == (28.41, 41.42)
    assert (count(model.quant_conv), count(model.post_quant_conv)) == (4160, 1056)
    assert small().downsampling == 4 and small().conditions.weight.shape == (3, 4)


# ---- loading
def test_a_saved_model_comes_back(tmp_path):
    model = perturb_projections(tiny_vavae(latents_mean=(1.0, 2.0), latents_std=(3.0, 4.0))).eval()
    model.save_pretrained(tmp_path)
    said = []
    for loaded in (VAVAE.from_pretrained(tmp_path), load_vavae(tmp_path, log=said.append)):
        assert isinstance(loaded, VAVAE)
        for name, weights in model.state_dict().items():
            assert same(loaded.state_dict()[name], weights), name
        assert tuple(loaded.config.latents_std) == (3.0, 4.0) and loaded.config.condition_dim == 4
    assert said == [f"VA-VAE weights: {len(model.state_dict())} matched, 0 start anew, 0 unused ({tmp_path})"]


def test_vectors_of_other_people_are_dropped_with_their_projections(tmp_path):
    model = perturb_projections(tiny_vavae())
    model.save_pretrained(tmp_path)
    for condition_dim, people in [(4, 5), (6, 3)]:  # more people, longer vectors
        said = []
        loaded = load_vavae(tmp_path, condition_dim, people, log=said.append)
        assert loaded.conditions.weight.shape == (people, condition_dim)
        assert all((linear.weight == 0).all() for linear in loaded.encoder_projections)
        assert all((linear.weight == 0).all() for linear in loaded.decoder_projections)
        assert same(loaded.encoder.conv_in.weight, model.encoder.conv_in.weight)
        assert "7 start anew, 0 unused" in said[0]
    assert same(load_vavae(tmp_path, 4, 3, log=quiet).conditions.weight, model.conditions.weight)
    assert not hasattr(load_vavae(tmp_path, 0, 0, log=quiet), "conditions")  # --condition_dim 0


@pytest.mark.parametrize(
    ("people", "rows"),
    [
        ({"A": 0, "B": 1, "C": 2}, [0, 1, 2]),
        ({"C": 0, "A": 1, "B": 2}, [2, 0, 1]),
        ({"B": 0, "X": 1}, [1, None]),
        ({"X": 0, "Y": 1, "Z": 2}, None),
    ],
)
def test_fine_tuning_goes_on_from_the_vectors_of_people_of_the_same_names(tmp_path, people, rows):
    """Where there are none, projections start anew too, although the number of people is the same."""
    model = perturb_projections(tiny_vavae(people={"A": 0, "B": 1, "C": 2}))
    model.save_pretrained(tmp_path)
    assert load_vavae(tmp_path, log=quiet).config.people == {"A": 0, "B": 1, "C": 2}
    found = build_vavae(read_vavae(tmp_path), 4, len(people), log=quiet, people=people)
    assert found.config.people == people
    table = model.conditions.weight
    for own, theirs in enumerate(rows or [None] * 3):
        alike = (found.conditions.weight[own] == table).all(1).nonzero().flatten().tolist()
        assert alike == ([] if theirs is None else [theirs])
    assert same(found.encoder_projections[0].weight, model.encoder_projections[0].weight) == (rows is not None)


def test_what_came_with_a_training_checkpoint_is_kept(tmp_path):
    model = tiny_vavae()
    config = {k: list(v) if isinstance(v, tuple) else v for k, v in model.config.items() if not k.startswith("_")}
    others = {"discriminator.main.0.weight": torch.rand(4, 3, 4, 4), "projection.weight": torch.rand(6, 2, 1, 1)}
    weights = {f"vavae._orig_mod.{k}": v for k, v in model.state_dict().items()}
    checkpoint = {"state_dict": {**weights, **others, "x": torch.ones(1)}, "hyper_parameters": {"vavae_config": config}}
    torch.save(checkpoint, tmp_path / "best.ckpt")
    found, said = read_vavae(tmp_path / "best.ckpt"), []
    assert found.config == config and all(same(found.weights[name], w) for name, w in model.state_dict().items())
    assert found.discriminator.keys() == {"main.0.weight"} and found.unused == ("x",)
    assert same(found.projection, others["projection.weight"])
    grey = build_vavae(found, channels=1, log=said.append)
    assert grey.config.in_channels == grey.config.out_channels == 1 and grey.config.condition_dim == 4
    assert said == [
        f"VA-VAE weights: {len(weights)} matched, 0 start anew, 1 unused, with a discriminator and an alignment "
        f"projection ({tmp_path / 'best.ckpt'})"
    ]
    assert found.config["in_channels"] == 3 and found.discriminator["main.0.weight"].shape[1] == 3  # as it was read


def test_older_folders_of_diffusers_get_fresh_vectors(tmp_path):
    """Stable Diffusion 1.5's: attention under former names, no scaling_factor."""
    plain = plain_copy(tiny_vavae(seed=3))
    plain.save_pretrained(tmp_path)
    former = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, weights in plain.state_dict().items():
        for now, then in former.items():
            name = name.replace(f".{now}.", f".{then}.")
        renamed[name] = weights
    assert sum(".proj_attn." in name for name in renamed) == 4
    save_file(renamed, tmp_path / "diffusion_pytorch_model.safetensors")
    config = json.loads((tmp_path / "config.json").read_text())
    del config["scaling_factor"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = load_vavae(tmp_path, 5, 7, log=quiet).eval()
    assert all(same(model.state_dict()[name], weights) for name, weights in plain.state_dict().items())
    assert model.config.scaling_factor == 0.18215 and model.conditions.weight.shape == (7, 5)
    assert load_vavae(tmp_path, log=quiet).config.condition_dim == 0


def test_what_cannot_be_loaded_is_said(tmp_path):
    refuses(r"No VA-VAE at .*nowhere: expected a folder with config\.json, a \.ckpt", load_vavae, tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refuses(r"empty is no VA-VAE folder: it is empty, expected config\.json", load_vavae, tmp_path / "empty")
    tiny_vavae().save_pretrained(tmp_path / "run" / "vavae")
    for name in ("checkpoints", "classifier", "lightning_logs", "reconstructions", "samples"):
        (tmp_path / "run" / name).mkdir()
    refuses(r"run is no VA-VAE folder, but there is one in it: name .*run/vavae$", load_vavae, tmp_path / "run")
    assert contents(tmp_path / "run").startswith("holds vavae, checkpoints, ")
    tiny_dit()[0].save_pretrained(tmp_path / "dit")
    refuses("dit holds a DiT, expected a VAVAE or an AutoencoderKL", load_vavae, tmp_path / "dit")


# ---- vectors from a file
def test_condition_file(tmp_path):
    path, people = tmp_path / "c.safetensors", {"ID_1": 0, "ID_4": 3}
    save_file({"ID_4": torch.tensor([4.0, 4.5]), "ID_1": torch.tensor([1.0, 1.5]), "ID_9": torch.zeros(2)}, path)
    table = read_condition_file(path, people)
    assert table.tolist() == [[1.0, 1.5], [0, 0], [0, 0], [4.0, 4.5]] and table.dtype == torch.float32
    for vectors, message in (
        ({"ID_1": torch.zeros(2)}, "has no vector for ID_4; it holds 1 vectors"),
        ({"ID_1": torch.zeros(2), "ID_4": torch.zeros(3)}, "differ in shape"),
        ({"ID_1": torch.zeros(2, 2), "ID_4": torch.zeros(2, 2)}, "expected one length"),
    ):
        save_file(vectors, path)
        refuses(message, read_condition_file, path, people)


# ---- reconstructions
def test_reconstructions_stand_beside_their_originals(split_dir):
    model, data = perturb_projections(tiny_vavae()), ImageFolder(split_dir / "val", SIZE, progress=False)
    originals, made = reconstruct(model, data, batch_size=4)
    assert torch.equal(originals, data.in_memory())
    assert made.shape == originals.shape and made.dtype == torch.uint8
    assert torch.equal(made, reconstruct(model, data, batch_size=4)[1])  # no random number in it
