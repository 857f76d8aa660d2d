"""Previews never end a training, whatever becomes of them."""

import lightning as L
import pytest
import torch
from PIL import Image
from tiny import tiny_dit

from vavae_tools.data.latents import LatentDataModule
from vavae_tools.runtime.errors import StoppedAtOnce
from vavae_tools.training.callbacks.previews import Previews, SamplePreviews
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

    trainer = train(latents_dir, SamplePreviews(make, 2, tmp_path, 1, lambda grid: None), max_epochs=2)
    assert trainer.global_step == 4 and trainer.lightning_module.training
    said = capsys.readouterr().out
    fault = "OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. more lines"
    assert f"preview left out at step 2 ({fault})" in said
    assert [path.name for path in tmp_path.iterdir()] == ["samples-000004.png"]


def test_a_person_who_stops_twice_ends_a_preview_and_training(latents_dir, tmp_path):
    def make(network):
        raise StoppedAtOnce("Stopped at once")

    with pytest.raises(StoppedAtOnce):
        train(latents_dir, SamplePreviews(make, 2, tmp_path, 1), max_epochs=2)


def test_previews_come_now_and_then_and_at_the_end(latents_dir, tmp_path):
    shown = []

    class Still(Previews):
        def grid(self, module):
            assert not module.training and not torch.is_grad_enabled()
            return torch.zeros(3, 8, 8, dtype=torch.uint8)

    train(latents_dir, Still(tmp_path, 2, shown.append), max_steps=10, max_epochs=-1)  # two steps an epoch
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"preview-{n:06d}.png" for n in (4, 8, 10)]
    assert len(shown) == 3 and Image.open(tmp_path / "preview-000010.png").size == (8, 8)
