"""Texts as pictures, whole: from text files to a pipeline that writes. `experiment=token_images`."""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from vavae_tools.checkpoints.resuming import resume_path
from vavae_tools.data.tokens.dataset import TokenImageDataModule, TokenImageDataset
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.factory import make_denoiser
from vavae_tools.diffusion.objectives import CleanPrediction, hiding_noise
from vavae_tools.pipelines.tokens import TokenImagePipeline, load_token_pipeline
from vavae_tools.runtime.console import say
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import save_model
from vavae_tools.runtime.ranks import is_first
from vavae_tools.training.callbacks.previews import TextPreviews
from vavae_tools.training.callbacks.train_log import TrainLog
from vavae_tools.training.config import Saving, saving_knobs
from vavae_tools.training.denoiser_module import TokenImageModule
from vavae_tools.training.devices import compiles, quiet_lightning
from vavae_tools.training.memory import TOKEN_IMAGES
from vavae_tools.training.optim import DECAYS
from vavae_tools.training.run import length_of, train_denoiser

COLUMNS = 4
"""Of texts of their own, and below them of texts that go on."""


def train_token_images(
    data: dict[str, Any],
    model: dict[str, Any],
    training: dict[str, Any],
    ema: dict[str, Any],
    sampling: dict[str, Any],
    trainer: dict[str, Any],
    callbacks: dict[str, Any],
    output_dir: str | Path,
    resume: str | None = None,
    seed: int = 0,
    say: Callable[[str], None] = say,
    show: Callable[[Tensor], None] | None = None,
) -> Path:
    """`experiment=token_images`, `token_dummy`, with the keys of `configs/`; returns the pipeline's folder.

    Raises:
        UserError: texts that are not there, or settings that cannot be.
    """
    _check(model, training, ema, sampling)
    L.seed_everything(seed, verbose=False)
    quiet_lightning()
    output_dir = Path(output_dir)
    resume_from = resume_path(resume, output_dir / "checkpoints", say)
    texts = TokenImageDataset(**{name: value for name, value in data.items() if name != "val_share"})
    say(str(texts))
    pictures = TokenImageDataModule(texts, training["batch_size"], data["val_share"], training["num_workers"], seed)
    pictures.gathered = training["gradient_accumulation_steps"]
    if is_first():
        save_model(texts.tokens.tokenizer, output_dir / "tokenizer")

    noise, times = hiding_noise(texts.code.length), model["objective"]
    mean = -math.log(noise) if times["time_mean"] is None else times["time_mean"]
    objective = CleanPrediction(**{**times, "time_mean": mean})
    denoiser = make_denoiser(_denoiser_settings(data, model))
    if training["gradient_checkpointing"]:
        denoiser.enable_gradient_checkpointing()
    compile = compiles(training["compile"], say=say)
    of_pipeline = {
        "code": texts.code.config,
        "lengths": pictures.train_data.lengths().tolist(),
        "time_shift": noise if sampling["time_shift"] is None else sampling["time_shift"],
        "use_chat_template": data["use_chat_template"],
        "answer_lengths": pictures.train_data.answer_lengths(),
    }
    module = TokenImageModule(
        denoiser,
        ClassConditioner(1, denoiser.conditioning_size, dropout=0.0),
        objective,
        of_pipeline,
        training["prompt_share"],
        lr=training["learning_rate"],
        ema_decay=ema["decay"] if ema["enabled"] else 0.0,  # an average over nothing but the last step
        warmup_steps=training["warmup_steps"],
        schedule=training["schedule"],
        seed=seed,
        compile=compile,
    )
    prompts = _first_prompts(pictures, sampling["prompts"])

    def pipeline(trained: torch.nn.ModuleDict) -> TokenImagePipeline:
        return TokenImagePipeline(trained["denoiser"], trained["conditioner"], texts.tokens.tokenizer, **of_pipeline)

    pipeline(module.network).beginnings(prompts)  # what does not fit is said before anything takes time

    def make(trained: torch.nn.ModuleDict) -> tuple[Tensor, list[str]]:
        pipe = pipeline(trained)
        pipe.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": sampling["num_steps"], "eta": sampling["eta"], "seed": seed}
        made = [pipe(num_samples=COLUMNS, **settings)] if not data["use_chat_template"] else []
        made += [pipe(prompts, **settings)] if prompts else []
        return torch.cat([of.pictures for of in made]), [text for of in made for text in of.texts]

    if trainer["precision"] is None and not training["use_amp"]:
        trainer = {**trainer, "precision": "32"}
    done = train_denoiser(
        module,
        pictures,
        output_dir,
        make,
        COLUMNS,
        callbacks["previews"],
        data_key=pictures.train_data.fingerprint(),
        devices={**trainer, "log_every_n_steps": training["logging_steps"]},
        saving=Saving(**saving_knobs(callbacks)),
        best="epoch=",
        compile=compile,
        say=say,
        resume_from=resume_from,
        show=show,
        callbacks=[TrainLog(output_dir, training["logging_steps"], say)],
        names=TOKEN_IMAGES,
        preview=partial(TextPreviews, say=say),
        **length_of(training),
    )
    made = output_dir / "pipeline"
    if done.is_global_zero:
        save_model(load_token_pipeline(output_dir / "checkpoints" / "last.ckpt"), made)
        say(f"written: {made}, {output_dir / 'checkpoints'}/, {output_dir / 'samples'}/, {output_dir / 'train.log'}")
    return made


def _denoiser_settings(data: dict[str, Any], model: dict[str, Any]) -> dict[str, Any]:
    numbers = {name: value for name, value in model.items() if name != "objective" and value is not None}
    if "size" in numbers:
        numbers = {k: v for k, v in numbers.items() if k not in ("hidden_size", "depth", "num_heads")}
    in_channels = data["channels"] + 1  # and which cells are known
    return {**numbers, "input_size": data["img_size"], "patch_size": data["cell_size"], "in_channels": in_channels}


def _first_prompts(pictures: TokenImageDataModule, given: list[Any] | str | None) -> list[Any]:
    """Prompts of the previews: those given, or beginnings of texts, or questions, that validate."""
    if given:
        return [given] if isinstance(given, str) else list(given)
    side = pictures.val_data if pictures.val_data is not None else pictures.train_data
    return side.prompts(range(min(COLUMNS, len(side))))


def _check(model: dict[str, Any], training: dict[str, Any], ema: dict[str, Any], sampling: dict[str, Any]) -> None:
    """Say what cannot be before anything takes time.

    Raises:
        UserError: the first of it.
    """
    if training["schedule"] not in DECAYS:
        raise UserError(f"training.schedule is {training['schedule']!r}, expected one of {', '.join(DECAYS)}")
    counts = {name: training[name] for name in ("batch_size", "gradient_accumulation_steps", "num_epochs")}
    for name, count in {**counts, "max_steps": training["max_steps"] or 1, "num_steps": sampling["num_steps"]}.items():
        if type(count) is not int or count < 1:
            raise UserError(f"{name} is {count!r}, expected a whole number of 1 or more")
    for name, share in {
        "training.prompt_share": training["prompt_share"],
        "ema.decay": ema["decay"],
        "sampling.eta": sampling["eta"],
    }.items():
        if not 0 <= share <= 1:
            raise UserError(f"{name} is {share!r}, expected a share from 0 to 1")
    if not training["learning_rate"] > 0:
        raise UserError(f"training.learning_rate is {training['learning_rate']!r}, expected more than 0")
