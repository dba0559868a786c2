"""Tuning baselines on validation and evaluating them on test, on the same split as the trained model.

The metrics of a language model mean little without a comparison; `baseline_models.py` has the models.

Every candidate of a grid is fitted on the training items and ranks the catalog once, in blocks of users. That ranking
is evaluated on the validation items, which select the candidate, and on the test items, which are reported for the
selected candidate only. Where a grid takes too long, the candidate is selected on a sample (`split_data.py`) and
fitted once on everything. Only the items of the histories are excluded from the ranking. No array of size [U, I] is
stored. Equal scores rank the lower item row first, so that results do not depend on the sorting algorithm.

Shapes: P users, known and new, I items, b users of a block, K ranked items.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm.contrib.logging import logging_redirect_tqdm

from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.evaluation.baseline_config import BaselineConfig
from cllm4rec_dist.evaluation.baseline_models import make_grids
from cllm4rec_dist.evaluation.baseline_names import LABELS, BaselineName
from cllm4rec_dist.evaluation.metrics import (
    LIST_LENGTH,
    FloatArray,
    count_listed,
    largest_cutoff,
    mean_metrics,
    top_items,
    user_metrics,
)
from cllm4rec_dist.evaluation.split_data import Candidate, Grid, Scorer, SplitData
from cllm4rec_dist.log import ProgressBar, progress_bar

logger = logging.getLogger(__name__)

_BLOCK_SCORES = 2**23  # scores in one block of users: 32 MiB


@dataclass(frozen=True)
class BaselineResult:
    """Test metrics of a baseline with the hyper-parameters that validation selected.

    `values` float64 [n, M] are those of the n users with test items, in the order of their rows. `listed` int64 [I]
    counts for each item the lists of `LIST_LENGTH` that contain it. `seconds` is the wall time of the whole grid.
    `chosen_on` names the sample on which the hyper-parameters were selected, such as "5,000 of 200,000 users"; empty
    for everything.
    """

    name: BaselineName
    metrics: dict[str, float]
    stderr: dict[str, float]
    chosen: dict[str, float]
    values: FloatArray
    listed: NDArray[np.int64]
    seconds: float
    chosen_on: str = ""

    @property
    def num_users(self) -> int:
        """n."""
        return len(self.values)

    @property
    def label(self) -> str:
        """Name shown in tables."""
        return LABELS[self.name]


@dataclass(frozen=True)
class _CandidateResult:
    """Result of a fitted candidate: its mean on validation, and values and list counts of the users with test items."""

    valid: float
    values: FloatArray
    listed: NDArray[np.int64]


def _user_blocks(data: SplitData) -> Iterator[NDArray[np.int64]]:
    """Yield the users with held-out items, ascending, in blocks."""
    users = np.flatnonzero(np.diff(data.valid.indptr) + np.diff(data.test.indptr))
    size = max(1, _BLOCK_SCORES // data.histories.shape[1])
    return (users[start : start + size] for start in range(0, len(users), size))


def _evaluate(score: Scorer, data: SplitData, select_by: str, metrics: Sequence[str]) -> _CandidateResult:
    """Rank the catalog once for every user with held-out items, and evaluate that on validation and test."""
    num_items = data.histories.shape[1]
    num_ranked = min(num_items, max(LIST_LENGTH, largest_cutoff([select_by, *metrics])))
    valid_parts, test_parts = [], []
    listed = np.zeros(num_items, np.int64)
    for users in _user_blocks(data):
        scores = score(users)
        seen = data.histories[users].tocoo()
        scores[seen.row, seen.col] = -np.inf
        ranked = top_items(scores, num_ranked)
        valid_parts.append(user_metrics(ranked, data.valid[users], [select_by]))
        test = user_metrics(ranked, data.test[users], metrics)
        has_test = ~np.isnan(test).any(axis=1)
        test_parts.append(test[has_test])
        ranked_scores = np.take_along_axis(scores, ranked, axis=1)
        listed += count_listed(ranked[has_test], ranked_scores[has_test], num_items)
    valid = mean_metrics(np.concatenate(valid_parts), [select_by]).mean[select_by]
    return _CandidateResult(valid, np.concatenate(test_parts), listed)


def _tune(
    name: BaselineName,
    grid: Grid,
    data: SplitData,
    metrics: Sequence[str],
    select_by: str,
    bar: ProgressBar,
) -> BaselineResult:
    """Fit every candidate and report test metrics of the best one on validation (the first of equals).

    Candidates that cannot be fitted are left out.

    Raises:
        ConfigError: if no candidate can be fitted.
    """
    started = time.perf_counter()
    bar.set_description(f"baselines: {LABELS[name]}")
    candidates, chosen_on, num_tried = grid.candidates, "", len(grid.candidates)
    if grid.draw is not None:
        candidates, chosen_on, num_tried = _select_on_sample(name, grid, select_by, bar)
    best: tuple[_CandidateResult, dict[str, float]] | None = None
    refusal: ConfigError | None = None
    for candidate in candidates:
        try:
            score = candidate.fit(bar.update)
        except ConfigError as error:
            logger.warning("baseline %s: a setting is left out: %s", LABELS[name], error)
            refusal = error
            bar.update()
            continue
        result = _evaluate(score, data, select_by, metrics)
        logger.debug("baseline %s %s: validation %s %.4f", name, candidate.settings, select_by, result.valid)
        if best is None or result.valid > best[0].valid:
            best = result, candidate.settings
        bar.update()
    if best is None:
        assert refusal is not None, "a grid has at least one candidate"
        raise refusal
    result, chosen = best
    means = mean_metrics(result.values, metrics)
    seconds = time.perf_counter() - started
    settings = ", ".join(f"{key} {value:g}" for key, value in chosen.items())
    logger.info(
        "baseline %s%s: validation %s %.4f; settings tried: %d%s, in %.1f s",
        LABELS[name],
        f" ({settings})" if settings else "",
        select_by,
        result.valid,
        num_tried,
        f" on {chosen_on}" if chosen_on else "",
        seconds,
    )
    return BaselineResult(name, means.mean, means.stderr, chosen, result.values, result.listed, seconds, chosen_on)


def _select_on_sample(
    name: BaselineName, grid: Grid, select_by: str, bar: ProgressBar
) -> tuple[Sequence[Candidate], str, int]:
    """Return the candidate that ranks the validation items of a sample best, what was sampled, and how many were tried.

    The middle of the grid, and nothing, if the sample has no validation items.
    """
    assert grid.draw is not None
    sample = grid.draw()
    if sample is None:
        logger.warning(
            "baseline %s is not tuned: %d fits would take too long, and a sample has no validation items",
            LABELS[name],
            len(grid.candidates),
        )
        return [grid.candidates[grid.middle]], "", 1
    logger.info(
        "baseline %s: %d settings are compared on %s, because fits on everything would take too long",
        LABELS[name],
        grid.num_compared,
        sample.description,
    )

    def value(index: int) -> float:
        candidate = sample.candidates[index]
        result = _evaluate(candidate.fit(bar.update), sample.data, select_by, [select_by]).valid
        logger.debug("baseline %s %s: on the sample %s %.4f", name, candidate.settings, select_by, result)
        bar.update()
        return result

    values = {index: value(index) for index in sample.first_round()}
    best = max(values, key=values.__getitem__)
    values |= {index: value(index) for index in sample.second_round(best)}
    best = max(values, key=values.__getitem__)
    return [grid.candidates[best]], sample.description, len(values)


def _num_steps(grid: Grid) -> int:
    """Return the steps of the progress bar: the sweeps and the ranking of each fit."""
    num_fits = len(grid.candidates) if grid.draw is None else grid.num_compared + 1
    return num_fits * (grid.candidates[0].num_sweeps + 1)


def run_baselines(data: SplitData, metrics: Sequence[str], config: BaselineConfig) -> list[BaselineResult]:
    """Tune every baseline of `config.names` on validation and evaluate it on test.

    Args:
        data: the split.
        metrics: names such as `recall@20`.
        config: baselines and grids.

    Returns:
        one result for each baseline that can run (`select_baselines`).

    Raises:
        ConfigError: for a name that is not a metric, or if every lambda is too small for EASE.
    """
    largest_cutoff(metrics)  # raises for a name that is not a metric, before anything is fitted
    grids = make_grids(data, config)
    total = sum(map(_num_steps, grids.values()))
    # Baselines are fitted in one process, after the ranks of the evaluation have ended.
    alone = World(0, 1, 0, torch.device("cpu"), has_terminal=sys.stderr.isatty())
    bar = progress_bar(alone, total, "baselines", "step")
    with closing(bar), logging_redirect_tqdm([logging.getLogger("cllm4rec_dist")]):
        return [_tune(name, grid, data, metrics, config.select_by, bar) for name, grid in grids.items()]
