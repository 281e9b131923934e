"""The soak run finds what it is there to find."""

import re
import struct
from datetime import datetime
from typing import NamedTuple

import pytest

from flash_celery import UNCHANGED, testing
from tests.soak import check, report
from tests.soak.calls import ALL, LEASE, Call, Harms, inversions, overlaps, repeats, vanished
from tests.soak.carried import QUEUE, RUN, Carried
from tests.soak.copies import Copy
from tests.soak.effects import Effects
from tests.soak.faults import FAULTS
from tests.soak.ledger import Commit, Ledger, Sighting, committed
from tests.soak.processes import Process, Supervisor
from tests.soak.run import Outcome, Strike

TABLES = {1: "items", 2: "orders"}


def begin(lsn, microseconds=0):
    return b"B" + struct.pack("!QqI", lsn, microseconds, 7)


def relation(oid):
    return b"R" + struct.pack("!I", oid) + f"public\0{TABLES[oid]}\0".encode() + b"d"


def row(kind, oid):
    return kind.encode() + struct.pack("!I", oid) + b"N"


def test_soak_ledger_is_read_as_postgresql_writes_it():
    messages = [
        *(begin(10, 1_000_000), relation(1), row("I", 1), row("U", 1), b"C"),
        *(begin(20), relation(2), row("D", 2), b"T" + struct.pack("!IBII", 2, 0, 1, 2), b"C"),
    ]
    assert dict(committed(messages)) == {
        (10, 0): Commit("items", "I", 946_684_801.0),
        (10, 1): Commit("items", "U", 946_684_801.0),
        (20, 0): Commit("orders", "D", 946_684_800.0),
        (20, 1): Commit("items", "T", 946_684_800.0),
        (20, 2): Commit("orders", "T", 946_684_800.0),
    }


def sighting(lsn, index=0, checksum=1, at=0.0):
    return Sighting((lsn, index), at, "task", checksum)


class Stage(NamedTuple):
    """What is checked."""

    ledger: Ledger
    effects: Effects | None = None
    copy: Copy = Copy(lambda statement: [], {})
    carried: Carried = Carried(lambda statement: [])


@pytest.fixture
def ledger():
    """Three changes, all well."""
    ledger = Ledger()
    for number in (1, 2, 3):
        ledger.committed[number, 0] = Commit("items", "I", 100.0 + number)
        ledger.enqueued.append(sighting(number, at=200.0 + number))
        for handler in ledger.handled:
            ledger.handled[handler].append(sighting(number, at=300.0 + number))
    return ledger


def test_soak_check_passes_a_correct_run(ledger):
    assert check.complete(Stage(ledger))
    assert not check.misordered(ledger.enqueued)
    assert not check.unequal(ledger.enqueued)
    assert not list(check.again(ledger.enqueued))


def test_soak_check_compares_the_copy_with_the_table(ledger):
    table = [({"id": 1, "n": 7, "note": "kept"},)]
    copy = Copy(lambda statement: table, {})
    assert copy.differing == {1}
    assert not check.complete(Stage(ledger, copy=copy))
    copy.enqueue(testing.insert("items", {"id": 2, "n": 6, "note": "kept"}, backfill="b"), "t", 0.0)
    moved = {"id": 1, "n": 7, "note": UNCHANGED}
    copy.enqueue(testing.update("items", old={"id": 2}, new=moved, identity="default"), "t", 0.0)
    assert copy.rows[1] == table[0][0]
    assert check.complete(Stage(ledger, copy=copy))


def test_soak_check_compares_tasks_with_the_rows_beside_them(ledger):
    rows = [(name, place, "one", QUEUE, 100.0) for place, name in enumerate("abc")]
    carried = Carried(lambda statement: rows)
    carried.enqueue(1, "b", 101.0)
    carried.enqueue(0, "a", 102.0)
    carried.enqueue(1, "b", 103.0)
    carried.enqueue(7, "rolled back", 104.0)
    assert not check.complete(Stage(ledger, carried=carried))
    assert carried.missing(QUEUE) == {"c"}
    assert carried.missing(RUN) == set()
    assert carried.strangers == {"rolled back"}
    assert carried.misordered == {"a"}
    assert carried.unexplained(QUEUE, [(90.0, 99.0), (104.0, 110.0)]) == {("b", 100.0, 103.0)}
    assert carried.unexplained(QUEUE, [(90.0, 101.0)]) == set()
    carried.run(105.0, "c", 2)
    assert carried.strangers == {"rolled back", "c"}


