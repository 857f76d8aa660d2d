"""Text-to-image as people run it: one command that trains, YAML files, going on exactly, images of prompts."""

import json
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from alike import assert_curves_alike, assert_weights_alike, curves, values_of
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file
from tiny import assert_same, assert_same_training, contents, last, same, tiny_kl

from vavae_tools import sample, train
from vavae_tools.autoencoders.stable_diffusion import load_stable_diffusion_vae
from vavae_tools.checkpoints.formats import read_any_format
from vavae_tools.data.demo.shapes import EXAMPLE_PROMPTS, captioned_shape_data
from vavae_tools.data.text_states import TextFolder, TextLatentDataModule
from vavae_tools.diffusion.clip import load_text_encoder, tiny_text_encoder
from vavae_tools.diffusion.conditioning import TextConditioner
from vavae_tools.diffusion.dit import TextDiT
from vavae_tools.diffusion.objectives import make_objective
from vavae_tools.pipelines.text import load_text_pipeline
from vavae_tools.training.denoiser_module import DiffusionModule

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ROOT = Path(__file__).parents[1]
SMALL = ["model.hidden_size=16", "model.num_layers=1", "model.num_heads=2", "sampling.num_steps=2"]
SMALL += ["trainer.accelerator=cpu", "callbacks.previews=0"]
SHAPES = ["experiment=text_dummy", "data.num_samples=36", "data.image_size=16", "data.val_share=0.2"]
SHAPES += ["training.batch_size=4", "training.logging_steps=1", "training.learning_rate=1e-3", *SMALL]
"""Nine batches an epoch, so that of two gathered ones each the last step has one."""
QUICK = ["--num_steps", "3", "--accelerator", "cpu"]


@pytest.fixture(scope="module")
def frozen(tmp_path_factory) -> Path:
    """A small VAE, in vae/, that was never trained. Do not write into it."""
    folder = tmp_path_factory.mktemp("frozen")
    tiny_kl().save_pretrained(folder / "vae")
    return folder


@pytest.fixture
def shapes(here, frozen, run_main):
    """Train on made-up shapes: what was said."""

    def run(*words) -> str:
        status, said, err = run_main(train.main, *SHAPES, f"vae.name={frozen / 'vae'}", *words)
        assert status == 0, err
        return said

    return run


# ---- a run and its images


@pytest.fixture(scope="module")
def trained(tmp_path_factory, frozen) -> Path:
    """A run of nine steps, in a folder of its own. Do not write into it."""
    run = tmp_path_factory.mktemp("trained") / "run"
    words = [*SHAPES, f"vae.name={frozen / 'vae'}", "training.max_steps=9", "training.logging_steps=3"]
    words += ["training.save_steps=9", "callbacks.previews=1", "training.learning_rate=0.01"]
    assert train.run_experiment(*words, f"output_dir={run}") == run / "pipeline"
    return run


def test_a_run_leaves_what_people_look_for(trained):
    assert (trained / "checkpoints" / "last.ckpt").is_file() and len(list(trained.glob("checkpoints/epoch=*"))) == 1
    assert (trained / "checkpoint-9" / "ema_model.pt").is_file() and (trained / ".hydra/config.yaml").is_file()
    line = r"step +(\d)/9 .* loss +\d\.\d{4}e[+-]\d\d +lr .* steps/s .* GB RAM"
    steps = re.findall(line, (trained / "train.log").read_text())
    assert steps == ["3", "6", "9"]
    (grid,) = (trained / "samples").glob("samples-*.png")
    with Image.open(grid) as image:  # a row of four for each prompt
        assert image.width < image.height
    assert (trained / "samples" / "prompts.txt").read_text().split("\n")[:-1] == list(EXAMPLE_PROMPTS)
    assert {"train/loss", "train/mse", "train/lr", "val/loss"} <= curves(trained).keys()


