"""Whether a backbone can be used: what its config.json and the headers of its weight files say.

A run computes with the decoder that transformers would load, or it is refused before any weight is read. Transformers
itself often only warns: it starts missing weights at random, takes quantized ones for plain numbers where it is told to
ignore their scales, and applies an adapter that it finds in the folder. Nothing here builds a model with weights.

Legend: V words, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from cllm4rec_dist.config import AdapterConfig
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.model.weights import CONFIG, StoredWeight, read_settings, stored_weights

logger = logging.getLogger(__name__)

LORA_TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "mistral": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen2": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
}
"""Supported decoder families and where their adapters sit by default (every linear layer)."""

HEAD_WEIGHT = "lm_head.weight"

_ADAPTERS = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_QUANTIZERS = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")
"""Files of AutoGPTQ, AutoAWQ and ModelOpt."""
_SENTENCES = ("modules.json", "config_sentence_transformers.json")
"""Files of sentence-transformers, whose models embed texts and do not generate them."""
SIGNS = ("adapter_config.json", *_QUANTIZERS, *_SENTENCES)
"""Small files beside the model's own that tell what a folder is."""

_BUFFERS = ("rotary_emb.inv_freq", "attn.bias", "attn.masked_bias", "crossattention.bias")
"""Ends of names of constants that earlier versions of transformers stored."""
_PLAIN = {"F64", "F32", "F16", "BF16"}
_DEQUANTIZE = (
    "Take the model that it was made from, or dequantize it with transformers and save it again (model.dequantize(),"
    " model.save_pretrained(folder))."
)
_UNQUANTIZED = "Take the model that it was made from; quantization=nf4 keeps it in 4 bits."
_MERGE = (
    "Merge it first: AutoPeftModelForCausalLM.from_pretrained(folder).merge_and_unload().save_pretrained(new_folder)."
)


def load_config(folder: Path) -> PretrainedConfig:
    """The decoder's configuration.

    Raises:
        ConfigError: for a folder without one, with an adapter or quantized weights, for a decoder that attends to both
            sides, and for families that nobody has tested here.
    """
    _require_no_adapter(folder)
    settings = read_settings(folder)
    _require_unquantized(folder, settings)
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:
        raise ConfigError(
            "backbone", str(folder), f"holds no config.json of a decoder ({error})", "Fetch the backbone again."
        ) from error
    if config.model_type not in LORA_TARGETS:
        raise ConfigError(
            "backbone", config.model_type, f"is not one of {sorted(LORA_TARGETS)}", "Choose a supported decoder."
        )
    if not getattr(config, "is_causal", True):
        raise ConfigError(
            f"backbone {folder}: is_causal",
            config.is_causal,
            "makes every token see those behind it, as embedding models do, so that targets are seen",
            "Take the language model that it was made from.",
        )
    return config


def positions(config: PretrainedConfig) -> int:
    """The longest sequence that a decoder takes."""
    found = getattr(config, "n_positions", None) or getattr(config, "max_position_embeddings", None)
    if not isinstance(found, int) or found < 1:
        raise ConfigError("backbone: max_position_embeddings", found, "is no length", "Fetch the backbone again.")
    return found


def require_static_rotary(config: PretrainedConfig, field: str, length: int, prompt: int) -> None:
    """Refuse rotary factors that would change with the longest document of a batch.

    Transformers chooses those of `longrope` and `dynamic` anew in each forward, from the largest position in it
    (`modeling_rope_utils.dynamic_rope_update`), so a document would be computed otherwise beside a long one than alone.
    They are constant as long as none passes the length up to which nothing is scaled. All other types are constant.

    Args:
        field: the setting that bounds documents.
        length: its value.
        prompt: tokens of a document's prompt at most.
    """
    for place, rope in _rotary(getattr(config, "rope_parameters", None) or {}, "rope_parameters"):
        kind = str(rope.get("rope_type", rope.get("type", "default")))
        constant = config.max_position_embeddings
        if kind == "longrope":
            # Either may hold it; that of the configuration takes effect when the model is built.
            originals = [source.get("original_max_position_embeddings") for source in (rope, vars(config))]
            constant = min((length for length in originals if isinstance(length, int)), default=0)
        elif "dynamic" not in kind:
            continue
        if length + prompt > constant:
            raise ConfigError(
                field,
                length,
                f"with its prompt passes {constant} positions, from where on the backbone's {place}.rope_type {kind!r}"
                " gives every document of a batch other factors than it has alone",
                f"Set it to {constant - prompt} or less, or choose a backbone with rope_type default, linear, llama3 or"
                " yarn.",
            )


