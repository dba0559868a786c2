"""Features of items, row-sharded like the item table: [N^T | w T | v V].

    N   D_u^-1/2 X D_i^-1/2, the degree-normalized training interactions X [U, I]
    T   [I, V] TF-IDF of the words in the texts about each item, rows of unit norm
    V   [I, d] dense vectors of the items' texts, whitened, rows of unit norm; left out without vectors

w and v make the Frobenius norms of T and V fixed multiples of that of N. Each rank reads every W-th record of the
corpus and sends what it reads to the owners of the items, so that no rank reads or holds the whole matrix.

Legend: U users, I items, V words, d size of a dense vector, n items of this rank, W ranks, m entries.
"""

from __future__ import annotations

import math
import warnings

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cllm4rec_dist.corpus.shards import ContentKind, Corpus, ShardSet
from cllm4rec_dist.distributed.collectives import all_reduce_sum, all_to_all_rows, exchange_counts
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.spectral import RowShardedFeatures

_Entries = tuple[np.ndarray, np.ndarray, np.ndarray]
"""Rows, columns and values of a sparse matrix, each [m]."""


def build_item_features(
    corpus: Corpus,
    num_words: int,
    partition: RowPartition,
    world: World,
    *,
    word_weight: float,
    vectors: Tensor | None = None,
    vectors_weight: float = 0.0,
) -> RowShardedFeatures:
    """Build this rank's rows on its device. Collective.

    Args:
        num_words: V.
        partition: of the items.
        word_weight: Frobenius norm of w T relative to that of N; 0 leaves the words out.
        vectors: this rank's rows of V, fp32 [n, d], zero for an item without a vector.
        vectors_weight: Frobenius norm of v V relative to that of N.
    """
    interactions = local_interactions(corpus, partition, world)
    dense = vectors if vectors is not None and vectors_weight > 0 else torch.zeros(interactions.shape[0], 0)
    words = local_tfidf(corpus, num_words, partition, world) if word_weight > 0 else None
    squares = [
        float((block.data.astype(np.float64) ** 2).sum()) for block in (interactions, words) if block is not None
    ]
    squares.append(float(dense.double().square().sum()))
    total, *others = all_reduce_sum(torch.tensor(squares, dtype=torch.float64, device=world.device), world).tolist()
    scales = [
        weight * math.sqrt(total / max(other, 1e-30))
        for weight, other in zip(
            (word_weight, vectors_weight) if words is not None else (vectors_weight,), others, strict=True
        )
    ]
    if words is not None:
        interactions = sp.hstack([interactions, words * np.float32(scales[0])], format="csr")
    return RowShardedFeatures(
        to_sparse_csr(interactions, world),
        to_sparse_csr(interactions.T.tocsr(), world),
        dense.to(world.device) * scales[-1],
    )


def local_interactions(corpus: Corpus, partition: RowPartition, world: World) -> sp.csr_matrix:
    """This rank's rows of N^T, [n, U] fp32. Exchanges the interactions."""
    first_users = np.cumsum(corpus.interactions.record_sizes) - corpus.interactions.record_sizes
    items, users, degrees = [], [], []
    for index in records_of(corpus.interactions, world):
        record = corpus.interactions.read_record(index, ("users", "train_offsets", "train_items"))
        lengths = np.diff(record["train_offsets"])
        items.append(record["train_items"])
        users.append(np.repeat(first_users[index] + np.arange(len(lengths)), lengths))
        degrees.append(np.repeat(lengths, lengths))
    rows, columns, degree = send_to_owners(
        (join_parts(items), join_parts(users), join_parts(degrees)), partition, world
    )
    num_local = partition.num_local(world.rank)
    item_degree = np.bincount(rows, minlength=num_local)
    values = (degree.astype(np.float64) * item_degree[rows]) ** -0.5
    return _csr(rows, columns, values, (num_local, corpus.num_users))


