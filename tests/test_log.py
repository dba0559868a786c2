"""Progress where there is no terminal."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
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
    caplog.set_level(logging.INFO, "cllm4rec_dist")
    bar = progress_bar(alone(), 100, "pretrain", "step", 40)
    for _ in range(30):  # a step a second
        clock[0] += 1.0
        bar.update()
        bar.set_description(f"pretrain at {clock[0]:.0f}")
    bar.close()
    lines = [record.getMessage() for record in caplog.records]
    assert lines == [
        "pretrain at 9: 50/100 steps [00:10<00:50,  1.00step/s]",
        "pretrain at 19: 60/100 steps [00:20<00:40,  1.00step/s]",
        "pretrain at 29: 70/100 steps [00:30<00:30,  1.00step/s]",
    ]
    assert "\r" not in capsys.readouterr().err


def test_other_ranks_say_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "LINE_SECONDS", 0.0)
    progress_bar(replace(alone(), rank=1, size=2), 10, "x", "step").update()
    assert not caplog.records


@pytest.fixture
def package() -> Iterator[logging.Logger]:
    """The package's logger, which is afterwards as it was."""
    logger = logging.getLogger("cllm4rec_dist")
    handlers, propagate, level = logger.handlers, logger.propagate, logger.level
    logger.handlers = []
    yield logger
    logger.handlers, logger.propagate = handlers, propagate
    logger.setLevel(level)  # which also forgets what it has found to be enabled


def test_lines_have_a_level_and_a_rank_only_where_something_is_wrong(
    package: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    outputs = []
    for world in (None, replace(alone(), rank=1, size=2)):
        log.setup_logging(world)
        package.info("a fact")
        package.warning("a danger")
        outputs.append([line[9:] for line in capsys.readouterr().err.splitlines()])
    assert outputs == [["a fact", "WARNING a danger"], ["[rank 1/2] WARNING a danger"]]


def test_a_line_is_written_above_the_bar_of_a_terminal(
    package: logging.Logger, capsys: pytest.CaptureFixture[str]
) -> None:
    log.setup_logging()
    bar = progress_bar(replace(alone(), has_terminal=True), 10, "finetune", "step", 4)
    package.info("a fact")
    bar.close()
    assert re.search(r"finetune:  40%[^\r]*\r +\r\d\d:\d\d:\d\d a fact\n\rfinetune:  40%", capsys.readouterr().err)


def test_only_the_notice_that_there_is_no_gpu_is_dropped(caplog: pytest.LogCaptureFixture) -> None:
    library = logging.getLogger("DeepSpeed")
    log.hide_accelerator_notice()
    log.hide_accelerator_notice()
    library.addHandler(caplog.handler)
    library.warning("Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.")
    library.warning("a danger")
    library.removeHandler(caplog.handler)
    assert {record.getMessage() for record in caplog.records} == {"a danger"}
