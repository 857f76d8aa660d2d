"""A frozen CLIP text encoder (Radford et al. 2021) with its tokenizer: captions → states.

Architecture and files are those of transformers, which is imported only where an encoder is loaded or made.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vavae_tools.autoencoders.encoders import silent_loading
from vavae_tools.runtime.errors import UserError, one_line
from vavae_tools.runtime.files import load_model, local_folder, save_model, weights_digest


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
    """Captions → `TextStates`, by transformers' CLIPTextModel, frozen and in evaluation mode.

    It is no `nn.Module`, and so not in the checkpoints of what holds it.
    """

    def __init__(self, model: nn.Module, tokenizer: Any) -> None:
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        config = model.config
        self.dim = self.pooled_dim = int(config.hidden_size)
        self.max_tokens = min(int(tokenizer.model_max_length), config.max_position_embeddings)  # with start and end
        if len(tokenizer) > config.vocab_size:
            many = f"The tokenizer has {len(tokenizer):,} tokens, the text encoder {config.vocab_size:,}"
            raise UserError(f"{many}: they belong to different models, take both from one folder")
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
        tokenizer.padding_side = tokenizer.truncation_side = "right"

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def to(self, device: str | torch.device) -> "TextEncoder":
        self.model.to(device)
        return self

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextStates:
        """Return states on the encoder's device, as long as those of the longest caption.

        What is longer than `max_tokens` is cut at its end and keeps the end token (`lengths` counts such captions). The
        attention looks back only, so that the states do not depend on padding.
        """
        as_tensors = {"truncation": True, "max_length": self.max_tokens, "return_tensors": "pt"}
        rows = self.tokenizer(list(captions), padding="longest", **as_tensors)
        ids, mask = rows["input_ids"], rows["attention_mask"]  # (B, L) both
        if self.device.type == "cuda":  # a copy from pinned memory is not waited for
            ids, mask = ids.pin_memory(), mask.pin_memory()
        ids, mask = (given.to(self.device, non_blocking=True) for given in (ids, mask))
        tokens = torch.cat([self.model(input_ids=part).last_hidden_state.float() for part in ids.split(256)])
        return TextStates(tokens, mask.bool(), tokens[torch.arange(len(ids), device=self.device), mask.sum(1) - 1])

    def lengths(self, captions: Sequence[str]) -> tuple[list[int], int]:
        """Return the tokens of each caption before it is cut, with start and end, and how many captions are cut."""
        lengths = [len(ids) for ids in self.tokenizer(list(captions), verbose=False)["input_ids"]]
        return lengths, sum(length > self.max_tokens for length in lengths)

    def digest(self) -> str:
        """Return a hash of all that the states follow from: the weights, how they are used, and the tokenizer."""
        weights = weights_digest(getattr(self.model, "text_model", self.model))  # until transformers 5 it stood inside
        unseen = ("model_type", "num_attention_heads", "hidden_act", "layer_norm_eps")  # in the weights
        used = {name: getattr(self.model.config, name) for name in unseen}
        words = json.loads(self.tokenizer.backend_tokenizer.to_str())
        del words["padding"], words["truncation"]  # the last call's
        settings = json.dumps([used, self.max_tokens, words], sort_keys=True)
        return hashlib.sha256(f"{settings} {weights}".encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write model and tokenizer into one folder, each file whole, for `load_text_encoder` and transformers."""
        with silent_loading():
            save_model(self.model, folder)
            save_model(self.tokenizer, folder)


def load_text_encoder(source: str | Path) -> TextEncoder:
    """Return a frozen CLIP text encoder from its folder, such as that of openai/clip-vit-base-patch32.

    Also that of a whole CLIPModel, whose text half is taken, of Stable Diffusion (`text_encoder/` and `tokenizer/`), or
    "owner/name", a repository of Hugging Face's hub, read only where no such path is there.
    """
    folder = local_folder(
        source,
        of="a text encoder",
        instead="download the text encoder and its tokenizer (openai/clip-vit-base-patch32), and name their folder",
        part="text_encoder",
    )
    from transformers import AutoTokenizer, CLIPTextModel, CLIPTokenizer

    of_model = folder / "text_encoder" if (folder / "text_encoder").is_dir() else folder
    places = (folder / "tokenizer", of_model, folder, of_model.parent / "tokenizer")
    found = [place for place in places if any((place / name).is_file() for name in ("tokenizer.json", "vocab.json"))]
    with silent_loading():
        model = load_model(CLIPTextModel, of_model)
        if not found:
            missing = "tokenizer.json, or vocab.json and merges.txt, is missing"
            place = f"there and in {places[0]}; copy it from where the weights came from"
            raise UserError(f"{folder} holds a text encoder without a tokenizer: {missing} {place}")
        kind = AutoTokenizer if (found[0] / "tokenizer_config.json").is_file() else CLIPTokenizer
        try:
            tokenizer = kind.from_pretrained(found[0], local_files_only=True)
        except Exception as error:  # of any kind: what transformers' versions stumble over in damaged files
            problem = f"The tokenizer in {found[0]} cannot be loaded ({one_line(error)})"
            raise UserError(f"{problem}: copy the folder anew") from None
    return TextEncoder(model, tokenizer)


# ---- a small one
def tiny_text_encoder(
    sentences: Iterable[str], dim: int = 64, num_layers: int = 2, max_tokens: int = 32, seed: int = 0
) -> TextEncoder:
    """Return a small random CLIP text encoder whose tokenizer knows the words of some sentences, for trials.

    Each word has a random vector of its own, and a caption's end token gathers them all, so that captions differ
    without any training. Other words are spelled, letter by letter. `dim` is a multiple of 16.
    """
    from transformers import CLIPTextConfig, CLIPTextModel

    tokenizer = _word_tokenizer(sentences, max_tokens)
    sizes = {"hidden_size": dim, "intermediate_size": 2 * dim, "projection_dim": dim, "num_hidden_layers": num_layers}
    sizes |= {"num_attention_heads": dim // 16, "vocab_size": len(tokenizer), "max_position_embeddings": max_tokens}
    first, last = tokenizer.bos_token_id, tokenizer.eos_token_id
    with torch.random.fork_rng(devices=[]):
        model = CLIPTextModel(CLIPTextConfig(**sizes, bos_token_id=first, eos_token_id=last, pad_token_id=last))
    _draw_weights(model, torch.Generator().manual_seed(seed))
    return TextEncoder(model, tokenizer)


_GAINS = {"q_proj": 0.3, "k_proj": 0.3, "v_proj": 2.0, "out_proj": 2.0, "fc2": 0.5}
"""Of a matrix's usual size: attention that hardly chooses between words, and counts in the sum."""


@torch.no_grad()
def _draw_weights(model: nn.Module, draws: torch.Generator) -> None:
    """Draw weights with which the last states still tell what the first ones were."""
    for name, weight in sorted(model.named_parameters()):
        if name.endswith("token_embedding.weight"):
            weight.normal_(generator=draws)
        elif name.endswith("position_embedding.weight"):
            weight.normal_(std=0.1, generator=draws)
        elif weight.ndim == 2:
            gain = _GAINS.get(name.split(".")[-2], 1.0)
            weight.normal_(std=gain * weight.shape[1] ** -0.5, generator=draws)


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