def local_item_counts(corpus: Corpus, partition: RowPartition, world: World) -> np.ndarray:
    """Training interactions of each item of this rank, int64 [n]. Exchanges the counts."""
    read = (
        corpus.interactions.read_record(index, ("train_items",))["train_items"]
        for index in records_of(corpus.interactions, world)
    )
    items, counts = np.unique(join_parts([*read]), return_counts=True)
    rows, _, counts = send_to_owners((items, items, counts.astype(np.int32)), partition, world)
    total = np.zeros(partition.num_local(world.rank), np.int64)
    np.add.at(total, rows, counts)
    return total


def local_tfidf(corpus: Corpus, num_words: int, partition: RowPartition, world: World) -> sp.csr_matrix:
    """This rank's rows of T, [n, V] fp32, with sublinear term frequencies and smoothed document frequencies.

    Reviews of the training split count as texts about their item. Exchanges the counts and all-reduces [V].
    """
    items, words, counts = [], [], []
    for index in records_of(corpus.content, world):
        record = corpus.content.read_record(index)
        about = np.where(record["kind"] == ContentKind.USER_PROFILE, corpus.num_items, record["items"])
        pairs = np.repeat(about, np.diff(record["offsets"])) * num_words + record["tokens"]
        distinct, times = np.unique(pairs[pairs < corpus.num_items * num_words], return_counts=True)
        items.append(distinct // num_words)
        words.append(distinct % num_words)
        counts.append(times)
    rows, columns, times = send_to_owners((join_parts(items), join_parts(words), join_parts(counts)), partition, world)
    tfidf = _csr(rows, columns, times, (partition.num_local(world.rank), num_words))
    local = torch.from_numpy(np.bincount(tfidf.indices, minlength=num_words)).to(world.device)
    frequencies = all_reduce_sum(local, world, "document frequencies").cpu().numpy()
    inverse = np.log((1 + corpus.num_items) / (1 + frequencies)) + 1
    values = (1 + np.log(tfidf.data.astype(np.float64))) * inverse[tfidf.indices]
    lengths = np.diff(tfidf.indptr)
    norms = np.sqrt(np.bincount(np.repeat(np.arange(len(lengths)), lengths), values**2, minlength=len(lengths)))
    tfidf.data = (values / np.repeat(norms, lengths)).astype(np.float32)
    return tfidf


def records_of(shards: ShardSet, world: World) -> range:
    return range(world.rank, len(shards.record_sizes), world.size)


def join_parts(parts: list[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.empty(0, np.int64), *parts]).astype(np.int32)


def send_to_owners(entries: _Entries, partition: RowPartition, world: World) -> _Entries:
    """Send entries, int32, to the owners of their rows; returned rows are local. Two all-to-alls."""
    owners = entries[0] // partition.block
    order = np.argsort(owners, kind="stable")
    packed = torch.from_numpy(np.stack(entries, axis=1)[order]).to(world.device)
    send_counts = torch.from_numpy(np.bincount(owners, minlength=world.size))
    receive_counts = exchange_counts(send_counts, world)
    received = all_to_all_rows(packed, send_counts.tolist(), receive_counts.tolist(), world, "item features")
    rows, columns, values = received.cpu().numpy().T
    return rows - partition.range(world.rank)[0], columns, values


def _csr(rows: np.ndarray, columns: np.ndarray, values: np.ndarray, shape: tuple[int, int]) -> sp.csr_matrix:
    """Sum duplicates and sort columns, so that the result does not depend on the order of the entries."""
    return sp.coo_matrix((values.astype(np.float32), (rows, columns)), shape=shape).tocsr()


def to_sparse_csr(matrix: sp.csr_matrix, world: World) -> Tensor:
    """Copy a matrix to this rank's device with int32 indices."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning, message="Sparse")  # CSR is a beta feature of torch
        return torch.sparse_csr_tensor(
            torch.from_numpy(matrix.indptr.astype(np.int32)),
            torch.from_numpy(matrix.indices.astype(np.int32)),
            torch.from_numpy(matrix.data.astype(np.float32)),
            size=matrix.shape,
            check_invariants=False,
        ).to(world.device)
