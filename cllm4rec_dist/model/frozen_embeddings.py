"""Frozen word embeddings and word head of the language model, read from the weight files.

They are not part of the ZeRO-3 engine, because a weight that ZeRO-3 shards is empty outside of its module's forward.
Both are small compared to the backbone.

Legend: V words, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.pretrained import embedding_weight, load_config, require_head
from cllm4rec_dist.model.weights import StoredWeight, open_weights, stored_weights


@dataclass(frozen=True)
class FrozenEmbeddings:
    """Word embeddings and word head, one copy per rank.

    Attributes:
        embedding: [V, D].
        head: [V, D], the same tensor if the backbone ties them; [0, D] without a content LLM.
    """

    embedding: Tensor
    head: Tensor

    @property
    def scale(self) -> float:
        """Root mean square of the embedding's entries, the scale of new rows."""
        return self.embedding.float().square().mean().sqrt().item()


def load_frozen_embeddings(
    folder: Path, dtype: torch.dtype, device: torch.device, *, head: bool = True
) -> FrozenEmbeddings:
    """Read the word embeddings and the word head of a backbone, without building the model.

    Args:
        head: read the head too.

    Raises:
        ConfigError: for a backbone without word embeddings, or without a head if one is required.
    """
    config, stored = load_config(folder), stored_weights(folder)
    name = embedding_weight(config, stored)
    if name is None:
        raise ConfigError(
            "backbone", str(folder), "has no word embeddings (wte.weight or embed_tokens.weight)", "Fetch it again."
        )
    embedding = _read(name, stored).to(device, dtype)
    if not head:
        return FrozenEmbeddings(embedding, embedding[:0])
    head_name = require_head(folder, config, stored)
    if head_name == name:
        return FrozenEmbeddings(embedding, embedding)
    head_weight = _read(head_name, stored).to(device, dtype)
    is_tied = config.tie_word_embeddings and torch.equal(head_weight, embedding)
    return FrozenEmbeddings(embedding, embedding if is_tied else head_weight)


def _read(name: str, stored: dict[str, StoredWeight]) -> Tensor:
    with open_weights(stored[name].file) as tensors:
        return tensors.get_tensor(name)
