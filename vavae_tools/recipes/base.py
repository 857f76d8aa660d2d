"""The recipes: what each experiment is made of, in plain values, and the function that trains it.

Every default stands here and nowhere else; None stands for what the data, the model or the machine say. Nothing here
imports torch, so that `--help` answers at once.
"""

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, TypeVar

from vavae_tools.training.config import TrainConfig, WatchedConfig, setting

Size = int | list[int] | None  # one number, or two: (height, width), or those of an encoder and a wide head
NamedSize = Literal["S", "B", "L", "XL"]
LossRecipe = Literal["light", "vector", "full", "stage1", "stage2", "stage3", "staged"]
ObjectiveName = Literal["flow_matching", "epsilon", "v_prediction", "v", "sample", "x0"]
Prompt = str | int | dict[str, str] | list[int | dict[str, str]]  # a text, token numbers, or messages
Monitor = Literal["reconstruction", "loss", "psnr", "ssim", "accuracy", "frechet", "right"]

OF_LOSSES = "schedule", "warmup_steps", "ema_decay", "gradient_clip", "gradient_checkpointing"  # None: the recipe's


def share(default: float | None, text: str) -> Any:
    """Return a setting from 0 to 1."""
    return setting(default, text, least=0, most=1)


@dataclass(frozen=True)
class ImageData:
    """Images of classes."""

    data_dir: str | None = setting(
        None, "a split, a folder per class, or a Hugging Face dataset; shapes: made up; null: the split's usual place"
    )
    image_size: Size = setting(None, "pixels, 256 or [height, width]; null: as the autoencoder's weights ask", least=1)
    use_hf_dataset: bool | None = setting(None, "true: datasets.load_from_disk; null: see what is there")
    train_split: str = setting("train", "the training subset's name, or the share of it that trains, as 0.95")
    val_share: float | None = share(None, "held out where there is no validation subset; null: 0.05, of a split none")
    crop: Literal["adm", "none"] | None = setting(None, "the centre as in ADM, or all; null: all of a split, else adm")
    num_workers: int | None = setting(None, "loading processes; null: by cores and shared memory", least=0)
    num_images: int = setting(1024, "of shapes: to train", least=1)
    num_classes: int = setting(4, "of shapes", least=1)

    def arguments(self) -> dict[str, Any]:
        """Return the arguments of `datasets.class_data`."""
        given, size = {each.name: getattr(self, each.name) for each in fields(ImageData)}, self.image_size
        return {**given, "image_size": tuple(size) if isinstance(size, list) else size}


@dataclass(frozen=True)
class FlippedData(ImageData):
    """Images of classes, mirrored ones as well where that is asked for."""

    flips: bool = setting(False, "also train on mirrored images (wrong for time–frequency images)")


@dataclass(frozen=True)
class LatentData(FlippedData):
    """Images of classes that are encoded once."""

    latents_dir: str | None = setting(None, "where latents are kept; null: logs/latents/NAME…, of shapes the run's own")


@dataclass(frozen=True)
class CaptionData:
    """Images with captions."""

    dataset_name: Literal["coco", "cub", "custom", "shapes"] | None = setting(None, "what data_dir is")
    data_dir: str | None = setting(None, "its folder; shapes needs none")
    num_samples: int | None = setting(None, "at most so many of each subset, chosen by the seed; null: all", least=1)
    image_size: Size = setting(None, "pixels; null: 256, of shapes 32", least=1)
    val_share: float = share(0.05, "held out where there is no validation subset")
    train_split: float | None = share(None, "the share that trains, in place of val_share")
    skip_missing: bool = setting(False, "true: leave out images that are named but not there, or have no caption")
    crop: Literal["adm", "none"] = setting("adm", "the centre, as in ADM, or the whole image, resized")
    annotations: str | None = setting(None, "of coco, where they have other names")
    images: str | None = setting(None, "of coco, where they have other names")
    cache: bool | None = setting(None, "encode images and texts once; null: where they fit on the disk")
    latents_dir: str | None = setting(None, "where they are kept; null: logs/latents/NAME…")
    num_workers: int | None = setting(None, "null: by cores and shared memory; 0 where all is cached", least=0)
    prefetch_factor: int | None = setting(2, "batches that each of them has ready", least=1)
    persistent_workers: bool = setting(True, "keep them from epoch to epoch")
    drop_last: bool = setting(True, "whole batches only; their rest comes up in other epochs")
    auto_batch_size: bool = setting(False, "find the largest batch that fits the card, and keep what makes one step")


