"""The HTTP port of the replication worker: /metrics, /live, /ready, /status.json and a page.

It changes nothing. Each request has a daemon thread; the number of threads and the time that a
client may take are limited.
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

#: Requests answered at a time; further connections are closed.
_CONCURRENT_REQUESTS = 16
#: Seconds that a client may take for its request and for the answer.
_CLIENT_SECONDS = 10.0
_TEXT = "text/plain; charset=utf-8"
_JSON = "application/json"
#: The format that `prometheus_client` writes.
_EXPOSITION = "text/plain; version=0.0.4; charset=utf-8"


class HttpServer(ThreadingHTTPServer):
    """A server that listens from its creation on, and answers from `start` to `close`.

    Args:
        address: `host:port`.
        observer: Makes the reports that are served.

    Raises:
        ConfigurationError: The address cannot be used.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, address: str, observer: Observer) -> None:
        host, port = http_address(address)
        self._free_threads = threading.Semaphore(_CONCURRENT_REQUESTS)
        #: The deadline of each request that is being answered.
        self._deadlines: dict[Any, float] = {}
        self._serving = False
        self.observer = observer
        self.metrics = Metrics(observer.telemetry, observer.report)
        self.page, self.policy = _load_page()
        try:
            (family, *_, socket_address), *_ = socket.getaddrinfo(
                host, port, type=socket.SOCK_STREAM
            )
            self.address_family = family
            super().__init__((str(socket_address[0]), port), _Handler)
        except (OSError, UnicodeError) as error:  # UnicodeError: the host is not a valid name
            reason = getattr(error, "strerror", None) or error
            raise ConfigurationError(
                f"Cannot listen on flash_http = {address!r}: {reason}; choose another address "
                "(flash replicate --http HOST:PORT), or leave it empty."
            ) from None

    def server_bind(self) -> None:
        """Bind without asking the DNS for this machine's name, as HTTPServer does."""
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = "localhost", self.server_address[1]

    @property
    def url(self) -> str:
        """The address of the status page."""
        host, port = str(self.server_address[0]), self.server_address[1]
        return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"

    def start(self) -> None:
        """Start to observe and to answer, in background threads."""
        self.observer.start()
        threading.Thread(
            target=self.serve_forever, args=(0.1,), name="flash-http", daemon=True
        ).start()
        self._serving = True
        logger.info("Status page, metrics and probes on %s", self.url)

    def close(self) -> None:
        """Stop to observe and to answer."""
        self.observer.close()
        if self._serving:  # `shutdown` waits indefinitely for a server that never served
            self.shutdown()
        self.server_close()

    def process_request(self, request: Any, client_address: Any) -> None:
        """Answer a request in a thread of its own, or close it if there are too many."""
        if not self._free_threads.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # the thread could not be started
            self._free_threads.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answer a request, and give the thread's place back."""
        self._deadlines[request] = time.monotonic() + _CLIENT_SECONDS
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._deadlines.pop(request, None)
            self._free_threads.release()

    def service_actions(self) -> None:
        """Cut off clients that take too long; the server calls this every 0.1 s.

        A client that sends a byte every few seconds never exceeds its socket's timeout, and a few
        of them would keep the probes out.
        """
        now = time.monotonic()
        for request, deadline in list(self._deadlines.items()):
            if now > deadline:
                with suppress(OSError):  # it has just ended
                    request.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log at level DEBUG: most of these are clients that went away."""
        logger.debug("A request failed", exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    """The handler of one request."""

    server: HttpServer
    timeout = _CLIENT_SECONDS
    server_version, sys_version = "flash-celery", ""

    def do_GET(self) -> None:
        """Answer with the page, the metrics, a probe, or 404."""
        url = urlsplit(self.path)
        answer = _ANSWERS.get(url.path)
        if answer is None:
            self._send(404, _TEXT, "Try /, /status.json, /metrics, /live or /ready.\n")
            return
        self._send(*answer(self.server, parse_qs(url.query)))

    def do_HEAD(self) -> None:
        """Answer as to GET, without a body."""
        self.do_GET()

    def _send(self, status: int, content_type: str, body: str | bytes) -> None:
        data = body.encode() if isinstance(body, str) else body
        self.send_response(status)
        for name, value in (
            ("Content-Type", content_type),
            ("Content-Length", str(len(data))),
            ("Cache-Control", "no-store"),
            ("Content-Security-Policy", self.server.policy),
            ("X-Content-Type-Options", "nosniff"),
            ("Referrer-Policy", "no-referrer"),
        ):
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            with suppress(OSError):  # the client has gone
                self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing: probes come every few seconds."""


_Query = dict[str, list[str]]
_Answer = tuple[int, str, str | bytes]


def _live(server: HttpServer, query: _Query) -> _Answer:
    report = server.observer.report()
    live = server.observer.is_live(report)
    body = {"live": live, "stuck_seconds": report.stuck_seconds}
    return (200 if live else 503), _JSON, json.dumps(body)


def _ready(server: HttpServer, query: _Query) -> _Answer:
    report = server.observer.report()
    problems = health.problems(report)
    ready = not problems
    if query.get("standby") == ["ok"]:
        ready = ready or health.is_hot_spare(report)
    body = {"ready": ready, "state": report.state, "reasons": problems}
    return (200 if ready else 503), _JSON, json.dumps(body)


def _metrics(server: HttpServer, query: _Query) -> _Answer:
    return 200, _EXPOSITION, server.metrics.text()


def _status(server: HttpServer, query: _Query) -> _Answer:
    return 200, _JSON, json.dumps(server.observer.page())


def _index(server: HttpServer, query: _Query) -> _Answer:
    return 200, "text/html; charset=utf-8", server.page


_ANSWERS: dict[str, Callable[[HttpServer, _Query], _Answer]] = {
    "/": _index,
    "/status.json": _status,
    "/metrics": _metrics,
    "/live": _live,
    "/ready": _ready,
}


def _load_page() -> tuple[str, str]:
    """Return the page, and the content security policy that allows its own scripts only."""
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
