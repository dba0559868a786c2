"""Item-item weights by ridge regression of each item on its strongest neighbors, without torch.

EASE (Steck, "Embarrassingly Shallow Autoencoders for Sparse Data", WWW 2019) predicts an item from all other items,
which needs dense [I, I] matrices. Its zero diagonal makes the columns independent ridge regressions,

    w_j = (A[N, N] + l2)^-1 A[N, j],    A = X'D X + text_weight T T',    N = all items but j,

so that N may be restricted to the K items k with the largest A[j, k] / sqrt(A[k, k]). D weighs users by the length of
their histories. With K = I - 1 and D = 1 the weights are those of EASE (of the title-aware EASE with a text weight
above 0). Dropout p of the features divides the diagonal of A[N, N] by 1 - p, its expectation in closed form (Steck,
"Autoencoders that don't overfit towards the Identity", NeurIPS 2020).

Nothing dense of size [I, I] is made of more than a few thousand items: the choice of neighbors keeps only the largest
entries of a sparse product, and the fit computes A again for the neighbors of a batch of items. An item costs
2 K^3 / 3 FLOPs and the sparse products of its neighbors' features, whatever the size of the catalog.

Legend: U users, I items, W words, K neighbors, n items of a block, b items of a batch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Self

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from sparse_dot_topn import sp_matmul_topn
from threadpoolctl import threadpool_limits

from cllm4rec_dist.config import LinearConfig

_WORD_ITEMS, _WORD_PAIRS = (2_000, 20_000), 400_000_000
"""Bounds of `_max_word_items`, and the largest product of a word's items and all items between them."""
_BATCH_ENTRIES = 1 << 20
"""Entries of the Gram matrices of a batch: 8 MiB in fp64. With eight times as many a fit takes twice as long."""
_DENSE_ITEMS = 4096
"""Items of a catalog whose A is kept whole (128 MiB in fp64)."""


@dataclass(frozen=True)
class LinearSettings:
    """Settings of a fit.

    Attributes:
        text_weight: weight of T T' in A; 0 leaves the texts out.
        regularization: L2 weight of the regressions, above 0.
        history_power: exponent of `history_weights`.
        dropout: probability of leaving out a neighbor's feature in the regressions, below 1.
    """

    text_weight: float = 10.0
    regularization: float = 200.0
    history_power: float = 0.0
    dropout: float = 0.0

    @classmethod
    def of(cls, config: LinearConfig) -> Self:
        """Return the settings of a run, with the default for each that is left to validation."""
        return cls(**config.model_dump(exclude={"neighbors", "max_entries", "weight"}, exclude_none=True))


@dataclass(frozen=True)
class ItemFeatures:
    """Rows F [I, U + W] with A = F F': interactions and texts, times the roots of their weights.

    Attributes:
        rows: CSR [I + 1, U + W] fp64; the last row is empty and serves as padding.
        gram: A, with zeros for the padding, fp64 [I + 1, I + 1]; None if it is not kept.
    """

    rows: sp.csr_matrix
    gram: NDArray[np.float64] | None = None

    @property
    def num_items(self) -> int:
        """Number of items I."""
        return self.rows.shape[0] - 1

    @cached_property
    def squares(self) -> NDArray[np.float64]:
        """A[k, k] of each item, 0 for the padding: [I + 1]."""
        squares = np.add.reduceat(np.append(self.rows.data**2, 0.0), self.rows.indptr[:-1])
        squares[np.diff(self.rows.indptr) == 0] = 0.0  # reduceat gives these the next entry
        return squares

    @cached_property
    def directions(self) -> sp.csr_matrix:
        """F[k] / sqrt(A[k, k]) of each item k as columns: CSR [U + W, I]."""
        lengths = np.sqrt(self.squares[:-1])
        scale = np.divide(1.0, lengths, out=np.zeros(self.num_items), where=lengths > 0)
        columns = self.rows[:-1].T.tocsr()
        columns.data *= scale[columns.indices]
        return columns

    def with_gram(self) -> ItemFeatures:
        """Keep A whole, which makes fits of many items faster, unless the catalog is too large for it."""
        return replace(self, gram=(self.rows @ self.rows.T).toarray()) if self.num_items <= _DENSE_ITEMS else self


