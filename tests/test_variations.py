"""Images from images: noised and denoised, with a part kept, and on the way from one to another."""

import numpy as np
import pytest
import torch
from PIL import Image
from test_sampling import MEAN, STD, best
from test_writer import together
from tiny import SIZE, contents, noise, random_images, refuses, same, tiny_pipeline

from vavae_tools.data.images import to_pixels
from vavae_tools.diffusion.objectives import FlowMatching, make_objective
from vavae_tools.diffusion.solvers import make_solver, sample, solvers_for
from vavae_tools.diffusion.variations import Start, invert, slerp
from vavae_tools.pipelines.classes import load_pipeline
from vavae_tools.pipelines.writer import write_samples
from vavae_tools.sample import main

QUICK = {"num_inference_steps": 4, "output_type": "pt"}
OBJECTIVES = {name: make_objective(name) for name in ("flow_matching", "epsilon", "x0")}
OBJECTIVES["gvp"] = FlowMatching(path="gvp")
SOLVED = [(name, solver) for name, objective in OBJECTIVES.items() for solver in solvers_for(objective)]
DATA, NOISE = torch.randn(2, 3, 1, 4, 4, generator=torch.Generator().manual_seed(0))


def sampled(name, solver, start=None, steps=6, z=NOISE):
    objective = OBJECTIVES[name]
    given = make_solver(solver, objective), z, torch.zeros(3, 1)
    return sample(best(objective), *given, num_inference_steps=steps, objective=objective, start=start)


@pytest.fixture(scope="module")
def pipe():
    return tiny_pipeline()


# ---- from a time on
@pytest.mark.parametrize(("name", "solver"), SOLVED)
def test_strength_goes_from_the_data_to_noise_alone(name, solver):
    assert same(sampled(name, solver, Start(DATA)), sampled(name, solver))
    torch.testing.assert_close(sampled(name, solver, Start(DATA, 1e-5)), DATA, rtol=0, atol=1e-3)
    mask = torch.arange(16).view(1, 1, 4, 4).expand(3, -1, -1, -1) % 3 == 0
    for strength in (0.5, 1.0):
        made = sampled(name, solver, Start(DATA, strength, mask))
        assert torch.equal(made[~mask], DATA[~mask]) and (made[mask] != DATA[mask]).all()


@pytest.mark.parametrize(("name", "solver"), [pair for pair in SOLVED if pair[1] not in ("sde", "ddpm")])
def test_what_begins_on_the_way_goes_where_the_flow_goes(name, solver):
    t = torch.full((3,), 0.4)
    alpha, sigma = (share.view(-1, 1, 1, 1) for share in OBJECTIVES[name].shares(t))
    x = alpha * DATA + sigma * NOISE
    expected = MEAN + STD * (x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2).sqrt()
    errors = [(sampled(name, solver, Start(DATA, 0.6), n) - expected).abs().max() for n in (13, 104)]
    assert errors[1] < max(errors[0] / 3, 2e-3) and errors[1] < 0.06  # a schedule begins at the nearest step


@pytest.mark.parametrize(("strength", "calls"), [(1.0, 8), (0.51, 5), (0.5, 4), (0.01, 1)])
def test_the_steps_that_are_left_out_cost_nothing(strength, calls):
    made, objective = [], OBJECTIVES["flow_matching"]

    def counted(*given):
        made.append(given)
        return best(objective)(*given)

    sample(counted, make_solver(), NOISE, torch.zeros(3, 1), num_inference_steps=8, start=Start(DATA, strength))
    assert len(made) == calls and made[0][1][0] == pytest.approx(1 - strength)


