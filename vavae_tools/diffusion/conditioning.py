"""What a sample shall be, as the denoiser takes it: a class, or a caption's states."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from vavae_tools.diffusion.clip import TextStates
from vavae_tools.runtime.errors import UserError


class ClassConditioner(ModelMixin, ConfigMixin):
    """Labels (B,) → (B, hidden_size), with one more row, number `num_classes`, that means "any class".

    Args:
        dropout: how often the caller should drop a label in training, so that guidance has its null. The conditioner
            draws nothing itself: it is given `drop`. 0 leaves the null row out.
    """

    @register_to_config
    def __init__(self, num_classes: int, hidden_size: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), hidden_size)
        nn.init.normal_(self.embedding_table.weight, std=0.02)  # as DiT: small, so that at first all classes are alike

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Labels int64 (B,), and where `drop` (B,) is true, the null instead."""
        if drop is not None:
            self._need_null()
            labels = labels.masked_fill(drop.bool(), self.num_classes)
        return self.embedding_table(labels)

    @apply_forward_hook
    def null(self, batch_size: int) -> Tensor:
        """The condition "any class", (batch_size, hidden_size)."""
        self._need_null()
        return self.embedding_table.weight[self.num_classes].expand(batch_size, -1)

    def _need_null(self) -> None:
        if not self.dropout > 0:
            raise UserError(
                "A ClassConditioner with dropout 0 has no null label: make it with dropout=0.1 for guidance."
            )


def check_labels(labels: Iterable[int], num_classes: int) -> None:
    """Raise a UserError for a label that does not exist. Of a GPU's tensor this waits for the GPU."""
    for label in labels.tolist() if isinstance(labels, Tensor) else labels:
        if not 0 <= label < num_classes:
            raise UserError(
                f"Label {label} does not exist: labels go from 0 to {num_classes - 1} ({num_classes} classes)."
            )


@dataclass(frozen=True)
class TextCondition:
    """What a `TextDiT` is told.

    Attributes:
        vector: (B, hidden_size), of the whole caption, which goes into the modulation beside the time.
        tokens: (B, L, hidden_size), one for each token, for cross-attention.
        mask: bool (B, L), true where a token is; None stands for all of them.
    """

    vector: Tensor
    tokens: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.vector)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> "TextCondition":
        return TextCondition(self.vector[rows], self.tokens[rows], None if self.mask is None else self.mask[rows])

    @staticmethod
    def cat(conditions: Sequence["TextCondition"]) -> "TextCondition":
        """One after the other along the batch; shorter ones are padded."""
        longest = max(condition.tokens.shape[1] for condition in conditions)
        tokens, masks = [], []
        for condition in conditions:
            mask = condition.mask
            if mask is None:
                mask = condition.tokens.new_ones(condition.tokens.shape[:2], dtype=torch.bool)
            lacking = longest - mask.shape[1]
            tokens.append(F.pad(condition.tokens, (0, 0, 0, lacking)))
            masks.append(F.pad(mask, (0, lacking)))
        vectors = torch.cat([condition.vector for condition in conditions])
        return TextCondition(vectors, torch.cat(tokens), torch.cat(masks))


class TextConditioner(ModelMixin, ConfigMixin):
    """`TextStates` → `TextCondition`; a dropped caption becomes the empty prompt, which is guidance's null, too.

    The empty prompt's states are kept beside the weights, so that training on cached text needs no text encoder.

    Args:
        text_dim, pooled_dim: widths of the states, of a token and of the whole caption.
        dropout: see `ClassConditioner`.
        empty_length: tokens of the empty prompt; CLIP's has a start and an end token. `set_empty` puts it right.
    """

    @register_to_config
    def __init__(
        self, text_dim: int, pooled_dim: int, hidden_size: int, dropout: float = 0.1, empty_length: int = 2
    ) -> None:
        super().__init__()
        self.dropout = dropout
        self.token_embedder = _two_layers(text_dim, hidden_size, nn.GELU(approximate="tanh"))
        self.pooled_embedder = _two_layers(pooled_dim, hidden_size, nn.SiLU())
        self.register_buffer("empty_tokens", torch.zeros(1, empty_length, text_dim))
        self.register_buffer("empty_pooled", torch.zeros(1, pooled_dim))
        self._knows_empty = False

    def set_empty(self, states: TextStates) -> None:
        """Keep the empty prompt's states, `encoder.encode([""])`."""
        tokens, pooled = states.tokens[:, states.mask[0]], states.pooled  # (1, L, D) without padding, (1, P)
        expected = (1, self.config.text_dim), (1, self.config.pooled_dim)
        if ((len(tokens), tokens.shape[2]), tuple(pooled.shape)) != expected:
            raise UserError(
                f"The empty prompt's states are {tuple(tokens.shape)} and {tuple(pooled.shape)}, this conditioner was "
                f"made for (1, L, {self.config.text_dim}) and (1, {self.config.pooled_dim}): take encoder.encode([''])"
            )
        like = self.empty_tokens
        self.empty_tokens = tokens.detach().to(like, copy=True)
        self.empty_pooled = pooled.detach().to(like, copy=True)
        self.register_to_config(empty_length=tokens.shape[1])

    def forward(self, states: TextStates, drop: Tensor | None = None) -> TextCondition:
        """States of captions (B), and where `drop` (B,) is true, the empty prompt's instead."""
        tokens, mask, pooled = states.tokens, states.mask, states.pooled
        if drop is not None:
            self._need_empty()
            drop, length = drop.bool(), self.empty_tokens.shape[1]
            lacking = max(0, length - tokens.shape[1])
            tokens, mask = F.pad(tokens, (0, 0, 0, lacking)), F.pad(mask, (0, lacking))
            empty = F.pad(self.empty_tokens, (0, 0, 0, tokens.shape[1] - length))
            of_empty = torch.arange(tokens.shape[1], device=tokens.device) < length
            tokens = torch.where(drop[:, None, None], empty.to(tokens), tokens)
            mask = torch.where(drop[:, None], of_empty, mask)
            pooled = torch.where(drop[:, None], self.empty_pooled.to(pooled), pooled)
        kind = self.empty_tokens.dtype  # the weights', not those that an encoder in half precision gives
        return TextCondition(self.pooled_embedder(pooled.to(kind)), self.token_embedder(tokens.to(kind)), mask)

    @apply_forward_hook
    def null(self, batch_size: int) -> TextCondition:
        """The condition that the empty prompt is, `batch_size` times."""
        self._need_empty()
        mask = torch.ones(1, self.empty_tokens.shape[1], dtype=torch.bool, device=self.empty_tokens.device)
        one = self(TextStates(self.empty_tokens, mask, self.empty_pooled))
        return TextCondition(*(part.expand(batch_size, *part.shape[1:]) for part in (one.vector, one.tokens, mask)))

    def _need_empty(self) -> None:
        if self._knows_empty:  # asked once only: on a GPU it means to wait
            return
        if not self.empty_tokens.any():
            raise UserError(
                "This TextConditioner does not know the empty prompt: conditioner.set_empty(encoder.encode([''])) first"
            )
        self._knows_empty = True


def _two_layers(width: int, hidden_size: int, activation: nn.Module) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(width, hidden_size), activation, nn.Linear(hidden_size, hidden_size))
    for layer in (layers[0], layers[2]):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layers
