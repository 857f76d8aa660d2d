"""The pipeline: labels → pictures, the same wherever it is loaded, in folders that can be read back."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIZE, perturb_projections, same, tiny_dit, tiny_pipeline, tiny_vavae, trained_looking

from vavae_tools.data.images import PictureFolder, channels_of, to_pixels
from vavae_tools.data.split import split_folders
from vavae_tools.diffusion.pipeline import LatentDiTPipeline, load_pipeline, solver, write_samples
from vavae_tools.diffusion.sampling import sample
from vavae_tools.errors import UserError
from vavae_tools.training.diffusion_module import DiffusionModule

QUICK = {"num_inference_steps": 3, "guidance_scale": 2.0}


@pytest.fixture(scope="module")
def pipe() -> LatentDiTPipeline:
    return tiny_pipeline()


def pictures(pipe, labels=(0, 1, 2), seed=0, **options) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return pipe(labels=list(labels), generator=generator, **{"output_type": "pt", **QUICK, **options}).images


def test_pictures_as_tensors_and_as_images(pipe):
    made = pictures(pipe)
    assert made.shape == (3, 3, SIZE, SIZE) and made.dtype == torch.uint8
    images, arrays = (pictures(pipe, output_type=kind) for kind in ("pil", "np"))
    assert [np.asarray(image).tolist() for image in images] == made.permute(0, 2, 3, 1).tolist() == arrays.tolist()
    with pytest.raises(UserError, match="No output_type 'latent'; there are pil, pt, np"):
        pictures(pipe, output_type="latent")
    generator = torch.Generator().manual_seed(0)
    (as_tuple,) = pipe([0, 1, 2], generator=generator, output_type="pt", return_dict=False, **QUICK)
    assert torch.equal(as_tuple, made)


@torch.no_grad()
def test_it_is_sampling_then_the_statistics_then_the_decoder_with_the_vectors(pipe):
    labels, noise = torch.tensor([2, 0]), torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(4))
    conditions = pipe.conditioner(labels), pipe.conditioner.null(2)
    z = sample(pipe.denoiser, pipe.scheduler, noise, *conditions, num_inference_steps=3, guidance_scale=2.0)
    z = z * torch.tensor([2.0, 0.5]).view(2, 1, 1) + torch.tensor([0.5, -1.0]).view(2, 1, 1)
    decoded = pipe.vae.decode(z, condition=pipe.vae.conditions(labels)).sample
    assert torch.equal(pipe(labels, latents=noise, output_type="pt", **QUICK).images, to_pixels(decoded))


def test_everything_asked_for_matters(pipe):
    made = pictures(pipe)
    for change in (
        {"labels": (1, 1, 2)},
        {"seed": 1},
        {"num_inference_steps": 4},
        {"guidance_scale": 1.0},
        {"guidance_interval": (0.5, 1.0)},
        {"timestep_shift": 0.3},
    ):
        assert not torch.equal(pictures(pipe, **change), made), change
    assert torch.equal(pictures(pipe), made)


def test_the_batch_size_does_not_matter(pipe):
    made = pictures(pipe, [0, 1, 2, 2, 1])
    for batch_size in (1, 2, 64):
        again = pictures(pipe, [0, 1, 2, 2, 1], batch_size=batch_size)
        assert (again.int() - made.int()).abs().max() <= 1  # another order of the same sums
    torch.testing.assert_close(pictures(pipe, [0, 1, 2, 2, 1]), made)


def test_one_generator_for_each_picture(pipe):
    def of(*seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return pipe([1] * len(seeds), generator=generators, output_type="pt", **QUICK).images

    both = of(5, 6)
    assert torch.equal(both[1], of(7, 6)[1]) and not torch.equal(both[0], both[1])


# ---- whom


def test_people_by_label_and_by_name(pipe):
    assert pipe.labels_of([0, "2", "ID_2"]) == [0, 2, 1]
    assert torch.equal(pictures(pipe, ["ID_3", "ID_1"]), pictures(pipe, [2, 0]))
    assert torch.equal(pictures(pipe, torch.tensor([2, 0])), pictures(pipe, [2, 0]))
    assert pipe.labels_of(np.array([1, 2])) == [1, 2]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        (3, "Label 3 does not exist: labels go from 0 to 2"),
        ("3", "Label 3 does not exist"),
        (-1, "Label -1 does not exist"),
        ("-1", "Label -1 does not exist"),
        ("ID_4", "Nobody called 'ID_4'; there are ID_1, ID_2, ID_3"),
        ("", "Nobody called ''"),
        ("1.5", "Nobody called '1.5'"),
        ("²", "Nobody called '²'"),
    ],
)
def test_a_label_out_of_range(pipe, label, message):
    with pytest.raises(UserError, match=message):
        pipe([0, label], **QUICK)


def test_noise_of_another_shape(pipe):
    with pytest.raises(UserError, match=r"latents are \(1, 2, 8, 8\), expected \(2, 2, 8, 8\)"):
        pipe([0, 1], latents=torch.zeros(1, 2, 8, 8), **QUICK)


# ---- folders of models


def test_a_saved_pipeline_makes_the_same_pictures(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    for loaded in (LatentDiTPipeline.from_pretrained(tmp_path), load_pipeline(tmp_path)):
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(pictures(loaded), pictures(pipe))
        assert loaded.people == pipe.people
        assert tuple(loaded.vae.config.latents_mean) == (0.5, -1.0)  # it needs no training data
        assert tuple(loaded.vae.config.latents_std) == (2.0, 0.5)


def test_another_solver_can_take_its_place(pipe, tmp_path):
    from diffusers import FlowMatchHeunDiscreteScheduler

    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    loaded.scheduler = FlowMatchHeunDiscreteScheduler()
    assert not torch.equal(pictures(loaded), pictures(pipe))


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
        for part in ("denoiser", "conditioner"):
            expected = network[part].state_dict()
            assert all(same(value, expected[name]) for name, value in getattr(pipe, part).state_dict().items())
        assert not (pipe.denoiser.training or pipe.vae.training)
    assert averaged.people == {"anna": 0, "ben": 1, "carl": 2}
    assert averaged.labels_of(["ben"]) == [1]
    assert not torch.equal(pictures(averaged), pictures(live))


def test_what_cannot_be_loaded_is_said(run_folder, tmp_path):
    folder, _ = run_folder
    with pytest.raises(UserError, match=r"is no pipeline \(no model_index\.json\); it holds checkpoints, vavae"):
        load_pipeline(folder)
    with pytest.raises(UserError, match="No checkpoint"):
        load_pipeline(folder / "checkpoints" / "best.ckpt")
    with pytest.raises(UserError, match="No VA-VAE at"):
        load_pipeline(folder / "checkpoints" / "last.ckpt", autoencoder_dir=folder / "nowhere")
    torch.save({"state_dict": {}, "hyper_parameters": {"vavae_config": {}}}, folder / "vae.ckpt")
    with pytest.raises(UserError, match=r"vae\.ckpt is no checkpoint of DiT training \(it holds state_dict, hyper_par"):
        load_pipeline(folder / "vae.ckpt")


def test_a_damaged_pipeline_is_named(pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    weights = tmp_path / "denoiser" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(UserError, match="cannot be read"):
        load_pipeline(tmp_path)
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="cannot be read"):
        load_pipeline(tmp_path)


# ---- folders of pictures


def test_written_samples_can_be_read_back(pipe, tmp_path):
    labels = [0, 1, 2, 0, 1, 0]
    written = write_samples(pipe, labels, tmp_path / "samples", seed=5, **QUICK)
    assert [path.relative_to(tmp_path / "samples").as_posix() for path in written[:4]] == [
        "ID_1/seed5_00000.png",
        "ID_2/seed5_00000.png",
        "ID_3/seed5_00000.png",
        "ID_1/seed5_00001.png",
    ]
    data = PictureFolder(tmp_path / "samples", SIZE, progress=False)
    assert data.labels.tolist() == [0, 0, 0, 1, 1, 2]
    assert len({bytes(picture) for picture in data.in_memory().numpy()}) == 6  # none is made twice
    report = split_folders(tmp_path / "samples", tmp_path / "split", progress=False)
    assert "6" in str(report)
    assert sorted(p.name for p in tmp_path.glob("split/*/ID_1/*.png")) == [f"seed5_0000{n}.png" for n in range(3)]


def test_a_sample_follows_from_seed_label_and_number(pipe, tmp_path):
    first = write_samples(pipe, [0, 2, 2], tmp_path / "a", seed=5, **QUICK)
    other = write_samples(pipe, [2, 1, 2], tmp_path / "b", seed=5, batch_size=1, **QUICK)
    for mine, theirs in ((first[1], other[0]), (first[2], other[2])):
        difference = np.asarray(Image.open(mine)).astype(int) - np.asarray(Image.open(theirs))
        assert abs(difference).max() <= 1 and mine.name == theirs.name
    another = write_samples(pipe, [2], tmp_path / "c", seed=6, **QUICK)
    assert another[0].read_bytes() != other[0].read_bytes()


def test_folders_can_be_named_otherwise(pipe, tmp_path):
    written = write_samples(pipe, ["ID_2", 0], tmp_path, names=["anna", "ben", "carl"], **QUICK)
    assert [path.parent.name for path in written] == ["ben", "anna"]
    with pytest.raises(UserError, match="The class list has 2 names, the model 3 classes"):
        write_samples(pipe, [0], tmp_path, names=["anna", "ben"], **QUICK)


# ---- grey pictures that are not square


@pytest.fixture(scope="module")
def grey_pipe() -> LatentDiTPipeline:
    """Pictures of 16×24, of latents of 8×12."""
    statistics = {"latents_mean": (0.5, -1.0), "latents_std": (2.0, 0.5)}
    vae = perturb_projections(tiny_vavae(in_channels=1, out_channels=1, **statistics)).eval()
    denoiser, conditioner = tiny_dit(input_size=(8, 12))
    pipe = LatentDiTPipeline(vae, trained_looking(denoiser).eval(), conditioner.eval(), solver())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_grey_pictures_come_out_grey(grey_pipe, tmp_path):
    made = pictures(grey_pipe)
    assert made.shape == (3, 1, 16, 24) and len(made.unique()) > 20
    images, arrays = (pictures(grey_pipe, output_type=kind) for kind in ("pil", "np"))
    assert arrays.shape == (3, 16, 24, 1) and arrays.dtype == np.uint8
    for image, array, picture in zip(images, arrays, made, strict=True):
        assert image.mode == "L" and image.size == (24, 16)
        assert np.array_equal(np.asarray(image), picture[0]) and np.array_equal(array[..., 0], picture[0])
    grey_pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(pictures(loaded), made)


def test_grey_samples_are_written_and_read_back_in_grey(grey_pipe, tmp_path):
    written = write_samples(grey_pipe, [0, 1, 2, 0], tmp_path, seed=5, **QUICK)
    assert [Image.open(path).mode for path in written] == ["L"] * 4 and channels_of(tmp_path) == 1
    noise = grey_pipe.noise(5, torch.tensor([0, 1_000_003, 2 * 1_000_003, 1]))
    made = grey_pipe([0, 1, 2, 0], latents=noise, output_type="pt", **QUICK).images
    data = PictureFolder(tmp_path, (16, 24), channels=1, progress=False)
    rows = [data.paths.index(path) for path in written]
    assert torch.equal(data.in_memory()[rows], made)
