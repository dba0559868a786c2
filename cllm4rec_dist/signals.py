"""Signals that stop a run after it has saved a checkpoint.

SIGTERM (preemption by a scheduler), SIGUSR1 (Slurm's `--signal` before the time limit) and SIGINT (Ctrl-C) are only
recorded here; the training loop checks after each step whether any rank has received one, so that all ranks stop at the
same step. A second SIGINT interrupts at once.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

EXIT_STATUS = 75
"""EX_TEMPFAIL of sysexits.h: the run has saved but is not complete; the same command resumes it."""


class GracefulShutdown:
    """Context manager that records the signals instead of ending the process.

    Only the main thread of a process can handle signals; in another thread (of a Ray worker) it does nothing.

    Attributes:
        signal_name: name of the first signal, or None.
    """

    _SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

    def __init__(self) -> None:
        self.signal_name: str | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {signum: signal.signal(signum, self._record) for signum in self._SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def _record(self, signum: int, frame: FrameType | None) -> None:
        if signum == signal.SIGINT and self.signal_name is not None:
            raise KeyboardInterrupt
        self.signal_name = self.signal_name or signal.Signals(signum).name
