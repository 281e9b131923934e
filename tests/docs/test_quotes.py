"""Log lines and errors that the documents quote are those of the code."""

import ast
import json
import re
from functools import cache

import pytest

from flash_celery.dead_letters import failed_tasks
from flash_celery.postgres.gaps import Gap
from flash_celery.worker import replicator

from .conftest import DOCS, ROOT

#: A placeholder of a template, and what a quote omits.
WILD = None
#: What stands in the documents, by page: the part of a line that is one log line or error.
QUOTES = [
    ("howto/rabbitmq.md", r"^    (The broker .*)$"),
    ("monitoring.md", r'"reasons": \["(The broker has failed for .*? s\.) The broker '),
    ("monitoring.md", r'"reasons": \["The broker has failed for .*? (The broker .*)"\]\}'),
    ("monitoring.md", r'"message": "(.*?)"'),
    ("operating.md", r"^    (The slot flash_replication was .*\n.*)$"),
]


@cache
def templates():
    """Every string of the package, as lists of characters and placeholders."""
    texts = []
    for path in (ROOT / "flash_celery").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else WILD for part in node.values
                ]
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                parts = re.split(r"(%[srd])", node.value)
                parts = [WILD if re.fullmatch("%[srd]", part) else part for part in parts]
            else:
                continue
            texts.append([c for part in parts for c in ([WILD] if part is WILD else part)])
    return texts


def matches(quote, template):
    """Return whether both can stand for one text; each may have wildcards."""

    @cache
    def fits(i, j):
        if i == len(quote) or j == len(template):
            return all(c is WILD for c in (*quote[i:], *template[j:]))
        if quote[i] is WILD or template[j] is WILD:
            return fits(i + 1, j) or fits(i, j + 1)
        return quote[i] == template[j] and fits(i + 1, j + 1)

    return fits(0, 0)


def is_quoted(text):
    quote = [WILD if c == "…" else c for c in " ".join(text.split())]
    begins = [
        candidate
        for candidate in templates()
        if candidate[:8] == quote[:8] and WILD not in candidate[:8]
    ]
    return any(matches(quote, template) for template in begins)


@pytest.mark.parametrize(("page", "pattern"), QUOTES)
def test_quotes_in_the_documents_are_in_the_code(page, pattern):
    (text,) = re.findall(pattern, (DOCS / page).read_text(), re.MULTILINE)
    assert is_quoted(text), text


def test_quotes_that_are_not_in_the_code_are_found():
    assert is_quoted("The broker redis://localhost failed: …")
    assert not is_quoted("The broker redis://localhost fails: timed out.")


def test_quotes_of_the_gap_of_a_lost_slot_match_the_code():
    text = " ".join((DOCS / "operating.md").read_text().split())
    since, until = "2026-03-01 04:12:09+00:00", "2026-03-01 06:40:31+00"
    gap = Gap("flash_replication", "wal_removed", "0/5A3F2C8", since, "0/9C00110", until)
    assert f"was invalidated: {gap}; run" in text


def test_quoted_loggers_exist():
    (line,) = re.findall(r'^    (\{"time".*\})$', (DOCS / "monitoring.md").read_text(), re.M)
    assert json.loads(line)["logger"] == replicator.logger.name
    workers = (DOCS / "workers.md").read_text()
    assert f'ignore_logger("{failed_tasks.logger.name}")' in workers
