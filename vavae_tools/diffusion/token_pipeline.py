"""Texts from noise as one object: a diffusers pipeline of tokenizer, denoiser and the code that draws tokens."""

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor

from vavae_tools.checkpoints.folders import is_checkpoint
from vavae_tools.data.text_files import Chat
from vavae_tools.data.text_tokens import TextTokens, load_tokenizer
from vavae_tools.data.token_code import TokenCode
from vavae_tools.diffusion.clean_prediction import with_known
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.pipeline_folders import read_index, read_pipeline, read_training, trained_models
from vavae_tools.diffusion.sampling import time_grid
from vavae_tools.diffusion.transformer import kept_patches
from vavae_tools.draws import Draws
from vavae_tools.errors import UserError

Prompt = str | Chat | list[int]
"""A text, messages, or the token numbers of either."""


class Written(NamedTuple):
    """What a `TokenImagePipeline` made.

    Attributes:
        texts: a prompt with its continuation, or a chat's answer alone.
        tokens: token numbers of all cells, those of the prompts too.
        pictures: float32 (N, C, H, W); known cells are ±1, the others as they were predicted.
        mask: 1 on all cells with a token, (N, H, W).
        known: 1 on the prompts' cells, (N, H, W).
    """

    texts: list[str]
    tokens: list[list[int]]
    pictures: Tensor
    mask: Tensor
    known: Tensor


