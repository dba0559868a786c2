"""The address that a service listens at, taken before anything is loaded. Imports no torch."""

from __future__ import annotations

import socket

from cllm4rec_dist.errors import ConfigError

_BACKLOG = 2048
_ANY = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 for any free one.

    Raises:
        ConfigError: where the host is not of this machine, or the port is taken or out of range.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.create_server(address[:2], family=family, backlog=_BACKLOG)
        # Connections inherit it; asyncio sets it itself only for some sockets, and an answer then takes 40 ms more.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return listener
    except socket.gaierror as error:
        raise ConfigError("--host", host, f"is not known ({error.strerror})", "Use 127.0.0.1 or 0.0.0.0.") from None
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            "--port", port, f"cannot be used on {host} ({reason})", "Choose another one, or stop what uses it."
        ) from None


def url(host: str, port: int) -> str:
    """What to open in a browser on this machine."""
    name = _ANY.get(host, host)
    return f"http://[{name}]:{port}" if ":" in name else f"http://{name}:{port}"
