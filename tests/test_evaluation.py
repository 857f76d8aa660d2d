import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import SIZE as TINY_SIZE
from tiny import perturb_projections, refuses, tiny_vavae

from vavae_tools import evaluate
from vavae_tools.autoencoders.vavae import reconstruct, reconstruct_images
from vavae_tools.data.datasets import ImageDataModule
from vavae_tools.data.demo.gait import write_gait_dataset
from vavae_tools.data.images import ImageFolder, to_pixels, to_unit
from vavae_tools.data.split import split_folders
from vavae_tools.evaluation import classifier as classifier_module
from vavae_tools.evaluation.classifier import PersonClassifier, augment, cached_classifier, train_classifier
from vavae_tools.evaluation.reconstructions import (
    compare_conditions,
    decode_as_people,
    evaluate_reconstructions,
    evaluate_vavae,
)
from vavae_tools.evaluation.report import evaluate_images
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError

SIZE = 32


def image(person, rng):
    """Stripes whose distance tells the person, anywhere in time, in noise."""
    across, extra_fields = np.meshgrid(np.arange(SIZE), np.arange(SIZE), indexing="ij")
    wave = np.sin(2 * np.pi * (across * (person + 2) / SIZE + extra_fields / SIZE + rng.uniform()))
    grey = 128 + 70 * wave + rng.normal(0, 20, (SIZE, SIZE))
    return Image.fromarray(np.stack([grey, 255 - grey, grey / 2], axis=2).clip(0, 255).astype(np.uint8))


def write_people(folder, people, count, seed):
    rng = np.random.default_rng(seed)
    for person in people:
        (folder / f"ID_{person}").mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image(person, rng).save(folder / f"ID_{person}" / f"{i:03d}.png")
    return folder


def copy_subset(subset, folder, rename=lambda name: name):
    for person in subset.iterdir():
        shutil.copytree(person, folder / rename(person.name))
    return folder


