"""Mean and standard deviation of an autoencoder's latents, which travel with it."""

from torch import Tensor, tensor

from vavae_tools.errors import UserError


class LatentStatistics:
    """For a diffusers model whose config has `latents_mean` and `latents_std`, a number per channel each."""

    has_own_statistics = False
    """Whether its latents come out normalised already, so that none are to be computed from the training side."""

    decoding_alone: tuple[str, ...] = ()
    """How the names of weights begin that the latents do not follow from: another decoder leaves them valid."""

    def normalise(self, latents: Tensor) -> Tensor:
        """Latents as encoded → latents as the denoiser sees them: per channel (z − mean) / std."""
        mean, std = self._statistics(latents)
        return (latents - mean) / std

    def denormalise(self, latents: Tensor) -> Tensor:
        """The inverse of `normalise`: what the denoiser made → what `decode` takes."""
        mean, std = self._statistics(latents)
        return latents * std + mean

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        if self.config.latents_mean is None or self.config.latents_std is None:
            name = type(self).__name__
            raise UserError(f"This {name} carries no latent statistics: encode the training side first (latents)")
        mean = tensor(self.config.latents_mean, device=like.device, dtype=like.dtype)
        std = tensor(self.config.latents_std, device=like.device, dtype=like.dtype)
        return mean[:, None, None], std[:, None, None]
