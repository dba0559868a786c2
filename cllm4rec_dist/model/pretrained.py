"""Validate a backbone from its config.json and the headers of its weight files, without building the model.

A run computes with the decoder that transformers would load, or it is refused before any weight is read. Transformers
itself often only warns: it initializes missing weights at random, may read quantized weights as plain numbers, and
applies an adapter that it finds in the folder.

Legend: V words, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig, PreTrainedModel

from cllm4rec_dist.config import AdapterConfig
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.architecture import (
    LINEAR,
    WordLayers,
    decoder_class,
    fused_experts,
    is_bidirectional,
    lora_targets,
    meta_decoder,
    meta_language_model,
    renamed_weights,
    stored_name,
    unquantized_weights,
    word_layers,
)
from cllm4rec_dist.model.weights import CONFIG, StoredWeight, read_settings, stored_weights

logger = logging.getLogger(__name__)

_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_QUANTIZER_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files of AutoGPTQ, AutoAWQ and ModelOpt."""
_SENTENCE_TRANSFORMERS_FILES = ("modules.json", "config_sentence_transformers.json")
"""Files of sentence-transformers, whose models embed texts and cannot generate them."""
MARKER_FILES = ("adapter_config.json", *_QUANTIZER_FILES, *_SENTENCE_TRANSFORMERS_FILES)
"""Small files whose presence tells what kind of model a folder holds."""

_BUFFER_SUFFIXES = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "crossattention.bias")
"""Name endings of constants that earlier versions of transformers stored."""
_UNQUANTIZED_DTYPES = {"F64", "F32", "F16", "BF16"}
_DEQUANTIZE = (
    "Use the model that it was made from, or dequantize it with transformers and save it again (model.dequantize(),"
    " model.save_pretrained(folder))."
)
_USE_ORIGINAL = "Use the model that it was made from; quantization=nf4 keeps it in 4 bits."
_MERGE = (
    "Merge it first: AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new_folder)."
)


def load_config(folder: Path) -> PretrainedConfig:
    """Read the decoder's configuration.

    Raises:
        ConfigError: for a folder without config.json, with an adapter or with quantized weights, and for a model that
            is no decoder, has other inputs than texts, bidirectional attention or a random number of layers.
    """
    _require_no_adapter(folder)
    settings = read_settings(folder)
    _require_unquantized(folder, settings)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(
            "backbone", str(folder), f"has no valid config.json of a decoder ({error})", "Fetch the backbone again."
        ) from error
    _require_decoder(folder, config)
    return config


def _require_decoder(folder: Path, config: PretrainedConfig) -> None:
    """Refuse models that are no causal language models over words, as far as config.json shows."""
    problem = None
    if decoder_class(config) is None or getattr(config, "is_encoder_decoder", False):
        problem = "is no decoder: transformers has no AutoModelForCausalLM and AutoModel of this type"
    elif is_bidirectional(config):
        problem = "is an encoder, whose tokens attend to later ones"
    elif config.sub_configs:
        problem = f"has several models ({', '.join(config.sub_configs)}), of which a run needs the one over words"
    if problem is not None:
        raise ConfigError(
            "backbone", config.model_type, problem, "Choose a decoder over text, such as qwen3, llama or gemma2."
        )
    if not getattr(config, "is_causal", True):
        raise ConfigError(
            f"backbone {folder}: is_causal",
            config.is_causal,
            "lets every token attend to later ones, as in embedding models, so that the model would see its targets",
            "Use the language model that it was made from.",
        )
    if getattr(config, "layerdrop", 0):
        raise ConfigError(
            f"backbone {folder}: layerdrop",
            config.layerdrop,
            "skips layers at random, on each rank others",
            "Set it to 0 in config.json.",
        )


def max_positions(config: PretrainedConfig) -> int:
    """Return the maximum sequence length of a decoder."""
    length = getattr(config, "n_positions", None) or getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int) or length < 1:
        raise ConfigError(
            "backbone: max_position_embeddings", length, "must be a positive integer", "Fetch the backbone again."
        )
    return length


def require_static_rotary(config: PretrainedConfig, field: str, length: int, prompt: int) -> None:
    """Refuse rotary factors that would depend on the longest document of a batch.

    Transformers recomputes the factors of `longrope` and `dynamic` in each forward, from the largest position in it
    (`modeling_rope_utils.dynamic_rope_update`), so a document's result would depend on the others in its batch. The
    factors are constant up to the length that needs no scaling. All other types have constant factors.

    Args:
        field: the setting that limits the length of documents.
        length: its value.
        prompt: maximum number of prompt tokens in a document.
    """
    for path, rope in _rope_settings(getattr(config, "rope_parameters", None) or {}, "rope_parameters"):
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        limit = config.max_position_embeddings
        if kind == "longrope":
            # Either may have it; the configuration's value takes effect when the model is built.
            originals = [source.get("original_max_position_embeddings") for source in (rope, vars(config))]
            limit = min((length for length in originals if isinstance(length, int)), default=0)
        elif "dynamic" not in kind:
            continue
        if length + prompt > limit:
            raise ConfigError(
                field,
                length,
                f"with its prompt exceeds {limit} positions, above which the backbone's {path}.rope_type {kind!r}"
                " changes the rotary factors of all documents in a batch",
                f"Set it to {limit - prompt} or less, or choose a backbone with rope_type default, linear, llama3 or"
                " yarn.",
            )


