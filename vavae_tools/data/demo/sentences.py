"""The built-in texts: sentences of a small grammar, which can be told right from wrong, and the Zen of Python."""

import codecs
import contextlib
import io
import re
from collections.abc import Collection, Iterable
from functools import cache

import torch

from vavae_tools.runtime.draws import Draws

# one: many
NOUNS = {"cat": "cats", "dog": "dogs", "bird": "birds", "child": "children", "king": "kings", "robot": "robots"}
VERBS = {"sees": "see", "likes": "like", "finds": "find", "hears": "hear", "helps": "help"}
ADJECTIVES = ("", "small", "old", "happy", "red")
ONE, MANY = ("the", "a", "one", "this"), ("the", "two", "some", "these")
QUESTION_PREFIX = "tell me about"
MAX_SENTENCES = 6  # in a story


def sentences(count: int, seed: int = 0) -> list[str]:
    """Return sentences such as "two old cats see the bird.", each by seed and number; there are 288,000.

    Articles, nouns and verbs agree: one "a small king helps", many "two kings help", and "an" stands before a vowel.
    """
    return [f"{subject} {verb} {seen}." for subject, verb, seen in _parts(count, seed)]


def stories(count: int, seed: int = 0) -> list[str]:
    lengths = (Draws(seed, 1, torch.arange(count)).uniform("sentences") * MAX_SENTENCES).long() + 1
    rows = iter(sentences(int(lengths.sum()), seed))
    return [" ".join(next(rows) for _ in range(length)) for length in lengths.tolist()]


def questions(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Return chats of a question such as "tell me about two old cats." and a sentence that begins with these words."""
    chats = []
    for subject, verb, seen in _parts(count, seed):
        texts = {"user": f"{QUESTION_PREFIX} {subject}.", "assistant": f"{subject} {verb} {seen}."}
        chats.append([{"role": role, "content": text} for role, text in texts.items()])
    return chats


def _parts(count: int, seed: int) -> list[tuple[str, str, str]]:
    parts = []
    for row in Draws(seed, 0, torch.arange(count)).uniform("sentence", 9).tolist():  # nine choices for each
        verb = _pick(VERBS.values() if row[0] < 0.5 else VERBS, row[8])
        parts.append((_phrase(row[:4]), verb, _phrase(row[4:8])))
    return parts


def _phrase(draws: list[float]) -> str:
    many = draws[0] < 0.5
    article, adjective = _pick(MANY if many else ONE, draws[1]), _pick(ADJECTIVES, draws[2])
    words = [word for word in (adjective, _pick(NOUNS.values() if many else NOUNS, draws[3])) if word]
    return " ".join(["an" if article == "a" and words[0][0] in "aeiou" else article, *words])


def _pick(words: Collection[str], draw: float) -> str:
    return list(words)[int(draw * len(words))]


def is_grammatical(text: str) -> bool:
    """Return whether a text is a sentence of the grammar.

    >>> is_grammatical("an old cat sees two birds."), is_grammatical("a old cat sees two birds.")
    (True, False)
    >>> is_grammatical("two cats sees a bird."), is_grammatical("the cats see the bird")
    (False, False)
    """
    return _grammar().fullmatch(text) is not None


def grammatical_share(text: str) -> float:
    """Return the share of a text's sentences that are the grammar's.

    >>> grammatical_share("two cats see a bird. two cats sees a bird."), grammatical_share("two cats")
    (0.5, 0.0)
    """
    found = [part.strip() for part in re.findall(r"[^.]*\.|[^.]+$", text.rstrip())] or [""]
    return sum(map(is_grammatical, found)) / len(found)


def answers(question: str, text: str) -> bool:
    """Return whether a text is a sentence about what a question of `questions` names.

    >>> answers("tell me about two cats.", "two cats see a bird.")
    True
    """
    return is_grammatical(text) and text.startswith(question.removeprefix(QUESTION_PREFIX).strip(" .") + " ")


@cache
def _grammar() -> re.Pattern[str]:
    def any_of(words: Iterable[str]) -> str:
        return "(?:" + "|".join(words) + ")"

    adjectives = [word for word in ADJECTIVES if word]
    vowel = [word for word in adjectives if word[0] in "aeiou"]
    consonant = [word for word in adjectives if word not in vowel]
    nouns, plurals, any_adjective = any_of(NOUNS), any_of(NOUNS.values()), f"(?:{any_of(adjectives)} )?"
    with_a = f"a (?:{any_of(consonant)} )?{nouns}|an {any_of(vowel)} {nouns}"
    one = f"(?:{any_of(word for word in ONE if word != 'a')} {any_adjective}{nouns}|{with_a})"
    many = f"{any_of(MANY)} {any_adjective}{plurals}"
    return re.compile(rf"(?:{one} {any_of(VERBS)}|{many} {any_of(VERBS.values())}) (?:{one}|{many})\.")


def zen() -> list[str]:
    """Return the aphorisms of the Zen of Python (Tim Peters, PEP 20, public domain)."""
    with contextlib.redirect_stdout(io.StringIO()):  # importing it prints it
        import this
    return [line for line in codecs.decode(this.s, "rot13").splitlines()[2:] if line]
