"""iALS as a baseline: its fit, what a fit costs, and its grid.

Source: Hu, Koren and Volinsky, "Collaborative Filtering for Implicit Feedback Datasets", ICDM 2008; fitted by implicit.

In a split that is too large for the whole grid the settings are chosen on a sample of users, and the best are fitted
once on everything: first all others with the fewest factors, then the number of factors. Numbers of factors with which
that fit would take too long are left out.

Shapes: U training users, N new ones, P = U + N, I items.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from itertools import product

import numpy as np
from implicit.cpu.als import AlternatingLeastSquares
from numpy.typing import NDArray
from threadpoolctl import threadpool_limits

from cllm4rec_dist.evaluation.baseline_config import BaselineConfig
from cllm4rec_dist.evaluation.split_data import (
    Candidate,
    Grid,
    IntArray,
    Progress,
    Sample,
    Scorer,
    SplitData,
    middle_point,
    sample_users,
)

logger = logging.getLogger(__name__)

_MIN_FACTORS = 16
"""Fewest factors to which a number of factors is halved; with fewer iALS is no comparison."""
_ROW_SECONDS, _ROW_FACTOR_SECONDS, _ENTRY_FACTOR_SECONDS = 1.8e-6, 2.1e-10, 8e-9
"""CPU seconds of a sweep for each user and item, times the square of the factors, and for each interaction and factor;
measured with 16 to 256 factors on one core of an Intel Xeon (docs/performance.md)."""


def sweep_seconds(num_interactions: IntArray | int, num_rows: IntArray | int, factors: int) -> NDArray[np.float64]:
    """Estimate the CPU seconds of a sweep over the users and the items.

    Args:
        num_rows: users and items with interactions.
    """
    of_rows = np.asarray(num_rows) * (_ROW_SECONDS + _ROW_FACTOR_SECONDS * factors**2)
    return of_rows + np.asarray(num_interactions) * (_ENTRY_FACTOR_SECONDS * factors)


def fitting_factors(data: SplitData, config: BaselineConfig) -> tuple[int, ...]:
    """Return the numbers of factors of the grid by which a split is fitted; none if it is too large for any.

    All of them if the grid is small enough to be fitted on everything; else those with a fit of at most
    `max_fit_minutes`, or the smallest one halved until it has one.
    """
    if data.train.nnz * _num_points(config, len(config.ials_factors)) <= config.max_grid_interactions:
        return config.ials_factors
    kept = tuple(
        factors for factors in config.ials_factors if _fit_minutes(data, factors, config) <= config.max_fit_minutes
    )
    factors = min(config.ials_factors)
    while not kept and factors > _MIN_FACTORS:
        factors = max(_MIN_FACTORS, factors // 2)
        kept = (factors,) if _fit_minutes(data, factors, config) <= config.max_fit_minutes else ()
    return kept


def too_large(data: SplitData, config: BaselineConfig) -> str | None:
    """Return why iALS is left out; None if it is not."""
    if fitting_factors(data, config):
        return None
    factors = min(_MIN_FACTORS, *config.ials_factors)
    return (
        f"{data.train.nnz:,} interactions take about {_fit_minutes(data, factors, config):,.0f} CPU minutes even with"
        f" {factors} factors, more than max_fit_minutes, {config.max_fit_minutes:g}"
    )


def ials_grid(data: SplitData, config: BaselineConfig) -> Grid:
    """Return the candidates of a split that is not too large (`too_large`)."""
    factors = fitting_factors(data, config)
    left_out = [str(number) for number in config.ials_factors if number not in factors]
    if left_out:
        logger.warning(
            "baseline iALS: %s instead of %s factors, with which a fit would take more than %g CPU minutes",
            " and ".join(map(str, factors)),
            " and ".join(map(str, config.ials_factors)),
            config.max_fit_minutes,
        )
    candidates = _candidates(data, config, factors)
    if len(candidates) == 1 or data.train.nnz * len(candidates) <= config.max_grid_interactions:
        return Grid(candidates)
    num_first = _num_points(config, 1)
    num_compared = num_first + len(factors) - 1

    def draw() -> Sample | None:
        def is_small(num_interactions: IntArray, num_rows: IntArray) -> NDArray[np.bool_]:
            fits = dict.fromkeys(factors, 1) | {min(factors): num_first}
            seconds = sum(count * sweep_seconds(num_interactions, num_rows, each) for each, count in fits.items())
            is_short = config.ials_iterations * seconds / 60 <= config.max_fit_minutes / 2
            return is_short & (num_interactions * num_compared <= config.max_grid_interactions)

        drawn = sample_users(data, is_small, num_compared)
        if drawn is None:
            return None
        description = f"{drawn.train.shape[0]:,} of {data.train.shape[0]:,} users"
        return Sample(drawn, _candidates(drawn, config, factors), description, last="factors")

    axes = factors, config.ials_regularizations, config.ials_alphas
    return Grid(candidates, draw, num_compared, middle_point(*axes))


def _num_points(config: BaselineConfig, num_factors: int) -> int:
    return num_factors * len(config.ials_regularizations) * len(config.ials_alphas)


def _fit_minutes(data: SplitData, factors: int, config: BaselineConfig) -> float:
    num_rows = sum(int(np.count_nonzero(data.train.getnnz(axis=axis))) for axis in (0, 1))
    return float(config.ials_iterations * sweep_seconds(data.train.nnz, num_rows, factors)) / 60


def _candidates(data: SplitData, config: BaselineConfig, factors: Sequence[int]) -> list[Candidate]:
    def candidate(number: int, regularization: float, alpha: float) -> Candidate:
        def fit(swept: Progress) -> Scorer:
            return _fit(data, config, number, regularization, alpha, swept)

        settings = {"factors": float(number), "regularization": regularization, "alpha": alpha}
        return Candidate(settings, fit, config.ials_iterations)

    return [candidate(*point) for point in product(factors, config.ials_regularizations, config.ials_alphas)]


def _fit(
    data: SplitData, config: BaselineConfig, factors: int, regularization: float, alpha: float, swept: Progress
) -> Scorer:
    # implicit runs its own threads over users; BLAS threads in addition would slow it down.
    with threadpool_limits(limits=1, user_api="blas"):
        model = AlternatingLeastSquares(
            factors=factors,
            regularization=regularization,
            alpha=alpha,
            iterations=config.ials_iterations,
            num_threads=config.num_threads or 0,
            random_state=config.seed,
        )
        model.fit(data.train.astype(np.float32, copy=False), show_progress=False, callback=lambda *sweep: swept())
        factors_of_users = model.user_factors
        if data.new_histories is not None:
            new = data.new_histories.astype(np.float32)
            of_new = model.recalculate_user(np.arange(new.shape[0]), new)
            factors_of_users = np.concatenate([factors_of_users, of_new])
    return lambda users: factors_of_users[users] @ model.item_factors.T
