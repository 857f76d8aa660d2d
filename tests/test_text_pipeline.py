"""Sentences → images: the mathematics of sampling, guidance from the empty prompt, folders that can be read back."""

import pytest
import torch
from diffusers import DDIMScheduler
from tiny import refuses, same, tiny_kl, trained_looking

from vavae_tools.diffusion.clip import tiny_text_encoder
from vavae_tools.diffusion.conditioning import TextConditioner
from vavae_tools.diffusion.dit import TextDiT
from vavae_tools.diffusion.objectives import make_objective, time_of
from vavae_tools.diffusion.solvers import make_solver, sample, swapped
from vavae_tools.pipelines.text import TextToImagePipeline, load_text_pipeline
from vavae_tools.runtime.files import plain_config

SENTENCES = ["a red circle", "one small blue square", "green"]
QUICK = {"num_inference_steps": 3, "output_type": "pt", "seed": 0}


def text_parts(seed: int = 0, dropout: float = 0.1):
    torch.manual_seed(seed)
    encoder = tiny_text_encoder(SENTENCES, dim=16)
    denoiser = TextDiT(input_size=4, patch_size=2, in_channels=4, hidden_size=32, depth=2, num_heads=2)
    conditioner = trained_looking(TextConditioner(16, 16, 32, dropout))
    conditioner.set_empty(encoder.encode([""]))
    return encoder, trained_looking(denoiser).eval(), conditioner.eval()


def text_pipeline(objective: str = "epsilon", dropout: float = 0.1) -> TextToImagePipeline:
    encoder, denoiser, conditioner = text_parts(dropout=dropout)
    vae = trained_looking(tiny_kl(downsampling=2))
    of = make_objective(objective)
    parts = vae, encoder.model, encoder.tokenizer, denoiser, conditioner
    return TextToImagePipeline(*parts, make_solver(None, of), of.config)


@pytest.fixture(scope="module")
def pipe() -> TextToImagePipeline:
    return text_pipeline()


def test_it_is_diffusers_own_loop(pipe):
    """DDIM by hand, with diffusers' scheduler, and guidance by two calls."""
    scheduler = swapped(pipe.scheduler, "ddim")
    assert type(scheduler) is DDIMScheduler
    condition, null = pipe.conditioner(pipe.encode(SENTENCES[:2])), pipe.conditioner.null(2)
    x = start = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    betas = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
    hand = DDIMScheduler(**betas, clip_sample=False, timestep_spacing="trailing")
    hand.set_timesteps(5)
    assert hand.timesteps[0] == 999
    with torch.no_grad():
        for timestep in hand.timesteps:
            t = time_of(timestep.repeat(2))
            told, untold = (pipe.denoiser(x, t, c) for c in (condition, null))
            x = hand.step(untold + 3 * (told - untold), timestep, x).prev_sample
    made = sample(pipe.denoiser, scheduler, start, condition, null, 5, 3.0)
    torch.testing.assert_close(made, x, rtol=1e-4, atol=1e-4)


# ---- the pipeline
def test_images_follow_prompts_and_seeds(pipe):
    made = pipe(SENTENCES, **QUICK).images
    assert made.shape == (3, 3, 8, 8) and made.dtype == torch.uint8 and pipe.image_size == (8, 8)
    assert same(made, pipe(SENTENCES, **QUICK).images)
    others = pipe([SENTENCES[1], *SENTENCES[1:]], **QUICK).images
    assert not same(others[0], made[0]) and same(others[1:], made[1:])
    assert not same(pipe(SENTENCES, **{**QUICK, "seed": 1}).images, made)


@pytest.mark.parametrize("by", ["seed", "generator"])
def test_batches_change_nothing(by):
    pipe = text_pipeline()
    pipe.swap_solver("ddpm")

    def made(batch_size):
        noise = {"seed": 0} if by == "seed" else {"seed": None, "generator": torch.Generator().manual_seed(4)}
        return pipe(SENTENCES, **{**QUICK, **noise}, batch_size=batch_size).images.int()

    assert (made(2) - made(16)).abs().max() <= 1  # the last digit of a matrix product is the batch's
    if by == "seed":
        one = torch.tensor([2])
        alone = pipe.make(pipe.encode(SENTENCES[2:]), pipe.noise(0, one), None, 3, 7.5, pipe.generators(0, one))
        assert (alone[0].int() - made(16)[2]).abs().max() <= 1


