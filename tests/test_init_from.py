"""Going on from weights with other classes: all else is kept exactly, and what was not loaded is said."""

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import yaml
from golden_cases import assert_close, load_case, load_weights
from safetensors.torch import save_file
from tiny import refused, refuses, same, tiny_pipeline, trained_looking
from torch import Tensor
from torch.nn.functional import silu

from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DiT, make_denoiser, split_reference_arguments
from vavae_tools.recipes import init_from
from vavae_tools.recipes.base import InitFrom
from vavae_tools.recipes.init_from import (
    nearest_classes,
    read_fitting_weights,
    read_starting_weights,
    start_from,
    time_is_told,
)

NUMBERS = {"input_size": 4, "patch_size": 2, "in_channels": 3, "hidden_size": 16, "depth": 2, "num_heads": 2}
PLAIN = {"swiglu": False, "rope": False, "rms_norm": False}


def start(denoiser, conditioner, path, latents=None, seed=0, reversed_time=None, **settings) -> list[str]:
    """`start_from`: what was logged."""
    said: list[str] = []
    start_from(denoiser, conditioner, InitFrom(weights=path, **settings), latents, seed, said.append, reversed_time)
    return said


def built(classes: int, **arguments) -> tuple[torch.nn.Module, ClassConditioner]:
    torch.manual_seed(1)
    denoiser = make_denoiser({**NUMBERS, **arguments})
    return denoiser, ClassConditioner(classes, denoiser.conditioning_size)


def published(path, classes: int = 5, seed: int = 3, wrap=lambda weights: weights, **arguments):
    """A file as the references publish it, and the model in it."""
    denoiser, conditioner = (trained_looking(part, seed) for part in built(classes, **arguments))
    table = {"y_embedder.embedding_table.weight": conditioner.embedding_table.weight.data}
    tables = {"pos_embed": denoiser.pos_embed}
    if getattr(denoiser, "rope_table", None) is not None:
        cos, sin = denoiser.rope_table
        tables |= {"feat_rope.freqs_cos": cos, "feat_rope.freqs_sin": sin}
    torch.save(wrap({**denoiser.state_dict(), **table, **tables}), path)
    return path, denoiser, conditioner


def golden_file(name: str, path) -> tuple[dict, dict[str, Tensor], str]:
    case, tensors = load_case(name)
    save_file(load_weights(name), path)
    return case, tensors, str(path)


# ---- published weights
@pytest.mark.parametrize("name", ["lightningdit-a", "rae-lightningdit", "ddt-a"])
def test_published_weights_with_other_classes_say_what_they_said(tmp_path, name):
    case, tensors, path = golden_file(name, tmp_path / "published.safetensors")
    published_classes = case["constructor"]["num_classes"]
    arguments, of_conditioner = split_reference_arguments({**case["constructor"], "num_classes": 3})
    if name == "rae-lightningdit":
        arguments |= {"time_embed": "fourier", "reversed_time": True}
    denoiser, conditioner = make_denoiser(arguments), ClassConditioner(**of_conditioner)
    y = tensors["y"]
    first, last = y[y < published_classes].unique()[[0, -1]].tolist()
    start(denoiser, conditioner, path, classes=[last, None, first])

    ours = {last: 0, first: 2, published_classes: 3}  # published label → the one here; the last is the null
    known = torch.tensor([label in ours for label in y.tolist()])
    assert known.sum() >= 2
    labels = torch.tensor([ours[label] for label in y[known].tolist()])
    x, t = tensors["x"][known], tensors["t"][known]
    reverse = name != "lightningdit-a"  # RAE's time is the share of noise, its answer noise − data
    made = denoiser(x, 1 - t if reverse else t, conditioner(labels)) * (-1 if reverse else 1)
    assert_close(made, tensors["out"][known], {"rtol": 1e-4, "atol": 2e-5})


@pytest.mark.parametrize("name", ["lightningdit-a", "lightningdit-b", "lightningdit-eps", "rae-lightningdit", "ddt-a"])
def test_another_architecture_is_told_with_the_overrides_that_fit(tmp_path, name):
    case, tensors, path = golden_file(name, tmp_path / "published.safetensors")
    channels = tensors["x"].shape[1]
    side = {"input_size": tensors["x"].shape[-1], "in_channels": channels}
    wrong, conditioner = built(2, **side, patch_size=1, hidden_size=24)
    before = {key: value.clone() for key, value in wrong.state_dict().items()}
    message = refused(start, wrong, conditioner, path)
    assert "hidden_size" in message and "(here 24)" in message
    assert all(same(value, before[key]) for key, value in wrong.state_dict().items())

    typed = dict(re.findall(r"model\.(\w+)=(\S+)", message))
    arguments, of_conditioner = split_reference_arguments(
        {**side, "num_classes": 2, **{key: yaml.safe_load(value) for key, value in typed.items() if key != "size"}}
    )
    fitting = make_denoiser(arguments)
    expected, _ = split_reference_arguments(case["constructor"])
    assert fitting.config.num_heads == expected["num_heads"]
    start(fitting, ClassConditioner(**of_conditioner), path)


