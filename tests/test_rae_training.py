"""The decoder of an RAE learns a person's images: losses by hand, what is frozen stays, runs go on exactly."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_vavae_training import assert_goes_on_exactly
from test_vavae_training import fit as fit_autoencoder
from tiny import assert_same, last, refuses, same
from torch import Tensor, nn

from vavae_tools.autoencoders import foundation
from vavae_tools.autoencoders.losses import ImageLoss, PatchDiscriminator, autoencoder_loss, generator_loss
from vavae_tools.autoencoders.rae import RAE, tiny_rae
from vavae_tools.autoencoders.rae_weights import read_rae_folder
from vavae_tools.data.demo.shapes import ShapeImages, shape_data
from vavae_tools.data.images import to_pixels, to_unit
from vavae_tools.evaluation.metrics import psnr
from vavae_tools.recipes.rae import check_reconstructions, fine_tune_rae_decoder, train_rae_decoder
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError
from vavae_tools.training.autoencoder_module import RAEDecoderModule, RAEFeatures

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

PIXELS = 24
"""The smallest images that the discriminator can judge; 3×3 tokens."""
ADVERSARY = {"disc_weight": 0.75, "disc_width": 4, "disc_start": 3, "generator_start": 5}


@torch.no_grad()
def reconstruction_psnr(rae: RAE, images: Tensor) -> Tensor:
    x = to_unit(images)
    return psnr(to_unit(to_pixels(rae(x))), x)


def new_rae() -> RAE:
    torch.manual_seed(4)
    rae = tiny_rae(PIXELS, decoder_num_hidden_layers=1)
    rae.set_statistics(torch.full(rae.latent_shape, 0.25), torch.full(rae.latent_shape, 2.0))
    return rae.eval()


def new_module(**changes) -> RAEDecoderModule:
    torch.manual_seed(1)
    return RAEDecoderModule(changes.pop("rae", None) or new_rae(), **{"lr": 1e-3, **ADVERSARY, **changes})


def images(batch_size: int = 6):
    return shape_data(24, 4, PIXELS, batch_size, val_share=0.25)


def fit(folder, module, resume=None, data=None, **length):
    return fit_autoencoder(folder, data or images(), module, resume, monitor="val/psnr", **length)


# ---- the loss


def test_the_loss_and_its_gradient_are_autograds_by_hand():
    """The adversary's share is as strong at the last layer as the image loss, times 0.75 (RAE)."""
    torch.manual_seed(2)
    last = nn.Linear(7, 3 * PIXELS**2)
    decoder = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), last, nn.Unflatten(1, (3, PIXELS, PIXELS))).double()
    discriminator, x = PatchDiscriminator(3, 4).double(), torch.randn(2, 5).double()
    y = torch.rand(2, 3, PIXELS, PIXELS).double() * 2 - 1
    reference = 0.5 * (decoder(x) - y).abs().mean()
    against = -1e-4 * discriminator(decoder(x)).mean()
    norms = [torch.autograd.grad(loss, last.weight, retain_graph=True)[0].norm() for loss in (reference, against)]
    weight = 0.75 * norms[0] / (norms[1] + 1e-6)
    assert 1e-5 < norms[1] < 1e-4  # where VQGAN's 1e-4 in place of 1e-6 would be seen
    expected = torch.autograd.grad(reference + weight * against, list(decoder.parameters()))

    at_last = {"decoder_last": last.weight, "adversary_norm": "means"}
    adversary = {"adversary": lambda made: 1e-4 * generator_loss(discriminator(made)), "disc_weight": 0.75}
    objective, found = autoencoder_loss(ImageLoss({"l1": 0.5}), decoder(x), y, **adversary, **at_last)
    assert found["disc_weight"].item() == pytest.approx(weight.item(), rel=1e-5)
    assert found["loss"].item() == pytest.approx((reference + weight * against).item(), rel=1e-5)
    assert found["l1"].item() == pytest.approx(2 * reference.item()) and found["generator"] == against.detach()
    for mine, theirs in zip(torch.autograd.grad(objective, list(decoder.parameters())), expected, strict=True):
        # the weight is a float32
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())
    adversary = {"adversary": lambda made: 1e-9 * made.mean(), "disc_weight": 0.5}
    _, found = autoencoder_loss(ImageLoss({"l1": 1e4}), decoder(x), y, **adversary, **at_last)
    assert found["disc_weight"].item() == pytest.approx(0.5 * 1e4)  # the most


