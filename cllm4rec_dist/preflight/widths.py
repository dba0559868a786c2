"""Checks of `embeddings.dim` against files on the local file system."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cllm4rec_dist.checkpointing.find_run import find
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.config.embedding_width import require_not_wider, require_same_width
from cllm4rec_dist.errors import CheckpointError, CLLM4RecError, ConfigError
from cllm4rec_dist.filesystems import is_url

_HIDDEN_SIZE = ("hidden_size", "n_embd", "d_model")
"""Names of the hidden size in config.json. Other decoders are checked when the run loads them."""


def width_problems(config: RunConfig, *, reads_init_from: bool) -> Iterator[CLLM4RecError]:
    """Yield an error for embeddings wider than the backbone, or of another width than those in `init_from`."""
    hidden_size = _hidden_size(Path(config.backbone) / "config.json")
    try:
        if hidden_size is not None:
            require_not_wider(config.embeddings, hidden_size)
        initial = _saved_settings(config.init_from) if reads_init_from and config.init_from is not None else None
        if initial is not None:
            require_same_width(config.embeddings, *initial, hidden_size)
    except CLLM4RecError as error:
        yield error


def stage_width_problems(pretrain: RunConfig, finetune: RunConfig, hidden_size: int | None) -> Iterator[ConfigError]:
    """Yield an error for embeddings of two stages that are wider than their backbone, or differ in width.

    Args:
        hidden_size: width of the backbone, which may not be built yet; None to read it from its config.json.
    """
    if hidden_size is None:
        hidden_size = _hidden_size(Path(pretrain.backbone) / "config.json")
    if hidden_size is not None:
        try:
            for config in (pretrain, finetune):
                require_not_wider(config.embeddings, hidden_size)
        except ConfigError as error:
            yield error
            return
    before, now = (config.embeddings.dim or hidden_size for config in (pretrain, finetune))
    if (before is None) != (now is None) or before == now:  # a width that is not known may be the other's
        return
    yield ConfigError(
        "finetune.yaml: embeddings.dim",
        now,
        f"is not that of pretraining, {before}; embeddings cannot be carried over to another width",
        "Set it in pretrain.yaml and finetune.yaml, or in neither.",
    )


def _hidden_size(file: Path) -> int | None:
    """Return the width of a backbone; None if its config.json does not show it."""
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    sizes = [settings.get(name) for name in _HIDDEN_SIZE] if isinstance(settings, dict) else []
    return next((size for size in sizes if isinstance(size, int)), None)


def _saved_settings(path: str) -> tuple[str, dict[str, Any]] | None:
    """Return the checkpoint that a run would start from and its settings; None if it is remote or cannot be read."""
    if is_url(path):
        return None
    try:
        store, (name, *_) = find(path)
        file = store.fetch(name, "state.json", store.marker(name).files["state.json"])
        return store.path(name), dict(json.loads(file.read_bytes())["config"])
    except (CheckpointError, KeyError, TypeError, ValueError):  # the run reports it, or uses another checkpoint
        return None
