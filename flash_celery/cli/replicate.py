"""`flash replicate`."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext, suppress
from typing import Any

import click

from . import process_memory
from .project import Project, command

#: Seconds after flash_shutdown_timeout at which a shutdown is cut short.
_GRACE_SECONDS = 1.0


@click.command()
@click.option("-l", "--loglevel", default="INFO", show_default=True, help="Logging level.")
@click.option("-f", "--logfile", default=None, help="Log to this file instead of stderr.")
@click.option(
    "--wait-for-workers",
    is_flag=True,
    help="Start only once running Celery workers know every handler (a worker discards tasks it "
    "does not know).",
)
@click.option("--log-json", is_flag=True, help="Log one JSON object per line.")
@click.option(
    "--http",
    metavar="HOST:PORT",
    default=None,
    help="Serve the status page, metrics and probes there.  [default: flash_http]",
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

    Creates the slot and its publications if they do not exist. A second signal ends the process at
    once. With several databases, run one process for each: --source.
    """
    process_memory.keep_freed_memory()
    _refuse_unusable(project)
    _set_up_logging(project, loglevel, logfile, log_json)
    replicator = _replicator(project)
    http_server = _http_server(project, http, replicator)
    timeout = project.settings.flash_shutdown_timeout + _GRACE_SECONDS
    with (
        closing(http_server) if http_server else nullcontext(),
        _stop_on_signals(replicator, timeout),
    ):
        if http_server:
            http_server.start()
        if wait_for_workers:
            replicator.wait_until(lambda: _workers_ready(project), "Celery workers with this code")
        process_memory.collect_garbage_rarely()
        replicator.run()


def _refuse_unusable(project: Project) -> None:
    """Raise `FlashError` for a project whose changes would be lost or never read."""
    from ..commands.source_checks import refuse_mismatch
    from ..commands.worker_checks import refuse_eager

    refuse_mismatch(project.default_settings, project.all_subscriptions, project.settings.source)
    refuse_eager(project.app)


def _set_up_logging(project: Project, loglevel: str, logfile: str | None, as_json: bool) -> None:
    from . import logs

    # Receivers of Celery's signals use the current app, in the publishing thread too.
    project.app.set_default()
    project.app.log.setup(loglevel=loglevel, logfile=logfile, redirect_stdouts=False)
    if as_json:
        logs.as_json(project.settings.source)


def _replicator(project: Project) -> Any:
    from ..publishing import brokers
    from ..worker.replicator import Replicator

    publisher = brokers.for_app(project.app, 2 * project.settings.flash_status_interval)
    return Replicator(project.app, project.settings, project.subscriptions, publisher)


def _http_server(project: Project, address: str | None, replicator: Any) -> Any:
    """Return a server that listens already, or None if no address is set.

    An address in use must end the command before anything is created in the database.
    """
    from ..errors import ConfigurationError

    address = project.settings.flash_http if address is None else address
    if not address:
        return None
    try:
        from ..monitoring.http_server import HttpServer
        from ..monitoring.observer import Observer
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "prometheus_client":
            raise
        raise ConfigurationError(
            "flash_http needs prometheus_client: pip install 'flash-celery[metrics]'."
        ) from None
    subject = project.app, project.settings, project.subscriptions
    return HttpServer(address, Observer(*subject, replicator.telemetry))


@contextmanager
def _stop_on_signals(replicator: Any, timeout: float) -> Iterator[None]:
    """Stop the replicator at SIGTERM or SIGINT, and give up `timeout` seconds later.

    A second signal has its default effect.
    """
    from ..worker.control import Stopped

    def stop(number: int, frame: Any) -> None:
        for stopping_signal in (signal.SIGTERM, signal.SIGINT):
            signal.signal(stopping_signal, signal.SIG_DFL)
        # A server that has gone silent, for example, would keep it waiting.
        signal.signal(signal.SIGALRM, lambda *_: replicator.give_up())
        signal.setitimer(signal.ITIMER_REAL, timeout, _GRACE_SECONDS)
        replicator.stop()

    for stopping_signal in (signal.SIGTERM, signal.SIGINT):
        signal.signal(stopping_signal, stop)
    signal.set_wakeup_fd(replicator.control.waker.fileno(), warn_on_full_buffer=False)
    try:
        with suppress(Stopped):
            yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.set_wakeup_fd(-1)


def _workers_ready(project: Project) -> bool:
    from ..commands.worker_checks import unhandled

    return unhandled(project.app, project.subscriptions) == []
