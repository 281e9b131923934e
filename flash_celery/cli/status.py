"""`flash status`."""

from __future__ import annotations

import json

import click

from .project import Project, command, say


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON (sizes in bytes, times in s).")
@click.option("--watch", is_flag=True, help="Show it again and again, until Ctrl-C.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Between two looks of --watch.",
)
@command
def status(project: Project, as_json: bool, watch: bool, interval: float) -> None:
    """Show the slot, its lag, the handlers and their queues."""
    from ..commands.status import as_text, examine

    if watch:
        _watch(project, as_json, interval)
        return
    with project.connect() as connection:
        report = examine(connection, project.app, project.settings, project.subscriptions)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        for line in as_text(report):
            say(line)


def _watch(project: Project, as_json: bool, interval: float) -> None:
    from ..errors import ConfigurationError

    if as_json:
        raise ConfigurationError("--watch is for people; leave --json out, or ask in a loop.")
    try:
        from ..commands.status_watch import watch
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        raise ConfigurationError(
            "--watch needs rich: pip install 'flash-celery[watch]', or `watch celery … flash "
            "status`."
        ) from None
    subject = project.app, project.settings, project.subscriptions
    watch(project.connect, *subject, interval)
