"""`make bench` at a tiny scale: what it verifies, and what it leaves. No figure is looked at."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks import compare as comparison
from benchmarks.compare import Comparison
from benchmarks.document import rewrite
from benchmarks.project import Project, code_of
from benchmarks.verify import Rolling, Wrong, compare, compare_sums

ROOT = Path(__file__).parents[2]
WRITTEN = [(0x1_0000_0010, index, 100 + index) for index in range(5)] + [(0x1_0000_0090, 0, 7)]


def test_benchmark_command_registers_no_tasks():
    """They would be tasks of every app of the process, and so of other tests."""
    shown = "import sys, benchmarks.__main__; print('benchmarks.app' in sys.modules)"
    ran = subprocess.run(
        [sys.executable, "-c", shown], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert ran.stdout == "False\n", ran.stderr


def test_benchmark_accepts_changes_that_arrived_as_written():
    summary = compare(WRITTEN, list(WRITTEN), "a drain")
    assert summary == {"changes": 6, "checksum": Rolling(WRITTEN).as_json()["checksum"]}


@pytest.mark.parametrize(
    ("arrived", "named"),
    [
        (WRITTEN[:2] + WRITTEN[3:], "6 written, 5 arrived; lost 1: 1/00000010:2 id=102"),
        ([*WRITTEN, WRITTEN[1]], "6 written, 7 arrived; doubled 1: 1/00000010:1 id=101"),
        ([WRITTEN[1], WRITTEN[0], *WRITTEN[2:]], "out of order 1: 1/00000010:0 id=100"),
        ([*WRITTEN[:-1], (0x1_0000_0090, 0, 8)], "not written 1: 1/00000090:0 id=8"),
    ],
    ids=["lost", "doubled", "reordered", "another"],
)
def test_benchmark_names_what_is_wrong(arrived, named):
    with pytest.raises(Wrong, match="a drain: ") as error:
        compare(WRITTEN, arrived, "a drain")
    assert named in str(error.value)
    with pytest.raises(Wrong):
        compare_sums(Rolling(WRITTEN), Rolling(arrived), "a drain")


@pytest.fixture
def results(tmp_path, monkeypatch):
    """Of two scenarios, as the command leaves them."""
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "docs" / "performance.md", docs)
    monkeypatch.setattr(command, "DOCS", docs)

    def run(*arguments):
        given = ("--scale", "0.003", "--runs", "1", "--docs", "--output", str(tmp_path / "out"))
        status = command.main([*arguments, *given])
        return status, json.loads((tmp_path / "out" / "performance.json").read_text()), docs

    return run


@pytest.mark.soak
def test_benchmark_writes_json_charts_and_the_page(results):
    status, results_json, docs = results("--only", "updates", "filter")
    assert status == 0
    assert [(line["scenario"], len(line["values"])) for line in results_json["lines"]] == [
        ("updates", 1),
        ("filter", 1),
    ]
    assert [line["details"][0]["changes"] for line in results_json["lines"]] == [1000, 10]
    for chart in ("throughput.png", "throughput.svg"):
        assert (docs / "performance" / chart).stat().st_size > 5000
    page = (docs / "performance.md").read_text()
    assert "identity FULL, batches | " in page
    assert "](performance/throughput.svg)" in page
    assert "Not measured yet" not in page
    # A scenario that is measured later takes its own place only.
    results("--only", "filter")
    assert "identity FULL, batches | " in (docs / "performance.md").read_text()


def test_benchmark_that_loses_a_change_fails_and_names_it(results, monkeypatch, capsys):
    from benchmarks import drain

    arrived = drain.places_of
    monkeypatch.setattr(drain, "places_of", lambda bodies: arrived(bodies)[:-1])
    status, results_json, _ = results("--only", "updates")
    assert status == 1
    assert "1000 written, 999 arrived; lost 1: " in results_json["wrong"][0]
    assert "WRONG updates: flash replicate, batched" in capsys.readouterr().out


def test_comparison_fails_where_the_tree_is_slower():
    bounds = [("cpu", 1.04, False), ("cpu", 1.06, True), ("wall", 1.14, False), ("wall", 1.2, True)]
    for quantity, ratio, failed in [*bounds, ("p99", 9.0, False)]:
        measured = Comparison("a drain", quantity, [9.0, 2.0, 1.0], [ratio * 2] * 3)
        assert (measured.ratio, measured.failed) == (pytest.approx(ratio), failed)


def test_comparison_refuses_an_unknown_revision():
    with pytest.raises(SystemExit, match="BASE=v99 is no commit of this repository"):
        comparison.main(["v99"])


def test_comparison_runs_the_code_of_each_tree(tmp_path):
    (tmp_path / "whose.py").write_text("print(1)")
    with code_of(tmp_path):
        assert Project("", None).output("whose") == 1
    with pytest.raises(RuntimeError, match="No module named whose"):
        Project("", None).output("whose")


@pytest.mark.soak
def test_comparison_prints_both_sides_and_leaves_no_worktree(capsys):
    arguments = ["HEAD", "--only", "updates", "latency", "--scale", "0.01", "--runs", "1"]
    assert comparison.main(arguments) in (0, 1)
    printed = capsys.readouterr().out
    assert "updates, identity FULL, batches" in printed
    assert "ms p99" in printed
    assert b"bench-base" not in subprocess.check_output(["git", "worktree", "list"], cwd=ROOT)


def test_benchmark_page_keeps_text_outside_its_markers():
    page = (ROOT / "docs" / "performance.md").read_text()
    empty = {
        "lines": [],
        "scenarios": {},
        "machine": {"processor": "one"},
        "measured": "today",
        "runs": 5,
        "scale": 1.0,
        "missing": {"rabbitmq": "it is not installed"},
    }
    new = rewrite(page, empty, {})
    assert "on this machine: processor one." in new
    assert "Not measured: rabbitmq (it is not installed)." in new
    assert new.partition("## What each")[2].startswith(" line measures")
    assert rewrite(new, empty, {}) == new
