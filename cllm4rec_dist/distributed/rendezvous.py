"""Where ranks that a launcher started find each other, with a word for whoever has to wait.

torch's rendezvous waits for missing ranks, and for a host that does not answer, in silence and for as long as its
timeout. So before it begins, the variables are checked and the ranks call a roll over a store of the same kind at the
same address: rank 0 says who is missing. The rendezvous itself is left to torch.
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

if TYPE_CHECKING:  # torch takes seconds to import, and a leftover variable is refused before that
    from torch.distributed import Store

logger = logging.getLogger(__name__)

_REMINDER_SECONDS = 10.0
_POLL_SECONDS = 0.2
_SELF_SECONDS = 20.0
"""How long rank 0 may take to reach the store that it has just opened itself."""
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PREFIX = "cllm4rec_dist/roll/"


def forget_launcher(environ: MutableMapping[str, str]) -> list[str]:
    """Remove what a launcher has set for its ranks, for a run of one process; the names of what torch would read."""
    found = [name for name in _LAUNCHER_VARIABLES if name in environ]
    for name in (*found, *(name for name in [*environ] if name.startswith("TORCHELASTIC_"))):
        del environ[name]
    return found


def read_ranks(environ: Mapping[str, str]) -> tuple[int, int]:
    """Rank and number of ranks, from RANK and WORLD_SIZE.

    Raises:
        ConfigError: for numbers that cannot be those of a run, which often are leftovers of another one.
    """
    cure = "Set RANK, WORLD_SIZE and LOCAL_RANK as a launcher does, or unset them (--launcher process ignores them)."
    found = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "0"}
    found |= {name: environ[name] for name in found if name in environ}
    for name, value in found.items():
        if not re.fullmatch(r"[0-9]+", value):
            raise ConfigError(name, value, "is not a whole number", cure)
    rank, size, _, port = map(int, found.values())
    if port >= 1 << 16:
        raise ConfigError("MASTER_PORT", port, "is no port: the largest is 65535", "Choose a free port.")
    if rank >= size:
        raise ConfigError("RANK", rank, f"must be below WORLD_SIZE, which is {size}", cure)
    return rank, size


def require_host(host: str) -> None:
    """Refuse a MASTER_ADDR that does not resolve, with which torch would wait for its whole timeout.

    Raises:
        ConfigError: names it.
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


def meet(environ: Mapping[str, str], seconds: float) -> Store | None:
    """Check what a launcher has set and, where it set several ranks, wait for all of them by `call_roll`. Collective.

    Raises:
        ConfigError, RankError: of `read_ranks`, `require_host` and `call_roll`.
    """
    rank, size = read_ranks(environ)
    if size == 1:
        return None
    require_host(environ["MASTER_ADDR"])
    return call_roll(rank, size, environ["MASTER_ADDR"], int(environ["MASTER_PORT"]), seconds)


def call_roll(rank: int, size: int, host: str, port: int, seconds: float) -> Store:
    """Wait until all ranks have come to a store at HOST:PORT, and say every ten seconds for whom. Collective.

    Rank 0 opens the store, or joins that of torchrun's agent.

    Args:
        seconds: the longest wait.

    Returns the store. On rank 0 it holds the port: keep it until the process group is made.

    Raises:
        ConfigError: for a port in use, or a host that is not rank 0's.
        RankError: where ranks do not come in time.
    """
    deadline = time.monotonic() + seconds
    place = f"{host}:{port} (RANK, WORLD_SIZE are set)"
    if rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        store = _open_store(host, port)
    else:
        _wait_for_port(host, port, f"rank {rank} of {size}: waiting for rank 0 at {place}", deadline)
        store = _connect(host, port, is_master=False)
    store.set(f"{_PREFIX}{rank}", "here")
    count = store.add(f"{_PREFIX}count", 1)
    reminder = _Reminder()
    while count < size:
        if time.monotonic() > deadline:
            raise RankError(f"ranks {_missing(store, size)} of {size} did not come to {place}", "Start all ranks.")
        if reminder.is_due():
            # Only rank 0 asks who it is: the store may have hundreds of ranks to serve.
            who = f"ranks {_missing(store, size)} of {size}" if rank == 0 else f"{size - count} of {size} ranks"
            logger.warning("rank %d: waiting for %s at %s", rank, who, place)
        time.sleep(_POLL_SECONDS)
        count = store.add(f"{_PREFIX}count", 0)
    return store


class _Reminder:
    """Due every ten seconds."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def is_due(self) -> bool:
        if time.monotonic() - self._last < _REMINDER_SECONDS:
            return False
        self._last = time.monotonic()
        return True


def _missing(store: Store, size: int) -> str:
    """The ranks that have not come, as "1, 3 to 7"."""
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

    # Multi-tenant, as torch's rendezvous opens it: both then share one server at the port.
    return TCPStore(
        host,
        port,
        is_master=is_master,
        multi_tenant=is_master,
        wait_for_workers=False,
        timeout=timedelta(seconds=_SELF_SECONDS),
    )


def _wait_for_port(host: str, port: int, message: str, deadline: float) -> None:
    """Until somebody listens there. (A store that is not there would fill the log with torch's warnings.)"""
    reminder = _Reminder()
    while True:
        try:
            socket.create_connection((host, port), timeout=_REMINDER_SECONDS).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise RankError(f"{message}, in vain ({error})", "Start rank 0 there.") from error
        if reminder.is_due():
            logger.warning(message)
        time.sleep(_POLL_SECONDS)
