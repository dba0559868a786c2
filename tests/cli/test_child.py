"""What a command says of a stage that it ran in a subprocess and that did not end well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from cllm4rec_dist.cli.child import BAD_INPUT, STOPPED, CommandEnded, Commands
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


_SAVES_AND_STOPS = """#!/bin/sh
trap 'echo saved; exit 75' TERM
echo "$3 $CUDA_VISIBLE_DEVICES"
while :; do sleep 0.02; done
"""


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_signal_stops_all_running_commands_and_no_other_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "program"
    program.write_text(_SAVES_AND_STOPS)
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    logs = [tmp_path / name for name in ("a.log", "b.log")]
    before = signal.getsignal(signal.SIGTERM)
    with Commands() as commands, ThreadPoolExecutor(2) as executor:
        running = [
            executor.submit(commands.run, "pretrain", log=log, environment={"CUDA_VISIBLE_DEVICES": str(gpu)})
            for gpu, log in enumerate(logs)
        ]
        wait_for(lambda: all(log.exists() and log.read_text() for log in logs))
        os.kill(os.getpid(), signal.SIGTERM)
        for future in running:
            with pytest.raises(CommandEnded, match="was stopped and has saved"):
                future.result(timeout=60)
        with pytest.raises(CommandEnded, match="ended by a signal") as ended:
            commands.run("finetune")
    assert ended.value.status == STOPPED
    assert [log.read_text() for log in logs] == ["pretrain 0\nsaved\n", "pretrain 1\nsaved\n"]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failure_shows_the_end_of_its_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("".join(f"line {line}\n" for line in range(20)))
    with pytest.raises(CommandEnded, match="ended with status 2") as ended, Commands() as commands:
        commands.run("settings", "--no-such-option", log=log)
    assert ended.value.status == BAD_INPUT
    assert f"the end of {log}:" in str(ended.value)
    assert "--no-such-option" in str(ended.value)
    assert log.read_text().startswith("line 0\n")


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