def test_soak_check_finds_lost_changes(ledger):
    del ledger.enqueued[1]
    assert check.lost(ledger) == {(2, 0)}
    assert not check.complete(Stage(ledger))
    del ledger.handled["each"][0]
    assert check.unhandled(ledger, "each") == {(1, 0)}
    assert check.unhandled(ledger, "many") == set()


def test_soak_check_orders_by_first_delivery():
    in_order = [sighting(1), sighting(2), sighting(1), sighting(2), sighting(3)]
    assert check.misordered(in_order) == set()
    assert check.misordered([sighting(2), sighting(1), sighting(3)]) == {(1, 0)}
    assert check.misordered([sighting(1, 1), sighting(1, 0)]) == {(1, 0)}


def test_soak_check_compares_repeated_changes():
    assert check.unequal([sighting(1, checksum=1), sighting(1, checksum=2)]) == {(1, 0)}
    assert list(check.again([sighting(1), sighting(1, at=5.0)])) == [5.0]


def test_soak_check_excuses_only_killed_consumers_on_redis(ledger):
    del ledger.handled["each"][0]
    outcome = Outcome("redis", 1, {}, ledger=ledger)
    assert not check.excused(outcome, "each")
    harmless, harmful = (
        next(fault for fault in FAULTS if fault.loses_on_redis == loses) for loses in (0, 1)
    )
    outcome.strikes = [Strike(harmless, 0.0)]
    assert not check.excused(outcome, "each")
    outcome.strikes += [Strike(harmful, 0.0)]
    assert check.excused(outcome, "each")
    outcome.broker = "rabbitmq"
    assert not check.excused(outcome, "each")


def test_soak_report_has_a_line_for_each_fault(ledger):
    kill, stop = FAULTS[:2]
    ledger.enqueued += [sighting(2, at=250.0)]
    del ledger.enqueued[2]
    del ledger.handled["each"][0]
    outcome = Outcome("redis", 1, {}, ledger=ledger, seconds=60.0)
    outcome.strikes = [
        Strike(kill, 101.5, recovery=1.0, over=102.5),
        Strike(stop, 102.6, recovery=2.0, over=110.0),
        Strike(kill, 240.0, recovery=4.0, over=250.0),
    ]
    lines = list(report.lines(outcome))
    cells = {
        line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]]
        for line in lines
        if line.startswith("|")
    }
    #: Times, in flight, lost, not handled, enqueued and handled again, recovery.
    assert cells[kill.name] == ["2", "2", "0", "1", "1", "0", "2.5 s", "4.0 s"]
    assert cells[stop.name] == ["1", "2", "1", "0", "0", "0", "2.0 s", "2.0 s"]
    assert "3 changes of 3 transactions in 60 s; 1 lost, 0 out of order" in lines[-2]
    assert lines[-1] == "not handled: 1 changes of each, 0 changes of many"


def test_soak_knows_when_the_machine_gave_a_worker_no_time(tmp_path):
    class Stopped(Process):
        def start(self):
            self.log.write_text(
                "[2026-11-29 19:25:20,666: WARNING/MainProcess] This process did not run for 3 s, "
                "and another worker may read the slot now; reconnecting.\n[2026-11-29 19:25:21,0: "
                "WARNING/MainProcess] This process runs for 3 s.\n"
            )

    ((begin, end),) = Stopped("replicate", tmp_path, {}).starved
    assert end - begin == 4
    assert datetime.fromtimestamp(end) == datetime(2026, 11, 29, 19, 25, 20)


