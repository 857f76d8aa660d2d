import json
import math

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from PIL import Image
from tiny import refuses
from torch import nn

from vavae_tools.data.demo.sentences import answers, is_grammatical, questions, sentences
from vavae_tools.data.tokens.code import TokenCode, byte_tokenizer
from vavae_tools.data.tokens.dataset import TokenImageDataset
from vavae_tools.diffusion.conditioning import ClassConditioner
from vavae_tools.evaluation.bits import bits_per_token, unigram_bits
from vavae_tools.evaluation.texts import NGRAMS, KnownTexts, evaluate_tokens, novelty, reconstruction_curve
from vavae_tools.pipelines.tokens import TokenImagePipeline
from vavae_tools.runtime.draws import Draws

SIZE = 8
"""Subset of the toy's images: 16 cells of 2×2 grey pixels."""


class Toy:
    """Rows of token numbers as a data set of images, of which the first cells may be a prompt."""

    data_path = "toy"
    img_size = SIZE

    def __init__(self, rows, num_tokens=8, prompt=0):
        self.rows, self.prompt = torch.as_tensor(rows), prompt
        self.code = TokenCode(num_tokens, cell_size=2, channels=1)

    def __len__(self):
        return len(self.rows)

    def get_batch(self, indices):
        rows = self.rows[indices]
        there = torch.ones(rows.shape, dtype=torch.bool)
        known = there & (torch.arange(rows.shape[1]) < self.prompt)
        clean = self.code.draw(rows, there, SIZE)
        batch = {"clean": clean, "index": torch.tensor(indices)}
        batch["mask"] = self.code.spread_to_pixels((there & ~known).float(), SIZE)
        if self.prompt:
            batch["condition_mask"] = self.code.spread_to_pixels(known.float(), SIZE)
        return batch


class Denoiser(ModelMixin, ConfigMixin):
    """Predicts by a function of (x, t), and remembers the times it was asked at."""

    config_name = "config.json"

    def __init__(self, code, img_size, predict):
        super().__init__()
        self.none, self.predict, self.times, self.seen = nn.Parameter(torch.zeros(())), predict, [], []
        self.latent_shape = (code.channels + 1, img_size, img_size)
        self.register_to_config(hidden_size=1)  # by which is estimated how many images have room at once
        self.rows = self.columns = img_size // code.cell_size

    def forward(self, x, t, conditioning, mask=None):
        self.times.append(t)
        self.seen.append(x)
        predicted = self.predict(x[:, :-1], t)
        return torch.cat([predicted, torch.full_like(x[:, -1:], 7.0)], dim=1)  # of the last channel nobody asks


