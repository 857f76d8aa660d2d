"""The VA-VAE: diffusers' AutoencoderKL with a user-condition vector.

The published VA-VAE f16d32 (Yao & Wang 2025, LightningDiT) has the architecture of the LDM autoencoder, which
AutoencoderKL reproduces. What is added here is one vector per person (or class), let into every level of encoder and
decoder by projections that start at zero: at first the model equals the one without vectors, bit by bit.
"""

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

import torch
from diffusers import AutoencoderKL, ModelMixin  # noqa: F401  (a pipeline looks here for the base it loads with)
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import DecoderOutput, DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from torch import Tensor, nn

from vavae_tools.data.images import PictureFolder, to_pixels, to_unit
from vavae_tools.errors import UserError


class VAVAE(AutoencoderKL):
    """AutoencoderKL with a condition vector; its other arguments are AutoencoderKL's own.

    Args:
        condition_dim: length of the condition vector; 0 builds the plain AutoencoderKL.
        num_conditions: how many people (or classes) have a vector of their own in `conditions`.
        latents_mean, latents_std: per channel, of the latents this model makes of the training side; they travel
            with the model, so that whoever samples needs no training data.

    Pictures are (B, C, H, W) in [-1, 1]; latents (B, latent_channels, H/f, W/f), not normalised.
    """

    @register_to_config
    def __init__(
        self,
        in_channels: int = 3,
        out_channels: int = 3,
        down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",),
        up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",),
        block_out_channels: tuple[int, ...] = (64,),
        layers_per_block: int = 1,
        act_fn: str = "silu",
        latent_channels: int = 4,
        norm_num_groups: int = 32,
        sample_size: int = 32,
        scaling_factor: float = 1.0,
        shift_factor: float | None = None,
        latents_mean: tuple[float, ...] | None = None,
        latents_std: tuple[float, ...] | None = None,
        force_upcast: bool = True,
        use_quant_conv: bool = True,
        use_post_quant_conv: bool = True,
        mid_block_add_attention: bool = True,
        condition_dim: int = 0,
        num_conditions: int = 0,
    ) -> None:
        # by name: diffusers takes what is given by place for defaults, and from_config would leave it out
        super().__init__(
            in_channels=in_channels,
            out_channels=out_channels,
            down_block_types=down_block_types,
            up_block_types=up_block_types,
            block_out_channels=block_out_channels,
            layers_per_block=layers_per_block,
            act_fn=act_fn,
            latent_channels=latent_channels,
            norm_num_groups=norm_num_groups,
            sample_size=sample_size,
            scaling_factor=scaling_factor,
            shift_factor=shift_factor,
            latents_mean=latents_mean,
            latents_std=latents_std,
            force_upcast=force_upcast,
            use_quant_conv=use_quant_conv,
            use_post_quant_conv=use_post_quant_conv,
            mid_block_add_attention=mid_block_add_attention,
        )
        self.downsampling = 2 ** (len(block_out_channels) - 1)
        if condition_dim:
            self.conditions = nn.Embedding(num_conditions, condition_dim)
            into = [block_out_channels[0], *block_out_channels]  # channels that reach each block, the middle one last
            self.encoder_projections = nn.ModuleList(_zero_linear(condition_dim, width) for width in into)
            into = [block_out_channels[-1], block_out_channels[-1], *block_out_channels[:0:-1]]
            self.decoder_projections = nn.ModuleList(_zero_linear(condition_dim, width) for width in into)

    def condition_vectors(self, labels: Tensor, keep: Tensor | None = None) -> Tensor:
        """Labels int64 (B,) → their vectors (B, condition_dim); zero (no condition) where `keep` (B,) is False."""
        vectors = self.conditions(labels)
        return vectors if keep is None else vectors * keep[:, None].to(vectors.dtype)

    def encode(
        self, x: Tensor, return_dict: bool = True, condition: Tensor | None = None
    ) -> AutoencoderKLOutput | tuple[DiagonalGaussianDistribution]:
        """Pictures → the posterior of their latents; `condition` is (B, condition_dim), None stands for no vector."""
        if condition is None:
            return super().encode(x, return_dict)
        encoder = self.encoder
        h = encoder.conv_in(x)
        blocks = [*encoder.down_blocks, encoder.mid_block]
        h = self._through(blocks, self.encoder_projections, h, condition)  # (B, C, H/f, W/f)
        h = encoder.conv_out(encoder.conv_act(encoder.conv_norm_out(h)))  # (B, 2·latent_channels, H/f, W/f)
        posterior = DiagonalGaussianDistribution(_moments(self.quant_conv(h) if self.quant_conv is not None else h))
        return AutoencoderKLOutput(latent_dist=posterior) if return_dict else (posterior,)

    def _encode(self, x: Tensor) -> Tensor:
        return _moments(super()._encode(x))

    def decode(
        self, z: Tensor, return_dict: bool = True, generator: None = None, condition: Tensor | None = None
    ) -> DecoderOutput | tuple[Tensor]:
        """Latents (not normalised) → pictures, which may lie slightly outside [-1, 1]."""
        if condition is None:
            return super().decode(z, return_dict, generator)
        decoder = self.decoder
        h = decoder.conv_in(self.post_quant_conv(z) if self.post_quant_conv is not None else z)
        blocks = [decoder.mid_block, *decoder.up_blocks]
        h = self._through(blocks, self.decoder_projections, h, condition)
        pictures = decoder.conv_out(decoder.conv_act(decoder.conv_norm_out(h)))  # (B, C, H, W)
        return DecoderOutput(sample=pictures) if return_dict else (pictures,)

    def _through(self, blocks: list[nn.Module], projections: nn.ModuleList, h: Tensor, condition: Tensor) -> Tensor:
        checkpointing = torch.is_grad_enabled() and self.encoder.gradient_checkpointing
        for block, projection in zip(blocks, projections, strict=True):
            h = h + projection(condition)[:, :, None, None].to(h.dtype)
            h = self.encoder._gradient_checkpointing_func(block, h) if checkpointing else block(h)
        return h

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
            raise UserError("This VA-VAE carries no latent statistics: encode the training side first (latents)")
        mean = torch.tensor(self.config.latents_mean, device=like.device, dtype=like.dtype)
        std = torch.tensor(self.config.latents_std, device=like.device, dtype=like.dtype)
        return mean[:, None, None], std[:, None, None]


