"""The pipeline: labels → pictures, the same wherever it is loaded, in folders that can be read back."""

import inspect
import json
import os
import shutil
import subprocess
from io import BytesIO
from zipfile import ZIP_STORED, ZipFile

import numpy as np
import pytest
import torch
from forked import python
from PIL import Image
from tiny import SIZE, perturb_projections, same, tiny_dit, tiny_pipeline, tiny_vavae, trained_looking

from vavae_tools.data.images import PictureFolder, channels_of, to_pixels
from vavae_tools.data.split import split_folders
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.objectives import FlowMatching
from vavae_tools.diffusion.solvers import make_solver, sample, solvers_for
from vavae_tools.pipelines import portions
from vavae_tools.pipelines import writer as sample_sets
from vavae_tools.pipelines.classes import LatentDiTPipeline, load_guide, load_pipeline
from vavae_tools.pipelines.portions import default_batch_size
from vavae_tools.pipelines.writer import write_samples
from vavae_tools.runtime.errors import UserError
from vavae_tools.training.denoiser_module import DiffusionModule

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


# ---- precision


def test_half_precision_makes_nearly_the_same_pictures(pipe, monkeypatch):
    made, half = pictures(pipe), pictures(pipe, precision="bf16")
    assert 0 < (half.int() - made.int()).abs().float().mean() < 3
    states = []
    monkeypatch.setattr(pipe.vae, "decode_latents", lambda z, labels: states.append(z) or torch.zeros(3, 3, 4, 4))
    pictures(pipe, precision="bf16")
    assert states[0].dtype == torch.float32 and not same(states[0], states[0].bfloat16().float())
    with pytest.raises(UserError, match="No precision '8'; there are 32, 16, bf16"):
        pictures(pipe, precision="8")


def test_a_precision_holds_inside_of_autocast(pipe):
    with torch.autocast("cpu", torch.bfloat16):
        assert same(pictures(pipe), pictures(pipe, precision="32"))
    assert same(pictures(pipe), pictures(pipe, precision="32"))


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16])
def test_pipelines_whose_weights_are_half(kind):
    whole, half = tiny_pipeline(), tiny_pipeline().to(kind)
    difference = (pictures(half).int() - pictures(whole).int()).abs().float()
    assert difference.mean() < 3
    with pytest.raises(UserError, match=r"precision 32, but the weights are b?fp?16: take pipe\.to\(torch\.float32\)"):
        pictures(half, precision="32")


def test_what_is_not_finite_in_half_precision_is_made_in_float32(pipe, monkeypatch, capsys):
    """Which picture that is shows in its label, so that the others stay as they are."""
    forward, row = pipe.denoiser.forward, pipe.conditioner.embedding_table.weight[1]

    def overflowing(x, t, conditioning, always=False):
        made = forward(x, t, conditioning)
        there = (conditioning == row).all(1) & (torch.is_autocast_enabled("cpu") | always)
        return made.masked_fill(there[:, None, None, None], torch.inf)

    whole, half = pictures(pipe), pictures(pipe, precision="bf16")
    with monkeypatch.context() as patch:
        patch.setattr(pipe.denoiser, "forward", overflowing)
        capsys.readouterr()
        made = pictures(pipe, precision="bf16")
        pictures(pipe, precision="bf16")  # which says it no more
    said = capsys.readouterr().err.splitlines()
    assert said.count("1 of 3 latents are not finite in bf16: such ones are made again in float32") == 1
    assert (made[1].int() - whole[1].int()).abs().max() <= 1 and same(made[[0, 2]], half[[0, 2]])
    monkeypatch.setattr(pipe.denoiser, "forward", lambda *given: overflowing(*given, always=True))
    for precision in ("32", "bf16"):
        with pytest.raises(UserError, match="1 of 3 latents are not finite in float32: the weights are ruined"):
            pictures(pipe, precision=precision)


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

    made = pictures(pipe)
    offloaded = tiny_pipeline()
    for model in (offloaded.conditioner, offloaded.denoiser, offloaded.vae):
        hooks.add_hook_to_module(model, Bringing())
    assert same(offloaded.conditioner.null(1), pipe.conditioner.null(1))
    assert same(pictures(offloaded), made)


