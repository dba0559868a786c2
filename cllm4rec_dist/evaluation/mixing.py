"""The weight of the linear memory's score against the LLM's, chosen on validation.

The grid has factors of two around the ratio of the standard deviations of both scores over the catalog, so that it fits
scores of any scale, and 0, so that a memory that does not help is left out. Where its largest weight is the best,
larger ones are tried, up to those at which the memory decides alone. Queries are encoded and scored once for a grid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from cllm4rec_dist.corpus.heldout import HeldOutUsers
from cllm4rec_dist.distributed.collectives import all_reduce_sum
from cllm4rec_dist.evaluation.sharded_topk import LINEAR_ALONE, LLM_ALONE, score_deviations
from cllm4rec_dist.evaluation.topk import encode_queries, evaluate
from cllm4rec_dist.system import InferenceSystem

_SAMPLED_USERS = 256
"""Users from whose scores the scale of the grid is estimated."""
_EXPONENTS = range(-6, 2)
"""Powers of two of the grid, in units of the ratio of standard deviations."""
_LARGER_EXPONENTS = range(2, 9)
"""Those that are tried if the largest one of the grid is the best."""


@dataclass(frozen=True)
class MixedMetrics:
    """Validation metrics of a run with a linear memory.

    Attributes:
        weight: weight of the linear score that is best by the first metric.
        metrics: with that weight.
        llm, linear: metrics of the LLM alone and of the linear memory alone, which are empty without a memory.
    """

    weight: float
    metrics: dict[str, float]
    llm: dict[str, float]
    linear: dict[str, float]

    @property
    def parts(self) -> dict[str, dict[str, float]]:
        """Metrics of each score alone, by its name in logs; empty without a linear memory."""
        return {"llm": self.llm, "linear": self.linear} if self.linear else {}


def choose_weight(
    system: InferenceSystem, split: str, metrics: Sequence[str], batch_users: int, num_users: int | None = None
) -> MixedMetrics:
    """Rank the held-out items of a split with every weight of the grid; the smallest of equally good ones wins.

    A weight of the run's settings is taken as it is. Without a linear memory the weight is 0. Collective.

    Args:
        metrics: the first one decides.
        num_users: size of a sample, see `HeldOutUsers.of`; None for all users.
    """
    if system.linear.is_empty:
        (alone,) = evaluate(system, split, metrics, batch_users, [LLM_ALONE], num_users=num_users)
        return MixedMetrics(LLM_ALONE, alone.result().mean, alone.result().mean, {})

    rank = partial(_rank, system, split, metrics, batch_users, num_users)
    fixed = system.config.linear.weight
    if fixed is not None:
        ranked = rank([LLM_ALONE, fixed, LINEAR_ALONE])
        return MixedMetrics(fixed, ranked[fixed], ranked[LLM_ALONE], ranked[LINEAR_ALONE])
    scale = score_ratio(system, split, batch_users)
    ranked = rank([LLM_ALONE, *(scale * 2.0**exponent for exponent in _EXPONENTS if scale > 0), LINEAR_ALONE])
    linear = ranked.pop(LINEAR_ALONE)
    if _best(ranked, metrics[0]) == max(ranked) > 0:
        ranked |= rank([scale * 2.0**exponent for exponent in _LARGER_EXPONENTS])
    weight = _best(ranked, metrics[0])
    return MixedMetrics(weight, ranked[weight], ranked[LLM_ALONE], linear)


def _rank(
    system: InferenceSystem,
    split: str,
    metrics: Sequence[str],
    batch_users: int,
    num_users: int | None,
    weights: Sequence[float],
) -> dict[float, dict[str, float]]:
    """Return the metrics of the held-out items by weight. Collective."""
    distinct = [*dict.fromkeys(weights)]  # a weight of the settings may be 0, too
    parts = evaluate(system, split, metrics, batch_users, distinct, num_users=num_users)
    return {weight: part.result().mean for weight, part in zip(distinct, parts, strict=True)}


def _best(ranked: Mapping[float, Mapping[str, float]], metric: str) -> float:
    """Return the weight with the highest metric, the smallest of equally good ones."""
    return max(ranked, key=lambda weight: (ranked[weight][metric], -weight))


@torch.no_grad()
def score_ratio(system: InferenceSystem, split: str, batch_users: int) -> float:
    """Return how much wider the LLM's scores are spread over the catalog than the linear ones, on some users.

    0 if all linear scores are equal. Collective.
    """
    users, world = HeldOutUsers.of(system.corpus, split), system.world
    count = min(_SAMPLED_USERS, len(users))
    if count == 0:
        return 0.0
    chosen = np.arange(count) * len(users) // count
    low, high = world.local_range(0, count)
    system.train(False)
    weight = system.recommender.output_weight()
    deviations = []
    for start in range(0, -(-count // world.size), batch_users):
        index = chosen[low + start : min(low + start + batch_users, high)]
        queries = encode_queries(system, users.rows[index], users.histories.take(index))
        deviations.append(score_deviations(queries, weight, system.linear, system.recommender.world))
    total = all_reduce_sum(torch.cat(deviations).sum(dim=0), system.recommender.replicas, "deviations of scores")
    llm, linear = (total / count).tolist()
    return llm / linear if linear > 0 else 0.0
