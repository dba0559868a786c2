"""What a command says of a stage that it ran in a subprocess and that did not end well."""

from __future__ import annotations

import signal

import pytest

from cllm4rec_dist.cli.child import STOPPED, CommandEnded


@pytest.mark.parametrize(
    ("returncode", "status", "message"),
    [
        (STOPPED, STOPPED, "evaluate was stopped and has saved"),
        (2, 2, "evaluate ended with status 2"),
        (-signal.SIGTERM, STOPPED, "evaluate was ended by a signal (Terminated)"),
        (-signal.SIGKILL, STOPPED, "evaluate was ended by a signal (Killed)"),
    ],
)
def test_only_a_command_that_says_so_has_saved(returncode: int, status: int, message: str) -> None:
    ended = CommandEnded("evaluate", returncode)
    assert ended.status == status
    assert str(ended) == message
