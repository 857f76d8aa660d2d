"""What a sentence says, as numbers: a frozen CLIP text encoder (Radford et al. 2021) with its tokenizer.

Architecture and files are those of transformers, which is imported only where an encoder is loaded or made. Nothing is
downloaded, except where a person names a repository of a hub.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vavae_tools.autoencoders.loading import silent_transformers
from vavae_tools.runtime.errors import UserError
from vavae_tools.runtime.files import local_folder, save_model, weights_digest

_MODEL_TYPES = ("clip_text_model", "clip")
_WEIGHT_FILES = tuple(
    f"{name}{end}"
    for name in ("model.safetensors", "model.fp16.safetensors", "pytorch_model.bin")
    for end in ("", ".index.json")
)
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_KEPT = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps")  # not to be seen in the weights
_AT_ONCE = 256


@dataclass(frozen=True)
class TextStates:
    """Captions as an encoder sees them.

    Attributes:
        tokens: the last layer's states, float32 (B, L, D).
        mask: bool (B, L), true up to and including the end token; what stands behind is padding.
        pooled: the end token's states, float32 (B, P), which have seen the whole caption.
    """

    tokens: Tensor
    mask: Tensor
    pooled: Tensor

    def to(self, device: str | torch.device) -> "TextStates":
        """The same on a device."""
        return TextStates(self.tokens.to(device), self.mask.to(device), self.pooled.to(device))

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> "TextStates":
        """Some of the captions, all with the length that they have here."""
        return TextStates(self.tokens[rows], self.mask[rows], self.pooled[rows])


class TextEncoder:
    """Captions → `TextStates`; no `nn.Module`, so it stays frozen and out of the checkpoints of what holds it.

    Args:
        model: transformers' CLIPTextModel; it is frozen and put into evaluation mode.
        tokenizer: its tokenizer.

    Attributes:
        dim, pooled_dim: width of a token's and of the pooled states.
        max_tokens: how many tokens a caption may have, with the start and the end token.

    Raises:
        UserError: a tokenizer that knows more tokens than the model, or none that ends a caption.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        config = model.config
        self.dim: int = config.hidden_size
        self.pooled_dim: int = config.hidden_size
        self.max_tokens = min(int(tokenizer.model_max_length), config.max_position_embeddings)
        if len(tokenizer) > config.vocab_size:
            raise UserError(
                f"The tokenizer has {len(tokenizer):,} tokens, the text encoder {config.vocab_size:,}: they belong to "
                "different models, take both from one folder"
            )
        if tokenizer.eos_token_id is None:
            raise UserError("The tokenizer has no end token (eos_token): take the one that came with the text encoder")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = tokenizer.truncation_side = "right"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> "TextEncoder":
        """Move the model to a device, in place."""
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextStates:
        """Captions → their states on the encoder's device, as long as the longest of them.

        What is longer than `max_tokens` is cut at its end and keeps the end token (`lengths` counts such captions). The
        attention looks back only, so that the states do not depend on padding.
        """
        rows = self.tokenizer(
            _listed(captions), padding="longest", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        ids, mask = rows["input_ids"], rows["attention_mask"]  # (B, L) both
        if torch.device(self.device).type == "cuda":  # a copy from pinned memory is not waited for
            ids, mask = ids.pin_memory(), mask.pin_memory()
        ids, mask = (given.to(self.device, non_blocking=True) for given in (ids, mask))
        mask = mask.bool()
        parts = [self.model(input_ids=part).last_hidden_state.float() for part in ids.split(_AT_ONCE)]
        tokens = torch.cat(parts)  # (B, L, D)
        last = mask.sum(1) - 1
        return TextStates(tokens, mask, tokens[torch.arange(len(tokens), device=tokens.device), last])

    def lengths(self, captions: Sequence[str]) -> tuple[list[int], int]:
        """How many tokens each caption has before it is cut, with start and end, and how many captions are cut."""
        lengths = [len(ids) for ids in self.tokenizer(_listed(captions), verbose=False)["input_ids"]]
        return lengths, sum(length > self.max_tokens for length in lengths)

    def digest(self) -> str:
        """A hash of all that the states follow from: the weights, how they are used, and the tokenizer."""
        weights = weights_digest(getattr(self.model, "text_model", self.model))  # until transformers 5 it stood inside
        used = {name: getattr(self.model.config, name) for name in _KEPT}
        settings = json.dumps([used, self.max_tokens, _words_of(self.tokenizer)], sort_keys=True)
        return hashlib.sha256(f"{settings} {weights}".encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer into one folder, each file whole, for `load_text_encoder` and transformers."""
        with silent_transformers():
            save_model(self.model, folder)
            save_model(self.tokenizer, folder)


def _listed(captions: Sequence[str]) -> list[str]:
    captions = [captions] if isinstance(captions, str) else list(captions)
    if not captions:
        raise UserError("No captions to encode: at least one is needed")
    return captions


def _words_of(tokenizer: Any) -> dict[str, Any]:
    """All that tells how a tokenizer cuts text, without what the last call has set in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    return {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}


# ---- from files
def load_text_encoder(source: str | Path) -> TextEncoder:
    """A frozen CLIP text encoder from its folder, such as that of openai/clip-vit-base-patch32.

    Args:
        source: a folder of transformers with a CLIPTextModel, or a whole CLIPModel whose text half is taken, and its
            tokenizer; a folder of Stable Diffusion with `text_encoder/` and `tokenizer/`; or "owner/name", a repository
            of Hugging Face's hub, read only where no such path is there.

    Raises:
        UserError: nothing there, no tokenizer, no weights, another kind of model, or files that are damaged.
    """
    files = ["*.json", "*.txt", "*.safetensors"]
    folder = local_folder(
        source,
        of="a text encoder",
        name="one in transformers' format, such as that of openai/clip-vit-base-patch32",
        instead="download the text encoder and its tokenizer and name their folder",
        patterns=[*files, *(f"{part}/{file}" for part in ("text_encoder", "tokenizer") for file in files)],
        ignored=["unet/*", "vae/*"],
    )
    of_model = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    _check_model_folder(of_model)
    of_tokenizer = _tokenizer_folder(folder, of_model)
    return TextEncoder(_load_model(of_model), _load_tokenizer(of_tokenizer))


def _some(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    return (", ".join(names[:5]) or "nothing") + (" …" if len(names) > 5 else "")


def _check_model_folder(folder: Path) -> None:
    config = folder / "config.json"
    if not config.is_file():
        raise UserError(f"{folder} is no text encoder's folder: config.json is missing; it holds {_some(folder)}")
    try:
        model_type = json.loads(config.read_text(encoding="utf-8")).get("model_type")
    except (ValueError, AttributeError) as error:
        raise UserError(f"{config} is damaged ({error}): copy the folder anew") from None
    if model_type not in _MODEL_TYPES:
        raise UserError(
            f"{folder} holds a model of type {model_type!r}, which is no text encoder of CLIP: expected "
            f"{' or '.join(_MODEL_TYPES)}"
        )
    if not any((folder / name).is_file() for name in _WEIGHT_FILES):
        raise UserError(
            f"{folder} holds no weights of a text encoder: expected model.safetensors, found {_some(folder)}"
        )


def _tokenizer_folder(folder: Path, of_model: Path) -> Path:
    places = (folder / "tokenizer", of_model, folder, of_model.parent / "tokenizer")
    for place in places:
        if any((place / name).is_file() for name in _TOKENIZER_FILES):
            return place
    raise UserError(
        f"{folder} holds a text encoder without a tokenizer: tokenizer.json, or vocab.json and merges.txt, is missing "
        f"there and in {places[0]}; copy it from where the weights came from"
    )


def _load_model(folder: Path) -> nn.Module:
    from transformers import CLIPTextModel

    half = not any((folder / name).is_file() for name in _WEIGHT_FILES if "fp16" not in name)
    try:
        with silent_transformers():
            model, report = CLIPTextModel.from_pretrained(
                folder, local_files_only=True, output_loading_info=True, variant="fp16" if half else None
            )
    except Exception as error:  # of any kind: what transformers' versions stumble over in damaged files
        reason = "".join(filter(str.isprintable, " ".join(str(error).split())))[:120]
        raise UserError(f"The text encoder in {folder} cannot be loaded ({reason}): copy the folder anew") from None
    missing = sorted(name for name in report["missing_keys"] if "position_ids" not in name)
    if missing:  # transformers goes on with random numbers there
        raise UserError(
            f"The weights in {folder} are not those of its config.json: {len(missing)} are missing, such as "
            f"{missing[0]}. Copy the folder anew"
        )
    return model.float()


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer, CLIPTokenizer

    kind = AutoTokenizer if (folder / "tokenizer_config.json").is_file() else CLIPTokenizer
    try:
        with silent_transformers():
            return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # as above
        reason = "".join(filter(str.isprintable, " ".join(str(error).split())))[:120]
        raise UserError(f"The tokenizer in {folder} cannot be loaded ({reason}): copy its files anew") from None


# ---- a small one
def tiny_text_encoder(
    sentences: Iterable[str], dim: int = 64, num_layers: int = 2, max_tokens: int = 32, seed: int = 0
) -> TextEncoder:
    """A small random CLIP text encoder whose tokenizer knows the words of some sentences, for trials without downloads.

    Words are told apart without any training: each has a random vector of its own, and a caption's end token gathers
    them all. Other words are spelled, letter by letter. The same arguments give the same encoder.

    Args:
        dim: width of the states, a multiple of 16.
        max_tokens: of a caption, with the start and the end token.

    Raises:
        UserError: a width that is no multiple of 16, or max_tokens below 3.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    if dim < 16 or dim % 16:
        raise UserError(f"dim {dim} of the tiny text encoder: expected a multiple of 16")
    if max_tokens < 3:
        raise UserError(f"max_tokens {max_tokens}: a caption needs room for its start, its end and a word, 3 or more")
    tokenizer = _word_tokenizer(sentences, max_tokens)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=dim,
        intermediate_size=2 * dim,
        projection_dim=dim,
        num_hidden_layers=num_layers,
        num_attention_heads=dim // 16,
        max_position_embeddings=max_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        model = CLIPTextModel(config)
    return TextEncoder(_spread(model, seed), tokenizer)


_GAINS = {"q_proj": 0.3, "k_proj": 0.3, "v_proj": 2.0, "out_proj": 2.0, "fc2": 0.5}
"""Of a matrix's usual size: attention that hardly chooses, so that no word is overheard, and then speaks up."""


@torch.no_grad()
def _spread(model: nn.Module, seed: int) -> nn.Module:
    """Random weights with which the last states still tell what the first ones were."""
    draws = torch.Generator().manual_seed(seed)
    for name, weight in sorted(model.named_parameters()):
        if name.endswith("token_embedding.weight"):
            weight.normal_(generator=draws)
        elif name.endswith("position_embedding.weight"):
            weight.normal_(std=0.1, generator=draws)
        elif weight.ndim == 2:
            gain = _GAINS.get(name.split(".")[-2], 1.0)
            weight.normal_(std=gain * weight.shape[1] ** -0.5, generator=draws)
    return model


def _word_tokenizer(sentences: Iterable[str], max_tokens: int) -> Any:
    """A CLIPTokenizer that has a token for every word of the sentences, and letters for all others."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import CLIPTokenizer

    cut = CLIPTokenizer().backend_tokenizer
    words = {
        word
        for sentence in sentences
        for word, _ in cut.pre_tokenizer.pre_tokenize_str(cut.normalizer.normalize_str(sentence))
    }
    letters = sorted(ByteLevel.alphabet())  # one for each byte
    trainer = BpeTrainer(
        vocab_size=2 * len(letters) + sum(map(len, words)),  # enough to merge pairs until each word is one piece
        min_frequency=1,
        initial_alphabet=letters,
        special_tokens=[letter + _END for letter in letters],  # any may end a word; those found come in no fixed order
        end_of_word_suffix=_END,
        show_progress=False,
    )
    trained = Tokenizer(BPE(end_of_word_suffix=_END))
    trained.train_from_iterator(sorted(words), trainer)
    model = json.loads(trained.to_str())["model"]
    pieces, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    for special in ("<|startoftext|>", "<|endoftext|>"):  # in CLIP they are last, too
        pieces[special] = len(pieces)
    return CLIPTokenizer(pieces, merges, model_max_length=max_tokens)


_END = "</w>"
"""Marks the last piece of a word in CLIP's vocabularies."""