def _moments(h: Tensor) -> Tensor:
    """Mean and log-variance in float32 under autocast: the variance goes up to e²⁰, and fp16 ends at 65,504."""
    return h.float() if torch.is_autocast_enabled(h.device.type) else h


def _zero_linear(condition_dim: int, width: int) -> nn.Linear:
    """A projection that adds nothing until it has learned to."""
    linear = nn.Linear(condition_dim, width, bias=False)
    nn.init.zeros_(linear.weight)
    return linear


def _levels(count: int, attention_at: tuple[int, ...] = ()) -> dict[str, tuple[str, ...]]:
    down = tuple("AttnDownEncoderBlock2D" if i in attention_at else "DownEncoderBlock2D" for i in range(count))
    up = tuple("AttnUpDecoderBlock2D" if i in attention_at else "UpDecoderBlock2D" for i in reversed(range(count)))
    return {"down_block_types": down, "up_block_types": up}


VAVAE_SIZES: dict[str, dict] = {
    # The published model: 16× smaller, 32 channels, attention at the coarsest level; 70 M parameters, for a GPU.
    "f16d32": {
        **_levels(5, attention_at=(4,)),
        "block_out_channels": (128, 128, 256, 256, 512),
        "layers_per_block": 2,
        "latent_channels": 32,
        "norm_num_groups": 32,
        "sample_size": 256,
    },
    # For a CPU: 4× smaller, 8 channels, no attention; 0.42 M parameters, the size of the weights in this package. With
    # as many numbers in a latent, 8× and 32 channels learned far slower (28.3 against 30.3 dB after 360 steps).
    "small": {
        **_levels(3),
        "block_out_channels": (16, 32, 48),
        "layers_per_block": 1,
        "latent_channels": 8,
        "norm_num_groups": 8,
        "sample_size": 64,
        "mid_block_add_attention": False,
    },
}


def vavae(size: str = "f16d32", **arguments: object) -> VAVAE:
    """A VA-VAE with fresh weights, of a named size (`VAVAE_SIZES`); further arguments replace single values."""
    if size not in VAVAE_SIZES:
        raise UserError(f"No VA-VAE size {size!r}; there are {', '.join(VAVAE_SIZES)}")
    return VAVAE(**{**VAVAE_SIZES[size], **arguments})


def pretrained_small_folder() -> Path:
    """The folder of the small VA-VAE that comes with this package (trained on simulated walkers)."""
    return Path(str(files("vavae_tools.autoencoders") / "pretrained_small"))