def _max_word_items(num_items: int) -> int:
    """Return of how many items a word may be; words of more are left out of the texts.

    Choosing neighbors costs the square of a word's number of items, and such words say little in a large catalog.
    """
    fewest, most = _WORD_ITEMS
    return min(most, max(fewest, _WORD_PAIRS // max(1, num_items)))


def text_features(item_texts: Sequence[str]) -> sp.csr_matrix:
    """Return L2-normalized TF-IDF rows [I, W]; zeros for an item without words. W may be 0."""
    from sklearn.feature_extraction.text import TfidfVectorizer  # takes a second to import

    vectorizer = TfidfVectorizer(sublinear_tf=True, dtype=np.float32, max_df=_max_word_items(len(item_texts)))
    try:
        return vectorizer.fit_transform(item_texts)
    except ValueError:  # no text has a word that counts
        return sp.csr_matrix((len(item_texts), 0), dtype=np.float32)


@dataclass(frozen=True)
class WordCounts:
    """Word counts of a catalog's texts, from which `text_features` of a larger catalog are computed quickly.

    Attributes:
        vocabulary: column of each word.
        counts: fp32 [I, W].
    """

    vocabulary: Mapping[str, int]
    counts: sp.csr_matrix

    @classmethod
    def of(cls, item_texts: Sequence[str]) -> WordCounts:
        """Count the words of I texts."""
        return cls(*_count_words(item_texts))

    def text_features(self, more_texts: Sequence[str]) -> sp.csr_matrix:
        """Return `text_features` of the texts and `more_texts`, [I + n, W'], up to the order of the columns."""
        from sklearn.feature_extraction.text import TfidfTransformer

        words, counts = _count_words(more_texts)
        num_words = len(self.vocabulary)
        unseen = {word: num_words + index for index, word in enumerate(words.keys() - self.vocabulary.keys())}
        column = np.empty(len(words), np.int32)
        for word, index in words.items():
            column[index] = self.vocabulary.get(word, unseen.get(word, -1))
        width = num_words + len(unseen)
        all_counts = sp.vstack(
            [
                sp.csr_matrix((part.data, indices, part.indptr), shape=(part.shape[0], width))
                for part, indices in ((self.counts, self.counts.indices), (counts, column[counts.indices]))
            ],
            format="csr",
        )
        is_kept = np.bincount(all_counts.indices, minlength=width) <= _max_word_items(all_counts.shape[0])
        if not is_kept.all():
            all_counts = all_counts[:, is_kept]
        if not all_counts.shape[1]:
            return all_counts
        return TfidfTransformer(sublinear_tf=True).fit_transform(all_counts)


def _count_words(texts: Sequence[str]) -> tuple[dict[str, int], sp.csr_matrix]:
    """Return the words of the texts with their columns, and their counts, fp32 [n, words]."""
    from sklearn.feature_extraction.text import CountVectorizer

    vectorizer = CountVectorizer(dtype=np.float32)
    try:
        counts = vectorizer.fit_transform(texts)
    except ValueError:  # no text has a word
        return {}, sp.csr_matrix((len(texts), 0), dtype=np.float32)
    return vectorizer.vocabulary_, counts


def history_weights(train: sp.csr_matrix, power: float) -> NDArray[np.float64]:
    """Return the weight [U] of each user's interactions: n^-power for n of them, 1 on average over all interactions.

    Long histories say less about each pair of their items, and have most of the pairs.
    """
    counts = np.diff(train.indptr).astype(np.float64)
    weights = np.maximum(counts, 1.0) ** -power
    return weights * (counts.sum() / max((weights * counts).sum(), 1.0))


def item_features(
    train: sp.csr_matrix, texts: sp.csr_matrix, text_weight: float, history_power: float = 0.0
) -> ItemFeatures:
    """Stack weighted interactions and weighted texts; the weights are those of `LinearSettings`.

    Args:
        train: binary [U, I] of the training interactions.
        texts: [I, W], from `text_features`.
    """
    rows = train.T.tocsr().astype(np.float64)
    rows.data *= np.sqrt(history_weights(train, history_power))[rows.indices]
    if text_weight > 0 and texts.shape[1]:
        rows = sp.hstack([rows, texts.astype(np.float64) * np.sqrt(text_weight)], format="csr")
    rows.sort_indices()  # sums are then the same in every block
    offsets = np.append(rows.indptr, rows.indptr[-1])
    return ItemFeatures(sp.csr_matrix((rows.data, rows.indices, offsets), shape=(rows.shape[0] + 1, rows.shape[1])))


def strongest_neighbors(
    features: ItemFeatures, items: np.ndarray, num_neighbors: int, num_threads: int = 1
) -> NDArray[np.int32]:
    """Return the strongest neighbors of n items: [n, K], ascending, then -1 for those that do not exist.

    K is `num_neighbors`, at most I - 1; then it is every other item, related or not. Which of equally strong neighbors
    are chosen depends on the features alone, not on the other items of the block. Each call copies the features, so
    blocks should be large.
    """
    num_items = features.num_items
    width = min(num_neighbors, num_items - 1)
    if width == num_items - 1:
        others = np.arange(width, dtype=np.int32)[None, :]
        return others + (others >= items[:, None])
    # One more, because an item is its own strongest neighbor; where it is missing, all that are found are as strong.
    strengths = sp_matmul_topn(
        features.rows[items],
        features.directions,
        width + 1,
        threshold=0.0,
        n_threads=num_threads,
        idx_dtype=features.directions.indptr.dtype,  # int32 is the default, in which many entries would overflow
    )
    missing = np.int32(num_items)
    found = np.full((len(items), width + 1), missing)
    found[np.arange(width + 1) < np.diff(strengths.indptr)[:, None]] = strengths.indices[: strengths.indptr[-1]]
    found[found == items[:, None]] = missing
    found = np.sort(found, axis=1)[:, :width]
    return np.where(found < missing, found, np.int32(-1))


def ridge_weights(
    features: ItemFeatures, items: np.ndarray, neighbors: np.ndarray, settings: LinearSettings, num_threads: int = 1
) -> NDArray[np.float64]:
    """Return the ridge weights of the neighbors of n items: [n, K], zero where there is no neighbor.

    Items are solved in batches of about equally many neighbors, in `num_threads` threads.

    Args:
        items: int [n].
        neighbors: int32 [n, K], from `strongest_neighbors`.
        settings: of which `regularization` and `dropout` count; the others are in the features.
    """
    weights = np.zeros(neighbors.shape)
    counts = (neighbors >= 0).sum(axis=1)
    order = np.argsort(-counts, kind="stable")
    order = order[counts[order] > 0]
    batches = []
    while len(order):
        width = int(counts[order[0]])
        batch, order = np.split(order, [max(1, _BATCH_ENTRIES // (width + 1) ** 2)])
        batches.append(batch)

    def solve(batch: np.ndarray) -> None:
        chosen = neighbors[batch, : counts[batch[0]]]
        weights[batch, : chosen.shape[1]] = _solve(features, items[batch], chosen, settings)

    # One thread of the products for each of ours: more would only wait for each other.
    with threadpool_limits(limits=1, user_api="blas"), ThreadPoolExecutor(num_threads) as pool:
        for _ in pool.map(solve, batches):
            pass
    return weights


def _solve(
    features: ItemFeatures, items: np.ndarray, neighbors: np.ndarray, settings: LinearSettings
) -> NDArray[np.float64]:
    """Return the ridge weights [b, K] of a batch of items; padding has weight 0."""
    width = neighbors.shape[1]
    gram = _gram_matrices(features, np.column_stack([neighbors, items]))
    systems, targets = gram[:, :width, :width], gram[:, :width, width, None].copy()
    diagonals = np.einsum("bii->bi", systems)  # a view
    diagonals /= 1.0 - settings.dropout
    diagonals += settings.regularization
    solved: NDArray[np.float64] = np.linalg.solve(systems, targets).astype(np.float64, copy=False)
    return solved[:, :, 0]


def _gram_matrices(features: ItemFeatures, items: np.ndarray) -> NDArray[np.float64]:
    """Return A[S, S] for the rows S of `items` [b, k], -1 for padding: [b, k, k].

    Without A they are the diagonal blocks of one sparse product. A feature that only one item of a set has counts for
    nothing but that item's diagonal entry, which is known, so the product has the other features alone.
    """
    num_sets, width = items.shape
    sets = np.where(items < 0, features.num_items, items)
    if features.gram is not None:
        return features.gram[sets[:, :, None], sets[:, None, :]]
    shared = _shared_features(features.rows[sets.ravel()], width)
    product = shared.tocsr() @ shared.T
    first = np.repeat(np.arange(num_sets) * width, width)  # row of its set's first item
    starts = np.arange(num_sets * width) * width - first
    gram = np.zeros((num_sets, width, width))
    gram.ravel()[np.repeat(starts, np.diff(product.indptr)) + product.indices] = product.data
    np.einsum("bii->bi", gram)[:] = features.squares[sets]
    return gram


def _shared_features(rows: sp.csr_matrix, width: int) -> sp.csc_matrix:
    """Return the features that several items of a set share, with columns of their own for each set: CSC [b k, shared].

    Args:
        rows: CSR [b k, U + W], the features of the k = `width` items of each of b sets.
    """
    of_set = np.repeat(np.arange(rows.shape[0] // width), np.diff(rows.indptr[::width]))
    column = of_set * rows.shape[1] + rows.indices
    # Sorted, and not transposed: that takes time and memory for every feature of the catalog.
    entry = np.argsort(column)
    column = column[entry]
    is_same = column[1:] == column[:-1]
    is_shared = np.zeros(len(column), bool)
    is_shared[1:] = is_same
    is_shared[:-1] |= is_same
    entry, column = entry[is_shared], column[is_shared]
    offsets = np.append(np.flatnonzero(np.diff(column, prepend=-1)), len(column))
    row = np.repeat(np.arange(rows.shape[0]), np.diff(rows.indptr))
    return sp.csc_matrix((rows.data[entry], row[entry], offsets), shape=(rows.shape[0], len(offsets) - 1))