def require_weights(folder: Path, config: PretrainedConfig) -> None:
    """Refuse files that lack a weight of the decoder, or have it in another shape or quantized.

    Transformers would start it at random with no more than a warning, under ZeRO-3 on rank 0 alone. Weights that the
    decoder has no place for are left out with a warning, as by transformers. Call it outside of `sharded_loading`.
    """
    decoder = outline_decoder(config)
    found: dict[str, StoredWeight] = {}
    for name, weight in stored_weights(folder).items():
        bare = name.removeprefix(f"{decoder.base_model_prefix}.")
        if ".lora_" in name:
            raise ConfigError(f"backbone {folder}", name, "is a weight of an adapter, which would be left out", _MERGE)
        if bare in found:
            raise ConfigError(
                f"backbone {folder}", name, f"is there twice, as {bare} too", "Remove the one that is not the model's."
            )
        found[bare] = weight
    wanted = {name: list(weight.shape) for name, weight in decoder.state_dict().items()}
    if packed := sorted(name for name in wanted if name in found and found[name].dtype not in _PLAIN):
        raise ConfigError(
            f"backbone {folder}",
            packed[:3],
            f"are stored as {found[packed[0]].dtype}: quantized, without a quantization_config that says how",
            _DEQUANTIZE,
        )
    wrong = [name for name, shape in wanted.items() if name not in found or found[name].shape != shape]
    if wrong:
        raise ConfigError(
            f"backbone {folder}",
            wrong[:3],
            f"are missing or have not the shape that config.json says (and {len(wrong[3:])} more)",
            "Fetch the backbone again.",
        )
    parts = {name.split(".")[0] for name in wanted}
    unused = [name for name in found if name not in wanted and name.split(".")[0] in parts]
    if unused := [name for name in unused if not name.endswith(_BUFFERS)]:
        logger.warning(
            "backbone %s: its decoder has no place for %d stored weights (%s): is config.json that of these weights?",
            folder,
            len(unused),
            ", ".join(unused[:3]),
        )


def require_head(folder: Path, config: PretrainedConfig, stored: Mapping[str, StoredWeight] | None) -> str:
    """The stored weight that predicts words.

    It is `lm_head.weight` where there is one: transformers ties no weights that are stored with other values. Word
    embeddings stand in for it where config.json ties them and the model was saved with its head: a base model
    (GPT2Model), a classifier or an embedding model has the same config.json and was never trained to predict words.

    Args:
        stored: headers of the weights; None where they are not at hand, so that config.json alone decides.

    Raises:
        ConfigError: for a backbone without language-model head.
    """
    name = _head_weight(folder, config, stored)
    if name is None:
        made_as = ", ".join(_architectures(config)) or "none named"
        raise ConfigError(
            "backbone",
            str(folder),
            f"has no language-model head ({HEAD_WEIGHT} is absent; architectures: {made_as}; tie_word_embeddings:"
            f" {str(bool(config.tie_word_embeddings)).lower()}), and the content LLM predicts words with it",
            "Take the causal language model itself, or leave the content LLM out with batch.texts=0.",
        )
    shape = [config.vocab_size, config.hidden_size]
    if stored is not None and (stored[name].shape != shape or stored[name].dtype not in _PLAIN):
        raise ConfigError(
            f"backbone {folder}: {name}",
            f"{stored[name].dtype} {stored[name].shape}",
            f"is not a plain matrix of {shape}",
            "Fetch the backbone again.",
        )
    return name


def embedding_weight(config: PretrainedConfig, stored: Mapping[str, StoredWeight]) -> str | None:
    """The name under which the word embeddings are stored, with or without the base model's prefix."""
    name = "wte.weight" if config.model_type == "gpt2" else "embed_tokens.weight"
    return next((found for found in (f"{_prefix(config)}{name}", name) if found in stored), None)


