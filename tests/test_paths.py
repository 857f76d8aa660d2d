"""Where images and outputs are found: Kaggle's folders under other roots, a path, or the built-in data."""

import re
import shutil
from pathlib import Path

import pytest
from tiny import refuses

import vavae_tools
from vavae_tools.autoencoders.foundation import load_foundation
from vavae_tools.autoencoders.lpips import load_lpips
from vavae_tools.autoencoders.stable_diffusion import load_stable_diffusion_vae
from vavae_tools.autoencoders.weights import load_autoencoder
from vavae_tools.data.split import split_folders
from vavae_tools.diffusion.clip import load_text_encoder
from vavae_tools.export import export_vavae
from vavae_tools.paths import ProjectPaths, find_paths, find_split
from vavae_tools.recipes.init_from import read_starting_weights
from vavae_tools.runtime.errors import command_parser


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.delenv("VAVAE_PICTURES", raising=False)
    monkeypatch.delenv("VAVAE_WORK", raising=False)
    monkeypatch.chdir(tmp_path)


def person_folders(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).mkdir(parents=True)
        (folder / name / "a.jpg").touch()
    return folder


def kaggle(root: Path) -> dict:
    (root / "working").mkdir(parents=True, exist_ok=True)
    (root / "input").mkdir(exist_ok=True)
    return {"input_roots": [root / "input"], "working_root": root / "working"}


def test_nothing_there_means_simulated_walkers(tmp_path):
    paths = find_paths(**kaggle(tmp_path / "kaggle"))
    assert paths.images is None and paths.work == tmp_path / "kaggle" / "working"
    paths = find_paths(input_roots=[tmp_path / "nowhere"], working_root=tmp_path / "nor here")
    assert paths.images is None and paths.work == Path("outputs")


def test_attached_images_are_found_at_any_depth_and_the_nearest_first(tmp_path):
    roots = kaggle(tmp_path)
    deep = person_folders(tmp_path / "input" / "datasets/somebody/gait/images/all", "ID_1", "ID_2", "ID_10")
    (tmp_path / "input" / "aaa weights").mkdir()
    (tmp_path / "input" / "aaa weights" / "model.safetensors").touch()
    assert find_paths(**roots).images == deep
    nearest = person_folders(tmp_path / "input" / "gait" / "images", "anna", "ben")
    assert find_paths(**roots).images == nearest


def test_what_trains_is_found_before_what_validates_and_the_largest_before_others(tmp_path):
    roots = kaggle(tmp_path)
    for subset in ("Testing", "Training"):
        person_folders(tmp_path / "input/gait" / subset, "ID_1", "ID_2")
    assert find_paths(**roots).images.name == "Training"
    more = person_folders(tmp_path / "input/zz/pictures", "a", "b", "c")
    assert find_paths(**roots).images == more
    shutil.rmtree(more)
    (tmp_path / "input/gait/loop").symlink_to("..")
    for path in list((tmp_path / "input/gait").rglob("*.jpg")):
        path.rename(path.with_suffix(".webp"))
    assert find_paths(**roots).images.name == "Training"


def test_persons_in_data_sets_of_their_own_are_named(tmp_path):
    roots = kaggle(tmp_path)
    for k in (1, 2):
        person_folders(tmp_path / f"input/person{k}", f"ID_{k}")
    refuses(r"person1/ID_1, .*person2/ID_2 lie in folders of their own: put the persons'", find_paths, **roots)


def test_what_is_given_wins(tmp_path, monkeypatch):
    roots, attached = kaggle(tmp_path), (tmp_path / "input",)
    person_folders(tmp_path / "input" / "a", "ID_1", "ID_2")
    mine, other = person_folders(tmp_path / "mine", "ID_1"), person_folders(tmp_path / "other", "ID_1")
    assert find_paths(mine, tmp_path / "w", **roots) == ProjectPaths(mine, tmp_path / "w", attached)
    monkeypatch.setenv("VAVAE_PICTURES", str(other))
    monkeypatch.setenv("VAVAE_WORK", str(tmp_path / "v"))
    assert find_paths(**roots) == ProjectPaths(other, tmp_path / "v", attached)
    assert find_paths(mine, tmp_path / "w", **roots) == ProjectPaths(mine, tmp_path / "w", attached)
    refuses(r"No such folder: nowhere\. Name the folder", find_paths, "nowhere", **roots)


def test_a_tilde_is_the_home_folder_in_python_and_in_every_command(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    person_folders(tmp_path / "images", "ID_1")
    assert find_paths("~/images", "~/work") == ProjectPaths(tmp_path / "images", tmp_path / "work")
    parser = command_parser("any", None)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("file", type=Path)
    for words in (["--folder=~/a", "~/b~"], ["--folder", "~/a", "~/b~"]):
        assert vars(parser.parse_args(words)) == {"folder": tmp_path / "a", "file": tmp_path / "b~"}
    refuses(r"^unrecognized arguments: --folders \(--help shows all flags\)$", parser.parse_args, ["b", "--folders"])


def test_splits_and_samples_are_no_images(tmp_path):
    roots = kaggle(tmp_path)
    for made, mark in (("data_split/train", "data_split/split_info.json"), ("samples", "samples/samples.json")):
        person_folders(tmp_path / "input/output" / made, "ID_1", "ID_2")
        (tmp_path / "input/output" / mark).touch()
    assert find_paths(**roots).images is None


def test_the_split_is_found_where_it_is_usually_written(tmp_path, gait):
    refuses(r"No split in .*data_split: run data_split\.py first", find_split)
    split_folders(gait, "data_split", progress=False)
    assert find_split() == Path("data_split")
    split_folders(gait, "outputs/data_split", progress=False)
    assert find_split() == Path("outputs/data_split")
    assert find_split(tmp_path / "outputs") == tmp_path / "outputs" / "data_split"


CALLS = {
    **{name: getattr(vavae_tools, name) for name in ("load_pipeline", "load_text_pipeline", "load_token_pipeline")},
    **{"load_vavae": vavae_tools.load_vavae, "load_autoencoder": load_autoencoder, "load_foundation": load_foundation},
    **{"load_text_encoder": load_text_encoder, "load_stable_diffusion_vae": load_stable_diffusion_vae},
    "load_rae": lambda path: vavae_tools.load_rae(encoder_config_path=path),
    "decoder of load_rae": lambda path: vavae_tools.load_rae(decoder_path=path, decoder="tiny", log=lambda line: None),
    "load_lpips": load_lpips,
    "read_starting_weights": read_starting_weights,
    "TokenImageDataset": vavae_tools.TokenImageDataset,
    "ImageFolder": lambda path: vavae_tools.ImageFolder(path, 8),
    "image_data": lambda path: vavae_tools.image_data(path, 8),
    "LatentDataModule": vavae_tools.LatentDataModule,
    "export_vavae": lambda path: export_vavae(path, "reference", "out.pt"),
    "split_folders": lambda path: split_folders(path, "split"),
    "find_split": find_split,
}


@pytest.mark.parametrize("call", CALLS)
def test_a_tilde_is_the_home_folder_wherever_python_takes_a_path(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    refuses(re.escape(str(tmp_path / "home" / "nowhere")), CALLS[call], "~/nowhere")
    refuses("~no_such_user", CALLS[call], "~no_such_user/nowhere")
