"""The pipeline: labels → images, the same wherever it is loaded, in folders that can be read back."""

import os
import shutil
import subprocess

import numpy as np
import pytest
import torch
from forked import python
from tiny import SIZE, perturb_projections, refuses, same, tiny_dit, tiny_pipeline, tiny_vavae, trained_looking

from vavae_tools.data.images import to_pixels
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.objectives import FlowMatching
from vavae_tools.diffusion.solvers import make_solver, sample, solvers_for
from vavae_tools.pipelines import batches
from vavae_tools.pipelines.batches import batch_size_for
from vavae_tools.pipelines.classes import LatentDiTPipeline, load_guide, load_pipeline
from vavae_tools.training.denoiser_module import DiffusionModule

QUICK = {"num_inference_steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipe() -> LatentDiTPipeline:
    return tiny_pipeline()


def images(pipe, labels=(0, 1, 2), seed=0, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(labels=list(labels), generator=generator, **{"output_type": "pt", **QUICK, **options}).images


def test_images_as_tensors_and_as_images(pipe):
    made = images(pipe)
    assert made.shape == (3, 3, SIZE, SIZE) and made.dtype == torch.uint8
    pillow, arrays = (images(pipe, output_type=kind) for kind in ("pil", "np"))
    assert [np.asarray(one).tolist() for one in pillow] == made.permute(0, 2, 3, 1).tolist() == arrays.tolist()
    refuses("No output_type 'latent'; there are pil, pt, np", images, pipe, output_type="latent")
    refuses("guidance_scale=nan is no number to guide by", images, pipe, guidance_scale=float("nan"))
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6, 5)]  # one for each image
    first, other, again = pipe([1, 1, 1], generator=generators, output_type="pt", **QUICK).images
    assert torch.equal(first, again) and not torch.equal(first, other)


@torch.no_grad()
def test_it_is_sampling_then_the_statistics_then_the_decoder_with_the_vectors(pipe):
    labels, noise = torch.tensor([2, 0]), torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(4))
    conditions = pipe.conditioner(labels), pipe.conditioner.null(2)
    z = sample(pipe.denoiser, pipe.scheduler, noise, *conditions, num_inference_steps=3, guidance_scale=2.0)
    z = z * torch.tensor([2.0, 0.5]).view(2, 1, 1) + torch.tensor([0.5, -1.0]).view(2, 1, 1)
    decoded = pipe.vae.decode(z, condition=pipe.vae.conditions(labels)).sample
    assert torch.equal(pipe(labels, latents=noise, output_type="pt", **QUICK).images, to_pixels(decoded))


def test_everything_asked_for_matters_but_the_batch_size(pipe):
    made, guidance = images(pipe), ({"guidance_scale": 1.0}, {"guidance_interval": (0.5, 1.0)}, {"timestep_shift": 0.3})
    for change in ({"labels": (1, 1, 2)}, {"seed": 1}, {"num_inference_steps": 4}, *guidance):
        assert not torch.equal(images(pipe, **change), made), change
    assert torch.equal(images(pipe), made)
    assert (images(pipe, batch_size=2).int() - made.int()).abs().max() <= 1  # another order of the same sums


# ---- precision
def test_half_precision_makes_nearly_the_same_images(pipe):
    made, half = images(pipe), images(pipe, precision="bf16")
    assert 0 < (half.int() - made.int()).abs().float().mean() < 3
    refuses("No precision '8'; there are 32, 16, bf16", images, pipe, precision="8")


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_pipelines_whose_weights_are_half(kind, pipe):
    half = tiny_pipeline().to(kind)
    assert (images(half).int() - images(pipe).int()).abs().float().mean() < 3
    refuses(r"precision 32, but the weights are b?fp?16: take pipe\.to\(torch\.float32\)", images, half, precision="32")