# ---- a guide


@torch.no_grad()
def test_a_guide_takes_the_nulls_place(pipe):
    """One Euler step from noise x: x + v_weak + w · (v − v_weak), with each model's own condition."""
    weak = tiny_pipeline(4)
    guide = trained_looking(weak.denoiser, seed=9), weak.conditioner
    labels, noise = torch.tensor([2, 0]), torch.randn(2, 2, 8, 8, generator=torch.Generator().manual_seed(4))
    start = torch.zeros(2)
    of_model = pipe.denoiser(noise, start, pipe.conditioner(labels))
    of_guide = guide[0](noise, start, guide[1](labels))
    expected = pipe.vae.decode_latents(noise + of_guide + 1.42 * (of_model - of_guide), labels)
    options = {"latents": noise, "num_inference_steps": 1, "output_type": "pt"}
    made = pipe(labels, guidance_scale=1.42, guide=guide, **options).images
    assert (made.int() - to_pixels(expected).int()).abs().max() <= 1
    by_null = pipe(labels, guidance_scale=1.42, **options).images
    assert not torch.equal(made, by_null)
    alone = pipe(labels, guidance_scale=1.0, **options).images
    assert torch.equal(pipe(labels, guidance_scale=1.0, guide=guide, **options).images, alone)


def test_a_guide_is_loaded_without_an_autoencoder(pipe, run_folder, tmp_path):
    folder, module = run_folder
    for ema, network in ((True, module.ema.network), (False, module.network)):
        denoiser, conditioner = load_guide(folder / "checkpoints" / "last.ckpt", tiny_pipeline_without_names(), ema)
        for part, loaded in (("denoiser", denoiser), ("conditioner", conditioner)):
            expected = network[part].state_dict()
            assert all(same(value, expected[name]) for name, value in loaded.state_dict().items())
    pipe.save_pretrained(tmp_path / "weak")
    shutil.rmtree(tmp_path / "weak" / "vae")
    denoiser, _ = load_guide(tmp_path / "weak", pipe)
    assert all(same(value, pipe.denoiser.state_dict()[name]) for name, value in denoiser.state_dict().items())


def test_a_guide_of_other_data_is_refused(pipe, run_folder, tmp_path):
    with pytest.raises(
        UserError, match="has people anna, ben, carl, the model ID_1, ID_2, ID_3: it must be of the sam"
    ):
        load_guide(run_folder[0] / "checkpoints" / "last.ckpt", pipe)
    for changes, classes, message in (
        ({"input_size": 4}, 3, r"has latents of shape \(2, 4, 4\), the model \(2, 8, 8\)"),
        ({}, 5, "has classes: 5, the model 3"),
    ):
        denoiser, _ = tiny_dit(**changes)
        weak = LatentDiTPipeline(tiny_vavae(), denoiser, ClassConditioner(classes, 16), make_solver())
        weak.save_pretrained(tmp_path / "weak")
        with pytest.raises(UserError, match=message):
            load_guide(tmp_path / "weak", pipe)


def tiny_pipeline_without_names() -> LatentDiTPipeline:
    denoiser, conditioner = tiny_dit()
    return LatentDiTPipeline(tiny_vavae(), denoiser, conditioner, make_solver())


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


