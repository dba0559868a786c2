"""Where user and item rows start.

The paper draws collaborative rows from N(0, 1/lambda_l) and content rows from N(z_l, 1/lambda_c). The unit in which
both are measured is the scale s of the backbone's own embeddings: z_l has entries of standard deviation s, and z_c
lies around z_l with s * sqrt(lambda_l / lambda_c), never more than s.

Item rows may instead be centred on what is known before training, which decides most of the final quality
(`spectral`): left singular vectors of the items' side of the training interactions, degree-normalised, with their
TF-IDF word counts as further columns. An item that neither says anything about is drawn from the prior.

Noise is a function of (seed, table, row), so that a run starts the same at any world size. Singular vectors are
computed on rank 0 and scattered.

Legend: I items, U users, V words, D width, k factors.
"""

from __future__ import annotations

import math

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cllm4rec_dist.config import EmbeddingsConfig
from cllm4rec_dist.distributed.collectives import scatter_rows
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.sharded_embedding import RowShardedEmbedding

_NOISE_BLOCK = 4096
_MAX_FACTORS = 512
"""Singular vectors at most; more cost time and carry noise."""


def standard_normal(partition: RowPartition, width: int, world: World, seed: int, table: int) -> Tensor:
    """This rank's block of an [rows, width] fp32 matrix of N(0, 1) that is the same at any world size."""
    start, stop = partition.range(world.rank)
    blocks = []
    for block in range(start // _NOISE_BLOCK, -(-stop // _NOISE_BLOCK) if stop > start else 0):
        random = torch.Generator().manual_seed(
            int(np.random.SeedSequence([seed, 20, table, block]).generate_state(1)[0])
        )
        rows = torch.randn(_NOISE_BLOCK, width, generator=random)
        first = block * _NOISE_BLOCK
        blocks.append(rows[max(start - first, 0) : stop - first])
    return (torch.cat(blocks) if blocks else torch.empty(0, width)).to(world.device)


def spectral_item_init(
    train: sp.csr_matrix, word_counts: sp.csr_matrix, text_weight: float, width: int, seed: int
) -> Tensor:
    """Centre of the item prior, [I, D] fp32 with rows of unit norm (or zero, where nothing is known).

    The rows are U S^1/2 of the truncated singular value decomposition of [N^T, w T], where N = D_u^-1/2 X D_i^-1/2 are
    the interactions, T the TF-IDF rows of the items' words, and w makes the Frobenius norm of the second part
    `text_weight` times that of the first. S^1/2 stands between S, which only sees what is popular, and 1, which
    amplifies noise. Factors are rotated into the D dimensions by a random orthonormal matrix, so that no dimension of
    a pretrained backbone is special.

    Args:
        train: binary [U, I].
        word_counts: [I, V], how often each word stands in the texts about an item.
        text_weight: 0 leaves the texts out.
    """
    from sklearn.feature_extraction.text import TfidfTransformer  # a second of imports, for new runs alone
    from sklearn.utils.extmath import randomized_svd

    per_user = np.maximum(np.asarray(train.sum(axis=1)).ravel(), 1.0)
    per_item = np.maximum(np.asarray(train.sum(axis=0)).ravel(), 1.0)
    known = (sp.diags(per_user**-0.5) @ train.astype(np.float64) @ sp.diags(per_item**-0.5)).T.tocsr()
    if text_weight > 0 and word_counts.nnz:
        texts = TfidfTransformer(sublinear_tf=True).fit_transform(word_counts)
        known = sp.hstack([known, texts * (text_weight * sp.linalg.norm(known) / sp.linalg.norm(texts))]).tocsr()

    num_factors = min(_MAX_FACTORS, width, min(known.shape) - 1)
    left, values, _ = randomized_svd(known, num_factors, n_iter=6, random_state=seed)
    rows = left * np.sqrt(values)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    # Rows whose norm is only rounding error know nothing.
    rows = np.where(norms > 1e-9 * norms.max(), rows / np.maximum(norms, 1e-30), 0.0)
    random = np.random.default_rng([seed, 21])
    rotation = np.linalg.qr(random.standard_normal((width, num_factors)))[0].T
    return torch.from_numpy((rows @ rotation).astype(np.float32))


def init_items(items: RowShardedEmbedding, centre: Tensor | None, scale: float, world: World, seed: int) -> None:
    """Fill collaborative item rows around `centre`, the whole [I, D] on rank 0 and None elsewhere. Scatters."""
    width = items.local_rows.shape[1]
    noise = standard_normal(items.partition, width, world, seed, table=0)
    sizes = [items.partition.num_local(rank) for rank in range(world.size)]
    local = scatter_rows(centre, sizes, width, world)
    known = local.norm(dim=1, keepdim=True) > 0
    with torch.no_grad():
        items.local_rows.copy_(torch.where(known, local * math.sqrt(width), noise) * scale)


def init_prior(table: RowShardedEmbedding, scale: float, world: World, seed: int, index: int) -> None:
    """Fill collaborative rows with samples of N(0, scale^2)."""
    with torch.no_grad():
        noise = standard_normal(table.partition, table.local_rows.shape[1], world, seed, index)
        table.local_rows.copy_(noise * scale)


def init_content(
    content: RowShardedEmbedding,
    collaborative: RowShardedEmbedding,
    config: EmbeddingsConfig,
    scale: float,
    world: World,
    seed: int,
    index: int,
) -> None:
    """Fill content rows with samples of N(z_l, 1/lambda_c) in units of the backbone's scale."""
    ratio = 1.0 if config.lambda_c == 0 else min(1.0, math.sqrt(config.lambda_l / config.lambda_c))
    with torch.no_grad():
        noise = standard_normal(content.partition, content.local_rows.shape[1], world, seed, index)
        content.local_rows.copy_(collaborative.local_rows + noise * (scale * ratio))
