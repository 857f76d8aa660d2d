"""Published weights that are attached are found by their form, and decide what a GPU trains."""

import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tiny import tiny_dit, tiny_vavae, tiny_vit, trained_looking
from torch import Tensor

import vavae_tools as vt
from vavae_tools.autoencoders.ldm_names import to_reference
from vavae_tools.autoencoders.lpips import LPIPS
from vavae_tools.autoencoders.vavae import VAVAE, VAVAE_SIZES
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DiT
from vavae_tools.paths import ProjectPaths
from vavae_tools.recipes import presets
from vavae_tools.recipes.attached import PUBLISHED, AttachedWeights, find_attached_weights
from vavae_tools.recipes.base import LatentRecipe, VAVAERecipe
from vavae_tools.recipes.config import compose, read_command_line, recipe_with
from vavae_tools.recipes.presets import find_preset
from vavae_tools.runtime.machine import Machine


def without_contents(make) -> dict[str, Tensor]:
    """The weights of a network in its true shapes, in a file of a few numbers."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in make().state_dict().items()}
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def published_vavae(**changes) -> dict[str, Tensor]:
    return to_reference(without_contents(lambda: VAVAE(**{**VAVAE_SIZES["f16d32"], **changes})))


def lightningdit(in_channels: int = 32, **changes) -> dict[str, Tensor]:
    numbers = {"hidden_size": 1152, "depth": 28, "num_heads": 16, "patch_size": 1, "input_size": 16}
    denoiser = without_contents(lambda: DiT(in_channels=in_channels, **{**numbers, **changes}))
    table = without_contents(lambda: ClassConditioner(1000, 1152))
    return {"ema": {**denoiser, **{f"y_embedder.{name}": tensor for name, tensor in table.items()}}}


def vgg16() -> dict[str, Tensor]:
    places, tensors = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28), without_contents(LPIPS)
    return {
        f"features.{layer}.{kind}": tensors[f"convolutions.{n}.{kind}"]
        for n, layer in enumerate(places)
        for kind in ("weight", "bias")
    }


def attach(root: Path, **files: dict) -> ProjectPaths:
    """A place with these files attached, the first the oldest."""
    for age, (name, saved) in enumerate(files.items()):
        path = root / "datasets" / "somebody" / name / "any.pt"
        path.parent.mkdir(parents=True)
        torch.save(saved, path)
        os.utime(path, (1e9 + age, 1e9 + age))
    return ProjectPaths(None, root / "work", (root,))


def dinov2(folder: Path) -> Path:
    tiny_vit("Dinov2", hidden_size=16, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)
    return folder


# ---- what is found


def test_weights_are_known_by_their_form(tmp_path):
    dino = dinov2(tmp_path / "deep/er/model")
    found = {"vavae": published_vavae(), "denoiser": lightningdit(), "lpips": vgg16()}
    place, said = attach(tmp_path, **found), []
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    weights = find_attached_weights(place, said.append)
    paths = {name: tmp_path / "datasets/somebody" / name / "any.pt" for name in found}
    assert weights == AttachedWeights(**paths, foundation=dino)
    (line,) = said
    assert line.startswith(f"Attached weights: VA-VAE ({weights.vavae}), LightningDiT (") and "passed over" not in line
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_safetensors_and_training_checkpoints_are_read_too(tmp_path):
    with_lpips = {f"loss.perceptual_loss.net.slice1.{name[9:]}": value for name, value in vgg16().items()}
    place = attach(tmp_path, checkpoint={"state_dict": {**published_vavae(), **with_lpips}})
    weights = find_attached_weights(place)
    assert weights.vavae == weights.lpips and weights.vavae.parent.name == "checkpoint"
    save_file({name: tensor.contiguous() for name, tensor in vgg16().items()}, tmp_path / "vgg.safetensors")
    assert find_attached_weights(place).lpips == tmp_path / "vgg.safetensors"  # the newest


PASSED_OVER = {
    "another autoencoder": (published_vavae(latent_channels=4), "autoencoder of another size, 4 channels at 1/16"),
    "a smaller one": (published_vavae(block_out_channels=(32, 32, 32, 32, 32)), "of another size, 32 channels at 1/16"),
    "other latents": (lightningdit(in_channels=4), "is a LightningDiT on 4 channels: expected LightningDiT on VA-VAE"),
    "an older one": (published_vavae(), r"older\)"),
    "half of one": (None, "damaged or no checkpoint|neither a zip nor a pickle"),
}


@pytest.mark.parametrize("what", PASSED_OVER)
def test_what_does_not_fit_is_named_in_a_line(tmp_path, what):
    saved, why = PASSED_OVER[what]
    place, said = attach(tmp_path, **{what: saved or vgg16(), "good": published_vavae()}), []
    path = tmp_path / "datasets/somebody" / what / "any.pt"
    if saved is None:
        path.write_bytes(path.read_bytes()[:1000])
    assert find_attached_weights(place, said.append).vavae.parent.name == "good"
    assert len(said) == 1 and re.search(rf"; passed over: {path} \(.*{why}", said[0])


def test_half_of_a_folder_is_passed_over(tmp_path):
    dino = dinov2(tmp_path / "dino")
    file, said = dino / "model.safetensors", []
    file.write_bytes(file.read_bytes()[:-8])
    place = ProjectPaths(None, tmp_path, (tmp_path,))
    assert find_attached_weights(place, said.append).foundation is None
    assert said[0].startswith("Attached weights: none; passed over: ") and str(file) in said[0]


def test_what_was_made_here_and_other_peoples_files_are_not_looked_for(tmp_path, vavae_dir, gait):
    save_file({"x": torch.zeros(2)}, tmp_path / "some.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    said = []
    assert find_attached_weights(ProjectPaths(None, tmp_path, (tmp_path, vavae_dir)), said.append) == AttachedWeights()
    assert said == []


# ---- what a machine does with them

CARDS = {
    "T4": Machine("t4", 1, "Tesla T4", int(14.56 * 2**30)),
    "T4x2": Machine("t4", 2, "Tesla T4", int(14.56 * 2**30)),
    "P100": Machine("t4", 1, "Tesla P100-PCIE-16GB", 17_059_545_088, (6, 0)),
    "L4": Machine("ampere", 1, "NVIDIA L4", int(22.06 * 2**30), (8, 9)),
    "A100": Machine("ampere", 1, "NVIDIA A100-SXM4-40GB", int(39.39 * 2**30)),
    "H100": Machine("ampere", 1, "NVIDIA H100 80GB", int(79.1 * 2**30), (9, 0)),
}
ROOMY = ("A100", "H100")


@pytest.fixture(autouse=True)
def with_peft(monkeypatch):
    monkeypatch.setattr(presets, "find_spec", lambda name: name == "peft")


@pytest.fixture(scope="module")
def everything(tmp_path_factory) -> AttachedWeights:
    root = tmp_path_factory.mktemp("input")
    dinov2(root / "dino")
    place = attach(root, vavae=published_vavae(), denoiser=lightningdit(), lpips=vgg16())
    return find_attached_weights(place, lambda line: None)


@pytest.mark.parametrize("card", CARDS)
def test_presets_of_a_card(everything, card):
    said = []
    small = find_preset(weights=AttachedWeights(), machine=CARDS[card], log=said.append)
    assert (small.original_vavae, small.image_size, small.recipe, small.dit_init) == ("small", 128, "light", None)
    assert small.dit == {"size": "S", "patch_size": 2}  # 16 × 16 tokens of latents of 32 × 32
    assert "the small one in this package, at 128 px" in said[0] and "attach vavae-imagenet256" in said[0]
    whole = find_preset(weights=everything, machine=CARDS[card], log=said.append)
    assert (whole.original_vavae, whole.image_size, whole.recipe) == (str(everything.vavae), 256, "full")
    assert whole.dit_init == {"weights": str(everything.denoiser), "lora_rank": 16} and whole.dit_lr == 1e-4
    assert (whole.dit["hidden_size"], whole.dit["depth"], whole.dit["num_heads"]) == (1152, 28, 16)
    assert (
        said[2].endswith("at 256 px, recipe full")
        and f"DiT: starts from {everything.denoiser}" in said[3]
        and len(said) == 4
    )
    batches = (16, 32) if card in ROOMY else (8, 8) if card == "L4" else (6, 8)
    assert (whole.vavae_batch_size, whole.dit_batch_size) == batches


@pytest.mark.parametrize(
    ("there", "said"),
    [
        ({"vavae"}, "recipe light; attach vgg16-397923af.pth and a folder of DINOv2 for the recipe full"),
        ({"vavae", "lpips"}, "recipe light; attach a folder of DINOv2 for the recipe full"),
        ({"lpips", "foundation"}, "starts from the small one in this package"),
    ],
)
def test_what_is_lacking_is_said(everything, there, said):
    weights, lines = AttachedWeights(**{kind: getattr(everything, kind) for kind in there}), []
    preset = find_preset(weights=weights, machine=CARDS["T4x2"], log=lines.append)
    assert said in lines[0] and lines[1] == "DiT: starts anew" and preset.recipe == "light" and preset.dit_init is None


def test_without_a_card_or_images_they_are_not_used(everything, split_dir):
    for arguments in ({"machine": Machine("cpu", 1, "CPU")}, {"split": split_dir, "machine": CARDS["T4"]}):
        lines = []
        preset = find_preset(weights=everything, log=lines.append, **arguments)
        assert (preset.original_vavae, preset.image_size, preset.lpips_weights) == ("small", 64, None)
        assert re.match(
            "Not used (on a CPU|for simulated walkers): VA-VAE, LightningDiT, LPIPS's VGG16, DINOv2", lines[0]
        )


def test_later_stages_follow_the_vavae_that_was_made(everything, tmp_path, monkeypatch):
    small = tiny_vavae(sample_size=128)
    small.save_pretrained(tmp_path)
    lines = []
    preset = find_preset(None, everything, tmp_path, CARDS["T4"], lines.append)
    assert (preset.image_size, preset.dit["patch_size"], preset.dit_init) == (128, 4, None)  # latents of 64 × 64
    assert lines == ["DiT: starts anew (LightningDiT's latents are others, or peft is not installed)"]
    monkeypatch.setattr(presets, "find_spec", lambda name: None)
    assert find_preset(None, everything, machine=CARDS["T4"]).dit_init is None
    assert find_preset(vavae="f16d32", machine=CARDS["T4"]).original_vavae is None


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("machine", ["cpu", "T4x2", "A100"])
def test_notebooks_and_commands_take_one_preset(everything, machine, attached, monkeypatch):
    weights, machine = everything if attached else AttachedWeights(), CARDS.get(machine, Machine("cpu", 1, "CPU"))
    monkeypatch.setattr(presets, "find_machine", lambda: machine)
    monkeypatch.setattr(presets, "find_attached_weights", lambda **_: weights)
    preset = find_preset(weights=weights)
    command = presets.resolved(compose(read_command_line(["experiment=vavae"])).recipe)
    names = ("original_vavae", "image_size", "recipe", "foundation_model", "lpips_weights")
    given = {name: getattr(preset, name) for name in names}
    given |= {"batch_size": preset.vavae_batch_size, "max_epochs": preset.vavae_epochs, "lr": preset.vavae_lr}
    assert presets.resolved(recipe_with(VAVAERecipe(), given)) == command

    vavae = preset.original_vavae
    preset = find_preset(weights=weights, vavae=vavae)
    command = presets.resolved(compose(read_command_line([f"vavae.source={vavae}"])).recipe)
    given = {"max_steps": preset.dit_steps, "batch_size": preset.dit_batch_size, "lr": preset.dit_lr}
    given |= {"ema_decay": preset.ema_decay, "guidance_scale": preset.guidance_scale, "previews": preset.previews}
    notebook = presets.resolved(recipe_with(LatentRecipe(), {**given, "model": preset.dit, "init": preset.dit_init}))
    for part in ("train", "objective", "model", "sampling", "init"):
        assert getattr(notebook, part) == getattr(command, part)


def test_commands_go_on_from_what_is_attached(gait, tmp_path, monkeypatch, capsys):
    """With a tiny VA-VAE and LightningDiT in the published form, on a CPU that is taken for a card."""
    pytest.importorskip("peft")
    monkeypatch.setattr(presets, "find_machine", lambda: CARDS["A100"])
    monkeypatch.setattr(presets, "is_simulated", lambda split: False)
    monkeypatch.setenv("VAVAE_INPUT", str(tmp_path / "input"))
    form = {"latent_channels": 2, "block_out_channels": (32, 32)}
    for name, value in form.items():
        monkeypatch.setitem(PUBLISHED, name, value)
    published = tiny_vavae(condition_dim=0, norm_num_groups=32, **form)
    denoiser, _ = tiny_dit()
    weights = {**trained_looking(denoiser).state_dict(), "y_embedder.embedding_table.weight": torch.zeros(11, 16)}
    weights |= {f"feat_rope.freqs_{kind}": torch.zeros(4, 8) for kind in ("cos", "sin")}  # which tell two heads
    attach(tmp_path / "input", vavae=to_reference(published.state_dict()), denoiser={"ema": weights})
    vt.split_folders(gait, tmp_path / "split", progress=False)

    data = [f"data.data_dir={tmp_path / 'split'}", "train.max_steps=1", "train.previews=0", "train.batch_size=4"]
    run = vt.run_experiment("experiment=vavae", *data, "data.image_size=16", f"output_dir={tmp_path / 'vavae'}")
    said = capsys.readouterr().out
    assert f"VA-VAE: starts from {tmp_path}/input/datasets/somebody/vavae/any.pt" in said and "0 unused" in said
    dirs = f"vavae.source={run}", f"data.latents_dir={tmp_path / 'latents'}", f"output_dir={tmp_path / 'dit'}"
    vt.run_experiment(*data, *dirs, "model.reversed_time=false")
    said = capsys.readouterr().out
    assert "LoRA of rank 16" in said and f"{tmp_path}/input/datasets/somebody/denoiser/any.pt (LightningDiT)" in said
    assert "lr 0.0001" in said
