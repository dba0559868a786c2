"""Structure of a decoder as transformers defines it: classes, layers, linear layers, word embeddings and head.

Every decoder of `AutoModelForCausalLM` is described this way, so no family is named here. Models are built on the meta
device: their code and shapes, without values.

Legend: V words, D width of word embeddings.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.pytorch_utils import Conv1D

from cllm4rec_dist.errors import ConfigError

LINEAR = (nn.Linear, Conv1D)


def decoder_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Return the class of the decoder without head; None if transformers has no causal language model for it."""
    if type(config) not in AutoModelForCausalLM._model_mapping or type(config) not in AutoModel._model_mapping:
        return None
    kind: Any = AutoModel._model_mapping[type(config)]
    return kind if isinstance(kind, type) else None  # a few types have several models


def meta_decoder(config: PretrainedConfig, **settings: Any) -> PreTrainedModel:
    """Build the decoder without its head on the meta device; `settings` are passed to `AutoModel.from_config`."""
    return _on_meta(AutoModel, config, settings)


def meta_language_model(config: PretrainedConfig) -> PreTrainedModel:
    """Build the causal language model on the meta device."""
    model = _on_meta(AutoModelForCausalLM, config, {}).eval()
    if model.loss_type is None:  # its class has another name than ...ForCausalLM; transformers would log its default
        model.loss_type = "ForCausalLM"
    return model


def _on_meta(kind: Any, config: PretrainedConfig, settings: dict[str, Any]) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            model: PreTrainedModel = kind.from_config(config, **settings)
            return model
    except Exception as error:
        raise ConfigError(
            "backbone",
            str(config.name_or_path),
            f"has a config.json from which no decoder can be built ({error})",
            "Fetch the backbone again.",
        ) from error


def is_bidirectional(config: PretrainedConfig) -> bool:
    """True for an encoder that could be a decoder, such as BERT, and is not configured as one."""
    kind = decoder_class(config)
    if getattr(config, "is_decoder", True) or kind is None:
        return False
    return any(getattr(module, "is_causal", True) is False for module in _structure(kind, config).modules())


def _structure(kind: type[PreTrainedModel], config: PretrainedConfig) -> PreTrainedModel:
    """Build a model on the meta device, also while transformers would shard it for ZeRO-3."""
    with torch.device("meta"):
        return kind(copy.deepcopy(config))


def decoder_layers(decoder: PreTrainedModel) -> dict[str, nn.Module]:
    """Name and module of each layer: what transformers does not split between devices."""
    kinds: Collection[str] = decoder._no_split_modules or ()
    return {name: module for name, module in decoder.named_modules() if type(module).__name__ in kinds}


def lora_targets(decoder: PreTrainedModel) -> list[str]:
    """Names of the linear layers inside the decoder's layers, as short as PEFT can match them.

    A name is the last part of the path, if this part names nothing but such layers in the decoder, else the whole path.
    Fused experts and routers of mixture-of-experts models are no linear layers.
    """
    modules = dict(decoder.named_modules())
    inside = tuple(f"{name}." for name in decoder_layers(decoder))
    linear = [name for name, module in modules.items() if isinstance(module, LINEAR) and name.startswith(inside)]
    elsewhere = {name.rsplit(".", 1)[-1] for name in modules.keys() - linear}
    lasts = {name: name.rsplit(".", 1)[-1] for name in linear}
    return list(dict.fromkeys(name if last in elsewhere else last for name, last in lasts.items()))


def fused_experts(decoder: PreTrainedModel) -> list[str]:
    """Names of the three-dimensional parameters of decoder layers, each of which holds a matrix per expert."""
    return [
        f"{name}.{parameter_name}"
        for name, layer in decoder_layers(decoder).items()
        for parameter_name, parameter in layer.named_parameters()
        if parameter.dim() == 3
    ]


def unquantized_weights(decoder: PreTrainedModel) -> list[str]:
    """Names of the matrices of decoder layers that bitsandbytes leaves as they are.

    It replaces linear layers, but neither their subclasses (Falcon) nor fused experts.
    """
    subclasses = [
        f"{layer_name}.{name}.weight"
        for layer_name, layer in decoder_layers(decoder).items()
        for name, module in layer.named_modules()
        if isinstance(module, LINEAR) and type(module) not in LINEAR
    ]
    return subclasses + fused_experts(decoder)


@dataclass(frozen=True)
class WordLayers:
    """Word embeddings and head of a causal language model on the meta device, and the names of their weights.

    Attributes:
        embedding: maps word ids to what the decoder is given, including a scale that some families apply.
        head: linear layer [V, D] before scales and soft caps of the logits.
        head_bias_name: None for a head without bias.
        prefix: of the decoder's weights in the language model.
    """

    embedding: nn.Embedding
    head: nn.Linear
    embedding_name: str
    head_name: str
    head_bias_name: str | None
    prefix: str