def test_only_the_class_table_starts_anew_and_what_is_left_is_listed(tmp_path):
    def as_trained(weights):
        wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
        return {"model": {"nonsense": torch.ones(1)}, "ema": wrapped, "opt": {"state": {}}, "epoch": 7}

    path, theirs, table = published(tmp_path / "lightningdit.pt", classes=5, wrap=as_trained)
    denoiser, conditioner = built(31)
    said = start(denoiser, conditioner, path, seed=4)[0]
    assert all(same(value, theirs.state_dict()[name]) for name, value in denoiser.state_dict().items())
    rows = conditioner.embedding_table.weight
    assert rows.shape == (32, 16) and same(rows[31], table.embedding_table.weight[5])
    assert rows[:31].std().item() == pytest.approx(0.02, rel=0.1)
    assert f"{len(theirs.state_dict())} tensors matched" in said
    assert "class table: 0 of 31 rows copied, the null row kept" in said
    assert re.search(r"not loaded: pos_embed, feat_rope\S+, feat_rope\S+ \(computed here\), epoch, model, opt$", said)

    again = built(31)[1]
    torch.manual_seed(99)  # rows follow from `seed` alone
    start(built(31)[0], again, path, seed=4)
    assert same(again.embedding_table.weight, rows)


def of_lightning(weights: dict) -> dict:
    both = {f"network.{part}.{name}": w + (part == "live") for part in ("live", "ema") for name, w in weights.items()}
    return {"epoch": 3, "state_dict": {**both, "network.ema.extra.weight": torch.zeros(2)}}


def behind_blocks(wrapper: str, weights: dict) -> dict:
    return {"ema": {re.sub(r"^(blocks\.\d+\.)", rf"\1{wrapper}", name): w for name, w in weights.items()}}


def beside(live: str, average: str, weights: dict) -> dict:
    return {live: {name: 0 * tensor for name, tensor in weights.items()}, average: {"module": weights}}


AVERAGES = {"model": "model_ema", "net": "ema_0.9999", "params": "params_ema"}
WRAPPERS = "_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module."
FORMS = [(of_lightning, "epoch"), *((partial(behind_blocks, wrapper), "") for wrapper in WRAPPERS)]
FORMS += [(partial(beside, live, average), live) for live, average in AVERAGES.items()]


@pytest.mark.parametrize(("form", "left"), FORMS)
def test_the_average_is_taken_whatever_it_is_called_and_wrapped_in(tmp_path, form, left):
    path, denoiser, _ = published(tmp_path / "a.pt", wrap=form)
    fresh, conditioner = built(5)
    said = start(fresh, conditioner, path)[0]
    assert all(same(*pair) for pair in zip(fresh.parameters(), denoiser.parameters(), strict=True)) and left in said


@pytest.mark.parametrize(
    ("spoil", "settings", "expected"),
    [
        (
            lambda w: {k: v for k, v in w.items() if k != "blocks.1.attn.proj.bias"},
            {},
            "the first blocks.1.attn.proj.bias",
        ),
        (
            lambda w: {**w, "blocks.1.attn.extra": w["pos_embed"]},
            {},
            "find no place in this model (blocks.1.attn.extra",
        ),
        (lambda w: {**w, "blocks.1.attn.proj.bias": torch.zeros(3)}, {}, "size mismatch for blocks.1.attn.proj.bias"),
        (lambda w: {k: v for k, v in w.items() if not k.startswith("y_")}, {}, "is no denoiser with classes"),
        (lambda w: {**w, "x_embedder.proj.weight": torch.zeros(3, 4)}, {}, "is not whole, or no denoiser"),
        (dict, {"in_channels": 5}, "was trained on latents of 3 channels, these have 5"),
        (dict, {"kind": "ddt"}, "is a LightningDiT, not a DiT with the wide head: set init.kind=lightningdit"),
        (
            lambda w: {**w, "blocks.0.attn.proj.bias": torch.full((16,), torch.nan)},
            {},
            "not finite (blocks.0.attn.proj.b",
        ),
        (
            lambda w: {k: v / 0 if k.startswith("y_") else v for k, v in w.items()},
            {},
            "spoiled.pt are not finite (class t",
        ),
        (dict, {"classes": [0, 1, 2]}, "lists 3 labels, expected 2"),
        (dict, {"classes": "keep"}, "none of the classes here (2) is one of the weights' (5)"),
    ],
)
def test_what_does_not_fit_is_told_in_one_line(tmp_path, spoil, settings, expected):
    path, *_ = published(tmp_path / "spoiled.pt", wrap=spoil)
    of_model = {name: settings.pop(name) for name in ("in_channels",) if name in settings}
    assert expected in refused(start, *built(2, **of_model), path, **settings)