class TokenImagePipeline(DiffusionPipeline):
    """Texts of their own, continued prompts, or answers: `pipe(num_samples=4)`, `pipe(["two cats "])`.

    Args:
        denoiser: a `DiT` whose patches are the code's cells, with a channel more than the code: which cells are known.
        conditioner: of the one class "text".
        tokenizer: transformers' own.
        code: the arguments of `TokenCode`.
        lengths: how many of the training's pictures have 0, 1, … tokens to learn: lengths are drawn from it.
        time_shift: of the objective it was trained with: sampling makes its steps where training was.
        use_chat_template: it was trained on chats, and prompts are messages.

    `save_pretrained(folder)` and `load_token_pipeline(folder)` keep all of it.
    """

    def __init__(
        self,
        denoiser: ModelMixin,
        conditioner: ClassConditioner,
        tokenizer: Any,
        code: dict[str, int] | None = None,  # with a default diffusers keeps them as numbers, not as models
        lengths: Sequence[int] = (),
        time_shift: float = 1.0,
        use_chat_template: bool = False,
    ) -> None:
        super().__init__()
        if code is None or len(lengths) < 2:
            raise UserError("A TokenImagePipeline needs the code that draws tokens, and the lengths of texts")
        self.register_modules(denoiser=denoiser, conditioner=conditioner, tokenizer=tokenizer)
        self.register_to_config(
            code=code, lengths=list(lengths), time_shift=time_shift, use_chat_template=use_chat_template
        )

    @cached_property
    def code(self) -> TokenCode:
        return TokenCode(**self.config.code)

    @cached_property
    def text_tokens(self) -> TextTokens:
        return TextTokens(self.tokenizer)

    @property
    def img_size(self) -> int:
        return self.denoiser.latent_shape[1]

    @torch.no_grad()
    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        num_samples: int = 1,
        max_new_tokens: int | None = None,
        num_inference_steps: int = 100,
        eta: float = 1.0,
        seed: int = 0,
        batch_size: int = 64,
        numbers: Sequence[int] | None = None,
    ) -> Written:
        """Write texts.

        Args:
            prompts: beginnings of texts, or chats, a question or its messages, whose answers are wanted; or either as
                token numbers; None: texts of their own.
            num_samples: texts in all without prompts, for each prompt with them.
            max_new_tokens: the length to write; None: drawn from the lengths of training.
            num_inference_steps: calls of the denoiser.
            eta: share of fresh noise in each step as in DDIM (Song et al. 2021): 1 corrects earlier errors, 0 is
                Euler's method on the flow.
            seed: text number i of a seed is the same whatever else is made beside it.
            batch_size: made at once; it changes memory and speed, not the texts.
            numbers: of the texts in the seed; None: 0, 1, …. Without prompts as many are made as there are numbers.

        Raises:
            UserError: a prompt that leaves no cell free, or numbers that cannot be.
        """
        counts = {"num_samples": num_samples, "batch_size": batch_size, "num_inference_steps": num_inference_steps}
        for name, count in (counts | {"max_new_tokens": max_new_tokens or 1}).items():
            if count < 1:
                raise UserError(f"{name} {count}: expected 1 or more")
        if prompts is None:
            prompts = [None] if numbers is None else [None] * len(numbers)
        single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict | int))
        rows = [row for prompt in ([prompts] if single else prompts) for row in [self._beginning(prompt)] * num_samples]
        if not rows:
            raise UserError("No prompts: give at least one, or None for texts of their own")
        numbers = torch.arange(len(rows)) if numbers is None else torch.tensor(numbers)
        new = self._new_lengths(rows, max_new_tokens, seed, numbers)
        made = []
        with self.progress_bar(total=len(rows)) as bar:
            for part in torch.arange(len(rows)).split(batch_size):
                of_part = [rows[i] for i in part.tolist()], [new[i] for i in part.tolist()]
                made.append(self._write(*of_part, seed, numbers[part], num_inference_steps, eta))
                bar.update(len(part))
        pictures, mask, known = (torch.cat(parts) for parts in zip(*made, strict=True))
        tokens = self.code.decode(pictures, mask)
        shown = (
            [row[len(start) :] for row, start in zip(tokens, rows, strict=True)]
            if self.config.use_chat_template
            else tokens
        )
        return Written([self.text_tokens.decode(row) for row in shown], tokens, pictures, mask, known)

    def _beginning(self, prompt: Prompt | None) -> list[int]:
        """The tokens of a prompt, which leave a cell free."""
        if prompt is None:
            return []
        if len(prompt) and isinstance(prompt[0], int):
            tokens = list(prompt)
        elif self.config.use_chat_template:
            chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            tokens = self.text_tokens.prompt(chat)
        elif isinstance(prompt, str):
            tokens = self.text_tokens.encode([prompt])[0].tolist()
        else:
            raise UserError("This model was trained on texts without a chat template: give it the beginning of a text")
        if len(tokens) >= self._cells:
            raise UserError(f"The prompt has {len(tokens)} tokens, and a picture {self._cells} cells: shorten it")
        return tokens

    @property
    def _cells(self) -> int:
        """That a picture may have; as many as in training."""
        return len(self.config.lengths) - 1

    def _new_lengths(self, rows: list[list[int]], wanted: int | None, seed: int, numbers: Tensor) -> list[int]:
        """How many tokens are written after each beginning."""
        if wanted is not None:
            return [min(wanted, self._cells - len(row)) for row in rows]
        counts = torch.tensor(self.config.lengths, dtype=torch.float64)
        counts[0] = 0
        uniform = Draws(seed, 0, numbers).uniform("length")
        new = []
        for row, draw in zip(rows, uniform.tolist(), strict=True):
            known = len(row)
            # an answer has the length of answers, a text that goes on that of the longer texts
            fitting = counts[: self._cells - known + 1] if self.config.use_chat_template else counts[known:].clone()
            if not self.config.use_chat_template:
                fitting[0] = 0
            total = fitting.cumsum(0)
            new.append(int((total <= draw * total[-1]).sum()) if total[-1] > 0 else self._cells - known)
        return new

    def _write(
        self, rows: list[list[int]], new: list[int], seed: int, numbers: Tensor, steps: int, eta: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        known = torch.tensor([len(row) for row in rows])[:, None]
        lengths = known + torch.tensor(new)[:, None]
        place = torch.arange(int(lengths.max()))
        tokens = torch.zeros(len(rows), len(place), dtype=torch.int64)
        for row, of_row in zip(tokens, rows, strict=True):
            row[: len(of_row)] = torch.tensor(of_row, dtype=torch.int64)
        clean = self.code.draw(tokens, place < known, self.img_size)
        mask, given = (self.code.over_pixels((place < until).float(), self.img_size) for until in (lengths, known))
        device = self._execution_device
        draws = Draws(seed, 1, numbers.to(device))
        noise = (draws.normal(f"noise {step}", *clean.shape[1:]) for step in range(steps))
        made = self.denoise(next(noise), mask, given, clean, time_grid(steps, 1 / self.config.time_shift), eta, noise)
        return made.cpu(), mask, given

    @torch.no_grad()
    def denoise(
        self,
        x: Tensor,
        mask: Tensor,
        known: Tensor,
        clean: Tensor,
        times: Tensor,
        eta: float = 1.0,
        noise: Iterator[Tensor] | None = None,
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """From a noisy picture to the clean one that is predicted at the last step, float32 (B, C, H, W).

        Args:
            x: (B, C, H, W) at the first of the times.
            mask, known: pixels with a token, and those of them that `clean` (B, C, H, W) tells, (B, H, W).
            times: (steps + 1,), from the time of x to 1; `sampling.time_grid`.
            eta, noise: see `__call__`; fresh noise for each step but the last, needed where eta is above 0.
            callback: called after each step with its number and the prediction.
        """
        device = self._execution_device
        x, mask, known, clean = (value.to(device) for value in (x, mask, known, clean))
        kept, times = kept_patches(mask, self.code.cell_size), times.tolist()
        conditioning = self.conditioner(torch.zeros(len(x), dtype=torch.int64, device=device))
        predicted = x
        for step, (t, later) in enumerate(pairwise(times)):
            at = torch.full((len(x),), t, dtype=torch.float32, device=device)
            predicted = self.denoiser(with_known(x, clean, known), at, conditioning, kept)[:, : x.shape[1]].float()
            if callback is not None:
                callback(step, predicted)
            if later < 1:
                fresh = next(noise) if eta else 0.0
                kept_noise = (x - t * predicted) / (1 - t)
                x = later * predicted + (1 - later) * ((1 - eta**2) ** 0.5 * kept_noise + eta * fresh)
        return torch.where(known[:, None] > 0, clean, predicted)


def is_token_pipeline(path: str | Path) -> bool:
    """Whether `load_token_pipeline` takes what is there; what is damaged is no matter of this function."""
    path = Path(path)
    if path.is_dir() and not is_checkpoint(path):
        return read_index(path).get("_class_name") == TokenImagePipeline.__name__
    return "token_images" in read_training(path)[1]


def load_token_pipeline(path: str | Path, ema: bool = True) -> TokenImagePipeline:
    """Load a pipeline from its folder, or from a checkpoint of training on token images.

    Args:
        path: a folder that `save_pretrained` wrote; a `.ckpt`, a `.pth` or a checkpoint's folder, with `tokenizer/`
            beside it or above.
        ema: of a checkpoint, take the averaged weights; False takes the live ones.

    Raises:
        UserError: nothing there, a checkpoint of another kind, no tokenizer beside it, or live weights of a folder.
    """
    path = Path(path)
    if path.is_dir() and not is_checkpoint(path):
        return read_pipeline(TokenImagePipeline, path, ema, local_files_only=True)
    state, settings = read_training(path)
    if "token_images" not in settings:
        raise UserError(f"{path} is a checkpoint of another training than that on token images")
    folder = next(
        (parent / "tokenizer" for parent in path.absolute().parents[:2] if (parent / "tokenizer").is_dir()), None
    )
    if folder is None:
        raise UserError(f"No tokenizer/ beside {path}: copy it from the folder of its training")
    denoiser, conditioner = trained_models(path, state, settings, ClassConditioner, ema)
    return TokenImagePipeline(denoiser, conditioner, load_tokenizer(folder), **settings["token_images"])
