"""Texts as images: nothing lost, nothing twice, read again; files, tokenizers, subsets; what is said of faults."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny import refused

from vavae_tools.data.demo.sentences import questions, sentences, stories
from vavae_tools.data.tokens.code import SPECIAL, TextTokens, TokenCode, byte_tokenizer
from vavae_tools.data.tokens.dataset import TokenImageDataModule, TokenImageDataset
from vavae_tools.data.tokens.text_files import read_texts

ODD = "Zoë ate 3 “naïve” 猫 🐈\u200d⬛\n\n\tend\r\n<|end|><|user|> [SEP] \x00 \u2028."
TEMPLATE = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}[SEP]{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
FORGETFUL = "{{ messages | length }}" + TEMPLATE
"""A template that writes at the beginning how many messages there are."""
GLUED = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
STRICT = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('users begin') }}{% endif %}" + TEMPLATE


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def json_lines(path: Path, *rows) -> Path:
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))


def chat(*contents: str) -> list[dict[str, str]]:
    """Messages of a user and the assistant in turn."""
    return [{"role": ("user", "assistant")[k % 2], "content": content} for k, content in enumerate(contents)]


def pieces(data: TokenImageDataset) -> list[list[int]]:
    return [data.tokens_of(index).tolist() for index in range(len(data))]


@pytest.fixture(scope="module")
def merged(tmp_path_factory) -> Path:
    """The folder of a byte-level BPE that was trained here, with a beginning it likes to add, and cut at 8 tokens."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["[CLS]", "[SEP]", "[user]", "[assistant]", "[system]"]
    options = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet(), "show_progress": False}
    bpe.train_from_iterator(sentences(300), BpeTrainer(vocab_size=320, special_tokens=special, **options))
    bpe.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", special_tokens=[("[CLS]", 0), ("[SEP]", 1)])
    bpe.enable_truncation(8)
    folder = tmp_path_factory.mktemp("tokenizers") / "merged"
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="[SEP]", bos_token="[CLS]", model_max_length=8)
    tokenizer.add_special_tokens({"additional_special_tokens": special[2:]})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


# ---- texts and images


@pytest.mark.parametrize("max_tokens", [1, 2, 7, 16, None])
@pytest.mark.parametrize("of", ["bytes", "merged"])
def test_no_token_is_lost_or_repeated(of, max_tokens, merged, tmp_path):
    texts = [ODD, "", "x", "one two three " * 40, "é" * 35, "a" * 16, "b" * 15, "\n\n", "[SEP][CLS]", "\ufeffx", " y "]
    file = json_lines(tmp_path / "texts.jsonl", *({"text": text} for text in texts))
    tokenizer = merged if of == "merged" else None
    data = TokenImageDataset(file, 16, max_tokens=max_tokens, tokenizer=tokenizer)
    tokens, held = TextTokens(tokenizer), max_tokens or 16
    wanted = [row.tolist() for row in tokens.encode(texts, end=True)]
    assert [row[-1] for row in wanted] == [tokens.end] * len(texts)
    cut = [row[start : start + held] for row in wanted for start in range(0, len(row), held)]
    assert pieces(data) == cut
    batch = data.get_batch(list(range(len(data))))
    noise = 0.3 * torch.randn(batch["clean"].shape, generator=torch.Generator().manual_seed(0))
    for x in (batch["clean"], batch["clean"] + noise):
        assert data.decode(x, batch["mask"]) == cut
    assert tokens.decode([token for piece in cut for token in piece]) == "".join(texts)


def test_what_an_image_is(tmp_path):
    data = TokenImageDataset(write(tmp_path / "a.txt", "hé"), 8)
    assert pieces(data) == [[104, 0xC3, 0xA9, 256]] and len(data) == 1 and len(data.tokens) == 260
    data = TokenImageDataset(tmp_path / "a.txt", 8, max_tokens=3)
    item, last = data[0], data[1]
    shapes = {"clean": (torch.float32, (3, 8, 8)), "mask": (torch.float32, (8, 8)), "index": (torch.int64, ())}
    assert {name: (value.dtype, tuple(value.shape)) for name, value in item.items()} == shapes
    cells = TokenCode(260).cells(torch.tensor([104, 0xC3, 0xA9, 256]))
    assert torch.equal(item["clean"][:, :4, 4:].flatten(), cells[1]) and not item["clean"][:, 4:, 4:].any()
    assert item["mask"].tolist() == [[1] * 8] * 4 + [[1] * 4 + [0] * 4] * 4
    assert torch.equal(last["clean"][:, :4, :4].flatten(), cells[3]) and last["mask"].sum() == 16
    batch = data.get_batch([1, 0])
    assert batch["index"].tolist() == [1, 0] and all(torch.equal(batch[name][1], item[name]) for name in item)
    with pytest.raises(IndexError):
        data[len(data)]