@dataclass(frozen=True)
class TextData:
    """Texts, drawn as images."""

    data_dir: str | None = setting(None, ".txt, .jsonl, a folder, a dataset; or built in: sentences, questions, zen")
    image_size: int = setting(64, "side of an image in pixels", least=1)
    use_chat_template: bool = setting(False, 'chats ("messages"): answers are learnt, prompts given')
    max_tokens: int | None = setting(None, "in an image; null: as many as it has cells", least=1)
    tokenizer: str | None = setting(None, "a folder of transformers; null: the 256 bytes; bpe: learnt from the texts")
    vocab_size: int = setting(512, "tokens of bpe", least=1)
    cell_size: int = setting(4, "side of a token's cell in pixels; also of the DiT's patches", least=1)
    channels: int = setting(3, "of an image; a cell of 3×4×4 pixels tells any tokenizer's tokens apart", least=1)
    val_share: float = share(0.05, "of the images, held out by whole texts")
    train_split: float | None = share(None, "the share that trains, in place of val_share")
    num_workers: int | None = setting(0, "cells are drawn in milliseconds", least=0)


# ---- autoencoders, text encoders, losses
@dataclass(frozen=True)
class FineTunedVAVAE:
    """The VA-VAE that is fine-tuned."""

    original_vavae: str | None = setting(
        None,
        "a .pt or .ckpt, a diffusers folder, small (built in); null: what is attached, else small; with a size, fresh",
    )
    size: Literal["small", "f16d32"] | None = setting(None, "fresh weights of this size")
    condition_dim: int | None = setting(None, "length of a person's vector; null: 32 or the file's; 0: none", least=0)
    condition_file: str | None = setting(None, "safetensors with a fixed vector per person (keys ID_1 …)")
    freeze_encoder: bool = setting(False, "train the decoder alone: the latents stay as they are")
    condition_dropout: float = share(0.1, "of the images, trained without their vector")


@dataclass(frozen=True)
class VAVAESource:
    """The VA-VAE whose latents are learnt."""

    source: str | None = setting("outputs/vavae", "what minimal_training_modification.py wrote, or published weights")
    latents_stats: str | None = setting(None, "latents_stats.pt of published weights; null: of the training subset")
    other_people: bool = setting(False, "true: it was fine-tuned on other people; whom it does not know has no vector")


@dataclass(frozen=True)
class RAEParts:
    """A representation autoencoder."""

    folder: str | None = setting(None, "of a whole RAE (rae_decoder's or diffusers'); tiny: a small random one")
    encoder_cls: str = setting("Dinov2withNorm", "or SigLIPwithNorm, MAEwithNorm")
    encoder_config_path: str | None = setting(None, "a transformers folder or config.json; null: the published base")
    encoder_input_size: int | None = setting(None, "pixels; null: 224 for DINOv2, 256 for SigLIP and MAE", least=1)
    encoder_checkpoint_path: str | None = setting(None, "weights of the encoder, of the decoder, or of the whole RAE")
    decoder: str = setting("ViTXL", "ViTB, ViTL, ViTXL, tiny; the published weights are ViTXL's")
    decoder_path: str | None = setting(None, "its weights; null: it starts anew, and then needs more and longer")
    statistics_path: str | None = setting(None, "stat.pt; null: computed on the training subset")


@dataclass(frozen=True)
class TextEncoderSource:
    """A frozen text encoder."""

    name: str | None = setting(None, "a folder of transformers (CLIP ViT-B/32), or a hub name; shapes need none")


