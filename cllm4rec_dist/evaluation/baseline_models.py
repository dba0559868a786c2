"""Baseline models and the grids of settings that each is tuned over.

Popularity is the floor. EASE (`ease.py`) and iALS (Hu, Koren and Volinsky, "Collaborative Filtering for Implicit
Feedback Datasets", ICDM 2008) are strong at little cost. The title-aware EASE also uses the item texts, so that a gain
of the language model over EASE is not mistaken for a gain from text as such.

New users, who are held out whole, are scored from their histories and are not part of the training data: EASE
multiplies a history with the weights of the training users, iALS solves for the factors of each new user alone.

Shapes: U training users, N new ones, P = U + N, I items, b users of a block.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from typing import Literal

import numpy as np
import scipy.sparse as sp
from implicit.cpu.als import AlternatingLeastSquares
from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, field_validator
from threadpoolctl import threadpool_limits

from cllm4rec_dist.config import StrictModel
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.evaluation.ease import Float32Array, ease_weights, gram_blocks, gram_matrix, text_features
from cllm4rec_dist.evaluation.metrics import parse_metric

logger = logging.getLogger(__name__)

BaselineName = Literal["popularity", "ease", "title_ease", "ials"]
LABELS: dict[BaselineName, str] = {
    "popularity": "Popularity",
    "ease": "EASE",
    "title_ease": "EASE + titles",
    "ials": "iALS",
}
Scorer = Callable[[int, int], Float32Array]
"""Returns scores [b, I] of users start..stop-1 in a new array, which the caller may overwrite."""

_WORD = re.compile(r"\b\w\w+\b")  # a word of TfidfVectorizer


class BaselineConfig(StrictModel):
    """Baselines to run and the grids that validation selects from."""

    names: tuple[BaselineName, ...] = Field(default=("popularity", "ease", "title_ease", "ials"), min_length=1)
    """Baselines to run, in this order."""
    select_by: str = "ndcg@100"
    """Validation metric that selects among the candidates of a grid."""
    ease_lambdas: tuple[PositiveFloat, ...] = Field(default=(50.0, 100.0, 200.0, 500.0), min_length=1)
    """L2 weights of EASE."""
    title_ease_lambdas: tuple[PositiveFloat, ...] = Field(default=(100.0, 200.0, 500.0), min_length=1)
    """L2 weights of the title-aware EASE."""
    title_ease_alphas: tuple[PositiveFloat, ...] = Field(default=(3.0, 10.0, 30.0), min_length=1)
    """Weights of the text Gram matrix relative to the interactions in the title-aware EASE."""
    ials_factors: tuple[PositiveInt, ...] = Field(default=(64, 256), min_length=1)
    """Numbers of latent factors of iALS."""
    ials_regularizations: tuple[PositiveFloat, ...] = Field(default=(30.0, 100.0, 300.0), min_length=1)
    """L2 weights of iALS."""
    ials_alphas: tuple[PositiveFloat, ...] = Field(default=(5.0, 20.0, 50.0, 100.0), min_length=1)
    """Confidence of a seen item in iALS; an unseen one has 1."""
    ials_iterations: PositiveInt = 15
    """Alternating sweeps of iALS."""
    num_threads: PositiveInt | None = None
    """Threads of iALS; None uses every core."""
    max_dense_gib: PositiveFloat = 2.0
    """Memory limit of the two dense [I, I] float32 matrices of EASE, in GiB; 2 GiB is about 16,000 items."""
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


def make_grids(data: SplitData, config: BaselineConfig) -> dict[BaselineName, list[Candidate]]:
    """Return the candidates of each baseline of `config.names`; an empty list for one that cannot run.

    Raises:
        ConfigError: if the catalog is too large for EASE.
    """
    needs_gram = not {"ease", "title_ease"}.isdisjoint(config.names)
    if needs_gram:
        _check_dense_memory(data.train.shape[1], config)
        gram = gram_matrix(data.train)
    grids: dict[BaselineName, list[Candidate]] = {}
    for name in config.names:
        if name == "popularity":
            grids[name] = _popularity(data)
        elif name == "ease":
            grids[name] = _ease(data, gram, config)
        elif name == "title_ease":
            grids[name] = _title_ease(data, gram, config)
        else:
            grids[name] = _ials(data, config)
    return grids


def _check_dense_memory(num_items: int, config: BaselineConfig) -> None:
    needed_gib = 2 * num_items**2 * np.dtype(np.float32).itemsize / 2**30
    if needed_gib > config.max_dense_gib:
        raise ConfigError(
            "baselines.max_dense_gib",
            config.max_dense_gib,
            f"must be at least {needed_gib:.1f} for the dense {num_items:,} x {num_items:,} matrices of EASE",
            "Raise it if there is enough memory, or remove ease and title_ease from baselines.names.",
        )


def _popularity(data: SplitData) -> list[Candidate]:
    counts = np.asarray(data.train.sum(axis=0), dtype=np.float32).ravel()
    return [Candidate({}, lambda: lambda start, stop: np.tile(counts, (stop - start, 1)))]


def _linear_scorer(histories: sp.csr_matrix, weights: Float32Array) -> Scorer:
    return lambda start, stop: histories[start:stop] @ weights


def _ease(data: SplitData, gram: Float32Array, config: BaselineConfig) -> list[Candidate]:
    def candidate(l2: float) -> Candidate:
        return Candidate({"lambda": l2}, lambda: _linear_scorer(data.histories, ease_weights(gram.copy(), l2)))

    return [candidate(l2) for l2 in config.ease_lambdas]


def _title_ease(data: SplitData, gram: Float32Array, config: BaselineConfig) -> list[Candidate]:
    """EASE on the interactions stacked on sqrt(alpha) times the text features as further rows ("users")."""
    if not any(_WORD.search(text) for text in data.item_texts):
        logger.warning("baseline title_ease is left out: no item has a text with words")
        return []
    features = text_features(data.item_texts)

    def fit(alpha: float, l2: float) -> Scorer:
        stacked_gram = gram.copy()
        for rows, block in gram_blocks(features):
            stacked_gram[rows] += np.float32(alpha) * block
        return _linear_scorer(data.histories, ease_weights(stacked_gram, l2))

    def candidate(alpha: float, l2: float) -> Candidate:
        return Candidate({"alpha": alpha, "lambda": l2}, lambda: fit(alpha, l2))

    return [candidate(*point) for point in product(config.title_ease_alphas, config.title_ease_lambdas)]


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
            users = model.user_factors
            if data.new_histories is not None:
                new = data.new_histories.astype(np.float32)
                users = np.concatenate([users, model.recalculate_user(np.arange(new.shape[0]), new)])
        return lambda start, stop: users[start:stop] @ model.item_factors.T

    def candidate(factors: int, regularization: float, alpha: float) -> Candidate:
        settings = {"factors": float(factors), "regularization": regularization, "alpha": alpha}
        return Candidate(settings, lambda: fit(factors, regularization, alpha))

    grid = product(config.ials_factors, config.ials_regularizations, config.ials_alphas)
    return [candidate(*point) for point in grid]
