"""Run a `cllm4rec` command in a subprocess.

DeepSpeed keeps the process groups of its first engine for the life of a process, so two stages cannot train in one.
Signals to the parent are forwarded to the child, which saves and stops. If the parent dies, the kernel sends the child
SIGTERM.
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STOPPED = 75
"""Exit status of a run that a signal stopped and that the same command resumes (`signals.EXIT_STATUS`)."""
BAD_INPUT = 2
"""Exit status of a command whose input is wrong."""
_FORWARDED_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


class CommandEnded(Exception):
    """A command failed or was stopped.

    Args:
        name: name of the command.
        returncode: its exit status, not 0, or minus the number of the signal that ended it.

    Attributes:
        status: exit status of the command; `STOPPED` if a signal ended it.
    """

    def __init__(self, name: str, returncode: int) -> None:
        self.status = returncode if returncode > 0 else STOPPED
        if returncode < 0:
            what = f"was ended by a signal ({signal.strsignal(-returncode)})"
        elif returncode == STOPPED:
            what = "was stopped and has saved"
        else:
            what = f"ended with status {returncode}"
        super().__init__(f"{name} {what}")


def run_command(name: str, *arguments: str) -> None:
    """Run `cllm4rec NAME ARGUMENTS` and wait until it ends.

    Raises:
        CommandEnded: for any status but 0.
    """
    command = [sys.executable, "-m", "cllm4rec_dist", name, *arguments]
    with subprocess.Popen(command, preexec_fn=_end_with_parent) as child, _forward_signals(child):
        returncode = child.wait()
    if returncode:
        raise CommandEnded(name, returncode)


def _end_with_parent() -> None:
    """Make Linux send SIGTERM to this child process when the parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _forward_signals(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Forward signals to the child, which stops cleanly. Ctrl-C in a terminal reaches the child directly."""

    def forward(signum: int, frame: FrameType | None) -> None:
        if signum != signal.SIGINT or not sys.stdin.isatty():
            child.send_signal(signum)

    handlers = {signum: signal.signal(signum, forward) for signum in _FORWARDED_SIGNALS}
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