# ---- tokens and their noise


def test_noise_follows_from_seed_epoch_and_sample():
    module = new_module(noise_tau=0.5, seed=11)
    tokens = torch.randn(3, 9, 64)
    index = torch.tensor([5, 0, 7])
    draws = Draws(11, 2, index)
    u, n = draws.uniform("noise level"), draws.normal("noise", 9, 64)
    noisy = module.noised_tokens(tokens, draws)
    torch.testing.assert_close(noisy, tokens + 0.5 * u[:, None, None] * n, rtol=0, atol=0)
    assert u.unique().numel() == 3  # a level for each image
    alone = module.noised_tokens(tokens[1:2], Draws(11, 2, index[1:2]))
    assert same(alone[0], noisy[1])
    assert not torch.equal(module.noised_tokens(tokens, Draws(11, 3, index)), noisy)
    assert same(new_module(noise_tau=0.0).noised_tokens(tokens, draws), tokens)


def test_the_encoder_is_asked_once_about_each_image(tmp_path, monkeypatch):
    asked = []

    def trained(folder):
        asked.clear()
        module = new_module()
        module._models["codec"].encoder.register_forward_hook(lambda *arguments: asked.append(len(arguments[1][0])))
        return fit(folder, module, max_epochs=2)[1]

    kept = trained(tmp_path / "kept")
    assert sum(asked) == 24 + 6
    monkeypatch.setattr(foundation, "LARGEST_CACHE", 0)
    anew = trained(tmp_path / "anew")
    assert sum(asked) == 2 * (24 + 6)
    averages = ({k: w for k, w in run["state_dict"].items() if k.startswith("ema.")} for run in (kept, anew))
    torch.testing.assert_close(*averages, rtol=0, atol=2e-3)  # float16 keeps three digits of the tokens


@pytest.mark.parametrize("kept", [True, False])
def test_mirrored_images_go_with_their_own_tokens(kept):
    module, data = new_module(flips=True), images().train_data
    rae = module._models["codec"]
    if kept:
        for name, mirrored in (("tokens", False), ("mirrored_tokens", True)):
            features = RAEFeatures(rae, "", mirrored)(to_unit(data.get_batch(range(24))["images"]), (3, 3))
            data.extra_fields[name] = features.half()
    batch = data.get_batch(range(24))
    seen, tokens = module.prepare_batch(batch, Draws(0, 0, batch["index"]))
    mirrored = [not same(a, to_unit(b)) for a, b in zip(seen, batch["images"], strict=True)]
    assert 4 < sum(mirrored) < 20
    for place, turned in enumerate(mirrored):
        assert same(seen[place], to_unit(batch["images"][place].flip(2) if turned else batch["images"][place]))
    torch.testing.assert_close(tokens, rae.tokens((seen + 1) / 2), rtol=1e-3, atol=1e-3)
    seen, _ = module.eval().prepare_batch(batch, None)
    assert same(seen, to_unit(batch["images"]))  # validation sees them as they are


# ---- training


def test_a_run_goes_on_exactly(tmp_path):
    """Three batches a step leave one of the epoch's four: it makes a step of its own."""
    changes = {"accumulate_grad_batches": 3, "disc_start": 1, "generator_start": 3}

    def run(folder, resume=None):
        return fit(folder, new_module(**changes), resume, max_epochs=3)

    trainer, whole, seen = run(tmp_path / "whole")
    assert trainer.global_step == whole["global_step"] == 6  # the decoder's steps, not both optimisers'
    assert_goes_on_exactly(run, tmp_path, {2, 3, 5}, whole, seen)


