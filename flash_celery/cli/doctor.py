"""`flash doctor`."""

from __future__ import annotations

import click

from .project import STOPPED, Project, command, say


@click.command()
@click.option(
    "--explain",
    is_flag=True,
    help="Also show, for each table, what PostgreSQL filters, what the replication worker does, "
    "and why.",
)
@click.option(
    "--sql",
    "as_sql",
    is_flag=True,
    help="Print the SQL that the owner of the tables runs in psql, so that `replicate` has nothing "
    "to set up (flash_manage = False).",
)
@click.option(
    "--event-trigger",
    is_flag=True,
    help="Print the SQL of an event trigger, which a superuser may create, so that tables join a "
    "pattern in the transaction that creates them.",
)
@command
def doctor(project: Project, explain: bool, as_sql: bool, event_trigger: bool) -> None:
    """Check every prerequisite, and show how to fix what is missing."""
    from ..commands.doctor import as_text, diagnose

    if event_trigger:
        _print_event_trigger(project)
        return
    if as_sql:
        _print_script(project)
        return
    diagnosis = diagnose(
        project.connected,
        project.app,
        project.subscriptions,
        project.default_settings,
        project.all_subscriptions,
        explain,
    )
    for finding in diagnosis.findings:
        say(as_text(finding))
    for line in diagnosis.explanation:
        say(line)
    if diagnosis.stops_replicate:
        click.get_current_context().exit(STOPPED)


def _print_event_trigger(project: Project) -> None:
    from ..errors import SubscriptionError
    from ..provisioning.event_trigger import script

    text = script(project.settings.flash_publication_slot_prefix, project.subscriptions)
    if not text:
        raise SubscriptionError(
            "No handler is on a pattern such as tenant_*.orders, so no table joins one."
        )
    click.echo(text)


def _print_script(project: Project) -> None:
    import sys
    from dataclasses import replace

    from ..commands import once_checks
    from ..escaping import escaped
    from ..provisioning import ddl, preflight

    settings = replace(project.settings, flash_manage=False)
    with project.connected() as source:
        report = preflight.examine(replace(source, settings=settings), project.subscriptions)
        marks = list(once_checks.script(project.subscriptions, source.connection))
    if not report.script:
        report.raise_first()
    if any(each.pattern for each in project.subscriptions):
        marks.append(
            "-- `flash doctor --event-trigger` prints the SQL with which later tables join."
        )
    terminal = sys.stdout.isatty()
    for line in [*ddl.script(report.script, report.slot_exists), *marks]:
        # psql needs names as they are; without `color`, click would remove escape sequences.
        click.echo(escaped(line) if terminal else line, color=True)