def pipeline(data, predict, lengths=None, **settings):
    denoiser = Denoiser(data.code, data.img_size, predict)
    lengths = lengths or [0, 1]
    conditioner = ClassConditioner(1, 4, dropout=0.0)
    pipe = TokenImagePipeline(denoiser, conditioner, byte_tokenizer(), data.code.config, lengths, **settings)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def posterior_mean(code, img_size, shares):
    """What a perfect denoiser says of cells with independent tokens: Σ p(token | cell)·code."""
    log_shares = torch.as_tensor(shares, dtype=torch.float64).log()

    def predict(x, t):
        t = t.double()[:, None, None]
        cells = code.cells_of(x).double()
        table = code.table.double()
        weights = (log_shares + t / (1 - t) ** 2 * (cells @ table.T)).softmax(-1)
        return code.images((weights @ table).float(), img_size // code.cell_size)

    return predict


def drawn_rows(shares, count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(torch.tensor(shares), count * 16, replacement=True, generator=generator).view(count, 16)


# ---- what comes back


def test_what_comes_back_is_counted_by_cells_and_by_images():
    data = Toy(drawn_rows([1 / 8] * 8, 4))
    rows = data.rows.clone()
    rows[2, [5, 9]] = (rows[2, [5, 9]] + 1) % 8
    wrong = data.code.draw(rows, torch.ones_like(rows).bool(), SIZE)
    pipe = pipeline(data, lambda x, t: wrong)
    curve = reconstruction_curve(pipe, data, times=(0.0, 0.5), steps=4)
    assert [(one.t, one.cells, one.images) for one in curve] == [(0.0, 62 / 64, 3 / 4), (0.5, 62 / 64, 3 / 4)]
    times = torch.stack(pipe.denoiser.times)
    assert (times == times[:, :1]).all()  # the whole grid from noise, of the other what is left of it
    assert times[:, 0].tolist() == [0, 0.25, 0.5, 0.75, 0.5, 0.75]


def test_a_prompt_is_given_and_does_not_count():
    data = Toy(drawn_rows([1 / 8] * 8, 4), prompt=6)
    rows = data.rows.clone()
    rows[:, :6], rows[1, 6] = (rows[:, :6] + 1) % 8, (rows[1, 6] + 1) % 8
    wrong = data.code.draw(rows, torch.ones_like(rows).bool(), SIZE)
    pipe = pipeline(data, lambda x, t: wrong)
    (found,) = reconstruction_curve(pipe, data, times=(0.3,), steps=3)
    assert (found.cells, found.images) == (39 / 40, 3 / 4)
    bits = bits_per_token(pipe, data)
    batch = data.get_batch([0, 1, 2, 3])
    known = batch["condition_mask"]
    assert len(pipe.denoiser.seen) > 16  # of both
    for x in pipe.denoiser.seen:
        assert x[:, -1].equal(known) and (x[:, :-1] * known[:, None]).equal(batch["clean"] * known[:, None])
    assert bits.tokens == 40
    squared = 4 * int((data.code.table[data.rows[1, 6]] != data.code.table[rows[1, 6]]).sum())
    r = bits.last_time / (1 - bits.last_time)
    assert bits.diffusion == pytest.approx(squared * r**2 / 2 / math.log(2) / 40, rel=0.15)


# ---- copies


def brute_force(rows, known):
    """By a look at every span of every text."""
    spans = {tuple(text[i:j]) for text in known for i in range(len(text)) for j in range(i + 1, len(text) + 1)}
    ngrams, copied, longest = {}, 0, [0] * len(rows)
    for n in NGRAMS:
        grams = [tuple(row[i : i + n]) in spans for row in rows for i in range(len(row) - n + 1)]
        ngrams[n] = sum(grams) / len(grams) if grams else None
    for number, row in enumerate(rows):
        ends = [(i, j) for i in range(len(row)) for j in range(i + 1, len(row) + 1) if tuple(row[i:j]) in spans]
        longest[number] = max((j - i for i, j in ends), default=0)
        copied += len({place for i, j in ends if j - i >= 16 for place in range(i, j)})
    whole = sum(row in [list(text) for text in known] for row in rows) / len(rows)
    return ngrams, (sum(longest) / len(rows), max(longest), copied / sum(map(len, rows)), whole)


@pytest.mark.parametrize("kinds", [2, 40])
def test_copies_are_those_that_a_search_by_hand_finds(kinds):
    rng = np.random.default_rng(kinds)
    known = [rng.integers(0, kinds, rng.integers(1, 60)).astype(np.int32) for _ in range(25)]
    rows = [rng.integers(0, kinds + 1, rng.integers(1, 15)).tolist() for _ in range(12)]
    rows += [known[3].tolist(), [*known[5].tolist(), kinds], known[7][1:].tolist() or [0], [50_000]]
    rows.append([token for text in known[:6] for token in text[3:25].tolist()])
    found, (ngrams, others) = novelty(rows, KnownTexts(known)), brute_force(rows, known)
    assert found.ngrams == pytest.approx(ngrams)
    assert (found.longest_mean, found.longest, found.copied, found.whole) == pytest.approx(others)
    assert 0 < found.copied < 1 and 0 < found.whole < 1


def test_a_span_over_the_border_of_two_texts_is_none_of_theirs(monkeypatch):
    known = KnownTexts([[1, 2, 3], [4, 5, 6]])
    found = novelty([[2, 3, 4, 5]], known)
    assert found.ngrams == {1: 1.0, 2: 2 / 3, 4: 0.0, 8: None} and found.longest == 2 and found.copied == 0
    assert novelty([[9]], known, wholes=[[4, 5, 6]]).whole == 1
    assert [novelty([row], known).longest for row in ([9], [6, 5], [3, 1, 2, 3, 1])] == [0, 1, 3]
    refuses("No tokens", novelty, [[]], known)
    monkeypatch.setattr("vavae_tools.evaluation.texts.MAX_SEARCHED_TOKENS", 5)  # the first are looked up in
    known = KnownTexts([[1, 2, 3], [4, 5], [6, 7]])
    assert known.texts == 2 and novelty([[4, 5], [6, 7]], known).ngrams[1] == 0.5


# ---- bits


def entropy(shares):
    return -sum(p * math.log2(p) for p in shares if p)


SKEWED = [0.8, 0.1, 0.05, 0.02, 0.01, 0.01, 0.005, 0.005]


@pytest.mark.parametrize("num_tokens", [8, 5])
def test_the_bound_of_a_perfect_denoiser_is_the_entropy(num_tokens):
    shares = [1 / num_tokens] * num_tokens
    data = Toy(drawn_rows(shares), num_tokens)
    found = bits_per_token(pipeline(data, posterior_mean(data.code, SIZE, shares)), data)
    assert found.error < 0.06 and found.tokens == 64 * 16
    assert abs(found.bits - math.log2(num_tokens)) < 4 * found.error
    assert found.reconstruction < 0.03 and found.bits == pytest.approx(found.diffusion + found.reconstruction)


def test_the_bound_of_skewed_tokens_is_near_their_entropy_and_a_wrong_denoiser_is_far_above():
    data = Toy(drawn_rows(SKEWED, 128))
    counted = unigram_bits(data.rows.tolist())
    assert abs(counted - entropy(SKEWED)) < 0.1 and unigram_bits([[0, 0, 5], [9]]) == pytest.approx(1.5)
    found = bits_per_token(pipeline(data, posterior_mean(data.code, SIZE, SKEWED)), data, count=128)
    assert -4 * found.error < found.bits - counted < 4 * found.error + 0.05
    nothing = bits_per_token(pipeline(data, lambda x, t: torch.zeros_like(x)), data, count=128)
    r = nothing.last_time / (1 - nothing.last_time)
    assert nothing.diffusion == pytest.approx(4 * r**2 / 2 / math.log(2), rel=0.02)
    assert nothing.bits > 4 * found.bits


def test_who_knows_the_tokens_pays_for_none_and_values_beyond_the_range_cost_nothing():
    data = Toy(drawn_rows([1 / 8] * 8, 8))
    clean = data.get_batch(list(range(8)))["clean"]
    found = bits_per_token(pipeline(data, lambda x, t: 1.5 * clean), data)
    assert found.diffusion == 0 and found.bits == found.reconstruction < 0.05
    assert bits_per_token(pipeline(Toy(data.rows[:1]), lambda x, t: clean[:1]), Toy(data.rows[:1])).error is None


# ---- all of it


def dataset(folder, rows, chats=False):
    lines = [{"messages": row} if chats else {"text": row} for row in rows]
    path = folder / "texts.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return TokenImageDataset(path, img_size=40 if chats else 32, use_chat_template=chats)


def written_by_heart(data, rows):
    """A denoiser that writes the same tokens into every image."""
    tokens = torch.tensor(rows)[None]
    image = data.code.draw(tokens, torch.ones_like(tokens).bool(), data.img_size)
    return lambda x, t: image.expand(len(x), -1, -1, -1)


def test_an_evaluation_of_texts_is_a_table_and_files(tmp_path):
    train, val = dataset(tmp_path, sentences(40)).subsets(0.2)
    by_heart = train.tokens_of(0)
    lengths = [0] * train.max_tokens + [0]
    lengths[len(by_heart)] = 1
    pipe = pipeline(train, written_by_heart(train, by_heart.tolist()), lengths)
    said = []
    out = tmp_path / "evaluation"
    report = evaluate_tokens(pipe, train, val, out, 5, 2, is_right=is_grammatical, log=said.append)
    samples, completed, real = (report.scores[name] for name in ("samples", "completions", "real"))
    assert samples.right == samples.valid == samples.novelty.whole == 1
    assert samples.novelty.longest == samples.novelty.longest_mean == len(by_heart)
    assert set(samples.novelty.ngrams.values()) == {1.0} and samples.novelty.copied == 1
    assert completed.texts == 5 and completed.novelty.whole < 1
    assert real.right == 1 and real.valid is None and real.novelty.whole == 0
    assert list(report.bits) == ["validation", "training"] and report.bits["training"].bits > report.unigram_bits
    assert report.unigram_bits == unigram_bits([train.tokens_of(i) for i in range(len(train))])
    assert len(report.curve) == 19 and report.curve_of == "validation" and not report.notes

    table = str(report)
    assert "samples" in table and "8-grams in training" in table
    assert "written: evaluation.json, samples.jsonl, figures/reconstruction.png" in table
    assert said and all("\n" not in line for line in said)
    found = json.loads((out / "evaluation.json").read_text())
    assert found == json.loads(json.dumps(report.as_dict())) and found["scores"]["real"]["right"] == 1
    lines = [json.loads(line) for line in (out / "samples.jsonl").read_text().splitlines()]
    assert lines[0] == {"text": train.text(by_heart), "prompt": None} and len(lines) == 10
    assert all(line["prompt"] and line["text"].startswith(line["prompt"]) for line in lines[5:])
    assert Image.open(out / "figures" / "reconstruction.png").size[0] > 300
    assert not list(tmp_path.rglob("*.partial"))


def test_without_texts_that_validate_their_rows_are_left_out_and_it_is_said(tmp_path):
    train = dataset(tmp_path, sentences(6))
    pipe = pipeline(train, written_by_heart(train, [1]), [0, 1])
    report = evaluate_tokens(pipe, train, None, None, 3, 1, log=lambda line: None)
    assert list(report.scores) == ["samples"] and list(report.bits) == ["training"] and report.curve_of == "training"
    assert len(report.notes) == 1 and "no texts that validate" in str(report) and "written" not in str(report)
    assert "right" not in str(report).split("copied whole")[0]
    assert not list(tmp_path.rglob("evaluation.json"))


def test_answers_are_judged_with_their_questions(tmp_path):
    train, val = dataset(tmp_path, questions(30), chats=True).subsets(0.2)
    chosen = Draws(0, 0, torch.arange(len(val))).uniform("text").argsort()[:4].tolist()
    clean = val.get_batch(chosen)["clean"]

    def remembered(x, t):
        return clean if len(x) == len(clean) else torch.zeros_like(x)  # other images are those that are measured

    pipe = pipeline(train, remembered, train.lengths().tolist(), use_chat_template=True)
    pairs = []

    def is_right(question, answer):
        pairs.append((question, answer))
        return answers(question, answer)

    report = evaluate_tokens(pipe, train, val, None, 4, 2, is_right=is_right, log=lambda line: None)
    assert list(report.scores) == ["answers", "real"]
    assert report.scores["real"].right == 1
    assert all(question.startswith("tell me about") for question, _ in pairs) and len(pairs) == 8
    real = [answer for _, answer in pairs[4:]]
    for (_, made), known in zip(pairs[:4], real, strict=True):  # cut or filled up where another length was drawn
        assert made.startswith(known[: len(made)]) or known.startswith(made[: len(known)])

    refuses("the same tokenizer", evaluate_tokens, pipeline(Toy([[0] * 16]), None), train)