def require_targets(config: PretrainedConfig, adapter: AdapterConfig) -> None:
    """Refuse names of `adapter.targets` that match no layer, or one that is not linear.

    PEFT is content if one of all names matches, and adapts embeddings too, which have another forward.
    """
    if adapter.kind != "lora" or not adapter.targets:
        return
    layers = dict(outline_decoder(config).named_modules())
    linear = {name.rsplit(".", 1)[-1] for name, layer in layers.items() if isinstance(layer, (nn.Linear, Conv1D))}
    for target in adapter.targets:
        matched = [layer for name, layer in layers.items() if target and f".{name}".endswith(f".{target}")]
        others = [type(layer).__name__ for layer in matched if not isinstance(layer, (nn.Linear, Conv1D))]
        if matched and not others:
            continue
        problem = f"matches a layer that is not linear ({others[0]})" if others else "matches no layer of the backbone"
        raise ConfigError(
            "adapter.targets", target, problem, f"Choose of {sorted(linear)}, or leave adapter.targets out."
        )


def outline_decoder(config: PretrainedConfig, **settings: Any) -> PreTrainedModel:
    """The decoder without its head on the meta device; `settings` are those of `AutoModel.from_config`."""
    try:
        with torch.device("meta"):
            return AutoModel.from_config(config, **settings)
    except Exception as error:
        raise ConfigError(
            "backbone",
            str(config.name_or_path),
            f"has a config.json of which no decoder can be made ({error})",
            "Fetch the backbone again.",
        ) from error


def _require_no_adapter(folder: Path) -> None:
    for name in _ADAPTERS:
        if (folder / name).is_file():
            raise ConfigError(
                f"backbone {folder}",
                name,
                "is an adapter, which transformers would load into the model and a run would not apply",
                _MERGE,
            )


def _require_unquantized(folder: Path, settings: dict[str, Any]) -> None:
    found = next(_quantizations(settings, CONFIG), None)
    if found is None:
        file = next((name for name in _QUANTIZERS if (folder / name).is_file()), None)
        if file is None:
            return
        found = file, file.split("_config")[0]
    place, method = found
    raise ConfigError(
        f"backbone {folder}: {place}",
        method,
        "is how the weights are quantized, and a run needs plain ones",
        _UNQUANTIZED if "bitsandbytes" in method or "bnb" in method else _DEQUANTIZE,
    )


def _quantizations(settings: dict[str, Any], place: str) -> Iterator[tuple[str, str]]:
    """Where a configuration or a part of it says that weights are quantized, and by which method."""
    for key, value in settings.items():
        if key in ("quantization_config", "compression_config") and value is not None:
            yield f"{place}: {key}", _method(value)
        elif isinstance(value, dict):
            yield from _quantizations(value, f"{place}: {key}")


def _method(section: object) -> str:
    if not isinstance(section, dict):
        return f"unknown method {section!r}"
    if section.get("load_in_4bit") or section.get("load_in_8bit"):
        return f"bitsandbytes, {'4' if section.get('load_in_4bit') else '8'} bits"
    found = [section[key] for key in ("quant_method", "quant_algo", "fmt", "format") if section.get(key)]
    return ", ".join(map(str, found[:2])) or "unknown method"


def _head_weight(folder: Path, config: PretrainedConfig, stored: Mapping[str, StoredWeight] | None) -> str | None:
    if stored is None:
        return HEAD_WEIGHT if _is_language_model(folder, config, None) else None
    if HEAD_WEIGHT in stored:
        return HEAD_WEIGHT
    if config.tie_word_embeddings and _is_language_model(folder, config, stored):
        return embedding_weight(config, stored)
    return None


def _is_language_model(folder: Path, config: PretrainedConfig, stored: Mapping[str, StoredWeight] | None) -> bool:
    """True where a model was saved with a head that predicts words, even if the head is tied and not stored."""
    if any((folder / name).is_file() for name in _SENTENCES):
        return False
    if made_as := _architectures(config):
        return any(name.endswith(("ForCausalLM", "LMHeadModel", "DoubleHeadsModel")) for name in made_as)
    return stored is None or any(name.startswith(_prefix(config)) for name in stored)


def _architectures(config: PretrainedConfig) -> list[str]:
    found = config.architectures
    return [str(name) for name in found] if isinstance(found, (list, tuple)) else []


def _prefix(config: PretrainedConfig) -> str:
    """What stands before the decoder's weights in a model with head."""
    return "transformer." if config.model_type == "gpt2" else "model."


def _rotary(parameters: dict[str, Any], place: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rotary settings: one set, or one for each type of layer."""
    nested = {key: value for key, value in parameters.items() if isinstance(value, dict)}
    if not nested:
        yield place, parameters
    for key, value in nested.items():
        yield from _rotary(value, f"{place}.{key}")
