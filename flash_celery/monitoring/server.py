"""The HTTP port of the replication worker: /metrics, /live, /ready, /status.json and a page.

It reads, and changes nothing. Its threads are daemons with a limit to their number and to the time
that a client may take.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import re
import socket
import socketserver
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import resources
from typing import Any
from urllib.parse import parse_qs, urlsplit

from ..errors import ConfigurationError
from ..settings import http_address
from . import health
from .metrics import Metrics
from .observer import Observer

logger = logging.getLogger(__name__)

#: Requests that are answered at a time; what comes on top is turned away.
_AT_A_TIME = 16
#: Seconds that a client may take to say what it wants, or to take the answer.
_CLIENT_SECONDS = 10.0
_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
#: What `prometheus_client` writes.
_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


class Server(ThreadingHTTPServer):
    """Listens once it is made. `start` and `close` it."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: str, observer: Observer) -> None:
        host, port = http_address(address)
        self._slots = threading.Semaphore(_AT_A_TIME)
        #: What is being answered, and until when.
        self._open: dict[Any, float] = {}
        self._serving = False
        self.observer = observer
        self.metrics = Metrics(observer.telemetry, observer.report)
        self.page, self.policy = _page()
        try:
            (family, *_, place), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            self.address_family = family
            super().__init__((str(place[0]), port), _Handler)
        except (OSError, UnicodeError) as error:  # a host that is no name
            why = getattr(error, "strerror", None) or error
            raise ConfigurationError(
                f"Nothing can listen on flash_http = {address!r}: {why}; choose another address "
                "(flash replicate --http HOST:PORT), or leave it empty."
            ) from None

    def server_bind(self) -> None:
        """Bind, without HTTPServer's question to the DNS for our own name."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", self.server_address[1]

    @property
    def url(self) -> str:
        """Where it is."""
        host, port = self.server_address[:2]
        shown = f"[{host!s}]" if ":" in str(host) else host
        return f"http://{shown!s}:{port}/"

    def start(self) -> None:
        """Look and answer, in threads of its own."""
        self.observer.start()
        serve = threading.Thread(target=self.serve_forever, args=(0.1,), name="flash-http")
        serve.daemon = True
        serve.start()
        self._serving = True
        logger.info("Status page, metrics and probes on %s", self.url)

    def close(self) -> None:
        """Answer no more."""
        self.observer.close()
        if self._serving:  # or it would wait for ever
            self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer it in a thread, if there are not too many."""
        if not self._slots.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._slots.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """The whole life of such a thread."""
        self._open[request] = time.monotonic() + _CLIENT_SECONDS
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._open.pop(request, None)
            self._slots.release()

    def service_actions(self) -> None:
        """Cut off who takes too long, now and then: a client that says a byte every few seconds is
        within the time limit of its socket for ever, and some of them would keep the probes out."""
        now = time.monotonic()
        for request, until in list(self._open.items()):
            if now > until:
                with suppress(OSError):  # it is done by now
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away, mostly; no reason to fill the log."""
        logger.debug("A request failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """One request."""

    server: Server
    timeout = _CLIENT_SECONDS
    server_version, sys_version = "flash-celery", ""

    def do_GET(self) -> None:
        """Answer."""
        given = urlsplit(self.path)
        answer = _ANSWERS.get(given.path)
        if answer is None:
            self._send(404, _TEXT, "There are /, /status.json, /metrics, /live and /ready.\n")
            return
        self._send(*answer(self.server, parse_qs(given.query)))

    def do_HEAD(self) -> None:
        """Answer without a body."""
        self.do_GET()

    def _send(self, status: int, kind: str, body: str | bytes) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in (
            ("Content-Type", kind),
            ("Content-Length", str(len(data))),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", self.server.policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(OSError):  # it has gone away
                self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: a probe comes every few seconds."""


_Query = dict[str, list[str]]
_Answer = tuple[int, str, str | bytes]


def _live(server: Server, query: _Query) -> _Answer:
    report = server.observer.report()
    stuck = report["stuck_seconds"]
    body = {"live": report["live"], "stuck_seconds": stuck}
    return (200 if report["live"] else 503), _JSON, json.dumps(body)


def _ready(server: Server, query: _Query) -> _Answer:
    report = server.observer.report()
    ready = report["ready"]
    if query.get("standby") == ["ok"]:
        ready = ready or health.only_standby(report)
    body = {"ready": ready, "state": report["state"], "reasons": report["problems"]}
    return (200 if ready else 503), _JSON, json.dumps(body)


def _metrics(server: Server, query: _Query) -> _Answer:
    return 200, _EXPOSITION, server.metrics.text()


def _status(server: Server, query: _Query) -> _Answer:
    return 200, _JSON, json.dumps(server.observer.page())


def _index(server: Server, query: _Query) -> _Answer:
    return 200, "text/html; charset=utf-8", server.page


_ANSWERS: dict[str, Callable[[Server, _Query], _Answer]] = {
    "/": _index,
    "/status.json": _status,
    "/metrics": _metrics,
    "/live": _live,
    "/ready": _ready,
}


def _page() -> tuple[str, str]:
    """The page, and a policy that lets run what is in it and nothing else."""
    page = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    hashes = {
        tag: " ".join(
            f"'sha256-{base64.b64encode(hashlib.sha256(part.encode()).digest()).decode()}'"
            for part in re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        )
        for tag in ("style", "script")
    }
    policy = (
        f"default-src 'none'; style-src {hashes['style']}; script-src {hashes['script']}; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page, policy
