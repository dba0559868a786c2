"""Rules for which settings may change when a run is resumed."""

from __future__ import annotations

_MAY_CHANGE = {
    "output",
    "corpus",
    "backbone",
    "deepspeed",
    "epochs",
    "max_steps",
    "log_every",
    "validation",
    "checkpoint",
    "init_from",
    "resume",
    "allow_leak",
    "faults",
    "activation_checkpointing",
    "audit",
    "trackers",
    "batch.gradient_accumulation_steps",
    "embeddings.item_vectors",
    "embeddings.shard_group",
    "head.new_item_offset",
    "linear.weight",
    "optimizer.embeddings_state",
}
"""Settings, or whole sections, that may change on resume. Corpus and backbone may have moved: their fingerprints are
compared. Item vectors are read only by a new run; the offset of new items and the weight of the linear memory only by
rankings. Epochs and steps may be raised; this also moves the end of a decaying learning rate. Checkpoints always
contain fp32 moments, whatever `optimizer.embeddings_state` is."""


def may_change(key: str) -> bool:
    """True if a setting may change when a run is resumed."""
    return not {key, key.partition(".")[0]}.isdisjoint(_MAY_CHANGE)