def test_a_pipeline_of_another_kind_than_was_named_is_refused(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path)
    says = r"is a LightningDiT, not a DiT( with the wide head)?: set init\.kind=lightningdit"
    for kind in ("ddt", "dit"):
        refuses(says, read_starting_weights, tmp_path, kind)
    assert read_starting_weights(tmp_path, "lightningdit").kind == "lightningdit"


def toy(reverse: bool, seed: int = 0) -> DiT:
    """A network that has learned to move noise to zero, t = 1 being data or, reversed, noise."""
    denoiser, _ = built(5, **PLAIN)
    optimiser = torch.optim.Adam(denoiser.parameters(), 1e-2)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(60):
        noise, t = torch.randn(16, 3, 4, 4, generator=generator), torch.rand(16, generator=generator)
        share = (t if reverse else 1 - t)[:, None, None, None]
        error = denoiser.predict(share * noise, t, torch.zeros(16, 16)) - (noise if reverse else -noise)
        optimiser.zero_grad()
        error.square().mean().backward()
        optimiser.step()
    return denoiser


@pytest.mark.parametrize("reverse", [False, True])
def test_which_way_time_runs_is_seen_in_the_weights_or_asked_for(tmp_path, reverse):
    path, _, table = published(tmp_path / "sit.pt", **PLAIN)
    weights = {"y_embedder.embedding_table.weight": 0 * table.embedding_table.weight.data}
    torch.save({"ema": {**toy(reverse).state_dict(), **weights}}, path)
    if not reverse:
        assert "reversed_time" not in " ".join(start(*built(2, **PLAIN), path, kind="lightningdit"))
    else:
        says = r"whose t = 1 is noise .*: set model\.reversed_time=true, or false"
        refuses(says, start, *built(2, **PLAIN), path, kind="lightningdit")
        with torch.device("meta"):  # as before anything is encoded
            unbuilt, conditioner = built(2, **PLAIN)
        found = read_fitting_weights(unbuilt, conditioner, InitFrom(str(path), kind="lightningdit"), {})
        refuses(says, time_is_told, found, unbuilt, None)
    for asked in (False, True):  # what is asked for holds, and is said
        denoiser, conditioner = built(2, **PLAIN, reversed_time=asked)
        said = start(denoiser, conditioner, path, kind="lightningdit", reversed_time=asked)[-1]
        assert f"as given: num_heads=2, reversed_time={str(asked).lower()}" in said
        assert denoiser.config.reversed_time == asked


@pytest.mark.parametrize(("measured", "told"), [(-0.149, True), (-0.1, False), (0.1, False), (0.149, None)])
def test_which_way_time_runs_is_seen_of_weights_trained_for_a_short_time(tmp_path, monkeypatch, measured, told):
    path, *_ = published(tmp_path / "sit.pt", **PLAIN)
    monkeypatch.setattr(init_from, "_time_of", lambda denoiser, null: measured)  # 0.149 was measured of a small one
    denoiser, conditioner = built(2, **PLAIN)
    found = read_fitting_weights(denoiser, conditioner, InitFrom(str(path), kind="lightningdit"), {})
    if told is None:
        refuses(r"whose t = 1 is noise \(0.15\)", time_is_told, found, denoiser, None)
    else:
        assert time_is_told(found, denoiser, None) is told


def test_positions_of_its_own_are_said_not_to_hold(tmp_path):
    path, *_ = published(tmp_path / "a.pt", wrap=lambda w: {**w, "pos_embed": 3 * w["pos_embed"]})
    assert "pos_embed is another (by up to 2) than is computed here and holds" in start(*built(5), path)[0]


