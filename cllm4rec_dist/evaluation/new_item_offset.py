"""The offset of new items' bias (`head.new_item_offset`), chosen on validation so that known items lose little.

A new item in a list takes the place of a known one, so the metrics of known items fall as the offset rises, and the
highest one that costs at most so much is found by bisection. Known and new items are ranked apart, once; the lists of
any offset are merged from these.

Legend: n users of this rank, K recommendations, M metrics.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import torch

from cllm4rec_dist.corpus.heldout import HeldOutUsers
from cllm4rec_dist.distributed.collectives import all_reduce_sum
from cllm4rec_dist.evaluation.item_groups import restrict
from cllm4rec_dist.evaluation.metrics import largest_cutoff, user_metrics
from cllm4rec_dist.evaluation.topk import Ranking, rank_users
from cllm4rec_dist.system import InferenceSystem

_STEPS_PER_LOGIT, _LOWEST = 16, -1024
"""Offsets that are tried: sixteenths of a logit from 0, where new items are ranked like known ones, down to this."""


def choose_offset(
    system: InferenceSystem,
    is_filled: np.ndarray,
    filled_with: float,
    max_loss: float,
    split: str,
    metrics: Sequence[str],
    batch_users: int,
    num_users: int | None = None,
) -> float | None:
    """Return the highest offset, at most 0, with which no metric of known held-out items loses more than `max_loss`.

    Losses are shares of the metrics without new items in the lists. None if there are no new items, or no known ones
    held out.

    Args:
        is_filled: bool [I], the new items, whose biases are filled (`cold_rows_filled`); no offset moves others.
        filled_with: offset of their biases.
        max_loss: from 0 to 1.
        num_users: size of a sample, see `HeldOutUsers.of`; None for all users.

    Collectives: those of two rankings, and an all-reduce of M values for each of up to 16 offsets.
    """
    users = HeldOutUsers.of(system.corpus, split, num_users)
    held_out = restrict(users.held_out, system.corpus.training_counts() > 0)
    chosen = np.flatnonzero(held_out.lengths)
    if not is_filled.any() or not len(chosen):
        return None
    rows, histories = users.rows[chosen], users.histories.take(chosen)
    num_best = largest_cutoff(metrics)
    known, new = (
        _join([*rank_users(system, rows, histories, num_best, batch_users, seen=histories, candidates=candidates)])
        for candidates in (~is_filled, is_filled)
    )
    held_out = held_out.take(chosen[known.index])

    def total(items: np.ndarray) -> np.ndarray:
        values = user_metrics(items, held_out, metrics, system.corpus.num_items).sum(axis=0)
        on_device = torch.from_numpy(values).to(system.world.device)
        return all_reduce_sum(on_device, system.world, "metrics of known items").cpu().numpy()

    lowest = total(_merged(known, new, -np.inf, num_best)) * (1.0 - max_loss)

    def offset(step: int) -> float:
        return -step / _STEPS_PER_LOGIT

    def costs_little(step: int) -> bool:
        return bool((total(_merged(known, new, offset(step) - filled_with, num_best)) >= lowest).all())

    return offset(bisect_left(range(-_LOWEST * _STEPS_PER_LOGIT), True, key=costs_little))


def _join(parts: Sequence[Ranking]) -> Ranking:
    return Ranking(*(np.concatenate([getattr(part, name) for part in parts]) for name in ("index", "items", "scores")))


def _merged(known: Ranking, new: Ranking, shift: float, num_best: int) -> np.ndarray:
    """Return the best items [n, K] of both lists, with `shift` added to the scores of the new ones."""
    scores = np.concatenate([known.scores, new.scores + shift], axis=1)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :num_best]
    return np.take_along_axis(np.concatenate([known.items, new.items], axis=1), order, axis=1)
