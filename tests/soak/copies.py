"""A copy of `items` that a handler keeps, and starts again with a backfill now and then."""

import json
import os
import subprocess
import sys

from flash_celery.changes.change import UNCHANGED, Delete, Truncate, Update
from tests.soak.processes import ROOT

QUEUE = "copies"
HANDLER = "tests.soak.project.copied"
_FLASH = sys.executable, "-m", "celery", "-A", "tests.soak.project", "flash"


class Copy:
    """What a handler has that applies the changes of `items` in the order of its queue.

    Args:
        execute: Runs a statement.
        environment: That of the project's commands.
    """

    def __init__(self, execute, environment):
        self._execute = execute
        self._environment = environment
        self.rows = {}
        self._known = set()
        #: How many backfills were requested.
        self.begun = 0

    def begin(self):
        """Forget all rows, and have a backfill bring them, unless one is under way."""
        if not self.rests():
            return
        self.rows.clear()
        self.command("start", HANDLER, "--chunk", "200", "--rate", "2000/s")
        self.begun += 1

    def command(self, *arguments):
        """Run `flash backfill`."""
        subprocess.run(
            [*_FLASH, "backfill", *arguments],
            env={**os.environ, "PYTHONPATH": str(ROOT), **self._environment},
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
            timeout=120,
        )

    def rests(self):
        """Whether no backfill is under way."""
        return not self.begun or not self._execute(
            "SELECT 1 FROM flash_celery_backfills WHERE ended_at IS NULL"
        )

    def enqueue(self, change, task_id, at):
        """The witness has found a change in the queue."""
        identity = change.commit_lsn, change.ordinal
        if change.backfill is None and identity in self._known:
            return  # it was enqueued again
        self._known.add(identity)
        if isinstance(change, Truncate):
            self.rows.clear()
            return
        before = self.rows.pop(change.old["id"], {}) if isinstance(change, Update | Delete) else {}
        if not isinstance(change, Delete):
            new = {n: before.get(n, v) if v is UNCHANGED else v for n, v in change.new.items()}
            self.rows[new["id"]] = json.loads(json.dumps(new, default=repr))

    @property
    def differing(self):
        """The keys of rows that are not as in the table."""
        there = {row["id"]: row for (row,) in self._execute("SELECT to_jsonb(t) FROM items AS t")}
        return {key for key in self.rows.keys() | there if self.rows.get(key) != there.get(key)}
