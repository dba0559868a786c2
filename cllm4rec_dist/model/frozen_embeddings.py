"""Frozen word embeddings and word head of the language model, read from the weight files.

They are not part of the ZeRO-3 engine, because a weight that ZeRO-3 shards is empty outside of its module's forward.
Both are small compared to the backbone.

Legend: V words, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.architecture import (
    logit_transform,
    meta_language_model,
    stored_name,
    word_layers,
)
from cllm4rec_dist.model.pretrained import load_config, require_head
from cllm4rec_dist.model.weights import StoredWeight, open_weights, stored_weights

_SAMPLED_WORDS = 4096
"""Words from which the scale of embeddings is estimated."""


@dataclass(frozen=True)
class FrozenEmbeddings:
    """Word embeddings and word head, one copy per rank.

    Attributes:
        embedding: [V, D], what the decoder is given for each word. A scale that the model's embedding layer applies
            (Gemma) is included, so that user and item rows meet words on one scale.
        head: [V, D], the same tensor as `embedding` if the backbone ties them and does not scale the latter; [V, D+1]
            with the head's bias as last column; [0, D] without a content LLM.
        logit_transform: scales and soft caps of the logits (`architecture.LogitTransform`); None if there are none.
    """

    embedding: Tensor
    head: Tensor
    logit_transform: Callable[[Tensor], Tensor] | None = None

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
    model = meta_language_model(config)
    weight = read_embedding(folder, model, stored).to(device, dtype)
    embedding = embedded_words(model, weight)
    if not head:
        return FrozenEmbeddings(embedding, embedding[:0])
    head_weight, bias = read_head(folder, config, model, stored)
    head_weight = head_weight.to(device, dtype)
    if config.tie_word_embeddings and torch.equal(head_weight, weight):
        head_weight = weight
    if bias is not None:
        head_weight = torch.cat([head_weight, bias.to(device, dtype)[:, None]], dim=1)
    return FrozenEmbeddings(embedding, head_weight, logit_transform(config))


def embedding_scale(folder: Path) -> float:
    """`FrozenEmbeddings.scale` of a backbone, estimated from some thousand words.

    Raises:
        ConfigError: for a backbone without word embeddings.
    """
    config, stored = load_config(folder), stored_weights(folder)
    model = meta_language_model(config)
    weight = read_embedding(folder, model, stored)
    embedding = embedded_words(model, weight[:: max(1, len(weight) // _SAMPLED_WORDS)].float())
    return FrozenEmbeddings(embedding, embedding[:0]).scale


def embedded_words(model: PreTrainedModel, weight: Tensor) -> Tensor:
    """Apply the embedding layer of a language model to each of its rows, [n, D]; a plain layer returns them unchanged.

    Args:
        model: on the meta device; its embedding layer is changed.
        weight: rows of the embedding layer, [n, D].
    """
    if type(model.get_input_embeddings()) is nn.Embedding:
        return weight
    with torch.no_grad():
        embedded: Tensor = materialized_embedding(model, weight)(torch.arange(len(weight), device=weight.device))
    return embedded


def materialized_embedding(model: PreTrainedModel, weight: Tensor) -> nn.Module:
    """Return the embedding layer of a model on the meta device with real rows, [n, D].

    Its buffers get their values as when transformers loads a model.
    """
    layer: Any = model.get_input_embeddings()
    for name, buffer in [*layer.named_buffers(recurse=False)]:
        layer.register_buffer(name, torch.empty_like(buffer, device=weight.device), persistent=False)
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.weight._is_hf_initialized = True  # so that transformers leaves it as it is
    model._init_weights(layer)
    embedding: nn.Module = layer
    return embedding


def read_embedding(folder: Path, model: PreTrainedModel, stored: dict[str, StoredWeight]) -> Tensor:
    """Read the weight [V, D] of the embedding layer as it is stored. ConfigError if it is absent."""
    weight_name = word_layers(model).embedding_name
    name = stored_name(model, weight_name, stored)
    if name is None:
        raise ConfigError(
            "backbone", str(folder), f"has no word embeddings ({weight_name})", "Fetch the backbone again."
        )
    return _read(name, stored)


def read_head(
    folder: Path, config: PretrainedConfig, model: PreTrainedModel, stored: dict[str, StoredWeight]
) -> tuple[Tensor, Tensor | None]:
    """Read weight [V, D] and bias [V] of the word head as they are stored; None for a head without bias.

    Raises:
        ConfigError: for a backbone without head, or whose bias is absent.
    """
    weight = _read(require_head(folder, config, stored), stored)
    bias_name = word_layers(model).head_bias_name
    if bias_name is None:
        return weight, None
    stored_bias = stored_name(model, bias_name, stored)
    if stored_bias is None:
        raise ConfigError(
            f"backbone {folder}",
            bias_name,
            "is missing, and the head adds it to its logits",
            "Fetch the backbone again.",
        )
    return weight, _read(stored_bias, stored)


def _read(name: str, stored: dict[str, StoredWeight]) -> Tensor:
    with open_weights(stored[name].file) as tensors:
        weight: Tensor = tensors.get_tensor(name)
        return weight