@dataclass(frozen=True)
class StableDiffusionSource:
    """A frozen VAE of Stable Diffusion."""

    name: str | None = setting(None, "a folder of diffusers (Stable Diffusion 1.5), or a hub name; shapes need none")
    use_slicing: bool = setting(False, "one image after the other: less memory")


@dataclass(frozen=True)
class AutoencoderLoss:
    """A weight of 0 turns its part off."""

    l1_weight: float | None = setting(None, "of the absolute error", least=0)
    gradient_weight: float | None = setting(None, "of multi-scale gradients; 0.5 keeps edges without LPIPS", least=0)
    spectral_weight: float | None = setting(None, "of short-time spectra; 1 keeps texture without LPIPS", least=0)
    perceptual_weight: float | None = setting(None, "of LPIPS; needs lpips_weights", least=0)
    lpips_weights: list[str] | str | None = setting(None, "files of VGG16 and LPIPS, or a VA-VAE .ckpt with both")
    disc_weight: float | None = setting(None, "of the adversarial part", least=0)
    disc_start: int | None = setting(None, "optimiser step at which the discriminator begins", least=0)
    disc_width: int | None = setting(None, "channels of the discriminator's first layer (64)", least=1)
    disc_lr: float | None = setting(None, "learning rate of the discriminator (1e-4)", above=0)


@dataclass(frozen=True)
class VAVAELoss(AutoencoderLoss):
    """In place of the loss recipe's own numbers; a weight of 0 turns its part off."""

    recipe: LossRecipe | None = setting(
        None, "losses and optimiser; null: light, or full where its weights are attached"
    )
    kl_weight: float | None = setting(None, "of the KL divergence against absolute errors, both summed (1e-6)", least=0)
    vf_weight: float | None = setting(None, "of the alignment; needs foundation_model", least=0)
    foundation_model: str | None = setting(None, "local folder of a DINOv2 as transformers saves it")
    distance_margin: float | None = setting(None, "of the alignment's distances")
    cosine_margin: float | None = setting(None, "of the alignment's cosines")


@dataclass(frozen=True)
class DecoderLoss(AutoencoderLoss):
    """What the decoder is trained by; null: the discriminator begins at 3/8 of all steps, as in the paper."""

    noise_tau: float = setting(0.8, "largest standard deviation of the noise on tokens; 0: none", least=0)
    generator_start: int | None = setting(None, "step of the adversarial part; null: at half of all", least=0)


# ---- denoisers and what they learn
@dataclass(frozen=True)
class TextDenoiserModel:
    """A DiT with cross-attention to a caption's tokens."""

    hidden_size: int = setting(768, "features of a token", least=1)
    depth: int = setting(16, "transformer blocks", least=1)
    num_heads: int = setting(12, "attention heads", least=1)
    patch_size: int = setting(2, "side of the square of latent pixels that is one token", least=1)
    mlp_ratio: float = setting(4.0, "features inside a block's MLP, in hidden_size", above=0)
    qk_norm: bool = setting(False, "true cures a half-precision run whose loss becomes NaN")
    condition_dropout: float = share(0.1, "how often the condition is left out, so that guidance has its null")


