"""The claims that a page makes, and the tests that prove them: docs/claims.toml.

A claim is a paragraph, a bullet or a table. An entry names it by its page, the heading above it and
its first words, as many as tell it from the others; line breaks do not count. A table is named by
its header (`before | after`), or, if no entry names the header, row by row by the first cell.
"""

import re
import sys
from pathlib import Path

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[2]


def proofs(page):
    """Return {heading: {first words: tests}} for a page."""
    return _read()[page]


def pages():
    """Return the pages that have claims."""
    return set(_read())


def _read():
    return tomllib.loads((ROOT / "docs" / "claims.toml").read_text())


def section_of(text, heading):
    """Return the section of a page with this heading."""
    return re.search(rf"^## {re.escape(heading)}\n.*?(?=^## |\Z)", text, re.MULTILINE | re.DOTALL)[
        0
    ]


def unproved(text, entries, tables_of=None):
    """List what is wrong between the text of a page and its entries of docs/claims.toml.

    `tables_of` is a heading: only the tables under it are claims, instead of the whole page.
    """
    problems, used, written = [], set(), written_tests()
    for heading, claim in claims(text, entries, tables_of):
        keys = [key for key in entries.get(heading, ()) if claim.startswith(key)]
        entry = heading, max(keys, key=len, default=None)
        if not keys:
            problems.append(f"no test is named for the claim under {heading!r}: {claim}")
        elif entry in used:
            problems.append(f"{entry} names two claims, use more words: {claim}")
        used.add(entry)
    for heading, section in entries.items():
        for key, tests in section.items():
            if (heading, key) not in used:
                problems.append(f"there is no claim {key!r} under {heading!r}")
            if not tests or not written.issuperset(tests):
                problems.append(f"{key!r} names tests that are not there: {set(tests) - written}")
    return problems


def claims(text, entries, tables_of):
    """Yield (heading, claim) for each claim."""
    text, heading = re.sub(r"```.*?```|<!--.*?-->", "", text, flags=re.DOTALL), ""
    for block in re.split(r"\n\s*\n|\n(?=- )", text):
        lines = [line.strip() for line in block.strip().splitlines()]
        while lines and lines[0].startswith("#"):
            heading = lines.pop(0).lstrip("# ")
        if not lines or tables_of not in (None, heading):
            continue
        if lines[0].startswith("|"):
            header, _, *rows = map(cells, lines)
            whole = " | ".join(header)
            if any(whole.startswith(key) for key in entries.get(heading, ())):
                yield heading, whole
            else:
                yield from ((heading, row[0]) for row in rows if any(row[1:]))
        elif tables_of is None:
            yield heading, " ".join(lines).removeprefix("- ")


def cells(row):
    """Return the cells of a line of a table; `\\|` does not end one."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row.strip("| "))]


def written_tests():
    """Return the names of all tests."""
    names = set()
    for path in (ROOT / "tests").rglob("test_*.py"):
        names.update(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
    return names
