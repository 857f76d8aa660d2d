"""A frozen CLIP text encoder (Radford et al. 2021) with its tokenizer: captions → states.

Architecture and files are those of transformers, which is imported only where an encoder is loaded or made. Nothing is
downloaded, except where a repository of a hub is named.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vavae_tools.autoencoders.encoders import silent_transformers
from vavae_tools.runtime.errors import UserError, one_line
from vavae_tools.runtime.files import local_folder, save_model, weights_digest

_KEPT = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps")  # not to be seen in the weights
_BATCH_SIZE = 256


@dataclass(frozen=True)
class TextStates:
    """Captions as an encoder sees them."""

    tokens: Tensor  # the last layer's states, float32 (B, L, D)
    mask: Tensor  # bool (B, L), true up to and including the end token; what stands behind is padding
    pooled: Tensor  # the end token's states, float32 (B, P), which have seen the whole caption

    def to(self, device: str | torch.device) -> "TextStates":
        return TextStates(self.tokens.to(device), self.mask.to(device), self.pooled.to(device))

    def __len__(self) -> int:
        return len(self.pooled)

    def __getitem__(self, rows: Tensor | slice | Sequence[int]) -> "TextStates":
        """Return some of the captions, all with the length that they have here."""
        return TextStates(self.tokens[rows], self.mask[rows], self.pooled[rows])


class TextEncoder:
    """Captions → `TextStates`; no `nn.Module`, so it stays frozen and out of the checkpoints of what holds it.

    The model is transformers' CLIPTextModel; it is frozen and put into evaluation mode.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        config = model.config
        self.dim: int = config.hidden_size
        self.pooled_dim: int = config.hidden_size
        self.max_tokens = min(int(tokenizer.model_max_length), config.max_position_embeddings)  # with start and end
        if len(tokenizer) > config.vocab_size:
            raise UserError(
                f"The tokenizer has {len(tokenizer):,} tokens, the text encoder {config.vocab_size:,}: they belong to "
                "different models, take both from one folder"
            )
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
        """Return states on the encoder's device, as long as those of the longest caption.

        What is longer than `max_tokens` is cut at its end and keeps the end token (`lengths` counts such captions). The
        attention looks back only, so that the states do not depend on padding.
        """
        rows = self.tokenizer(
            _listed(captions), padding="longest", truncation=True, max_length=self.max_tokens, return_tensors="pt"
        )
        ids, mask = rows["input_ids"], rows["attention_mask"]  # (B, L) both
        if self.device.type == "cuda":  # a copy from pinned memory is not waited for
            ids, mask = ids.pin_memory(), mask.pin_memory()
        ids, mask = (given.to(self.device, non_blocking=True) for given in (ids, mask))
        parts = [self.model(input_ids=part).last_hidden_state.float() for part in ids.split(_BATCH_SIZE)]
        tokens = torch.cat(parts)  # (B, L, D)
        return TextStates(tokens, mask.bool(), tokens[torch.arange(len(ids), device=self.device), mask.sum(1) - 1])

    def lengths(self, captions: Sequence[str]) -> tuple[list[int], int]:
        """Return the tokens of each caption before it is cut, with start and end, and how many captions are cut."""
        lengths = [len(ids) for ids in self.tokenizer(_listed(captions), verbose=False)["input_ids"]]
        return lengths, sum(length > self.max_tokens for length in lengths)

    def digest(self) -> str:
        """Return a hash of all that the states follow from: the weights, how they are used, and the tokenizer."""
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
    """Return all that tells how a tokenizer cuts text, without what the last call has set in it."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer.get_vocab()
    return {k: v for k, v in json.loads(backend.to_str()).items() if k not in ("padding", "truncation")}


def load_text_encoder(source: str | Path) -> TextEncoder:
    """Return a frozen CLIP text encoder from its folder, such as that of openai/clip-vit-base-patch32.

    Also that of a whole CLIPModel, whose text half is taken, of Stable Diffusion (`text_encoder/` and `tokenizer/`), or
    "owner/name", a repository of Hugging Face's hub, read only where no such path is there.
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
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer

    of_model = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    weights = [path.name for path in of_model.glob("*") if path.name.startswith(("model.", "pytorch_model."))]
    variant = "fp16" if weights and all("fp16" in name for name in weights) else None
    options = {"local_files_only": True, "output_loading_info": True, "variant": variant}
    encoder = partial(CLIPTextModel.from_pretrained, of_model, **options)
    model, report = _loaded(encoder, f"The text encoder in {of_model}")
    missing = sorted(name for name in report["missing_keys"] if "position_ids" not in name)
    if missing:  # of another kind of model, too: transformers goes on with random numbers there
        raise UserError(
            f"The weights in {of_model} are not those of a CLIP text encoder as its config.json says: {len(missing)} "
            f"are missing, such as {missing[0]}. Copy the folder anew"
        )
    places = (folder / "tokenizer", of_model, folder, of_model.parent / "tokenizer")
    found = [place for place in places if any((place / name).is_file() for name in ("tokenizer.json", "vocab.json"))]
    if not found:
        raise UserError(
            f"{folder} holds a text encoder without a tokenizer: tokenizer.json, or vocab.json and merges.txt, is "
            f"missing there and in {places[0]}; copy it from where the weights came from"
        )
    kind = AutoTokenizer if (found[0] / "tokenizer_config.json").is_file() else CLIPTokenizer
    tokenizer = _loaded(lambda: kind.from_pretrained(found[0], local_files_only=True), f"The tokenizer in {found[0]}")
    return TextEncoder(model.float(), tokenizer)


