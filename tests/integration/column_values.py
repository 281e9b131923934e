"""Strategies for the texts of column values, by type."""

import json
from decimal import Decimal

from hypothesis import strategies as st

integers = st.integers(-5, 5) | st.integers(-(2**15), 2**15 - 1)
decimals = st.sampled_from(
    ["NaN", "Infinity", "-Infinity", "0", "-0", "1", "1.0", "1.00", "1e5", "100000", "-2.5"]
) | st.decimals(allow_nan=False, allow_infinity=False, places=3).map(lambda d: f"{d:f}")
floats = st.floats().map(str) | st.sampled_from(["1", "1.0", "-0", "0", "NaN", "Infinity"])
words = st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=6
) | st.sampled_from(["a", "A", "ab", "a ", "B", "ä", "z", "Z", ""])
dates = st.sampled_from(
    ["infinity", "-infinity", "0044-03-15 BC", "12000-01-01", "1999-12-31", "2000-01-01"]
) | st.dates().map(str)
stamps = dates.map(lambda d: d) | st.datetimes().map(str)
spans = st.sampled_from(
    ["1 mon", "30 days", "720:00:00", "1 year", "360 days", "12 mons", "-1 day", "-24:00:00",
     "1 mon -30 days", "00:00:00", "1 day 00:00:00.5", "-00:00:00.5", "1 year -1 days"]
)  # fmt: skip
times = st.times().map(str) | st.just("24:00:00")
zoned = st.tuples(
    st.sampled_from(["10:00", "11:00", "12:00:00.5", "00:00", "23:59"]),
    st.sampled_from(["+00", "+01", "-01", "+05:30", "-12", "+13:00"]),
).map("".join)
networks = st.sampled_from(
    ["10.0.0.1", "10.0.0.1/24", "10.0.0.0/8", "10.0.0.0/24", "192.168.1.1", "::1", "fe80::/10",
     "10.0.0.1/8", "0.0.0.0/0", "10.1.0.0/16", "::/0"]
)  # fmt: skip
blocks = st.sampled_from(["10.0.0.0/8", "10.0.0.0/24", "10.1.0.0/16", "fe80::/10", "0.0.0.0/0"])
moods = st.sampled_from(["sad", "ok", "Happy", "angry"])


def arrays(elements):
    def quote(item):
        return (
            "NULL" if item is None else '"' + item.replace("\\", "\\\\").replace('"', '\\"') + '"'
        )

    flat = st.lists(st.none() | elements, max_size=3).map(
        lambda items: "{" + ",".join(map(quote, items)) + "}"
    )
    square = st.lists(elements, min_size=4, max_size=4).map(
        lambda i: "{{" + ",".join(map(quote, i[:2])) + "},{" + ",".join(map(quote, i[2:])) + "}}"
    )
    shifted = st.lists(elements, min_size=2, max_size=2).map(
        lambda i: "[0:1]={" + ",".join(map(quote, i)) + "}"
    )
    return flat | square | shifted


def ranges(low):
    bounds = st.tuples(low, low).map(sorted)
    return st.just("empty") | st.tuples(
        st.sampled_from("[("), bounds, st.sampled_from("])"), st.integers(0, 5)
    ).map(lambda r: f"{r[0]}{'' if r[3] == 1 else r[1][0]},{'' if r[3] == 2 else r[1][1]}{r[2]}")


small = st.integers(-3, 3)

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 3)
    | st.sampled_from([1.0, 0.5, 1e20, 12345678901234567890])
    | st.sampled_from(["a", "b", "", "é"]),
    lambda parts: (
        st.lists(parts, max_size=3) | st.dictionaries(st.sampled_from("abc"), parts, max_size=3)
    ),
    max_leaves=6,
)

VALUES = {
    "smallint": integers.map(str),
    "integer": integers.map(str),
    "bigint": integers.map(str),
    "real": st.sampled_from(["0.1", "0.3", "1e10", "-0", "0", "NaN", "Infinity", "16777217"]),
    "double": floats,
    "numeric": decimals,
    "boolean": st.sampled_from(["t", "f", "true", "no"]),
    "text": words,
    "varchar": words,
    "char": words,
    "name": words,
    "bytea": st.binary(max_size=3).map(lambda b: "\\x" + b.hex()),
    "date": dates,
    "timestamp": stamps,
    "timestamptz": stamps,
    "time": times,
    "timetz": zoned,
    "interval": spans,
    "uuid": st.uuids().map(str) | st.integers(0, 2).map(lambda n: f"{n:032x}"),
    "inet": networks,
    "cidr": blocks,
    "bit": st.text("01", max_size=5),
    "macaddr": st.sampled_from(["08:00:2b:01:02:03", "08-00-2b-01-02-04", "00:00:00:00:00:00"]),
    "enum": moods,
    "domain": integers.map(str),
    "enums": arrays(moods),
    "integers": arrays(small.map(str)),
    "numerics": arrays(st.sampled_from(["1", "1.0", "NaN", "-1.50", "2"])),
    "texts": arrays(words),
    "int4range": ranges(small),
    "numrange": ranges(
        st.sampled_from([Decimal("1"), Decimal("1.0"), Decimal("-2.5"), Decimal(3)])
    ),
    "tsrange": ranges(
        st.sampled_from(["2020-01-01", "2020-01-01 00:00:00", "2021-06-01 12:00:00.5"])
    ),
    "multirange": st.lists(ranges(small), max_size=3).map(lambda r: "{" + ",".join(r) + "}"),
    "json": json_values.map(json.dumps),
    "jsonb": json_values.map(json.dumps),
}
