"""What a command says of a stage that it ran in a subprocess and that did not end well."""

from __future__ import annotations

import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from cllm4rec_dist.cli.child import STOPPED, CommandEnded
from tests.integration.runs import clean_environment


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


_INTERRUPTED = """
import importlib, runpy, sys

class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == "cllm4rec_dist.cli":
            raise KeyboardInterrupt

def interrupt(app):
    raise KeyboardInterrupt

when, script = sys.argv[1:]
if when == "import":
    sys.meta_path.insert(0, Interrupt())
else:
    import typer.main
    typer.main.get_command = interrupt
sys.argv[1:] = ["settings"]
if script:
    module, function = script.split(":")
    getattr(importlib.import_module(module), function)()
else:
    runpy.run_module("cllm4rec_dist", run_name="__main__")
"""
_SCRIPTS = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"][
    "scripts"
]


@pytest.mark.parametrize("when", ["import", "build"])
@pytest.mark.parametrize("script", ["", _SCRIPTS["cllm4rec"]], ids=["python -m", "cllm4rec"])
def test_an_interrupt_before_a_command_begins_ends_it_without_a_traceback(when: str, script: str) -> None:
    command = [sys.executable, "-c", _INTERRUPTED, when, script]
    ended = subprocess.run(command, capture_output=True, text=True, check=False, env=clean_environment())
    assert (ended.returncode, ended.stdout, ended.stderr) == (-signal.SIGINT, "", "")