@pytest.fixture(scope="module")
def split(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_people(folder / "people", (1, 2, 3), 40, seed=0)
    split_folders(folder / "people", folder / "split", 0.7, 0.3, progress=False)
    return folder / "split"


@pytest.fixture(scope="module")
def trained(split, tmp_path_factory):
    """A folder with a classifier in it, so that the tests train once."""
    folder = tmp_path_factory.mktemp("classifier")
    return folder, cached_classifier(ImageFolder(split / "train", SIZE), 3, folder, progress=False)


@pytest.fixture
def run(split, trained, tmp_path):
    """Evaluate images with the classifier that is there."""

    def evaluate_there(generated, data_dir=split, **settings):
        (tmp_path / "out").mkdir(exist_ok=True)
        shutil.copy(trained[0] / "classifier.safetensors", tmp_path / "out")
        return evaluate_images(generated, data_dir, tmp_path / "out", progress=False, **{"seeds": 1, **settings})

    return evaluate_there


# ---- the classifier


def test_the_classifier_learns_the_persons(split, trained):
    validation = ImageFolder(split / "val", SIZE)
    features, named = trained[1].judge(validation)
    assert features.shape == (36, 128) and (named == validation.labels).float().mean() >= 0.95
    torch.testing.assert_close(trained[1].judge(validation.in_memory(), batch_size=7)[0], features)


def test_training_follows_its_seed_and_leaves_the_global_random_numbers_alone(split):
    train, before = ImageFolder(split / "train", SIZE), torch.get_rng_state()
    made = [train_classifier(train, 3, steps=3, seed=seed, progress=False).state_dict() for seed in (1, 1, 2)]
    first, again, other = (weights["head.weight"] for weights in made)
    assert torch.get_rng_state().equal(before) and first.equal(again) and not first.equal(other)


def test_into_a_file_go_no_bars(split, tmp_path, capsys):
    train_classifier(ImageFolder(split / "train", SIZE), 3, steps=3)
    write_gait_dataset(tmp_path, 1, 2, SIZE, workers=1)
    assert capsys.readouterr().err == ""


def test_the_classifier_is_trained_once_for_the_same_images(split, tmp_path, monkeypatch):
    shutil.copytree(split / "train", tmp_path / "train")
    calls = []

    def train_briefly(train, num_classes, **settings):
        calls.append(settings["seed"])
        return train_classifier(train, num_classes, 2, settings["seed"], progress=False)

    monkeypatch.setattr(classifier_module, "train_classifier", train_briefly)

    def get(seed=1, size=48):
        return cached_classifier(ImageFolder(tmp_path / "train", size), 3, tmp_path / "out", seed, progress=False)

    first, kept = get(0, SIZE), get(0, SIZE)
    x = torch.randn(2, 3, SIZE, SIZE)
    torch.testing.assert_close(kept(x), first(x))
    get(1, SIZE)
    get()
    assert calls == [0, 1, 1]
    image(1, np.random.default_rng(9)).save(next((tmp_path / "train" / "ID_2").iterdir()))
    get()
    (tmp_path / "out" / "classifier_1.safetensors").write_bytes(b"cut off")
    get()
    assert len(calls) == 5


def test_augmentation_follows_its_draws_and_mirrors_nothing():
    ramp = torch.arange(0, 256, 8, dtype=torch.uint8).expand(50, 3, 32, 32).contiguous()  # rises with time
    changed = augment(ramp, Draws(0, 1, torch.arange(50)))
    assert changed.equal(augment(ramp, Draws(0, 1, torch.arange(50))))
    rise = changed.mean(dim=(1, 2))  # (50, 32)
    assert (rise[:, -1] - rise[:, 0] > 1.4).all() and (changed - to_unit(ramp)).abs().mean() < 0.3


# ---- generated images


def test_real_images_pass_for_real(split, run, tmp_path):
    result = run(copy_subset(split / "val", tmp_path / "made"))
    swapped = run(copy_subset(split / "val", tmp_path / "swapped", lambda name: f"ID_{int(name[3]) % 3 + 1}"))
    assert swapped.total.generated_accuracy < 0.05
    assert swapped.distances.kernel_generated.low > swapped.distances.kernel_real.high
    assert result.image_size == (SIZE, SIZE)
    assert result.total.generated_accuracy == result.total.validation_accuracy >= 0.95
    assert {name: score.generated for name, score in result.people.items()} == {"ID_1": 12, "ID_2": 12, "ID_3": 12}
    assert result.distances.images == 36
    assert result.distances.frechet_generated < 1e-6 < result.distances.frechet_real
    assert result.copies.times_validation == pytest.approx(1)
    assert result.copies.generated_within == result.copies.validation_within
    assert result.notes == []


def test_images_without_variety_cover_little_of_what_is_real(split, run, tmp_path):
    for person in (1, 2, 3):
        (tmp_path / "made" / f"ID_{person}").mkdir(parents=True)
        first = sorted((split / "val" / f"ID_{person}").iterdir())[0]
        for i in range(12):
            shutil.copy(first, tmp_path / "made" / f"ID_{person}" / f"{i}.png")
    found = run(tmp_path / "made").distances
    made, real = found.neighbourhoods_generated, found.neighbourhoods_real
    assert list(made) == list(real) == ["precision", "recall", "density", "coverage"]
    assert made["coverage"].high < real["coverage"].low and made["recall"].high < real["recall"].low
    assert made["precision"].value >= real["precision"].low
    assert "coverage [95 %]" in str(found) and "(36 images in each set;" in str(found)


def test_copies_of_training_images_are_found(split, run, tmp_path):
    for person in (1, 2, 3):
        (tmp_path / "made" / f"ID_{person}").mkdir(parents=True)
        for path in sorted((split / "train" / f"ID_{person}").iterdir())[:5]:
            shutil.copy(path, tmp_path / "made" / f"ID_{person}" / f"copy_{path.name}")
    result = run(tmp_path / "made")
    assert result.copies.generated_within == 1 and result.copies.times_validation == pytest.approx(0, abs=1e-3)
    assert [one.generated.replace("copy_", "") for one in result.nearest] == [one.training for one in result.nearest]
    assert max(one.pixel_distance for one in result.nearest) == 0


def test_what_is_written_and_printed(split, run, tmp_path, run_main):
    result = run(write_people(tmp_path / "made", (1, 3), 6, seed=5))
    out = tmp_path / "out"
    written = json.loads((out / "evaluation.json").read_text())
    assert written["total"]["generated"] == 12 and list(written["people"]) == ["ID_1", "ID_3"]
    assert written["distances"]["times_real"] == pytest.approx(result.distances.times_real)
    assert len(written["nearest"]) == 12 and written["image_size"] == [SIZE, SIZE]
    assert written["verdict"] == result.verdict and "too few images for more of a verdict: 12" in result.verdict[-1]
    for name in written["figures"]:
        assert Image.open(out / "figures" / f"{name}.png").size[0] > 200
    assert not list(out.rglob("*.partial"))
    text = str(result)
    assert text.startswith("a missing person: no generated images of ID_2") and str(out) in text.splitlines()[-1]
    assert "\n12 generated images of 2 persons, 32×32 (" in text
    assert "Fréchet distance" in text and "kernel distance" in text and "nearest training image" in text
    flags = ["--generated_dir", tmp_path / "made", "--data_dir", split, "--output_dir", out, "--seeds", 1]
    assert run_main(evaluate.main, *flags)[:2] == (0, f"{text}\n")  # the same seed, the same numbers


def test_the_size_can_be_chosen_and_mixed_sizes_are_named(split, run, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier_module, "default_steps", lambda images: 2)
    made = write_people(tmp_path / "made", (1, 2), 4, seed=5)
    Image.open(made / "ID_1" / "000.png").resize((40, 48)).save(made / "ID_1" / "000.png")
    assert any("2 sizes, all are resized to 32×32" in note for note in run(made).notes)
    assert run(made, image_size=(16, 48)).image_size == (16, 48)
    refuses("at least 16", run, made, image_size=8)


def test_without_validation_images_the_rest_is_said(split, run, tmp_path):
    copy_subset(split / "train", tmp_path / "split" / "train")
    shutil.copy(split / "split_info.json", tmp_path / "split")
    result = run(write_people(tmp_path / "made", (1, 2, 3), 4, seed=5), tmp_path / "split")
    assert result.distances is result.total.validation_accuracy is result.copies.times_validation is None
    assert result.total.generated_accuracy > 0.8
    assert any("no real validation images" in note for note in result.notes) and "note: no real" in str(result)


def test_too_few_images_of_a_person_are_named(run, tmp_path):
    made = write_people(tmp_path / "made", (1, 2), 5, seed=5)
    write_people(made, (3,), 2, seed=6)
    result = run(made)
    assert result.distances.images == 10
    assert any(note.startswith("ID_3: fewer than 4") and "leave them out" in note for note in result.notes)


def test_one_person_only(tmp_path):
    write_people(tmp_path / "people", (1,), 20, seed=0)
    split_folders(tmp_path / "people", tmp_path / "split", 0.6, 0.4, progress=False)
    made = write_people(tmp_path / "made", (1,), 8, seed=5)
    result = evaluate_images(made, tmp_path / "split", tmp_path / "out", progress=False, seeds=2)
    assert result.total.generated_accuracy is None and any("one person only" in note for note in result.notes)
    assert result.distances.frechet_generated > 0 and "right_person" not in result.figures
    assert not (tmp_path / "out" / "classifier.safetensors").exists()
    str(result)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: folder.mkdir(), r"No generated images in .*made; it holds nothing.*ID_1/, ID_2/, ID_3/"),
        (lambda folder: None, "No such folder"),
        (lambda folder: write_people(folder, (7,), 1, 0), "images of ID_7, but .* knows ID_1, ID_2, ID_3. Rename"),
        (lambda folder: ((folder / "ID_1").mkdir(parents=True), (folder / "ID_1/a.png").write_bytes(b"x")), "a.png"),
    ],
)
def test_bad_input_is_said_and_nothing_written(split, tmp_path, make, message):
    make(tmp_path / "made")
    with pytest.raises(UserError, match=message) as caught:
        evaluate_images(tmp_path / "made", split, tmp_path / "out", progress=False)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


