"""Validation in training: the metrics of a model, and what is chosen for those that recommend with its checkpoint."""

from __future__ import annotations

from cllm4rec_dist.evaluation.cold_items import cold_rows_filled
from cllm4rec_dist.evaluation.mixing import MixedMetrics, choose_weight
from cllm4rec_dist.evaluation.new_item_offset import choose_offset
from cllm4rec_dist.model.text_rows import DEFAULT_OFFSET
from cllm4rec_dist.system import InferenceSystem

_SPLIT = "valid"
_OFFSET_USERS = 5_000
"""Most users among whom the offset of new items is chosen, which ranks them twice."""


def validate(system: InferenceSystem) -> MixedMetrics:
    """Rank the validation items. Collective.

    With a linear memory its weight is chosen anew and set, and the metrics are those of the sum of both scores. New
    items have the offset of the run's settings or the default, so that epochs can be compared.
    """
    config = system.config.validation
    with cold_rows_filled(system):
        mixed = choose_weight(
            system, _SPLIT, config.metrics, config.batch_users, config.sample_size(system.corpus.num_users)
        )
    system.linear.weight = mixed.weight
    return mixed


def choose_new_item_offset(system: InferenceSystem) -> float | None:
    """Return the offset of new items for a validated system, by `validation.max_known_item_loss`. Collective.

    None if the settings fix it, the head has no item bias, or the corpus has no new items.
    """
    config, head = system.config.validation, system.config.head
    if head.new_item_offset is not None or not head.item_bias or not system.corpus.manifest.has_cold_items:
        return None
    num_users = min(config.sample_size(system.corpus.num_users) or _OFFSET_USERS, _OFFSET_USERS)
    with cold_rows_filled(system) as is_filled:
        return choose_offset(
            system,
            is_filled,
            DEFAULT_OFFSET,
            config.max_known_item_loss,
            _SPLIT,
            config.metrics,
            config.batch_users,
            num_users,
        )
