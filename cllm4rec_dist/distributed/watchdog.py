"""Ends a run that cannot continue, with the rank at fault and the collective, instead of a silent wait for a timeout.

Every rank records its current operation: `Watch.collective` for collectives, `Watch.doing` for local work. A daemon
thread reports it to rank 0 once a second over a TCP connection, also while the main thread is blocked in a collective,
with any backend. Rank 0's thread examines the reports of all ranks (`diagnosis.py`) and sends one diagnosis to all. The
other ranks watch rank 0.

A blocked collective cannot be interrupted: a rank whose main thread does not return by itself, such as by an error of
the backend, logs the diagnosis and calls `os._exit`. Each process measures times since the last report or change by its
local clock; clocks of two hosts are never compared.

Two deliberate limits: only time inside of `collective` counts as waiting, so that a rank may load a backbone for as
long as it takes. And NCCL calls return before they complete, so that the name is that of the call in which the host
waits, which may be a later one than the call that hangs.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import secrets
import selectors
import socket
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from types import TracebackType
from typing import Any, Self

import torch
import torch.distributed as dist

from cllm4rec_dist.distributed.diagnosis import (
    BROKEN,
    DONE,
    FAILED,
    LOST,
    RUNS,
    Diagnosis,
    Position,
    RankStatus,
    diagnose,
)
from cllm4rec_dist.errors import CLLM4RecError, ConfigError, RankError

logger = logging.getLogger(__name__)

_HEARTBEAT_SECONDS = 1.0
_BEATS_OF_PATIENCE = 5
"""Heartbeats to wait for the report of a cause after its effect, and for a main thread to return by itself."""
_LINGER_SECONDS = 30.0
"""How long a process may take to clean up after a fault; a backend may block there forever."""
_CONNECT_SECONDS = 60.0
_MAX_ERROR_LENGTH = 4_000
_MAX_MESSAGE_BYTES = 1 << 20
_STDERR = 2


class Watch:
    """Records the current operation of this rank. This base class is the watch of a run of one rank.

    It is a context manager around all work of a rank: `with world.watch: function(world)`.
    """

    def __init__(self) -> None:
        self.position = Position()

    def doing(self, name: str) -> _Operation:
        """Record local work, as in `with watch.doing("reading a batch")`. Ranks may differ in it."""
        return _Operation(self, name, collective=False)

    def collective(self, name: str) -> _Operation:
        """Record a collective of the main thread, as in `with watch.collective("all-reduce of counts")`.

        All ranks must do so in the same order. It may be nested, because autograd runs collectives in a backward pass.
        """
        return _Operation(self, name, collective=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class _Operation:
    """Sets the watch's position on entry and exit. An error does not change it, to show where the error occurred."""

    __slots__ = ("_collective", "_name", "_outer", "_watch")

    def __init__(self, watch: Watch, name: str, *, collective: bool) -> None:
        self._watch, self._name, self._collective = watch, name, collective

    def __enter__(self) -> None:
        self._outer = outer = self._watch.position
        moves, entered = outer.moves + self._collective, outer.entered + self._collective
        self._watch.position = Position(moves, entered, self._name, True, self._collective)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            inner, outer = self._watch.position, self._outer
            moves = inner.moves + self._collective
            name, collective = (outer.name, outer.collective) if outer.inside else (self._name, self._collective)
            self._watch.position = Position(moves, inner.entered, name, outer.inside, collective)