@dataclass(frozen=True)
class DenoiserModel(TextDenoiserModel):
    """A DiT, or with two numbers each one with the wide head (of the encoder and of the head)."""

    size: NamedSize | None = setting(None, "in place of hidden_size, depth and num_heads")
    head: Literal["wide"] | None = setting(None, "wide: the sizes of DiT^DH")
    hidden_size: Size = setting(None, "features of a token; null: what suits the machine", least=1)
    depth: Size = setting(None, "transformer blocks", least=1)
    num_heads: Size = setting(None, "attention heads", least=1)
    patch_size: int | None = setting(None, "side of the square of latent pixels that is one token", least=1)
    num_classes: int | None = setting(None, "null: as many as the data have", least=1)
    null_label: int | None = setting(None, "the class that means any: always the one after the last; checked")
    in_channels: int | None = setting(None, "of the latents; null: as they are", least=1)
    input_size: Size = setting(None, "side of the latents; null: as they are", least=1)
    latent_size: list[int] | None = setting(None, "channels, height, width of the latents; checked where it is given")
    rope: bool = setting(True, "rotary positions")
    rms_norm: bool = setting(True, "RMSNorm in place of LayerNorm")
    swiglu: bool = setting(True, "SwiGLU in place of an MLP")
    time_embed: str | None = setting(None, "fourier, and reversed_time: true, for weights of RAE's LightningDiT")
    reversed_time: bool | None = setting(None, "true: t = 1 is noise, as of some weights; null: seen in them")
    learn_sigma: bool | None = setting(None, "true for weights with a learned sigma")
    adaln_shift: bool | None = setting(None, "false for weights without a shift in their modulation")
    pos_embed: bool | None = setting(None, "of a wide head: added positions, besides rotary ones")


@dataclass(frozen=True)
class TokenDenoiserModel:
    """A DiT on pixels."""

    size: NamedSize | None = setting(None, "in place of hidden_size, depth and num_heads")
    hidden_size: int = setting(384, "features of a cell", least=1)
    depth: int = setting(12, "transformer blocks", least=1)
    num_heads: int = setting(6, "attention heads", least=1)
    mlp_ratio: float = setting(4.0, "features inside a block's MLP, in hidden_size", above=0)
    qk_norm: bool = setting(True, "larger learning rates, and no NaN in half precision")
    positions: Literal["sequence", "grid"] = setting("sequence", "places in reading order; grid: rows and columns")


@dataclass(frozen=True)
class Objective:
    """What the denoiser learns; null: the objective's own default."""

    name: ObjectiveName = setting("flow_matching", "the velocity; DDPM's noise ε; v; the clean image")
    cosine_weight: float | None = setting(None, "flow_matching: of the velocity's direction", least=0)
    cosine_eps: float | None = setting(None, "flow_matching: smallest length of a velocity in the cosine", above=0)
    path: Literal["linear", "gvp"] | None = setting(None, "flow_matching: straight, or variance-preserving")
    largest_noise: float | None = setting(None, "flow_matching: times with more noise are not drawn", above=0)
    time: Literal["lognorm", "uniform"] | None = setting(None, "flow_matching, sample: how times are drawn")
    time_mean: float | None = setting(None, "flow_matching, sample: of lognorm")
    time_std: float | None = setting(None, "flow_matching, sample: of lognorm", above=0)
    time_shift: float | None = setting(1.0, "above 1: more at high noise; null: by the latents' dimension", above=0)
    normalised: Literal["channels", "pixels"] | None = setting(None, "sample: the mean over channels, or their sum")


@dataclass(frozen=True)
class InitFrom:
    """Weights to start from."""

    weights: str | None = setting(None, "a pipeline/ or .ckpt from here, or published weights")
    kind: str | None = setting(None, "of published weights: lightningdit, ddt, dit; null: seen in them")
    classes: str | list[str | int | None] = setting(
        "new", "rows: new, nearest (published ones that fit best), keep, or labels"
    )
    lora_rank: int = setting(0, "above 0: train low-rank additions of this rank, merged at the end", least=0)
    lora_alpha: float | None = setting(None, "null: the rank")
    lora_targets: list[str] = setting(["qkv", "proj", "w12", "w3"], "layers that get them")


@dataclass(frozen=True)
class ClassSampling:
    """Samples while training."""

    num_steps: int = setting(20, "of the previews", least=1)
    guidance_scale: float | None = setting(None, "of the previews; null: what suits the data")


@dataclass(frozen=True)
class TextSampling(ClassSampling):
    """Samples while training."""

    prompts: list[str] | str | None = setting(None, "of the previews; null: the first captions that validate")
    solver: str | None = setting(None, "as of sample's --solver; null: dpm++, of flows euler")


