"""What of some texts stands in others: shares of n-grams, copied spans, whole copies; looked up by hashes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from vavae_tools.runtime.errors import UserError

NGRAMS = (1, 2, 4, 8)
"""Lengths of the n-grams that are looked up in the data, in tokens."""
COPIED_SPAN = 16
"""Tokens from which on a span that also stands in the data counts as copied."""

_BLOCK = 2**18  # tokens whose hashes are made at once: they fit into a processor's cache
_BASE = 0xD1342543DE82EF95  # odd, so that it has an inverse mod 2⁶⁴
_INVERSE = pow(_BASE, -1, 2**64)
_FILTER = 20  # bits of a hash by which most windows are told apart


class _Part:
    """Hashes of the windows that begin in one part of a row of tokens: Σ v(token i + j)·Bʲ mod 2⁶⁴.

    A window is a difference of two running sums, whatever its length (Karp & Rabin 1987).
    """

    def __init__(self, tokens: np.ndarray, room: np.ndarray, start: int) -> None:
        self._room, self._start = room, start
        values = (tokens.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
        self._sums = np.zeros(len(tokens) + 1, np.uint64)
        np.cumsum(values * _powers(_BASE, len(tokens)), out=self._sums[1:])
        self._inverses = _powers(_INVERSE, len(room))

    def windows(self, size: int, likely: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Where windows of so many tokens begin that do not cross a border, and their hashes, uint64.

        Args:
            likely: by a hash's first bits, bool (2^_FILTER,): leave out those that are not.
        """
        count = max(0, min(len(self._room), len(self._sums) - size))
        hashes = self._sums[size : size + count] - self._sums[:count]
        hashes *= self._inverses[:count]
        where = np.arange(count) if likely is None else np.flatnonzero(likely[_first_bits(hashes)])
        where = where[self._room[where] >= size]
        return where + self._start, hashes[where]


def _powers(base: int, count: int) -> np.ndarray:
    """1, base, base², … mod 2⁶⁴."""
    powers = np.full(count, base, np.uint64)
    powers[:1] = 1
    return powers.cumprod()


