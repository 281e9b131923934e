"""Where to listen."""

from __future__ import annotations

from .errors import ConfigurationError


def http_address(address: str) -> tuple[str, int]:
    """Host and port of `flash_http`. Raises `ConfigurationError`."""
    host, _, port = address.rpartition(":")
    host = host[1:-1] if host[:1] == "[" and host[-1:] == "]" else host
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise ConfigurationError(
            f"flash_http must be host:port, such as '127.0.0.1:9187' ('0.0.0.0:9187' for every "
            f"address of this machine), not {address!r}."
        )
    return host, int(port)
