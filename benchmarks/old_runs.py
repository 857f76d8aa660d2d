"""Make the smallest run of each training by its command: the fixtures of tests/test_old_runs.py.

What lies in tests/fixtures/old_runs was written by commit b40a19a, before the trainings became one. It is never made
again: it shows that runs, checkpoints, pipelines and caches of that day are read and resumed.

    git worktree add ../then b40a19a && cp benchmarks/old_runs.py ../then/benchmarks/
    cd ../then && python -m benchmarks.old_runs ../old_runs

Each training makes 20 steps, whose end gives the expected numbers. Another session resumes from the checkpoint of step
16 and is stopped after one step, in the middle of an epoch, by its time limit: its run is what is kept.
"""

import argparse
import json
import os
import runpy
import shutil
import struct
import sys
import zlib
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
STEPS, SAVED, STOPPED = 20, 16, 17
SIZE = 24
"""Pixels: the smallest images that the discriminator can judge."""
_TRAIN = ["--accelerator", "cpu", "--batch_size", "12"]
_STEPS = [*_TRAIN, "--max_steps", str(STEPS), "--lr", "1e-2", "--ema_decay", "0.9", "--previews", "0"]
_SMALL = ["model.hidden_size=8", "model.num_heads=2", "sampling.num_steps=2"]
RUNS = {
    "vavae": [
        *["minimal_training_modification.py", "--data_dir", "data_split", "--original_vavae", "models/vae", *_TRAIN],
        *["--condition_dim", "4", "--image_size", str(SIZE), "--max_epochs", "10", "--lr", "2e-3"],
    ],
    "vavae_full": [
        *["minimal_training_modification.py", "--data_dir", "data_split", "--original_vavae", "models/vae", *_TRAIN],
        *["--condition_dim", "4", "--image_size", str(SIZE), "--max_epochs", "10", "--recipe", "full"],
        *["--perceptual_weight", "0", "--vf_weight", "0", "--spectral_weight", "1"],
        *["--disc_start", "6", "--disc_width", "2", "--lr", "2e-3"],
    ],
    "vavae_dit": [
        *["train", "experiment=vavae_dit", "--data_dir", "data_split", "--vavae", "vavae/vavae", *_STEPS, "--flips"],
        *["--latents_dir", "latents/vavae", "--hidden_size", "8", "--depth", "1", "--num_heads", "2"],
        *["--patch_size", "4", "model.dit_module.warmup_steps=2"],
    ],
    "rae_decoder": [
        *["train", "experiment=rae_decoder", "--data_dir", "data_split", *_STEPS],
        *["model.rae.encoder_config_path=models/dinov2", "model.rae.encoder_input_size=12"],
        *["model.rae.decoder=models/decoder", "model.losses.disc_width=2", "model.decoder_module.warmup_steps=2"],
    ],
    "rae_dit": [
        *["train", "experiment=rae_dit", "--data_dir", "data_split", *_STEPS, "model.rae.folder=rae_decoder/rae"],
        *["data.latents_dir=latents/rae", "data.flips=false", "model.dit.input_size=3", "model.dit.in_channels=8"],
        *["model.dit.hidden_size=[8,8]", "model.dit.depth=[1,1]", "model.dit.num_heads=[2,2]"],
        *["model.dit.num_classes=null", "model.dit_module.warmup_steps=2"],
    ],
    "text_to_image": [
        *["train", "experiment=text_to_image", "data.dataset_name=custom", "data.dataset_path=pictures", *_STEPS],
        *["data.image_size=24", "data.val_share=0.2", "data.latents_dir=latents/text", "data.cache=true", *_SMALL],
        *["model.num_layers=1", "text_encoder.name=models/clip", "vae.name=models/vae", "lr_scheduler.warmup_steps=2"],
        *["training.logging_steps=10"],
    ],
    "token_images": [
        *["train", "experiment=token_images", "--data_path", "zen", "--img_size", "32", *_STEPS, *_SMALL],
        *["model.depth=1", "--warmup_steps", "2", "--batch_size", "9"],
    ],
}
"""Training → its command. Keys and flags are those of that day."""
SAMPLES = {
    "vavae_dit": ["--num_samples", "3", "--cfg_scale", "2", "--num_steps", "3"],
    "rae_dit": ["--num_samples", "3", "--cfg_scale", "2", "--num_steps", "3"],
    "text_to_image": ["--prompt", "a red 1", "a blue 2", "--num_steps", "3", "--cfg_scale", "2"],
    "token_images": ["--num_samples", "2", "--num_steps", "3"],
}
"""Training → how `vavae_tools.sample` is asked."""
KEPT = ("checkpoints/last.ckpt", ".hydra", "run.json", "train.log", "autoencoder", "text_encoder", "tokenizer")
"""Of a run that was stopped; of the whole one its models, and FOLDERS."""
MODELS = ("vavae/vavae", "rae_decoder/rae", *(f"{name}/pipeline" for name in SAMPLES))
FOLDERS = ("vavae_dit/checkpoint-16", "token_images/checkpoint_16.pth")


def run(words: list[str]) -> None:
    """A command as it is typed, after `python` or `python -m vavae_tools.`, but in this process."""
    sys.argv = words
    if words[0].endswith(".py"):
        runpy.run_path(str(ROOT / words[0]), run_name="__main__")
    else:
        runpy.run_module(f"vavae_tools.{words[0]}", run_name="__main__")


