"""Texts from noise as one object: a diffusers pipeline of tokenizer, denoiser and the code that draws tokens."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

import torch
from diffusers import ModelMixin
from torch import Tensor

from vavae_tools.checkpoints.formats import is_checkpoint
from vavae_tools.data.tokens.code import TokenCode
from vavae_tools.data.tokens.text_files import Chat
from vavae_tools.data.tokens.tokenizer import TextTokens, load_tokenizer
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.diffusion.layers import Kept, kept_patches
from vavae_tools.diffusion.objectives import CleanPrediction, Objective, objective_of, with_known
from vavae_tools.diffusion.solvers import make_solver, sample, time_grid
from vavae_tools.pipelines.base import DenoiserPipeline, read_index, read_pipeline, read_training, trained_models
from vavae_tools.pipelines.portions import Portions
from vavae_tools.pipelines.precision import all_finite, precisions_for
from vavae_tools.runtime.draws import Draws
from vavae_tools.runtime.errors import UserError

LIKE = 100
"""Chats whose prompts are nearest in length say how long an answer is."""
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


class TokenImagePipeline(DenoiserPipeline):
    """Texts of their own, continued prompts, or answers: `pipe(num_samples=4)`, `pipe(["two cats "])`.

    Args:
        denoiser: a `DiT` whose patches are the code's cells, with a channel more than the code: which cells are known.
        conditioner: of the one class "text".
        tokenizer: transformers' own.
        code: the arguments of `TokenCode`.
        lengths: how many of the training's pictures have 0, 1, … tokens to learn: lengths are drawn from it.
        time_shift: above 1 most steps are made at high noise; `objectives.hiding_noise` is a good one.
        use_chat_template: it was trained on chats, and prompts are messages.
        answer_lengths: [tokens of the prompt, tokens of the answer, chats] of training: an answer's length is drawn
            from those of about `LIKE` chats whose prompts are nearest in length; without it from `lengths`.
        objective: the config of what was trained with; None: the clean picture.
        solver: one of `diffusion.SOLVERS`; None: steps with fresh noise, see eta of `__call__`.

    `save_pretrained(folder)` and `load_token_pipeline(folder)` keep all of it.
    """

    model_cpu_offload_seq = "conditioner->denoiser"

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
        self.register_to_config(
            code=code,
            lengths=list(lengths),
            time_shift=time_shift,
            use_chat_template=use_chat_template,
            answer_lengths=answer_lengths,
            objective=objective,
            solver=solver,
        )

    @cached_property
    def objective(self) -> Objective:
        return objective_of(self.config.objective) if self.config.objective else CleanPrediction()

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
    ) -> Written:
        """Write texts.

        Args:
            prompts: beginnings of texts, or chats, a question or its messages, whose answers are wanted; or either as
                token numbers; None: texts of their own.
            num_samples: texts in all without prompts, for each prompt with them.
            max_new_tokens: the length to write, at most up to the last cell; None: drawn from the lengths of training,
                of texts that go on from the longer ones. Where none was longer they go on to the last cell.
            num_inference_steps: calls of the denoiser; Heun's and the midpoint method take two for each.
            eta: share of fresh noise in each step as in DDIM (Song et al. 2021): 1 corrects earlier errors, 0 is
                Euler's method on the flow. Where the pipeline has a solver, that says it.
            seed: text number i of a seed is the same whatever else is made beside it.
            batch_size: made at once, halved where memory runs out; None: by the memory there is. It changes
                memory and speed, not the texts.
            numbers: of the texts in the seed, one for each; None: 0, 1, …. Without prompts as many are made as there
                are numbers.
            precision: "32", "16" or "bf16", see `precision`; None: the machine's own, or that of half weights.

        Raises:
            UserError: as `beginnings`, or numbers that cannot be.
        """
        check_sampling(num_samples, max_new_tokens, num_inference_steps, eta)
        precision, in_portions = precisions_for(self, precision)[0], Portions(self, batch_size, "text")
        if prompts is None and numbers is not None:
            num_samples = len(numbers)
        starts = [start for start in self.beginnings(prompts) for _ in range(num_samples)]
        numbers = range(len(starts)) if numbers is None else numbers
        if not starts or len(numbers) != len(starts):
            raise UserError(
                f"{len(numbers)} numbers for {len(starts)} texts: give one for each text, and one text or more"
            )
        numbers = torch.tensor(list(numbers))
        new = self._new_lengths(starts, max_new_tokens, seed, numbers)

        def write(rows: slice) -> tuple[Tensor, Tensor, Tensor]:
            return self._write(starts[rows], new[rows], seed, numbers[rows], num_inference_steps, eta, precision)

        with self.progress_bar(total=len(starts)) as bar:
            made = in_portions(len(starts), write, bar.update)
        self.maybe_free_model_hooks()  # of `enable_model_cpu_offload`
        pictures, mask, known = (torch.cat(parts) for parts in zip(*made, strict=True))
        tokens = shown = self.code.decode(pictures, mask)
        if self.config.use_chat_template:
            shown = [row[len(start) :] for row, start in zip(tokens, starts, strict=True)]
        return Written([self.text_tokens.decode(row) for row in shown], tokens, pictures, mask, known)

    def beginnings(self, prompts: Prompt | Sequence[Prompt] | None) -> list[list[int]]:
        """The tokens of each prompt, or of a single one; None is a single text that begins with none.

        Raises:
            UserError: no prompts, one that leaves no cell free, or something that this model cannot go on with.
        """
        if prompts is None:
            if self.config.use_chat_template:
                raise UserError("This model answers: give it prompts, questions or messages")
            return [[]]
        return [self._beginning(prompt) for prompt in as_prompts(prompts)]

    def _beginning(self, prompt: Prompt) -> list[int]:
        chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        if not isinstance(chat[0] if chat else 0, dict):
            tokens = chat
        elif self.config.use_chat_template:
            tokens = self.text_tokens.prompt(chat)
        elif isinstance(prompt, str):
            tokens = self.text_tokens.encode([prompt])[0].tolist()
        else:
            raise UserError("This model was trained on texts without a chat template: give it the beginning of a text")
        most = self.code.num_tokens - 1
        if tokens and not 0 <= min(tokens) <= max(tokens) <= most:
            raise UserError(
                f"The prompt has token numbers from {min(tokens)} to {max(tokens)}; they go from 0 to {most}"
            )
        if len(tokens) >= self._cells:
            raise UserError(f"The prompt has {len(tokens)} tokens, and a picture {self._cells} cells: shorten it")
        return tokens

    @property
    def _cells(self) -> int:
        """That a picture may have; as many as in training."""
        return len(self.config.lengths) - 1

    def _new_lengths(self, starts: list[list[int]], wanted: int | None, seed: int, numbers: Tensor) -> list[int]:
        """How many tokens are written after each beginning."""
        free = [self._cells - len(start) for start in starts]
        if wanted is not None:
            return [min(wanted, cells) for cells in free]
        new = []
        uniform = Draws(seed, 0, numbers).uniform("length")
        for known, cells, draw in zip(map(len, starts), free, uniform.tolist(), strict=True):
            # an answer has the length of answers, a text that goes on that of the longer texts
            counts = self._lengths_after(known)
            fitting = counts[: cells + 1] if self.config.use_chat_template else counts[known:]
            total = fitting[1:].cumsum(0)  # of texts with 1, 2, … new tokens
            new.append(1 + int((total <= draw * total[-1]).sum()) if total[-1] > 0 else cells)
        return new

    def _lengths_after(self, known: int) -> Tensor:
        """How many of the training's texts, or of its answers to prompts of such a length, have 0, 1, … tokens."""
        if not self.config.answer_lengths:
            return torch.tensor(self.config.lengths, dtype=torch.float64)
        counts, of_prompt = torch.zeros(self._cells + 1, dtype=torch.float64), -1
        for prompt, answer, chats in sorted(self.config.answer_lengths, key=lambda row: abs(row[0] - known)):
            if counts.sum() >= LIKE and abs(prompt - known) > of_prompt:
                break
            counts[answer] += chats
            of_prompt = abs(prompt - known)
        return counts

    def _write(
        self,
        starts: list[list[int]],
        new: list[int],
        seed: int,
        numbers: Tensor,
        steps: int,
        eta: float,
        precision: str,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures, their mask and what is known of them, on the CPU: see `Written`."""
        known = torch.tensor([len(start) for start in starts])[:, None]
        lengths = known + torch.tensor(new)[:, None]
        place = torch.arange(int(lengths.max()))
        tokens = torch.zeros(len(starts), len(place), dtype=torch.int64)
        for row, start in zip(tokens, starts, strict=True):
            row[: len(start)] = torch.tensor(start, dtype=torch.int64)
        clean = self.code.draw(tokens, place < known, self.img_size)
        mask, given = (self.code.over_pixels((place < until).float(), self.img_size) for until in (lengths, known))
        numbers = numbers.to(self._execution_device)

        def denoise(rows: slice | Tensor) -> Tensor:
            here = rows if isinstance(rows, slice) else rows.cpu()
            draws = Draws(seed, 1, numbers[rows])
            noise = (draws.normal(f"noise {step}", *clean.shape[1:]) for step in range(steps))
            given_here = mask[here], given[here], clean[here]
            if self.config.solver:
                return self._solve(next(noise), *given_here, steps)
            return self.denoise(next(noise), *given_here, time_grid(steps, 1 / self.config.time_shift), eta, noise)

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
        callback: Callable[[int, Tensor], None] | None = None,
    ) -> Tensor:
        """From a noisy picture to the clean one that is predicted at the last step, float32 (B, C, H, W).

        Args:
            x: (B, C, H, W) at the first of the times.
            mask, known: pixels with a token, and those of them that `clean` (B, C, H, W) tells, (B, H, W).
            times: (steps + 1,), from the time of x to 1; `solvers.time_grid`.
            eta, noise: see `__call__`; fresh noise for each step but the last, needed where eta is above 0.
            callback: called after each step with its number and the prediction.

        Raises:
            UserError: eta is no share, or above 0 without noise.
        """
        check_sampling(eta=eta)
        if eta and noise is None and len(times) > 2:
            raise UserError(f"eta {eta:g} takes fresh noise in each step: give it, or eta=0")
        device = self._execution_device
        kept, times = kept_patches(mask, self.code.cell_size), times.tolist()
        x, known, clean, *kept = (value.to(device) for value in (x, known, clean, *kept))
        predicted = x
        for step, (t, later) in enumerate(pairwise(times)):
            at = torch.full((len(x),), t, dtype=torch.float32, device=device)
            predicted = self.predict(x, at, known, clean, Kept(*kept))
            if callback is not None:
                callback(step, predicted)
            if later < 1:
                fresh = next(noise) if eta else 0.0
                alpha, sigma = self.shares(t)
                kept_noise = (x - alpha * predicted) / sigma
                alpha, sigma = self.shares(later)
                x = alpha * predicted + sigma * ((1 - eta**2) ** 0.5 * kept_noise + eta * fresh)
        return torch.where(known[:, None] > 0, clean, predicted)

    def shares(self, t: float) -> list[float]:
        """How much of the clean picture and of noise is in x at time t."""
        return [share.item() for share in self.objective.shares(torch.tensor(t, dtype=torch.float64))]

    def _solve(self, x: Tensor, mask: Tensor, known: Tensor, clean: Tensor, steps: int) -> Tensor:
        """As `denoise`, by the pipeline's solver."""
        device, kept = self._execution_device, kept_patches(mask, self.code.cell_size)
        x, known, clean, *kept = (value.to(device) for value in (x, known, clean, *kept))
        solver = make_solver(self.config.solver, self.objective, self.config.time_shift)

        def predict(x: Tensor, t: Tensor, conditioning: Tensor) -> Tensor:
            return self.denoiser(with_known(x, clean, known), t, conditioning, Kept(*kept))[:, : x.shape[1]]

        made = sample(predict, solver, x, self._conditioning(x), None, steps, objective=self.objective)
        return torch.where(known[:, None] > 0, clean, made)

    def _conditioning(self, x: Tensor) -> Tensor:
        return self.conditioner(torch.zeros(len(x), dtype=torch.int64, device=x.device))

    @torch.no_grad()
    def predict(self, x: Tensor, t: Tensor, known: Tensor, clean: Tensor, kept: Kept) -> Tensor:
        """The clean picture that the denoiser tells from a noisy one, float32 (B, C, H, W) on its device.

        Args:
            x: (B, C, H, W) at the times t (B,).
            known: pixels that `clean` (B, C, H, W) tells, (B, H, W).
            kept: the cells that have a token, `layers.kept_patches`.
        """
        device = self._execution_device
        x, t, known, clean, *kept = (values.to(device) for values in (x, t, known, clean, *kept))
        said = self.denoiser(with_known(x, clean, known), t, self._conditioning(x), Kept(*kept))
        return self.objective.clean(said[:, : x.shape[1]].float(), x, t)


def check_sampling(
    num_samples: int = 1,
    max_new_tokens: int | None = None,
    num_inference_steps: int = 1,
    eta: float = 1.0,
) -> None:
    """Say which argument of a `TokenImagePipeline` cannot be.

    Raises:
        UserError: a number below 1, or an eta that is no share.
    """
    counts = {"num_samples": num_samples, "num_inference_steps": num_inference_steps}
    for name, count in {**counts, "max_new_tokens": 1 if max_new_tokens is None else max_new_tokens}.items():
        if count < 1:
            raise UserError(f"{name} {count}: expected 1 or more")
    if not 0 <= eta <= 1:
        raise UserError(f"eta {eta:g}: expected a share of fresh noise from 0 to 1")


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """Prompts, or a single one, as a list of texts, of messages and of plain token numbers.

    Raises:
        UserError: something else, or none.
    """
    single = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], dict | Integral))
    found = [_as_prompt(prompt) for prompt in ([prompts] if single else prompts)]
    if not found:
        raise UserError("No prompts: give one or more, or None for texts of their own")
    return found


