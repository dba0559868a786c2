"""The split of the baselines, candidates of their grids, and samples on which settings are chosen.

Where a grid takes too long on the whole split, its candidates are fitted and ranked on a sample, of users with their
items or of items, and the chosen one is fitted once on everything. Samples are drawn by a hash of positions.

Shapes: U training users, N new ones, P = U + N, I items, b users of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from cllm4rec_dist.corpus.stateless_rng import keyed_bits
from cllm4rec_dist.errors import DataError

Float32Array = NDArray[np.float32]
IntArray = NDArray[np.int64]
Scorer = Callable[[IntArray], Float32Array]
"""Returns scores [b, I] of b users in a new array, which the caller may overwrite."""
Progress = Callable[[], object]
"""Called after each part of a fit."""
_SAMPLE = 0xBA5E
"""Key of the random bits by which users and items are sampled."""
_SAMPLE_SCORES = 2**32
"""Most scores by which all candidates are ranked on a sample, together: a minute or two."""


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
    """A point of a grid.

    Attributes:
        settings: its settings.
        fit: fits it, calling the argument after each of `num_sweeps` sweeps.
    """

    settings: dict[str, float]
    fit: Callable[[Progress], Scorer]
    num_sweeps: int = 0


@dataclass(frozen=True)
class Sample:
    """What settings are chosen on where the whole split is too large.

    Attributes:
        data: its validation items are those to rank by; test has the same.
        candidates: those of the grid, in its order, fitted on the sample.
        description: what was sampled, such as "5,000 of 200,000 users".
        last: setting that is compared last, with the best values of the others, which are compared by its lowest value;
            None to compare all candidates.
    """

    data: SplitData
    candidates: Sequence[Candidate]
    description: str
    last: str | None = None

    def first_round(self) -> list[int]:
        """Return the indices of the candidates that are compared first."""
        if self.last is None:
            return [*range(len(self.candidates))]
        values = [candidate.settings[self.last] for candidate in self.candidates]
        return [index for index, value in enumerate(values) if value == min(values)]

    def second_round(self, best: int) -> list[int]:
        """Return the indices of the candidates that differ from the best of the first round in `last` alone."""
        if self.last is None:
            return []
        others = [{**candidate.settings, self.last: 0.0} for candidate in self.candidates]
        return [index for index, settings in enumerate(others) if index != best and settings == others[best]]


@dataclass(frozen=True)
class Grid:
    """Candidates of a baseline, at least one.

    Attributes:
        candidates: candidates, fitted on everything.
        draw: draws the sample on which one of them is chosen, None if it has no validation items; None to choose on
            everything.
        num_compared: candidates that are compared on the sample.
        middle: index of the candidate that is fitted if the sample has no validation items.
    """

    candidates: Sequence[Candidate]
    draw: Callable[[], Sample | None] | None = None
    num_compared: int = 0
    middle: int = 0


def middle_point(*axes: Sequence[float]) -> int:
    """Return the index of the middle of a grid among the product of its axes."""
    return int(np.ravel_multi_index([(len(axis) - 1) // 2 for axis in axes], [len(axis) for axis in axes]))


def sample_users(
    data: SplitData, is_small: Callable[[IntArray, IntArray], NDArray[np.bool_]], num_candidates: int
) -> SplitData | None:
    """Return training users with their items and nothing else; None if none of their validation items is among these.

    Users with validation items come first, in the order of the hash, as many as are small enough together.

    Args:
        is_small: for numbers of interactions, and of users and items with any, ascending: whether they are few enough.
        num_candidates: candidates by which the sample is ranked.
    """
    num_users = data.train.shape[0]
    keys = keyed_bits(_SAMPLE, 0, np.arange(num_users))
    order = np.lexsort([keys, np.diff(data.valid.indptr[: num_users + 1]) == 0])
    ordered = data.train[order]
    ends = ordered.indptr[1:].astype(np.int64)
    # Items that have appeared by each user, from the position at which each one comes first.
    num_items = np.searchsorted(np.sort(np.unique(ordered.indices, return_index=True)[1]), ends)
    users = np.sort(order[: np.count_nonzero(is_small(ends, num_items + np.arange(1, num_users + 1)))])
    items = np.flatnonzero(data.train[users].getnnz(axis=0))
    valid = data.valid[np.concatenate([users, np.arange(num_users, data.valid.shape[0])])][:, items]
    valid = _of_few_users(valid, num_candidates)
    if not valid.nnz:
        return None
    new = len(users) + np.flatnonzero(np.diff(valid.indptr[len(users) :]))
    valid = valid[np.concatenate([np.arange(len(users)), new])]
    histories = None
    if data.new_histories is not None and len(new):
        histories = data.new_histories[new - len(users)][:, items]
    texts = [data.item_texts[item] for item in items.tolist()]
    return SplitData(data.train[users][:, items], valid, valid, texts, histories)


def sample_items(data: SplitData, count: int, num_candidates: int) -> tuple[IntArray, SplitData] | None:
    """Return `count` items and the split of all users with these items alone; None if none of them is in validation.

    Args:
        num_candidates: candidates by which the sample is ranked.
    """
    keys = keyed_bits(_SAMPLE, 1, np.arange(data.train.shape[1]))
    items = np.sort(np.argsort(keys, kind="stable")[:count])
    valid = _of_few_users(data.valid[:, items], num_candidates)
    if not valid.nnz:
        return None
    histories = None if data.new_histories is None else data.new_histories[:, items]
    texts = [data.item_texts[item] for item in items.tolist()]
    return items, SplitData(data.train[:, items], valid, valid, texts, histories)


def _of_few_users(held_out: sp.csr_matrix, num_candidates: int) -> sp.csr_matrix:
    """Leave out the held-out items of users, by a hash, beyond those whose scores are few enough."""
    users = np.flatnonzero(np.diff(held_out.indptr))
    most = _SAMPLE_SCORES // num_candidates // max(1, held_out.shape[1])
    kept = np.zeros(held_out.shape[0], np.float32)
    order = np.argsort(keyed_bits(_SAMPLE, 2, users), kind="stable")
    kept[users[order[: max(1, most)]]] = 1
    chosen = (sp.diags(kept) @ held_out).tocsr()
    chosen.eliminate_zeros()
    return chosen
