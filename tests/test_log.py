"""Progress where there is no terminal."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from cllm4rec_dist import log
from cllm4rec_dist.log import progress_bar
from tests.harness import alone


def test_without_a_terminal_progress_is_a_line_at_times(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = [0.0]
    monkeypatch.setattr(log.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(logging.getLogger("cllm4rec_dist"), "propagate", True)
    caplog.set_level(logging.INFO, "cllm4rec_dist")
    bar = progress_bar(alone(), 100, "pretrain", "step", 40)
    for _ in range(30):  # a step a second
        clock[0] += 1.0
        bar.update()
        bar.set_description(f"pretrain at {clock[0]:.0f}")
    bar.close()
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "pretrain at 9: 50/100 steps [00:10<00:50,  1.00step/s]",
        "pretrain at 19: 60/100 steps [00:20<00:40,  1.00step/s]",
        "pretrain at 29: 70/100 steps [00:30<00:30,  1.00step/s]",
    ]
    assert "\r" not in capsys.readouterr().err


def test_other_ranks_say_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "LINE_SECONDS", 0.0)
    monkeypatch.setattr(logging.getLogger("cllm4rec_dist"), "propagate", True)
    progress_bar(replace(alone(), rank=1, size=2), 10, "x", "step").update()
    assert not caplog.records
