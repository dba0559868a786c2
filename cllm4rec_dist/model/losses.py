"""Loss terms. Each returns the sum over this rank's part, in nats.

A step divides the sum over all ranks by the number of predictions (or embedding rows) of the whole optimizer step, so
that every term is a mean that does not depend on batch size, gradient accumulation and world size.

Legend: n positions, M targets, D width, k distinct user and item rows.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from cllm4rec_dist.model.frozen_embeddings import FrozenEmbeddings
from cllm4rec_dist.model.linear_cross_entropy import linear_cross_entropy
from cllm4rec_dist.model.sharded_cross_entropy import GatheringQueries, sharded_cross_entropy


def item_loss(
    gathering: GatheringQueries,
    local_weight: Tensor,
    num_negatives: int = 0,
    key: Tensor | None = None,
    max_logits: int | None = None,
    compute_dtype: torch.dtype | None = None,
    bias: Tensor | None = None,
    *,
    normalize: bool = False,
    accumulate: bool = False,
    sparse: bool = False,
    cumulative_counts: np.ndarray | None = None,
) -> Tensor:
    """Negative log-likelihood over the catalog.

    With one target per position this is item language modeling (the paper's collaborative LLM); with a user's held-out
    items at one position it is the multinomial likelihood of the paper's finetuning.

    Args:
        gathering: queries [n, D], and query and global item row of each of M targets.
        local_weight: [rows of this rank, D].
        num_negatives, key, compute_dtype, bias, normalize, accumulate, sparse, cumulative_counts: see
            `sharded_cross_entropy`.

    Collectives: those of `sharded_cross_entropy`.
    """
    return sharded_cross_entropy(
        gathering,
        local_weight,
        num_negatives,
        key,
        max_logits,
        compute_dtype,
        bias,
        normalize=normalize,
        accumulate=accumulate,
        sparse=sparse,
        cumulative_counts=cumulative_counts,
    ).sum()


def text_loss(
    queries: Tensor,
    words: FrozenEmbeddings,
    target_query: Tensor,
    targets: Tensor,
    max_logits: int | None = None,
) -> Tensor:
    """Negative log-likelihood of the words of the main texts (the paper's content LLM), as the backbone computes it.

    Args:
        queries: [n, D] hidden states.
        words: the frozen word head, with its bias, scale and soft cap.
    """
    return text_losses(queries, words, target_query, targets, max_logits).sum()


def text_losses(
    queries: Tensor,
    words: FrozenEmbeddings,
    target_query: Tensor,
    targets: Tensor,
    max_logits: int | None = None,
) -> Tensor:
    """`text_loss` of each query, [n]."""
    if words.head.shape[1] > queries.shape[1]:  # the last column is the head's bias
        queries = F.pad(queries, (0, 1), value=1.0)
    return linear_cross_entropy(queries, words.head, target_query, targets, max_logits, words.logit_transform)


def mutual_regularization(collaborative: Tensor, content: Tensor | None, lambda_l: float, lambda_c: float) -> Tensor:
    """lambda_c/2 |z_c - z_l|^2 + lambda_l/2 |z_l|^2 over distinct rows (the paper's priors).

    Args:
        collaborative, content: [k, D] rows of the same users and items; with None only the prior term is left.
    """
    loss = lambda_l / 2 * collaborative.square().sum()
    if content is not None:
        loss = loss + lambda_c / 2 * (content - collaborative).square().sum()
    return loss
