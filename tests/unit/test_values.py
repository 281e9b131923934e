import ctypes.util
import os
import subprocess
import sys

import pytest

from flash_celery.values.loading import array_loader, field_loader, record_loader
from tests.conftest import missing

READ = """
from datetime import timedelta
from psycopg import pq
from flash_celery.values.loading import loader
assert pq.__impl__ == "python", pq.__impl__
assert loader(1186)(b"-1 days +02:03:04.5") == timedelta(days=-1, seconds=7384.5)
assert loader(1186)(b"infinity") == "infinity"
assert loader(1187)(b'{"1 day",NULL}') == [timedelta(days=1), None]
assert loader(1187)(b"{infinity}") == "{infinity}"
"""


def test_interval_is_read_by_psycopg_without_binaries():
    if not ctypes.util.find_library("pq"):
        missing("libpq")
    environment = {**os.environ, "PSYCOPG_IMPL": "python"}
    ran = subprocess.run(
        [sys.executable, "-c", READ], env=environment, capture_output=True, text=True, timeout=120
    )
    assert ran.stderr == ""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'(1,"a,""b\\\\")', {"l": 1, "r": 'a,"b\\'}),
        (b"(,)", {"l": None, "r": None}),
        (b'(,"")', {"l": None, "r": ""}),
        *((one, one.decode()) for one in (b"(1,a,3)", b"(1,a,)", b"(1)", b"()", b"", b'(1,")')),
        (b"(a,3)", "(a,3)"),
    ],
)
def test_composite_with_fields_unlike_its_type_is_text(text, value):
    load = record_loader(["l", "r"], [field_loader(23), field_loader(25)])
    assert load(text) == value
    assert array_loader(load)(
        b'{"' + text.replace(b"\\", rb"\\").replace(b'"', rb"\"") + b'"}'
    ) == [value]