def test_rows_that_nobody_was_trained_with_make_no_pictures():
    denoiser, _ = tiny_dit()
    parts = tiny_vavae(condition_dim=0), denoiser, ClassConditioner(1000, 16), make_solver()
    named = LatentDiTPipeline(*parts, {"anna": 0, "ben": 7})
    assert named.labels_of([7, "anna"]) == [7, 0]
    with pytest.raises(UserError, match=r"Label 999 is nobody's; there are 0 \(anna\), 7 \(ben\)"):
        named.labels_of([0, 999])
    assert LatentDiTPipeline(*parts).labels_of([999, "ID_3"]) == [999, 2]
    with pytest.raises(UserError, match=r"Nobody called 'x'; there are ID_1, .*, ID_12 …$"):
        LatentDiTPipeline(*parts).labels_of(["x"])


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


@torch.no_grad()
def test_another_solver_can_take_its_place(pipe, tmp_path):
    """Each goes to where Euler's method goes by many small steps, and keeps the shift."""
    pipe.save_pretrained(tmp_path)
    loaded = load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    loaded.scheduler = make_solver(time_shift=2.0)
    exact = pictures(loaded, num_inference_steps=400).float()

    def error() -> float:
        return (pictures(loaded, num_inference_steps=8) - exact).abs().mean().item()

    of_euler = error()
    for name in set(solvers_for(FlowMatching())) - {"sde"}:
        loaded.swap_solver(name)
        assert loaded.scheduler.config.get("shift", loaded.scheduler.config.get("flow_shift")) == 2.0
        assert error() == of_euler if name == "euler" else error() < of_euler / 2, name


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
    with pytest.raises(
        UserError, match=r"holds the averaged weights alone: name a \.ckpt of the training for the live"
    ):
        load_pipeline(saved(tiny_pipeline(), tmp_path / "pipeline"), ema=False)
    whole = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    torch.save({**whole, "state_dict": {}}, folder / "checkpoints" / "empty.ckpt")
    with pytest.raises(UserError, match=r"empty\.ckpt: its ema\.network\.denoiser\.\* do not fit its own settings"):
        load_pipeline(folder / "checkpoints" / "empty.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {"vavae_config": {}}}, folder / "vae.ckpt")
    with pytest.raises(UserError, match=r"vae\.ckpt is no checkpoint of DiT training \(it holds state_dict, hyper_par"):
        load_pipeline(folder / "vae.ckpt")


def saved(pipe, folder):
    pipe.save_pretrained(folder)
    return folder


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
    pipe = LatentDiTPipeline(vae, trained_looking(denoiser).eval(), conditioner.eval(), make_solver())
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


# ---- many pictures


def contents(folder) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Counting:
    """`pipe.make`, counting; it fails where told to."""

    def __init__(self, pipe, monkeypatch, fail=lambda call, labels: None):
        self.made, self.sizes, self.make, self.fail = [], [], pipe.make, fail
        monkeypatch.setattr(pipe, "make", self)
        self.__signature__ = inspect.signature(self.make)

    def __call__(self, labels, noise, **sampling):
        self.sizes.append(len(labels))
        self.fail(len(self.sizes), labels)
        self.made += labels.tolist()
        self.sampling = sampling
        return self.make(labels, noise, **sampling)


def stop_at(number, error=KeyboardInterrupt):
    def fail(call, labels):
        if call == number:
            raise error("stopped")

    return fail


LABELS = [0, 1, 2] * 5


@pytest.mark.parametrize("format", ["png", "npz"])
def test_interrupted_and_gone_on_equals_never_interrupted(pipe, tmp_path, monkeypatch, format):
    options = {"format": format, "batch_size": 4, **QUICK}
    write_samples(pipe, LABELS, tmp_path / "whole", **options)
    with monkeypatch.context() as patch:
        Counting(pipe, patch, stop_at(3))
        with pytest.raises(KeyboardInterrupt):
            write_samples(pipe, LABELS, tmp_path / "parts", **options)
    there = [path for path in (tmp_path / "parts").rglob("*") if path.suffix in (".png", ".npy")]
    assert there and len(there) < 15 and not list((tmp_path / "parts").rglob("*.npz"))
    if format == "png":
        there.pop().unlink()  # a batch of which only a part was written
        assert there
    else:
        (tmp_path / "parts" / ".parts" / ".00000008-00000012.npy.1.partial").write_bytes(b"half")
    old = {path: path.stat().st_mtime_ns for path in there}
    with monkeypatch.context() as patch:
        counting = Counting(pipe, patch)
        write_samples(pipe, LABELS, tmp_path / "parts", **{**options, "batch_size": None})  # as it was
    assert len(counting.made) < 15
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert format == "npz" or {path: path.stat().st_mtime_ns for path in there} == old
    with monkeypatch.context() as patch:
        counting = Counting(pipe, patch)
        write_samples(pipe, LABELS, tmp_path / "parts", **options)
    assert counting.made == []


def test_more_pictures_later_are_the_new_ones_alone(pipe, tmp_path, monkeypatch):
    options = {"batch_size": 4, **QUICK}
    for format in ("png", "npz"):
        first = write_samples(pipe, LABELS[:6], tmp_path / format, format=format, **options)
        before = {path: path.stat().st_mtime_ns for path in first}
        with monkeypatch.context() as patch:
            counting = Counting(pipe, patch)
            both = write_samples(pipe, LABELS, tmp_path / format, format=format, **options)
        assert counting.made == LABELS[6:]
        assert {path: path.stat().st_mtime_ns for path in first} == before
    arrays = np.load(both[0])["arr_0"]
    assert np.array_equal(arrays[:6], np.load(first[0])["arr_0"])
    pngs = write_samples(pipe, LABELS, tmp_path / "png", **options)
    assert np.array_equal(arrays, [np.asarray(Image.open(path)) for path in pngs])
    with monkeypatch.context() as patch:
        counting = Counting(pipe, patch)
        fewer = write_samples(pipe, LABELS[:4], tmp_path / "npz", format="npz", **options)
    assert counting.made == [] and np.array_equal(np.load(fewer[0])["arr_0"], arrays[:4])


def test_an_npz_holds_the_same_pictures_and_the_labels(pipe, grey_pipe, tmp_path):
    labels = [2, 0, 1, 1, 2]
    pngs = write_samples(pipe, labels, tmp_path, seed=3, batch_size=2, **QUICK)
    (npz,) = write_samples(pipe, labels, tmp_path, seed=3, batch_size=2, format="npz", **QUICK)
    assert npz == tmp_path / f"samples_5x{SIZE}x{SIZE}x3.npz" and not (tmp_path / ".parts").exists()
    with np.load(npz) as arrays:
        assert arrays.files == ["arr_0", "arr_1"] and arrays["arr_0"].dtype == np.uint8
        assert np.array_equal(arrays["arr_0"], [np.asarray(Image.open(path)) for path in pngs])
        assert arrays["arr_1"].dtype == np.int64 and arrays["arr_1"].tolist() == labels
    with ZipFile(npz) as archive:
        assert archive.testzip() is None and {info.compress_type for info in archive.infolist()} == {ZIP_STORED}
    (grey,) = write_samples(grey_pipe, [0, 2], tmp_path / "grey", format="npz", **QUICK)
    pngs = write_samples(grey_pipe, [0, 2], tmp_path / "grey", **QUICK)
    assert grey.name == "samples_2x16x24x3.npz"
    three = np.stack([np.stack([np.asarray(Image.open(path))] * 3, axis=2) for path in pngs])
    assert np.array_equal(np.load(grey)["arr_0"], three)


def test_pictures_of_other_settings_never_mix(pipe, tmp_path):
    names = ["anna", "ben", "carl"]
    write_samples(pipe, LABELS, tmp_path, overwrite=False, **QUICK)
    (tmp_path / "ID_1" / "drawn_by_hand.png").write_bytes(b"mine")
    before = contents(tmp_path)
    other = trained_looking(tiny_pipeline().denoiser, seed=11)
    guide = other, pipe.conditioner
    for change, message in (
        ({"num_inference_steps": 4}, "num_steps 3 there, 4 here"),
        ({"guidance_scale": 3.0}, "cfg_scale or guide_scale 2.0 there, 3.0 here"),
        ({"guidance_interval": (0.1, 1.0)}, "cfg_interval 0.0,1.0 there, 0.1,1.0 here"),
        ({"timestep_shift": 0.3}, "timestep_shift None there, 0.3 here"),
        ({"guide": guide}, "another guide"),
        ({"names": names}, "folder of label 0 ID_1 there, anna here"),
    ):
        with pytest.raises(UserError, match=rf"holds pictures of other settings \({message}\), .* by --overwrite$"):
            write_samples(pipe, [0, 1], tmp_path, overwrite=False, **{**QUICK, **change})
    trained = LatentDiTPipeline(pipe.vae, other, pipe.conditioner, pipe.scheduler, pipe.people)
    trained.set_progress_bar_config(disable=True)
    with pytest.raises(UserError, match="another model"):
        write_samples(trained, [0], tmp_path, overwrite=False, **QUICK)
    trained.denoiser, trained.scheduler = pipe.denoiser, make_solver(time_shift=2.0)
    with pytest.raises(UserError, match=r"solver's shift 1\.0 there, 2\.0 here"):
        write_samples(trained, [0], tmp_path, overwrite=False, **QUICK)
    assert contents(tmp_path) == before
    trained.scheduler = make_solver()
    write_samples(trained, [0, 0, 2], tmp_path, seed=7, overwrite=False, **QUICK)  # the same model: they stand beside
    assert contents(tmp_path).items() >= {k: v for k, v in before.items() if k.endswith(".png")}.items()


def test_a_new_training_replaces_the_old_pictures(pipe, tmp_path):
    """As notebook 04 is run again: pictures of the old model would otherwise stay where fewer are made now."""
    write_samples(pipe, LABELS, tmp_path, **QUICK)
    write_samples(pipe, LABELS, tmp_path, format="npz", **QUICK)
    (tmp_path / "ID_1" / "drawn_by_hand.png").write_bytes(b"mine")
    trained = tiny_pipeline()
    trained_looking(trained.denoiser, seed=11)
    new = write_samples(trained, [0, 1], tmp_path, **QUICK)
    assert sorted(contents(tmp_path)) == [
        "ID_1/drawn_by_hand.png",
        "ID_1/seed0_00000.png",
        "ID_2/seed0_00000.png",
        "samples.json",
    ]
    elsewhere = write_samples(trained, [0, 1], tmp_path / "new", **QUICK)
    assert [path.read_bytes() for path in new] == [path.read_bytes() for path in elsewhere]


def test_a_set_keeps_its_precision(pipe, tmp_path, monkeypatch, capsys):
    options = {"overwrite": False, **QUICK}
    write_samples(pipe, [0, 1], tmp_path, precision="bf16", **options)
    before = contents(tmp_path)
    assert json.loads(before["samples.json"])["settings"]["precision"] == "bf16"
    with pytest.raises(UserError, match=r"\(precision bf16 there, 32 here\)"):
        write_samples(pipe, [0, 1, 2], tmp_path, precision="32", **options)
    capsys.readouterr()
    write_samples(pipe, [0, 1, 2], tmp_path, **options)
    said = "going on in bf16, as what is there was made; --overwrite --precision 32 makes it anew in float32\n"
    assert capsys.readouterr().err.startswith(said)
    write_samples(pipe, [0, 1, 2], tmp_path / "whole", precision="bf16", batch_size=3, **options)
    new = contents(tmp_path / "whole")["ID_3/seed0_00000.png"]
    assert np.abs(picture(contents(tmp_path)["ID_3/seed0_00000.png"]) - picture(new)).max() <= 1
    assert contents(tmp_path).items() >= {k: v for k, v in before.items() if k.endswith(".png")}.items()
    monkeypatch.setattr(sample_sets, "precisions_for", lambda pipe, name: ["32"])  # a machine without bf16
    with pytest.raises(UserError, match=r"\(precision bf16 there, 32 here\)"):
        write_samples(pipe, [0, 1, 2], tmp_path, **options)


def test_a_folder_of_before_there_was_a_choice_goes_on_in_float32(pipe, tmp_path, monkeypatch):
    write_samples(pipe, [0], tmp_path, **QUICK)
    record = json.loads((tmp_path / "samples.json").read_text())
    del record["settings"]["precision"]
    (tmp_path / "samples.json").write_text(json.dumps(record))
    with monkeypatch.context() as patch:
        counting = Counting(pipe, patch)
        patch.setattr(sample_sets, "precisions_for", lambda pipe, name: ["bf16", "32"])  # as on a GPU
        write_samples(pipe, [0, 1], tmp_path, overwrite=False, **QUICK)
        assert counting.made == [1] and counting.sampling["precision"] == "32"
        write_samples(pipe, [0, 1], tmp_path, **{**QUICK, "guidance_scale": 1.0})  # replaced: there is a choice again
        assert counting.made[1:] == [0, 1] and counting.sampling["precision"] == "bf16"


def picture(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(png))).astype(int)


