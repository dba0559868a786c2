"""Numbers and terms as people read them."""

from types import SimpleNamespace

import pytest

from cllm4rec_dist.corpus.split_settings import GivenSplit, LastSplit, RandomSplit, UsersSplit
from cllm4rec_dist.evaluation import formatting
from cllm4rec_dist.suggestions import plural


def test_numbers():
    assert formatting.share(0.6594) == "65.9%"
    assert [formatting.signed(value) for value in (0.05, -0.05, 0.0)] == ["+0.0500", "−0.0500", "0.0000"]
    assert formatting.signed(-0.00001) == "0.0000"
    assert [formatting.p_value(value) for value in (0.0, 0.0004, 1.0)] == ["p < 0.001", "p < 0.001", "p = 1.000"]
    assert [formatting.short_count(n) for n in (999, 1234, 7_240_000_000, 10**12)] == ["999", "1.23K", "7.24B", "1T"]
    assert [plural(n, "rank") for n in (0, 1, 1200)] == ["0 ranks", "1 rank", "1,200 ranks"]
    assert [formatting.setting(value) for value in (200.0, 0.5, "x")] == ["200", "0.5", "x"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (0.2, "under 1 s"),
        (59.4, "59 s"),
        (60, "1 min"),
        (125, "2 min 5 s"),
        (3600, "1 h"),
        (7800, "2 h 10 min"),
        (90000, "1 d 1 h"),
    ],
)
def test_durations(seconds, text):
    assert formatting.duration(seconds) == text


def test_dates():
    assert formatting.date("2026-11-06T03:20:11+00:00") == "6 November 2026, 03:20 UTC"


def test_backbones_are_named_by_hub_id_or_folder():
    names = {
        "Qwen/Qwen3-0.6B": "Qwen/Qwen3-0.6B",
        "/data/backbones/demo": "demo",
        "./small": "small",
        "gpt2": "gpt2",
    }
    assert {given: formatting.backbone_name(given) for given in names} == names


def test_explanations_of_metrics_and_splits():
    assert "in the list of 20" in formatting.meaning("recall@20")
    assert "to rank 100" in formatting.meaning("ndcg@100")
    assert formatting.split_text(LastSplit(kind="last")) == "last in time: 1 item for the test, 1 for validation"
    random = formatting.split_text(RandomSplit(test=0.2))
    assert random == "random: 20% of a user's items for the test, 10% for validation"
    assert formatting.split_text(GivenSplit(kind="given")) == "as the data set gives it"
    users = formatting.split_text(UsersSplit(kind="users"))
    assert users == (
        "whole users: 10% for the test, 10% for validation, 20% of their items to be predicted; "
        "of the others random: 10% and 10% of a user's items"
    )
    assert formatting.split_text(SimpleNamespace(kind="later")) == "later"