def test_soak_report_is_written_into_the_documents(ledger):
    page = report.DOCUMENT.read_text()
    text = report.rewrite(
        page, "make soak", {"Python": "3.11"}, [Outcome("redis", 1, {}, ledger=ledger)]
    )
    start, end = "<!-- soak -->", "<!-- /soak -->"
    assert text.partition(start)[0] == page.partition(start)[0]
    assert text.partition(end)[2] == page.partition(end)[2]
    (block,) = re.findall(f"{start}\n(.*){end}", text, re.DOTALL)
    assert block.startswith("\n`make soak` on Python 3.11.\n\n### Valkey\n\n| fault ")
    assert block.endswith(
        "|\n\n- 3 changes of 3 transactions in 0 s; 0 lost, 0 out of order; "
        "handled 3 (each), 3 (many)\n\n"
    )
    # The results that are there have the same shape.
    (block,) = re.findall(f"{start}\n(.*){end}", page, re.DOTALL)
    head = next(report.lines(Outcome("redis", 1, {}, ledger=ledger))).split()
    tables = [line for line in block.splitlines() if line.startswith("| fault")]
    assert len(tables) == block.count("### ") == 3
    assert all(table.split() == head for table in tables)


def call(began, *changes, ended=None, pid=1, again=False, retries=0):
    """A call of changes, each a number and its keys; it takes half a second."""
    keys = {(number, 0): [ALL] if row is ALL else [row] for number, row in changes}
    ended = began + 0.5 if ended is None else ended or None
    return Call("keyed", pid, 100 + pid, began, retries, keys, ended, again)


def reasons(calls, harms):
    return [why for _, _, why in repeats(calls, harms)]


def test_soak_order_of_each_key_is_that_of_the_commits():
    well = [call(1, (2, "a")), call(2, (1, "b")), call(3, (3, "a")), call(4, (4, ALL))]
    assert inversions(well, Harms()) == set()
    assert inversions([*well, call(5, (3, "a"))], Harms()) == {(3, 0)}
    assert inversions([*well[:2], call(5, (1, "a"))], Harms()) == {(1, 0)}
    assert inversions([call(1, (2, "a")), call(2, (1, ALL))], Harms()) == {(1, 0)}


def test_soak_batch_may_come_again_as_a_whole():
    batch = call(1, (1, "a"), (2, "a"))
    assert inversions([batch, call(2, (1, "a"), (2, "a"), (3, "a"))], Harms()) == set()
    assert inversions([call(1, (2, "a"), (3, "a")), call(2, (1, "a"))], Harms()) == {(1, 0)}


def test_soak_calls_of_one_key_are_not_made_at_once():
    long = call(1, (1, "a"), ended=9)
    assert overlaps([long, call(2, (2, "b"))], Harms()) == set()
    assert overlaps([long, call(2, (2, "a"))], Harms()) == {(2, 0)}
    assert overlaps([long, call(2, (2, ALL))], Harms()) == {(2, 0)}
    dead = call(1, (1, "a"), ended=0)
    assert overlaps([dead, call(3, (1, "a"))], Harms(ended={1: (1.9, 2.0)})) == set()
    assert overlaps([dead, call(3, (1, "a"))], Harms(ended={1: (3.9, 4.0)})) == {(1, 0)}
    assert overlaps([dead, call(3, (1, "a"))], Harms(ended={101: (1.9, 2.0)})) == set()


def test_soak_frozen_process_and_an_emptied_redis_excuse_the_order():
    late = [call(1, (1, "a"), ended=20), call(8, (2, "a"), pid=2), call(19, (1, "a"))]
    assert inversions(late, Harms()) == {(1, 0)}
    assert overlaps(late, Harms()) == {(2, 0), (1, 0)}
    frozen = Harms(frozen=[(1, 2.0, 18.0)])
    assert inversions(late, frozen) == overlaps(late, frozen) == set()
    refilled = [call(1, (5, "a")), call(3, (1, "a")), call(LEASE + 3, (2, "a"))]
    assert inversions(refilled, Harms()) == {(1, 0), (2, 0)}
    assert inversions(refilled, Harms(emptied=[2.0])) == set()
    again = [*refilled, call(LEASE + 4, (1, "a"))]
    assert inversions(again, Harms(emptied=[2.0])) == {(1, 0)}


