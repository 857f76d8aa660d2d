"""Low-rank additions: at first they add nothing, they alone are trained, and merged the model is one like any other."""

import copy
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
from tiny import PEOPLE, refused, refuses, same, tiny_dit, trained_looking
from torch import Tensor

from vavae_tools.data.latents import LatentDataModule
from vavae_tools.diffusion.dit import DDT, DiT
from vavae_tools.diffusion.lora import add_lora, merged_weights
from vavae_tools.recipes.base import InitFrom
from vavae_tools.recipes.init_from import read_starting_weights, start_from
from vavae_tools.training.denoiser_module import DiffusionModule
from vavae_tools.training.devices import quiet_lightning

pytest.importorskip("peft")
TABLE = "conditioner.embedding_table.weight"
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Lightning's, on folders that are not empty


def denoiser_of(kind: str) -> DiT | DDT:
    wide = {"hidden_size": (16, 32), "depth": (1, 1), "num_heads": (2, 2)}
    return trained_looking(tiny_dit()[0] if kind == "dit" else DDT(8, 1, 2, **wide))


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x, c = torch.randn(batch, 2, 8, 8, generator=generator), torch.randn(batch, 16, generator=generator)
    return x, torch.linspace(0.1, 0.9, batch), c


@pytest.mark.parametrize(("kind", "alpha"), [("dit", None), ("ddt", 12.0)])
def test_at_first_they_add_nothing_and_merged_it_is_one_model(kind, alpha):
    denoiser = denoiser_of(kind)
    plain, before = {name: value.clone() for name, value in denoiser.state_dict().items()}, denoiser(*inputs())
    shapes = {name: tuple(module.weight.shape) for name, module in denoiser.named_modules() if hasattr(module, "bias")}
    number = add_lora(denoiser, 4, alpha)
    assert same(denoiser(*inputs()), before)
    trained = {name: w for name, w in denoiser.named_parameters() if w.requires_grad}
    wanted = [name for name in shapes if name.split(".")[-1] in ("qkv", "w12", "w3") or name.endswith("attn.proj")]
    assert len(wanted) == 4 * len(denoiser.blocks)  # and no convolution that is called proj
    assert number == sum(w.numel() for w in trained.values()) == sum(4 * sum(shapes[name]) for name in wanted)

    generator = torch.Generator().manual_seed(1)
    for name, weight in trained.items():  # as after some training
        assert "lora_" in name
        weight.data.normal_(0, 0.1, generator=generator)
    expected = denoiser(*inputs())
    assert (expected - before).abs().max() > 1e-3
    assert denoiser.lora == {"rank": 4, "alpha": alpha or 4.0, "targets": ["qkv", "proj", "w12", "w3"]}
    qkv = denoiser.blocks[0].attn.qkv
    low_rank = qkv.lora_B["default"].weight @ qkv.lora_A["default"].weight
    weights, name = merged_weights(denoiser.state_dict(), denoiser.lora), "blocks.0.attn.qkv.weight"
    merged = denoiser_of(kind)
    merged.load_state_dict(weights)
    torch.testing.assert_close(weights[name], plain[name] + (alpha or 4.0) / 4 * low_rank, rtol=0, atol=1e-6)
    assert same(weights["final_layer.linear.weight"], plain["final_layer.linear.weight"])
    torch.testing.assert_close(merged(*inputs()), expected, rtol=0, atol=1e-6)


def test_wrong_arguments_are_told_in_one_line(monkeypatch):
    denoiser = denoiser_of("dit")
    there = "qkv, proj, w12, w3, t_embedder.mlp.0, t_embedder.mlp.2, final_layer.linear"
    for arguments, expected in (
        ((4, None, ["qkv", "fc1"]), f"no linear map 'fc1' in this denoiser; there are {there}"),
        ((4, None, []), "lora_targets is empty"),
        ((4, -1.0), "lora_alpha=-1"),
    ):
        assert expected in refused(add_lora, denoiser, *arguments)
    assert all(weight.requires_grad for weight in denoiser.parameters())  # untouched
    assert add_lora(denoiser, 1, targets=["final_layer.linear"]) == sum(denoiser.final_layer.linear.weight.shape)
    refuses("has low-rank additions already", add_lora, denoiser, 1)

    monkeypatch.setitem(sys.modules, "peft", None)
    refuses("pip install peft", add_lora, denoiser_of("dit"), 4)


# ---- training
@pytest.fixture(scope="module")
def published(tmp_path_factory):
    denoiser, conditioner = (trained_looking(part) for part in tiny_dit(seed=5))
    path = tmp_path_factory.mktemp("published") / "published.pt"
    table = {"y_embedder.embedding_table.weight": conditioner.embedding_table.weight.data}
    torch.save({"ema": {**denoiser.state_dict(), **table}}, path)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory, published, latents_dir) -> tuple[DiffusionModule, dict[str, Tensor], Path]:
    """Four steps from published weights with additions: what was trained, its state before, and its checkpoint."""
    quiet_lightning()
    denoiser, conditioner = tiny_dit(seed=8)
    init = InitFrom(published, classes=[1, 0, None], lora_rank=2)
    start_from(denoiser, conditioner, init, log=lambda line: None)
    module = DiffusionModule(denoiser, conditioner, lr=1e-2, warmup_steps=2, schedule="constant")
    before = copy.deepcopy(module.network.state_dict())
    settings = {"accelerator": "cpu", "devices": 1, "max_steps": 4, "limit_val_batches": 0, "logger": False}
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    trainer = L.Trainer(**settings, default_root_dir=tmp_path_factory.mktemp("lora"))
    trainer.fit(module, LatentDataModule(latents_dir, batch_size=6))
    path = Path(trainer.default_root_dir) / "after-4.ckpt"
    trainer.save_checkpoint(path)
    return module, before, path


def test_training_changes_the_additions_and_the_class_table_alone(run, published):
    module, before, _ = run
    after, averaged = module.network.state_dict(), module.ema.network.state_dict()
    for state in (after, averaged):
        changed = {name for name, value in state.items() if not same(value, before[name])}
        assert changed == {TABLE, *(name for name in before if "lora_" in name)}
    assert not any(same(averaged[name], after[name]) for name in changed)
    base = torch.load(published, weights_only=True)["ema"]
    assert same(before[TABLE][0], base.pop("y_embedder.embedding_table.weight")[1])
    kept = {name.replace(".base_layer", ""): value for name, value in after.items() if "lora_" not in name}
    assert kept.keys() - {TABLE} == {f"denoiser.{name}" for name in base}
    assert all(same(kept[f"denoiser.{name}"], value) for name, value in base.items())


def test_a_checkpoint_gives_one_merged_model(run):
    """As `load_pipeline` and going on from it take it: the average, under plain names."""
    module, _, path = run
    found, average = read_starting_weights(path), copy.deepcopy(module.ema.network)
    denoiser, conditioner = tiny_dit(seed=6)
    denoiser.load_state_dict(found.denoiser)
    x, t, _ = inputs()
    c = average["conditioner"](torch.arange(PEOPLE))
    with torch.no_grad():
        torch.testing.assert_close(denoiser(x, t, c), average["denoiser"](x, t, c), rtol=0, atol=1e-6)
    assert same(found.table, average["conditioner"].embedding_table.weight[:PEOPLE].data)

    start_from(denoiser, conditioner, InitFrom(path, classes="keep"), log=lambda line: None)
    assert same(conditioner.embedding_table.weight, average["conditioner"].embedding_table.weight)
    assert all(weight.requires_grad for weight in denoiser.parameters())
