"""Names the rank and the collective when a run cannot go on, and ends it, instead of a silent wait for a timeout.

Every rank notes where it is: `Watch.collective` around what all ranks enter, `Watch.doing` around work of its own. A
daemon thread sends these notes to rank 0 once a second over a line of its own, so that a rank is heard of while its
main thread is blocked in a collective, whatever the backend. Rank 0's thread looks at all of them (`diagnosis.py`) and
tells everybody one diagnosis. The others watch rank 0 themselves, for nobody else can.

A blocked collective cannot be interrupted: a rank whose main thread does not come back by itself, say from an error of
the backend, logs the diagnosis and leaves by `os._exit`. Seconds are counted by the clock of whoever looks, as time
since something was last heard or has changed; no two hosts' clocks are ever compared.

Two limits, on purpose. Only time inside of `collective` counts as waiting, so that each rank may load a backbone for as
long as it takes. And NCCL's calls return before they are done, so a name is that of the call in which the host waits,
which may come a little after the one that hangs.
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
"""Heartbeats in which a cause may follow its effect, and in which a main thread may come back by itself."""
_LINGER_SECONDS = 30.0
"""What a process may take to tidy up after a fault; a backend may block there for ever."""
_CONNECT_SECONDS = 60.0
_LONGEST_MESSAGE = 4_000
_LONGEST_LINE = 1 << 20
_STDERR = 2


class Watch:
    """Notes where this rank is. By itself the watch of a run of one rank, in which nobody waits for another.

    A context manager around all that a rank does: `with world.watch: function(world)`.
    """

    def __init__(self) -> None:
        self.position = Position()

    def doing(self, name: str) -> _Operation:
        """`with watch.doing("reading a batch")`: work of this rank's own, in which others may have no part."""
        return _Operation(self, name, collective=False)

    def collective(self, name: str) -> _Operation:
        """`with watch.collective("all-reduce of counts")`: all ranks must enter it, in the same order.

        May be nested: autograd runs collectives inside of a backward pass. Only the main thread's belong here.
        """
        return _Operation(self, name, collective=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        return None


class _Operation:
    """Sets the position, one attribute each way. An error leaves it as it is, to tell where the error came from."""

    __slots__ = ("_collective", "_name", "_outer", "_watch")

    def __init__(self, watch: Watch, name: str, *, collective: bool) -> None:
        self._watch, self._name, self._collective = watch, name, collective

    def __enter__(self) -> None:
        self._outer = at = self._watch.position
        moves, entered = at.moves + self._collective, at.entered + self._collective
        self._watch.position = Position(moves, entered, self._name, True, self._collective)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            at, outer = self._watch.position, self._outer
            moves = at.moves + self._collective
            if outer.inside:
                self._watch.position = Position(moves, at.entered, outer.name, True, outer.collective)
            else:
                self._watch.position = Position(moves, at.entered, self._name, False, self._collective)


class Watchdog(Watch):
    """The watch of one rank among several: a thread that tells where this rank is and hears of the others.

    Rank 0 has a line to every rank and makes the diagnosis; the others have one to rank 0. Leaving the context in order
    waits for all ranks to do so. Leaving it with an error tells the others, who end with a `RankError` that names this
    rank and its error. Collective: broadcasts the port and a token, without which nobody is listened to.

    Args:
        rank, size, device: of the world.
        collective_timeout_seconds: the longest that a collective may take, and a rank may be silent.

    Raises:
        ConfigError: where rank 0 cannot be reached.
    """

    def __init__(self, rank: int, size: int, device: torch.device, collective_timeout_seconds: float) -> None:
        super().__init__()
        self._rank, self._hang_seconds = rank, collective_timeout_seconds
        self._interval = min(_HEARTBEAT_SECONDS, collective_timeout_seconds / 10)
        self._patience = _BEATS_OF_PATIENCE * self._interval
        self._state, self._message = RUNS, ""
        self._records = {other: _Record() for other in (range(size) if rank == 0 else (0, rank))}
        self._lines: dict[int, _Line] = {}
        self._clock = _Clock(self._patience)
        self._decided = threading.Event()  # the run has ended, with this diagnosis or in order
        self._diagnosis: Diagnosis | None = None
        self._back = threading.Event()  # the main thread has come back and will end the process itself
        self._urgent = False
        self._selector = selectors.DefaultSelector()
        self._bell, self._ear = socket.socketpair()
        self._selector.register(self._ear, selectors.EVENT_READ, self._wake)
        self._meet(device)
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        self._thread.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave in order, or tell of the error.

        Raises:
            RankError: where another rank is the reason.
        """
        self._back.set()
        if error is None or isinstance(error, SystemExit):
            self._state = DONE
        else:
            # A backend raises RuntimeErrors where another rank is gone: the cause is given a little time to be heard.
            self._state = BROKEN if isinstance(error, RuntimeError) else FAILED
            text = str(error) if isinstance(error, CLLM4RecError) else f"{type(error).__name__}: {error}"
            self._message = text[:_LONGEST_MESSAGE]
        with contextlib.suppress(OSError):  # it is gone where the run has been decided
            self._bell.send(b"!")
        self._decided.wait(None if self._state == DONE else 4 * self._patience)
        self._thread.join(self._patience)
        self._bell.close()
        diagnosis = self._diagnosis
        if error is None and diagnosis is None:
            faulthandler.cancel_dump_traceback_later()
            return
        faulthandler.dump_traceback_later(_LINGER_SECONDS, exit=True, file=_STDERR)
        if diagnosis is not None and self._rank not in diagnosis.raised and not isinstance(error, CLLM4RecError):
            raise RankError(diagnosis.message, diagnosis.cure) from error

    def _meet(self, device: torch.device) -> None:
        """Rank 0 listens, and the others connect to it."""
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
        self._lines[0] = self._add(connection)
        self._lines[0].rank = 0

    # From here on, everything runs in the thread.

    def _run(self) -> None:
        try:
            while not self._decided.is_set():
                for key, _ in self._selector.select(self._interval - self._clock.since_beat()):
                    key.data()
                self._clock.tick()
                if self._urgent or self._clock.since_beat() >= self._interval:
                    self._urgent = False
                    self._clock.beat()
                    self._look()
                    self._tell()
        finally:
            self._decided.set()
            _hand_over([line.socket for line in self._lines.values()], self._patience)
            for key in [*self._selector.get_map().values()]:
                key.fileobj.close()  # type: ignore[union-attr]  # only sockets are registered
        if self._diagnosis is not None:
            self._end(self._diagnosis)

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            self._add(listener.accept()[0])

    def _add(self, connection: socket.socket) -> _Line:
        line = _Line(connection)
        self._selector.register(connection, selectors.EVENT_READ, partial(self._read, line))
        return line

    def _wake(self) -> None:
        self._ear.recv(64)
        self._urgent = True

    def _read(self, line: _Line) -> None:
        messages, stands = line.receive()
        for message in messages:
            if not secrets.compare_digest(str(message.get("token")).encode(), self._token.encode()):
                stands = False
                break
            line.rank = int(message["rank"])
            self._lines[line.rank] = line
            record, state = self._records[line.rank], str(message["state"])
            self._urgent |= state != record.state
            record.hear(Position(*message["position"]), state, str(message["message"]), self._clock.now)
            if message["decided"]:
                diagnosis = message["diagnosis"]
                self._diagnosis = None if diagnosis is None else Diagnosis(**diagnosis)
                self._decided.set()
        if not stands:
            self._selector.unregister(line.socket)
            line.socket.close()
            # Nobody leaves before all are told of the end; who has told of its error is known by that.
            if line.rank is not None and self._records[line.rank].state != FAILED:
                self._records[line.rank].state = LOST
                self._urgent = True

    def _look(self) -> None:
        """Decide on the end of the run: rank 0 for all, the others where rank 0 does not answer."""
        if self._decided.is_set():
            return
        now = self._clock.now
        self._records[self._rank].hear(self.position, self._state, self._message, now)
        ranks = {rank: record.sighting(now) for rank, record in self._records.items()}
        if self._rank == 0 and all(seen.state == DONE for seen in ranks.values()):
            self._decided.set()
        elif self._rank == 0 or ranks[0].state == LOST or ranks[0].silent > self._hang_seconds:
            self._diagnosis = diagnose(ranks, self._hang_seconds, self._patience)
            if self._diagnosis is not None:
                self._decided.set()

    def _tell(self) -> None:
        # Where this process's Python stands still for so long, not even this thread can end it; a thread in C can.
        faulthandler.dump_traceback_later(2 * self._hang_seconds, exit=True, file=_STDERR)
        message = {
            "token": self._token,
            "rank": self._rank,
            "position": self.position,
            "state": self._state,
            "message": self._message,
            "decided": self._rank == 0 and self._decided.is_set(),
            "diagnosis": self._diagnosis and asdict(self._diagnosis),
        }
        for line in self._lines.values():
            line.send(message)

    def _end(self, diagnosis: Diagnosis) -> None:
        """Leave the last word to the main thread, if it comes back in time."""
        faulthandler.dump_traceback_later(self._patience + _LINGER_SECONDS, exit=True, file=_STDERR)
        if self._rank in diagnosis.stacks and self._state == RUNS:
            faulthandler.dump_traceback(file=_STDERR)
        if not self._back.wait(self._patience):
            logger.error("%s", RankError(diagnosis.message, diagnosis.cure))
            logging.shutdown()
            os._exit(RankError.exit_status)


class _Clock:
    """Seconds that this thread has seen go by; those in which its own process was stopped count little.

    Args:
        longest: what a single wait may count.
    """

    def __init__(self, longest: float) -> None:
        self.now, self._longest, self._ticked = 0.0, longest, time.monotonic()
        self._beaten = -longest

    def tick(self) -> None:
        ticked = time.monotonic()
        self.now += min(ticked - self._ticked, self._longest)
        self._ticked = ticked

    def beat(self) -> None:
        self._beaten = self.now

    def since_beat(self) -> float:
        return self.now - self._beaten


class _Record:
    """What one rank last said, and when."""

    def __init__(self) -> None:
        self.position, self.state, self.message = Position(), RUNS, ""
        self._moved_at = self._heard_at = 0.0

    def hear(self, position: Position, state: str, message: str, now: float) -> None:
        if (position, state) != (self.position, self.state):
            self._moved_at = now
        self._heard_at = now
        self.position, self.state, self.message = position, state, message

    def sighting(self, now: float) -> RankStatus:
        return RankStatus(self.position, self.state, self.message, now - self._moved_at, now - self._heard_at)


class _Line:
    """JSON messages, one a line, over a socket that never blocks.

    Attributes:
        rank: on the other side, once it is known.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(False)
        self.socket, self._unread = connection, b""
        self.rank: int | None = None

    def send(self, message: Mapping[str, Any]) -> None:
        """Send, or drop it where the other side is gone or does not read, which will be noticed anyway."""
        with contextlib.suppress(OSError):
            self.socket.send(json.dumps(message).encode() + b"\n")

    def receive(self) -> tuple[list[dict[str, Any]], bool]:
        """Messages that have come, and whether the line still stands."""
        stands = True
        try:
            while stands and len(self._unread) < _LONGEST_LINE:
                data = self.socket.recv(1 << 16)
                self._unread += data
                stands = bool(data)
        except BlockingIOError:
            pass
        except OSError:
            stands = False
        *lines, self._unread = self._unread.split(b"\n")
        try:
            messages = [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            return [], False  # not one of ours
        return messages, stands and len(self._unread) < _LONGEST_LINE


def _hand_over(connections: list[socket.socket], seconds: float) -> None:
    """Wait until the other sides have closed, having read the last message.

    To close a connection with unread messages would make TCP throw away what is still under way to the other side.
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
