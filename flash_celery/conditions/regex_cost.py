"""An upper bound of the time that a regular expression may take.

Python's `re` tries every way in which a pattern can match, and has no time limit. The number of
ways is bounded by a polynomial in the length of the value; each repetition adds a degree.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import lru_cache
from math import comb, prod
from typing import NamedTuple

#: Characters of a value that are searched.
MAX_LENGTH = 10_000
#: Ways that may be tried for one value. They take a tenth of a second at worst: PostgreSQL waits
#: for an answer while a run of up to a hundred rows (`transactions.runs`) is evaluated.
_MAX_WAYS = 10**7
#: As many repetitions as this count as unlimited.
_MANY = 1000

#: The parts of a pattern; one without a group name has one way to match.
_TOKEN = re.compile(
    r"""(?P<back>\\[1-9]|\(\?P=\w+\)) | \\. | \[\^?\]?(?:\\.|[^\]\\])*\]
    | (?P<verbose>\(\?(?:[aiLmsu]*x|\#)) | (?P<open>\(\??) | (?P<close>\)) | (?P<either>\|)
    | (?P<often>(?:[*+?]|\{(?!\})(?P<low>\d*)(?P<comma>,?)(?P<high>\d*)\})[?+]?) | .""",
    re.DOTALL | re.VERBOSE,
)


class _Ways(NamedTuple):
    """At most `factor` times the length to the power of `degree`."""

    degree: int = 0
    factor: int = 1


_ONE = _Ways()
_ENDLESS = _Ways(0, _MAX_WAYS + 1)


@lru_cache(maxsize=256)
def max_length(pattern: str) -> int:
    """Return the length up to which a value can be searched in time; 0 if there is none."""
    ways = _ways(pattern)
    # It is tried at each position of the value, unless it can only match at its beginning.
    degree = ways.degree + (not pattern.startswith("^") or "|" in pattern)

    def count(length: int) -> int:
        return ways.factor * comb(length + degree - 1, degree)

    return bisect_right(range(1, MAX_LENGTH + 1), _MAX_WAYS, key=count)


def matches(value: str, pattern: str) -> bool:
    """Return whether a pattern is found in a value.

    Raises:
        ValueError: The search may take long.
    """
    longest = max_length(pattern)
    if longest < MAX_LENGTH and len(value) > longest:
        raise ValueError(f"{len(value)} characters are too many for the pattern {pattern}")
    return re.search(pattern, value[:MAX_LENGTH]) is not None


def _ways(pattern: str) -> _Ways:
    #: For each open group, its alternatives; for each of these, its parts.
    groups: list[list[list[_Ways]]] = [[[]]]
    for token in _TOKEN.finditer(pattern):
        parts = groups[-1][-1]
        if token["verbose"]:
            return _ENDLESS  # its spaces and comments would be taken for parts
        if token["open"]:
            groups.append([[]])
        elif token["either"]:
            groups[-1].append([])
        elif token["close"]:
            group = groups.pop()
            groups[-1][-1].append(_either(group))
        elif token["often"] and parts:
            parts.append(_repeated(parts.pop(), token))
        else:
            # A backreference compares as much as it refers to.
            parts.append(_Ways(1) if token["back"] else _ONE)
    return _either(groups[0])


def _either(alternatives: list[list[_Ways]]) -> _Ways:
    degrees = [sum(part.degree for part in parts) for parts in alternatives]
    return _Ways(
        min(max(degrees), _MANY),
        sum(prod(part.factor for part in parts) for parts in alternatives),
    )


def _repeated(part: _Ways, token: re.Match[str]) -> _Ways:
    low, high = _bounds(token)
    if part == _ONE:
        return _Ways(1) if high >= _MANY else _Ways(0, high - low + 1)
    if high >= _MANY:
        return _ENDLESS
    factor = min(part.factor, _MAX_WAYS) ** high * (high - low + 1)
    return _Ways(min(part.degree * high, _MANY), min(factor, _MAX_WAYS + 1))


def _bounds(token: re.Match[str]) -> tuple[int, int]:
    sign = token["often"][0]
    if sign != "{":
        return int(sign == "+"), 1 if sign == "?" else _MANY
    low = int(token["low"] or 0)
    return low, int(token["high"] or _MANY) if token["comma"] else low
