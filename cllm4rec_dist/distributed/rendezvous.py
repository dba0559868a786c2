"""Checks and log lines before torch's rendezvous.

torch's rendezvous waits silently for missing ranks and unreachable hosts until its timeout. So the launcher's variables
are checked first, and the ranks register in a TCPStore at the same address, over which rank 0 logs who is missing. The
rendezvous itself is torch's.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import time
from collections.abc import Mapping, MutableMapping
from datetime import timedelta
from typing import TYPE_CHECKING

from cllm4rec_dist.errors import ConfigError, RankError

if TYPE_CHECKING:  # torch takes seconds to import, and invalid variables are refused before that
    from torch.distributed import Store

logger = logging.getLogger(__name__)

_REMINDER_SECONDS = 10.0
_POLL_SECONDS = 0.2
_CONNECT_SECONDS = 20.0
"""How long a rank may take to connect to the store once its port is open."""
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PREFIX = "cllm4rec_dist/ranks/"


def forget_launcher(environ: MutableMapping[str, str]) -> list[str]:
    """Remove a launcher's variables, for a run of one process; return the names of those that torch would read."""
    names = [name for name in _LAUNCHER_VARIABLES if name in environ]
    for name in (*names, *(name for name in [*environ] if name.startswith("TORCHELASTIC_"))):
        del environ[name]
    return names


def read_ranks(environ: Mapping[str, str]) -> tuple[int, int]:
    """Read rank and number of ranks from RANK and WORLD_SIZE.

    Raises:
        ConfigError: for invalid values, which are often left over from another run.
    """
    cure = "Set RANK, WORLD_SIZE and LOCAL_RANK as a launcher does, or unset them (--launcher process ignores them)."
    values = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}
    values |= {name: environ[name] for name in values if name in environ}
    for name, value in values.items():
        if not re.fullmatch(r"[0-9]+", value):
            raise ConfigError(name, value, "is not a whole number", cure)
    rank, size, _, port = map(int, values.values())
    if port >= 1 << 16:
        raise ConfigError("MASTER_PORT", port, "is no port: the largest is 65535", "Choose a free port.")
    if rank >= size:
        raise ConfigError("RANK", rank, f"must be below WORLD_SIZE, which is {size}", cure)
    return rank, size


def require_host(host: str) -> None:
    """Refuse a MASTER_ADDR that does not resolve, for which torch would wait until its timeout.

    Raises:
        ConfigError: names the host.
    """
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        raise ConfigError(
            "MASTER_ADDR",
            host,
            f"does not resolve ({error})",
            "Name the host of rank 0, or unset it with RANK and WORLD_SIZE for a run of one host.",
        ) from None


def wait_for_ranks(environ: Mapping[str, str], timeout: float) -> Store | None:
    """Check the launcher's variables and, if there are several ranks, wait for all of them. Collective.

    Returns:
        The store of `register`, or None for one rank.

    Raises:
        ConfigError, RankError: from `read_ranks`, `require_host` and `register`.
    """
    rank, size = read_ranks(environ)
    if size == 1:
        return None
    require_host(environ["MASTER_ADDR"])
    return register(rank, size, environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), timeout)


def register(rank: int, size: int, host: str, port: int, timeout: float) -> Store:
    """Wait until all ranks have connected to a store at HOST:PORT, and log the missing ones every 10 s. Collective.

    Rank 0 opens the store, or connects to that of torchrun's agent.

    Args:
        timeout: longest wait in seconds.

    Returns:
        The store. On rank 0 it holds the port: keep it until the process group is made.

    Raises:
        ConfigError: for a port in use, or a host that is not rank 0's.
        RankError: if ranks do not arrive in time.
    """
    deadline = time.monotonic() + timeout
    address = f"{host}:{port} (RANK, WORLD_SIZE are set)"
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        store = _open_store(host, port)
    else:
        _wait_for_port(host, port, f"rank {rank} of {size}: waiting for rank 0 at {address}", deadline)
        store = _connect(host, port, is_master=False)
    store.set(f"{_PREFIX}{rank}", "here")
    count = store.add(f"{_PREFIX}count", 1)
    reminder = _Reminder()
    while count < size:
        if time.monotonic() > deadline:
            raise RankError(f"ranks {_missing(store, size)} of {size} did not come to {address}", "Start all ranks.")
        if reminder.is_due():
            # Only rank 0 looks up the missing ranks: the store may have hundreds of ranks to serve.
            who = f"ranks {_missing(store, size)} of {size}" if rank == 0 else f"{size - count} of {size} ranks"
            logger.warning("rank %d: waiting for %s at %s", rank, who, address)
        time.sleep(_POLL_SECONDS)
        count = store.add(f"{_PREFIX}count", 0)
    return store


class _Reminder:
    """Timer that is due every ten seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        if time.monotonic() - self._last < _REMINDER_SECONDS:
            return False
        self._last = time.monotonic()
        return True


def _missing(store: Store, size: int) -> str:
    """Format the missing ranks, as in "1, 3 to 7"."""
    missing = [rank for rank in range(size) if not store.check([f"{_PREFIX}{rank}"])]
    spans: list[list[int]] = []
    for rank in missing:
        if spans and rank == spans[-1][1] + 1:
            spans[-1][1] = rank
        else:
            spans.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in spans)


def _open_store(host: str, port: int) -> Store:
    from torch.distributed import DistNetworkError

    try:
        return _connect(host, port, is_master=True)
    except DistNetworkError as error:
        if "EADDRINUSE" in str(error):
            raise ConfigError(
                "MASTER_PORT",
                port,
                "is in use on this host",
                "Choose a free port: --master_port=PORT of deepspeed and torchrun, or the variable MASTER_PORT.",
            ) from error
        raise ConfigError(
            "MASTER_ADDR",
            f"{host}:{port}",
            "cannot be reached from rank 0, which is this process",
            "It must be the host of rank 0; or unset RANK and WORLD_SIZE for a run of one process.",
        ) from error


def _connect(host: str, port: int, *, is_master: bool) -> Store:
    from torch.distributed import TCPStore

    # Multi-tenant like the store of torch's rendezvous, so that both share one server at the port.
    return TCPStore(
        host,
        port,
        is_master=is_master,
        multi_tenant=is_master,
        wait_for_workers=False,
        timeout=timedelta(seconds=_CONNECT_SECONDS),
    )


def _wait_for_port(host: str, port: int, message: str, deadline: float) -> None:
    """Wait until the port is open. (Connecting a store to a closed port fills the log with torch's warnings.)

    Raises:
        RankError: after `deadline`.
    """
    reminder = _Reminder()
    while True:
        try:
            socket.create_connection((host, port), timeout=_REMINDER_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RankError(f"{message}, timed out ({error})", "Start rank 0 there.") from error
        if reminder.is_due():
            logger.warning(message)
        time.sleep(_POLL_SECONDS)
