"""Validation in training: the metrics of what a checkpoint will recommend, and what is chosen for that."""

from __future__ import annotations

from cllm4rec_dist.evaluation.cold_items import cold_rows_filled
from cllm4rec_dist.evaluation.mixing import MixedMetrics, choose_weight, measure_weight
from cllm4rec_dist.evaluation.new_item_offset import choose_offset
from cllm4rec_dist.model.text_rows import DEFAULT_OFFSET
from cllm4rec_dist.system import InferenceSystem

_SPLIT = "valid"


def validate(system: InferenceSystem) -> tuple[MixedMetrics, float | None]:
    """Rank the validation items; return the metrics, and the chosen offset of new items or None. Collective.

    With a linear memory its weight is chosen anew and set, and the metrics are those of the sum of both scores. With
    new items in the corpus their offset is chosen for that sum, unless the run has a fixed one, and the metrics are
    measured with it.
    """
    config, head = system.config.validation, system.config.head
    arguments = _SPLIT, config.metrics, config.batch_users, config.sample_size(system.corpus.num_users)
    offset = None
    with cold_rows_filled(system):
        mixed = choose_weight(system, *arguments)
        system.linear.weight = mixed.weight
        if system.corpus.manifest.has_cold_items and head.item_bias and head.new_item_offset is None:
            offset = choose_offset(system, DEFAULT_OFFSET, config.max_known_item_loss, *arguments)
    if offset is None:
        return mixed, None
    with cold_rows_filled(system, offset):
        return measure_weight(system, mixed.weight, *arguments), offset
