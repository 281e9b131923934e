"""`flash doctor`."""

from __future__ import annotations

import click

from .project import STOPPED, Project, command, say


@click.command()
@click.option(
    "--explain",
    is_flag=True,
    help="Say for each table what PostgreSQL filters, what the replication worker does, and why.",
)
@click.option(
    "--sql",
    "as_sql",
    is_flag=True,
    help="Print what the owner of the tables runs in psql, so that `replicate` has nothing to set "
    "up (flash_manage = False).",
)
@command
def doctor(project: Project, explain: bool, as_sql: bool) -> None:
    """Check every prerequisite, and say how to mend what is missing."""
    from ..commands import doctor as checks
    from ..commands import explain as explaining
    from ..commands import sources
    from ..postgres.source import Source
    from ..provisioning import pauses, preflight, replay_slot, server_checks, standby_checks
    from ..provisioning.findings import OK, STOP

    if as_sql:
        _script(project)
        return
    subject = project.settings, project.subscriptions
    explained: list[str] = []
    with project.connect() as connection:
        source = Source(connection, project.settings)
        report = preflight.examine(source, project.subscriptions)
        standing_by = list(standby_checks.findings(source))
        record = pauses.read(source)
        held = list(replay_slot.findings(source))
        if explain:
            explained += explaining.explain(connection, *subject, report)
    findings = [*report.findings, *held, *standing_by, server_checks.can_stream(project.settings)]
    findings += checks.spool(project.settings)
    findings += checks.eager(project.app)
    findings += sources.findings(*project.sources)
    queues, routed = checks.routes(project.app, *subject)
    findings.append(routed)
    broker = list(checks.broker(project.app, project.settings, queues))
    findings += broker
    if broker[0].level == OK:  # or asking for workers takes its time
        findings += checks.workers(project.app, project.subscriptions)
        handlers = pauses.handlers(project.subscriptions)
        findings += checks.forgotten(project.app, record, project.settings.source, handlers)
    findings += checks.paused(project.app, record, project.settings.source)
    for finding in findings:
        say(checks.line(finding))
    for line in explained:
        say(line)
    if any(finding.level == STOP for finding in findings):
        click.get_current_context().exit(STOPPED)


def _script(project: Project) -> None:
    import sys
    from dataclasses import replace

    from ..escaping import escaped
    from ..postgres.source import Source
    from ..provisioning import preflight, script

    settings = replace(project.settings, flash_manage=False)
    with project.connect() as connection:
        report = preflight.examine(Source(connection, settings), project.subscriptions)
    if not report.script:
        report.raise_first()
    terminal = sys.stdout.isatty()
    for line in script.lines(report.script):
        # For psql names are as they are; click would take escape sequences out.
        click.echo(escaped(line) if terminal else line, color=True)
