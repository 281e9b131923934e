"""The tests of the Django integration, in a process of their own: Django is configured once in
each, and other tests configure it otherwise."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_django_tests_pass_in_a_process_of_their_own():
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/django", "-p", "no:cacheprovider"],
        env={**os.environ, "FLASH_TESTS_DJANGO": "1"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
