"""What of some texts stands in others: shares of n-grams, copied spans, whole copies."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

from vavae_tools.runtime.errors import UserError

NGRAMS = (1, 2, 4, 8)  # lengths of the n-grams that are looked up in the data, in tokens
COPIED_SPAN = 16  # tokens from which on a span that also stands in the data counts as copied
MAX_SEARCHED_TOKENS = 2_000_000  # of the data in which spans are looked up: their n-grams take about a gigabyte


@dataclass(frozen=True)
class Novelty:
    """How much of some texts stands in the data, too."""

    texts: int
    ngrams: dict[int, float | None]  # by n: share of the n-grams that occur in the data; None where no text is so long
    longest_mean: float  # tokens in a text's longest span that stands in the data, mean over texts
    longest: int  # of all texts
    copied: float  # share of the tokens that are in copied spans of `COPIED_SPAN` tokens or more
    whole: float  # share of the texts that are in the data from the first token to the last


class KnownTexts:
    """Texts in which spans of others are looked up; no span crosses the border of two.

    Args:
        rows: token numbers of each text; only the first `MAX_SEARCHED_TOKENS` or so are looked up in, `texts` of them.
        wholes: what whole texts are compared with; None: the rows.
    """

    def __init__(self, rows: Sequence[Sequence[int]], wholes: Sequence[Sequence[int]] | None = None) -> None:
        kept, tokens = [], 0
        for row in rows:
            tokens += len(row)
            if tokens > MAX_SEARCHED_TOKENS and kept:
                break
            kept.append(_as_text(row))
        self.texts, self._all = len(kept), "\0".join(kept)
        self._wholes = rows if wholes is None else wholes
        self.ngrams = cache(lambda n: {gram for row in kept for gram in _ngrams(row, n)})

    def has(self, span: str) -> bool:
        """Return whether a span, a letter for each token, stands in one of the texts."""
        known = self.ngrams(NGRAMS[-1])
        return (len(span) < NGRAMS[-1] or span[-NGRAMS[-1] :] in known) and span in self._all

    def share(self, grams: Sequence[str], n: int) -> float | None:
        """Return the share of n-grams that stand in the texts; None of none."""
        return sum(gram in self.ngrams(n) for gram in grams) / len(grams) if grams else None

    def longest_span(self, row: str) -> int:
        """Return the length of a row's longest span that stands in the texts."""
        longest = 0
        for start in range(len(row)):
            while start + longest < len(row) and self.has(row[start : start + longest + 1]):
                longest += 1
        return longest

    def copied_tokens(self, row: str, span: int) -> int:
        """Return how many of a row's tokens are in copied spans of so many tokens."""
        starts = [start for start, gram in enumerate(_ngrams(row, span)) if self.has(gram)]
        return len({start + i for start in starts for i in range(span)})

    def whole_share(self, rows: Sequence[Sequence[int]]) -> float:
        """Return the share of rows that are equal to one of the texts."""
        asked = list(map(_as_text, rows))
        seen = set(asked).intersection(map(_as_text, self._wholes))
        return sum(row in seen for row in asked) / len(asked)


def _as_text(row: Sequence[int]) -> str:
    """Return a letter for each token, none of them the border's: Python looks spans of letters up fast."""
    return "".join(chr(int(token) + 1) for token in row)


def _ngrams(row: str, n: int) -> list[str]:
    return [row[start : start + n] for start in range(len(row) - n + 1)]


def novelty(
    rows: Sequence[Sequence[int]],
    known: KnownTexts,
    wholes: Sequence[Sequence[int]] | None = None,
    sizes: Sequence[int] = NGRAMS,
    copied_span: int = COPIED_SPAN,
) -> Novelty:
    """Look token numbers of texts up in those of the data.

    Args:
        wholes: the same texts as they are compared as wholes, such as with their prompts; None: the rows.
        sizes: n of the n-grams.
    """
    texts = list(map(_as_text, rows))
    tokens = sum(map(len, texts))
    if not tokens:
        raise UserError("No tokens to look up: expected at least one text that is not empty")
    longest = list(map(known.longest_span, texts))
    return Novelty(
        len(rows),
        {n: known.share([gram for text in texts for gram in _ngrams(text, n)], n) for n in sizes},
        sum(longest) / len(longest),
        max(longest),
        sum(known.copied_tokens(text, copied_span) for text in texts) / tokens,
        known.whole_share(rows if wholes is None else wholes),
    )
