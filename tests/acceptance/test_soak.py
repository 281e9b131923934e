"""A few seconds of `make soak`, with the same faults each time."""

import pytest

from tests.soak import report
from tests.soak.faults import FAULTS
from tests.soak.run import run

STRIKES = (
    "walsender terminated",
    "network to broker cut",
    "Celery worker: SIGKILL of a child",
    "replicate: SIGKILL",
)
#: For ordered handlers.
LANES = (
    "lanes: SIGKILL of a draining process",
    "lanes: SIGKILL of a whole worker",
    "lanes: frozen for more than a lease",
    "lanes: restart of the broker in a drain",
    "password changed",
    "broker emptied: FLUSHALL",
)
FAILOVERS = "Sentinel: failover", "replicate: SIGKILL", "Sentinel: failover", "Sentinel: failover"


@pytest.mark.soak
@pytest.mark.parametrize(
    ("broker", "names"), [("redis", STRIKES), ("redis", LANES), ("sentinel", FAILOVERS)]
)
def test_soak_run_of_seconds_loses_nothing(tmp_path, broker, names):
    faults = [next(fault for fault in FAULTS if fault.name == name) for name in names]
    outcome = run(broker, 1, tmp_path, 0, faults, say=lambda line: None)
    assert outcome.problems == []
    assert len(outcome.ledger.committed) > 100
    table = "\n".join(report.lines(outcome))
    for name in names:
        assert name in table
