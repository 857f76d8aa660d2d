"""Previews never end a training, whatever becomes of them."""

import lightning as L
import nbformat
import pytest
import torch
from nbclient import NotebookClient
from PIL import Image
from tiny import tiny_dit

from vavae_tools.data.images import spread
from vavae_tools.data.latents import LatentDataModule
from vavae_tools.plots import image_grid, labelled_grid
from vavae_tools.runtime.errors import StoppedAtOnce
from vavae_tools.training.callbacks import previews as module
from vavae_tools.training.callbacks.previews import (
    Previews,
    ReconstructionPreviews,
    SamplePreviews,
    preview_epochs,
)
from vavae_tools.training.denoiser_module import DiffusionModule

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}


def train(latents_dir, previews, **length) -> L.Trainer:
    module = DiffusionModule(*tiny_dit())
    settings = {**module.trainer_settings(accelerator="cpu", devices=1), **QUIET}
    trainer = L.Trainer(**settings, **length, callbacks=[previews])
    trainer.fit(module, LatentDataModule(latents_dir, 12))
    return trainer


def test_a_preview_that_fails_is_left_out_and_training_goes_on(latents_dir, tmp_path, capsys):
    made = []

    def make(network):
        made.append(network)
        if len(made) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
        return torch.zeros(4, 3, 8, 8, dtype=torch.uint8)

    trainer = train(latents_dir, SamplePreviews(make, 2, tmp_path, [1], lambda grid: None), max_epochs=2)
    assert trainer.global_step == 4 and trainer.lightning_module.training
    said = capsys.readouterr().out
    fault = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. more lines"
    assert f"preview left out at step 2 ({fault})" in said
    assert [path.name for path in tmp_path.glob("samples-*")] == ["samples-000004.png"]


def test_a_person_who_stops_twice_ends_a_preview_and_training(latents_dir, tmp_path):
    def make(network):
        raise StoppedAtOnce("Stopped at once")

    with pytest.raises(StoppedAtOnce):
        train(latents_dir, SamplePreviews(make, 2, tmp_path, [1]), max_epochs=2)


def test_previews_come_now_and_then_and_at_the_end(latents_dir, tmp_path):
    shown = []

    class Still(Previews):
        def images(self, module):
            assert not module.training and not torch.is_grad_enabled()
            return torch.zeros(1, 3, 8, 8, dtype=torch.uint8)

    train(latents_dir, Still(tmp_path, [2, 4], shown.append), max_steps=10, max_epochs=-1)  # two steps an epoch
    grids = [f"preview-{n:06d}.png" for n in (4, 8, 10)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [*grids, "strip.png"]
    assert Image.open(tmp_path / grids[-1]).size == (8, 8)  # on the disk as they are
    assert len(shown) == 4 and all(grid.shape[1] > 128 for grid in shown), "not enlarged to be seen"


def filled(tmp_path, value, columns=2, side=4):
    """Six images of (channel-wise) values value, value + 1, …, kept as a preview's grid."""
    images = torch.arange(value, value + 6, dtype=torch.uint8).view(6, 1, 1, 1).expand(6, 3, side, side)
    Image.fromarray(image_grid(images, columns).permute(1, 2, 0).numpy()).save(tmp_path / f"samples-{value:06d}.png")
    return images


@pytest.mark.parametrize("kind", ["samples", "reconstructions"])
def test_the_strip_has_a_row_of_each_preview_also_of_former_sessions(tmp_path, monkeypatch, kind):
    made = []
    monkeypatch.setattr(module, "labelled_grid", lambda *of: made.append(of) or torch.zeros(3, 8, 8, dtype=torch.uint8))
    if kind == "samples":
        previews = SamplePreviews(None, 2, tmp_path, show=lambda grid: None, rows=["a", "b", "c"])
    else:
        previews = ReconstructionPreviews({"images": torch.zeros(2)}, tmp_path, show=lambda grid: None)
        previews.name = "samples"
    for value in (10, 20, 100):
        images = filled(tmp_path, value)
    filled(tmp_path, 15, side=5)  # of other images
    filled(tmp_path, 60), filled(tmp_path, 200)  # of a run that was overwritten
    previews.begun, previews.made = 20, {100}
    previews.keep_strip(images)
    ((strip, columns, rows, title, titles),) = made
    values = [strip[i : i + columns, 0, 0, 0].tolist() for i in range(0, len(strip), columns)]
    steps = ["step 10", "step 20", "step 100"]
    if kind == "samples":
        assert (rows, titles) == (steps, ["a", "a", "b", "b", "c", "c"]) and title == "samples over training"
        assert values == [list(range(value, value + 6)) for value in (10, 20, 100)]
    else:  # the second row is each preview's own, below the originals of the last
        assert rows == ["originals", *steps] and values == [[100, 101], [12, 13], [22, 23], [102, 103]]
    assert (tmp_path / "strip.png").is_file()


def test_previews_double_in_steps_up_to_the_last_and_are_spread_over_all_people():
    assert preview_epochs(800, 5) == [50, 100, 200, 400, 800] and preview_epochs(30, 8) == [1, 2, 3, 4, 7, 11, 18, 30]
    assert preview_epochs(2, 4) == [1, 2] and preview_epochs(7, 1) == [7]
    assert spread(8, 31) == [0, 4, 9, 13, 17, 21, 26, 30] and spread(8, 3) == [0, 1, 2] and spread(8, 1) == [0]


def test_rows_have_names_and_images_are_enlarged_by_a_whole_number():
    images = torch.randint(0, 256, (4, 3, 32, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    plain = labelled_grid(images, 2, ["", ""], "")
    named = labelled_grid(images, 2, ["person 1", "person 2"], "samples after step 8, epoch 2")
    assert named.shape[1] == plain.shape[1] and named.shape[2] > plain.shape[2] + 50
    four_times = images[3].repeat_interleave(4, 1).repeat_interleave(4, 2)
    assert named[:, -6 - 128 : -6, -6 - 160 : -6].equal(four_times)


CELL = """
import torch
from vavae_tools.plots import labelled_grid, show_inline
noise = torch.randint(0, 256, (64, 3, 256, 256), dtype=torch.uint8)
names = [f"person {i}" for i in range(8)]
for step in range(10):
    show_inline(labelled_grid(noise, 8, names, f"step {step}"))
show_inline(labelled_grid(torch.cat([noise] * 2)[:80], 8, names + ["more", "most"], "over training"))
"""


def test_a_saved_notebook_with_ten_previews_at_256_pixels_is_below_5_mb(forked):
    cell = nbformat.v4.new_code_cell(CELL)  # noise, which no form of image makes small
    notebook = NotebookClient(nbformat.v4.new_notebook(cells=[cell]), timeout=240).execute()
    assert len(cell.outputs) == 11 and len(nbformat.writes(notebook)) < 4e6