def _as_prompt(prompt: Any) -> Prompt:
    if isinstance(prompt, str):
        return _encodable(prompt)
    parts = list(prompt) if isinstance(prompt, Iterable) else [None]
    if all(isinstance(part, Integral) for part in parts):
        return [int(part) for part in parts]
    messages = [(part.get("role"), part.get("content")) for part in parts if isinstance(part, dict)]
    if len(messages) < len(parts) or not all(isinstance(word, str) for message in messages for word in message):
        raise UserError(
            f'The prompt {str(prompt)[:80]} is neither a text, nor messages {{"role": …, "content": …}}, nor token '
            "numbers"
        )
    return [{"role": _encodable(role), "content": _encodable(content)} for role, content in messages]


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:  # half of a surrogate pair, or a byte of a command line in another encoding
        raise UserError(
            f"The prompt is no text in UTF-8: character {error.start:,} is {text[error.start]!a}, take it out"
        ) from None
    return text


# ---- from files
def is_token_pipeline(path: str | Path) -> bool:
    """Whether what is there is for `load_token_pipeline`.

    Raises:
        UserError: no folder, and no checkpoint of DiT training.
    """
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
        own = is_token_pipeline(path)  # else it is said what it is
        options = {"tokenizer": _load_tokenizer(path, [path])} if own else {}
        pipe = read_pipeline(TokenImagePipeline, path, ema, local_files_only=True, **options)
    else:
        state, settings = read_training(path)
        if "token_images" not in settings:
            raise UserError(f"{path} is a checkpoint of another training than that on token images")
        tokenizer = _load_tokenizer(path, path.absolute().parents[:2])
        denoiser, conditioner = trained_models(path, state, settings, ClassConditioner, ema)
        of_pipeline = {**settings["token_images"], "objective": settings.get("objective")}
        pipe = TokenImagePipeline(denoiser, conditioner, tokenizer, **of_pipeline)
    if len(pipe.text_tokens) != pipe.code.num_tokens:
        tokens, known = len(pipe.text_tokens), pipe.code.num_tokens
        raise UserError(
            f"The tokenizer of {path} has {tokens:,} tokens, the model {known:,}: take the tokenizer/ of its training"
        )
    return pipe


def _load_tokenizer(path: Path, homes: Sequence[Path]) -> Any:
    for folder in (home / "tokenizer" for home in homes):
        if folder.is_dir():
            return load_tokenizer(folder)
    where = "in" if path in homes else "beside"
    raise UserError(f"No tokenizer/ {where} {path}: copy it from the folder of its training")