# ---- back to noise
@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_noise_of_data_is_found_and_makes_them(name):
    objective = OBJECTIVES[name]
    given = best(objective), make_solver(None, objective), DATA, torch.zeros(3, 1), 10
    step = "ddim" if objective.path == "discrete" else "euler"
    found = [invert(*given, objective=objective, rounds=rounds) for rounds in (1, 3, 10)]
    errors = [(sampled(name, step, None, 10, z) - DATA).abs().max() for z in found]
    assert errors[1] < errors[0] / 5 and errors[2] < 1e-3
    x = invert(*given, 0.5, objective=objective, rounds=10)
    torch.testing.assert_close(sampled(name, step, Start(None, 0.5), 10, x), DATA, rtol=0, atol=1e-3)


def test_an_arc_ends_at_its_ends_and_keeps_the_length_of_noise():
    one, other = torch.randn(2, 8, 16, 16, generator=torch.Generator().manual_seed(1))
    made = slerp(one, other, torch.tensor([0.0, 0.5, 1.0]))
    assert same(made[0], one) and same(made[2], other)
    assert made[1].norm() == pytest.approx(((one.norm() + other.norm()) / 2).item(), rel=1e-3)
    assert same(slerp(one, one, torch.tensor([0.3]))[0], one)


# ---- of a pipeline
GIVEN = Image.fromarray(noise(SIZE, SIZE, 3, seed=1))
HALF = Image.fromarray(np.repeat(np.uint8([[0, 255]]), SIZE, 0)).resize((SIZE, SIZE), Image.Resampling.NEAREST)


def made(pipe, labels=(0, 1), **options):
    return pipe(list(labels), generator=torch.Generator().manual_seed(2), **QUICK, **options).images


@torch.no_grad()
def latents_of(pipe, images, labels):
    return pipe.encode_images(images, torch.tensor(labels))


def test_an_image_comes_back_as_its_reconstruction_or_as_noise_alone(pipe):
    pixels = pipe.pixels_of(GIVEN)
    for whose in ([0, 1], [2, 2]):
        data = latents_of(pipe, pixels.expand(2, -1, -1, -1), whose)
        decoded = to_pixels(pipe.vae.decode_latents(data, torch.tensor([0, 1])))
        back = made(pipe, image=GIVEN, strength=1e-6, image_labels=whose)
        assert (back.int() - decoded.int()).abs().max() <= 1
    assert same(made(pipe, image=GIVEN, strength=1), made(pipe))
    usual = made(pipe, image=GIVEN)
    assert same(usual, made(pipe, image=[GIVEN, pixels[0]][:1], strength=0.6)) and not same(usual, made(pipe))
    assert same(made(pipe, image=pixels.expand(2, -1, -1, -1)), usual)


def test_what_a_mask_keeps_is_kept(pipe, monkeypatch):
    seen, decode = [], pipe.vae.decode_latents
    monkeypatch.setattr(pipe.vae, "decode_latents", lambda z, labels: seen.append(z) or decode(z, labels))
    data = latents_of(pipe, pipe.pixels_of(GIVEN).expand(2, -1, -1, -1), [0, 1])
    for mask in (HALF, torch.tensor(np.array(HALF)), torch.tensor(np.array(HALF)) > 0):
        whole = made(pipe, image=GIVEN, mask_image=mask)
        assert torch.equal(seen[-1][..., :4], data[..., :4]) and (seen[-1][..., 4:] != data[..., 4:]).all()
        assert same(whole, made(pipe, image=GIVEN, mask_image=mask, strength=1))
    one = torch.zeros(SIZE, SIZE)
    one[5, 9] = 1  # of the four pixels of a latent
    made(pipe, image=GIVEN, mask_image=one)
    assert (seen[-1] != data).nonzero()[:, 2:].unique(dim=0).tolist() == [[2, 4]]


