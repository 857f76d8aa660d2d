"""Training a denoiser on captions: on latents and texts that were encoded once, or on pictures as they are."""

import functools
from typing import Any

import torch

from vavae_tools.autoencoders.stable_diffusion import StableDiffusionVAE
from vavae_tools.autoencoders.text_encoder import TextEncoder, TextStates
from vavae_tools.data.pixels import to_unit
from vavae_tools.draws import Draws
from vavae_tools.errors import UserError
from vavae_tools.training.diffusion_module import DiffusionModule


class TextDiffusionModule(DiffusionModule):
    """Trains a `TextDiT` and its `TextConditioner` on batches of `data.texts`.

    After `encode_with` also on those of `data.captions`, {"pictures", "captions", "index"}, encoded at every step.
    """

    qk_norm_key = "model.qk_norm"
    _vae: StableDiffusionVAE | None = None
    _text_encoder: TextEncoder | None = None

    def encode_with(self, vae: StableDiffusionVAE, text_encoder: TextEncoder) -> None:
        """Take the frozen models that pictures and captions are encoded with; they are no part of this module."""
        self.__dict__["_vae"], self._text_encoder = vae.eval().requires_grad_(False), text_encoder

    def on_fit_start(self) -> None:
        for frozen in (self._vae, self._text_encoder):
            if frozen is not None:
                frozen.to(self.device)

    def conditions(self, batch: dict[str, Any]) -> TextStates:
        return TextStates(batch["text_tokens"], batch["text_mask"], batch["text_pooled"])

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        """Encode pictures and captions; latents and texts come as they are."""
        return batch if "latents" in batch else self.encoded(batch)

    @torch.no_grad()
    def encoded(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch that `data.texts` would give: in training with a posterior sample of this epoch's.

        Raises:
            UserError: `encode_with` was not called.
        """
        if self._vae is None:
            raise UserError("A batch of pictures and captions, and nothing to encode them: encode_with(vae, encoder)")
        seed, epoch = (self.hparams.seed, self.current_epoch) if self.training else (self.hparams.seed + 1, 0)
        draws = Draws(seed, epoch, batch["index"])
        labels = torch.zeros_like(batch["index"])
        with torch.autocast(self.device.type, enabled=False):  # a VAE in half precision makes black pictures
            normal = functools.partial(draws.normal, "posterior")
            latents = self._vae.encode_pictures(to_unit(batch["pictures"]), labels, normal)
            states = self._text_encoder.encode(batch["captions"]).to(self.device)
        texts = {"text_tokens": states.tokens, "text_mask": states.mask, "text_pooled": states.pooled}
        return {"latents": latents.float(), "index": batch["index"], **texts}