def test_pipeline_and_checkpoints_make_the_same_images(trained, here, run_main):
    prompts = ["--prompt", "a small red circle", "a large blue ring"]
    sources = ("pipeline", "checkpoints/last.ckpt", "checkpoint-9")
    for source, folder in zip(sources, "abc", strict=True):
        status, said, err = run_main(
            *[sample.main, "--checkpoint", trained / source, *prompts, "--num_samples", 4, *QUICK],
            *["--output_dir", folder, "--seed", 3],
        )
        assert status == 0 and said.startswith(f"written: 4 images of 2 prompts ({folder}/00000.png …)"), err
    made = contents(here / "a")
    assert sorted(made) == ["00000.png", "00001.png", "00002.png", "00003.png", "grid.png", "samples.json"]
    assert made == contents(here / "b") == contents(here / "c")
    assert len({made[f"{number:05d}.png"] for number in range(4)}) == 4
    assert Image.open("a/00000.png").size == (16, 16)
    record = json.loads(made["samples.json"])
    assert record["prompts"] == {f"{i:05d}.png": prompts[1 + i % 2] for i in range(4)}
    assert record["settings"]["guidance_scale"] == 7.5 and record["settings"]["seed"] == 3


# ---- YAML files


WRONG_FILES = {
    "training:\n  batchsize: 3\n": "mine.yaml: No key 'training.batchsize'; did you mean train.batch_size?",
    "training:\n  mixed_precision: fp17\n": "No precision 'fp17'; there are 32, 16, bf16",
    "training: {}\nsampling:\n  scheduler: dpm\n": "No solver 'dpm' for noise or v (did you mean ddpm?); there",
    "training:\n  logger: nonsense\n": "No logger 'nonsense' (did you mean none?); there are tens",
    "training:\n  early_stopping_patience: 2\ndata:\n  val_share: 0\n": "needs images that validate",
    "training: {}\nresume: other.ckpt\n": "other.ckpt is of another model",
}


def test_a_file_that_cannot_be_is_one_line(fault, here):
    words = ["data.dataset_name=shapes", "data.num_samples=8", "trainer.accelerator=cpu"]
    torch.save({"state_dict": {"a": torch.ones(1)}, "optimizer_states": [], "loops": {}}, "other.ckpt")
    for text, expected in WRONG_FILES.items():
        Path("mine.yaml").write_text(text)
        assert expected in fault(train.main, "--config", "mine.yaml", *words, "--output_dir", "run")
    assert not list(here.rglob("run/latents"))  # before anything takes time


def test_another_vae_than_the_runs_is_refused_before_it_encodes(trained, here, fault):
    tiny_kl(seed=1).save_pretrained("vae")
    words = [*SHAPES, "vae.name=vae", "output_dir=other", f"resume={trained}/checkpoints/last.ckpt"]
    assert "other settings: the data are others. Go on with" in fault(train.main, *words, "training.max_steps=10")
    assert not list(here.rglob("*.safetensors.partial")) and not list(here.rglob("train-00000.safetensors"))


# ---- going on


@pytest.mark.parametrize("cache", [True, False], ids=["cached", "encoding"])
def test_both_kinds_of_checkpoints_go_on_bit_by_bit(shapes, here, cache):
    words = [f"data.cache={cache}", "training.num_epochs=3", "training.gradient_accumulation_steps=2"]
    words += ["training.save_steps=3", "training.save_every_n_epochs=1", "callbacks.keep_last=9"]
    said = shapes(*words, "--output_dir", "whole")
    assert "15 steps of 8, 3 epochs" in said and ("encoded at every step" in said) == (not cache)
    steps = [f"checkpoint-{step}" for step in (3, 6, 9, 12, 15)]
    epochs = [f"checkpoint-epoch-{epoch}" for epoch in (1, 2, 3)]
    assert {path.name for path in Path("whole").glob("checkpoint-*")} == {*steps, *epochs}
    assert [read_any_format(Path("whole") / name, print)["global_step"] for name in epochs] == [5, 10, 15]
    assert not any("vae" in name or "text_encoder" in name for name in last("whole")["state_dict"])  # frozen
    name = "checkpoint-3" if cache else "checkpoint-epoch-2"  # within an epoch, at an end
    assert "resuming after step" in shapes(*words, "--resume", f"whole/{name}", "--output_dir", f"from-{name}")
    assert_same_training("whole", f"from-{name}")
    # without a folder it goes on in that of the run
    before = last("whole")
    (here / "whole" / "checkpoints" / "last.ckpt").unlink()
    kept = list(Path("whole").glob("latents/**/*.safetensors"))
    written = [path.stat().st_mtime_ns for path in kept]
    assert "resuming whole" in shapes(*words, "--resume", "whole/checkpoint-12")
    assert_same(before["state_dict"], last("whole")["state_dict"])
    assert [path.stat().st_mtime_ns for path in kept] == written and bool(kept) == cache


