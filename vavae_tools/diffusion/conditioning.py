"""What a sample shall be, as the denoiser takes it: a class, or a caption's states."""

from collections.abc import Sequence
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

    `dropout` is how often the caller should drop a label in training, so that guidance has its null; 0: there is none.
    """

    @register_to_config
    def __init__(self, num_classes: int, hidden_size: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.num_classes, self.dropout = num_classes, dropout
        self.embedding_table = nn.Embedding(num_classes + (dropout > 0), hidden_size)
        nn.init.normal_(self.embedding_table.weight, std=0.02)  # as DiT: small, so that at first all classes are alike

    def forward(self, labels: Tensor, drop: Tensor | None = None) -> Tensor:
        """Labels int64 (B,), and where `drop` (B,) is true, the null instead."""
        return self.embedding_table(labels if drop is None else labels.masked_fill(drop.bool(), self.num_classes))

    @apply_forward_hook
    def null(self, batch_size: int) -> Tensor:
        """Return the condition "any class", (batch_size, hidden_size)."""
        if not self.dropout > 0:
            raise UserError("A ClassConditioner with dropout 0 has no null label: take dropout=0.1 for guidance")
        return self.embedding_table.weight[self.num_classes].expand(batch_size, -1)


@dataclass(frozen=True)
class TextCondition:
    """What a `TextDiT` is told of captions."""

    vector: Tensor  # (B, hidden_size), of the whole caption, which goes into the modulation beside the time
    tokens: Tensor  # (B, L, hidden_size), one for each token, for cross-attention
    mask: Tensor  # bool (B, L), true where a token is

    def __len__(self) -> int:
        return len(self.vector)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> "TextCondition":
        return TextCondition(self.vector[rows], self.tokens[rows], self.mask[rows])

    @staticmethod
    def cat(conditions: Sequence["TextCondition"]) -> "TextCondition":
        """Return them one after the other along the batch, shorter ones padded."""
        longest = max(one.mask.shape[1] for one in conditions)
        tokens = [F.pad(one.tokens, (0, 0, 0, longest - one.mask.shape[1])) for one in conditions]
        masks = [F.pad(one.mask, (0, longest - one.mask.shape[1])) for one in conditions]
        return TextCondition(torch.cat([one.vector for one in conditions]), torch.cat(tokens), torch.cat(masks))


class TextConditioner(ModelMixin, ConfigMixin):
    """`TextStates` → `TextCondition`; a dropped caption becomes the empty prompt, which is guidance's null, too.

    The empty prompt's states are kept beside the weights, so that training on cached text needs no text encoder.
    `set_empty` sets them and `empty_length`, their number; CLIP's are a start and an end token.
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
        like = self.empty_tokens
        self.empty_tokens = states.tokens[:, states.mask[0]].detach().to(like, copy=True)  # (1, L, D) without padding
        self.empty_pooled = states.pooled.detach().to(like, copy=True)  # (1, P)
        self.register_to_config(empty_length=self.empty_tokens.shape[1])

    def forward(self, states: TextStates, drop: Tensor | None = None) -> TextCondition:
        """States of captions (B), and where `drop` (B,) is true, the empty prompt's instead."""
        tokens, mask, pooled = states.tokens, states.mask, states.pooled
        if drop is not None:
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
        self._knows_empty = self._knows_empty or bool(self.empty_tokens.any())  # asked once: a GPU is waited for
        if not self._knows_empty:
            raise UserError("This TextConditioner does not know the empty prompt: set_empty(encoder.encode(['']))")
        mask = torch.ones(1, self.empty_tokens.shape[1], dtype=torch.bool, device=self.empty_tokens.device)
        one = self(TextStates(self.empty_tokens, mask, self.empty_pooled))
        return TextCondition(*(part.expand(batch_size, *part.shape[1:]) for part in (one.vector, one.tokens, mask)))


def _two_layers(width: int, hidden_size: int, activation: nn.Module) -> nn.Sequential:
    layers = nn.Sequential(nn.Linear(width, hidden_size), activation, nn.Linear(hidden_size, hidden_size))
    for layer in (layers[0], layers[2]):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return layers
