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


def test_a_preview_that_fails_is_left_out_and_training_goes_on(latents_dir, tmp_path, capsys):
    made = []

    def make(network):
        made.append(network)
        if len(made) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore lines")
        return torch.zeros(4, 3, 8, 8, dtype=torch.uint8)

    module = DiffusionModule(*tiny_dit())
    settings = {**module.trainer_settings(accelerator="cpu", devices=1), **QUIET}
    previews = SamplePreviews(make, 2, tmp_path, every=1, show=lambda grid: None)
    trainer = L.Trainer(**settings, max_epochs=2, callbacks=[previews])
    trainer.fit(module, LatentDataModule(latents_dir, 12))
    assert trainer.global_step == 4 and module.training
    said = capsys.readouterr().out
    assert "preview left out at step 2 (OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.)" in said
    assert [path.name for path in tmp_path.iterdir()] == ["samples-000004.png"]


def test_a_person_who_stops_twice_ends_a_preview_and_training(latents_dir, tmp_path):
    def make(network):
        raise StoppedAtOnce("Stopped at once")

    module = DiffusionModule(*tiny_dit())
    settings = {**module.trainer_settings(accelerator="cpu", devices=1), **QUIET}
    trainer = L.Trainer(**settings, max_epochs=2, callbacks=[SamplePreviews(make, 2, tmp_path, every=1)])
    with pytest.raises(StoppedAtOnce):
        trainer.fit(module, LatentDataModule(latents_dir, 12))
