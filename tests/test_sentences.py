"""The built-in texts: a small grammar that tells right from wrong, and the Zen of Python."""

from itertools import product

import pytest

from vavae_tools.data.demo import sentences as grammar
from vavae_tools.data.demo.sentences import (
    answers,
    grammatical_share,
    is_grammatical,
    questions,
    sentences,
    stories,
    zen,
)
from vavae_tools.data.tokens import text_files
from vavae_tools.data.tokens.dataset import TokenImageDataset
from vavae_tools.data.tokens.text_files import read_texts


def test_there_are_288_000_sentences():
    adjectives, nouns, verbs = len(set(grammar.ADJECTIVES)), len(grammar.NOUNS), len(grammar.VERBS)
    one, many = (len(set(articles)) * adjectives * nouns for articles in (grammar.ONE, grammar.MANY))
    assert (one + many) * verbs * (one + many) == 288_000
    assert "288,000" in sentences.__doc__
    phrases = {
        grammar._phrase([(k + 0.5) / n for k, n in zip(choice, (2, 4, 5, 6), strict=True)])
        for choice in product(range(2), range(4), range(5), range(6))
    }
    assert len(phrases) == one + many  # all different
    assert all(is_grammatical(f"the cat sees {phrase}.") for phrase in phrases)


def test_sentences_are_grammatical_and_follow_from_seed_and_number():
    made = sentences(3000)
    first = (
        "one happy bird hears these happy kings.",
        "a red cat likes these happy dogs.",
        "two happy cats see the old dogs.",
    )
    assert tuple(made[:3]) == first  # they stay what they were
    assert all(map(is_grammatical, made))
    assert sentences(10) == made[:10] and sentences(10, seed=1) != made[:10]
    assert len(set(made)) > 2900
    words = set(" ".join(made).replace(".", "").split())
    assert words == {*grammar.NOUNS, *grammar.NOUNS.values(), *grammar.VERBS, *grammar.VERBS.values(), "an",
                     *grammar.ADJECTIVES[1:], *grammar.ONE, *grammar.MANY}  # fmt: skip


@pytest.mark.parametrize("text", [
    "the cat see a bird.", "the cats sees a bird.", "two cat see a bird.", "a cats see a bird.", "one birds see a cat.",
    "these king helps a cat.", "this kings help a cat.", "some robot finds the dog.",  # agreement
    "a old cat sees a bird.", "an small cat sees a bird.", "an cat sees a bird.", "the cat sees a old bird.",  # an
    "the cat sees a bird", "the cat sees a bird..", "the cat sees a bird. ", " the cat sees a bird.", "",  # the stop
    "the cow sees a bird.", "the cat eats a bird.", "the green cat sees a bird.", "The cat sees a bird.",  # the words
    "the cat sees.", "cat sees a bird.", "the cat a bird sees.", "the  cat sees a bird.",
    "the red old cat likes a bird.", "a cat sees", "the cat sees the cat sees a bird.",
    "the cat sees a bird.\n", "the cat sees a bird. the cat sees a bird.",
])  # fmt: skip
def test_wrong_sentences_are_told(text):
    assert not is_grammatical(text)


def test_questions_are_answered(monkeypatch):
    made = questions(500)
    assert [answer["content"] for _, answer in made] == sentences(500)
    assert all(answers(asked["content"], answer["content"]) for asked, answer in made)
    assert {tuple(message["role"] for message in chat) for chat in made} == {("user", "assistant")}
    assert not answers("tell me about two cats.", "two dogs see a bird.")
    assert not answers("tell me about two cats.", "two cats sees a bird.")
    assert not answers("tell me about the cat.", "the cats see a bird.")
    assert read_texts("questions", chats=True)[0][:500] == made
    monkeypatch.setitem(text_files.BUILT_IN, "questions", lambda: questions(40))  # chats take 0.1 ms each
    data = TokenImageDataset("questions", 64, True)
    item = data[0]
    assert data.text(data.decode(item["clean"], item["mask"])) == made[0][1]["content"]
    assert data.text(data.decode(item["condition"], item["condition_mask"])) == made[0][0]["content"]
    assert len(data) == 40 and data.lengths()[0] == 0


def test_the_zen_is_said_by_nobody(capfd):
    lines = zen()
    assert len(lines) == 19 and lines[0] == "Beautiful is better than ugly." and lines[-1].endswith("more of those!")
    assert capfd.readouterr() == ("", "")


def test_stories_are_one_to_six_sentences_each():
    made = stories(600)
    lengths = [text.count(".") for text in made]
    assert set(lengths) == set(range(1, 7)) and stories(5) == made[:5] and stories(5, seed=1) != made[:5]
    assert " ".join(made[:100]) == " ".join(sentences(sum(lengths[:100])))
    assert all(grammatical_share(text) == 1 for text in made)