@pytest.mark.parametrize(("size", "cell_size", "channels", "cells"), [(64, 4, 3, 256), (12, 3, 1, 16), (16, 8, 2, 4)])
def test_the_image_holds_what_its_size_says(size, cell_size, channels, cells, tmp_path):
    data = TokenImageDataset(write(tmp_path / "a.txt", "x" * 999), size, cell_size=cell_size, channels=channels)
    assert data.max_tokens == cells and len(data) == -(-1000 // cells)
    assert data[0]["clean"].shape == (channels, size, size) and data[0]["mask"].all()
    assert str(pickle.loads(pickle.dumps(data))) == str(data)
    for count in (0, cells + 1):
        says = refused(TokenImageDataset, "zen", size, max_tokens=count, cell_size=cell_size, channels=channels)
        assert says == f"max_tokens {count}: an image of {size}×{size} has 1 to {cells} cells"


# ---- chats


@pytest.mark.parametrize("max_tokens", [5, 32, None])
@pytest.mark.parametrize("of", ["bytes", "merged"])
def test_prompt_and_answer_are_told_apart(of, max_tokens, merged, tmp_path):
    chats = [
        chat("who?", "the cat.", "and two?", "two  kings, é."),
        [{"role": "system", "content": "be kind"}, *chat("a", "b")],
        [*chat("q", "one"), {"role": "assistant", "content": "again"}],
        chat("", ""),
    ]
    file = json_lines(tmp_path / "chats.jsonl", *({"messages": messages} for messages in chats))
    tokenizer = merged if of == "merged" else None
    data = TokenImageDataset(file, 64, True, max_tokens, tokenizer)
    tokens, (mark, end) = data.tokens, ("<|{}|>", "<|end|>") if of == "bytes" else ("[{}]", "[SEP]")
    rows, learnt = [[] for _ in chats], [[] for _ in chats]
    for row, is_answer, messages in zip(rows, learnt, chats, strict=True):
        for message in messages:
            header = tokens.tokenizer(mark.format(message["role"]), add_special_tokens=False).input_ids
            content = tokens.tokenizer(message["content"] + end, add_special_tokens=False).input_ids
            row += header + content
            is_answer += [False] * len(header) + [message["role"] == "assistant"] * len(content)
    held = max_tokens or 256
    parts = [(k, start) for k, row in enumerate(rows) for start in range(0, len(row), held)]
    assert pieces(data) == [rows[k][start : start + held] for k, start in parts]
    batch = data.get_batch(list(range(len(data))))
    assert set(batch) == {"clean", "mask", "condition", "condition_mask", "index"}
    mask, prompt = batch["mask"], batch["condition_mask"]
    for row, (k, start) in enumerate(parts):
        of_answer = torch.tensor(learnt[k][start : start + held])
        cells = [data.code.mask_to_cells(of[[row]])[0] for of in (mask, prompt)]
        for found, expected in zip(cells, (of_answer, ~of_answer), strict=True):
            assert torch.equal(found[: len(of_answer)], expected) and not found[len(of_answer) :].any()
    assert not (mask * prompt).any() and {float(value) for value in mask.unique()} <= {0, 1}
    assert torch.equal(batch["condition"], batch["clean"] * prompt[:, None])  # the prompt's cells, and no others
    assert torch.equal(batch["clean"].abs(), (mask + prompt)[:, None].expand_as(batch["clean"]))
    if max_tokens is None:
        said = [data.text(row) for row in data.decode(batch["clean"], mask)]
        assert said == ["the cat.two  kings, é.", "b", "oneagain", ""]
    learnt_of = torch.tensor([sum(learnt[k][start : start + held]) for k, start in parts])
    assert torch.equal(data.lengths(), torch.bincount(learnt_of, minlength=data.max_tokens + 1))


@pytest.mark.parametrize("of", ["bytes", "merged", "glued"])
def test_what_is_asked_is_what_training_saw(of, merged):
    """A prompt's tokens are those that come before an answer in training, in later turns too."""
    tokens = TextTokens(None if of == "bytes" else merged)
    if of == "glued":  # a word that goes on in the next message is not one token
        tokens.tokenizer.chat_template = GLUED
    whole = chat("tell me", " of th", "e bird and", " sees.")
    (row,), (is_answer,) = tokens.encode_chats([whole])
    first, last = np.flatnonzero(is_answer)[0], np.flatnonzero(~is_answer)[-1] + 1
    assert tokens.prompt(whole[:1]) == row[:first].tolist()
    assert tokens.prompt(whole[:3]) == row[:last].tolist()
    if of == "glued":
        assert tokens.encode(["tell me of the bird and"])[0].tolist() != row[:last].tolist()
    assert tokens.decode(tokens.prompt(whole[:1])) == "tell me"


def test_a_chat_may_begin_with_an_answer_and_what_follows_the_last_is_left_out():
    tokens = TextTokens()
    (row,), (is_answer,) = tokens.encode_chats([[*chat("x", "hi")[1:], {"role": "user", "content": "unanswered"}]])
    assert row.tolist() == [259, *b"hi", 256] and is_answer.tolist() == [False, True, True, True]


def test_messages_are_texts_without_a_template(tmp_path):
    file = json_lines(tmp_path / "chats.jsonl", {"messages": chat("a\nb", "c")})
    data = TokenImageDataset(file, use_chat_template=False)
    assert [data.text(row) for row in pieces(data)] == ["a\nb\nc"]
    data = TokenImageDataset("questions")
    assert len(data) == 20_000 and set(data[0]) == {"clean", "mask", "index"}
    asked, answer = questions(1)[0]
    assert data.text(data.tokens_of(0)) == asked["content"] + "\n" + answer["content"]


@pytest.mark.parametrize(("template", "says"), [
    (None, "The tokenizer has no chat template (chat_template.jinja, or in tokenizer_config.json): leave"),
    (FORGETFUL, "The tokenizer's chat template writes earlier messages otherwise when others follow"),
    (STRICT, "The tokenizer's chat template refuses a chat of system, user (users begin): write the chats as it "),
    ("{{ messages[0]['name'].first }}", "The tokenizer's chat template refuses a chat of system, user ("),
])  # fmt: skip
def test_templates_that_do_not_do(template, says, tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    file = json_lines(tmp_path / "a.jsonl", {"messages": [{"role": "system", "content": "s"}, *chat("a", "b")]})
    assert refused(TokenImageDataset, file, use_chat_template=True, tokenizer=tokenizer).startswith(says)
    assert len(TokenImageDataset(file, tokenizer=tokenizer)) == 1  # texts need none


def test_bytes_are_what_the_built_in_tokenizer_says(tmp_path):
    tokenizer = byte_tokenizer()
    every = "".join(map(chr, [*range(0x800), *range(0xE000, 0xE100), *range(0x1F600, 0x1F640)])) + "".join(SPECIAL)
    fast, asked = TextTokens(), TextTokens(tokenizer)
    texts = [every, "", ODD, *SPECIAL]
    for ours, theirs in zip(fast.encode(texts, end=True), asked.encode(texts, end=True), strict=True):
        assert ours.dtype == theirs.dtype == np.int32 and ours.tolist() == theirs.tolist()
    assert [row.tolist() for row in fast.encode(texts)] == [list(text.encode()) for text in texts]
    assert [fast.decode(text.encode()) for text in texts] == texts
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL)) == [256, 257, 258, 259] and fast.end == 256
    assert fast.decode([*b"ab", 256, 258, *b"c", 260, 511]) == "abc"  # 260 and 511 are none of its numbers
    tokenizer.save_pretrained(tmp_path)
    messages, again = chat("what<|end|>", "é 🐈"), TextTokens(tmp_path)
    assert len(again) == 260 and again.prompt(messages) == fast.prompt(messages)
    assert again.encode([ODD], end=True)[0].tolist() == fast.encode([ODD], end=True)[0].tolist()


