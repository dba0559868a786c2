"""Run `cllm4rec` commands in subprocesses.

DeepSpeed keeps the process groups of its first engine for the life of a process, so two stages cannot train in one.
Signals to the parent are forwarded to the children, which save and stop. If the parent dies, the kernel sends them
SIGTERM.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from types import FrameType
from typing import Self

STOPPED = 75
"""Exit status of a run that a signal stopped and that the same command resumes (`signals.EXIT_STATUS`)."""
BAD_INPUT = 2
"""Exit status of a command whose input is wrong."""
_FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1
_LAST_LINES = 5
"""Lines of a log that a failure shows."""
_LIBC = ctypes.CDLL(None)  # not loaded between fork and exec, where another thread may hold the loader's lock


class CommandEnded(Exception):
    """A command failed or was stopped.

    Args:
        name: name of the command.
        returncode: its exit status, not 0, or minus the number of the signal that ended it.
        log: file with its output, if that was not shown; the message has its last lines.

    Attributes:
        status: exit status of the command; `STOPPED` if a signal ended it.
    """

    def __init__(self, name: str, returncode: int, log: Path | None = None) -> None:
        self.status = returncode if returncode > 0 else STOPPED
        if returncode < 0:
            what = f"was ended by a signal ({signal.strsignal(-returncode)})"
        elif returncode == STOPPED:
            what = "was stopped and has saved"
        else:
            what = f"ended with status {returncode}"
            if log is not None:
                what += f"; the end of {log}:\n{_last_lines(log)}"
        super().__init__(f"{name} {what}")


class Commands:
    """Runs commands from any thread until a signal stops them.

    Within this context, which the main thread enters, signals are forwarded to all running commands, and no other
    command starts after one.
    """

    def __init__(self) -> None:
        self._running: set[subprocess.Popen[bytes]] = set()
        self._stopped_by: int | None = None

    def __enter__(self) -> Self:
        self._handlers = {signum: signal.signal(signum, self._forward) for signum in _FORWARDED_SIGNALS}
        return self

    def __exit__(self, *exception: object) -> None:
        for signum, handler in self._handlers.items():
            signal.signal(signum, handler)

    def run(
        self, name: str, *arguments: str, log: Path | None = None, environment: Mapping[str, str] | None = None
    ) -> None:
        """Run `cllm4rec NAME ARGUMENTS` and wait until it ends.

        Args:
            log: file to append its output to, instead of showing it.
            environment: variables to set for it.

        Raises:
            CommandEnded: for any status but 0, or if a signal has stopped these commands.
        """
        if self._stopped_by is not None:
            raise CommandEnded(name, -self._stopped_by)
        command = [sys.executable, "-m", "cllm4rec_dist", name, *arguments]
        with ExitStack() as stack:
            output = None if log is None else stack.enter_context(log.open("ab"))
            variables = {**os.environ, **(environment or {})}
            child = stack.enter_context(
                subprocess.Popen(command, stdout=output, stderr=output, env=variables, preexec_fn=_end_with_parent)
            )
            self._running.add(child)
            if self._stopped_by is not None:  # while it was being started
                child.send_signal(self._stopped_by)
            try:
                returncode = child.wait()
            finally:
                self._running.discard(child)
        if returncode:
            raise CommandEnded(name, returncode, log)

    def _forward(self, signum: int, frame: FrameType | None) -> None:
        self._stopped_by = signum
        # Ctrl-C in a terminal reaches the children directly.
        if signum != signal.SIGINT or not sys.stdin.isatty():
            for child in list(self._running):
                child.send_signal(signum)


def run_command(name: str, *arguments: str) -> None:
    """Run `cllm4rec NAME ARGUMENTS` and wait until it ends.

    Raises:
        CommandEnded: for any status but 0.
    """
    with Commands() as commands:
        commands.run(name, *arguments)


def _end_with_parent() -> None:
    """Make Linux send SIGTERM to this child process when the parent dies."""
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def _last_lines(log: Path) -> str:
    with log.open(encoding="utf-8", errors="replace") as lines:
        return "".join(deque(lines, _LAST_LINES)).rstrip()
