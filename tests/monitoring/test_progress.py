"""Progress of a run as text."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cllm4rec_dist.monitoring.progress import (
    EpochMeter,
    EpochReport,
    Schedule,
    Validation,
    format_best,
    format_duration,
    format_end,
    format_epoch,
    format_losses,
    format_rows,
    format_validation,
)

SCHEDULE = Schedule(0, 118, 10)
EPOCH = EpochReport(
    epoch=3,
    num_epochs=12,
    losses={"items": 4.678, "text": 4.846, "mutual": 5.12e-5},
    lr=6e-4,
    validation=Validation({"recall@20": 0.65861, "ndcg@100": 0.43399}, is_best=True),
    tokens_per_second=9120.4,
    eta=65.2,
)


def test_the_line_of_an_epoch() -> None:
    assert format_epoch(EPOCH) == (
        "epoch  3/12  loss 9.524 (items 4.678, text 4.846, mutual 5.1e-05)  lr 6.0e-04"
        "  recall@20 0.6586, ndcg@100 0.4340 * best  9,120 tokens/s  ETA 1 min 05 s"
    )
    last = replace(EPOCH, epoch=12, losses={"items": 4.0}, validation=Validation({}), eta=None)
    assert format_epoch(last) == "epoch 12/12  loss 4.000 (items 4.000)  lr 6.0e-04  9,120 tokens/s"
    worse = replace(EPOCH, losses={"items": 4.0}, validation=replace(EPOCH.validation, is_best=False))
    assert "0.4340  9,120 tokens/s" in format_epoch(worse)


def test_a_validation_with_a_linear_memory_shows_each_part_alone() -> None:
    parts = {"llm": {"recall@20": 0.1671, "ndcg@100": 0.112}, "linear": {"recall@20": 0.1774, "ndcg@100": 0.113}}
    validation = Validation({"recall@20": 0.187, "ndcg@100": 0.122}, True, parts, 131.4)
    assert format_validation(validation) == (
        "recall@20 0.1870, ndcg@100 0.1220 * best"
        " (recall@20: LLM alone 0.1671, linear memory alone 0.1774, weight 131.4)"
    )
    assert format_validation(Validation({"recall@20": 0.25}, new_item_offset=-2.0625)) == (
        "recall@20 0.2500 (offset of new items -2.0625)"
    )
    both = format_validation(replace(validation, new_item_offset=-4))
    assert both.endswith("weight 131.4, offset of new items -4)")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (-1, "0 s"),
        (0.4, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (125, "2 min 05 s"),
        (3599.7, "1 h 00 min"),
        (11_220, "3 h 07 min"),
        (187_200, "2 d 04 h"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert format_duration(seconds) == text


def test_rows_are_aligned() -> None:
    assert format_rows([("data", "demo"), ("precision", "fp32")]) == "  data       demo\n  precision  fp32"
    assert format_rows([]) == ""


def test_small_losses_keep_two_digits() -> None:
    assert format_losses({"items": 1.0, "mutual": 0.00049}) == "1.000 (items 1.000, mutual 4.9e-04)"
    assert format_losses({"items": 1.0, "mutual": 0.0}) == "1.000 (items 1.000, mutual 0.000)"


def test_steps_and_their_epochs() -> None:
    assert SCHEDULE.num_epochs == 12
    assert [SCHEDULE.epoch(step) for step in (0, 1, 10, 11, 118)] == [1, 1, 1, 2, 12]
    assert [step for step in range(1, 119) if SCHEDULE.ends_epoch(step)] == [*range(10, 119, 10), 118]


def test_the_closing_line() -> None:
    best = format_best("recall@20", 0.67417, 40, SCHEDULE)
    assert best == "best recall@20 0.6742 at epoch 4 of 12 (step 40)"
    assert format_end("finetune", 118, SCHEDULE, 133, result=best) == f"finetune done in 2 min 13 s: {best}"
    assert format_end("finetune", 70, SCHEDULE, 80, result=best, stopped_early=True) == (
        f"finetune done in 1 min 20 s, stopped early after epoch 7 of 12: {best}"
    )
    assert format_end("pretrain", 46, SCHEDULE, 9, result="", signal_name="SIGTERM") == (
        "pretrain interrupted by SIGTERM after 9 s: saved at step 46 of 118; run the same command to continue"
    )
    again = Schedule(118, 118, 10)
    assert format_end("finetune", 118, again, 3, result=best) == (
        f"finetune is already done: {best}; raise epochs to train longer"
    )


def test_the_meter_takes_means_over_the_steps_of_one_epoch() -> None:
    meter = EpochMeter()
    assert (meter.losses, meter.tokens_per_second) == ({}, 0.0)
    meter.add({"items": 4.0, "text": 1.0}, tokens=100, seconds=1.0)
    meter.add({"items": 2.0, "text": 2.0}, tokens=300, seconds=3.0)
    assert meter.losses == {"items": 3.0, "text": 1.5}
    assert meter.tokens_per_second == 100.0
    meter.reset()
    meter.add({"items": 1.0}, tokens=10, seconds=1.0)
    assert meter.losses == {"items": 1.0}
