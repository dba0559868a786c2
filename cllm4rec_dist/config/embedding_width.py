"""Checks of `embeddings.dim`: against the backbone, and against the run that a new one starts from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cllm4rec_dist.config.schema import EmbeddingsConfig
from cllm4rec_dist.errors import CheckpointError, ConfigError


def require_not_wider(config: EmbeddingsConfig, hidden_size: int) -> None:
    """Refuse embeddings that are wider than the backbone.

    Raises:
        ConfigError: names both widths.
    """
    if config.dim is not None and config.dim > hidden_size:
        raise ConfigError(
            "embeddings.dim",
            config.dim,
            f"exceeds the backbone's hidden size, {hidden_size}",
            "Lower it, or leave it out for embeddings as wide as the backbone.",
        )


def require_same_width(
    config: EmbeddingsConfig, path: str, saved: Mapping[str, Any], hidden_size: int | None = None
) -> None:
    """Refuse a checkpoint of the same backbone whose embeddings have another width.

    Args:
        path, saved: the checkpoint and the configuration in it.
        hidden_size: width of the backbone; None if it is not known, which finds fewer differences.

    Raises:
        CheckpointError: names both widths.
    """
    before = saved.get("embeddings", {}).get("dim") or hidden_size
    now = config.dim or hidden_size
    if before is not None and now is not None and before != now:
        raise CheckpointError(
            f"{path}: embeddings.dim",
            before,
            f"is not this run's, {now}; embeddings cannot be carried over to another width",
            f"Set embeddings.dim={before}, or start without init_from.",
        )