# ---- what is trained on


def test_a_batch_that_is_encoded_is_the_one_that_was_kept(trained):
    vae, encoder = load_stable_diffusion_vae(trained / "autoencoder"), load_text_encoder(trained / "text_encoder")
    denoiser = TextDiT((4, 4), 2, 4, hidden_size=16, depth=1, num_heads=2)
    module = DiffusionModule(denoiser, TextConditioner(encoder.dim, encoder.pooled_dim, 16), make_objective("epsilon"))
    module.encode_with(vae, encoder)
    pairs = [(5, 2), (0, 7), (17, 0), (35, 3)]
    images = captioned_shape_data(36, 16, 4, seed=0, val_share=0.2).train_data.get_batch(pairs)
    texts = TextFolder.read(trained / "latents" / "texts")
    kept = TextLatentDataModule(trained / "latents", texts, 4).train_data.get_batch(pairs)
    made = module.on_after_batch_transfer(images, 0)
    assert module.on_after_batch_transfer(kept, 0) is kept
    assert made["index"].tolist() == kept["index"].tolist() == [5, 0, 17, 35]
    assert same(made["text_mask"], kept["text_mask"])
    mask = kept["text_mask"][..., None]
    for name, of in {"text_tokens": mask, "text_pooled": 1, "latents": 1}.items():
        one, other = made[name] * of, kept[name] * of
        nearest = torch.finfo(torch.float16).eps * other.abs().clamp_min(2**-14)  # one float16 further at most
        assert (one - other).abs().le(nearest).all(), name
        assert (one.half() == other.half()).float().mean() > 0.99, name


# ---- what is learnt


@pytest.mark.parametrize("objective", ["v_prediction", "flow_matching"])
def test_other_objectives_train_and_sample(shapes, here, objective, run_main, fault):
    """Of live weights, too, where no average is kept."""
    solver = "unipc" if objective == "flow_matching" else "ddim"
    words = [f"model.objective={objective}", f"sampling.scheduler={solver}", "ema.enabled=false"]
    shapes(*words, "training.max_steps=3", "callbacks.previews=1", "--output_dir", "run")
    config = json.loads(Path("run/pipeline/scheduler/scheduler_config.json").read_text())
    assert config["_class_name"] == ("DDIMScheduler" if solver == "ddim" else "UniPCMultistepScheduler")
    assert list(Path("run/samples").glob("*.png"))
    weights = last("run")["state_dict"]
    of_pipeline = load_file("run/pipeline/denoiser/diffusion_pytorch_model.safetensors")
    assert_same(of_pipeline, {name: weights[f"network.denoiser.{name}"] for name in of_pipeline})
    words = ["--checkpoint", "run/pipeline", "--prompt", "a red circle", *QUICK]
    for name in ["ddpm", "dpm++"] if solver == "ddim" else ["euler", "heun"]:
        assert run_main(sample.main, *words, "--solver", name, "--output_dir", name)[0] == 0
        assert Image.open(f"{name}/00000.png").size == (16, 16)
    other = "euler" if solver == "ddim" else "ddim"
    assert f"No solver '{other}' for " in fault(sample.main, *words, "--solver", other)


def test_two_processes_train_what_one_does(shapes, here, forked):
    words = ["training.max_steps=10", "training.logging_steps=1"]
    shapes(*words, "--output_dir", "one")
    shapes(*words, "training.batch_size=2", "--devices", "2", "--output_dir", "two")
    assert Path("two/pipeline/model_index.json").is_file()
    one, two = last("one"), last("two")
    assert one["global_step"] == two["global_step"] == 10
    assert_weights_alike(two["state_dict"], one["state_dict"])
    for tag, before in (("train/loss", 0), ("val/loss", 10)):
        assert_curves_alike(values_of(Path("two"), tag), values_of(Path("one"), tag), tag, before)


# ---- one's own images, without a network

WORDS = ["a red bird on a branch", "two grey birds", "a blue bird in the sky", "a bird that flies", "small red birds"]
LONG = {3: "a red bird " * 20, 4: "a blue bird " * 30}