def test_a_tokenizer_of_words_without_an_end_and_without_a_template(tmp_path):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: number for number, word in enumerate(["[UNK]", " ", "the", "a", "cat", "sees", "king", "."])}
    of_words = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    of_words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w]"), "isolated")
    of_words.decoder = decoders.Fuse()
    endless = PreTrainedTokenizerFast(tokenizer_object=of_words, unk_token="[UNK]")
    write(tmp_path / "1.txt", "the cat sees.")
    write(tmp_path / "2.txt", "a king.")
    data = TokenImageDataset(tmp_path, tokenizer=endless)
    assert pieces(data) == [[2, 1, 4, 1, 5, 7], [3, 1, 6, 7]]
    assert data.code.num_tokens == 8 and data.text(data.tokens_of(1)) == "a king."
    says = refused(TokenImageDataset, json_lines(tmp_path / "c.jsonl", {"text": ""}), tokenizer=endless)
    assert says == f"{tmp_path / 'c.jsonl'} has no token in it: expected text"
    endless.get_vocab = lambda: {"the": 2, "far": 900}  # as where a model reserves numbers
    assert len(TextTokens(endless)) == 901


# ---- files


def test_folders_are_read_in_natural_order(tmp_path):
    write(tmp_path / "part10.txt", "ten")
    write(tmp_path / "part2.txt", "\ufefftwo\r\n")
    json_lines(tmp_path / "sub" / "a.JSONL", {"text": "json 1"}, {"text": "json 2", "messages": chat("x", "y")})
    write(tmp_path / "sub" / "b.jsonl", '\n{"text": "with \u2028 \\ud83d\\ude00", "more": 1}\r\n\n')
    write(tmp_path / "notes.md", "no")
    for hidden in (".cache/a.txt", "__MACOSX/._part2.txt", "._part2.txt"):
        write(tmp_path / hidden, b"\xff")
    wanted = ["two\r\n", "ten", "json 1", "json 2", "with \u2028 😀"]
    assert read_texts(tmp_path) == (wanted, []) == read_texts(str(tmp_path))
    assert read_texts(tmp_path / "sub" / "a.JSONL")[0] == ["json 1", "json 2"]
    assert pieces(TokenImageDataset(tmp_path))[0] == [*b"two\r\n", 256]


