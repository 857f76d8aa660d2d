"""Texts as images, whole: from text files to a pipeline that writes. `experiment=token_images`."""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from vavae_tools.data.datasets import training_share
from vavae_tools.data.tokens.dataset import TokenImageDataModule, TokenImageDataset
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.dit import make_denoiser
from vavae_tools.diffusion.objectives import noise_level_hiding_a_token
from vavae_tools.pipelines.tokens import TokenImagePipeline, load_token_pipeline
from vavae_tools.recipes.base import TokenImageRecipe
from vavae_tools.recipes.dit import denoiser_run, given_size, make_recipe_objective, prepared
from vavae_tools.runtime.files import save_model
from vavae_tools.runtime.ranks import is_rank_zero
from vavae_tools.training.callbacks.previews import TextPreviews
from vavae_tools.training.denoiser_module import DiffusionModule
from vavae_tools.training.run import Log, Run, Show, train

COLUMNS = 4  # of texts of their own, and below them of texts that go on


def build(recipe: TokenImageRecipe, output_dir: Path, resume_from: Path | None, show: Show | None, log: Log) -> Run:
    data, config, sampling, seed = recipe.data, recipe.train, recipe.sampling, recipe.seed
    names = ("use_chat_template", "max_tokens", "tokenizer", "vocab_size", "cell_size", "channels")
    options = {name: getattr(data, name) for name in names}
    texts = TokenImageDataset(data.data_dir, img_size=data.image_size, **options)
    log(str(texts))
    val_share = data.val_share if data.train_split is None else round(1 - training_share(data.train_split), 9)
    images = TokenImageDataModule(texts, config.batch_size, val_share, num_workers=data.num_workers, seed=seed)
    images.gathered = config.accumulate_grad_batches
    if is_rank_zero():
        save_model(texts.tokens.tokenizer, output_dir / "tokenizer")

    noise, wanted = noise_level_hiding_a_token(texts.code.length), recipe.objective
    if wanted.name in ("sample", "x0", "flow_matching") and wanted.time_mean is None:
        wanted = replace(wanted, time_mean=-math.log(noise))  # most often where noise just hides a cell's token
    shape = data.channels, data.image_size, data.image_size
    objective = make_recipe_objective(wanted, TokenImageRecipe().objective, shape)
    size = {"input_size": data.image_size, "patch_size": data.cell_size}
    denoiser = make_denoiser({**given_size(recipe.model), **size, "in_channels": data.channels + 1})  # + known cells
    config, numbers = prepared(config, denoiser, seed, log)
    of_pipeline = {
        "code": texts.code.config,
        "lengths": images.train_data.lengths().tolist(),
        "time_shift": noise if sampling.time_shift is None else sampling.time_shift,
        "use_chat_template": data.use_chat_template,
        "answer_lengths": images.train_data.answer_lengths(),
    }
    conditioner = ClassConditioner(1, denoiser.conditioning_size, dropout=0.0)
    numbers |= {"token_images": of_pipeline, "prompt_share": recipe.prompt_share}
    module = DiffusionModule(denoiser, conditioner, objective, **numbers)
    subset = images.shown_data
    prompts = sampling.prompts or subset.prompts(range(min(COLUMNS, len(subset))))
    prompts = [prompts] if isinstance(prompts, str) else prompts

    def pipeline_of(trained: nn.ModuleDict) -> TokenImagePipeline:
        further = {"tokenizer": texts.tokens.tokenizer, "objective": objective.config, "solver": sampling.solver}
        return TokenImagePipeline(**trained, **of_pipeline, **further)

    pipeline_of(module.network).beginnings(prompts)  # what does not fit is said before anything takes time

    def make(trained: nn.ModuleDict) -> tuple[Tensor, list[str]]:
        pipe = pipeline_of(trained)
        pipe.set_progress_bar_config(disable=True)
        settings = {"num_inference_steps": sampling.num_steps, "eta": sampling.eta, "seed": seed}
        made = [pipe(num_samples=COLUMNS, **settings)] if not data.use_chat_template else []
        made += [pipe(prompts, **settings)] if prompts else []
        return torch.cat([of.images for of in made]), [text for of in made for text in of.texts]

    rows = ["of its own"] * (not data.use_chat_template) + ["given beginnings"] * -(-len(prompts) // COLUMNS)
    preview = partial(TextPreviews, make, COLUMNS, show=show, log=log, rows=rows)
    further = {"data": images, "fingerprint": images.train_data.fingerprint()}
    return denoiser_run(module, config, output_dir, load_token_pipeline, preview, log, **further)


train_token_images = partial(train, build)
