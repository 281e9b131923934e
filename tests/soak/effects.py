"""The effects of a handler with `once=`: rows of a table, which must be there once and in order.

Nothing is excused here: a process that was frozen, and a Redis that was emptied, must not show.
"""

from collections import Counter

from flash_celery.lanes.marks_table import CREATE_TABLE
from tests.soak.calls import Call, Harms, inversions

#: `place` grows with each effect.
SCHEMA = (
    CREATE_TABLE,
    "CREATE TABLE effects (place bigserial, commit_lsn int8, ordinal int, keys int8[])",
)
INSERT = "INSERT INTO effects (commit_lsn, ordinal, keys) VALUES (%s, %s, %s)"


class Effects:
    """What the handler `booked` has left in the database.

    Args:
        execute: Runs a statement there.
        ledger: The records of the run.
    """

    def __init__(self, execute, ledger):
        self._execute = execute
        self._ledger = ledger
        self.rows = []

    def read(self):
        """Read the table."""
        self.rows = self._execute("SELECT commit_lsn, ordinal, keys FROM effects ORDER BY place")

    @property
    def missing(self):
        """Changes without an effect."""
        ledger = self._ledger
        wanted = {i for i, commit in ledger.committed.items() if ledger.wants("keyed", commit)}
        return wanted - {(lsn, ordinal) for lsn, ordinal, _ in self.rows}

    @property
    def repeated(self):
        """Changes with more than one."""
        counts = Counter((lsn, ordinal) for lsn, ordinal, _ in self.rows)
        return {identity for identity, count in counts.items() if count > 1}

    @property
    def misplaced(self):
        """Changes whose effect came after that of a later change of their key."""
        calls = [
            Call("booked", 0, 0, place, 0, {(lsn, ordinal): keys})
            for place, (lsn, ordinal, keys) in enumerate(self.rows)
        ]
        return inversions(calls, Harms())
