"""`flash replicate`."""

from __future__ import annotations

import signal
from contextlib import suppress
from typing import Any

import click

from .project import Project, command

#: Seconds beyond flash_shutdown_timeout after which whatever is being waited for is given up.
_LATE_SECONDS = 1.0


@click.command()
@click.option("-l", "--loglevel", default="INFO", show_default=True, help="Logging level.")
@click.option("-f", "--logfile", default=None, help="Log to this file instead of stderr.")
@click.option(
    "--wait-for-workers",
    is_flag=True,
    help="Start once running Celery workers know every handler (a worker throws away a task it "
    "does not know).",
)
@click.option("--log-json", is_flag=True, help="Log one JSON object a line.")
@click.option(
    "--http",
    metavar="HOST:PORT",
    default=None,
    help="Serve status page, metrics and probes there.  [default: flash_http]",
)
@command
def replicate(
    project: Project,
    loglevel: str,
    logfile: str | None,
    wait_for_workers: bool,
    log_json: bool,
    http: str | None,
) -> None:
    """Read the slot and enqueue changes, until SIGTERM or Ctrl-C.

    Creates the slot and its publications where they are missing. A second signal ends it at once.
    Of several databases each has a process of its own: --source.
    """
    from .. import logs
    from ..commands import doctor, sources
    from ..publishing import brokers
    from ..worker.control import Stopped
    from ..worker.replicator import Replicator

    sources.check(*project.sources)
    doctor.refuse_eager(project.app)
    # Who listens to Celery's signals asks for the current app, in the publishing thread too.
    project.app.set_default()
    project.app.log.setup(loglevel=loglevel, logfile=logfile, redirect_stdouts=False)
    if log_json:
        logs.as_json(project.settings.source)
    publisher = brokers.for_app(project.app, 2 * project.settings.flash_status_interval)
    replicator = Replicator(project.app, project.settings, project.subscriptions, publisher)
    address = project.settings.flash_http if http is None else http
    server = _server(project, address, replicator.telemetry) if address else None

    def stop(number: int, frame: Any) -> None:
        for known in (signal.SIGTERM, signal.SIGINT):
            signal.signal(known, signal.SIG_DFL)
        # Whatever it waits for then, a server that says nothing for example.
        signal.signal(signal.SIGALRM, lambda *_: replicator.give_up())
        limit = project.settings.flash_shutdown_timeout + _LATE_SECONDS
        signal.setitimer(signal.ITIMER_REAL, limit, _LATE_SECONDS)
        replicator.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    signal.set_wakeup_fd(replicator.control.waker.fileno(), warn_on_full_buffer=False)
    try:
        if server is not None:
            server.start()
        if wait_for_workers:
            replicator.wait_until(lambda: _workers_know(project), "Celery workers with this code")
        with suppress(Stopped):
            replicator.run()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(-1)
        if server is not None:
            server.close()


def _server(project: Project, address: str, telemetry: Any) -> Any:
    """Listens already, so that a port in use ends it before anything is created."""
    from ..errors import ConfigurationError

    try:
        from ..monitoring.http_server import HttpServer
        from ..monitoring.observer import Observer
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "prometheus_client":
            raise
        raise ConfigurationError(
            "flash_http needs prometheus_client: pip install 'flash-celery[metrics]'."
        ) from None
    observer = Observer(project.app, project.settings, project.subscriptions, telemetry)
    return HttpServer(address, observer)


def _workers_know(project: Project) -> bool:
    from ..commands import doctor
    from ..provisioning.findings import OK

    findings = list(doctor.workers(project.app, project.subscriptions))
    return all(finding.level == OK for finding in findings)
