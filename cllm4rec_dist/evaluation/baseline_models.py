"""Baseline models and the grids of settings that each is tuned over.

Popularity is the floor. EASE (`ease.py`) and iALS (Hu, Koren and Volinsky, "Collaborative Filtering for Implicit
Feedback Datasets", ICDM 2008) are strong at little cost. The title-aware EASE also uses the item texts, so that a gain
of the language model over EASE is not mistaken for a gain from text as such. Both need dense [I, I] matrices; in a
catalog that is too large for them the sparse EASE takes their place, the linear memory tuned as a baseline.

New users, who are held out whole, are scored from their histories and are not part of the training data: EASE
multiplies a history with the weights of the training users, iALS solves for the factors of each new user alone.

Shapes: U training users, N new ones, P = U + N, I items, b users of a block.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import product

import numpy as np
import scipy.sparse as sp
from implicit.cpu.als import AlternatingLeastSquares
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from threadpoolctl import threadpool_limits

from cllm4rec_dist.config import StrictModel
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.evaluation.baseline_names import LABELS, BaselineName
from cllm4rec_dist.evaluation.ease import Float32Array, ease_weights, gram_blocks, gram_matrix
from cllm4rec_dist.evaluation.metrics import parse_metric
from cllm4rec_dist.model.linear_fit import item_features, ridge_weights, strongest_neighbors, text_features

logger = logging.getLogger(__name__)

_DENSE: tuple[BaselineName, ...] = ("ease", "title_ease")
"""Baselines with dense [I, I] matrices."""
Scorer = Callable[[NDArray[np.int64]], Float32Array]
"""Returns scores [b, I] of b users in a new array, which the caller may overwrite."""

_FIT_ITEMS = 4096
"""Items of the sparse EASE that are fitted at a time."""
_WORD = re.compile(r"\b\w\w+\b")  # a word of TfidfVectorizer


class BaselineConfig(StrictModel):
    """Baselines to run and the grids that validation selects from."""

    names: tuple[BaselineName, ...] = Field(default=("popularity", "ease", "title_ease", "ials"), min_length=1)
    """Baselines to run, in this order. `sparse_ease` takes the place of `ease` and `title_ease` if these do not fit."""
    select_by: str = "ndcg@100"
    """Validation metric that selects among the candidates of a grid."""
    ease_lambdas: tuple[PositiveFloat, ...] = Field(default=(50.0, 100.0, 200.0, 500.0), min_length=1)
    """L2 weights of EASE."""
    title_ease_lambdas: tuple[PositiveFloat, ...] = Field(default=(100.0, 200.0, 500.0), min_length=1)
    """L2 weights of the title-aware EASE."""
    title_ease_alphas: tuple[PositiveFloat, ...] = Field(default=(3.0, 10.0, 30.0), min_length=1)
    """Weights of the text Gram matrix relative to the interactions in the title-aware EASE."""
    sparse_ease_neighbors: PositiveInt = 100
    """Neighbors by which the sparse EASE predicts an item."""
    sparse_ease_lambdas: tuple[PositiveFloat, ...] = Field(default=(100.0, 200.0, 500.0), min_length=1)
    """L2 weights of the sparse EASE."""
    sparse_ease_alphas: tuple[PositiveFloat, ...] = Field(default=(10.0,), min_length=1)
    """Weights of the texts in the sparse EASE."""
    ials_factors: tuple[PositiveInt, ...] = Field(default=(64, 256), min_length=1)
    """Numbers of latent factors of iALS."""
    ials_regularizations: tuple[PositiveFloat, ...] = Field(default=(30.0, 100.0, 300.0), min_length=1)
    """L2 weights of iALS."""
    ials_alphas: tuple[PositiveFloat, ...] = Field(default=(5.0, 20.0, 50.0, 100.0), min_length=1)
    """Confidence of a seen item in iALS; an unseen one has 1."""
    ials_iterations: PositiveInt = 15
    """Alternating sweeps of iALS."""
    num_threads: PositiveInt | None = None
    """Threads of iALS and of the sparse EASE; None uses every core."""
    max_dense_gib: PositiveFloat = 2.0
    """Memory limit of the two dense [I, I] float32 matrices of EASE, in GiB; 2 GiB is about 16,000 items."""
    max_grid_interactions: PositiveInt = 30_000_000
    """Largest product of training interactions and candidates of iALS; in a larger split one candidate is fitted."""
    max_grid_items: PositiveInt = 400_000
    """Largest product of items and candidates of the sparse EASE; in a larger catalog one candidate is fitted, and none
    in a catalog that is larger itself."""
    seed: NonNegativeInt = 0
    """Random seed of the initial factors of iALS."""

    @field_validator("select_by")
    @classmethod
    def _is_metric(cls, name: str) -> str:
        return parse_metric(name).name


@dataclass(frozen=True)
class SplitData:
    """One split: binary CSR matrices and a text, which may be empty, for each item row.

    Attributes:
        train: [U, I], training interactions.
        valid, test: [P, I], held-out interactions of the training users and then of the new ones.
        item_texts: I texts.
        new_histories: [N, I], histories of the new users; None if there are none.

    Raises:
        DataError: if the shapes do not agree or a held-out item is a training item of the same user.
    """

    train: sp.csr_matrix
    valid: sp.csr_matrix
    test: sp.csr_matrix
    item_texts: list[str]
    new_histories: sp.csr_matrix | None = None

    @cached_property
    def histories(self) -> sp.csr_matrix:
        """[P, I], histories that users are ranked from."""
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
                raise DataError(field, "0 items", "must hold out at least one item", "Raise the held-out fraction.")
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
class Candidate:
    """A point of a grid: its settings and a function that fits it."""

    settings: dict[str, float]
    fit: Callable[[], Scorer]


def has_words(texts: Sequence[str]) -> bool:
    """True if any text has a word of TF-IDF."""
    return any(_WORD.search(text) for text in texts)


def select_baselines(data: SplitData, config: BaselineConfig) -> tuple[list[BaselineName], dict[BaselineName, str]]:
    """Return the baselines that can run on a split, and the reasons for leaving out others of `config.names`."""
    reasons: dict[BaselineName, str] = {}
    num_items = data.train.shape[1]
    needed_gib = 2 * num_items**2 * np.dtype(np.float32).itemsize / 2**30
    if not has_words(data.item_texts):
        reasons["title_ease"] = "no item has a text with words"
    too_large = needed_gib > config.max_dense_gib
    if too_large:
        reason = (
            f"the dense matrices of {num_items:,} x {num_items:,} need {needed_gib:,.1f} GiB, more than"
            f" max_dense_gib, {config.max_dense_gib:g}"
        )
        reasons |= dict.fromkeys(_DENSE, reason)
    if num_items > config.max_grid_items:
        reasons["sparse_ease"] = (
            f"{num_items:,} regressions take too long (max_grid_items is {config.max_grid_items:,}); the linear"
            " memory of a run is the same model"
        )
    names = ["sparse_ease" if too_large and name in _DENSE else name for name in config.names]
    kept: list[BaselineName] = [name for name in dict.fromkeys(names) if name not in reasons]
    return kept, {name: reason for name, reason in reasons.items() if name in {*config.names, *names}}


def _grid(name: BaselineName, cost: int, limit: int, *axes: Sequence[float]) -> list[tuple[float, ...]]:
    """Return all points of a grid, or its middle one if `cost` for each of them exceeds `limit` together."""
    points = [*product(*axes)]
    if len(points) == 1 or cost * len(points) <= limit:
        return points
    middle = tuple(axis[(len(axis) - 1) // 2] for axis in axes)
    logger.warning("baseline %s is not tuned, because %d fits would take too long", LABELS[name], len(points))
    return [middle]


def make_grids(data: SplitData, config: BaselineConfig) -> dict[BaselineName, list[Candidate]]:
    """Return the candidates of each baseline that can run (`select_baselines`)."""
    names, reasons = select_baselines(data, config)
    for name, reason in reasons.items():
        logger.warning("baseline %s is left out: %s", LABELS[name], reason)
    if not set(_DENSE).isdisjoint(names):
        gram = gram_matrix(data.train)
    grids: dict[BaselineName, list[Candidate]] = {}
    for name in names:
        if name == "popularity":
            grids[name] = _popularity(data)
        elif name == "ease":
            grids[name] = _ease(data, gram, config)
        elif name == "title_ease":
            grids[name] = _title_ease(data, gram, config)
        elif name == "sparse_ease":
            grids[name] = _sparse_ease(data, config)
        else:
            grids[name] = _ials(data, config)
    return grids


def _popularity(data: SplitData) -> list[Candidate]:
    counts = np.asarray(data.train.sum(axis=0), dtype=np.float32).ravel()
    return [Candidate({}, lambda: lambda users: np.tile(counts, (len(users), 1)))]


def _linear_scorer(histories: sp.csr_matrix, weights: Float32Array) -> Scorer:
    return lambda users: histories[users] @ weights


def _ease(data: SplitData, gram: Float32Array, config: BaselineConfig) -> list[Candidate]:
    def candidate(l2: float) -> Candidate:
        return Candidate({"lambda": l2}, lambda: _linear_scorer(data.histories, ease_weights(gram.copy(), l2)))

    return [candidate(l2) for l2 in config.ease_lambdas]


def _title_ease(data: SplitData, gram: Float32Array, config: BaselineConfig) -> list[Candidate]:
    """EASE on the interactions stacked on sqrt(alpha) times the text features as further rows ("users")."""
    features = text_features(data.item_texts)

    def fit(alpha: float, l2: float) -> Scorer:
        stacked_gram = gram.copy()
        for rows, block in gram_blocks(features):
            stacked_gram[rows] += np.float32(alpha) * block
        return _linear_scorer(data.histories, ease_weights(stacked_gram, l2))

    def candidate(alpha: float, l2: float) -> Candidate:
        return Candidate({"alpha": alpha, "lambda": l2}, lambda: fit(alpha, l2))

    return [candidate(*point) for point in product(config.title_ease_alphas, config.title_ease_lambdas)]


def _sparse_ease(data: SplitData, config: BaselineConfig) -> list[Candidate]:
    """Ridge regression of each item on its strongest neighbors, as in the linear memory."""
    texts = text_features(data.item_texts)
    num_items, num_threads = data.train.shape[1], config.num_threads or os.cpu_count() or 1

    def fit(alpha: float, l2: float) -> Scorer:
        features = item_features(data.train, texts, alpha)
        columns = []
        for start in range(0, num_items, _FIT_ITEMS):
            stop = min(start + _FIT_ITEMS, num_items)
            items = np.arange(start, stop)
            neighbors = strongest_neighbors(features, items, config.sparse_ease_neighbors)
            weights = ridge_weights(features, items, neighbors, l2, num_threads).astype(np.float32)
            item, rank = np.nonzero(neighbors >= 0)
            entries = weights[item, rank], (neighbors[item, rank], item)
            columns.append(sp.csc_matrix(entries, shape=(num_items, stop - start)))
        weights = sp.hstack(columns, format="csr")
        return lambda users: (data.histories[users] @ weights).toarray()

    def candidate(alpha: float, l2: float) -> Candidate:
        return Candidate({"alpha": alpha, "lambda": l2}, lambda: fit(alpha, l2))

    axes = config.sparse_ease_alphas, config.sparse_ease_lambdas
    return [candidate(*point) for point in _grid("sparse_ease", num_items, config.max_grid_items, *axes)]


def _ials(data: SplitData, config: BaselineConfig) -> list[Candidate]:
    train = data.train.astype(np.float32)

    def fit(factors: int, regularization: float, alpha: float) -> Scorer:
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
            model.fit(train, show_progress=False)
            factors_of_users = model.user_factors
            if data.new_histories is not None:
                new = data.new_histories.astype(np.float32)
                of_new = model.recalculate_user(np.arange(new.shape[0]), new)
                factors_of_users = np.concatenate([factors_of_users, of_new])
        return lambda users: factors_of_users[users] @ model.item_factors.T

    def candidate(factors: int, regularization: float, alpha: float) -> Candidate:
        settings = {"factors": float(factors), "regularization": regularization, "alpha": alpha}
        return Candidate(settings, lambda: fit(factors, regularization, alpha))

    axes = config.ials_factors, config.ials_regularizations, config.ials_alphas
    grid = _grid("ials", train.nnz, config.max_grid_interactions, *axes)
    return [candidate(int(factors), *others) for factors, *others in grid]