def test_pictures_of_which_nothing_is_known(pipe, tmp_path):
    write_samples(pipe, [0, 1], tmp_path, **QUICK)
    (tmp_path / "samples.json").write_text("{")
    with pytest.raises(UserError, match=r"samples\.json, which says how they were made, is missing"):
        write_samples(pipe, [1], tmp_path, overwrite=False, **QUICK)
    write_samples(pipe, [1], tmp_path, **QUICK)
    assert sorted(contents(tmp_path)) == ["ID_2/seed0_00000.png", "samples.json"]
    shutil.rmtree(tmp_path / "ID_2")  # by hand: nothing is left to mix with
    write_samples(pipe, [1], tmp_path, overwrite=False, **{**QUICK, "guidance_scale": 1.0})


def test_an_npz_of_another_order_is_another_one(pipe, tmp_path):
    options = {"format": "npz", "overwrite": False, **QUICK}
    write_samples(pipe, LABELS, tmp_path, **options)
    pngs = write_samples(pipe, LABELS, tmp_path, **{**options, "format": "png"})
    for change, message in (
        ({"labels": [0, 1, 1]}, "labels 0,1,2 there, 0,1,1 here"),
        ({"seed": 2}, "seed 0 there, 2 here"),
    ):
        with pytest.raises(UserError, match=message):
            write_samples(pipe, **{"labels": LABELS, "output_dir": tmp_path, **options, **change})
    (npz,) = write_samples(pipe, [0, 1, 1], tmp_path, **{**options, "overwrite": True})
    assert [path.name for path in tmp_path.glob("*.npz")] == [npz.name] and np.load(npz)["arr_1"].tolist() == [0, 1, 1]
    assert all(path.is_file() for path in pngs)  # their order matters to nobody


