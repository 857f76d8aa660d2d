"""Every objective with every denoiser: its training learns, and its pipeline samples with every solver that fits."""

import types
from pathlib import Path

import pytest
import torch
from test_sampling import telling
from test_text_pipeline import SENTENCES, text_parts
from test_token_pipeline import ALL, CODE, SIZE, TOKENIZER
from tiny import perturb_projections, refuses, same, tiny_dit, tiny_kl, tiny_vavae, trained_looking

from vavae_tools.checkpoints.formats import write_any_format
from vavae_tools.data.tokens.code import TokenCode
from vavae_tools.data.tokens.dataset import TokenImageDataset
from vavae_tools.diffusion import SOLVERS
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import DDT, DiT
from vavae_tools.diffusion.layers import select_tokens
from vavae_tools.diffusion.objectives import FlowMatching, Objective, make_objective
from vavae_tools.diffusion.solvers import solvers_for
from vavae_tools.evaluation.bits import bits_per_token
from vavae_tools.evaluation.texts import reconstruction_curve
from vavae_tools.pipelines.classes import load_guide, load_pipeline
from vavae_tools.pipelines.text import load_text_pipeline
from vavae_tools.pipelines.tokens import TokenImagePipeline, load_token_pipeline
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.files import save_model
from vavae_tools.training.denoiser_module import DiffusionModule

NAMES = ["flow_matching", "gvp", "epsilon", "v", "x0"]
INDEX = torch.arange(8)


def objective(name: str) -> Objective:
    return FlowMatching(path="gvp") if name == "gvp" else make_objective(name)


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def class_training(of: Objective, wide: bool = False) -> tuple[DiffusionModule, dict]:
    torch.manual_seed(0)
    denoiser = tiny_dit(hidden_size=32, patch_size=2)[0]
    if wide:
        denoiser = DDT(8, 2, 2, hidden_size=(32, 48), depth=(1, 1), num_heads=2)
    batch = {"latents": seeded(3, 2, 8, 8)[INDEX % 3], "labels": INDEX % 3}  # one image of each class
    return DiffusionModule(denoiser, ClassConditioner(3, 32), of, lr=2e-3), batch


def text_training(of: Objective) -> tuple[DiffusionModule, dict]:
    encoder, denoiser, conditioner = text_parts()
    which = INDEX % 3
    states = encoder.encode(SENTENCES)[which]
    texts = {"text_tokens": states.tokens, "text_mask": states.mask, "text_pooled": states.pooled}
    return DiffusionModule(denoiser, conditioner, of, lr=2e-3), {"latents": seeded(3, 4, 4, 4)[which], **texts}


def token_training(of: Objective) -> tuple[DiffusionModule, dict]:
    torch.manual_seed(0)
    denoiser = DiT(SIZE, 4, 4, hidden_size=32, depth=1, num_heads=2, positions="sequence")
    of_pipeline = {"code": CODE, "lengths": ALL, "time_shift": 2.0, "use_chat_template": False}
    module = DiffusionModule(denoiser, ClassConditioner(1, 32, dropout=0.0), of, token_images=of_pipeline, lr=2e-3)
    code, tokens = TokenCode(**CODE), torch.tensor([list(b"ab"), list(b"cd")] * 4)
    clean, mask = code.draw(tokens, torch.ones(8, 2, dtype=torch.bool), SIZE), torch.zeros(8, SIZE, SIZE)
    mask[:, :4, :8] = 1
    return module, {"clean": clean, "mask": mask, "kept": select_tokens(mask, 4)}


def train(module: DiffusionModule, batch: dict, folder: Path, most: float = 0.75) -> Path:
    """A checkpoint after 150 steps with the draws and the optimiser of training; the loss falls to a share `most`."""
    module._trainer, dropout = types.SimpleNamespace(world_size=1), module.network["conditioner"].dropout
    optimizer, losses = torch.optim.AdamW(module.network.parameters(), module.hparams.lr, betas=(0.9, 0.95)), []
    for step in range(150):
        loss, _ = module.model_step(module.network, {"index": INDEX, **batch}, Draws(0, step, INDEX), dropout)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    module.ema.network.load_state_dict(module.network.state_dict())
    assert sum(losses[-10:]) < most * sum(losses[:10])
    return checkpoint(module, folder)


