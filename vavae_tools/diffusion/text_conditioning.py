"""What a sample shall be, in words: a caption's states as the denoiser takes them."""

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


@dataclass(frozen=True)
class TextCondition:
    """What a `TextDiT` is told.

    Attributes:
        vector: (B, hidden_size), of the whole caption, which goes into the modulation beside the time.
        tokens: (B, L, hidden_size), one for each token, which are looked at by cross-attention.
        mask: bool (B, L), true where a token is; None stands for all of them.
    """

    vector: Tensor
    tokens: Tensor
    mask: Tensor | None = None

    def __len__(self) -> int:
        return len(self.vector)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> "TextCondition":
        """Some of the samples' conditions."""
        mask = None if self.mask is None else self.mask[rows]
        return TextCondition(self.vector[rows], self.tokens[rows], mask)

    @staticmethod
    def cat(conditions: Sequence["TextCondition"]) -> "TextCondition":
        """One after the other along the batch; shorter ones are padded."""
        longest = max(condition.tokens.shape[1] for condition in conditions)
        padded = [_padded(condition.tokens, _mask_of(condition), longest) for condition in conditions]
        tokens, masks = (torch.cat(parts) for parts in zip(*padded, strict=True))
        return TextCondition(torch.cat([condition.vector for condition in conditions]), tokens, masks)


def _mask_of(condition: TextCondition) -> Tensor:
    tokens = condition.tokens
    whole = torch.ones(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
    return whole if condition.mask is None else condition.mask


def _padded(tokens: Tensor, mask: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Tokens (B, L, D) and mask (B, L), at least `length` long."""
    lacking = max(0, length - tokens.shape[1])
    return F.pad(tokens, (0, 0, 0, lacking)), F.pad(mask, (0, lacking))


class TextConditioner(ModelMixin, ConfigMixin):
    """`TextStates` → `TextCondition`; a dropped caption becomes the empty prompt, which is guidance's null, too.

    The empty prompt's states are kept beside the weights, so that training on cached text needs no text encoder.

    Args:
        text_dim, pooled_dim: widths of the states, of a token and of the whole caption.
        hidden_size: the denoiser's.
        dropout: how often the caller should drop a caption in training, so that guidance has its null. The conditioner
            draws nothing itself: it is given `drop`.
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
        """Keep the empty prompt's states, `encoder.encode([""])`.

        Raises:
            UserError: states of several captions, or of other widths.
        """
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
            tokens, mask = _padded(tokens, mask, length)
            empty = F.pad(self.empty_tokens, (0, 0, 0, tokens.shape[1] - length))
            at = torch.arange(tokens.shape[1], device=tokens.device) < length
            tokens = torch.where(drop[:, None, None], empty.to(tokens), tokens)
            mask = torch.where(drop[:, None], at, mask)
            pooled = torch.where(drop[:, None], self.empty_pooled.to(pooled), pooled)
        kind = self.empty_tokens.dtype  # the weights', not those that an encoder in half precision gives
        return TextCondition(self.pooled_embedder(pooled.to(kind)), self.token_embedder(tokens.to(kind)), mask)

    @apply_forward_hook
    def null(self, batch_size: int) -> TextCondition:
        """The condition that the empty prompt is, `batch_size` times."""
        self._need_empty()
        mask = torch.ones(1, self.empty_tokens.shape[1], dtype=torch.bool, device=self.empty_tokens.device)
        condition = self(TextStates(self.empty_tokens, mask, self.empty_pooled))
        return TextCondition(
            condition.vector.expand(batch_size, -1),
            condition.tokens.expand(batch_size, -1, -1),
            mask.expand(batch_size, -1),
        )

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
