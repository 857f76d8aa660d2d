"""Fine-tuning as it is called: from published weights, in stages, grey, not square, watched by a classifier."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from tiny import last, perturb_projections, same, tiny_vavae, tiny_vit

from vavae_tools.autoencoders.ldm_names import to_reference
from vavae_tools.autoencoders.losses import PatchDiscriminator
from vavae_tools.autoencoders.vavae import VAVAE
from vavae_tools.autoencoders.weights import VAVAEWeights, load_vavae
from vavae_tools.data.datasets import ImageDataModule
from vavae_tools.pipelines.classes import load_pipeline
from vavae_tools.pipelines.writer import write_samples
from vavae_tools.plots import image_grid
from vavae_tools.recipes import vavae as fine_tuning
from vavae_tools.recipes.dit import encode_split, train_dit
from vavae_tools.recipes.vavae import LOSSES, fine_tune_vavae
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.machine import Machine
from vavae_tools.training.autoencoder_module import VAVAEModule
from vavae_tools.training.callbacks.previews import ReconstructionPreviews
from vavae_tools.training.callbacks.record import is_finished
from vavae_tools.training.callbacks.watch import Advice
from vavae_tools.training.config import SaveConfig

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
TINY = {"condition_dim": 4, "image_size": 24, "batch_size": 6, "disc_width": 8, "lr": 1e-3}


@pytest.fixture(scope="module")
def dinov2(tmp_path_factory) -> Path:
    numbers = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "image_size": 28, "patch_size": 14}
    folder = tmp_path_factory.mktemp("foundation")
    tiny_vit("Dinov2", **numbers).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A training checkpoint as the reference writes it, of a small model that was aligned with `dinov2`."""
    torch.manual_seed(2)
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    model = VAVAE(**levels, block_out_channels=(32, 32), latent_channels=2, sample_size=24)
    weights = {
        **to_reference(model.state_dict()),
        **{f"loss.discriminator.{k}": v for k, v in PatchDiscriminator(3, 8).state_dict().items()},
        "linear_proj.weight": torch.randn(8, 2, 1, 1),
        "loss.logvar": torch.zeros(()),
        "foundation_model.model.cls_token": torch.zeros(1, 1, 8),
    }
    path = tmp_path_factory.mktemp("published") / "vavae.ckpt"
    torch.save({"state_dict": weights, "global_step": 7}, path)
    return path


@pytest.fixture(scope="module")
def staged(published, dinov2) -> dict:
    """Arguments of a training in stages."""
    numbers = {"recipe": "staged", "foundation_model": dinov2, "perceptual_weight": 0.0, "max_epochs": 3}
    return {"original_vavae": published, **numbers, **TINY}


@pytest.fixture(scope="module")
def whole(split_dir, staged, tmp_path_factory) -> tuple[Path, list[str]]:
    """The folder of one that was never stopped, and what it said. Do not write into it."""
    folder, said = tmp_path_factory.mktemp("whole"), []
    assert fine_tune_vavae(split_dir, folder, log=said.append, **staged) == folder / "stage3" / "vavae"
    return folder, said


def test_stages_go_on_from_each_other_and_from_published_weights(split_dir, published, staged, whole):
    folder, said = whole
    assert (folder / "stage3" / "vavae" / "config.json").is_file()
    told = "\n".join(said)
    for source in (published, *(folder / stage / "checkpoints/last.ckpt" for stage in ("stage1", "stage2"))):
        assert f"The discriminator starts from {source}" in told and f"The projection starts from {source}" in told
    assert "Recipe stage1: l1_weight 1, disc_weight 0.5, kl_weight 1e-06, vf_weight 0.5" in told
    # nothing of stage 1 sees the discriminator, which starts at step 2,500
    trained = last(folder / "stage1")["state_dict"]
    first = torch.load(published, weights_only=True)["state_dict"]["loss.discriminator.main.0.weight"]
    assert same(trained["discriminator.main.0.weight"], first)
    again, before = [], weights_of(folder)
    made = fine_tune_vavae(split_dir, folder, resume="last", log=again.append, **staged)
    assert made == folder / "stage3" / "vavae" and weights_of(folder) == before
    assert [line.split(" (")[0] for line in again] == [f"stage{n} is complete" for n in (1, 2, 3)]