def test_where_the_memory_does_not_suffice_fewer_are_made_at_once(tmp_path, monkeypatch, capsys):
    pipe = tiny_pipeline()

    def full(call, labels):
        if len(labels) > 3:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    alone = write_samples(pipe, LABELS, tmp_path / "alone", batch_size=1, **QUICK)
    capsys.readouterr()
    with monkeypatch.context() as patch:
        counting = Counting(pipe, patch, full)
        written = write_samples(pipe, LABELS, tmp_path / "full", batch_size=8, **QUICK)
    assert counting.sizes == [8, 4, 2, 2, 2, 2, 2, 2, 2, 1]
    assert capsys.readouterr().err.splitlines()[:2] == [
        "8 pictures at once do not fit the memory: making 4",
        "4 pictures at once do not fit the memory: making 2",
    ]
    with monkeypatch.context() as patch:
        counting = Counting(pipe, patch, full)
        pictures(pipe, [0] * 5)
        assert counting.sizes == [2, 2, 1]  # what did not fit is not tried again
    for mine, theirs in zip(written, alone, strict=True):
        assert abs(np.asarray(Image.open(mine)).astype(int) - np.asarray(Image.open(theirs))).max() <= 1
    pipe = tiny_pipeline()
    with monkeypatch.context() as patch:
        counting = Counting(pipe, patch, full)
        assert len(pictures(pipe, [0] * 5)) == 5 and counting.sizes == [5, 2, 2, 1]
        Counting(pipe, patch, stop_at(1, torch.cuda.OutOfMemoryError))
        with pytest.raises(UserError, match="memory is too small for one picture"):
            write_samples(pipe, [0], tmp_path / "none", **QUICK)