def test_an_average_without_names_is_refused(tmp_path):
    path, *_ = published(tmp_path / "a.pt", wrap=lambda w: {"model": w, "ema": {"shadow_params": [*w.values()]}})
    refuses(r"without their names \(ema\.shadow_params\): save it by names", start, *built(5), path)


# ---- DiT's own weights
def test_dit_weights_need_to_be_told_apart_from_those_of_the_same_form(tmp_path):
    path, theirs, table = published(tmp_path / "dit.pt", **PLAIN, learn_sigma=True)
    refuses(r"noise at timesteps.*kind=dit.*velocities.*kind=lightningdit", start, *built(2, **PLAIN), path)

    # of velocities the half that is no variance is the whole model
    denoiser, conditioner = built(5, **PLAIN)
    start(denoiser, conditioner, path, kind="lightningdit", classes="keep", reversed_time=False)
    x, t, y = torch.randn(3, 3, 4, 4), torch.rand(3), torch.tensor([0, 4, 5])
    with torch.no_grad():
        torch.testing.assert_close(denoiser(x, t, conditioner(y)), theirs(x, t, table(y)), rtol=0, atol=1e-6)

    # of noise at timesteps neither the last layer nor the embedding of time says anything here
    fresh, conditioner = built(5, **PLAIN)
    before = {name: value.clone() for name, value in fresh.state_dict().items()}
    said = start(fresh, conditioner, path, kind="dit", classes="keep")[0]
    for name, value in fresh.state_dict().items():
        anew = name.startswith(("t_embedder.", "final_layer.linear."))
        assert same(value, before[name] if anew else theirs.state_dict()[name]), name
    assert "anew: final_layer.linear.bias, final_layer.linear.weight, t_embedder.mlp.0.bias" in said
    refuses("predicts nothing yet", start, *built(5, **PLAIN), path, kind="dit", lora_rank=4)


# ---- classes
def test_a_pipeline_keeps_the_rows_of_the_people_it_knows(tmp_path):
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path / "pipeline")
    numbers = {"input_size": 8, "patch_size": 4, "in_channels": 2, "hidden_size": 16, "depth": 1, "num_heads": 2}
    people = SimpleNamespace(num_classes=4, folder=SimpleNamespace(people={"ID_3": 0, "new": 1, "ID_1": 2, "b": 3}))
    theirs = pipe.conditioner.embedding_table.weight

    denoiser, conditioner = DiT(**numbers), ClassConditioner(4, 16)
    said = start(denoiser, conditioner, tmp_path / "pipeline", classes="keep", latents=people)[0]
    assert all(same(value, pipe.denoiser.state_dict()[name]) for name, value in denoiser.state_dict().items())
    rows = conditioner.embedding_table.weight
    assert same(rows[[0, 2, 4]], theirs[[2, 0, 3]])
    assert not any(same(rows[i], row) for i in (1, 3) for row in theirs)
    assert "class table: 2 of 4 rows copied, the null row kept" in said
    named = [None, "ID_2", None, "ID_2"]
    start(denoiser, conditioner, tmp_path / "pipeline", classes=named, latents=people)
    assert same(conditioner.embedding_table.weight[[1, 3]], theirs[[1, 1]])
    deeper = DiT(**{**numbers, "depth": 2})
    refuses(r"depth 1 \(here 2\).*model.depth=1", start, deeper, conditioner, tmp_path / "pipeline")
    (tmp_path / "run").mkdir()
    (tmp_path / "pipeline").rename(tmp_path / "run" / "pipeline")
    refuses(r"no model_index.json\); it holds pipeline", start, denoiser, conditioner, tmp_path / "run")


CLASSES = 12
MEANS = torch.randn(CLASSES, 3, generator=torch.Generator().manual_seed(0))


def knowing_classes() -> tuple[DiT, ClassConditioner]:
    """A model that always predicts MEANS of its class, and zero for any class, built by hand."""
    denoiser, conditioner = built(CLASSES, patch_size=1)
    for weight in denoiser.parameters():
        weight.data.zero_()  # the last norm's too, so that its shift alone reaches the last linear map
    denoiser.final_layer.adaLN_modulation[1].weight.data[:16] = torch.eye(16)  # shift = silu(conditioning)
    rows = torch.full((CLASSES + 1, 16), 8.0)  # silu is nearly linear there
    rows[:CLASSES, :CLASSES] += 4 * torch.eye(CLASSES)
    conditioner.embedding_table.weight.data.copy_(rows)
    of_a_class, of_any = silu(torch.tensor([12.0, 8.0]))
    denoiser.final_layer.adaLN_modulation[1].bias.data[:16] = -of_any
    denoiser.final_layer.linear.weight.data[:, :CLASSES] = MEANS.T / (of_a_class - of_any)
    return denoiser, conditioner


