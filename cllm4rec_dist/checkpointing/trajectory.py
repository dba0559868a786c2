"""Refusing to resume from a checkpoint of a run with other settings."""

from __future__ import annotations

from typing import Any

from cllm4rec_dist.checkpointing.format import Checkpoint
from cllm4rec_dist.config import RunConfig, dotted_items, validate
from cllm4rec_dist.config.resume_rules import may_change
from cllm4rec_dist.errors import CheckpointError

_WIDTH = "embeddings.dim"
_RANKING_SETTINGS = ("linear.weight", "head.new_item_offset")
"""Settings that may change on resume, but reach those that read the run only with its next checkpoint."""


def require_same_trajectory(candidate: Checkpoint, config: RunConfig, width: int | None = None) -> None:
    """Refuse a checkpoint whose settings differ from those of a run, except settings that may change.

    The width of embeddings counts, not how it was chosen: the default may be another one in another version.

    Args:
        width: width of the run's user and item embeddings.

    Raises:
        CheckpointError: names the settings, or both widths.
    """
    saved = _saved_settings(candidate)
    current = dotted_items(config.model_dump(mode="json"))
    changed = {key: (saved[key], value) for key, value in current if saved[key] != value and not may_change(key)}
    before = candidate.metadata.embedding_width
    if width is not None and before is not None:
        changed.pop(_WIDTH, None)
        if before != width:
            raise CheckpointError(
                f"{candidate.path}: {_WIDTH}", before, f"is not this run's, {width}", f"Set {_WIDTH}={before}."
            )
    if changed:
        raise CheckpointError(
            f"{candidate.path}: configuration",
            changed,
            "differs between the checkpoint (first) and this run (second)",
            "Resume with the settings of the checkpoint, or choose another output folder.",
        )


def require_same_rankings(finished: Checkpoint, config: RunConfig) -> None:
    """Refuse settings of rankings that no checkpoint of a finished run would ever have.

    Raises:
        CheckpointError: names the setting and both values.
    """
    saved, current = _saved_settings(finished), dict(dotted_items(config.model_dump(mode="json")))
    for key in _RANKING_SETTINGS:
        if saved[key] != current[key]:
            raise CheckpointError(
                key,
                current[key],
                f"is {saved[key]} in {finished.path}, and this run is finished: no checkpoint would take it over",
                "Raise epochs, or train into another output. `evaluate`, `recommend`, `serve` and `export` take another"
                " --new-item-offset without training.",
            )


def _saved_settings(candidate: Checkpoint) -> dict[str, Any]:
    """Return a checkpoint's settings by dotted key; settings newer than the checkpoint have their defaults."""
    return dict(dotted_items(validate(RunConfig, candidate.metadata.config, candidate.path).model_dump(mode="json")))
