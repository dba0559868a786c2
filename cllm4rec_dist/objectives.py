"""The losses of the method, pure: each returns (sum, count).

Sums and counts are this rank's parts; a run divides the global sum by the global count, so that every term is a mean
over predictions (or rows) of the whole optimizer step and means the same at any batch size, accumulation and world
size.

Legend: n positions, M targets, D width, k distinct user and item rows.
"""

from __future__ import annotations

from torch import Tensor

from cllm4rec_dist.model.heads import Asked, Sampling, dense_nll, sharded_nll
from cllm4rec_dist.topology import RowPartition, World


def item_likelihood(
    asked: Asked, operand: Tensor, partition: RowPartition, world: World, sampling: Sampling | None = None
) -> tuple[Tensor, int]:
    """Negative log-likelihood over the catalog, in nats, and the number of targets.

    With one target a position it is item language modeling (the paper's collaborative LLM); with a user's
    held-out items at one position it is the multinomial likelihood of its finetuning.

    Args:
        asked: queries [n, D], and for each of M targets its query and its global item row (`heads.ask`).
        operand: [rows of this rank, D].
        sampling: items of a sampled softmax; all of them if left out.

    Collectives: those of `sharded_nll`.
    """
    nll = sharded_nll(asked, operand, partition, world, sampling=sampling)
    return nll.sum(), len(asked.target_query)


def word_likelihood(queries: Tensor, word_head: Tensor, target_query: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """Negative log-likelihood of the words of the main texts, in nats, and their number (the paper's content LLM).

    Args:
        queries: [n, D] hidden states. word_head: [V, D], frozen.
    """
    return dense_nll(queries, word_head, target_query, targets).sum(), len(targets)


def mutual_regularization(
    collaborative: Tensor, content: Tensor | None, lambda_l: float, lambda_c: float
) -> tuple[Tensor, int]:
    """lambda_c/2 |z_c - z_l|^2 + lambda_l/2 |z_l|^2 over distinct rows, and their number (the paper's priors).

    Args:
        collaborative, content: [k, D] rows of the same tokens; without content rows only the prior term is left.
    """
    loss = lambda_l / 2 * collaborative.square().sum()
    if content is not None:
        loss = loss + lambda_c / 2 * (content - collaborative).square().sum()
    return loss, len(collaborative)