class Watchdog(Watch):
    """The watch of a rank among several: a thread that reports this rank's position and receives the others'.

    Rank 0 is connected to every rank and makes the diagnosis. Leaving the context without error waits until all ranks
    do so. Leaving it with an error reports that to the other ranks, which raise a `RankError` that names this rank and
    its error. Collective: broadcasts the port, and a token that every message must have.

    Args:
        rank, size, device: as in `World`.
        collective_timeout_seconds: the longest time that a collective may take, and that a rank may be silent.

    Raises:
        ConfigError: if rank 0 cannot be reached.
    """

    def __init__(self, rank: int, size: int, device: torch.device, collective_timeout_seconds: float) -> None:
        super().__init__()
        self._rank, self._timeout = rank, collective_timeout_seconds
        self._interval = min(_HEARTBEAT_SECONDS, collective_timeout_seconds / 10)
        self._patience = _BEATS_OF_PATIENCE * self._interval
        self._state, self._message = RUNS, ""
        self._records = {other: _Record() for other in (range(size) if rank == 0 else (0, rank))}
        self._connections: dict[int, _Connection] = {}
        self._clock = _ActiveClock(self._patience)
        self._decided = threading.Event()  # the run has ended, with `_diagnosis` or without error
        self._diagnosis: Diagnosis | None = None
        self._main_is_leaving = threading.Event()  # the main thread has returned and will end the process
        self._urgent = False
        self._selector = selectors.DefaultSelector()
        self._wake_sender, self._wake_receiver = socket.socketpair()
        self._selector.register(self._wake_receiver, selectors.EVENT_READ, self._wake)
        self._connect(device)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Report the end of this rank, with its error if there is one, and wait for the end of the run.

        Raises:
            RankError: if another rank is the cause.
        """
        self._main_is_leaving.set()
        if error is None or isinstance(error, SystemExit):
            self._state = DONE
        else:
            # A backend raises a RuntimeError if another rank is gone; diagnose() waits a little for that cause.
            self._state = BROKEN if isinstance(error, RuntimeError) else FAILED
            text = str(error) if isinstance(error, CLLM4RecError) else f"{type(error).__name__}: {error}"
            self._message = text[:_MAX_ERROR_LENGTH]
        with contextlib.suppress(OSError):  # closed if the run has been decided
            self._wake_sender.send(b"!")
        self._decided.wait(None if self._state == DONE else 4 * self._patience)
        self._thread.join(self._patience)
        self._wake_sender.close()
        diagnosis = self._diagnosis
        if error is None and diagnosis is None:
            faulthandler.cancel_dump_traceback_later()
            return
        faulthandler.dump_traceback_later(_LINGER_SECONDS, exit=True, file=_STDERR)
        if diagnosis is not None and self._rank not in diagnosis.raised and not isinstance(error, CLLM4RecError):
            raise RankError(diagnosis.message, diagnosis.cure) from error

    def _connect(self, device: torch.device) -> None:
        """Listen on rank 0, and connect the other ranks to it."""
        listener = _listen() if self._rank == 0 else None
        port = 0 if listener is None else listener.getsockname()[1]
        shared = torch.tensor([port, secrets.randbits(62), secrets.randbits(62)], device=device)
        with self.collective("broadcast of the watchdog's port"):
            dist.broadcast(shared, 0)
            port, *token = shared.tolist()
        self._token = "-".join(map(str, token))
        if listener is not None:
            self._selector.register(listener, selectors.EVENT_READ, partial(self._accept, listener))
            return
        host = os.environ["MASTER_ADDR"]
        try:
            connection = socket.create_connection((host, port), timeout=_CONNECT_SECONDS)
        except OSError as error:
            raise ConfigError(
                "MASTER_ADDR",
                f"{host}:{port}",
                f"cannot be reached from rank {self._rank} ({error})",
                "Let the hosts of a run connect to each other on all ports.",
            ) from error
        self._connections[0] = self._add(connection)
        self._connections[0].rank = 0

    # All methods below run in the thread.

    def _run(self) -> None:
        try:
            while not self._decided.is_set():
                for key, _ in self._selector.select(self._interval - self._clock.since_beat()):
                    key.data()
                self._clock.tick()
                if self._urgent or self._clock.since_beat() >= self._interval:
                    self._urgent = False
                    self._clock.beat()
                    self._examine()
                    self._report()
        finally:
            self._decided.set()
            _drain([connection.socket for connection in self._connections.values()], self._patience)
            for key in [*self._selector.get_map().values()]:
                key.fileobj.close()  # type: ignore[union-attr]  # only sockets are registered
        if self._diagnosis is not None:
            self._end(self._diagnosis)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._add(listener.accept()[0])

    def _add(self, accepted: socket.socket) -> _Connection:
        connection = _Connection(accepted)
        self._selector.register(accepted, selectors.EVENT_READ, partial(self._read, connection))
        return connection

    def _wake(self) -> None:
        self._wake_receiver.recv(64)
        self._urgent = True

    def _read(self, connection: _Connection) -> None:
        messages, is_open = connection.receive()
        for message in messages:
            if not secrets.compare_digest(str(message.get("token")).encode(), self._token.encode()):
                is_open = False
                break
            connection.rank = int(message["rank"])
            self._connections[connection.rank] = connection
            record, state = self._records[connection.rank], str(message["state"])
            self._urgent |= state != record.state
            record.update(Position(*message["position"]), state, str(message["message"]), self._clock.now)
            if message["decided"]:
                diagnosis = message["diagnosis"]
                self._diagnosis = None if diagnosis is None else Diagnosis(**diagnosis)
                self._decided.set()
        if not is_open:
            self._selector.unregister(connection.socket)
            connection.socket.close()
            # A rank stays connected until the end of the run is decided, unless it has reported its error.
            if connection.rank is not None and self._records[connection.rank].state != FAILED:
                self._records[connection.rank].state = LOST
                self._urgent = True

    def _examine(self) -> None:
        """Decide whether the run has ended: rank 0 for all ranks, the others if rank 0 does not answer."""
        if self._decided.is_set():
            return
        now = self._clock.now
        self._records[self._rank].update(self.position, self._state, self._message, now)
        ranks = {rank: record.status(now) for rank, record in self._records.items()}
        if self._rank == 0 and all(status.state == DONE for status in ranks.values()):
            self._decided.set()
        elif self._rank == 0 or ranks[0].state == LOST or ranks[0].silent > self._timeout:
            self._diagnosis = diagnose(ranks, self._timeout, self._patience)
            if self._diagnosis is not None:
                self._decided.set()

    def _report(self) -> None:
        # If the interpreter is blocked, this thread cannot end the process either; faulthandler's C thread can.
        faulthandler.dump_traceback_later(2 * self._timeout, exit=True, file=_STDERR)
        message = {
            "token": self._token,
            "rank": self._rank,
            "position": self.position,
            "state": self._state,
            "message": self._message,
            "decided": self._rank == 0 and self._decided.is_set(),
            "diagnosis": self._diagnosis and asdict(self._diagnosis),
        }
        for connection in self._connections.values():
            connection.send(message)

    def _end(self, diagnosis: Diagnosis) -> None:
        """End the process, unless the main thread returns in time and does so."""
        faulthandler.dump_traceback_later(self._patience + _LINGER_SECONDS, exit=True, file=_STDERR)
        if self._rank in diagnosis.stacks and self._state == RUNS:
            faulthandler.dump_traceback(file=_STDERR)
        if not self._main_is_leaving.wait(self._patience):
            logger.error("%s", RankError(diagnosis.message, diagnosis.cure))
            logging.shutdown()
            os._exit(RankError.exit_status)


class _ActiveClock:
    """Clock in seconds that hardly advances while this process is stopped.

    Args:
        max_tick: the most that the clock advances between two ticks.
    """

    def __init__(self, max_tick: float) -> None:
        self.now, self._max_tick, self._last_tick = 0.0, max_tick, time.monotonic()
        self._last_beat = -max_tick

    def tick(self) -> None:
        tick = time.monotonic()
        self.now += min(tick - self._last_tick, self._max_tick)
        self._last_tick = tick

    def beat(self) -> None:
        self._last_beat = self.now

    def since_beat(self) -> float:
        return self.now - self._last_beat


class _Record:
    """Last report of a rank, and its time."""

    def __init__(self) -> None:
        self.position, self.state, self.message = Position(), RUNS, ""
        self._changed_at = self._reported_at = 0.0

    def update(self, position: Position, state: str, message: str, now: float) -> None:
        if (position, state) != (self.position, self.state):
            self._changed_at = now
        self._reported_at = now
        self.position, self.state, self.message = position, state, message

    def status(self, now: float) -> RankStatus:
        return RankStatus(self.position, self.state, self.message, now - self._changed_at, now - self._reported_at)


class _Connection:
    """Sends and receives JSON messages, one per line, over a non-blocking socket.

    Attributes:
        rank: rank of the other side, after its first message.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        self.socket, self._unread = connected, b""
        self.rank: int | None = None

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message, or drop it if the other side is gone or does not read, which is detected elsewhere."""
        with contextlib.suppress(OSError):
            self.socket.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """Return the received messages, and True if the connection is still open."""
        is_open = True
        try:
            while is_open and len(self._unread) < _MAX_MESSAGE_BYTES:
                data = self.socket.recv(1 << 16)
                self._unread += data
                is_open = bool(data)
        except BlockingIOError:
            pass
        except OSError:
            is_open = False
        *lines, self._unread = self._unread.split(b"\n")
        try:
            messages = [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            return [], False  # not from a watchdog
        return messages, is_open and len(self._unread) < _MAX_MESSAGE_BYTES


def _drain(connections: list[socket.socket], seconds: float) -> None:
    """Shut down sending and wait until the other sides have closed.

    Closing a connection with unread messages would make TCP discard what is still in flight to the other side.
    """
    deadline = time.monotonic() + seconds
    for connection in connections:
        with contextlib.suppress(OSError):
            connection.shutdown(socket.SHUT_WR)
    for connection in connections:
        with contextlib.suppress(OSError):
            while (left := deadline - time.monotonic()) > 0:
                connection.settimeout(left)
                if not connection.recv(1 << 16):
                    break


def _listen() -> socket.socket:
    if socket.has_dualstack_ipv6():
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", 0))