def test_the_average_is_what_validates(tmp_path):
    module, data = new_module(lr=1e-2, ema_decay=0.6), images()
    trainer, _, _ = fit(tmp_path, module, data=data, max_epochs=1)
    pixels = data.val_data.get_batch(range(6))["images"]
    decoders = module.ema.network, module.network
    found = [reconstruction_psnr(module.set_decoder(decoder), pixels).mean().item() for decoder in decoders]
    assert trainer.logged_metrics["val/psnr"].item() == pytest.approx(found[0], abs=0.01)
    assert abs(found[0] - found[1]) > 0.05


def test_the_encoder_stays_as_it_is_and_out_of_the_checkpoints(tmp_path):
    rae = new_rae()
    before = {name: tensor.clone() for name, tensor in rae.state_dict().items()}
    _, found, _ = fit(tmp_path, new_module(rae=rae), max_epochs=2)
    assert {name.split(".")[0] for name in found["state_dict"]} == {"network", "ema", "discriminator"}
    after = rae.state_dict()
    others = [name for name in after if not name.startswith("decoder.")]
    assert len(others) > 10 and all(same(after[name], before[name]) for name in others)
    moved = [name for name in after if name.startswith("decoder.") and not same(after[name], before[name])]
    assert len(moved) > 10 and "decoder.decoder_pos_embed" not in moved


