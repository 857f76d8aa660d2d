"""Whole trainings in half precision, here on the CPU: fp16 with a gradient scaler, as on a T4, and bf16 are as good."""

import gc

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from on_card import Trainings

COMPARED = ("loss", "mse", "reconstruction", "l1", "psnr", "ssim", "perceptual", "cosine")
"""Values that no adaptive weight or adversary magnifies."""


@pytest.fixture
def trained(split_dir, vavae_dir, latents_dir, tmp_path, monkeypatch):
    """(training, precision) → the Trainer that has trained."""
    monkeypatch.chdir(tmp_path)
    trainings, made, trainer = Trainings(split_dir, vavae_dir, latents_dir, monkeypatch.setattr), [], L.Trainer

    def scaled(**settings) -> L.Trainer:
        if settings["precision"] == "32-true":  # no command has fp16 on a CPU
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
            settings["plugins"] = [*settings.get("plugins", ()), MixedPrecision("16-mixed", "cpu", scaler)]
            settings["precision"] = None
        made.append(trainer(**settings))
        return made[-1]

    monkeypatch.setattr(L, "Trainer", scaled)

    def train(name: str, precision: str) -> L.Trainer:
        trainings.train(name, tmp_path / precision, {"16": None}.get(precision, precision))
        return made[-1]

    gc.freeze()  # trainings look for garbage, and need not look at all that was imported
    yield train
    gc.unfreeze()


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "name", ["vavae_full", "dit", "ddt", "rae_decoder", "token_images", "text_epsilon", "text_flow_matching"]
)
def test_fp16_with_a_scaler_and_bf16_train_alike(trained, name):
    """What is logged at the end, of training and validation, is the same but for bf16's two digits."""
    found = {}
    for precision in ("16", "bf16"):
        trainer = trained(name, precision)
        assert trainer.precision == f"{precision}-mixed"
        assert all(weight.isfinite().all() for weight in trainer.lightning_module.state_dict().values())
        found[precision] = {key: float(value) for key, value in trainer.callback_metrics.items()}
    assert found["16"]["train/skipped_steps"] == 0
    compared = {key for key in found["16"] if key.partition("/")[2] in COMPARED}
    assert len(compared) >= 3
    for key in compared:
        assert found["16"][key] == pytest.approx(found["bf16"][key], rel=0.05, abs=0.01), key
