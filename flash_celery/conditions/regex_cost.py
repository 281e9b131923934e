"""How long a regular expression may take.

Python's `re` tries every way in which a pattern can match, and has no time limit. The ways are
counted as a polynomial of the value's length, from above: what repeats adds a degree.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from functools import lru_cache
from math import comb, prod
from typing import NamedTuple

#: Characters of a value that a pattern looks at.
REACH = 10_000
#: Ways that may be tried for one value: a tenth of a second at worst, for a hundred rows are judged
#: in a turn (`transactions.runs`), and PostgreSQL waits for its end.
_MOST = 10**7
#: More repetitions than this are as many as there may ever be.
_MANY = 1000

#: Parts of a pattern; what has no name has one way to match.
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


_ONE, _ENDLESS = _Ways(), _Ways(0, _MOST + 1)


@lru_cache(maxsize=256)
def reach(pattern: str) -> int:
    """How long a value may be for it to be judged in time; 0 if that is never certain."""
    ways = _ways(pattern)
    # It is tried at each place of the value, unless it can only match at its beginning.
    degree = ways.degree + (not pattern.startswith("^") or "|" in pattern)
    return bisect_right(
        range(1, REACH + 1), _MOST, key=lambda n: ways.factor * comb(n + degree - 1, degree)
    )


def found(value: str, pattern: str) -> bool:
    """Whether a value matches. Raises `ValueError` where that might take long to find out."""
    most = reach(pattern)
    if most < REACH and len(value) > most:
        raise ValueError(f"{len(value)} characters are too many for the pattern {pattern}")
    return re.search(pattern, value[:REACH]) is not None


def _ways(pattern: str) -> _Ways:
    #: Of each open group its alternatives, and of each of these the parts.
    groups: list[list[list[_Ways]]] = [[[]]]
    for token in _TOKEN.finditer(pattern):
        parts = groups[-1][-1]
        if token["verbose"]:
            return _ENDLESS  # its spaces and comments are no parts
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
    degrees = [sum(one.degree for one in parts) for parts in alternatives]
    return _Ways(
        min(max(degrees), _MANY),
        sum(prod(one.factor for one in parts) for parts in alternatives),
    )


def _repeated(part: _Ways, token: re.Match[str]) -> _Ways:
    low, high = _bounds(token)
    if part == _ONE:
        return _Ways(1) if high >= _MANY else _Ways(0, high - low + 1)
    if high >= _MANY:
        return _ENDLESS
    factor = min(part.factor, _MOST) ** high * (high - low + 1)
    return _Ways(min(part.degree * high, _MANY), min(factor, _MOST + 1))


def _bounds(token: re.Match[str]) -> tuple[int, int]:
    sign = token["often"][0]
    if sign != "{":
        return int(sign == "+"), 1 if sign == "?" else _MANY
    low = int(token["low"] or 0)
    return low, int(token["high"] or _MANY) if token["comma"] else low
