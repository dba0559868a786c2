"""Metrics by user of a model and its baselines, paired by user.

Legend: M metrics, n users.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from cllm4rec_dist.errors import DataError
from cllm4rec_dist.evaluation.files import (
    BASELINES_FILE,
    BASELINES_RECOMMENDED_FILE,
    PARTS_FILE,
    RECOMMENDED_FILE,
    USERS_FILE,
)
from cllm4rec_dist.evaluation.statistics import FloatArray, Mean, PairedTest, length_bins, mean_of, paired_test

GROUPS = ("known", "new")
_PAIR = ["user", "group"]


@dataclass(frozen=True)
class Rival:
    """Comparison of a model with one baseline in one metric, over users that both have.

    Attributes:
        model, baseline: means over these users.
    """

    metric: str
    name: str
    model: float
    baseline: float
    test: PairedTest


@dataclass(frozen=True)
class LengthBin:
    """Users with a history of `first` to `last` items."""

    first: int
    last: int
    model: Mean
    baseline: Mean | None


def read_users(folder: Path) -> pl.DataFrame | None:
    """Read `users.parquet`: user, group, history_length and a column for each metric; None if there is no file.

    Raises:
        DataError: for a file that cannot be read, lacks a column or repeats a user.
    """
    return _read(folder / USERS_FILE, {"user", "group", "history_length"}, _PAIR)


def read_baselines(folder: Path) -> pl.DataFrame | None:
    """Read `baselines.parquet`: model, user, group and a column for each metric; None if there is no file.

    Raises:
        DataError: as `read_users`.
    """
    return _read(folder / BASELINES_FILE, {"model", "user", "group"}, ["model", *_PAIR])


def read_parts(folder: Path) -> pl.DataFrame | None:
    """Read `parts.parquet`: as `read_baselines`, of the LLM alone and of the linear memory alone.

    Raises:
        DataError: as `read_users`.
    """
    return _read(folder / PARTS_FILE, {"model", "user", "group"}, ["model", *_PAIR])


def read_recommended(folder: Path) -> pl.DataFrame | None:
    """Read `recommended.parquet`: item and the number of lists that contain it; None if there is no file.

    Raises:
        DataError: as `read_users`.
    """
    return _read(folder / RECOMMENDED_FILE, {"item", "count"}, ["item"])


def read_baselines_recommended(folder: Path) -> dict[str, pl.DataFrame]:
    """Read `baselines_recommended.parquet`: name of a baseline -> item and count; empty if there is no file.

    Raises:
        DataError: as `read_users`.
    """
    frame = _read(folder / BASELINES_RECOMMENDED_FILE, {"model", "item", "count"}, ["model", "item"])
    if frame is None:
        return {}
    return {name: frame.filter(pl.col("model") == name) for name in frame["model"].unique(maintain_order=True)}


def _read(path: Path, columns: Collection[str], key: Sequence[str]) -> pl.DataFrame | None:
    if not path.is_file():
        return None
    cure = "Evaluate the run again."
    try:
        frame = pl.read_parquet(path)
    except (OSError, pl.exceptions.PolarsError) as error:
        raise DataError(str(path), str(error).splitlines()[0], "is not a Parquet file", cure) from error
    missing = sorted(set(columns) - set(frame.columns))
    if missing:
        raise DataError(str(path), missing, "are columns that it must have", cure)
    frame = frame.with_columns(pl.col(name).cast(pl.String) for name in key)
    if frame.select(key).is_duplicated().any():
        raise DataError(str(path), ", ".join(key), "must be distinct in every row", cure)
    return frame


def group_of(frame: pl.DataFrame, group: str) -> pl.DataFrame:
    """Return the rows of known or of new users."""
    return frame.filter(pl.col("group") == group)


def means(frame: pl.DataFrame, metrics: Sequence[str]) -> dict[str, Mean]:
    """Return mean and standard error over users of each metric that `frame` has."""
    result = {name: mean_of(_values(frame, name)) for name in metrics if name in frame.columns}
    return {name: mean for name, mean in result.items() if mean is not None}


def paired_with(users: pl.DataFrame, baselines: pl.DataFrame, name: str) -> pl.DataFrame:
    """Join the model's and the baseline's metrics by user, the baseline's as columns `METRIC:baseline`."""
    rows = baselines.filter(pl.col("model") == name)
    return users.join(rows, on=_PAIR, how="inner", suffix=":baseline", maintain_order="left")


def compare_with(users: pl.DataFrame, baselines: pl.DataFrame, name: str, metric: str) -> Rival | None:
    """Test the model against the baseline `name` in one metric; None if no user has a value in both."""
    paired = paired_with(users, baselines, name)
    if metric not in users.columns or f"{metric}:baseline" not in paired.columns:
        return None
    paired = paired.drop_nans([metric, f"{metric}:baseline"]).drop_nulls([metric, f"{metric}:baseline"])
    if paired.is_empty():
        return None
    model, baseline = _values(paired, metric), _values(paired, f"{metric}:baseline")
    return Rival(metric, name, float(model.mean()), float(baseline.mean()), paired_test(model, baseline))


def best_rival(users: pl.DataFrame, baselines: pl.DataFrame, metric: str) -> Rival | None:
    """Test the model against the baseline with the highest mean in a metric, the first of equals."""
    names = baselines["model"].unique(maintain_order=True).to_list()
    rivals = [rival for name in names if (rival := compare_with(users, baselines, name, metric)) is not None]
    return max(rivals, key=lambda rival: rival.baseline, default=None)


def by_history_length(
    users: pl.DataFrame, baselines: pl.DataFrame | None, name: str | None, metric: str
) -> list[LengthBin]:
    """Return means of a metric of the model and of the baseline `name`, in bins of history length.

    With a baseline, both means of a bin are over the same users.
    """
    paired = users if baselines is None or name is None else paired_with(users, baselines, name)
    bins = []
    for first, last in length_bins(paired["history_length"].to_numpy()):
        inside = paired.filter(pl.col("history_length").is_between(first, last))
        model = mean_of(_values(inside, metric))
        if model is not None:
            other = f"{metric}:baseline"
            bins.append(LengthBin(first, last, model, mean_of(_values(inside, other)) if other in inside else None))
    return bins


def _values(frame: pl.DataFrame, column: str) -> FloatArray:
    return frame[column].cast(pl.Float64).fill_null(float("nan")).to_numpy()
