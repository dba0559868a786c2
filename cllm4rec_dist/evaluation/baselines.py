"""Linear and factor baselines on the same split as the trained model.

What it is for: a number for a language model means nothing alone. Popularity is the floor; EASE (Steck, "Embarrassingly
Shallow Autoencoders for Sparse Data", WWW 2019) and iALS (Hu, Koren and Volinsky, "Collaborative Filtering for Implicit
Feedback Datasets", ICDM 2008) are strong at little cost; the title-aware EASE sees the item texts as well, so that a
gain of the language model over EASE is not mistaken for a gain from text as such.

Why this way: every candidate of a grid is fitted on the training items and ranks the catalog once, in blocks of users;
that one ranking is counted against the validation items (which choose the candidate) and the test items (which are
reported for the chosen one only). Only the items of the histories are left out of the ranking. Nothing of size [U, I]
is held. Equal scores rank the lower item row first, so that results do not depend on the sorting algorithm.

New users, who are held out whole, are ranked beside the known ones from their histories, and nothing is fitted on them:
EASE multiplies a history with the weights of the training users, iALS solves for the factors of a user alone.

What it leaves to others: the split (`corpus/`), the metrics (`metrics.py`), tables and pictures (`report.py`).

Shapes: U training users, N new ones, P = U + N, I items, b users of a block, K ranked items, W words of the item texts.
"""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

import numpy as np
import scipy.sparse as sp
import torch
from implicit.cpu.als import AlternatingLeastSquares
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from scipy.linalg import lapack
from sklearn.feature_extraction.text import TfidfVectorizer
from threadpoolctl import threadpool_limits
from tqdm.contrib.logging import logging_redirect_tqdm

from cllm4rec_dist.config import StrictModel
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.evaluation.metrics import (
    LIST_LENGTH,
    FloatArray,
    count_listed,
    largest_cutoff,
    mean_metrics,
    parse_metric,
    user_metrics,
)
from cllm4rec_dist.log import ProgressBar, progress_bar

logger = logging.getLogger(__name__)

BaselineName = Literal["popularity", "ease", "title_ease", "ials"]
_LABELS: dict[BaselineName, str] = {
    "popularity": "Popularity",
    "ease": "EASE",
    "title_ease": "EASE + titles",
    "ials": "iALS",
}
Float32Array = NDArray[np.float32]
Scorer = Callable[[int, int], Float32Array]
"""Scores [b, I] of users start..stop-1, in memory of its own (the ranking overwrites it)."""

_BLOCK_SCORES = 2**23  # scores in one block of users: 32 MiB
_GRAM_BLOCK_ROWS = 1024
_WORD = re.compile(r"\b\w\w+\b")  # what TfidfVectorizer counts as a word


class BaselineConfig(StrictModel):
    """Which baselines run and the grids that validation chooses from."""

    names: tuple[BaselineName, ...] = Field(default=("popularity", "ease", "title_ease", "ials"), min_length=1)
    """Baselines to run, in this order."""
    select_by: str = "ndcg@100"
    """Validation metric that chooses among the candidates of a grid."""
    ease_lambdas: tuple[PositiveFloat, ...] = Field(default=(50.0, 100.0, 200.0, 500.0), min_length=1)
    """L2 weights of EASE."""
    title_ease_lambdas: tuple[PositiveFloat, ...] = Field(default=(100.0, 200.0, 500.0), min_length=1)
    """L2 weights of the title-aware EASE."""
    title_ease_alphas: tuple[PositiveFloat, ...] = Field(default=(3.0, 10.0, 30.0), min_length=1)
    """Weights of the text Gram matrix beside the interactions of the title-aware EASE."""
    ials_factors: tuple[PositiveInt, ...] = Field(default=(64, 256), min_length=1)
    """Numbers of latent factors of iALS."""
    ials_regularizations: tuple[PositiveFloat, ...] = Field(default=(30.0, 100.0, 300.0), min_length=1)
    """L2 weights of iALS."""
    ials_alphas: tuple[PositiveFloat, ...] = Field(default=(5.0, 20.0, 50.0, 100.0), min_length=1)
    """Confidence of a seen item in iALS; an unseen one has 1."""
    ials_iterations: PositiveInt = 15
    """Alternating sweeps of iALS."""
    num_threads: PositiveInt | None = None
    """Threads of iALS; None takes every core."""
    max_dense_gib: PositiveFloat = 2.0
    """Memory that the two dense [I, I] float32 matrices of an EASE may take, GiB; 2 GiB is about 16,000 items."""
    seed: NonNegativeInt = 0
    """Seed of the factors that iALS starts from."""

    @field_validator("select_by")
    @classmethod
    def _is_metric(cls, name: str) -> str:
        return parse_metric(name).name


