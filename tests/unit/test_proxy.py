"""The proxy of the tests does to a connection what it says."""

import contextlib
import socket
import socketserver
import threading
import time

import pytest

from tests.proxy import HOST, Proxy, Way


class Echo(socketserver.BaseRequestHandler):
    """Sends back what it gets, and at the end how much that was."""

    def handle(self):
        count = 0
        with contextlib.suppress(OSError):
            while data := self.request.recv(1 << 16):
                count += len(data)
                self.request.sendall(data)
            self.request.sendall(b"%d bytes" % count)


@contextlib.contextmanager
def echo():
    with socketserver.ThreadingTCPServer((HOST, 0), Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join(30)


@pytest.fixture
def proxy():
    with echo() as port, Proxy(port) as proxy:
        yield proxy


@contextlib.contextmanager
def client(proxy, opening=b"hello"):
    with socket.create_connection((HOST, proxy.port), timeout=10) as end:
        end.sendall(opening)
        yield end


def silent(end, seconds=0.2):
    end.settimeout(seconds)
    with pytest.raises(TimeoutError):
        end.recv(1)
    end.settimeout(10)


def test_proxy_passes_bytes_and_the_end_both_ways(proxy):
    with client(proxy) as end:
        assert end.recv(100) == b"hello"
        end.shutdown(socket.SHUT_WR)
        assert end.recv(100) == b"5 bytes"
        assert end.recv(100) == b""
    assert proxy.accepted == 1


def test_proxy_cut_resets_the_connection(proxy):
    with client(proxy) as end:
        end.recv(100)
        assert proxy.cut() == 1
        with pytest.raises(ConnectionResetError):
            end.recv(1)
    with client(proxy) as end:
        assert end.recv(100) == b"hello"


def test_proxy_closes_one_direction(proxy):
    with client(proxy) as end:
        end.recv(100)
        proxy.half_close(Way.TO_CLIENT)
        assert end.recv(100) == b""
        end.sendall(b"goes on")
    with client(proxy) as end:
        end.recv(100)
        proxy.half_close(Way.TO_SERVER)
        assert end.recv(100) == b"5 bytes"


def test_proxy_stall_is_silent_and_ends(proxy):
    with client(proxy) as end:
        end.recv(100)
        proxy.stall()
        end.sendall(b"anyone?")
        with client(proxy) as other:
            silent(other)
        silent(end)
        proxy.stall(new=False)
        with client(proxy) as other:
            assert other.recv(100) == b"hello"
        silent(end)
        proxy.heal()
        assert end.recv(100) == b"anyone?"


def test_proxy_stalls_one_connection_and_direction(proxy):
    with client(proxy, b"stream") as stream, client(proxy, b"query") as query:
        stream.recv(100)
        query.recv(100)
        proxy.stall(Way.TO_CLIENT, only=lambda opening: b"stream" in opening)
        stream.sendall(b"got")
        query.sendall(b"on")
        assert query.recv(100) == b"on"
        silent(stream)
        assert proxy.cut(only=lambda opening: b"query" in opening) == 1
        proxy.heal()
        assert stream.recv(100) == b"got"


def test_proxy_delays_and_throttles(proxy):
    with client(proxy) as end:
        end.recv(100)
        proxy.delay(0.1)
        started = time.monotonic()
        end.sendall(b"late")
        assert end.recv(100) == b"late"
        assert time.monotonic() - started >= 0.2
        proxy.heal()
        proxy.throttle(10_000)
        started = time.monotonic()
        end.sendall(bytes(3000))
        left = 3000
        while left:
            left -= len(end.recv(left))
        assert time.monotonic() - started >= 0.2


def test_proxy_refuses_and_redirects(proxy):
    with client(proxy) as end:
        proxy.refuse()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, proxy.port), timeout=5)
        assert end.recv(100) == b"hello"
        proxy.heal()
        with socketserver.TCPServer((HOST, 0), Echo) as other:
            proxy.lead_to(other.server_address[1])
            thread = threading.Thread(target=other.handle_request)
            thread.start()
            with client(proxy, b"elsewhere") as moved:
                assert moved.recv(100) == b"elsewhere"
            thread.join(30)
        end.sendall(b"still here")
        assert end.recv(100) == b"still here"
