"""Which settings decide the course of a run, so that it may not go on with others."""

from __future__ import annotations

_NOT_OF_THE_TRAJECTORY = {
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
    "optimizer.embeddings_state",
}
"""Settings, or whole sections, that may differ between a run and its resumption. Corpus and backbone may have moved:
their fingerprints are held against each other. Epochs and steps may be raised; under a falling schedule they also move
its end. Checkpoints hold fp32 moments whatever `optimizer.embeddings_state` is."""


def may_change(key: str) -> bool:
    """Whether a setting may be another one when a run is resumed."""
    return not {key, key.partition(".")[0]}.isdisjoint(_NOT_OF_THE_TRAJECTORY)