def test_what_is_not_finite_in_half_precision_is_made_in_float32(pipe, monkeypatch, capsys):
    """Which image that is shows in its label, so that the others stay as they are."""
    forward, row = pipe.denoiser.forward, pipe.conditioner.embedding_table.weight[1]

    def overflowing(x, t, conditioning, always=False):
        made = forward(x, t, conditioning)
        there = (conditioning == row).all(1) & (torch.is_autocast_enabled("cpu") | always)
        return made.masked_fill(there[:, None, None, None], torch.inf)

    whole, half = images(pipe), images(pipe, precision="bf16")
    with monkeypatch.context() as patch:
        patch.setattr(pipe.denoiser, "forward", overflowing)
        capsys.readouterr()
        made = images(pipe, precision="bf16")
        images(pipe, precision="bf16")  # which says it no more
    said = capsys.readouterr().err.splitlines()
    assert said.count("1 of 3 latents are not finite in bf16: such ones are made again in float32") == 1
    assert (made[1].int() - whole[1].int()).abs().max() <= 1 and same(made[[0, 2]], half[[0, 2]])
    monkeypatch.setattr(pipe.denoiser, "forward", lambda *given: overflowing(*given, always=True))
    for precision in ("32", "bf16"):
        refuses("1 of 3 latents are not finite in float32: the weights are ruined", images, pipe, precision=precision)


# ---- models that are not there until they are called
def test_offloaded_models_come_when_they_are_asked_anything(pipe):
    """`enable_model_cpu_offload` brings each to the card by accelerate's hooks: here they bring the weights."""
    hooks = pytest.importorskip("accelerate.hooks")

    class Bringing(hooks.ModelHook):
        def init_hook(self, module):
            self.weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
            for tensor in module.state_dict().values():
                tensor.fill_(torch.nan)
            return module

        def pre_forward(self, module, *args, **kwargs):
            module.load_state_dict(self.weights)
            return args, kwargs

    made = images(pipe)
    offloaded = tiny_pipeline()
    for model in (offloaded.conditioner, offloaded.denoiser, offloaded.vae):
        hooks.add_hook_to_module(model, Bringing())
    assert same(offloaded.conditioner.null(1), pipe.conditioner.null(1))
    assert same(images(offloaded), made)


# ---- a guide
def test_a_guide_is_loaded_without_an_autoencoder(pipe, run_folder, tmp_path):
    folder, module = run_folder
    shutil.rmtree(folder / "vavae")
    nameless = LatentDiTPipeline(tiny_vavae(), *tiny_dit(), make_solver())
    denoiser, _ = load_guide(folder / "checkpoints" / "last.ckpt", nameless, ema=False)
    assert same(denoiser.x_embedder.proj.weight, module.network["denoiser"].x_embedder.proj.weight)
    pipe.save_pretrained(tmp_path / "weak")
    shutil.rmtree(tmp_path / "weak" / "vae")
    denoiser, _ = load_guide(tmp_path / "weak", pipe)
    assert same(denoiser.x_embedder.proj.weight, pipe.denoiser.x_embedder.proj.weight)


def test_a_guide_of_other_data_is_refused(pipe, run_folder, tmp_path):
    last = run_folder[0] / "checkpoints" / "last.ckpt"
    refuses("has people anna, ben, carl, the model ID_1, ID_2, ID_3: it must be of", load_guide, last, pipe)
    for changes, classes, message in (
        ({"input_size": 4}, 3, r"has latents of shape \(2, 4, 4\), the model \(2, 8, 8\)"),
        ({}, 5, "has classes: 5, the model 3"),
    ):
        denoiser, _ = tiny_dit(**changes)
        weak = LatentDiTPipeline(tiny_vavae(), denoiser, ClassConditioner(classes, 16), make_solver())
        weak.save_pretrained(tmp_path / "weak")
        refuses(message, load_guide, tmp_path / "weak", pipe)


# ---- whom
def test_people_by_label_and_by_name(pipe):
    assert pipe.labels_of([0, "2", "ID_2"]) == [0, 2, 1]
    assert torch.equal(images(pipe, ["ID_3", "ID_1"]), images(pipe, [2, 0]))
    assert torch.equal(images(pipe, torch.tensor([2, 0])), images(pipe, [2, 0]))
    assert pipe.labels_of(np.array([1, 2])) == [1, 2]
    for label, message in (
        (3, "Label 3 does not exist: labels go from 0 to 2"),
        ("-1", "Label -1 does not exist"),
        ("id_2", r"Nobody called 'id_2' \(did you mean ID_2\?\); there are ID_1, ID_2, ID_3"),
        ("²", "Nobody called '²'"),
    ):
        refuses(message, pipe, [0, label], **QUICK)
    refuses(r"are \(1, 2, 8, 8\), expected \(2, 2, 8, 8\)", pipe, [0, 1], latents=torch.zeros(1, 2, 8, 8), **QUICK)


