"""Checks of `embeddings.dim` against files on the local file system."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cllm4rec_dist.checkpointing.find_run import find, read_state
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.config.embedding_width import (
    can_have_same_width,
    embedding_width,
    require_not_wider,
    require_same_width,
)
from cllm4rec_dist.corpus.manifest import load_manifest
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
        initial = _saved(config.init_from) if reads_init_from and config.init_from is not None else None
        if initial is not None:
            dim, num_embeddings = config.embeddings.dim, _num_embeddings(config.corpus)
            if hidden_size is not None and num_embeddings is not None:
                before = embedding_width(initial.dim, hidden_size, initial.num_embeddings)
                require_same_width(embedding_width(dim, hidden_size, num_embeddings), initial.path, before)
            elif dim is not None and initial.dim is not None:
                require_same_width(dim, initial.path, initial.dim)
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
    dims = pretrain.embeddings.dim, finetune.embeddings.dim
    if can_have_same_width(*dims, hidden_size):
        return
    before, now = (hidden_size if dim is None else dim for dim in dims)
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


def _num_embeddings(corpus: str) -> int | None:
    """Return the number of users and items of a corpus; None if it cannot be read, which another check reports."""
    try:
        manifest, _ = load_manifest(corpus)
    except CLLM4RecError:
        return None
    return manifest.num_users + manifest.num_items


@dataclass(frozen=True)
class _Saved:
    """Checkpoint that a run would start from, its width or `embeddings.dim`, and its number of users and items."""

    path: str
    dim: int | None
    num_embeddings: int


def _saved(path: str) -> _Saved | None:
    """Read the state of the checkpoint that a run would start from; None if it is remote or cannot be read."""
    if is_url(path):
        return None
    try:
        store, (name, *_) = find(path)
        state = read_state(store, name)
        dim = state.get("embedding_width") or state["config"].get("embeddings", {}).get("dim")
        return _Saved(store.path(name), dim, state["num_users"] + state["num_items"])
    except (CheckpointError, KeyError, TypeError, ValueError):  # the run reports it, or uses another checkpoint
        return None