@dataclass(frozen=True)
class SplitData:
    """One split: binary CSR matrices and one text (may be empty) for each item row.

    Attributes:
        train: [U, I], what is fitted.
        valid, test: [P, I], what is held out of the training users and then of the new ones.
        item_texts: I texts.
        new_histories: [N, I], what the new users are ranked from; None where there are none.

    Raises:
        DataError: when the shapes do not agree or a held-out item is a training item of the same user.
    """

    train: sp.csr_matrix
    valid: sp.csr_matrix
    test: sp.csr_matrix
    item_texts: list[str]
    new_histories: sp.csr_matrix | None = None

    @cached_property
    def histories(self) -> sp.csr_matrix:
        """[P, I], what users are ranked from."""
        return self.train if self.new_histories is None else sp.vstack([self.train, self.new_histories], format="csr")

    def __post_init__(self) -> None:
        for field, part in (("valid", self.valid), ("test", self.test)):
            if part.shape != self.histories.shape:
                raise DataError(
                    field,
                    part.shape,
                    f"must have the shape of train, {self.histories.shape}",
                    "Build all from one split.",
                )
            if part.nnz == 0:
                raise DataError(field, "0 items", "must hold out at least one item", "Raise the held-out share.")
            overlap = self.histories.multiply(part).nnz
            if overlap:
                raise DataError(field, f"{overlap} training items", "must not be in train", "Drop repeats, then split.")
        if len(self.item_texts) != self.train.shape[1]:
            raise DataError(
                "item_texts",
                f"{len(self.item_texts)} texts",
                f"must be one for each of the {self.train.shape[1]} items",
                "Give an empty text to an item that has none.",
            )


@dataclass(frozen=True)
class BaselineResult:
    """Test metrics of a baseline with the hyper-parameters that validation chose.

    `values` float64 [n, M] are those of the n users with test items, in the order of their rows; `listed` int64 [I]
    counts their lists of `LIST_LENGTH` that each item is in; `seconds` is the wall time of the whole grid.
    """

    name: BaselineName
    metrics: dict[str, float]
    stderr: dict[str, float]
    chosen: dict[str, float]
    values: FloatArray
    listed: NDArray[np.int64]
    seconds: float

    @property
    def num_users(self) -> int:
        """n."""
        return len(self.values)

    @property
    def label(self) -> str:
        """The name as a table shows it."""
        return _LABELS[self.name]


@dataclass(frozen=True)
class _Outcome:
    """A fitted candidate: its validation mean, and values and lists of the users with test items."""

    valid: float
    values: FloatArray
    listed: NDArray[np.int64]


@dataclass(frozen=True)
class _Candidate:
    """A point of a grid and how to fit it."""

    chosen: dict[str, float]
    fit: Callable[[], Scorer]


def top_rows(scores: Float32Array, num_ranked: int) -> NDArray[np.int64]:
    """The best columns of each row, best first; equal scores rank the lower column first.

    Args:
        scores: [b, I] without NaN; -inf for what should come last.
        num_ranked: K, 1..I.

    Returns:
        columns [b, K].
    """
    num_rows, num_items = scores.shape
    assert 1 <= num_ranked <= num_items
    threshold = np.partition(scores, num_items - num_ranked, axis=1)[:, num_items - num_ranked]
    assert not np.isnan(threshold).any(), "a score is NaN"
    # Everything at or above the K-th score, ties included; the sort below keeps the first K of each row.
    rows, columns = np.nonzero(scores >= threshold[:, None])
    order = np.lexsort((columns, -scores[rows, columns], rows))
    starts = np.searchsorted(rows, np.arange(num_rows))
    return columns[order][starts[:, None] + np.arange(num_ranked)]


