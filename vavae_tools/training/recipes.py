"""How a VA-VAE is fine-tuned: named sets of losses, their weights, and the optimiser's numbers."""

from typing import Any

from vavae_tools.errors import UserError

# The reference's numbers (VA-VAE, Yao & Wang 2025): Adam with a constant learning rate, nothing clipped.
_REFERENCE: dict[str, Any] = {
    "lr": 1e-4,
    "schedule": "constant",
    "betas": (0.5, 0.9),
    "weight_decay": 0.0,
    "gradient_clip": 0.0,
    "gradient_weight": 0.0,
    "spectral_weight": 0.0,
    "perceptual_weight": 1.0,
    "disc_weight": 0.5,
    "disc_lr": 1e-4,
}

RECIPES: dict[str, dict[str, Any]] = {
    # The autoencoder alone, with losses that need no weights from elsewhere: where a few thousand pictures are all
    # there is. Its learning rate depends on the model's size.
    "light": {},
    # Every loss of the reference in one stage (its f16d32_vfdinov2). Its discriminator starts at 5,001 steps of both
    # optimisers, which are 2,500 of the model's.
    "full": {**_REFERENCE, "vf_weight": 0.1, "distance_margin": 0.25, "cosine_margin": 0.5, "disc_start": 2500},
    # The released model's three stages of 100, 15 and 15 epochs, each from the weights of the one before.
    "stage1": {**_REFERENCE, "vf_weight": 0.5, "disc_start": 2500},
    "stage2": {**_REFERENCE, "vf_weight": 0.1, "disc_start": 0},
    "stage3": {**_REFERENCE, "vf_weight": 0.1, "distance_margin": 0.25, "cosine_margin": 0.5, "disc_start": 0},
}

STAGES = {"stage1": 100, "stage2": 15, "stage3": 15}
"""Epochs of the released model's stages: the shares that the recipe "staged" gives to each."""


def find_recipe(name: str, changes: dict[str, Any]) -> dict[str, Any]:
    """The arguments for `VAVAEModule` of a recipe, with single numbers replaced; None keeps the recipe's.

    Raises:
        UserError: no such recipe.
    """
    if name not in RECIPES:
        raise UserError(f"No recipe {name!r}; there are {', '.join(RECIPES)}, and staged for stage1 to stage3 in turn")
    return {**RECIPES[name], **{key: value for key, value in changes.items() if value is not None}}


def epochs_of_stages(max_epochs: int) -> dict[str, int]:
    """How many of `max_epochs` each stage gets, one at least.

    >>> epochs_of_stages(130)
    {'stage1': 100, 'stage2': 15, 'stage3': 15}
    >>> epochs_of_stages(3)
    {'stage1': 1, 'stage2': 1, 'stage3': 1}
    """
    if max_epochs < len(STAGES):
        raise UserError(f"--max_epochs {max_epochs}: the recipe staged needs at least one for each stage, 3")
    late = {name: max(1, round(max_epochs * STAGES[name] / sum(STAGES.values()))) for name in ("stage2", "stage3")}
    return {"stage1": max_epochs - sum(late.values()), **late}
