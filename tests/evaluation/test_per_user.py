"""Pairing of metrics by user, compared with values computed by hand."""

import numpy as np
import polars as pl
import pytest

from cllm4rec_dist.errors import DataError
from cllm4rec_dist.evaluation.per_user import (
    best_rival,
    by_history_length,
    compare_with,
    means,
    read_baselines,
    read_recommended,
    read_users,
)

METRIC = "recall@20"


@pytest.fixture
def users() -> pl.DataFrame:
    return pl.DataFrame(
        {"user": ["a", "b", "c"], "group": ["known"] * 3, "history_length": [1, 2, 9], METRIC: [0.5, 1.0, 0.0]}
    )


@pytest.fixture
def baselines() -> pl.DataFrame:
    """Make baselines with users in another order, one that the model lacks and one in another group."""
    return pl.DataFrame(
        {
            "model": ["EASE"] * 4 + ["iALS"] * 2,
            "user": ["c", "a", "z", "b", "a", "b"],
            "group": ["known", "known", "known", "new", "known", "known"],
            METRIC: [0.5, 0.0, 1.0, 1.0, 0.25, 0.25],
        }
    )


def test_users_are_paired_by_name_and_group(users, baselines):
    rival = compare_with(users, baselines, "EASE", METRIC)
    assert rival is not None
    assert (rival.model, rival.baseline) == (0.25, 0.25)  # a: 0.5 and 0.0, c: 0.0 and 0.5
    assert (rival.test.num_users, rival.test.difference) == (2, 0.0)


def test_the_best_rival_has_the_highest_mean_and_the_first_of_equals_wins(users, baselines):
    better = pl.concat([baselines, baselines.filter(pl.col("model") == "iALS").with_columns(model=pl.lit("Best"))])
    better = better.with_columns(pl.when(pl.col("model") == "Best").then(0.3).otherwise(METRIC).alias(METRIC))
    assert best_rival(users, better, METRIC).name == "Best"
    assert best_rival(users, baselines, METRIC).name == "EASE"


def test_a_value_that_is_missing_leaves_its_pair_out(users, baselines):
    holes = users.with_columns(pl.Series(METRIC, [None, 1.0, 0.0]))
    assert compare_with(holes, baselines, "EASE", METRIC).test.num_users == 1
    assert compare_with(users.with_columns(pl.lit(float("nan")).alias(METRIC)), baselines, "EASE", METRIC) is None


def test_models_without_a_common_user_or_metric_are_not_compared(users, baselines):
    assert compare_with(users, baselines, "absent", METRIC) is None
    assert compare_with(users, baselines, "EASE", "ndcg@5") is None
    assert compare_with(users.head(0), baselines, "EASE", METRIC) is None
    assert best_rival(users, baselines.head(0), METRIC) is None


def test_bins_count_both_models_over_the_same_users(users, baselines):
    first, second = by_history_length(users, baselines, "EASE", METRIC)
    assert (first.first, first.last, first.model.value, first.baseline.value) == (1, 1, 0.5, 0.0)
    assert (second.first, second.last, second.model.value, second.baseline.value) == (9, 9, 0.0, 0.5)
    alone = by_history_length(users, None, None, METRIC)
    assert [(bin.first, bin.last, bin.model.num_users) for bin in alone] == [(1, 1, 1), (2, 2, 1), (9, 9, 1)]
    assert all(bin.baseline is None for bin in alone)
    assert by_history_length(users.head(0), None, None, METRIC) == []


def test_means(users):
    assert means(users, [METRIC, "ndcg@5"])[METRIC].value == 0.5
    assert means(users, [METRIC])[METRIC].stderr == pytest.approx(np.std([0.5, 1, 0]) / np.sqrt(3))
    assert means(users.head(0), [METRIC]) == {}


def test_absent_files_are_none_and_damaged_ones_are_named(tmp_path, users):
    assert read_users(tmp_path) is None
    assert read_baselines(tmp_path) is None
    assert read_recommended(tmp_path) is None
    users.write_parquet(tmp_path / "users.parquet")
    assert read_users(tmp_path).equals(users)
    pl.concat([users, users.head(1)]).write_parquet(tmp_path / "users.parquet")
    with pytest.raises(DataError, match=r"users\.parquet.*distinct"):
        read_users(tmp_path)
    users.drop("group").write_parquet(tmp_path / "users.parquet")
    with pytest.raises(DataError, match=r"users\.parquet.*group"):
        read_users(tmp_path)
    (tmp_path / "recommended.parquet").write_text("nonsense")
    with pytest.raises(DataError, match=r"recommended\.parquet.*not a Parquet file"):
        read_recommended(tmp_path)
