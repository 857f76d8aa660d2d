"""Which side a picture of a split stands on, and what has to stand together. Nothing is read or written here."""

import hashlib
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence

from vavae_tools.data.folders import counted, listed, natural_key
from vavae_tools.data.split_report import SIDES, Picture
from vavae_tools.errors import UserError

RecordingOf = Callable[[Picture], str | None]


def choose_sides(
    pictures: Sequence[Picture], val_ratio: float, seed: int, recording_of: RecordingOf = lambda picture: None
) -> dict[str, str]:
    """The side of each picture, by its key. Val's share of a person comes as near to `val_ratio` as whole units allow.

    A person with two units or more has at least one on each side; a single unit goes to train.
    """
    units = _units(pictures, recording_of)
    units_of = defaultdict(list)
    for unit in units:
        for person in {picture.person for picture in unit}:
            units_of[person].append(unit)
    lacking = {}  # how many pictures of a person val still lacks
    for person, n in Counter(picture.person for picture in pictures).items():
        lacking[person] = min(max(int(n * val_ratio + 0.5), 1), n - 1) if len(units_of[person]) > 1 else 0

    in_val = set()  # keys of the units' first pictures
    for unit in sorted(units, key=lambda unit: _rank(seed, unit[0].key)):
        share = Counter(picture.person for picture in unit) if len(unit) > 1 else {unit[0].person: 1}
        if sum(abs(lacking[person]) - abs(lacking[person] - n) for person, n in share.items()) > 0:
            in_val.add(unit[0].key)
            for person, n in share.items():
                lacking[person] -= n
    for person in sorted(units_of, key=natural_key):
        _mend(person, units_of, in_val)
    return {picture.key: SIDES[unit[0].key in in_val] for unit in units for picture in unit}


def _units(pictures: Sequence[Picture], recording_of: RecordingOf) -> list[list[Picture]]:
    """What must stay on one side: pictures of one recording of a person or with the same content, taken together."""
    parent = list(range(len(pictures)))

    def root(i: int) -> int:
        while parent[i] != i:
            parent[i] = i = parent[parent[i]]
        return i

    first = {}
    for i, picture in enumerate(pictures):
        recording = recording_of(picture)
        for tie in filter(None, (picture.sha256, recording and (picture.person, recording))):
            parent[root(i)] = root(first.setdefault(tie, i))
    units = defaultdict(list)
    for i, picture in enumerate(pictures):
        units[root(i)].append(picture)
    return list(units.values())


def _mend(person: str, units_of: dict[str, list[list[Picture]]], in_val: set[str]) -> None:
    """If all units of a person are on one side, move the smallest that no other person needs there."""

    def side(unit: list[Picture]) -> bool:
        return unit[0].key in in_val

    def may_move(unit: list[Picture]) -> bool:
        others = {picture.person for picture in unit} - {person}
        return all(sum(side(u) == side(unit) for u in units_of[other]) > 1 for other in others)

    units = units_of[person]
    movable = [unit for unit in units if may_move(unit)]
    if len(units) > 1 and len({side(unit) for unit in units}) == 1 and movable:
        in_val ^= {min(movable, key=len)[0].key}


def _rank(seed: int, key: str) -> bytes:
    return hashlib.blake2b(os.fsencode(f"{seed}/{key}"), digest_size=16).digest()


def recordings(group_pattern: str | None, pictures: Sequence[Picture], notes: list[str]) -> RecordingOf:
    """The function that tells a picture's recording from its name; None for a picture on its own."""
    if group_pattern is None:
        return lambda picture: None
    flag = f"--group_pattern {group_pattern!r}"
    try:
        pattern = re.compile(group_pattern)
    except re.error as error:
        raise UserError(f"{flag} is no regular expression: {error}.") from None
    if not pattern.groups:
        raise UserError(f"{flag} has no group. Put the part that names the recording in (…), as in '(rec[0-9]+)_'.")

    def recording_of(picture: Picture) -> str | None:
        match = pattern.search(picture.name)
        return (match[1] or None) if match else None

    alone = [picture.key for picture in pictures if recording_of(picture) is None]
    if len(alone) == len(pictures):
        raise UserError(f"{flag} fits none of the {len(alone):,} names, such as {alone[0]}.")
    if alone:
        notes.append(f"{counted(len(alone), 'name')} without a recording, each on its own: {listed(alone)}")
    return recording_of