def _loaded(load: Callable[[], Any], what: str) -> Any:
    try:
        with silent_transformers():
            return load()
    except Exception as error:  # of any kind: what transformers' versions stumble over in damaged files
        raise UserError(f"{what} cannot be loaded ({one_line(error)}): copy the folder anew") from None


# ---- a small one
def tiny_text_encoder(
    sentences: Iterable[str], dim: int = 64, num_layers: int = 2, max_tokens: int = 32, seed: int = 0
) -> TextEncoder:
    """Return a small random CLIP text encoder whose tokenizer knows the words of some sentences, for trials.

    Words are told apart without any training: each has a random vector of its own, and a caption's end token gathers
    them all. Other words are spelled, letter by letter. `dim` is a multiple of 16.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

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
    """Return a CLIPTokenizer that has a token for every word of the sentences, and letters for all others."""
    from tokenizers import Tokenizer
    from tokenizers.models import BPE
    from tokenizers.pre_tokenizers import ByteLevel
    from tokenizers.trainers import BpeTrainer
    from transformers import CLIPTokenizer

    cut, words = CLIPTokenizer().backend_tokenizer, set()
    for sentence in sentences:
        words.update(word for word, _ in cut.pre_tokenizer.pre_tokenize_str(cut.normalizer.normalize_str(sentence)))
    end = "</w>"  # marks the last piece of a word in CLIP's vocabularies
    letters = sorted(ByteLevel.alphabet())  # one for each byte
    trainer = BpeTrainer(
        vocab_size=2 * len(letters) + sum(map(len, words)),  # enough to merge pairs until each word is one piece
        min_frequency=1,
        initial_alphabet=letters,
        special_tokens=[letter + end for letter in letters],  # any may end a word; those found come in no fixed order
        end_of_word_suffix=end,
        show_progress=False,
    )
    trained = Tokenizer(BPE(end_of_word_suffix=end))
    trained.train_from_iterator(sorted(words), trainer)
    model = json.loads(trained.to_str())["model"]
    pieces, merges = model["vocab"], [tuple(pair) for pair in model["merges"]]
    for special in ("<|startoftext|>", "<|endoftext|>"):  # in CLIP they are last, too
        pieces[special] = len(pieces)
    return CLIPTokenizer(pieces, merges, model_max_length=max_tokens)
