"""A small evaluation on disk: metrics by user of a model and two baselines, and their results."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import polars as pl

from cllm4rec_dist.evaluation.files import BASELINES_FILE, RECOMMENDED_FILE, USERS_FILE
from cllm4rec_dist.evaluation.per_user import means
from cllm4rec_dist.evaluation.results import ResultRow, Results

METRICS = ["recall@20", "ndcg@100"]
OFFSETS: Mapping[str, float] = {"CLLM4Rec": 0.1, "Popularity": -0.3, "EASE": 0.0}
"""Name -> difference from EASE for every user, without noise."""


def make_values(
    num_users: int = 60, num_new: int = 0, offsets: Mapping[str, float] = OFFSETS
) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Make the tables of `users.parquet` and `baselines.parquet`; the last `num_new` users are new."""
    rng = np.random.default_rng(0)
    ease = rng.uniform(0.3, 0.9, num_users)
    values = {
        name: {metric: np.clip(ease + offset + rng.normal(0, 0.02, num_users), 0, 1) for metric in METRICS}
        for name, offset in offsets.items()
    }
    keys = {
        "user": [f"user-{user}" for user in range(num_users)],
        "group": ["known"] * (num_users - num_new) + ["new"] * num_new,
    }
    users = pl.DataFrame({**keys, "history_length": np.arange(num_users) % 20 + 1, **values["CLLM4Rec"]})
    baselines = [
        pl.DataFrame({"model": [name] * num_users, **keys, **values[name]}) for name in offsets if name != "CLLM4Rec"
    ]
    return users, pl.concat(baselines)


def results_of(users: pl.DataFrame, baselines: pl.DataFrame | None) -> Results:
    """Compute the results of these values."""
    frames = {"CLLM4Rec": users}
    if baselines is not None:
        frames |= {str(name): frame for (name,), frame in baselines.group_by("model", maintain_order=True)}
    rows = []
    for name, frame in frames.items():
        averages = means(frame, METRICS)
        rows.append(
            ResultRow(
                name=name,
                metrics={metric: mean.value for metric, mean in averages.items()},
                stderr={metric: mean.stderr for metric, mean in averages.items()},
                baseline=name != "CLLM4Rec",
            )
        )
    return Results(dataset="demo (test)", rows=tuple(rows), num_users=len(users), seconds=5.0)


def write_values(folder: Path, users: pl.DataFrame, baselines: pl.DataFrame | None) -> None:
    """Write the values into the folder of an evaluation, with counts of recommended items."""
    folder.mkdir(parents=True, exist_ok=True)
    users.write_parquet(folder / USERS_FILE)
    if baselines is not None:
        baselines.write_parquet(folder / BASELINES_FILE)
    pl.DataFrame({"item": ["i1", "i3"], "count": [40, 20]}).write_parquet(folder / RECOMMENDED_FILE)


def make_items() -> pl.DataFrame:
    """Make a catalog of twenty items."""
    titles = [f"Title {row}" for row in range(20)]
    return pl.DataFrame({"item": [f"i{row}" for row in range(20)], "title": titles, "popularity": range(20, 0, -1)})