def test_the_usual_batch_fits_the_memory(pipe, monkeypatch):
    assert default_batch_size(pipe) == 64
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": 2**20}  # 4 GiB, of which a quarter
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)
    for side, expected in ((256, 64), (512, 16), (8192, 1)):  # 8 channels: 240 bytes a pixel, 15 MiB of 256×256
        monkeypatch.setattr(type(pipe), "picture_size", (side, side))
        assert default_batch_size(pipe) == expected
    monkeypatch.setattr(type(pipe), "_execution_device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**34))  # another process has the rest
    monkeypatch.setattr(type(pipe), "picture_size", (512, 512))
    assert default_batch_size(pipe) == 8  # 0.8 GiB for 60 MiB each
    with monkeypatch.context() as patch:
        patch.setattr(type(pipe.vae), "dtype", torch.float16)
        assert default_batch_size(pipe) == 16


def test_a_card_without_room_for_the_models_is_named(monkeypatch):
    pipe = tiny_pipeline()

    def full(device):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(pipe, "to", full)
    with pytest.raises(UserError, match=r"^The models take 0\.0 GiB, for which cuda:1 has no room: end what else runs"):
        portions.placed(pipe, "cuda:1")


def test_processes_that_share_a_model_ask_it_equally_often(pipe, monkeypatch):
    monkeypatch.setattr(portions, "_is_shared", lambda pipe: True)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor, op: tensor.fill_(5))  # another one's card
    assert default_batch_size(pipe) == 4
    Counting(pipe, monkeypatch, stop_at(1, torch.cuda.OutOfMemoryError))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        pictures(pipe, [0])