@pytest.mark.parametrize(("own", "theirs"), [("0.weight", "0.weight_orig"), ("3.weight", "3.loc"), ("3.bias", "")])
def test_a_discriminator_of_another_make_is_not_taken(own, theirs):
    module, said = SimpleNamespace(discriminator=PatchDiscriminator(3, 4)), []
    weights = {name: 0 * tensor for name, tensor in module.discriminator.state_dict().items()}
    changed = {name.replace(own, theirs): tensor for name, tensor in weights.items() if theirs or own not in name}
    fine_tuning._load_auxiliary(module, VAVAEWeights(Path("a.ckpt"), {}, {}, changed), said.append)
    assert said == ["The discriminator in a.ckpt has another form or shape: a fresh one is taken"]
    assert any(tensor.any() for tensor in module.discriminator.parameters())


def weights_of(folder: Path) -> bytes:
    return (folder / "stage3" / "vavae" / "diffusion_pytorch_model.safetensors").read_bytes()


def test_stages_that_were_stopped_go_on_where_they_were(split_dir, staged, whole, tmp_path):
    saving = SaveConfig(max_time="0:00:01")  # less than it keeps for saving
    stopped = fine_tune_vavae(split_dir, tmp_path, saving=saving, log=lambda line: None, **staged)
    assert stopped == tmp_path / "stage1" / "vavae" and not (tmp_path / "stage2").exists()
    folder = fine_tune_vavae(split_dir, tmp_path, resume="last", log=lambda line: None, **staged)
    assert folder == tmp_path / "stage3" / "vavae" and all(is_finished(tmp_path / f"stage{n}") for n in (1, 2, 3))
    assert weights_of(tmp_path) == weights_of(whole[0])


def test_grey_images_that_are_not_square_go_all_the_way(tmp_path, vavae_dir):
    """From weights for colour: read, trained, encoded, sampled and written in grey, 16 high and 24 wide."""
    from vavae_tools.data.split import split_folders

    generator = torch.Generator().manual_seed(3)
    for person in range(1, 4):
        for number in range(6):
            path = tmp_path / "images" / f"ID_{person}" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(40 * person, 40 * person + 80, (16, 24), generator=generator).to(torch.uint8)
            Image.fromarray(pixels.numpy()).save(path)
    split = tmp_path / "split"
    split_folders(tmp_path / "images", split, progress=False)
    quiet = {"log": lambda line: None}
    numbers = {"image_size": (16, 24), "condition_dim": 4, "batch_size": 4, "max_epochs": 1}
    folder = fine_tune_vavae(split, tmp_path / "vavae", vavae_dir, **numbers, **quiet)
    model = load_vavae(folder, **quiet)
    assert model.config.in_channels == model.config.out_channels == 1 and tuple(model.config.sample_size) == (16, 24)
    (grid,) = (tmp_path / "vavae" / "reconstructions").glob("reconstructions-*")
    assert (torch.tensor(list(Image.open(grid).convert("RGB").getdata())).float().std(dim=1) == 0).all()  # grey
    latents = encode_split(split, folder, tmp_path / "latents", **quiet)
    assert latents.shape == (2, 8, 12)
    numbers = {"hidden_size": 16, "depth": 1, "num_heads": 2, "patch_size": 4}
    dit = train_dit(tmp_path / "latents", folder, tmp_path / "dit", numbers, max_steps=2, previews=1, **quiet)
    write_samples(load_pipeline(dit), [0, 1, 2], tmp_path / "samples", num_inference_steps=2)
    made = sorted((tmp_path / "samples").rglob("*.png"))
    assert len(made) == 3 and all((p.mode, p.size) == ("L", (24, 16)) for p in map(Image.open, made))


# ---- watched


def test_the_best_can_be_what_a_classifier_says(split_dir, vavae_dir, tmp_path):
    numbers = {"image_size": 16, "batch_size": 6, "max_epochs": 2, "monitor": "frechet", "recipe": "vector"}
    said = []
    fine_tune_vavae(split_dir, tmp_path, vavae_dir, log=said.append, **numbers)
    assert "Recipe vector: l1_weight 1, gradient_weight 0.5, spectral_weight 1, kl_weight 10" in said
    (best,) = (tmp_path / "checkpoints").glob("best-*.ckpt")
    callbacks = torch.load(best, weights_only=True)["callbacks"]
    state = next(value for key, value in callbacks.items() if "val/frechet" in key)
    assert f"{float(state['best_model_score']):.4f}" in best.name
    assert (tmp_path / "classifier" / "classifier.safetensors").is_file()