def read_condition_file(path: str | Path, labels: dict[str, int]) -> Tensor:
    """Read one vector per person from a safetensors file whose keys are the folders' names (`ID_1`, …).

    Returns:
        float32 (number of labels, condition_dim), in the order of the labels.

    Raises:
        UserError: no such file, a person without a vector, or vectors of different lengths.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not Path(path).is_file():
        raise UserError(f"No condition file {path}; it holds one vector per person under the folder's name (ID_1 …)")
    try:
        vectors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error})") from None
    missing = sorted(set(labels) - set(vectors))
    if missing:
        raise UserError(f"{path} has no vector for {', '.join(missing[:5])}; it holds {len(vectors)} vectors")
    shapes = {tuple(vectors[name].shape) for name in labels}
    if len(shapes) > 1 or len(next(iter(shapes))) != 1:
        raise UserError(f"The vectors of {path} differ in shape: {sorted(shapes)}; expected one length for all")
    table = torch.zeros(max(labels.values()) + 1, next(iter(shapes))[0])
    for name, label in labels.items():
        table[label] = vectors[name].float()
    return table


def load_vavae(
    source: str | Path,
    condition_dim: int | None = None,
    num_conditions: int = 0,
    say: Callable[[str], None] = print,
) -> VAVAE:
    """Load a VA-VAE to fine-tune; vectors and projections that the weights do not hold start anew.

    Args:
        source: a folder that `save_pretrained` wrote (of a VAVAE or of diffusers' AutoencoderKL), or a `.ckpt` of
            VA-VAE training.
        condition_dim, num_conditions: of the model wanted; None keeps what the weights have, 0 drops it.

    Raises:
        UserError: nothing there, not a VA-VAE, or weights of another shape.
    """
    source = Path(source)
    if source.is_dir():
        config, weights = _read_folder(source)
    elif source.is_file():
        config, weights = _read_checkpoint(source)
    else:
        raise UserError(f"No VA-VAE at {source}: expected a folder with config.json or a .ckpt of VA-VAE training")
    if condition_dim is not None:
        config = {**config, "condition_dim": condition_dim, "num_conditions": num_conditions}
    model = VAVAE.from_config(config)
    own = model.state_dict()
    other_people = "conditions.weight" in weights and weights["conditions.weight"].shape != tuple(
        own.get("conditions.weight", torch.empty(0)).shape
    )
    if other_people:  # vectors of other people, or of another length, say nothing here
        weights = {
            k: v for k, v in weights.items() if not k.startswith(("conditions.", "encoder_proj", "decoder_proj"))
        }
    wrong = [name for name in weights if name in own and own[name].shape != weights[name].shape]
    if wrong:
        found, expected = tuple(weights[wrong[0]].shape), tuple(own[wrong[0]].shape)
        raise UserError(f"{source} is of another architecture: {wrong[0]} is {found}, expected {expected}")
    loaded = model.load_state_dict(weights, strict=False)
    fresh = [
        name for name in loaded.missing_keys if not name.startswith(("conditions.", "encoder_proj", "decoder_proj"))
    ]
    if fresh:
        raise UserError(f"{source} lacks {len(fresh)} of the model's weights, the first {fresh[0]}; is it a VA-VAE?")
    say(
        f"VA-VAE weights: {len(weights) - len(loaded.unexpected_keys)} matched, {len(loaded.missing_keys)} start anew, "
        f"{len(loaded.unexpected_keys)} unused ({source})"
    )
    return model


@torch.inference_mode()
def reconstruct(model: VAVAE, data: PictureFolder, batch_size: int = 32) -> tuple[Tensor, Tensor]:
    """All pictures of a folder, and what the model makes of them with each person's vector: uint8 (N, C, H, W) both.

    The posterior's mode is decoded, so that the same pictures have the same reconstructions.
    """
    model = model.eval()
    originals, reconstructions = [], []
    for start in range(0, len(data), batch_size):
        batch = data.__getitems__(range(start, min(start + batch_size, len(data))))
        labels = batch["labels"].to(model.device)
        vectors = model.condition_vectors(labels) if model.config.condition_dim else None
        posterior = model.encode(to_unit(batch["pictures"].to(model.device)), condition=vectors).latent_dist
        reconstructions.append(to_pixels(model.decode(posterior.mode(), condition=vectors).sample).cpu())
        originals.append(batch["pictures"])
    return torch.cat(originals), torch.cat(reconstructions)


def _read_folder(folder: Path) -> tuple[dict, dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    weights = folder / "diffusion_pytorch_model.safetensors"
    if not (folder / "config.json").is_file() or not weights.is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise UserError(f"{folder} is no VA-VAE folder: expected config.json and {weights.name}, found {there}")
    try:
        config = {k: v for k, v in VAVAE.load_config(folder).items() if not k.startswith("_")}
        return config, {name: tensor.float() for name, tensor in load_file(weights).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{weights} cannot be read ({error}): copy it again") from None


def _read_checkpoint(path: Path) -> tuple[dict, dict[str, Tensor]]:
    from vavae_tools.files import read_checkpoint

    checkpoint = read_checkpoint(path)
    config = checkpoint.get("hyper_parameters", {}).get("vavae_config")
    if config is None:
        raise UserError(f"{path} is no checkpoint of VA-VAE training here: it names no vavae_config")
    weights = {k.removeprefix("vavae."): v for k, v in checkpoint["state_dict"].items() if k.startswith("vavae.")}
    return config, weights