@pytest.mark.parametrize("strength", [0.8, 1.0])
def test_interpolation_goes_from_the_one_to_the_other(pipe, strength):
    other = Image.fromarray(noise(SIZE, SIZE, 3, seed=2))
    pipe.swap_solver("heun")
    between = pipe.interpolate("ID_2", GIVEN, other, 5, 20, strength, output_type="pt").images
    assert type(pipe.scheduler).__name__ == "FlowMatchHeunDiscreteScheduler"  # as it was
    pipe.swap_solver("euler")
    for image, at in ((GIVEN, 0), (other, -1)):
        decoded = to_pixels(pipe.vae.decode_latents(latents_of(pipe, pipe.pixels_of(image), [1]), torch.tensor([1])))
        assert (between[at].int() - decoded[0].int()).abs().max() <= 1
    assert len(between.flatten(1).unique(dim=0)) == 5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5}, "strength without an image: give image, too"),
        ({"mask_image": HALF}, "mask_image without an image"),
        ({"image": GIVEN, "strength": 0}, "strength 0: it is above 0, the image itself, and up to 1, noise alone"),
        ({"image": GIVEN, "strength": 1.5}, "strength 1.5: it is above 0"),
        ({"image": GIVEN, "strength": float("nan")}, "strength nan: it is above 0"),
        ({"image": "a.png"}, r"image is str, expected Pillow images \(Image.open\) or a tensor"),
        ({"image": []}, "image is an empty list, expected Pillow"),
        ({"image": [GIVEN] * 3}, "3 images for 2 labels: give one for all, or one for each"),
        ({"image": random_images(8)}, r"image has the shape \(2, 3, 8, 8\), expected \(N, 3, 16, 16\)"),
        ({"image": GIVEN, "image_labels": ["ID_9"]}, "Nobody called 'ID_9'"),
        ({"image": GIVEN, "image_labels": [0] * 3}, "3 image labels for 2 labels"),
        ({"image": GIVEN, "mask_image": HALF.resize((8, 4))}, "mask_image has 4×8 pixels, expected 16×16 as the"),
        ({"image": GIVEN, "mask_image": torch.zeros(2, 16, 16)}, "mask_image is black everywhere"),
    ],
)
def test_what_cannot_be_varied_is_said(pipe, options, message):
    refuses(message, made, pipe, **options)