def test_the_empty_prompt_is_the_null(pipe):
    by_null = pipe(SENTENCES, **QUICK).images
    assert same(pipe(SENTENCES, "", **QUICK).images, by_null)
    assert same(pipe(SENTENCES, ["", "", ""], **QUICK).images, by_null)
    away = pipe(SENTENCES, ["", "red", ""], **QUICK).images
    changed = [not same(a, b) for a, b in zip(away, by_null, strict=True)]
    assert changed[1] and (away[[0, 2]].int() - by_null[[0, 2]].int()).abs().max() <= 1
    # guided from its own empty prompt, an empty prompt is not guided at all
    empty = [pipe("", guidance_scale=scale, **QUICK).images.int() for scale in (1.0, 7.5)]
    assert (empty[0] - empty[1]).abs().max() <= 1
    told = pipe(SENTENCES, guidance_scale=1.0, **QUICK).images  # the caption alone
    assert same(pipe(SENTENCES, "blue", guidance_scale=1.0, **QUICK).images, told) and not same(told, by_null)


def test_what_cannot_be(pipe):
    for options, said in (
        ({"negative_prompt": ["a", "b"]}, "2 negative prompts for 1 prompts"),
        ({"num_inference_steps": 0}, "expected 1 to 1000"),
        ({"prompt": []}, "No prompts"),
    ):
        refuses(said, pipe, **{"prompt": "green", **QUICK, **options})


# ---- from files
def run_of(tmp_path, objective="v_prediction"):
    """A run's folders, as training leaves them; the averaged weights are others than the live ones."""
    encoder, denoiser, conditioner = text_parts()
    state, settings = {}, {"objective": make_objective(objective).config}
    for name, model in (("denoiser", denoiser), ("conditioner", conditioner)):
        settings[f"{name}_config"] = plain_config(model)
        for start, factor in (("network", 1.5), ("ema.network", 1.0)):
            state |= {f"{start}.{name}.{key}": factor * tensor for key, tensor in model.state_dict().items()}
    (tmp_path / "checkpoints").mkdir()
    path = tmp_path / "checkpoints" / "last.ckpt"
    torch.save({"state_dict": state, "hyper_parameters": settings}, path)
    trained_looking(tiny_kl(downsampling=2)).save_pretrained(tmp_path / "autoencoder")
    encoder.save(tmp_path / "text_encoder")
    return path


def test_a_checkpoint_of_training_becomes_a_pipeline(tmp_path):
    path = run_of(tmp_path)
    pipe, expected = load_text_pipeline(path), text_pipeline("v_prediction")
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    assert same(pipe(SENTENCES, **QUICK).images, expected(SENTENCES, **QUICK).images)
    live = load_text_pipeline(path, ema=False)
    expected.save_pretrained(tmp_path / "pipeline")
    again = load_text_pipeline(tmp_path / "pipeline")
    again.swap_solver("unipc")
    assert type(again.scheduler).__name__ == "UniPCMultistepScheduler"
    assert same(again.denoiser.x_embedder.proj.weight, expected.denoiser.x_embedder.proj.weight)
    assert same(live.denoiser.x_embedder.proj.weight, 1.5 * expected.denoiser.x_embedder.proj.weight)


def test_what_cannot_be_loaded(tmp_path):
    path = run_of(tmp_path)
    (tmp_path / "text_encoder").rename(tmp_path / "moved")
    refuses(r"No text_encoder/ in or beside .*last\.ckpt", load_text_pipeline, path)
    tiny_text_encoder(SENTENCES, dim=32).save(tmp_path / "text_encoder")
    refuses(r"states have 32 numbers, .* was trained with 16", load_text_pipeline, path)
    torch.save({"state_dict": {}, "hyper_parameters": {"denoiser_config": {}, "conditioner_config": {}}}, path)
    refuses("makes images of classes", load_text_pipeline, path)