def test_settings_that_cannot_be_leave_nothing_behind(pipe, tmp_path):
    for change, message in (
        ({"num_inference_steps": 0}, "at least one step"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"format": "gif"}, "No format 'gif'; there are png, npz"),
        ({"labels": []}, "No labels"),
        ({"names": ["anna"]}, r"has 1 names, the model 3 classes: .* from label 0 \(ID_1\) to label 2 \(ID_3\)"),
    ):
        with pytest.raises(UserError, match=message):
            write_samples(pipe, **{"labels": [0], "output_dir": tmp_path / "out", **QUICK, **change})
    assert not (tmp_path / "out").exists()


def test_a_folder_with_an_rae_is_read_by_whoever_has_not_imported_it(tmp_path):
    from vavae_tools.autoencoders.rae import tiny_rae
    from vavae_tools.diffusion.ddt import DDT

    denoiser = DDT(4, 1, 64, (16, 32), (1, 1), 2)
    rae = tiny_rae(latents_mean=[0.0] * 64, latents_std=[1.0] * 64)
    LatentDiTPipeline(rae, denoiser, ClassConditioner(2, 16), make_solver()).save_pretrained(tmp_path)
    load = "from vavae_tools.pipelines.classes import load_pipeline"
    script = f"{load}; print(type(load_pipeline({str(tmp_path)!r}).vae))"
    done = subprocess.run([python(), "-c", script], capture_output=True, text=True, timeout=120)
    assert "vavae_tools.autoencoders.rae.RAE" in done.stdout, done.stderr
