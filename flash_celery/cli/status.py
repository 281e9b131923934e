"""`flash status`."""

from __future__ import annotations

import json

import click

from .project import Project, command, say


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON (sizes in bytes, times in s).")
@click.option("--watch", is_flag=True, help="Redraw the report until Ctrl-C.")
@click.option(
    "--interval",
    type=click.FloatRange(min=0.1),
    default=2.0,
    show_default=True,
    metavar="SECONDS",
    help="Time between two reports of --watch.",
)
@command
def status(project: Project, as_json: bool, watch: bool, interval: float) -> None:
    """Show the slot and its lag, the handlers and their queues."""
    if watch:
        _watch(project, as_json, interval)
        return
    from ..commands.status import as_text, examine
    from ..commands.worker_checks import Registered

    registered = Registered(project.app, project.subscriptions)
    with project.connected() as source:
        report = examine(source, project.app, project.subscriptions, registered)
    if as_json:
        click.echo(json.dumps(report.as_json(), indent=2))
    else:
        for line in as_text(report):
            say(line)


def _watch(project: Project, as_json: bool, interval: float) -> None:
    from ..errors import ConfigurationError

    if as_json:
        raise ConfigurationError(
            "--watch draws on a terminal; leave out --json, or run it in a loop."
        )
    try:
        from ..commands.status_watch import watch
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "rich":
            raise
        raise ConfigurationError(
            "--watch needs rich: pip install 'flash-celery[watch]', or `watch celery … flash "
            "status`."
        ) from None
    watch(project.connected, project.app, project.subscriptions, interval)
