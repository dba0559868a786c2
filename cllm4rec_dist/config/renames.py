"""Old names of settings, commands and options of 0.0.x. Drop this module at 0.2.

Old names are no aliases: a file, an override or a checkpoint with an old key is refused with the new one, so that a run
never mixes both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from cllm4rec_dist.errors import ConfigError

RUN_SETTINGS = {
    "rows": "embeddings",
    "rows.start": "embeddings.init",
    "rows.wire": "embeddings.comm_dtype",
    "rows.text_weight": "embeddings.init_text_weight",
    "head.form": "head.similarity",
    "head.sampled": "head.num_negatives",
    "method.mask_share": "method.mask_ratio",
    "batch.accumulation": "batch.gradient_accumulation_steps",
    "optimizer.tables_lr": "optimizer.embeddings_lr",
    "optimizer.lazy_tables": "optimizer.sparse_embedding_updates",
    "optimizer.table_state": "optimizer.embeddings_state",
    "optimizer.final_share": "optimizer.min_lr_ratio",
    "optimizer.clip_norm": "optimizer.max_grad_norm",
    "validation.patience": "validation.early_stopping_patience",
    "checkpoint.folder": "checkpoint.dir",
    "faults.explosion": "faults.loss_spike_factor",
    "faults.bad_step": "faults.on_bad_step",
    "faults.hang_seconds": "faults.collective_timeout_seconds",
    "shuffle_records": "shuffle_window",
}
"""Dotted keys of a run configuration, old to new."""
BACKBONE_SETTINGS = {
    "hidden": "hidden_size",
    "layers": "num_layers",
    "heads": "num_heads",
    "words": "vocab_size",
}
"""Keys of a backbone configuration, old to new."""
COMMANDS = {"backbone": "build-backbone"}
"""Commands, old to new."""


def require_new_keys(tree: Mapping[str, Any], renamed: Mapping[str, str], source: str) -> None:
    """Refuse a configuration with old keys, with the new name of each.

    Args:
        tree: parsed settings before validation.
        renamed: dotted keys, old to new.
        source: file or other origin of the configuration.

    Raises:
        ConfigError: if there are old keys; names each with its new one.
    """
    old = [key for key in _dotted_keys(tree) if key in renamed]
    if old:
        pairs = ", ".join(f"{key} -> {renamed[key]}" for key in old)
        raise ConfigError(source, old, "are old names of settings", f"Rename {pairs}.")


def _dotted_keys(tree: Mapping[str, Any], section: str = "") -> Iterator[str]:
    for key, value in tree.items():
        yield f"{section}{key}"
        if isinstance(value, Mapping):
            yield from _dotted_keys(value, f"{section}{key}.")