# ---- grey images that are not square


HEIGHT, WIDTH = 24, 40


def write_grey(folder, people, count, seed, mode="L"):
    """As `write_people`, in grey, 24×40."""
    for path in write_people(folder, people, count, seed).glob("*/*.png"):
        Image.open(path).getchannel(0).resize((WIDTH, HEIGHT)).convert(mode).save(path)
    return folder


def test_grey_images_that_are_not_square_are_judged(tmp_path):
    write_grey(tmp_path / "people", (1, 2, 3), 40, seed=0)
    out, grey_split = tmp_path / "out", tmp_path / "split"
    split_folders(tmp_path / "people", grey_split, 0.7, 0.3, progress=False)
    made = write_grey(tmp_path / "made", (1, 2, 3), 8, seed=5)
    result = evaluate_images(made, grey_split, out, progress=False, seeds=1)
    assert result.image_size == (HEIGHT, WIDTH) and result.notes == []
    assert result.total.generated_accuracy > 0.9 and result.total.validation_accuracy > 0.9
    assert result.distances.times_real < 10
    assert "\n24 generated images of 3 persons, 24×40 (" in str(result)
    figure = np.asarray(Image.open(out / "figures" / "real_and_generated.png").convert("RGB")).astype(int)
    assert np.ptp(figure, axis=2).max() == 0  # grey everywhere
    # the same images stored in colour have the same numbers
    in_colour = write_grey(tmp_path / "coloured", (1, 2, 3), 8, seed=5, mode="RGB")
    coloured = evaluate_images(in_colour, grey_split, out, progress=False, seeds=1)
    assert len(coloured.notes) == 1 and "stored in colour, the real ones in grey" in coloured.notes[0]
    assert (coloured.total, coloured.distances, coloured.copies) == (result.total, result.distances, result.copies)


