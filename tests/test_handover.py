"""What earlier notebooks left: the newest that fits, wherever it is attached, and what is passed over."""

import shutil
from pathlib import Path

import pytest

import vavae_tools as vt
from vavae_tools.autoencoders.vavae import VAVAE
from vavae_tools.paths import ProjectPaths
from vavae_tools.recipes.handover import STAGES, find_or_make_split, find_run, find_stage
from vavae_tools.runtime.errors import UserError

QUIET = {"log": lambda line: None}
SHORT = {"max_steps": 2, "batch_size": 4, "previews": 0, **QUIET}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """The outputs of notebooks 01 to 04 on two data sets whose people have the same names, "older" and "newer"."""
    folder = tmp_path_factory.mktemp("input")
    for seed, name in enumerate(("older", "newer")):
        out = folder / name
        images = vt.write_gait_dataset(out / "gait", people=2, images=10, size=32, seed=seed)
        vt.split_folders(images, out / "data_split", progress=False)
        vavae = vt.fine_tune_vavae(out / "data_split", out / "vavae", "small", image_size=32, **SHORT)
        latents = vt.encode_split(out / "data_split", vavae, out / "latents", 32, **QUIET)
        size = {"hidden_size": 16, "depth": 1, "num_heads": 1, "patch_size": 2}
        pipeline = vt.train_dit(latents.path, vavae, out / "dit", size, **SHORT)
        vt.write_samples(pipeline, [0, 1], out / "samples", num_inference_steps=1)
    return folder


def found(place, log=lambda line: None) -> list[str]:
    return [find_stage(place, stage, log).relative_to(place.attached[0]).parts[0] for stage in STAGES]


@pytest.mark.parametrize("name", ["older", "newer"])
def test_stages_are_those_of_the_images(outputs, tmp_path, name):
    said = []
    place = vt.find_paths(outputs / name / "gait", tmp_path, [outputs])
    assert found(place, said.append) == [name] * 4
    other = "newer" if name == "older" else "older"
    assert [line.partition("passed over: ")[2].partition("(")[0].strip() for line in said] == [
        str(outputs / other / folder) for folder in ("data_split", "vavae/vavae", "dit/pipeline", "samples")
    ]
    reasons = "of other images", "of other images", "of another VA-VAE", "not made by"
    assert all(reason in line for reason, line in zip(reasons, said, strict=True))


def test_without_images_the_newest_split_decides(outputs, tmp_path):
    assert found(ProjectPaths(None, tmp_path, (outputs,))) == ["newer"] * 4


def test_what_is_here_goes_before_what_is_attached(outputs, tmp_path):
    place = vt.find_paths(outputs / "older" / "gait", tmp_path, [outputs])
    assert find_or_make_split(place, **QUIET) == outputs / "older" / "data_split"
    made = vt.split_folders(place.images, place.split, seed=7, progress=False)
    assert find_stage(place, "split", **QUIET) == place.split and made.totals["val"] == 4
    with pytest.raises(UserError, match=r"No fitting VA-VAE .*of other images .* run notebook 02"):
        find_stage(place, "vavae", **QUIET)


def test_a_split_is_made_where_none_fits(outputs, tmp_path):
    shutil.copytree(outputs / "older" / "gait", tmp_path / "more")
    shutil.copyfile(tmp_path / "more/ID_1/walk_001.jpg", tmp_path / "more/ID_1/copy.jpg")
    said, place = [], vt.find_paths(tmp_path / "more", tmp_path / "work", [outputs])
    assert find_or_make_split(place, said.append) == place.split
    assert "of other images than" in said[0] and "It is made now" in said[0] and "images to train" in said[1]


def test_an_attached_run_is_resumed_where_it_is_with_its_curves(outputs, tmp_path):
    place = vt.find_paths(outputs / "older" / "gait", tmp_path, [outputs])
    split, said = find_stage(place, "split", **QUIET), []
    before = {path: path.stat().st_mtime_ns for path in outputs.rglob("*")}
    resume = find_run(place, "vavae", split, said.append)
    assert resume == str(outputs / "older/vavae/checkpoints/last.ckpt")
    assert "at step 2; passed over: " in said[0] and str(outputs / "newer/vavae") in said[0]
    vt.fine_tune_vavae(split, place.vavae, "small", image_size=32, resume=resume, **{**SHORT, "max_steps": 4})
    curves = (place.vavae / "train.log").read_text()
    assert "2 steps to go" in curves and "resuming after step 2 of 4" in curves
    assert find_run(place, "vavae", split, **QUIET) == "last"
    assert {path: path.stat().st_mtime_ns for path in outputs.rglob("*")} == before


def test_weights_that_a_run_began_with_are_asked_for(outputs, tmp_path):
    place = vt.find_paths(outputs / "older" / "gait", tmp_path / "work", [outputs, tmp_path / "weights"])
    shutil.copytree(outputs / "older/vavae/vavae", tmp_path / "weights/published")
    vt.fine_tune_vavae(outputs / "older/data_split", place.vavae, tmp_path / "weights/published", **SHORT)
    shutil.move(tmp_path / "weights", tmp_path / "attached")
    told = [[], []]
    for said, more in zip(told, ([], [tmp_path / "attached"]), strict=True):
        place = vt.find_paths(outputs / "older" / "gait", tmp_path / "work", [outputs, *more])
        assert find_run(place, "vavae", outputs / "older/data_split", said.append) == "last"
    began = f"it began with {tmp_path / 'weights/published'}, which is not here: attach it again, or "
    assert told[0][1].startswith(began) and len(told[1]) == 1


def test_what_is_damaged_or_somebody_elses_is_passed_over(outputs, tmp_path):
    other = tmp_path / "input/other"
    for name in ("config.json", "model_index.json", "samples.json", "split_info.json", "run.json"):
        for content in (b"[1]", b"\xff", b"{}"):
            folder = other / f"{name} {len(content)}" / "x"
            (folder / "train").mkdir(parents=True)
            (folder / name).write_bytes(content)
    said, place = [], vt.find_paths(outputs / "older" / "gait", tmp_path / "work", [outputs, other.parent])
    assert [find_stage(place, stage, said.append).parts[-1] for stage in STAGES]
    assert "is damaged, or of another version" in said[0]


def test_nothing_to_resume(outputs, tmp_path):
    place = vt.find_paths(outputs / "older" / "gait", tmp_path, [outputs / "newer"])
    said = []
    assert find_run(place, "vavae", outputs / "older" / "data_split", said.append) is None
    assert said == [f"No vavae to resume; passed over: {outputs / 'newer/vavae'} (of other data)"]


@pytest.mark.parametrize("whole", [True, False])
def test_attached_latents_are_not_encoded_again(outputs, tmp_path, monkeypatch, whole):
    shutil.copytree(outputs / "older/latents", tmp_path / "input/latents")
    index = next((tmp_path / "input").rglob("latents.json"))
    if not whole:  # its session was over before the last shards
        index.unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "input").rglob("*")}
    split, vavae = outputs / "older/data_split", outputs / "older/vavae/vavae"
    encoded, encode = [], VAVAE.encode_images
    counted = lambda self, images, *rest: encoded.append(len(images)) or encode(self, images, *rest)  # noqa: E731
    monkeypatch.setattr(VAVAE, "encode_images", counted)
    found = vt.encode_split(split, vavae, tmp_path / "work", 32, attached=[tmp_path / "input"], **QUIET)
    assert found.path.is_relative_to(tmp_path / ("input" if whole else "work"))
    assert encoded == ([] if whole else [1])  # one, for the shape
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "input").rglob("*")} == before
