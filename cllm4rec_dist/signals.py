"""Signals that ask a run to stop: it saves first.

SIGTERM (a scheduler takes the machine back), SIGUSR1 (Slurm's `--signal` before the time limit) and SIGINT (Ctrl-C) are
only noted here; the loop asks at the end of each step whether any rank has been told, so that all stop at the same one.
A second SIGINT interrupts at once.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: the run has saved and is not done; the same command goes on with it."""


class GracefulShutdown:
    """While it is entered, notes the signals instead of dying of them. Only a process's main thread can do that; in
    another one (a Ray worker) nothing is noted.

    Attributes:
        signal_name: of the first signal, or None.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in self._SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal_name is not None:
            raise KeyboardInterrupt
        self.signal_name = self.signal_name or signal.Signals(number).name