# ---- of files, by the command
@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """pipeline/, people/ID_1/ with two images and people/ID_3/ with one, mask.png, small.png. Do not write into it."""
    folder = tmp_path_factory.mktemp("given")
    tiny_pipeline().save_pretrained(folder / "pipeline")
    for number, name in enumerate(("ID_1/0", "ID_1/1", "ID_3/0")):
        path = folder / f"people/{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(noise(SIZE, SIZE, 3, seed=number)).save(path)
    HALF.save(folder / "mask.png")
    HALF.resize((8, 4)).save(folder / "small.png")
    (folder / "empty").mkdir()
    (folder / "broken.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture
def command(folder, monkeypatch, run_main, tmp_path):
    monkeypatch.chdir(tmp_path)
    usual = ["--checkpoint", folder / "pipeline", "--num_steps", 3, "--batch_size", 2, "--accelerator", "cpu"]
    return lambda *words: run_main(main, *usual, *(str(word).replace("@", f"{folder}/") for word in words))


def test_images_of_people_are_varied_as_their_own(command, folder, tmp_path):
    status, said, _ = command("--image", "@people", "--strength", 1e-6, "--output_dir", "own")
    assert status == 0 and said.startswith("written: 3 images of 2 people")
    pipe = load_pipeline(folder / "pipeline")
    for place, label, name in ((0, 0, "ID_1/0"), (1, 0, "ID_1/1"), (0, 2, "ID_3/0")):
        data = latents_of(pipe, pipe.pixels_of(Image.open(folder / f"people/{name}.png")), [label])
        decoded = to_pixels(pipe.vae.decode_latents(data, torch.tensor([label])))[0].permute(1, 2, 0)
        found = np.asarray(Image.open(tmp_path / f"own/ID_{label + 1}/seed0_{place:05d}.png"))
        assert abs(found.astype(int) - decoded.numpy()).max() <= 1
    assert command("--image", "@people", "--strength", 1e-6, "--output_dir", "own")[1] == said
    assert "strength 1e-06 there, 0.6 here" in command("--image", "@people", "--output_dir", "own")[2]
    assert "another image" in command("--image", "@people/ID_1", "--strength", 1e-6, "--output_dir", "own")[2]


def test_noise_alone_is_plain_sampling_and_a_mask_is_passed_on(command, folder, tmp_path):
    words = "--labels", "ID_2,ID_3", "--num_samples", 5
    assert command(*words, "--output_dir", "plain")[0] == 0
    assert command(*words, "--image", "@people/ID_1", "--strength", 1, "--output_dir", "noise")[0] == 0
    pixels = {path.name: path.read_bytes() for path in (tmp_path / "plain").glob("*/*.png")}
    assert pixels == {path.name: path.read_bytes() for path in (tmp_path / "noise").glob("*/*.png")}
    assert command(*words, "--image", "@people/ID_1", "--mask", "@mask.png", "--output_dir", "kept")[0] == 0
    made = {
        "num_inference_steps": 3,
        "mask_image": folder / "mask.png",
        "batch_size": 2,
        "image": folder / "people/ID_1",
    }
    write_samples(folder / "pipeline", [1, 2, 1, 2, 1], tmp_path / "same", **made)
    assert contents(tmp_path / "same") == contents(tmp_path / "kept")


def test_images_between_two_are_written_by_any_number_of_processes(command, folder, tmp_path):
    words = "--interpolate", "@people/ID_1/0.png", "@people/ID_3/0.png", "--num_steps", 20
    status, said, _ = command(*words, "--labels", "ID_2", "--num_samples", 5, "--output_dir", "one")
    assert status == 0 and said.startswith("written: 5 images of 1 people")
    pipes, two = [load_pipeline(folder / "pipeline") for _ in range(2)], tmp_path / "two"
    ends = tuple(folder / f"people/{name}/0.png" for name in ("ID_1", "ID_3"))
    made = {"num_inference_steps": 20, "batch_size": 2, "interpolate": ends}
    together(lambda ranks: write_samples(pipes[ranks.rank], [1] * 5, two, ranks=ranks, **made))
    assert contents(two) == contents(tmp_path / "one")
    pipe, images = pipes[0], [Image.open(path) for path in ends]
    expected = pipe.interpolate(1, *images, 5, 20, image_labels=[0, 2], output_type="np").images
    for number, image in enumerate(expected):
        found = np.asarray(Image.open(two / f"ID_2/seed0_{number:05d}.png"))
        assert abs(found.astype(int) - image).max() <= 1
    assert "between 5 there, 6 here" in command(*words, "--labels", 1, "--num_samples", 6, "--output_dir", "one")[2]
    assert command(*words, "--output_dir", "eight")[1].startswith("written: 16 images of 2 people")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--strength 0.5", "--strength without --image: name the image"),
        ("--mask @mask.png", "--mask without --image"),
        ("--image @nobody.png", "No such image or folder: "),
        ("--image @empty", "No images (png, jpg, jpeg, bmp, "),
        ("--image @broken.png", "broken.png"),
        ("--image @people --strength 0", "strength 0: it is above 0"),
        ("--image @people --mask @small.png", "small.png has 4×8 pixels, expected 16×16 as the images"),
        ("--image @people --mask @broken.png", "broken.png"),
        ("--image @people --mask @nobody.png", "nobody.png"),
        ("--interpolate @people/ID_1/0.png @people", "interpolate goes from one image to another, and 4 were given"),
        ("--interpolate @mask.png @mask.png --num_samples 1 --labels 0", "at least the two images themselves"),
        ("--interpolate @mask.png @mask.png --cfg_scale 2", "--interpolate with --cfg_scale: it goes between two"),
        ("--interpolate @mask.png @mask.png --image @people", "--interpolate with --image"),
    ],
)
def test_what_cannot_be_made_is_said_in_a_line(command, tmp_path, words, message):
    status, _, err = command(*words.split(), "--output_dir", "out")
    assert status == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err, err
    assert list(tmp_path.iterdir()) == []