def checkpoint(module: DiffusionModule, folder: Path) -> Path:
    path = folder / "checkpoints" / "last.ckpt"
    path.parent.mkdir(parents=True)
    state = {"state_dict": module.state_dict(), "hyper_parameters": dict(module.hparams), "epoch": 0, "global_step": 1}
    write_any_format(state, path)
    return path


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["DiT", "DDT"])
def test_of_classes(kind, name, tmp_path):
    of = objective(name)
    path = train(*class_training(of, wide=kind == "DDT"), tmp_path)
    vae = perturb_projections(tiny_vavae(latents_mean=(0.0, 0.0), latents_std=(1.0, 1.0)))
    vae.save_pretrained(tmp_path / "autoencoder")
    pipe, noise = load_pipeline(path), seeded(3, 2, 8, 8, seed=5)
    assert pipe.objective.config == of.config and type(pipe.objective) is type(of)
    pipe.vae.decode_latents = lambda z, labels: z.repeat(1, 2, 1, 1)[:, :3] / 4
    by, guide = {"latents": noise, "output_type": "pt"}, load_guide(path, pipe)
    guided = {"guidance_scale": 1.5, "guidance_interval": (0.2, 0.9), "guidance_channels": "first3"}
    for solver in SOLVERS:
        if solver not in solvers_for(of):
            refuses(rf"No solver '{solver.replace('+', '.')}' for .*; there are ", pipe.swap_solver, solver)
            continue
        pipe.swap_solver(solver)
        made = pipe([0, 1, 2], 30, guidance_scale=1.0, **by).images
        assert made.float().std() > 5, solver
        alone = pipe([1], 30, guidance_scale=1.0, **{**by, "latents": noise[1:2]}).images
        assert (alone[0].int() - made[1].int()).abs().max() <= 1, solver
        assert not same(pipe([0, 1, 2], 30, **by, **guided).images, made), solver
        by_guide = pipe([0, 1, 2], 30, guidance_scale=1.5, guide=guide, **by).images
        assert (by_guide.int() - made.int()).abs().max() <= 1, solver  # a guide that is the model itself
    pipe.swap_solver("sde" if "sde" in solvers_for(of) else "ddpm")
    pipe.save_pretrained(tmp_path / "pipeline")
    again = load_pipeline(tmp_path / "pipeline")
    assert type(again.scheduler) is type(pipe.scheduler) and again.objective.config == of.config
    again.vae.decode_latents = pipe.vae.decode_latents
    assert same(again([0, 1, 2], 5, **by, **guided).images, pipe([0, 1, 2], 5, **by, **guided).images)


def test_a_guide_of_another_objective_is_refused(tmp_path):
    path, other = (checkpoint(class_training(objective(name))[0], tmp_path / name) for name in ("flow_matching", "x0"))
    tiny_vavae().save_pretrained(path.parent / "autoencoder")
    pipe = load_pipeline(path)
    refuses(r"has a denoiser of sample \(linear\), the model flow_prediction \(linear\)", load_guide, other, pipe)


@pytest.mark.parametrize("name", NAMES)
def test_of_texts(name, tmp_path):
    of = objective(name)
    path = train(*text_training(of), tmp_path)
    trained_looking(tiny_kl(downsampling=2)).save_pretrained(tmp_path / "autoencoder")
    text_parts()[0].save(tmp_path / "text_encoder")
    pipe = load_text_pipeline(path)
    for solver in solvers_for(of):
        pipe.swap_solver(solver)
        by = {"num_inference_steps": 5, "seed": 0, "output_type": "pt"}
        made = pipe(SENTENCES, "blue", guidance_scale=2.0, **by).images
        assert not same(pipe(SENTENCES, guidance_scale=1.0, **by).images, made), solver
        pipe.save_pretrained(tmp_path / solver)
        again = load_text_pipeline(tmp_path / solver)
        assert same(again(SENTENCES, "blue", guidance_scale=2.0, **by).images, made)