def test_rows_that_nobody_was_trained_with_make_no_images():
    denoiser, _ = tiny_dit()
    parts = tiny_vavae(condition_dim=0), denoiser, ClassConditioner(1000, 16), make_solver()
    named = LatentDiTPipeline(*parts, {"anna": 0, "ben": 7})
    assert named.labels_of([7, "anna"]) == [7, 0]
    refuses(r"Label 999 is nobody's; there are 0 \(anna\), 7 \(ben\)", named.labels_of, [0, 999])
    assert LatentDiTPipeline(*parts).labels_of([999, "ID_3"]) == [999, 2]
    refuses(r"Nobody called 'x'; there are ID_1, .*, ID_12 and 988 more$", LatentDiTPipeline(*parts).labels_of, ["x"])


# ---- folders of models
def test_a_saved_pipeline_makes_the_same_images(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for loaded in (LatentDiTPipeline.from_pretrained(tmp_path), load_pipeline(tmp_path)):
        assert torch.equal(images(loaded), images(pipe))
        assert loaded.people == pipe.people
        assert tuple(loaded.vae.config.latents_mean) == (0.5, -1.0)  # it needs no training data
        assert tuple(loaded.vae.config.latents_std) == (2.0, 0.5)
    loaded.scheduler = make_solver(time_shift=2.0)
    for name in set(solvers_for(FlowMatching())) - {"sde"}:  # another solver keeps the shift
        loaded.swap_solver(name)
        assert loaded.scheduler.config.get("shift", loaded.scheduler.config.get("flow_shift")) == 2.0
        assert not torch.equal(images(loaded), images(pipe))


@pytest.fixture
def run_folder(tmp_path):
    """What DiT training leaves: checkpoints/last.ckpt and vavae/. The average differs from the live weights."""
    vae = perturb_projections(tiny_vavae(latents_mean=(0.5, -1.0), latents_std=(2.0, 0.5)))
    vae.save_pretrained(tmp_path / "vavae")
    denoiser, conditioner = tiny_dit()
    module = DiffusionModule(trained_looking(denoiser), conditioner)
    trained_looking(module.network, seed=8)  # the average stays behind
    hyper_parameters = {**module.hparams, "people": {"anna": 0, "ben": 1, "carl": 2}}
    (tmp_path / "checkpoints").mkdir()
    checkpoint = {"state_dict": module.state_dict(), "hyper_parameters": hyper_parameters}
    torch.save(checkpoint, tmp_path / "checkpoints" / "last.ckpt")
    return tmp_path, module


def test_a_checkpoint_is_a_pipeline_of_averaged_or_live_weights(run_folder):
    folder, module = run_folder
    averaged = load_pipeline(folder / "checkpoints" / "last.ckpt")
    live = load_pipeline(folder / "checkpoints" / "last.ckpt", ema=False)
    for pipe, network in ((averaged, module.ema.network), (live, module.network)):
        assert same(pipe.denoiser.x_embedder.proj.weight, network["denoiser"].x_embedder.proj.weight)
        assert same(pipe.conditioner.embedding_table.weight, network["conditioner"].embedding_table.weight)
        assert not (pipe.denoiser.training or pipe.vae.training)
    assert averaged.people == {"anna": 0, "ben": 1, "carl": 2}
    assert averaged.labels_of(["ben"]) == [1]
    assert not torch.equal(images(averaged), images(live))


def test_a_checkpoint_away_from_its_run(run_folder, tmp_path):
    folder, last, away = run_folder[0], run_folder[0] / "checkpoints" / "last.ckpt", tmp_path / "a" / "b" / "c"
    away.mkdir(parents=True)
    (away / "link.ckpt").symlink_to(last)
    (away / "copy.ckpt").write_bytes(last.read_bytes())
    expected = images(load_pipeline(last))
    assert same(images(load_pipeline(away / "link.ckpt")), expected)
    assert same(images(load_pipeline(away / "copy.ckpt", run=folder)), expected)
    copy = away / "copy.ckpt"
    refuses(r"No autoencoder/ in or beside .*copy\.ckpt.*name the run's folder by --run", load_pipeline, copy)
    refuses(rf"No autoencoder/ in {away}: it holds copy\.ckpt, link\.ckpt; name", load_pipeline, copy, run=away)


def test_what_cannot_be_loaded_is_said(pipe, run_folder, tmp_path):
    folder, _ = run_folder
    pipe.save_pretrained(tmp_path / "pipeline")
    refuses(r"is no pipeline \(no model_index\.json\); it holds vavae, pipeline", load_pipeline, folder)
    refuses(r"No checkpoint .*best\.ckpt; there is .*last\.ckpt", load_pipeline, folder / "checkpoints" / "best.ckpt")
    refuses(r"No checkpoint .*: python -m vavae_tools\.train makes one", load_pipeline, tmp_path / "none" / "pipeline")
    refuses(r"holds the averaged weights alone: name a \.ckpt", load_pipeline, tmp_path / "pipeline", ema=False)
    weights = tmp_path / "pipeline" / "denoiser" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    refuses("cannot be read", load_pipeline, tmp_path / "pipeline")
    weights.unlink()
    shutil.rmtree(tmp_path / "pipeline" / "vae")
    refuses("lacks denoiser/, vae/, or its weights: copy the whole", load_pipeline, tmp_path / "pipeline")
    whole = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    for settings, said in (
        (whole["hyper_parameters"], r"a\.ckpt \(ema\.network\.denoiser\.\*\) lacks"),
        ({"vavae_config": {}}, r"a\.ckpt is no checkpoint of DiT training \(it holds state_dict, hyper_par"),
    ):
        torch.save({"state_dict": {}, "hyper_parameters": settings}, folder / "a.ckpt")
        refuses(said, load_pipeline, folder / "a.ckpt")


# ---- memory
def test_where_the_memory_does_not_suffice_fewer_are_made_at_once(monkeypatch, capsys):
    pipe, sizes, room = tiny_pipeline(), [], [3]
    pipe.set_progress_bar_config(disable=True)
    make, alone = pipe.make, images(pipe, [0, 1, 2] * 5, batch_size=1)

    def limited(labels, noise, **sampling):
        sizes.append(len(labels))
        if len(labels) > room[0]:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return make(labels, noise, **sampling)

    monkeypatch.setattr(pipe, "make", limited)
    capsys.readouterr()
    made = images(pipe, [0, 1, 2] * 5, batch_size=8)
    assert sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 1] and (made.int() - alone.int()).abs().max() <= 1
    assert capsys.readouterr().err.splitlines()[:2] == [
        "8 images at once do not fit the memory: making 4",
        "4 images at once do not fit the memory: making 2",
    ]
    sizes.clear()
    images(pipe, [0] * 5)
    assert sizes == [2, 2, 1]  # what did not fit is not tried again
    room[0] = 0
    refuses("memory is too small for one image", images, pipe, [0])
    monkeypatch.setattr(batches, "_is_sharded", lambda pipe: True)  # then other processes are in the midst of it
    with pytest.raises(torch.cuda.OutOfMemoryError):
        images(pipe, [0])


