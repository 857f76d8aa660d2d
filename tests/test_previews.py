"""Previews never end a training, whatever becomes of them."""

import lightning as L
import pytest
import torch
from tiny import tiny_dit

from vavae_tools.data.latents import LatentDataModule
from vavae_tools.runtime.errors import StoppedAtOnce
from vavae_tools.training.callbacks.previews import SamplePreviews
from vavae_tools.training.denoiser_module import DiffusionModule

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "limit_val_batches": 0}


def train(latents_dir, folder, make) -> L.Trainer:
    """Two epochs of a tiny DiT, with a preview after each."""
    module = DiffusionModule(*tiny_dit())
    settings = {**module.trainer_settings(accelerator="cpu", devices=1), **QUIET}
    trainer = L.Trainer(**settings, max_epochs=2, callbacks=[SamplePreviews(make, 2, folder, 1, lambda grid: None)])
    trainer.fit(module, LatentDataModule(latents_dir, 12))
    return trainer


def test_a_preview_that_fails_is_left_out_and_training_goes_on(latents_dir, tmp_path, capsys):
    made = []

    def make(network):
        made.append(network)
        if len(made) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
        return torch.zeros(4, 3, 8, 8, dtype=torch.uint8)

    trainer = train(latents_dir, tmp_path, make)
    assert trainer.global_step == 4 and trainer.lightning_module.training
    said = capsys.readouterr().out
    fault = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. more lines"
    assert f"preview left out at step 2 ({fault})" in said
    assert [path.name for path in tmp_path.iterdir()] == ["samples-000004.png"]


def test_a_person_who_stops_twice_ends_a_preview_and_training(latents_dir, tmp_path):
    def make(network):
        raise StoppedAtOnce("Stopped at once")

    with pytest.raises(StoppedAtOnce):
        train(latents_dir, tmp_path, make)
