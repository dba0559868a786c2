"""Initialization of user and item embeddings.

The paper draws collaborative rows from N(0, 1/lambda_l) and content rows from N(z_l, 1/lambda_c). Both are scaled by s,
the root mean square of the backbone's word embeddings: z_l has entries of standard deviation s, and z_c has a standard
deviation of min(s, s * sqrt(lambda_l / lambda_c)) around z_l.

With `spectral`, item rows are instead initialized from the training data, which decides most of the final quality: left
singular vectors of the transposed, degree-normalized interactions, with the items' TF-IDF word counts as further
columns. An item without interactions and texts is drawn from the prior.

Noise is a function of (seed, table, row), so that the initialization does not depend on the world size. Singular
vectors are computed on rank 0 and scattered.

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
"""Maximum number of singular vectors; more cost time and add noise."""


def standard_normal(partition: RowPartition, width: int, world: World, seed: int, table: int) -> Tensor:
    """This rank's block of an fp32 matrix [rows, width] of N(0, 1) samples that do not depend on the world size."""
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
    """Initial directions of the items, [I, D] fp32 with rows of unit norm, or zero for items without any data.

    The rows are U S^1/2 of the truncated singular value decomposition of [N^T, w T], where N = D_u^-1/2 X D_i^-1/2 are
    the interactions, T the TF-IDF rows of the items' words, and w makes the Frobenius norm of the second part
    `text_weight` times that of the first. S^1/2 is a compromise between S, which is dominated by popular items, and 1,
    which amplifies noise. A random orthonormal matrix rotates the factors into D dimensions, so that no dimension of a
    pretrained backbone is special.

    Args:
        train: binary [U, I].
        word_counts: [I, V], how often each word occurs in the texts about an item.
        text_weight: 0 leaves the texts out.
    """
    from sklearn.feature_extraction.text import TfidfTransformer  # takes a second to import; only new runs need it
    from sklearn.utils.extmath import randomized_svd

    per_user = np.maximum(np.asarray(train.sum(axis=1)).ravel(), 1.0)
    per_item = np.maximum(np.asarray(train.sum(axis=0)).ravel(), 1.0)
    features = (sp.diags(per_user**-0.5) @ train.astype(np.float64) @ sp.diags(per_item**-0.5)).T.tocsr()
    if text_weight > 0 and word_counts.nnz:
        texts = TfidfTransformer(sublinear_tf=True).fit_transform(word_counts)
        texts_scale = text_weight * sp.linalg.norm(features) / sp.linalg.norm(texts)
        features = sp.hstack([features, texts * texts_scale]).tocsr()

    num_factors = min(_MAX_FACTORS, width, min(features.shape) - 1)
    left, values, _ = randomized_svd(features, num_factors, n_iter=6, random_state=seed)
    rows = left * np.sqrt(values)
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    # Zero rows whose norm is only rounding error.
    rows = np.where(norms > 1e-9 * norms.max(), rows / np.maximum(norms, 1e-30), 0.0)
    random = np.random.default_rng([seed, 21])
    rotation = np.linalg.qr(random.standard_normal((width, num_factors)))[0].T
    return torch.from_numpy((rows @ rotation).astype(np.float32))


def init_items(items: RowShardedEmbedding, directions: Tensor | None, scale: float, world: World, seed: int) -> None:
    """Fill collaborative item rows from `directions`, or with N(0, scale^2) where these are zero. Scatters.

    Args:
        directions: result of `spectral_item_init`, [I, D] on rank 0 and None on the others.
    """
    width = items.local_rows.shape[1]
    noise = standard_normal(items.partition, width, world, seed, table=0)
    sizes = [items.partition.num_local(rank) for rank in range(world.size)]
    local = scatter_rows(directions, sizes, width, world)
    has_direction = local.norm(dim=1, keepdim=True) > 0
    with torch.no_grad():
        items.local_rows.copy_(torch.where(has_direction, local * math.sqrt(width), noise) * scale)


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