@pytest.fixture(scope="module")
def own(tmp_path_factory) -> Path:
    """images/ with captions, clip/ and sd/, which has Stable Diffusion's layout. Do not write into it."""
    folder = tmp_path_factory.mktemp("own")
    draws = torch.Generator().manual_seed(0)
    (folder / "images").mkdir()
    lines = []
    for number in range(24):
        pixels = torch.randint(256, (20, 24, 3), generator=draws, dtype=torch.uint8)
        Image.fromarray(pixels.numpy()).save(folder / "images" / f"{number}.png")
        captions = WORDS[number % 5] if number % 2 else [WORDS[number % 5], WORDS[number % 3]]
        captions = LONG.get(number, captions)
        lines.append(json.dumps({"file_name": f"{number}.png", "text": captions}))
    (folder / "images" / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    tiny_text_encoder(WORDS, dim=32, num_layers=1, max_tokens=12).save(folder / "clip")
    torch.manual_seed(0)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    kl = AutoencoderKL(**blocks, block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4)
    kl.save_pretrained(folder / "sd" / "vae")
    tiny_kl(downsampling=4).save_pretrained(folder / "kl")
    encoder = load_text_encoder(folder / "clip")
    encoder.model.save_pretrained(folder / "sd" / "text_encoder")
    encoder.tokenizer.save_pretrained(folder / "sd" / "tokenizer")
    return folder


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*arguments: object) -> None:
        raise AssertionError(f"asked the network: {arguments}")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize("layout", ["two folders", "stable diffusion"])
def test_own_images_and_models_without_a_network(own, here, run_main, no_network, layout):
    words = ["experiment=text_to_image", "--dataset_name", "custom", "--data_dir", own / "images", *SMALL]
    words += ["data.image_size=16", "training.batch_size=4", "training.max_steps=3", "lr_scheduler.warmup_steps=0"]
    words += ["training.num_workers=0", "data.latents_dir=latents", "training.save_steps=0", "data.val_share=0.25"]
    words += ["--text_encoder", own / "clip", "--vae", own / "kl", "--output_dir", "run"]
    if layout == "stable diffusion":
        words += ["--text_encoder", own / "sd", "--vae", own / "sd"]
    status, said, err = run_main(train.main, *words)
    assert status == 0, err
    assert "train 18, val 6" in said
    assert "2 captions were cut: they are longer than the 12 tokens the encoder takes" in said
    pipe = load_text_pipeline("run/pipeline")
    factor, scale = (8, 0.18215) if layout == "stable diffusion" else (4, 1.0)
    assert pipe.denoiser.latent_shape == (4, 16 // factor, 16 // factor) and pipe.vae.config.scaling_factor == scale
    prompts = Path("run/samples/prompts.txt").read_text().split("\n")[:-1]
    assert prompts and {prompt.strip() for prompt in prompts} <= {*WORDS, *map(str.strip, LONG.values())}
    status, _, err = run_main(
        sample.main, "--checkpoint", "run/pipeline", "--prompt", "a red bird", *QUICK, "--output_dir", "made"
    )
    assert status == 0 and Image.open("made/00000.png").size == (16, 16), err


def test_models_that_are_not_there_are_one_line(own, here, fault, no_network):
    shutil.copytree(own / "clip", "clip", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(own / "kl", "kl", ignore=shutil.ignore_patterns("*.safetensors"))
    faults = {
        "text_encoder.name=null": "text_encoder.name is missing: name a folder of transformers",
        "vae.name=null": "vae.name is missing: name a folder of diffusers",
        "text_encoder.name=clip": "clip holds a text encoder without a tokenizer",
        "text_encoder.name=./nowhere": "No folder nowhere of a text encoder",
        "vae.name=kl": "No weights in kl: expected model.safetensors",
        "data.image_size=18": "image_size 18×18: this VAE takes multiples of 4",
    }
    models = [f"text_encoder.name={own / 'clip'}", f"vae.name={own / 'kl'}", f"data.dataset_path={own / 'images'}"]
    for change, said in faults.items():
        words = ["experiment=text_to_image", *SMALL, *models, "data.dataset_name=custom", change]
        assert said in fault(train.main, *words)
