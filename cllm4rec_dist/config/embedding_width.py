"""The width of embeddings, and its checks: against the backbone, and against the run that a new one starts from."""

from __future__ import annotations

from cllm4rec_dist.config.schema import EmbeddingsConfig
from cllm4rec_dist.errors import CheckpointError, ConfigError

NARROW_WIDTH = 256
"""Width that cost no quality with a backbone of twice that width (docs/narrow-rows.md)."""
_MAX_ENTRIES = 1 << 31
"""Entries of the users' and items' embeddings at the backbone's width above which these are narrow, if `embeddings.dim`
leaves it open: with Adam's moments and those of the content LLM they would take 48 GiB."""


def embedding_width(dim: int | None, hidden_size: int, num_embeddings: int) -> int:
    """Return the width of user and item embeddings: `embeddings.dim`, or one that fits the size of the catalog.

    Args:
        dim: `embeddings.dim`.
        hidden_size: width of the backbone.
        num_embeddings: users and items.
    """
    if dim is not None:
        return dim
    return min(NARROW_WIDTH, hidden_size) if num_embeddings * hidden_size > _MAX_ENTRIES else hidden_size


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
            "Lower it, or leave it out.",
        )


def require_same_width(now: int, path: str, before: int) -> None:
    """Refuse a checkpoint whose embeddings have another width than the run's.

    Raises:
        CheckpointError: names both widths.
    """
    if before != now:
        raise CheckpointError(
            f"{path}: embeddings.dim",
            before,
            f"is not this run's, {now}; embeddings cannot be carried over to another width",
            f"Set embeddings.dim={before}, or start without init_from.",
        )


def can_have_same_width(first: int | None, second: int | None, hidden_size: int | None) -> bool:
    """True if runs of one corpus with these settings of `embeddings.dim` may have embeddings of the same width.

    Args:
        hidden_size: width of the backbone; None if it is not known.
    """
    if first is not None and second is not None:
        return first == second
    dim = second if first is None else first
    return dim is None or hidden_size is None or dim in (hidden_size, min(NARROW_WIDTH, hidden_size))