def word_layers(model: PreTrainedModel) -> WordLayers:
    """Describe the word layers of a causal language model.

    Raises:
        ConfigError: for a model whose embeddings or head are of another kind, or of different widths.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if (
        not isinstance(embedding, nn.Embedding)
        or not isinstance(head, nn.Linear)
        or head.in_features != embedding.embedding_dim
    ):
        raise ConfigError(
            "backbone",
            model.config.model_type,
            f"has word embeddings {embedding} and a head {head}, which are not an embedding and a linear layer of one"
            " width",
            "Choose another decoder.",
        )
    names = {id(module): name for name, module in model.named_modules()}
    head_name = names[id(head)]
    return WordLayers(
        embedding,
        head,
        f"{names[id(embedding)]}.weight",
        f"{head_name}.weight",
        None if head.bias is None else f"{head_name}.bias",
        f"{model.base_model_prefix}.",
    )


def renamed_weights(model: PreTrainedModel, stored: Collection[str]) -> dict[str, tuple[str, bool]]:
    """Map each stored name to the name in the model as transformers renames it, and whether it merges tensors.

    Merged tensors (experts that are stored one by one) have another shape in the model.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    renamed = {}
    for name in sorted(stored):
        new, pattern = rename_source_key(name, renamings, converters)
        renamed[name] = new, pattern is not None
    return renamed


def stored_name(model: PreTrainedModel, name: str, stored: Collection[str]) -> str | None:
    """Name under which a weight of the language model is stored, with or without the prefix; None if absent."""
    by_new_name = {new: old for old, (new, _) in renamed_weights(model, stored).items()}
    names = (name, name.removeprefix(f"{model.base_model_prefix}."))
    return next((by_new_name[name] for name in names if name in by_new_name), None)


class _GivenStates(BaseModelOutputWithPast):
    """Hidden states as a decoder's output, without anything else that a language model may pass on."""

    def __getattr__(self, name: str) -> None:
        if name.startswith("_"):
            raise AttributeError(name)


class LogitTransform:
    """Scales and soft caps that a language model applies to the logits of its linear head, computed by its code.

    The decoder of a model on the meta device is replaced by a function that returns the logits as hidden states, and
    its head by the identity.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        def given_states(*_: Any, inputs_embeds: Tensor, **__: Any) -> _GivenStates:
            return _GivenStates(last_hidden_state=inputs_embeds)

        model.get_decoder().forward = given_states
        model.set_output_embeddings(nn.Identity())
        self._model = model

    def __call__(self, logits: Tensor) -> Tensor:
        """Transform logits [n, C] of any C words."""
        transformed: Tensor = self._model(inputs_embeds=logits[None]).logits[0]
        return transformed


def logit_transform(config: PretrainedConfig) -> Callable[[Tensor], Tensor] | None:
    """Return the transformation of a model's logits, which applies to each alone; None for the identity.

    Raises:
        ConfigError: for a model whose transformation needs weights, or mixes logits.
    """
    transform, sample = LogitTransform(meta_language_model(config)), torch.linspace(-40.0, 40.0, 41)[None]
    try:
        whole, part = transform(sample), transform(sample[:, 7:12])
        is_elementwise = torch.equal(whole[:, 7:12], part)
    except Exception as error:
        raise _unknown_head(config, error) from error
    if not is_elementwise:
        raise _unknown_head(config, "logits depend on each other")
    return None if torch.equal(whole, sample) else transform


def _unknown_head(config: PretrainedConfig, problem: object) -> ConfigError:
    return ConfigError(
        "backbone",
        config.model_type,
        f"has a head that is more than a linear layer, scales and soft caps ({problem})",
        "Choose another decoder, or leave the content LLM out with batch.texts=0.",
    )


class _MaskRequest(Exception):
    """Raised by a replaced mask function: the decoder has called it.

    Attributes:
        has_positions: True if it was given `position_ids`.
    """

    def __init__(self, *, has_positions: bool) -> None:
        self.has_positions = has_positions


def finds_packed_documents(kind: type[PreTrainedModel], config: PretrainedConfig) -> bool:
    """True if a decoder masks other documents by itself.

    The mask functions of transformers detect documents where `position_ids` restart, but some decoders (OPT, Falcon)
    do not pass them on. A decoder that makes its mask in another way counts as True; the probe tests it.
    """
    decoder = _structure(kind, config)
    embedding: Any = decoder.get_input_embeddings()

    def record(*_: Any, position_ids: Tensor | None = None, **__: Any) -> None:
        raise _MaskRequest(has_positions=position_ids is not None)

    code = sys.modules[type(decoder).__module__]
    functions: dict[str, Any] = {
        name: record for name in vars(code) if name.startswith("create_") and name.endswith("causal_mask")
    }
    with torch.device("meta"), mock.patch.multiple(code, **functions):
        try:
            decoder(
                inputs_embeds=torch.empty(1, 2, embedding.embedding_dim),
                position_ids=torch.zeros(1, 2, dtype=torch.int64),
            )
        except _MaskRequest as request:
            return request.has_positions
        except Exception:  # a decoder that cannot run on the meta device
            return True
    return True
