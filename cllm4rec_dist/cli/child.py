"""A command of ours in a process of its own.

DeepSpeed keeps the groups of its first engine for the life of a process, so two stages cannot train in one. A signal to
the parent reaches the child, which saves and stops; where the parent dies, the child is told to stop by the kernel.
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
"""Exit status of a run that was told to stop and goes on by the same command (`interruption.EXIT_STATUS`)."""
BAD_INPUT = 2
"""Exit status of a command whose input is wrong, which its message names."""
_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
_PR_SET_PDEATHSIG = 1


class CommandEnded(Exception):
    """A command that ended with another status than 0, which it has explained itself.

    Attributes:
        status: its exit status.
    """

    def __init__(self, name: str, status: int) -> None:
        what = "was stopped and has saved" if status == STOPPED else f"ended with status {status}"
        super().__init__(f"{name} {what}")
        self.status = status


def run_command(name: str, *arguments: str) -> None:
    """Run `cllm4rec NAME ARGUMENTS` and wait for its end.

    Raises:
        CommandEnded: for any status but 0; a command that a signal ended counts as stopped.
    """
    command = [sys.executable, "-m", "cllm4rec_dist", name, *arguments]
    with subprocess.Popen(command, preexec_fn=_end_with_parent) as child, _passing_on(child):
        status = child.wait()
    if status:
        raise CommandEnded(name, status if status > 0 else STOPPED)


def _end_with_parent() -> None:
    """In the child: have Linux send SIGTERM when the parent is gone."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


@contextmanager
def _passing_on(child: subprocess.Popen[bytes]) -> Iterator[None]:
    """Inside, signals are the child's: it knows how to stop. (Ctrl-C in a terminal reaches it without us.)"""

    def pass_on(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT or not sys.stdin.isatty():
            child.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