class ClassLatents:
    """Latents that are their class's mean everywhere: own label k is the published one permutation[k]."""

    def __init__(self, permutation: Tensor, of_each: int = 5, seed: int = 0) -> None:
        self.labels = torch.arange(len(permutation)).repeat(of_each)
        generator = torch.Generator().manual_seed(seed)
        self.latents = MEANS[permutation[self.labels]][:, :, None, None] + 0.1 * torch.randn(
            len(self.labels), 3, 4, 4, generator=generator
        )

    def get_batch(self, indices):
        index = torch.as_tensor(indices)
        return {"latents": self.latents[index], "labels": self.labels[index], "index": index}


def test_the_nearest_class_of_each_is_found():
    denoiser, conditioner = knowing_classes()
    permutation = torch.randperm(CLASSES, generator=torch.Generator().manual_seed(1))[:7]
    rows = conditioner.embedding_table.weight.data
    data = ClassLatents(permutation)
    found = nearest_classes(denoiser, rows[:CLASSES], rows[CLASSES], data, candidates=2, pairs=16)
    assert [found[label].published for label in range(7)] == permutation.tolist()
    # data − noise − mean is the noise but for 0.1: an error of 1.01; without a class the mean's square comes on top
    for label, match in found.items():
        of_the_mean = MEANS[permutation[label]].square().mean().item()
        assert match.loss == pytest.approx(1.01, rel=0.2)
        assert match.loss_of_null - match.loss == pytest.approx(of_the_mean, abs=0.3 * of_the_mean + 0.05)
    assert all(weight.requires_grad for weight in denoiser.parameters()) and not denoiser.gradient_checkpointing


def test_a_row_that_changes_much_is_not_taken_for_one_that_fits():
    """Ten times another row promises more to first order than the one that fits, and is far worse when it is tried."""
    denoiser, conditioner = knowing_classes()
    rows, alike = conditioner.embedding_table.weight.data.clone(), MEANS @ MEANS.T
    cosine = alike / alike.diag().outer(alike.diag()).sqrt()
    own, other = divmod((cosine - 0.5).abs().argmin().item(), CLASSES)  # alike, but of another direction
    long = rows[CLASSES] + 10 * (rows[other] - rows[CLASSES])
    assert 10 * alike[own, other] > alike[own, own]
    two, data = torch.stack([long, rows[own]]), ClassLatents(torch.tensor([own]))
    found = nearest_classes(denoiser, two, rows[CLASSES], data, candidates=1, pairs=16)[0]
    tried = nearest_classes(denoiser, two[:1], rows[CLASSES], data, candidates=1, pairs=16)[0]
    assert found.published == 1 and found.loss < found.loss_of_null < tried.loss


def test_rows_of_the_nearest_classes_are_copied_and_shown(tmp_path):
    theirs, table = knowing_classes()
    weights = {**theirs.state_dict(), "y_embedder.embedding_table.weight": table.embedding_table.weight.data}
    save_file(weights, tmp_path / "known.safetensors")
    folder = SimpleNamespace(people={"ann": 0, "bob": 1, "cy": 2, "absent": 3})
    latents = SimpleNamespace(num_classes=4, folder=folder, train_data=ClassLatents(torch.tensor([7, 0, 11]), 40))
    denoiser, conditioner = built(4, patch_size=1)
    path = tmp_path / "known.safetensors"
    said = start(denoiser, conditioner, path, classes="nearest", latents=latents, lora_rank=2)
    rows, published_rows = conditioner.embedding_table.weight, table.embedding_table.weight
    assert same(rows[[0, 1, 2, 4]], published_rows[[7, 0, 11, CLASSES]])
    assert not any(same(rows[3], row) for row in published_rows)
    assert [line.split()[:2] for line in said[1:4]] == [["ann", "7"], ["bob", "0"], ["cy", "11"]]
    assert all("(-" in line for line in said[1:4])  # better than any class
    assert "class table: 3 of 4 rows copied" in said[4]
    trained = [name for name, weight in denoiser.named_parameters() if weight.requires_grad]
    assert trained and all("lora_" in name for name in trained)  # as before the search
