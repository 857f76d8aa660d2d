"""Texts from noise as one object: a diffusers pipeline of tokenizer, denoiser and the code that draws tokens."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from vavae_tools.data.tokens.code import TextTokens, TokenCode, load_tokenizer
from vavae_tools.data.tokens.text_files import Chat
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.layers import TokenSubset, select_tokens
from vavae_tools.diffusion.objectives import SamplePrediction, with_known
from vavae_tools.diffusion.solvers import make_solver, sample, time_grid
from vavae_tools.pipelines import base
from vavae_tools.pipelines.batches import all_finite, in_batches, precision_for
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError, in_home
from vavae_tools.runtime.files import plain_config

MIN_SIMILAR_CHATS = 100  # chats whose prompts are nearest in length say how long an answer is
Prompt = str | Chat | list[int]  # a text, messages, or the token numbers of either


class TokenImageOutput(NamedTuple):
    """What a `TokenImagePipeline` made: texts are prompts with their continuations, or a chat's answers alone."""

    texts: list[str]
    tokens: list[list[int]]  # of all cells, those of the prompts too
    images: Tensor  # float32 (N, C, H, W); known cells are ±1, the others as they were predicted
    mask: Tensor  # 1 on all cells with a token, (N, H, W)
    known: Tensor  # 1 on the prompts' cells, (N, H, W)