@dataclass(frozen=True)
class TokenSampling:
    """Samples while training."""

    num_steps: int = setting(100, "of the previews", least=1)
    prompts: list[Prompt] | str | None = setting(None, "of the previews; null: beginnings of texts that validate")
    eta: float = share(1.0, "of fresh noise in a step; 0: none (Euler's method)")
    solver: str | None = setting(None, "as of sample's --solver; null: steps with fresh noise")
    time_shift: float | None = setting(None, "above 1: more steps at high noise; null: as noise hides a cell", above=0)


# ---- recipes
@dataclass(frozen=True)
class Recipe:
    """What an experiment is made of."""

    train_by: ClassVar[str]  # module:function (recipe, output_dir, resume, show, log) → what it made
    next_command: ClassVar[str] = "sample --checkpoint {made} --num_samples 100 --output_dir outputs/samples"
    needs: ClassVar[tuple[str, ...]] = ()  # keys without a default
    resume: str | None = setting(None, "last, a .ckpt, .pth, checkpoint folder or run's folder")
    output_dir: str | None = setting(None, "of this run; null: logs/runs/YYYY-MM-DD/HH-MM-SS")
    overwrite: bool = setting(False, "replace the checkpoints of the run that output_dir holds")
    seed: int = setting(0, "the same seed, data and settings give the same weights", least=0, most=2**32 - 1)


@dataclass(frozen=True)
class VAVAERecipe(Recipe):
    """Stage 1 of the main path: a VA-VAE with a vector per person, fine-tuned."""

    train_by = "vavae_tools.recipes.vavae:train_vavae"
    next_command = "train --data_dir {data_dir} --vavae {made}"
    data: ImageData = ImageData(crop="none")  # a spectrogram's axes stay whole
    vavae: FineTunedVAVAE = FineTunedVAVAE()
    loss: VAVAELoss = VAVAELoss()
    monitor: Monitor | None = setting(
        None, "what best-*.ckpt is chosen by; null: reconstruction, of the recipe vector loss, with the KL"
    )
    classifier_dir: str | None = setting(None, "keeps the classifier that watches; null: in the run's folder")
    train: TrainConfig = TrainConfig(**dict.fromkeys(OF_LOSSES), previews=10, export="best")


@dataclass(frozen=True)
class DecoderRecipe(Recipe):
    """Stage 1 of a representation autoencoder (RAE): its decoder; the encoder stays as it is."""

    train_by = "vavae_tools.recipes.rae:train_rae_decoder"
    next_command = "train experiment=rae_dit rae.folder={made} data.data_dir={data_dir}"
    needs = ("data.data_dir",)
    data: FlippedData = FlippedData()
    rae: RAEParts = RAEParts()
    loss: DecoderLoss = DecoderLoss(
        l1_weight=0.5,  # in [-1, 1]: the paper's 1 in [0, 1]
        gradient_weight=0.0,
        spectral_weight=0.0,
        disc_weight=0.75,  # the paper's; perceptual_weight is its 1 where lpips_weights is named, else 0
        disc_width=64,  # VA-VAE's, whose discriminator it is
        disc_lr=1e-4,
    )
    train: TrainConfig = TrainConfig(
        batch_size=8,  # a T4 takes no 12 (benchmarks/memory.py); the paper's 512: accumulate_grad_batches=64
        max_steps=5000,  # a choice: the paper's 40,000 steps of 512 are for a fresh one on ImageNet
        lr=2e-4,  # the paper's; 2e-3 for decoder=tiny
        warmup_steps=300,  # a sixteenth of all, as in the paper
        ema_decay=0.9978,  # the paper's: the average of some 450 steps
        export="last",  # PSNR, which the best is chosen by, falls where the discriminator sharpens
    )