def test_the_usual_batch_fits_the_memory(pipe, monkeypatch):
    assert batch_size_for(pipe) == 64
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}  # 4 GiB, of which a quarter
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    for side, expected in ((256, 64), (512, 16), (8192, 1)):  # 8 channels: 240 bytes a pixel, 15 MiB of 256×256
        monkeypatch.setattr(type(pipe), "image_size", (side, side))
        assert batch_size_for(pipe) == expected
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**34))  # another process has the rest
    monkeypatch.setattr(type(pipe), "image_size", (512, 512))
    assert batch_size_for(pipe) == 8  # 0.8 GiB for 60 MiB each


def test_a_folder_with_an_rae_is_read_by_whoever_has_not_imported_it(tmp_path):
    from vavae_tools.autoencoders.rae import tiny_rae
    from vavae_tools.diffusion.dit import DDT

    denoiser = DDT(4, 1, 64, (16, 32), (1, 1), 2)
    rae = tiny_rae(latents_mean=[0.0] * 64, latents_std=[1.0] * 64)
    LatentDiTPipeline(rae, denoiser, ClassConditioner(2, 16), make_solver()).save_pretrained(tmp_path)
    load = "from vavae_tools.pipelines.classes import load_pipeline"
    script = f"{load}; print(type(load_pipeline({str(tmp_path)!r}).vae))"
    done = subprocess.run([python(), "-c", script], capture_output=True, text=True, timeout=120)
    assert "vavae_tools.autoencoders.rae.RAE" in done.stdout, done.stderr
