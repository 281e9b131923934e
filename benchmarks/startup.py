"""Time the commands as whole processes, from the start of Python to their end.

No Celery worker runs, so nothing replies to `flash status` and `flash doctor`. The floor is `celery
report`, which loads the same app and connects to nothing.
"""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

from benchmarks.databases import Source
from benchmarks.project import ROOT, Project
from benchmarks.results import Goal, Line

#: The commands, in the order in which they run, with the most seconds of each.
COMMANDS = {
    "flash status": 0.8,
    "flash doctor": 0.8,
    "flash dead list": None,
    "flash wait": None,
    "flash pause": None,
    "flash resume": None,
}
FLOOR = "report"
REPLICATE = "flash replicate, until it streams"


@dataclass
class Took:
    """What a process took, in seconds."""

    wall: float
    cpu: float


def startup(bench):
    """Whole processes of the commands, without a Celery worker, on Valkey."""
    with bench.valkey() as broker:
        _startup(bench, broker, "Valkey")


def startup_rabbitmq(bench):
    """Whole processes of the commands, without a Celery worker, on RabbitMQ."""
    with bench.rabbit() as broker:
        _startup(bench, broker, "RabbitMQ")


def _startup(bench, broker, name):
    source = Source(bench.database(), broker, "single")
    scenario = "startup" if name == "Valkey" else "startup_rabbitmq"
    lines = {}
    for command in (REPLICATE, *COMMANDS):
        line = lines[command] = Line(scenario, f"{command}, {name}", "s")
        if bound := COMMANDS.get(command):
            line.goal = Goal(bound, at_least=False)
        line.against(f"celery {FLOOR}")
    for run in bench.each_run(f"startup, {name}"):
        with Project(source.dsn, broker, "single", source.slot) as project:
            floor = timed(project, FLOOR)
            started = time.time()
            replicate = project.replicate()
            streams = replicate.logged_at("Replicating the slot") - started
            taken = {REPLICATE: Took(streams, replicate.cpu())}
            for command in COMMANDS:
                taken[command] = timed(project, *command.split())
        for command, took in taken.items():
            lines[command].values.append(took.wall)
            lines[command].details.append({"cpu": round(took.cpu, 3)})
            lines[command].comparisons[0].add(floor.wall, took.wall / floor.wall)
            bench.say(f"  startup, run {run}: {command} {took.wall:.2f} s, {took.cpu:.2f} s of CPU")
        bench.say(f"  startup, run {run}: celery {FLOOR} {floor.wall:.2f} s, {floor.cpu:.2f} s")
    for line in lines.values():
        bench.add(line)


def timed(project, *command):
    """Run `celery -A benchmarks.app …`; return what it took. Raises `RuntimeError` if it fails."""
    started = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "celery", "-A", "benchmarks.app", *command],
        cwd=ROOT,
        env=project.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as child:
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.monotonic() - started
        child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"celery {' '.join(command)} ended with {child.returncode}")
    return Took(wall, usage.ru_utime + usage.ru_stime)
