"""Where user and item rows start.

The paper draws collaborative rows from N(0, 1/lambda_l) and content rows from N(z_l, 1/lambda_c). The unit in which
both are measured is the scale s of the backbone's own embeddings: z_l has entries of standard deviation s, and z_c
lies around z_l with s * sqrt(lambda_l / lambda_c), never more than s.

Item rows may instead be centred on what is known before training, which decides most of the final quality: singular
vectors of the degree-normalised training interactions (`spectral`), or those beside singular vectors of the items'
TF-IDF word counts (`hybrid`). An item that the centre says nothing about is drawn from the prior.

Noise is a function of (seed, table, row), so that a run starts the same at any world size. Singular vectors are
computed on rank 0 and scattered.

Legend: I items, U users, V words, D width, k factors.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.feature_extraction.text import TfidfTransformer
from sklearn.utils.extmath import randomized_svd
from torch import Tensor

from cllm4rec_dist.collectives import scatter_rows
from cllm4rec_dist.config import RowsConfig
from cllm4rec_dist.model.tables import ShardedTable
from cllm4rec_dist.topology import RowPartition, World

_NOISE_BLOCK = 4096
_MAX_FACTORS = 256
"""Singular vectors of one kind; more cost time and carry noise."""


def standard_normal(partition: RowPartition, width: int, world: World, seed: int, table: int) -> Tensor:
    """This rank's block of an [rows, width] fp32 matrix of N(0, 1) that is the same at any world size."""
    start, stop = partition.range(world.rank)
    blocks = []
    for block in range(start // _NOISE_BLOCK, -(-stop // _NOISE_BLOCK) if stop > start else 0):
        random = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, 20, table, block]).generate_state(1)[0]))
        rows = torch.randn(_NOISE_BLOCK, width, generator=random)
        first = block * _NOISE_BLOCK
        blocks.append(rows[max(start - first, 0) : stop - first])
    return (torch.cat(blocks) if blocks else torch.empty(0, width)).to(world.device)


def spectral_directions(train: sp.csr_matrix, num_factors: int, seed: int) -> np.ndarray:
    """Unit rows [I, k] from the right singular vectors of D_u^-1/2 X D_i^-1/2, scaled by their singular values.

    Args:
        train: binary [U, I].
    """
    per_user = np.maximum(np.asarray(train.sum(axis=1)).ravel(), 1)
    per_item = np.maximum(np.asarray(train.sum(axis=0)).ravel(), 1)
    normalised = sp.diags(per_user**-0.5) @ train.astype(np.float64) @ sp.diags(per_item**-0.5)
    return _directions(normalised.T.tocsr(), num_factors, seed)


def text_directions(word_counts: sp.csr_matrix, num_factors: int, seed: int) -> np.ndarray:
    """Unit rows [I, k] from singular vectors of the items' TF-IDF word counts [I, V]; zero for an item without text."""
    return _directions(TfidfTransformer(sublinear_tf=True).fit_transform(word_counts).tocsr(), num_factors, seed)


def _directions(matrix: sp.csr_matrix, num_factors: int, seed: int) -> np.ndarray:
    rank = min(num_factors, min(matrix.shape) - 1)
    if rank < 1 or matrix.nnz == 0:
        return np.zeros((matrix.shape[0], num_factors), dtype=np.float32)
    left, values, _ = randomized_svd(matrix, rank, n_iter=6, random_state=seed)
    rows = np.zeros((matrix.shape[0], num_factors), dtype=np.float32)
    rows[:, :rank] = left * values
    # Rows whose norm is only rounding error know nothing.
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.where(norms > 1e-6 * norms.max(), rows / np.maximum(norms, 1e-12), 0.0)


def item_centre(start: str, train: sp.csr_matrix, word_counts: sp.csr_matrix, width: int, seed: int) -> Tensor:
    """Centre of the item prior, [I, D] fp32 with rows of unit norm (or zero, where nothing is known).

    Factors are rotated into the D dimensions by a random orthonormal matrix, so that no dimension of a pretrained
    backbone is special.
    """
    parts = []
    num_factors = min(_MAX_FACTORS, width if start == "spectral" else width // 2)
    parts.append(spectral_directions(train, num_factors, seed))
    if start == "hybrid":
        parts.append(text_directions(word_counts, num_factors, seed))
    rows = np.concatenate(parts, axis=1)
    rows /= np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    random = np.random.default_rng([seed, 21])
    rotation = np.linalg.qr(random.standard_normal((width, rows.shape[1])))[0].T
    return torch.from_numpy((rows @ rotation).astype(np.float32))


def start_items(items: ShardedTable, centre: Tensor | None, scale: float, world: World, seed: int) -> None:
    """Fill collaborative item rows. `centre` is the whole [I, D] on rank 0 or None for the paper's prior. Scatters."""
    width = items.local_rows.shape[1]
    noise = standard_normal(items.partition, width, world, seed, table=0)
    sizes = [items.partition.num_local(rank) for rank in range(world.size)]
    local = scatter_rows(centre, sizes, width, world)
    known = local.norm(dim=1, keepdim=True) > 0
    with torch.no_grad():
        items.local_rows.copy_(torch.where(known, local * math.sqrt(width), noise) * scale)


def start_prior(table: ShardedTable, scale: float, world: World, seed: int, index: int) -> None:
    """Fill collaborative rows with samples of N(0, scale^2)."""
    with torch.no_grad():
        noise = standard_normal(table.partition, table.local_rows.shape[1], world, seed, index)
        table.local_rows.copy_(noise * scale)


def start_content(content: ShardedTable, collaborative: ShardedTable, config: RowsConfig, scale: float, world: World, seed: int, index: int) -> None:
    """Fill content rows with samples of N(z_l, 1/lambda_c) in units of the backbone's scale."""
    ratio = 1.0 if config.lambda_c == 0 else min(1.0, math.sqrt(config.lambda_l / config.lambda_c))
    with torch.no_grad():
        noise = standard_normal(content.partition, content.local_rows.shape[1], world, seed, index)
        content.local_rows.copy_(collaborative.local_rows + noise * (scale * ratio))