def require_weights(folder: Path, config: PretrainedConfig) -> None:
    """Refuse weight files in which a weight of the decoder is missing, has another shape or is quantized.

    Transformers would initialize it at random with only a warning, under ZeRO-3 on rank 0 alone. Stored weights that
    the decoder does not have are ignored with a warning, as in transformers. Call it outside of `sharded_loading`.

    Raises:
        ConfigError: names the weights.
    """
    decoder, headers = meta_decoder(config), stored_weights(folder)
    stored: dict[str, StoredWeight] = {}
    merged = set()
    for name, (renamed, is_merged) in renamed_weights(decoder, headers).items():
        weight, bare = headers[name], renamed.removeprefix(f"{decoder.base_model_prefix}.")
        if ".lora_" in name:
            raise ConfigError(f"backbone {folder}", name, "is an adapter's weight, which would be ignored", _MERGE)
        if is_merged:
            merged.add(bare)
        elif bare in stored:
            raise ConfigError(
                f"backbone {folder}",
                name,
                f"is stored twice, as {bare} too",
                "Remove the one that does not belong to the model.",
            )
        stored[bare] = weight
    expected = {name: list(weight.shape) for name, weight in decoder.state_dict().items()}
    if packed := sorted(name for name in expected if name in stored and stored[name].dtype not in _UNQUANTIZED_DTYPES):
        raise ConfigError(
            f"backbone {folder}",
            packed[:3],
            f"are stored as {stored[packed[0]].dtype}: quantized, but config.json has no quantization_config",
            _DEQUANTIZE,
        )
    wrong = [
        name
        for name, shape in expected.items()
        if name not in stored or (stored[name].shape != shape and name not in merged)
    ]
    if wrong:
        raise ConfigError(
            f"backbone {folder}",
            wrong[:3],
            f"are missing or have another shape than in config.json (and {len(wrong[3:])} more)",
            "Fetch the backbone again.",
        )
    parts = {name.split(".")[0] for name in expected}
    unused = [name for name in stored if name not in expected and name.split(".")[0] in parts]
    if unused := [name for name in unused if not name.endswith(_BUFFER_SUFFIXES)]:
        logger.warning(
            "backbone %s: its decoder does not have %d of the stored weights (%s): does config.json belong to them?",
            folder,
            len(unused),
            ", ".join(unused[:3]),
        )


def require_head(folder: Path, config: PretrainedConfig, stored: Mapping[str, StoredWeight] | None) -> str:
    """Return the name of the stored weight of the language-model head.

    This is the head's own weight if it is stored: transformers does not tie weights that are stored with different
    values. Else it is the word embeddings if config.json ties them and the model was saved with its head: a base model
    (GPT2Model), a classifier or an embedding model has the same config.json and was never trained to predict words.

    Args:
        stored: headers of the weights; None if they are not available, so that config.json alone decides.

    Raises:
        ConfigError: for a backbone without language-model head.
    """
    model = meta_language_model(config)
    layers = word_layers(model)
    name = _head_weight(folder, model, layers, stored)
    if name is None:
        architectures = ", ".join(_architectures(config)) or "none named"
        raise ConfigError(
            "backbone",
            str(folder),
            f"has no language-model head ({layers.head_name} is absent; architectures: {architectures};"
            f" tie_word_embeddings: {str(bool(config.tie_word_embeddings)).lower()}), and the content LLM predicts"
            " words with it",
            "Use the causal language model itself, or leave the content LLM out with batch.texts=0.",
        )
    shape = [*layers.head.weight.shape]
    if stored is not None and (stored[name].shape != shape or stored[name].dtype not in _UNQUANTIZED_DTYPES):
        raise ConfigError(
            f"backbone {folder}: {name}",
            f"{stored[name].dtype} {stored[name].shape}",
            f"is not an unquantized matrix of {shape}",
            "Fetch the backbone again.",
        )
    return name