# ---- reconstructions


def test_reconstructions_beside_their_originals(split, trained):
    validation, train = (ImageFolder(split / subset, SIZE) for subset in ("val", "train"))
    originals = validation.in_memory()
    x = to_unit(originals)
    noisy = x + 0.3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    alone = evaluate_reconstructions(x, x + 0.1)
    assert alone.accuracy is None and 26 < alone.psnr < 26.1 and 0.9 < alone.ssim < 1
    full = evaluate_reconstructions(originals, noisy, validation.labels, trained[1], train.in_memory())
    assert full.psnr < alone.psnr and full.real_accuracy >= 0.95
    assert full.frechet > full.real_frechet > 0
    same = evaluate_reconstructions(originals, originals, validation.labels, trained[1], train.in_memory())
    assert same.accuracy == same.real_accuracy and same.frechet == same.real_frechet and same.ssim == 1
    assert same.sharpness == 1 < full.sharpness and alone.sharpness == pytest.approx(1, abs=0.02)
    assert evaluate_reconstructions(x, x / 2).sharpness == 0.5
    assert "SSIM 1.000, sharpness 1.00; accuracy" in str(same)
    assert "times" in str(full) and "accuracy" not in str(alone)


# ---- the vectors


def test_what_the_vectors_do(split_dir):
    model, data = perturb_projections(tiny_vavae()).train(), ImageFolder(split_dir / "train", TINY_SIZE)
    compared = compare_conditions(model, data, batch_size=7)
    originals, own = reconstruct(model, data)
    expected = {
        "own": own,
        "another": reconstruct_images(model, originals, (data.labels + 1) % 3),  # 0, 1, 2 → 1, 2, 0
        "none": reconstruct_images(model, originals),
    }
    for name, remade in expected.items():
        score = getattr(compared, name)
        assert score.psnr == pytest.approx(evaluate_reconstructions(originals, remade).psnr, rel=1e-5)
        absolute = (to_unit(remade) - to_unit(originals)).abs().mean().item()
        assert score.absolute_error == pytest.approx(absolute, rel=1e-5)
    assert len({compared.own, compared.another, compared.none}) == 3
    assert [len(row) for row in compared.images.values()] == [3] * 4
    first = [data.labels.tolist().index(label) for label in range(3)]
    assert compared.images["original"].equal(originals[first])
    for name, remade in zip(("own vector", "another's vector", "no vector"), expected.values(), strict=True):
        difference = compared.images[name].int() - remade[first]
        assert compared.images[name].dtype == torch.uint8 and difference.abs().max() <= 1
    lines = str(compared).splitlines()
    assert len(lines) == 4 and lines[0] == "24 images         absolute error  PSNR, dB"
    assert lines[2].startswith("another's vector") and lines[2].endswith(f"  {compared.another.psnr:.2f}")
    assert len({len(line) for line in lines}) == 1 and repr(compared) == str(compared)