class TokenImagePipeline(base.DenoiserPipeline):
    """Texts of their own, continued prompts, or answers: `pipe(num_samples=4)`, `pipe(["two cats "])`.

    Args:
        denoiser: a `DiT` whose patches are the code's cells, with a channel more than the code: which cells are known.
        conditioner: of the one class "text".
        code: the arguments of `TokenCode`.
        lengths: how many of the training's images have 0, 1, … tokens to learn: lengths are drawn from it.
        time_shift: above 1 most steps are made at high noise; `noise_level_hiding_a_token` is a good one.
        use_chat_template: it was trained on chats, and prompts are messages.
        answer_lengths: [tokens of the prompt, tokens of the answer, chats] of training: an answer's length is drawn
            from those of about `MIN_SIMILAR_CHATS` chats whose prompts are nearest in length.
        objective: the config of what was trained with; None: the clean image.
        solver: one of `diffusion.SOLVERS`; None: steps with fresh noise, see eta of `__call__`.
    """

    model_cpu_offload_seq = "conditioner->denoiser"
    makes = "text"
    usual_objective = SamplePrediction()

    def __init__(
        self,
        denoiser: ModelMixin,
        conditioner: ClassConditioner,
        tokenizer: Any,
        code: dict[str, int] | None = None,  # with a default diffusers keeps them as numbers, not as models
        lengths: list[int] | None = None,
        time_shift: float = 1.0,
        use_chat_template: bool = False,
        answer_lengths: list[list[int]] | None = None,
        objective: dict[str, Any] | None = None,
        solver: str | None = None,
    ) -> None:
        super().__init__()
        if code is None or lengths is None or len(lengths) < 2:
            raise UserError("A TokenImagePipeline needs the code that draws tokens, and the lengths of texts")
        self.register_modules(denoiser=denoiser, conditioner=conditioner, tokenizer=tokenizer)
        of_lengths = {"lengths": list(lengths), "answer_lengths": answer_lengths}
        settings = {"time_shift": time_shift, "objective": objective, "solver": solver, **of_lengths}
        self.register_to_config(code=code, use_chat_template=use_chat_template, **settings)

    def swap_solver(self, name: str) -> None:
        make_solver(name, self.objective)  # which is there, or says what is
        self.register_to_config(solver=name)

    @cached_property
    def code(self) -> TokenCode:
        return TokenCode(**self.config.code)

    @cached_property
    def text_tokens(self) -> TextTokens:
        return TextTokens(self.tokenizer)

    @property
    def img_size(self) -> int:
        return self.denoiser.latent_shape[1]

    def shares(self, t: float) -> list[float]:
        return [share.item() for share in self.objective.shares(torch.tensor(t, dtype=torch.float64))]

    @property
    def _cells(self) -> int:
        return len(self.config.lengths) - 1  # as many as in training

    def facts(self) -> dict[str, Any]:
        """Return what texts follow from besides the arguments of the call."""
        others = ("denoiser", "conditioner", "tokenizer", "objective", "solver")
        config = {name: value for name, value in plain_config(self).items() if name not in others}
        words = [self.tokenizer.get_vocab(), self.tokenizer.chat_template]
        model = json.dumps([base.digest_of(self.denoiser, self.conditioner), config, words], sort_keys=True)
        solver = {"solver": {"name": self.config.solver}} if self.config.solver else {}
        return {"model": hashlib.sha256(model.encode()).hexdigest(), **solver}

    @torch.no_grad()
    def __call__(
        self,
        prompts: Prompt | Sequence[Prompt] | None = None,
        num_samples: int = 1,
        max_new_tokens: int | None = None,
        num_inference_steps: int = 100,
        eta: float = 1.0,
        seed: int = 0,
        batch_size: int | None = None,
        numbers: Sequence[int] | None = None,
        precision: str | None = None,
    ) -> TokenImageOutput:
        """Write texts.

        Args:
            prompts: beginnings of texts, or questions or chats to answer, or token numbers; None: texts of their own.
            num_samples: texts for each prompt, or without prompts in all.
            max_new_tokens: the length to write, at most up to the last cell; None: drawn from the lengths of training
                that are longer than the prompt, if any.
            eta: share of fresh noise in each step as in DDIM (Song et al. 2021), where the pipeline has no solver: 1
                corrects earlier errors, 0 is Euler's method on the flow.
            seed: text number i of a seed is the same whatever else is made beside it.
            numbers: of the texts in the seed, in place of 0, 1, … and of num_samples.
        """
        steps = num_inference_steps
        check_sampling(eta, num_samples=num_samples, max_new_tokens=max_new_tokens, num_inference_steps=steps)
        precision = precision_for(self, precision)
        if prompts is None and numbers is not None:
            num_samples = len(numbers)
        starts = [start for start in self.beginnings(prompts) for _ in range(num_samples)]
        numbers = torch.tensor(list(range(len(starts)) if numbers is None else numbers))
        new = self._new_lengths(starts, max_new_tokens, seed, numbers)

        def write(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            return self._write(starts[rows], new[rows], seed, numbers[rows], steps, eta, precision)

        with self.progress_bar(total=len(starts)) as bar:
            made = in_batches(self, len(starts), write, batch_size, bar.update)
        self.maybe_free_model_hooks()  # of `enable_model_cpu_offload`
        images, mask, known = (torch.cat(parts) for parts in zip(*made, strict=True))
        tokens = shown = self.code.decode(images, mask)
        if self.config.use_chat_template:
            shown = [row[len(start) :] for row, start in zip(tokens, starts, strict=True)]
        return TokenImageOutput([self.text_tokens.decode(row) for row in shown], tokens, images, mask, known)

    # ---- beginnings and lengths
    def beginnings(self, prompts: Prompt | Sequence[Prompt] | None) -> list[list[int]]:
        """Return the tokens of each prompt, or of a single one; None is a single text that begins with none."""
        if prompts is not None:
            return [self._beginning(prompt) for prompt in as_prompts(prompts)]
        if self.config.use_chat_template:
            raise UserError("This model answers: give it prompts, questions or messages")
        return [[]]

    def _beginning(self, prompt: Prompt) -> list[int]:
        chats, tokens, most = self.config.use_chat_template, prompt, self.code.num_tokens - 1
        if isinstance(prompt, str):
            asked = [{"role": "user", "content": prompt}]
            tokens = self.text_tokens.prompt(asked) if chats else self.text_tokens.encode([prompt])[0].tolist()
        elif prompt and isinstance(prompt[0], dict):
            if not chats:
                raise UserError("This model was trained on texts without a chat template: give it a text's beginning")
            tokens = self.text_tokens.prompt(prompt)
        if tokens and not 0 <= min(tokens) <= max(tokens) <= most:
            found = f"The prompt has token numbers from {min(tokens)} to {max(tokens)}"
            raise UserError(f"{found}; they go from 0 to {most}")
        if len(tokens) >= self._cells:
            raise UserError(f"The prompt has {len(tokens)} tokens, and an image {self._cells} cells: shorten it")
        return tokens

    def _new_lengths(self, starts: list[list[int]], wanted: int | None, seed: int, numbers: Tensor) -> list[int]:
        """Return how many tokens are written after each beginning."""
        if wanted is not None:
            return [min(wanted, self._cells - len(start)) for start in starts]
        new = []
        for known, draw in zip(map(len, starts), Draws(seed, 0, numbers).uniform("length").tolist(), strict=True):
            # an answer has the length of answers, a text that goes on that of the longer texts
            free, counts = self._cells - known, self._lengths_after(known)
            fitting = counts[: free + 1] if self.config.use_chat_template else counts[known:]
            total = fitting[1:].cumsum(0)  # of texts with 1, 2, … new tokens
            new.append(1 + int((total <= draw * total[-1]).sum()) if total[-1] > 0 else free)
        return new

    def _lengths_after(self, known: int) -> Tensor:
        """Return how many of training's texts, or answers to prompts of such a length, have 0, 1, … tokens."""
        if not self.config.answer_lengths:
            return torch.tensor(self.config.lengths, dtype=torch.float64)
        counts, of_prompt = torch.zeros(self._cells + 1, dtype=torch.float64), -1
        for prompt, answer, chats in sorted(self.config.answer_lengths, key=lambda row: abs(row[0] - known)):
            if counts.sum() >= MIN_SIMILAR_CHATS and abs(prompt - known) > of_prompt:
                break
            counts[answer] += chats
            of_prompt = abs(prompt - known)
        return counts

    # ---- denoising
    def _write(
        self, starts: list[list[int]], new: list[int], seed: int, index: Tensor, steps: int, eta: float, precision: str
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return images, their mask and what is known of them, on the CPU: see `TokenImageOutput`."""
        known, place = torch.tensor(list(map(len, starts)))[:, None], torch.arange(self._cells)
        lengths = known + torch.tensor(new)[:, None]
        tokens = pad_sequence([torch.tensor(start, dtype=torch.int64) for start in starts], batch_first=True)
        clean = self.code.draw(tokens, (place < known)[:, : tokens.shape[1]], self.img_size)
        mask, given = (self.code.spread_to_pixels((place < until).float(), self.img_size) for until in (lengths, known))
        index = index.to(self._execution_device)

        def denoise(rows: Tensor) -> Tensor:
            draws = Draws(seed, 1, index[rows])
            noise = (draws.normal(f"noise {step}", *clean.shape[1:]) for step in range(steps))
            told = [values[rows.cpu()] for values in (mask, given, clean)]
            if not self.config.solver:
                return self.denoise(next(noise), *told, time_grid(steps, 1 / self.config.time_shift), eta, noise)
            (ask, known, true), start = self.asked_of(*told), next(noise)
            solver = make_solver(self.config.solver, self.objective, self.config.time_shift)
            made = sample(ask, solver, start, start, None, steps, objective=self.objective)
            return torch.where(known[:, None] > 0, true, made)

        made = all_finite(self, len(starts), precision, denoise, "texts")
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
    ) -> Tensor:
        """Return the clean image that is predicted at the last step, float32 (B, C, H, W).

        Args:
            x: (B, C, H, W) at the first of the times (steps + 1,), which end at 1; see `solvers.time_grid`.
            mask, known: pixels with a token, and those of them that `clean` (B, C, H, W) tells, (B, H, W).
            eta, noise: see `__call__`; fresh noise for each step but the last, needed where eta is above 0.
        """
        ask, known, clean = self.asked_of(mask, known, clean)
        x = predicted = x.to(clean.device)
        for t, later in pairwise(times.tolist()):
            at = torch.full((len(x),), t, dtype=torch.float32, device=x.device)
            predicted = self.objective.clean(ask(x, at).float(), x, at)
            if later < 1:
                (alpha, sigma), (alpha_later, sigma_later) = self.shares(t), self.shares(later)
                kept_noise, fresh = (x - alpha * predicted) / sigma, next(noise) if eta else 0.0
                x = alpha_later * predicted + sigma_later * ((1 - eta**2) ** 0.5 * kept_noise + eta * fresh)
        return torch.where(known[:, None] > 0, clean, predicted)

    def asked_of(self, mask: Tensor, known: Tensor, clean: Tensor) -> tuple[Callable[..., Tensor], Tensor, Tensor]:
        """Return (x, t) → what the denoiser says of a mask's cells, and `known` and `clean` where it computes."""
        parts = known, clean, *select_tokens(mask, self.code.cell_size)
        known, clean, *kept = (values.to(self._execution_device) for values in parts)

        def ask(x: Tensor, t: Tensor, _: Tensor | None = None) -> Tensor:
            conditioning = self.conditioner(torch.zeros(len(x), dtype=torch.int64, device=x.device))
            return self.denoiser(with_known(x, clean, known), t, conditioning, TokenSubset(*kept))[:, : x.shape[1]]

        return ask, known, clean


# ---- what is asked
def check_sampling(eta: float = 1.0, **settings: Any) -> None:
    """Raise `UserError` for a number below 1, or an eta that is no share."""
    for name in ("num_samples", "max_new_tokens", "num_inference_steps"):
        if settings.get(name) is not None and settings[name] < 1:
            raise UserError(f"{name} {settings[name]}: expected 1 or more")
    if not 0 <= eta <= 1:
        raise UserError(f"eta {eta:g}: expected a share of fresh noise from 0 to 1")


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Return prompts, or a single one, as a list of texts, of messages and of plain token numbers."""
    if not len(prompts) and not isinstance(prompts, str):
        raise UserError("No prompts: give one or more, or None for texts of their own")
    single = isinstance(prompts, str) or isinstance(prompts[0], dict | Integral)
    return [_as_prompt(prompt) for prompt in ([prompts] if single else prompts)]


def _as_prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return prompt
    parts = list(prompt) if isinstance(prompt, Iterable) else [None]
    if all(isinstance(part, Integral) for part in parts):
        return [int(part) for part in parts]
    chat = [{name: part.get(name) for name in ("role", "content")} for part in parts if isinstance(part, dict)]
    if len(chat) < len(parts) or not all(isinstance(word, str) for message in chat for word in message.values()):
        neither = 'neither a text, nor messages {"role": …, "content": …}, nor token numbers'
        raise UserError(f"The prompt {str(prompt)[:80]} is {neither}")
    return chat


# ---- from files
def load_token_pipeline(path: str | Path, ema: bool = True, run: str | Path | None = None) -> TokenImagePipeline:
    """Load as `load_pipeline` does, of training on token images; `tokenizer/` is where it has `autoencoder/`."""
    path = in_home(path)
    if base.is_folder_of_pipeline(path):
        own = base.kind_of(path) == TokenImagePipeline.__name__  # else it is said what it is
        options = {"tokenizer": load_tokenizer(base.folder_beside(path, "tokenizer"))} if own else {}
        pipe = base.read_pipeline(TokenImagePipeline, path, ema, local_files_only=True, **options)
    else:
        *models, settings = base.read_training(TokenImagePipeline, path, ema, ClassConditioner)
        tokenizer = load_tokenizer(base.folder_beside(path, "tokenizer", run=run))
        pipe = TokenImagePipeline(*models, tokenizer, **settings["token_images"], objective=settings.get("objective"))
    if (tokens := len(pipe.text_tokens)) != (known := pipe.code.num_tokens):
        found = f"The tokenizer of {path} has {tokens:,} tokens, the model {known:,}"
        raise UserError(f"{found}: take the tokenizer/ of its training")
    return pipe
