"""Metrics over groups of items: those with training interactions and those without.

A corpus whose split holds out whole items (`cold_items`) has both among its held-out items. A model that never
recommends a new item has good means over all of them, so each group has means of its own, the cold items twice: ranked
among cold items, which shows whether their texts are understood, and among all items, where they meet the known ones.

Legend: I items, M metrics, n users of a group.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cllm4rec_dist.corpus.heldout import HeldOutUsers
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.distributed.collectives import all_reduce_sum
from cllm4rec_dist.evaluation.metrics import MetricResult, are_tied, largest_cutoff, mean_metrics, user_metrics
from cllm4rec_dist.evaluation.topk import rank_by_weights
from cllm4rec_dist.system import InferenceSystem

_TIED_SHARE = 0.99
"""Fraction of users with tied candidates from which a model cannot rank a group."""


@dataclass(frozen=True)
class GroupResult(MetricResult):
    """Means over the users of a group; `num_tied` of them have candidates with equal scores, see `are_tied`."""

    num_tied: int = 0


def cannot_rank(num_tied: int, num_users: int) -> bool:
    """Return True if (nearly) all users have candidates with equal scores: metrics would be those of the row order."""
    return num_tied >= _TIED_SHARE * num_users


@dataclass(frozen=True)
class ItemGroup:
    """Held-out items that are evaluated together.

    Attributes:
        name: name in tables.
        held_out: bool [I], held-out items that count.
        candidates: bool [I], items that are ranked.
    """

    name: str
    held_out: np.ndarray
    candidates: np.ndarray


def item_groups(corpus: Corpus, split: str) -> tuple[ItemGroup, ...]:
    """Return the groups of a corpus that holds out whole items, without those that have no held-out items."""
    if corpus.manifest.preparation.split.kind != "cold_items":
        return ()
    cold = corpus.training_counts() == 0
    everything = np.ones_like(cold)
    is_held_out = np.zeros_like(cold)
    is_held_out[corpus.split(split).values] = True
    groups = (
        ItemGroup("Warm items, ranked among all items", ~cold, everything),
        ItemGroup("Warm items, ranked among warm items", ~cold, ~cold),
        ItemGroup("Cold items, ranked among all items", cold, everything),
        ItemGroup("Cold items, ranked among cold items", cold, cold),
    )
    return tuple(group for group in groups if (group.held_out & is_held_out).any())


def evaluate_groups(
    system: InferenceSystem,
    split: str,
    users: HeldOutUsers,
    metrics: Sequence[str],
    batch_users: int,
    weights: Sequence[float],
    *,
    without_rows: bool = False,
) -> dict[str, list[GroupResult]]:
    """Return means by each weight, by the name of the group; empty if the corpus does not hold out whole items.

    Collective: all-reduces a value for each weight, user, metric and group, and whether the user's best items are tied.

    Args:
        users: all users with held-out items in `split`, or a sample of them.
        weights: weights of the linear memory, see `mixed_topk`.
    """
    groups = item_groups(system.corpus, split)
    if not groups:
        return {}
    rows = np.full(len(users), -1, np.int64) if without_rows else users.rows
    results = {}
    for group in groups:
        held_out = restrict(users.held_out, group.held_out)
        chosen = np.flatnonzero(held_out.lengths)
        if not len(chosen):
            continue
        histories, held_out = users.histories.take(chosen), held_out.take(chosen)
        values, num_best = np.zeros((len(weights), len(chosen), len(metrics) + 1)), largest_cutoff(metrics)
        for rankings in rank_by_weights(
            system, rows[chosen], histories, num_best, batch_users, weights, seen=histories, candidates=group.candidates
        ):
            for index, ranking in enumerate(rankings):
                of_block = held_out.take(ranking.index)
                values[index, ranking.index, :-1] = user_metrics(
                    ranking.items, of_block, metrics, int(group.candidates.sum())
                )
                values[index, ranking.index, -1] = are_tied(ranking.scores)
        summed = torch.from_numpy(values).to(system.world.device)
        summed = all_reduce_sum(summed, system.world, "metrics of item groups")
        results[group.name] = [
            GroupResult(**vars(mean_metrics(by_weight[:, :-1], metrics)), num_tied=int(by_weight[:, -1].sum()))
            for by_weight in summed.cpu().numpy()
        ]
    return results


def restrict(lists: Ragged, kept: np.ndarray) -> Ragged:
    """Return the lists without the items that are not `kept`, bool [I]; some may become empty."""
    is_kept = kept[lists.values]
    lengths = np.bincount(lists.rows[is_kept], minlength=len(lists))
    return Ragged.from_lengths(lengths, lists.values[is_kept])