def test_soak_repetition_needs_a_harm_that_hit_its_call():
    twice = [call(1, (1, "a")), call(9, (1, "a"), pid=2)]
    assert reasons(twice, Harms()) == [None]
    assert reasons(twice, Harms(ended={2: (5.0, 5.0), 1: (0.4, 0.5)})) == [None]
    assert reasons(twice, Harms(ended={1: (1.5, 1.6)})) == ["its process was ended"]
    assert reasons(twice, Harms(frozen=[(1, 1.2, 8.0)])) == ["its process was frozen"]
    assert reasons(twice, Harms(unreachable=[(1.2, 3.0)])) == ["the broker was away"]
    assert reasons(twice, Harms(emptied=[5.0])) == ["Redis was emptied"]
    retried = [call(1, (1, "a"), again=True), call(2, (1, "a"), retries=1)]
    assert reasons(retried, Harms()) == []
    assert reasons([call(1, (1, "a")), call(2, (1, "a"), retries=1)], Harms()) == [None]


def test_soak_call_without_an_end_needs_a_process_that_has_ended():
    lost = call(1, (1, "a"), ended=0)
    assert vanished([lost], Harms()) == {(1, 0)}
    assert vanished([lost], Harms(ended={101: (1.9, 2.0)})) == set()


def test_soak_less_is_promised_where_a_lane_is_a_queue():
    again = [call(1, (1, "a")), call(2, (2, "a")), call(3, (1, "a")), call(4, (2, "a"))]
    assert inversions(again, Harms(weak=True)) == {(1, 0)}
    away = [(2.2, 2.8)]
    assert inversions(again, Harms(unreachable=away)) == {(1, 0)}
    assert inversions(again, Harms(unreachable=away, weak=True)) == set()
    assert inversions([*again, call(5, (0, "a"))], Harms(unreachable=away, weak=True)) == {(0, 0)}
    republished = Harms(weak=True, enqueued_again={(1, 0), (2, 0)})
    assert inversions(again, republished) == set()
    assert reasons(again, Harms(weak=True)) == [None, None]
    assert reasons(again, republished) == ["it was enqueued again"] * 2
    unconfirmed = {"weak": True, "unconfirmed": [(0.4, 0.8)]}
    assert reasons(again[::2], Harms(**unconfirmed)) == [None]
    committed = Harms(**unconfirmed, committed_at={(1, 0): 0.5})
    assert reasons(again[::2], committed) == ["it was enqueued again"]
    assert inversions(again[:3], committed) == set()
    beside = [call(1, (1, "a"), ended=9), call(5, (1, "a"), pid=2)]
    assert overlaps(beside, Harms(unreachable=[(2.0, 3.0)])) == {(1, 0)}
    assert overlaps(beside, Harms(unreachable=[(2.0, 3.0)], weak=True)) == set()


def test_soak_effects_are_there_once_and_in_order(ledger):
    rows = [(1, 0, [7]), (2, 0, [7])]
    effects = Effects(lambda statement: rows, ledger)
    lost = ledger.handled["each"].pop()
    assert not check.complete(Stage(ledger, effects))
    assert effects.missing == {(3, 0)}  # it is read although another change is missing
    ledger.handled["each"].append(lost)
    assert (effects.missing, effects.repeated, effects.misplaced) == ({(3, 0)}, set(), set())
    rows += [(3, 0, [None]), (2, 0, [7])]
    assert check.complete(Stage(ledger, effects))
    assert (effects.missing, effects.repeated, effects.misplaced) == (set(), {(2, 0)}, {(2, 0)})


def test_process_that_is_dismissed_while_another_starts_does_not_start_again(tmp_path):
    sleeping = "-c", "import time; time.sleep(600)"
    process = Process("application", tmp_path, {}, *sleeping)

    class Other:
        def look_after(self):
            supervisor.dismiss([process])

    supervisor = Supervisor([Other(), process], [])
    supervisor.look_after_all()
    assert not process.running
