"""What a sample shall be, as the vectors that the denoiser takes: here, its class."""

from collections.abc import Iterable

from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import Tensor, nn

from vavae_tools.runtime.errors import UserError


class ClassConditioner(ModelMixin, ConfigMixin):
    """Labels (B,) → (B, hidden_size), with one more row, number `num_classes`, that means "any class".

    Args:
        num_classes: labels go from 0 to num_classes − 1.
        hidden_size: the denoiser's.
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
        row = self.embedding_table.weight[self.num_classes]
        return row.expand(batch_size, -1)

    def _need_null(self) -> None:
        if not self.dropout > 0:
            raise UserError(
                "A ClassConditioner with dropout 0 has no null label: make it with dropout=0.1 for guidance."
            )


def check_labels(labels: Iterable[int], num_classes: int) -> None:
    """Say which label does not exist. For the edges of the program: on a GPU tensor this waits for the GPU."""
    for label in labels.tolist() if isinstance(labels, Tensor) else labels:
        if not 0 <= label < num_classes:
            raise UserError(
                f"Label {label} does not exist: labels go from 0 to {num_classes - 1} ({num_classes} classes)."
            )