def _user_blocks(num_users: int, num_items: int) -> Iterator[tuple[int, int]]:
    size = max(1, _BLOCK_SCORES // num_items)
    return ((start, min(start + size, num_users)) for start in range(0, num_users, size))


def _count(score: Scorer, data: SplitData, select_by: str, metrics: Sequence[str]) -> _Outcome:
    """Rank the catalog for every user once, and measure that on validation and test.

    Known and new users count alike: each once.
    """
    num_users, num_items = data.histories.shape
    num_ranked = min(num_items, max(LIST_LENGTH, largest_cutoff([select_by, *metrics])))
    valid_parts, test_parts = [], []
    listed = np.zeros(num_items, np.int64)
    for start, stop in _user_blocks(num_users, num_items):
        scores = score(start, stop)
        seen = data.histories[start:stop].tocoo()
        scores[seen.row, seen.col] = -np.inf
        ranked = top_rows(scores, num_ranked)
        valid_parts.append(user_metrics(ranked, data.valid[start:stop], [select_by]))
        test = user_metrics(ranked, data.test[start:stop], metrics)
        tested = ~np.isnan(test).any(axis=1)
        test_parts.append(test[tested])
        ranked_scores = np.take_along_axis(scores, ranked, axis=1)
        listed += count_listed(ranked[tested], ranked_scores[tested], num_items)
    valid = mean_metrics(np.concatenate(valid_parts), [select_by]).mean[select_by]
    return _Outcome(valid, np.concatenate(test_parts), listed)


def _popularity(data: SplitData) -> list[_Candidate]:
    counts = np.asarray(data.train.sum(axis=0), dtype=np.float32).ravel()
    return [_Candidate({}, lambda: lambda start, stop: np.tile(counts, (stop - start, 1)))]


def _gram_blocks(features: sp.csr_matrix) -> Iterator[tuple[slice, Float32Array]]:
    """Dense row blocks of features @ features.T for features [I, W], never all of it as a sparse product."""
    transposed = features.T.tocsr()
    for start in range(0, features.shape[0], _GRAM_BLOCK_ROWS):
        rows = slice(start, start + _GRAM_BLOCK_ROWS)
        yield rows, (features[rows] @ transposed).toarray()


def _gram(train: sp.csr_matrix) -> Float32Array:
    """X^T X [I, I] of the training matrix."""
    num_items = train.shape[1]
    gram = np.empty((num_items, num_items), dtype=np.float32)
    for rows, block in _gram_blocks(train.T.tocsr().astype(np.float32)):
        gram[rows] = block
    return gram


def _ease_weights(gram: Float32Array, l2: float) -> Float32Array:
    """The EASE solution B [I, I] of a Gram matrix (Steck 2019, equation 8), written over `gram`.

    With P = (gram + l2)^-1: B_ij = -P_ij / P_jj off the diagonal, 0 on it. The Cholesky inverse works in place, so
    that a catalog costs one matrix beside the Gram it is copied from; float32 carries it: l2 bounds the condition.

    Raises:
        ConfigError: when `l2` is too small for float32.
    """
    gram[np.diag_indices_from(gram)] += np.float32(l2)
    # LAPACK wants column order: the transpose is that without a copy. Its lower triangle is our upper one.
    factor, failed = lapack.spotrf(gram.T, lower=1, clean=0, overwrite_a=1)
    if not failed:
        inverse, failed = lapack.spotri(factor, lower=1, overwrite_c=1)
    if failed:
        raise ConfigError(
            "EASE lambda", l2, "is too small for this catalog in float32", "Use larger values in the lambda grids."
        )
    weights = inverse.T
    for start in range(0, len(weights), _GRAM_BLOCK_ROWS):
        stop = start + _GRAM_BLOCK_ROWS
        diagonal = np.triu(weights[start:stop, start:stop])
        weights[start:stop, start:stop] = diagonal + np.triu(diagonal, 1).T
        weights[stop:, start:stop] = weights[start:stop, stop:].T
    weights /= -weights.diagonal().copy()
    np.fill_diagonal(weights, 0.0)
    return weights


def _item_scorer(histories: sp.csr_matrix, weights: Float32Array) -> Scorer:
    return lambda start, stop: histories[start:stop] @ weights


def _ease(data: SplitData, gram: Float32Array, config: BaselineConfig) -> list[_Candidate]:
    def candidate(l2: float) -> _Candidate:
        return _Candidate({"lambda": l2}, lambda: _item_scorer(data.histories, _ease_weights(gram.copy(), l2)))

    return [candidate(l2) for l2 in config.ease_lambdas]


def _text_features(item_texts: Sequence[str]) -> sp.csr_matrix:
    """L2-normalised TF-IDF rows [I, W]; an item without words has a row of zeros."""
    return TfidfVectorizer(sublinear_tf=True, dtype=np.float32).fit_transform(item_texts)


def _title_ease(data: SplitData, gram: Float32Array, config: BaselineConfig) -> list[_Candidate]:
    """EASE on the interactions stacked on sqrt(alpha) times the text features as further rows ("users")."""
    if not any(_WORD.search(text) for text in data.item_texts):
        logger.warning("baseline title_ease is left out: no item has a text with words")
        return []
    features = _text_features(data.item_texts)

    def fit(alpha: float, l2: float) -> Scorer:
        both = gram.copy()
        for rows, block in _gram_blocks(features):
            both[rows] += np.float32(alpha) * block
        return _item_scorer(data.histories, _ease_weights(both, l2))

    def candidate(alpha: float, l2: float) -> _Candidate:
        return _Candidate({"alpha": alpha, "lambda": l2}, lambda: fit(alpha, l2))

    return [candidate(*point) for point in product(config.title_ease_alphas, config.title_ease_lambdas)]


def _ials(data: SplitData, config: BaselineConfig) -> list[_Candidate]:
    train = data.train.astype(np.float32)

    def fit(factors: int, regularization: float, alpha: float) -> Scorer:
        # implicit threads over users itself: threads of the BLAS below it only get in the way.
        with threadpool_limits(limits=1, user_api="blas"):
            model = AlternatingLeastSquares(
                factors=factors,
                regularization=regularization,
                alpha=alpha,
                iterations=config.ials_iterations,
                num_threads=config.num_threads or 0,
                random_state=config.seed,
            )
            model.fit(train, show_progress=False)
            users = model.user_factors
            if data.new_histories is not None:
                new = data.new_histories.astype(np.float32)
                users = np.concatenate([users, model.recalculate_user(np.arange(new.shape[0]), new)])
        return lambda start, stop: users[start:stop] @ model.item_factors.T

    def candidate(factors: int, regularization: float, alpha: float) -> _Candidate:
        chosen = {"factors": float(factors), "regularization": regularization, "alpha": alpha}
        return _Candidate(chosen, lambda: fit(factors, regularization, alpha))

    grid = product(config.ials_factors, config.ials_regularizations, config.ials_alphas)
    return [candidate(*point) for point in grid]


def _check_dense_memory(num_items: int, config: BaselineConfig) -> None:
    needed_gib = 2 * num_items**2 * np.dtype(np.float32).itemsize / 2**30
    if needed_gib > config.max_dense_gib:
        raise ConfigError(
            "baselines.max_dense_gib",
            config.max_dense_gib,
            f"must be at least {needed_gib:.1f} for the dense {num_items:,} x {num_items:,} matrices of EASE",
            "Raise it if the memory is there, or take ease and title_ease out of baselines.names.",
        )


def _all_candidates(data: SplitData, config: BaselineConfig) -> dict[BaselineName, list[_Candidate]]:
    found: dict[BaselineName, list[_Candidate]] = {}
    needs_gram = not {"ease", "title_ease"}.isdisjoint(config.names)
    if needs_gram:
        _check_dense_memory(data.train.shape[1], config)
        gram = _gram(data.train)
    for name in config.names:
        if name == "popularity":
            found[name] = _popularity(data)
        elif name == "ease":
            found[name] = _ease(data, gram, config)
        elif name == "title_ease":
            found[name] = _title_ease(data, gram, config)
        else:
            found[name] = _ials(data, config)
    return found


def _tune(
    name: BaselineName,
    candidates: Sequence[_Candidate],
    data: SplitData,
    metrics: Sequence[str],
    select_by: str,
    bar: ProgressBar,
) -> BaselineResult:
    """Fit every candidate and report on test the one that validation likes best (the first of equals)."""
    started = time.perf_counter()
    bar.set_description(f"baselines: {_LABELS[name]}")
    best: tuple[_Outcome, dict[str, float]] | None = None
    for candidate in candidates:
        outcome = _count(candidate.fit(), data, select_by, metrics)
        logger.debug("baseline %s %s: validation %s %.4f", name, candidate.chosen, select_by, outcome.valid)
        if best is None or outcome.valid > best[0].valid:
            best = outcome, candidate.chosen
        bar.update()
    assert best is not None, "a grid has at least one candidate"
    outcome, chosen = best
    result = mean_metrics(outcome.values, metrics)
    seconds = time.perf_counter() - started
    settings = ", ".join(f"{key} {value:g}" for key, value in chosen.items())
    logger.info(
        "baseline %s%s: validation %s %.4f; settings tried: %d, in %.1f s",
        _LABELS[name],
        f" ({settings})" if settings else "",
        select_by,
        outcome.valid,
        len(candidates),
        seconds,
    )
    return BaselineResult(name, result.mean, result.stderr, chosen, outcome.values, outcome.listed, seconds)


def run_baselines(data: SplitData, metrics: Sequence[str], config: BaselineConfig) -> list[BaselineResult]:
    """Tune every baseline of `config.names` on validation and report it on test.

    Args:
        data: the split.
        metrics: names such as `recall@20`.
        config: baselines and grids.

    Returns:
        one result a baseline, in the order of `config.names`; `title_ease` is left out (and logged) when no item has
        a text.

    Raises:
        ConfigError: for a name that is not a metric, a catalog too large for EASE (names the memory) or a lambda too
            small for it.
    """
    largest_cutoff(metrics)
    candidates = _all_candidates(data, config)
    total = sum(len(grid) for grid in candidates.values())
    # They are fitted in one process, after the ranks of the evaluation have ended.
    alone = World(0, 1, 0, torch.device("cpu"), has_terminal=sys.stderr.isatty())
    bar = progress_bar(alone, total, "baselines", "fit")
    with closing(bar), logging_redirect_tqdm([logging.getLogger("cllm4rec_dist")]):
        return [_tune(name, grid, data, metrics, config.select_by, bar) for name, grid in candidates.items() if grid]