def test_datasets_on_the_disk(tmp_path):
    from datasets import Dataset, DatasetDict

    rows = Dataset.from_dict({"id": [1, 2], "text": ["one", "zwei ü"]})
    rows.save_to_disk(tmp_path / "one")
    assert read_texts(tmp_path / "one") == (["one", "zwei ü"], [])
    val = Dataset.from_dict({"text": ["val 1", "val 2", "val 3"]})
    DatasetDict({"test": rows, "validation": val, "train": rows}).save_to_disk(tmp_path / "subsets")
    for share in (0, 0.9):  # its own subset validates
        train, val = TokenImageDataset(tmp_path / "subsets").subsets(share)
        assert [train.text(row) for row in pieces(train)] == ["one", "zwei ü"]
        assert [val.text(row) for row in pieces(val)] == ["val 1", "val 2", "val 3"]
    chats = [chat("a", "b"), chat("c", "d", "e", "f")]
    Dataset.from_dict({"messages": chats}).save_to_disk(tmp_path / "chats")
    assert read_texts(tmp_path / "chats", chats=True)[0] == chats
    assert read_texts(tmp_path / "chats")[0] == ["a\nb", "c\nd\ne\nf"]

    Dataset.from_dict({"body": ["x"], "n": [1]}).save_to_disk(tmp_path / "columns")
    DatasetDict({"test": rows}).save_to_disk(tmp_path / "test")
    Dataset.from_dict({"text": ["x", None]}).save_to_disk(tmp_path / "null")
    assert refused(read_texts, tmp_path / "columns").endswith("no column text or messages; it has body, n: rename one")
    assert refused(read_texts, tmp_path / "test").startswith("No subset 'train' in")
    assert refused(read_texts, tmp_path / "null").startswith(f'{tmp_path / "null"}, train, row 1 has neither "text"')


JSON = '{"text": "fine"}\n'
HALF_PAIR = "character 2 of the text is half of a surrogate pair, '\\ud83d'"


@pytest.mark.parametrize(("name", "content", "chats", "says"), [
    ("a.txt", " \n", False, " is empty: expected text in it, or take it away"),
    ("a.txt", b"ab\n\xff", False, ", line 2, is no UTF-8"),
    ("a.jsonl", JSON + '{"text": "x"', False, ", line 2, is no JSON: Expecting ',' delimiter at column 13"),
    ("a.jsonl", JSON + "\nhello", False, ", line 3, is no JSON: Expecting value at column 1"),
    ("a.jsonl", JSON + '{"body": "x"}', False, ', line 2 has neither "text" nor "messages"'),
    ("a.jsonl", '{"text": 5}', False, ', line 1 has neither "text" nor "messages"'),
    ("a.jsonl", JSON + '{"text": "ab\\ud83d"}', False, f", line 2: {HALF_PAIR}"),
    ("a.jsonl", json.dumps({"messages": chat("a", "\ud83d")}), True, f", line 1: {HALF_PAIR}"),
    ("a.jsonl", JSON, True, ", line 1 has no messages, "),
    ("a.txt", "hello", True, " has no messages, "),
    *[("a.jsonl", json.dumps({"messages": messages}), chats, ", line 1: its messages are not ")
      for chats in (False, True)
      for messages in (5, ["hi"], [], chat("a"), [{"role": "assistant", "content": 1}])],
    ("a.csv", "x", False, ": expected a .txt or .jsonl file"),
])  # fmt: skip
def test_files_that_do_not_do(name, content, chats, says, tmp_path):
    file = write(tmp_path / name, content)
    assert refused(TokenImageDataset, file, use_chat_template=chats).startswith(f"{file}{says}")


