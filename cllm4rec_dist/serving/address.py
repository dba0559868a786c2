"""Listening address of the service, bound before anything is loaded. Without torch."""

from __future__ import annotations

import socket

from cllm4rec_dist.errors import ConfigError

_BACKLOG = 2048
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def listen(host: str, port: int) -> socket.socket:
    """Return a listening socket; port 0 picks any free port.

    Raises:
        ConfigError: if the host is not an address of this machine, or the port is in use or out of range.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        # Inherited by connections. asyncio sets it only for some sockets; without it an answer takes 40 ms more.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except socket.gaierror as error:
        raise ConfigError(
            "--host", host, f"cannot be resolved ({error.strerror})", "Use 127.0.0.1 or 0.0.0.0."
        ) from None
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            "--port",
            port,
            f"cannot be used on {host} ({reason})",
            "Choose another port, or stop the process that uses it.",
        ) from None


def url(host: str, port: int) -> str:
    """Return the URL to open in a browser on this machine."""
    name = _ANY.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