def require_targets(config: PretrainedConfig, adapter: AdapterConfig) -> None:
    """Refuse names in `adapter.targets` that match no layer, or a layer that is not linear.

    PEFT requires only one of the names to match, and adapts embeddings too, which have another forward.
    """
    if adapter.kind != "lora" or not adapter.targets:
        return
    layers = dict(meta_decoder(config).named_modules())
    linear = {name.rsplit(".", 1)[-1] for name, layer in layers.items() if isinstance(layer, LINEAR)}
    for target in adapter.targets:
        matched = [layer for name, layer in layers.items() if target and f".{name}".endswith(f".{target}")]
        others = [type(layer).__name__ for layer in matched if not isinstance(layer, LINEAR)]
        if matched and not others:
            continue
        problem = f"matches a layer that is not linear ({others[0]})" if others else "matches no layer of the backbone"
        raise ConfigError(
            "adapter.targets", target, problem, f"Choose from {sorted(linear)}, or leave adapter.targets out."
        )


def require_adaptable(config: PretrainedConfig, adapter: AdapterConfig, quantization: str) -> None:
    """Refuse what cannot be trained or quantized; for a mixture of experts, log what is adapted.

    Experts are fused in three-dimensional parameters. LoRA adapts linear layers only: attention and shared experts.

    Raises:
        ConfigError: for `adapter.kind=full` of a mixture of experts, whose router would be trained without the loss
            that balances the experts, and for 4-bit weights of layers that bitsandbytes leaves unquantized.
    """
    decoder = meta_decoder(config)
    if quantization != "none" and (weights := unquantized_weights(decoder)):
        raise ConfigError(
            "quantization",
            quantization,
            f"would leave {len(weights)} matrices of {config.model_type} unquantized ({weights[0]})",
            "Use quantization=none, or another backbone.",
        )
    if not fused_experts(decoder):
        return
    if adapter.kind == "full":
        raise ConfigError(
            "adapter.kind",
            adapter.kind,
            f"would train the router of {config.model_type} without the loss that balances its experts",
            "Use adapter.kind=lora or none.",
        )
    if adapter.kind == "lora":
        targets = ", ".join(adapter.targets or lora_targets(decoder))
        logger.info("%s: LoRA adapts %s; experts and routers stay frozen", config.model_type, targets)


def _require_no_adapter(folder: Path) -> None:
    for name in _ADAPTER_FILES:
        if (folder / name).is_file():
            raise ConfigError(
                f"backbone {folder}",
                name,
                "is an adapter, which transformers would load and a run would not apply",
                _MERGE,
            )


def _require_unquantized(folder: Path, settings: dict[str, Any]) -> None:
    quantization = next(_quantizations(settings, CONFIG), None)
    if quantization is None:
        file = next((name for name in _QUANTIZER_FILES if (folder / name).is_file()), None)
        if file is None:
            return
        quantization = file, file.split("_config")[0]
    path, method = quantization
    raise ConfigError(
        f"backbone {folder}: {path}",
        method,
        "is the quantization of the weights, and a run needs unquantized ones",
        _USE_ORIGINAL if "bitsandbytes" in method or "bnb" in method else _DEQUANTIZE,
    )


def _quantizations(settings: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Yield path and method of each quantization in a configuration and its sections."""
    for key, value in settings.items():
        if key in ("quantization_config", "compression_config") and value is not None:
            yield f"{path}: {key}", _method(value)
        elif isinstance(value, dict):
            yield from _quantizations(value, f"{path}: {key}")


def _method(section: object) -> str:
    if not isinstance(section, dict):
        return f"unknown method {section!r}"
    if section.get("load_in_4bit") or section.get("load_in_8bit"):
        return f"bitsandbytes, {'4' if section.get('load_in_4bit') else '8'} bits"
    methods = [section[key] for key in ("quant_method", "quant_algo", "fmt", "format") if section.get(key)]
    return ", ".join(map(str, methods[:2])) or "unknown method"


def _head_weight(
    folder: Path, model: PreTrainedModel, layers: WordLayers, stored: Mapping[str, StoredWeight] | None
) -> str | None:
    config = model.config
    if stored is None:
        return layers.head_name if _is_language_model(folder, config, layers, None) else None
    name = stored_name(model, layers.head_name, stored)
    if name is None and config.tie_word_embeddings and _is_language_model(folder, config, layers, stored):
        return stored_name(model, layers.embedding_name, stored)
    return name


def _is_language_model(
    folder: Path, config: PretrainedConfig, layers: WordLayers, stored: Mapping[str, StoredWeight] | None
) -> bool:
    """True if the model was saved with a language-model head, even if the head is tied and not stored."""
    if any((folder / name).is_file() for name in _SENTENCE_TRANSFORMERS_FILES):
        return False
    if architectures := _architectures(config):
        return any(name.endswith(("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")) for name in architectures)
    return stored is None or any(name.startswith(layers.prefix) for name in stored)


def _architectures(config: PretrainedConfig) -> list[str]:
    names = config.architectures
    return [str(name) for name in names] if isinstance(names, (list, tuple)) else []


def _rope_settings(parameters: dict[str, Any], path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield path and rotary settings, one set for the model or one per type of layer."""
    nested = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    if not nested:
        yield path, parameters
    for key, value in nested.items():
        yield from _rope_settings(value, f"{path}.{key}")