def test_an_image_is_decoded_as_another_person(split_dir, tmp_path, monkeypatch):
    model, data = perturb_projections(tiny_vavae()).eval(), ImageDataModule(split_dir, TINY_SIZE)
    batch = data.val_data.preview_batch(3)
    x, own = to_unit(batch["images"]), batch["labels"]
    rows = decode_as_people(model, data, images=3)
    assert list(rows) == ["original", "as ID_1", "as ID_2", "as ID_3"] and rows["original"].equal(batch["images"])
    with torch.no_grad():
        latents = model.encode(x, condition=model.condition_vectors(own)).latent_dist.mode()
        wanted = to_pixels(model.decode(latents, condition=model.condition_vectors(torch.tensor([1, 1, 1]))).sample)
    assert rows["as ID_2"].equal(wanted)
    _, as_others = reconstruct(model, data.val_data, decoded_as=(data.val_data.labels + 1) % 3)

    def judge(self, images, **_):  # names whatever was decoded with another's vector as that other
        labels = data.val_data.labels
        return torch.randn(len(images), 4), (labels + 1) % 3 if images.equal(as_others) else labels[: len(images)]

    monkeypatch.setattr(PersonClassifier, "judge", judge)
    scores = evaluate_vavae(model, data, tmp_path, progress=False)
    assert scores.transfer == 1 and str(scores).endswith(
        "decoded with another's vector, 100.0 % are named as the other"
    )
    assert evaluate_vavae(tiny_vavae(condition_dim=0), data, tmp_path, progress=False).transfer is None


def test_of_one_person_there_is_no_other(split_dir, tmp_path):
    shutil.copytree(split_dir / "val" / "ID_1", tmp_path / "ID_1")
    alone = compare_conditions(tiny_vavae(num_conditions=5), ImageFolder(tmp_path, TINY_SIZE))
    assert alone.another is None and "another's vector" not in alone.images
    assert str(alone).splitlines()[2].split() == ["another's", "vector", "-", "-"]
    with pytest.raises(UserError, match="This VA-VAE has no vectors to compare"):
        compare_conditions(tiny_vavae(condition_dim=0, num_conditions=0), ImageFolder(tmp_path, TINY_SIZE))
    (tmp_path / "ID_1").rename(tmp_path / "ID_6")
    with pytest.raises(UserError, match="has vectors of 5 people, the images have 6: fine-tune it on these images"):
        compare_conditions(tiny_vavae(num_conditions=5), ImageFolder(tmp_path, TINY_SIZE))