def test_places_that_do_not_do(tmp_path):
    says = refused(read_texts, tmp_path / "nowhere")
    assert says.startswith(f"No {tmp_path / 'nowhere'}: ") and says.endswith("the built-in sentences, questions, zen")
    write(tmp_path / "a.csv", "x")
    assert refused(read_texts, tmp_path).startswith(f"{tmp_path} has no .txt or .jsonl file; it has ")
    assert refused(read_texts, "sentences", chats=True).startswith("the built-in sentences has no messages, a list of")


@pytest.mark.parametrize("files", [
    {},
    {"tokenizer.json": "{", "tokenizer_config.json": "{}"},
    {"tokenizer_config.json": "[]"},
    {"tokenizer_config.json": '{"tokenizer_class": "GPT2Tokenizer"}'},
    {"tokenizer_config.json": '{"auto_map": {"AutoTokenizer": ["own.Own", null]}}', "own.py": "raise OSError"},
])  # fmt: skip
def test_tokenizers_that_do_not_do(files, tmp_path):
    for name, content in files.items():
        write(tmp_path / name, content)
    says = refused(TokenImageDataset, "zen", tokenizer=str(tmp_path))
    beginnings = (f"{tmp_path} holds no tokenizer of transformers (", f"The tokenizer in {tmp_path} has")
    assert says.startswith(beginnings) and says.endswith("as save_pretrained writes them") and len(says) < 500
    assert refused(TextTokens, tmp_path / "nowhere").startswith(f"No folder {tmp_path / 'nowhere'} with a tokenizer")


def test_answers_are_as_long_as_they_are_after_their_prompts(tmp_path):
    chats = [chat("ab", "xyz"), chat("ab", "xyz"), chat("abcd", "x"), chat("a", "xy", "bcd", "xyzxyz")]
    path = json_lines(tmp_path / "chats.jsonl", *({"messages": each} for each in chats))
    data = TokenImageDataset(path, use_chat_template=True)
    # role, words, end, role; then the answer with its end; of several the first
    assert data.answer_lengths() == [[4, 3, 1], [5, 4, 2], [7, 2, 1]]
    cut = TokenImageDataset(path, use_chat_template=True, max_tokens=6)  # prompts alone, and answers that go on
    assert cut.answer_lengths()[:3] == [[0, 1, 1], [0, 2, 1], [0, 3, 2]]
    assert cut.answer_lengths()[3:] == [[1, 2, 1], [1, 5, 1], [4, 2, 1], [5, 1, 2]]


def test_the_fingerprint_tells_data_apart(merged, tmp_path):
    first, other = write(tmp_path / "a.txt", "some text"), write(tmp_path / "b.txt", "some texT")
    same = write(tmp_path / "c" / "d.txt", "some text")
    options = ({}, {"img_size": 32}, {"max_tokens": 4}, {"tokenizer": merged}, {"cell_size": 8}, {"channels": 1})
    found = [TokenImageDataset(first, **option) for option in options]
    found += [TokenImageDataset(other), found[2].part([0]), TokenImageDataset("questions").part(range(9))]
    assert len({data.fingerprint() for data in found}) == len(found)
    assert TokenImageDataset(same).fingerprint() == found[0].fingerprint()  # wherever it lies


# ---- subsets


def of_lengths(path: Path, *lengths: int) -> TokenImageDataset:
    """Texts of that many images, of 4 tokens each."""
    rows = ({"text": "x" * (4 * n - 1)} for n in lengths)
    return TokenImageDataset(json_lines(path / "texts.jsonl", *rows), 8)


def texts_of(data: TokenImageDataset | None) -> set[int]:
    return set() if data is None else set(data._text_of.tolist())