class _Tokens:
    """Rows of tokens one behind the other, and where each ends."""

    def __init__(self, rows: Sequence[Sequence[int]]) -> None:
        self.lengths = np.array([len(row) for row in rows], np.int64)
        self._flat = np.concatenate([np.zeros(0, np.int32), *(np.asarray(row, np.int32) for row in rows)])
        self._room = (np.repeat(self.lengths.cumsum(), self.lengths) - np.arange(len(self._flat))).astype(np.int32)

    @cached_property
    def row_of(self) -> np.ndarray:
        """The row of each token."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def parts(self, longest: int) -> Iterator[_Part]:
        """Parts that hold windows of up to so many tokens whole."""
        for start in range(0, len(self._flat), _BLOCK):
            yield _Part(self._flat[start : start + _BLOCK + longest - 1], self._room[start : start + _BLOCK], start)

    def windows(self, sizes: Sequence[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
        """Of each size where its windows begin, and their hashes: as much memory as there are windows."""
        parts = list(self.parts(max(sizes, default=1)))
        each = {size: zip(*(part.windows(size) for part in parts), strict=True) for size in sizes}
        return {size: tuple(map(np.concatenate, arrays)) for size, arrays in each.items()}


class KnownTexts:
    """Texts in which spans of others are looked up, by hashes of 64 bits; no span crosses the border of two.

    Thirty million tokens take 240 MB, and all numbers of a `novelty` of 200 texts 5 to 40 s on one core.

    Args:
        rows: token numbers of each text, or of each picture where texts are longer than these.
        wholes: what `whole_share` compares with; None: the rows.
    """

    def __init__(self, rows: Sequence[Sequence[int]], wholes: Sequence[Sequence[int]] | None = None) -> None:
        self._tokens = _Tokens(rows)
        self._wholes = rows if wholes is None else wholes

    def has(self, asked: dict[int, np.ndarray]) -> dict[int, np.ndarray]:
        """Which hashes of windows, by their size, are those of windows here: bool of the same shape."""
        wanted = {size: np.unique(hashes, return_inverse=True) for size, hashes in asked.items() if len(hashes)}
        seen = {size: np.zeros(len(hashes), bool) for size, (hashes, _) in wanted.items()}
        likely = {size: _likely(hashes) for size, (hashes, _) in wanted.items()}
        for part in self._tokens.parts(max(wanted, default=1)):
            for size in list(likely):
                hashes, found = wanted[size][0], seen[size]
                windows = part.windows(size, likely[size])[1]
                places = np.minimum(np.searchsorted(hashes, windows), len(hashes) - 1)
                places = places[hashes[places] == windows]
                if len(places):
                    found[places] = True
                    likely[size] = _likely(hashes[~found])  # what was found once costs no time again
                    if found.all():
                        del likely[size]
        return {size: seen[size][wanted[size][1]] if size in wanted else np.zeros(0, bool) for size in asked}

    def longest_spans(self, rows: Sequence[Sequence[int]]) -> np.ndarray:
        """Of each row the length of its longest span that stands in one of these texts: int64, 0 for none."""
        tokens = _Tokens(rows)
        longest = np.zeros(len(rows), np.int64)
        step = (1 << int(tokens.lengths.max(initial=0)).bit_length()) // 2
        while step:  # a row with a copied span has all shorter ones, so that halving finds the longest
            tried = np.where(longest + step <= tokens.lengths, longest + step, 0)
            rows_of, asked = {}, {}
            for size, (where, hashes) in tokens.windows(np.unique(tried[tried > 0]).tolist()).items():
                concerned = tried[tokens.row_of[where]] == size
                rows_of[size], asked[size] = tokens.row_of[where[concerned]], hashes[concerned]
            for size, found in self.has(asked).items():
                longest[rows_of[size][found]] = size
            step //= 2
        return longest

    def whole_share(self, rows: Sequence[Sequence[int]]) -> float:
        """Share of rows that are equal to one of these, from the first token to the last."""
        asked = list(map(_content, rows))
        seen = set(asked).intersection(map(_content, self._wholes))  # no set of all of these: there may be millions
        return sum(content in seen for content in asked) / len(asked)


def _content(row: Sequence[int]) -> bytes:
    return np.asarray(row, np.int32).tobytes()


def _likely(hashes: np.ndarray) -> np.ndarray:
    table = np.zeros(2**_FILTER, bool)
    table[_first_bits(hashes)] = True
    return table


def _first_bits(hashes: np.ndarray) -> np.ndarray:
    return (hashes >> np.uint64(64 - _FILTER)).view(np.int64)  # as an index of another type it would be copied


@dataclass(frozen=True)
class Novelty:
    """How much of some texts stands in the data, too."""

    texts: int
    ngrams: dict[int, float | None]
    """By n, in tokens: share of the texts' n-grams, each as often as it occurs, that occur in the data; None where no
    text is so long."""
    longest_mean: float
    """Tokens in a text's longest span that stands in the data, mean over texts."""
    longest: int
    """The longest of all texts."""
    copied: float
    """Share of the tokens that are in copied spans of `COPIED_SPAN` tokens or more."""
    whole: float
    """Share of the texts that stand in the data as they are, from the first token to the last."""


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
        copied_span: tokens.

    Raises:
        UserError: there is no token in them.
    """
    tokens = _Tokens(rows)
    if not len(tokens.row_of):
        raise UserError("No tokens to look up: expected at least one text that is not empty")
    windows = tokens.windows([*sizes, copied_span])
    found = known.has({size: hashes for size, (_, hashes) in windows.items()})
    spans = windows[copied_span][0][found[copied_span]]
    depth = np.zeros(len(tokens.row_of) + 1, np.int64)  # how many copied spans are over a token
    np.add.at(depth, spans, 1)
    np.add.at(depth, spans + copied_span, -1)
    longest = known.longest_spans(rows)
    return Novelty(
        len(rows),
        {size: float(found[size].mean()) if len(found[size]) else None for size in sizes},
        float(longest.mean()),
        int(longest.max()),
        float((depth.cumsum()[:-1] > 0).mean()),
        known.whole_share(rows if wholes is None else wholes),
    )