@pytest.mark.parametrize(("recipe", "monitor"), [("light", "val/reconstruction"), ("vector", "val/loss")])
def test_the_best_is_with_the_kl_where_that_matters(split_dir, vavae_dir, tmp_path, recipe, monitor):
    numbers = {"image_size": 16, "batch_size": 24, "max_epochs": 1, "recipe": recipe}
    fine_tune_vavae(split_dir, tmp_path, vavae_dir, log=lambda line: None, **numbers)
    (best,) = (tmp_path / "checkpoints").glob("best-*.ckpt")
    assert any(monitor in key for key in torch.load(best, weights_only=True)["callbacks"])


def test_advice_comes_once_and_when_it_is_due():
    said = []
    advice = Advice(said.append)

    def validated(**values):
        advice.on_validation_end(SimpleNamespace(callback_metrics={f"val/{k}": v for k, v in values.items()}), None)

    validated(kl=0.01, latent_std=1.2, discriminator_accuracy=0.7)
    assert not said
    for kl, std in ((0.5, 1.2), (0.9, 1.2), (0.01, 0.02)):
        validated(kl=kl, latent_std=std)
    for rate in (0.99, 0.98, 0.5, 0.99, 0.99, 0.99, 1.0):
        validated(kl=0.01, latent_std=1.0, discriminator_accuracy=rate)
    assert len(said) == 3 and "0.01 to 0.5: raise --kl_weight" in said[0]
    assert "The latents collapse" in said[1] and "99%" in said[2]


def test_previews_show_what_the_vectors_do(split_dir, tmp_path):
    data = ImageDataModule(split_dir, 16).val_data
    module = VAVAEModule(perturb_projections(tiny_vavae())).eval()
    shown = data.preview_batch(3)
    previews = ReconstructionPreviews(shown, tmp_path)
    plain = image_grid(previews.images(VAVAEModule(tiny_vavae(condition_dim=0)).eval()), 3)
    assert previews.rows == ["original", "reconstruction"]
    rows = image_grid(previews.images(module), 3)
    assert previews.rows == ["original", "own vector", "another's", "no vector"]
    height, distance = plain.shape[1], (rows.shape[1] - plain.shape[1]) // 2
    assert rows.shape[1] == height + 2 * distance and rows.shape[2] == plain.shape[2]  # two rows more
    own, other_labels, none = (rows[:, distance * i : distance * (i + 1)].float() for i in (1, 2, 3))
    assert (own[:, :16] - other_labels[:, :16]).abs().max() > 0 and (own[:, :16] - none[:, :16]).abs().max() > 0


# ---- memory


@pytest.mark.parametrize(
    ("recipe", "gib", "batch_size", "image_size", "on"),
    [
        ("full", 14.56, 8, 256, True),  # 13.3 GiB by benchmarks/memory.py, beside CUDA and DDP's gradients
        ("full", 14.56, 6, 256, False),
        ("light", 15.0, 8, 256, False),  # what LPIPS, discriminator and alignment take decides
        ("light", 14.56, 6, (512, 128), False),
    ],
)
def test_gradient_checkpointing_comes_on_where_it_must(monkeypatch, recipe, gib, batch_size, image_size, on):
    machine = Machine("t4", 1, "Tesla T4", int(gib * 2**30))
    monkeypatch.setattr(fine_tuning, "find_machine", lambda: machine)
    model, said = SimpleNamespace(config=SimpleNamespace(block_out_channels=(128,))), []
    numbers = LOSSES[recipe]
    assert fine_tuning._needs_checkpointing(model, numbers, batch_size, image_size, said.append) == on == bool(said)


# ---- what is missing


def test_vectors_of_another_length_than_asked_for(split_dir, vavae_dir, tmp_path):
    from safetensors.torch import save_file

    save_file({f"ID_{n}": torch.randn(6) for n in (1, 2, 3)}, tmp_path / "vectors.safetensors")
    arguments = {"condition_file": tmp_path / "vectors.safetensors", "max_epochs": 1, "image_size": 16}
    with pytest.raises(UserError, match="holds vectors of length 6, but --condition_dim is 4"):
        fine_tune_vavae(split_dir, tmp_path / "out", vavae_dir, condition_dim=4, **arguments)
    folder = fine_tune_vavae(split_dir, tmp_path / "out", vavae_dir, **arguments, log=lambda line: None)
    assert load_vavae(folder, log=lambda line: None).config.condition_dim == 6