@pytest.mark.parametrize("seed", range(6))
def test_texts_stand_whole_on_one_side(seed, tmp_path):
    data = of_lengths(tmp_path, *[1, 2, 3, 4, 1, 1, 20, 1, 6, 1])
    train, val = data.subsets(0.2, seed)
    assert not texts_of(train) & texts_of(val) and texts_of(train) | texts_of(val) == set(range(10))
    assert len(train) + len(val) == len(data) == 40 and len(val) <= 8
    assert data.subsets(0.2, seed)[1].fingerprint() == val.fingerprint()


def test_sides_have_the_share_and_follow_from_the_seed(tmp_path):
    data = of_lengths(tmp_path, *[1] * 200)
    subsets = {seed: data.subsets(0.05, seed)[1] for seed in range(5)}
    assert {len(val) for val in subsets.values()} == {10}
    assert len({tuple(sorted(texts_of(val))) for val in subsets.values()}) == 5
    assert len(data.subsets(0.07)[1]) == 14 and len(data.subsets(0.001)[1]) == 1  # not 15, not 0
    train, val = data.subsets(0)
    assert val is None and train.fingerprint() == data.fingerprint()
    for share in (-0.1, 1):
        says = refused(TokenImageDataModule, data, val_share=share)
        assert says == f"val_share {share:g}: expected a share from 0 to below 1, such as 0.05"


def test_of_a_single_text_the_end_validates(tmp_path):
    data = of_lengths(tmp_path, 20)
    for share, count in ((0.05, 1), (0.3, 6), (0.99, 19)):
        train, val = data.subsets(share, seed=1)
        assert pieces(train) == pieces(data)[:-count] and pieces(val) == pieces(data)[-count:]
    train, val = of_lengths(tmp_path, 1).subsets(0.5)
    assert len(train) == 1 and val is None


@pytest.mark.parametrize("seed", range(4))
def test_of_long_texts_the_end_of_the_longest(seed, tmp_path):
    data = of_lengths(tmp_path, 30, 50, 20)
    train, val = data.subsets(0.1, seed)
    assert texts_of(val) == {1} and len(val) == 10 and texts_of(train) == {0, 1, 2}
    assert val._starts.tolist() == data._starts[70:80].tolist()
    one_small = of_lengths(tmp_path, 1000, 1, 1, 1)  # the short ones, and never all
    train, val = one_small.subsets(0.05, seed)
    assert texts_of(val) == {1, 2, 3} and len(train) == 1000


def test_a_learnt_tokenizer_has_words_and_any_text_stays_exact(tmp_path):
    data = TokenImageDataset("sentences", tokenizer="bpe")
    tokens = TextTokens(data.tokens.tokenizer)
    words = {word for text in sentences(500) for word in text.rstrip(".").split()}
    assert all(len(tokens.encode([f"the {word}"])[0]) == 2 for word in words)
    odd = "Zebra äöü\n\t<|end|> 你好 \x00 two  cats"
    assert tokens.decode(tokens.encode([odd])[0]) == odd
    item = data[1]
    assert data.text(data.decode(item["clean"], item["mask"])) == stories(2)[1]
    tokens.tokenizer.save_pretrained(tmp_path)
    assert TokenImageDataset("sentences", tokenizer=tmp_path).fingerprint() == data.fingerprint()
    assert len(TokenImageDataset("zen", tokenizer="bpe", vocab_size=300).tokens) == 300
    says = refused(TokenImageDataset, "zen", tokenizer="bpe", vocab_size=260)
    assert says.startswith("vocab_size 260: 260 are taken")


def test_a_image_that_drowns_is_read_as_far_as_it_goes():
    data = TokenImageDataset("zen")
    noised_examples = data.noised_examples(0, [1.0, 0.9, 0.01], seed=2)
    text, item = data.text(data.tokens_of(0)), data[0]
    assert list(noised_examples)[:2] == [f"t = 1: {text}", f"t = 0.9: {text}"] and text not in list(noised_examples)[2]
    clean, little, much = noised_examples.values()
    assert torch.equal(clean, item["clean"])
    noise = (little - 0.9 * item["clean"]) / 0.1
    torch.testing.assert_close(much, 0.01 * item["clean"] + 0.99 * noise, atol=1e-5, rtol=1e-4)
    assert noise.std().item() == pytest.approx(1, abs=0.03)
    assert all(c == "·" or (c.isascii() and c.isprintable()) for title in noised_examples for c in title)
