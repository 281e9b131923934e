"""What `flash doctor` checks, in the order in which it prints the findings."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from ..capture.spool import default_directory, file_system
from ..handlers.subscriptions import Subscription
from ..postgres.source import Source
from ..provisioning import pauses, preflight, replay_slot, server_checks, standby_checks
from ..provisioning.findings import OK, STOP, WARNING, Finding
from ..settings import Settings
from ..transactional_tasks.signing import SHORTEST_SECRET, keys_of
from . import backfill_checks, broker_checks, lane_checks, once_checks, source_checks, worker_checks
from .doctor_explain import explain_tables

_LABELS = {OK: "ok     ", WARNING: "warning", STOP: "STOP   "}


@dataclass(frozen=True)
class Diagnosis:
    """What `flash doctor` has found."""

    findings: list[Finding]
    #: The lines of `--explain`; empty without it.
    explanation: list[str]

    @property
    def stops_replicate(self) -> bool:
        """Whether `flash replicate` would refuse to start."""
        return any(finding.level == STOP for finding in self.findings)


def diagnose(
    connect: Callable[[], AbstractContextManager[Source]],
    app: Any,
    subscriptions: Sequence[Subscription],
    default: Settings,
    all_subscriptions: Sequence[Subscription],
    explain: bool = False,
) -> Diagnosis:
    """Check PostgreSQL, the settings, the broker and the Celery workers; change nothing.

    Args:
        connect: Connects to the source.
        app: The Celery app.
        subscriptions: The subscriptions to the source.
        default: The settings of the default source.
        all_subscriptions: The subscriptions to all sources.
        explain: Whether to state where rows and columns are left out.

    Raises:
        FlashError: PostgreSQL cannot be reached.
        psycopg.Error: PostgreSQL does not answer.
    """
    registered = worker_checks.Registered(app, subscriptions)
    with connect() as source:
        settings = source.settings
        report = preflight.examine(source, subscriptions)
        findings = [
            *report.findings,
            *replay_slot.findings(source),
            *standby_checks.findings(source),
            *backfill_checks.findings(source, subscriptions),
        ]
        record, lanes = pauses.read(source), source.lanes
        backfilled = backfill_checks.queues(source, subscriptions)
        explanation = list(explain_tables(source, report)) if explain else []
    findings += server_checks.session_findings(settings)
    findings.append(server_checks.can_stream(settings))
    findings += spool_findings(settings)
    findings += worker_checks.eager_findings(app)
    findings += once_checks.findings(subscriptions)
    findings += [key_finding(settings), *atomic_findings(settings)]
    findings += source_checks.findings(default, all_subscriptions, settings.source)
    queues, queue_finding = broker_checks.route_finding(app, settings, subscriptions)
    handlers = pauses.handlers(subscriptions)
    hold_queues = [pauses.queue_of(name, settings.source) for name in handlers]
    own_queues = [settings.flash_dead_queue, *hold_queues]
    broker_findings = list(broker_checks.findings(app, settings, queues, own_queues))
    findings += [queue_finding, *broker_findings]
    findings += lane_checks.policy_findings(app, subscriptions)
    if broker_findings[0].level == OK:  # without a broker, waiting for workers only costs time
        findings += worker_checks.findings(registered)
        findings += worker_checks.queue_findings(app, queues)
        findings += worker_checks.abandoned_messages(app, record, settings.source, handlers)
        findings += lane_checks.waiting_findings(app, lanes, subscriptions)
        findings += lane_checks.worker_findings(app, settings, subscriptions)
        findings += backfill_checks.worker_findings(app, backfilled)
    findings += worker_checks.paused_findings(app, record, settings.source)
    return Diagnosis(findings, explanation)


def key_finding(settings: Settings) -> Finding:
    """Check the key of tasks in transactions."""
    keys = keys_of(settings)
    if not keys:
        return Finding("tasks", OK, "no flash_signing_key, so transactional() refuses tasks")
    given = settings.flash_signing_key
    name = "flash_signing_key" if given else "Django's SECRET_KEY"
    secrets = [given] if isinstance(given, str) else [*given]
    if any(0 < len(secret) < SHORTEST_SECRET for secret in secrets):
        message = f"a secret in flash_signing_key has fewer than {SHORTEST_SECRET} characters"
        return Finding("tasks", WARNING, f"{message}; anyone may guess it: use a random text")
    others = f", and {len(keys) - 1} more accepted" if len(keys) > 1 else ""
    ids = ", ".join(key.id.hex() for key in keys)
    return Finding("tasks", OK, f"transactional() signs with {name}{others} (ids {ids})")


def atomic_findings(settings: Settings) -> Iterator[Finding]:
    """Check whether `flash_transactional_database` has an effect: else tasks are sent at once."""
    alias = settings.flash_transactional_database
    if not alias:
        return
    problem = _atomic_problem(alias)
    if problem:
        message = f"flash_transactional_database has no effect: {problem}"
        yield Finding("tasks", WARNING, message)
    else:
        yield Finding(
            "tasks", OK, f"each task in atomic() of {alias} is carried by the transaction"
        )


def _atomic_problem(alias: str) -> str:
    django = sys.modules.get("django.conf")
    if django is None or not django.settings.configured:
        return "it needs Django"
    from django.apps import apps
    from django.db import connections

    if not apps.is_installed("flash_celery.django"):
        return "add flash_celery.django to INSTALLED_APPS"
    if alias not in connections:
        return f"DATABASES has no {alias!r}"
    vendor = connections[alias].vendor
    return "" if vendor == "postgresql" else f"DATABASES[{alias!r}] is one of {vendor}"


def spool_findings(settings: Settings) -> Iterator[Finding]:
    """Check that `flash_use_streaming` spools to a disk."""
    if not settings.flash_use_streaming:
        return
    directory = settings.flash_spool_directory or default_directory()
    file_system_type = file_system(directory)
    if file_system_type in ("tmpfs", "ramfs"):
        message = (
            f"{directory} is in memory ({file_system_type}): large open transactions fill it; set "
            "flash_spool_directory to a directory on a disk"
        )
        yield Finding("spool", WARNING, message)
    else:
        yield Finding(
            "spool", OK, f"{directory} ({file_system_type})" if file_system_type else directory
        )


def as_text(finding: Finding) -> str:
    """Return the line that `flash doctor` prints for a finding."""
    return f"{_LABELS[finding.level]}  {finding.subject}: {finding.message}"