@dataclass(frozen=True)
class LatentRecipe(Recipe):
    """A denoiser on latents of images of classes."""

    data: LatentData = LatentData()
    model: DenoiserModel = DenoiserModel()
    objective: Objective = Objective()
    init: InitFrom = InitFrom()
    sampling: ClassSampling = ClassSampling()
    train: WatchedConfig = WatchedConfig(ema_decay=None, previews=None)


@dataclass(frozen=True)
class VAVAEDiTRecipe(LatentRecipe):
    """The main path: images of classes, a fine-tuned VA-VAE, its latents, a LightningDiT."""

    train_by = "vavae_tools.recipes.dit:train_vavae_dit"
    data: LatentData = LatentData(latents_dir="outputs/latents", crop="none")
    vavae: VAVAESource = VAVAESource()


@dataclass(frozen=True)
class RAEDiTRecipe(LatentRecipe):
    """Stage 2 of a representation autoencoder (RAE): a DiT with the wide DDT head on its latents."""

    train_by = "vavae_tools.recipes.rae:train_rae_dit"
    needs = ("data.data_dir",)
    data: LatentData = LatentData(flips=True)
    rae: RAEParts = RAEParts()
    model: DenoiserModel = DenoiserModel(  # the published DiT^DH-XL
        head="wide", hidden_size=[1152, 2048], depth=[28, 2], num_heads=[16, 16], patch_size=1, num_classes=1000
    )
    # RAE's: the squared error alone, times shifted towards noise
    objective: Objective = Objective(cosine_weight=0.0, time_shift=None, largest_noise=0.999)
    train: WatchedConfig = WatchedConfig(batch_size=32, max_steps=100_000, lr=2e-4, warmup_steps=5000, ema_decay=0.9995)


@dataclass(frozen=True)
class TextToImageRecipe(Recipe):
    """Images from sentences: CLIP's text, a frozen Stable Diffusion VAE, a DiT with cross-attention."""

    train_by = "vavae_tools.recipes.text_to_image:train_text_to_image"
    next_command = 'sample --checkpoint {made} --prompt "…" --output_dir outputs/samples'
    needs = ("data.dataset_name",)
    data: CaptionData = CaptionData()
    text_encoder: TextEncoderSource = TextEncoderSource()
    vae: StableDiffusionSource = StableDiffusionSource()
    model: TextDenoiserModel = TextDenoiserModel()
    objective: Objective = Objective(name="epsilon")
    sampling: TextSampling = TextSampling(num_steps=50, guidance_scale=7.5)
    train: TrainConfig = TrainConfig(
        batch_size=24,  # a T4 takes no 32, or 96 with gradient checkpointing
        max_epochs=1000,
        lr=1e-4,
        warmup_steps=500,
        ema_decay=0.9999,  # the average of the last 10,000 steps
        save_every_n_epochs=10,
        save_every_n_steps=500,
    )


@dataclass(frozen=True)
class TokenImageRecipe(Recipe):
    """Texts drawn as images: a DiT on pixels learns the clean image, alone or after a prompt."""

    train_by = "vavae_tools.recipes.token_images:train_token_images"
    needs = ("data.data_dir",)
    data: TextData = TextData()
    model: TokenDenoiserModel = TokenDenoiserModel()
    objective: Objective = Objective(name="sample", time="lognorm", time_std=0.7)
    prompt_share: float = share(0.5, "of the images, whose first cells are given: so it can go on with a text")
    sampling: TokenSampling = TokenSampling()
    train: TrainConfig = TrainConfig(
        batch_size=32,
        max_epochs=100,
        lr=3e-4,
        warmup_steps=500,
        ema_decay=0.999,  # the average of the last 1,000 steps
        save_every_n_epochs=10,
        single_files=True,  # checkpoint_epoch_10.pth
    )


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)
RECIPES: dict[str, type[Recipe]] = {
    "vavae": VAVAERecipe,
    "vavae_dit": VAVAEDiTRecipe,
    "rae_decoder": DecoderRecipe,
    "rae_dit": RAEDiTRecipe,
    "text_to_image": TextToImageRecipe,
    "token_images": TokenImageRecipe,
}
