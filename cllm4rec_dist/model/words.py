"""The frozen ends of the language model: word embeddings and word head, read straight from the weight files.

Both are small next to the backbone, and a weight that ZeRO-3 owns is empty outside of its module's forward.

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
class Words:
    """Word embeddings and head, one copy a rank.

    Attributes:
        embedding: [V, D].
        head: [V, D], the same tensor where the backbone ties them; [0, D] where no content LLM needs it.
    """

    embedding: Tensor
    head: Tensor

    @property
    def scale(self) -> float:
        """Root mean square of an embedding entry: the scale on which new rows start."""
        return self.embedding.float().square().mean().sqrt().item()


def load_words(folder: Path, dtype: torch.dtype, device: torch.device, *, head: bool = True) -> Words:
    """Read the word embeddings and the word head of a backbone, without building the model.

    Args:
        head: read the head too; ConfigError where the backbone has none.
    """
    config, stored = load_config(folder), stored_weights(folder)
    name = embedding_weight(config, stored)
    if name is None:
        raise ConfigError(
            "backbone", str(folder), "has no word embeddings (wte.weight or embed_tokens.weight)", "Fetch it again."
        )
    embedding = _read(name, stored).to(device, dtype)
    if not head:
        return Words(embedding, embedding[:0])
    head_name = require_head(folder, config, stored)
    if head_name == name:
        return Words(embedding, embedding)
    found = _read(head_name, stored).to(device, dtype)
    return Words(embedding, embedding if config.tie_word_embeddings and torch.equal(found, embedding) else found)


def _read(name: str, stored: dict[str, StoredWeight]) -> Tensor:
    with open_weights(stored[name].file) as tensors:
        return tensors.get_tensor(name)