# ---- the whole of it


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Arguments of `load_rae` for a tiny random encoder and decoder."""
    config = {"hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "image_size": 56, "patch_size": 14}
    path = tmp_path_factory.mktemp("encoder") / "config.json"
    path.write_text(json.dumps(config))
    return {"encoder_config_path": str(path), "encoder_input_size": 56, "decoder": "tiny"}


DATA = {"count": 64, "num_classes": 2, "val_share": 0.25}


def tune(folder, rae, said=None, **changes):
    settings = {"batch_size": 16, "max_steps": 40, "lr": 3e-3, "disc_weight": 0.0, "noise_tau": 0.2, "previews": 2}
    changes = {**settings, "ema_decay": 0.9, "warmup_steps": 4, **changes}
    line = said.append if said is not None else lambda text: None
    devices = {"accelerator": "cpu"}
    return fine_tune_rae_decoder(changes.pop("data", DATA), rae, folder, devices=devices, log=line, **changes)


def test_fine_tuning_brings_the_images_nearer(tmp_path, encoder):
    said, shown = [], []
    folder = tune(tmp_path / "run", encoder, said, show=shown.append)
    assert folder == tmp_path / "run" / "rae"
    val = shape_data(64, 2, 32, val_share=0.25).val_data.get_batch(range(16))["images"]
    rae = read_rae_folder(folder)
    after = reconstruction_psnr(rae, val).mean().item()
    line = next(text for text in said if text.startswith("PSNR"))
    before = float(line.split()[1])
    assert f"{before:.1f} dB before, {after:.1f} dB after, on 16 images that validate" in line
    assert after > before + 4
    assert rae.config.noise_tau == 0.2
    trained = last(tmp_path / "run")["state_dict"]
    assert same(rae.decoder.decoder_pred.weight, trained["ema.network.decoder_pred.weight"])
    assert not torch.equal(rae.decoder.decoder_pred.weight, trained["network.decoder_pred.weight"])
    names = {path.name for path in (tmp_path / "run" / "reconstructions").iterdir()}
    assert {"before.png", "after.png", "reconstructions-000040.png", "strip.png"} <= names
    assert len(shown) >= 4 and all(grid.shape[2] > 8 * 4 * 32 for grid in shown), "not enlarged to be seen"
    assert any(text.startswith("No lpips_weights") for text in said)
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["global_step"] == 40 and record["settings"]["perceptual_weight"] == 0

    said.clear()  # a folder goes on where the encoder and its statistics are the same
    again = read_rae_folder(tune(tmp_path / "again", str(folder), said, max_steps=4, lr=1e-6))
    assert_same(again.encoder.state_dict(), rae.encoder.state_dict())
    assert float(next(text for text in said if text.startswith("PSNR")).split()[1]) == pytest.approx(after, abs=0.051)


def test_the_command_reaches_the_training_which_can_be_made_longer(tmp_path, encoder):
    from vavae_tools.recipes.config import compose, read_command_line

    words = ["experiment=rae_decoder", "data=shapes", "trainer=cpu", "data.num_images=32", "--batch_size", "8"]
    words += ["--max_steps", "6", "--lr", "0.002", "--noise_tau", "0.1", "--previews", "0"]
    words += ["model.losses.disc_width=4", "trainer.accumulate_grad_batches=2"]

    def train(*further: str, resume=None, **of: str) -> dict:
        rae = [f"model.rae.{name}={value}" for name, value in {**encoder, **of}.items()]
        recipe = compose(read_command_line([*words, *rae, *further])).recipe
        train_rae_decoder(recipe, tmp_path, resume, log=lambda line: None)
        return json.loads((tmp_path / "run.json").read_text())

    settings = train()["settings"]
    expected = {"lr": 0.002, "noise_tau": 0.1, "disc_weight": 0.75, "disc_start": 2, "generator_start": 3}
    expected |= {"disc_width": 4, "accumulate_grad_batches": 2, "gradient_clip": 1.0, "l1_weight": 0.5, "flips": False}
    assert {name: settings[name] for name in expected} == expected and settings["betas"] == [0.9, 0.95]
    config = json.loads(Path(encoder["encoder_config_path"]).read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "layer_norm_eps": 1e-3}))
    with pytest.raises(UserError, match=r"encoder was \w+, is \w+"):
        train("--max_steps", "9", resume="last", encoder_config_path=str(tmp_path / "config.json"))
    longer = train("--max_steps", "9", resume="last")
    assert longer["global_step"] == 9 and longer["settings"]["disc_start"] == 2


@pytest.mark.parametrize(("by", "decibels", "warns"), [(0.1, 25.85, False), (0.3, 16.54, True)])
def test_a_look_tells_the_psnr_and_warns(tmp_path, monkeypatch, by, decibels, warns):
    data, shifted = ShapeImages(10, 3, 32), nn.Identity()
    shifted.device, shifted.image_size, shifted.forward = torch.device("cpu"), 32, lambda x: x + by
    grey = torch.full((10, 3, 32, 32), 100, dtype=torch.uint8)
    monkeypatch.setattr(data, "images", lambda places: grey[list(places)])
    said, shown = [], []
    found = check_reconstructions(shifted, data, tmp_path, said.append, shown.append, count=9)
    assert found == pytest.approx(decibels, abs=0.01)  # 20 log10(255 / 13) and (255 / 38)
    assert said[0].startswith(f"The RAE's reconstructions of 9 images: PSNR {found:.1f} dB")
    assert len(said) == 1 + warns and ("experiment=rae_decoder" in said[-1]) == warns
    assert len(shown) == 1 and shown[0].shape[2] > 8 * 128, "not enlarged to be seen"
    grid = torch.from_numpy(np.array(Image.open(tmp_path / "before.png"))).permute(2, 0, 1)
    assert grid.shape == (3, 2 * 34 - 2, 8 * 34 - 2)
    assert (grid[:, :32, :32] == 100).all() and (grid[:, 34:66, :32] == 100 + round(by * 127.5)).all()


# ---- what cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"perceptual_weight": 0.5}, r"perceptual_weight needs LPIPS: name its weights"),
        ({"data": {**DATA, "image_size": 48}}, "image_size 48: this RAE makes images of 32 .* saves no memory"),
        ({"rae": {"folder": "tiny", "decoder": "ViTB"}}, "rae.folder=tiny is a whole RAE: leave out rae.decoder"),
        ({"rae": "."}, "is no folder of a whole RAE"),
        ({"noise_tau": -0.1}, "noise_tau is -0.1, expected 0 or more"),
        ({"l1_weight": 0.0}, "nothing compares the images"),
    ],
)
def test_settings_that_cannot_be(tmp_path, encoder, changes, message):
    refuses(message, tune, tmp_path, changes.pop("rae", encoder), **changes)