@pytest.mark.parametrize("name", NAMES)
def test_of_tokens(name, tmp_path):
    of = objective(name)
    path = train(*token_training(of), tmp_path, most=0.85)
    save_model(TOKENIZER, tmp_path / "tokenizer")
    pipe, made = load_token_pipeline(path), {}
    assert type(pipe.objective) is type(of) and pipe.objective.config == of.config
    by = {"max_new_tokens": 2, "num_inference_steps": 5}
    for solver in (None, *solvers_for(of)):
        if solver:
            pipe.swap_solver(solver)
        made[solver] = pipe(["a", "zz"], **by)
        known = made[solver].known[:, None].expand_as(made[solver].images) > 0
        clean = pipe.code.draw(torch.tensor([[97, 0], [122, 122]]), torch.tensor([[1, 0], [1, 1]]) > 0, SIZE)
        assert same(made[solver].images[known], clean[known]) and made[solver].images.isfinite().all()
        assert [text[:count] for text, count in zip(made[solver].texts, (1, 2), strict=True)] == ["a", "zz"]
        alone = pipe(["zz"], numbers=[1], **by)
        torch.testing.assert_close(alone.images[0], made[solver].images[1], rtol=1e-3, atol=1e-3)
        pipe.save_pretrained(tmp_path / str(solver))
        again = load_token_pipeline(tmp_path / str(solver))
        assert same(again(["a", "zz"], **by).images, made[solver].images)
    assert not same(made["dpm++" if of.path == "discrete" else "heun"].images, made[None].images)
    refuses("No solver", pipe.swap_solver, "heun" if of.path == "discrete" else "ddpm")


@pytest.mark.parametrize("name", NAMES)
def test_at_a_ratio_data_and_noise_are_in_it(name):
    of, ratio = objective(name), torch.tensor([0.1, 0.5, 1.0, 3.0])
    alpha, sigma = of.shares(of.time_at(ratio))
    torch.testing.assert_close(alpha / sigma, ratio, rtol=0.02 if of.path == "discrete" else 1e-5, atol=1e-4)


def test_an_evaluation_of_texts_asks_at_the_objectives_own_noise():
    """Who expects the same of the same ratio of data and noise knows as many bits, and as much comes back."""
    # texts of 16 letters, one for each image
    data, found = TokenImageDataset("sentences", img_size=SIZE, cell_size=4).part(list(range(4))), {}
    models = DiT(SIZE, 4, 4, hidden_size=16, depth=1, num_heads=2), ClassConditioner(1, 16, dropout=0.0)
    for name in NAMES:
        of = objective(name)
        pipe = TokenImagePipeline(*models, TOKENIZER, CODE, ALL, 2.0, objective=of.config)
        said = telling(of, lambda x, t, alpha, sigma, _: torch.tanh(alpha * x / sigma**2))
        pipe.denoiser.forward = lambda seen, t, c, kept, said=said: said(seen, t, c)
        curve = reconstruction_curve(pipe, data, times=(0.1, 0.7), steps=4)
        found[name] = bits_per_token(pipe, data, count=4, times=16).bits, [row.cells for row in curve]
    bits, curve = found.pop("x0")
    assert curve[0] < 0.5 and curve[1] > 0.9
    for name, (of_name, curve) in found.items():
        assert of_name == pytest.approx(bits, rel=0.02 if name in ("epsilon", "v") else 1e-3), name
        assert curve[1] > 0.9, name


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_counts_what_is_unknown_in_the_mask(name):
    """Equal to the loss of an image that has these pixels alone, and without a mask to that of a full one."""
    of, data, noise = objective(name), seeded(4, 3, 4, 4), seeded(4, 3, 4, 4, seed=1)
    t, prediction = torch.tensor([0.1, 0.4, 0.6, 0.9]), seeded(4, 3, 4, 4, seed=2)
    mask, known = torch.zeros(4, 4, 4), torch.zeros(4, 4, 4)
    mask[:, 1:], known[:, 2:] = 1, 1
    seen = {}

    def denoiser(x, t, conditioning, kept):
        seen.update(x=x, kept=kept)
        return torch.cat([prediction, x[:, -1:]], dim=1)

    loss, parts = of(denoiser, data, None, noise, t, mask, known)
    row, row_parts = of.loss(*(values[:, :, 1:2] for values in (prediction, data, noise)), t)
    torch.testing.assert_close(loss, row)
    assert parts.keys() == row_parts.keys()
    assert same(seen["x"][:, :3, 2:], data[:, :, 2:]) and same(seen["x"][:, 3], known)
    assert same(seen["x"][:, :3, :2], of.add_noise(data, noise, t)[:, :, :2]) and same(seen["kept"] > 0, mask > 0)
    of(denoiser, data, None, noise, t, mask - known, known)  # what a chat asks is no part of the mask, but attended to
    assert same(seen["kept"] > 0, mask > 0)
    full = of.loss(prediction, data, noise, t, torch.ones(4, 4, 4))[0]
    torch.testing.assert_close(full, of(lambda *_: prediction, data, None, noise, t)[0])
    # what is told means the data: of the true noise and data these themselves
    x = of.add_noise(data, noise, t)
    torch.testing.assert_close(of.clean(of.target(data, noise, t), x, t), data, rtol=1e-3, atol=1e-3)