def png(pixels: bytes, side: int) -> bytes:
    """An image whose file is the same bytes everywhere: what goes on compares names and lengths of files."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    rows = b"".join(b"\0" + pixels[start : start + 3 * side] for start in range(0, len(pixels), 3 * side))
    stored = b"\x78\x01\x01" + struct.pack("<HH", len(rows), len(rows) ^ 0xFFFF) + rows
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", stored + struct.pack(">I", zlib.adler32(rows))) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


def write_images(folder: Path) -> None:
    """Three people with ten images each, stripes of a colour and a width; a caption beside each."""
    for person, colour in enumerate(("red", "green", "blue")):
        (folder / f"ID_{person + 1}").mkdir(parents=True)
        for number in range(10):
            stripes = ((x + number * y // 4) // (2 + person) % 2 for y in range(SIZE) for x in range(SIZE))
            colours = [200 - 60 * abs(person - channel) + 12 * number for channel in range(3)]
            pixels = bytes((level + 40 * stripe) % 256 for stripe in stripes for level in colours)
            path = folder / f"ID_{person + 1}" / f"{number}.png"
            path.write_bytes(png(pixels, SIZE))
            path.with_suffix(".txt").write_text(f"a {colour} {number}\n", encoding="utf-8")


def write_models(folder: Path) -> None:
    """What people bring along, tiny and random: a VAE of diffusers, CLIP's text and a DINOv2 of transformers."""
    from diffusers import AutoencoderKL
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import (
        CLIPTextConfig,
        CLIPTextModel,
        CLIPTokenizer,
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
    )

    torch.manual_seed(0)
    AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(4, 4),
        norm_num_groups=2,
        latent_channels=2,
        sample_size=SIZE,
    ).save_pretrained(folder / "vae")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    encoder = Dinov2WithRegistersConfig(**sizes, image_size=12, patch_size=4)
    Dinov2WithRegistersModel(encoder).save_pretrained(folder / "dinov2")
    decoder = {"decoder_intermediate_size": 16, "decoder_patch_size": 8} | {f"decoder_{k}": v for k, v in sizes.items()}
    (folder / "decoder").mkdir()
    (folder / "decoder" / "config.json").write_text(json.dumps(decoder) + "\n", encoding="utf-8")
    letters = sorted(ByteLevel.alphabet())
    pieces = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({piece: place for place, piece in enumerate(pieces)}, [], model_max_length=12)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = CLIPTextConfig(**sizes, **ends, vocab_size=len(pieces), intermediate_size=16, max_position_embeddings=12)
    CLIPTextModel(text).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")


def write_data(folder: Path) -> None:
    """Images and their split."""
    write_images(folder / "pictures")
    run(["data_split.py", "--input_dir", str(folder / "pictures"), "--output_dir", str(folder / "data_split")])


def end_of(output_dir: Path, before: Path) -> dict[str, float]:
    """What the end of a training is known by, whatever its weights are called.

    Args:
        before: an earlier checkpoint; how far the weights, sorted by size, have come since then is told.
    """
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found: dict[str, float] = {}
    for events in sorted(output_dir.glob("lightning_logs/*/events*"), key=lambda path: path.stat().st_mtime):
        read = EventAccumulator(str(events)).Reload()
        there = {"train/loss", "val/loss", "val/psnr"} & set(read.Tags()["scalars"])
        found |= {name: read.Scalars(name)[-1].value for name in there}
    first, last = (torch.load(path, weights_only=True) for path in (before, output_dir / "checkpoints" / "last.ckpt"))
    found["step"] = last["global_step"]
    found["weights moved"] = (_sorted(last["state_dict"]) - _sorted(first["state_dict"])).norm().item()
    for number, optimiser in enumerate(last["optimizer_states"]):
        for moment in ("exp_avg", "exp_avg_sq"):
            values = {place: state[moment] for place, state in optimiser["state"].items()}
            found[f"optimiser {number}, {moment}"] = _sorted(values).norm().item()
    return dict(sorted(found.items()))


def _sorted(tensors: dict[object, torch.Tensor]) -> torch.Tensor:
    return torch.cat([t.flatten().double() for t in tensors.values() if t.is_floating_point()]).sort().values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="gets what is kept; beside it FOLDER.work gets all the rest")
    folder = parser.parse_args().folder.absolute()
    work = folder.with_name(f"{folder.name}.work")
    work.mkdir()
    os.chdir(work)
    write_data(Path())
    write_models(Path("models"))
    expected, kept = {}, {what: what for what in ("latents", "models/vae", "models/dinov2", "models/decoder")}
    for name, words in RUNS.items():
        run([*words, "--output_dir", name, "--save_every_n_steps", str(SAVED)])
        saved = next(path for path in Path(name).glob(f"checkpoint?{SAVED}*"))
        stopped = ["--resume", str(saved), "--max_time", "0:01"]
        run([*words, *stopped, "--output_dir", f"stopped/{name}"])
        expected[name] = end_of(Path(name), Path("stopped", name, "checkpoints", "last.ckpt"))
        kept |= {f"{name}/{what}": f"stopped/{name}/{what}" for what in KEPT}
    for name, words in SAMPLES.items():
        for source in (f"{name}/pipeline", f"stopped/{name}/checkpoints/last.ckpt"):
            made = f"samples/{name}/{Path(source).name}"
            run(["sample", "--checkpoint", source, *words, "--output_dir", made])
            kept[made] = made
    for there, source in {**kept, **{what: what for what in (*MODELS, *FOLDERS)}}.items():
        if Path(source).exists():
            (folder / there).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if Path(source).is_dir() else shutil.copy)(source, folder / there)
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
