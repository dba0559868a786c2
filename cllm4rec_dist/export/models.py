"""Export of model weights: trained PEFT adapters, a fully trained backbone, or an unchanged copy of a backbone.

AutoModelForCausalLM nests the decoder below a prefix, and PEFT matches weights by module name, with only a warning for
a weight that matches none. Therefore adapters for both classes store each weight under both names: otherwise one of
them would silently run without its adapter.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from cllm4rec_dist.export.source import Source
from cllm4rec_dist.model.architecture import meta_decoder
from cllm4rec_dist.model.backbone import lora_settings
from cllm4rec_dist.model.hub import TOKENIZER_FILES
from cllm4rec_dist.model.weights import CONFIG, INDEX, WEIGHTS, read_settings, weight_names

logger = logging.getLogger(__name__)

CAUSAL_LM = "-causal-lm"
"""Folder suffix of adapters for AutoModelForCausalLM only."""
_PREFIX = "decoder."
_LICENSE = re.compile(r"licen[cs]e|notice|copying", re.IGNORECASE)
"""Pattern for the names of files that must accompany the weights."""
_PATH_KEYS = ("_name_or_path", "name_or_path")
"""Keys under which transformers records the folder that a model or tokenizer was loaded from."""


def write_adapters(source: Source, backbone: str, output: Path) -> None:
    """Write each LLM's adapter twice: for both model classes, and for AutoModelForCausalLM only.

    Args:
        backbone: hub id or path, for `base_model_name_or_path`.
    """
    decoder = meta_decoder(source.decoder)
    prefix = f"{decoder.base_model_prefix}."
    for llm in source.llms:
        weights = {
            full.removeprefix(_PREFIX).replace(f".{llm}.", "."): value
            for full, value in source.tensors.items()
            if f".{llm}." in full
        }
        forms = ((llm, "FEATURE_EXTRACTION", ("", prefix)), (llm + CAUSAL_LM, "CAUSAL_LM", (prefix,)))
        for name, task_type, prefixes in forms:
            settings = lora_settings(source.config.adapter, decoder)
            settings.task_type = task_type
            settings.base_model_name_or_path = backbone
            settings.inference_mode = True
            settings.save_pretrained(str(output / name))
            # Cloned, because safetensors does not store shared memory.
            named = {f"base_model.model.{p}{key}": value.clone() for p in prefixes for key, value in weights.items()}
            save_file(named, output / name / "adapter_model.safetensors", metadata={"format": "pt"})


def write_trained_backbone(source: Source, output: Path) -> None:
    """Write the backbone with its trained weights, original word embeddings and LM head, and its tokenizer."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source.backbone, dtype=torch.float32, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    model, missing = loaded[0], sorted(loaded[1]["missing_keys"])
    decoder = model.base_model
    trained = {name.removeprefix(_PREFIX): value for name, value in source.tensors.items()}
    kept = decoder.load_state_dict(trained, strict=False)
    assert not kept.unexpected_keys, kept.unexpected_keys
    if missing:
        logger.warning(
            "%s has no LM head (%s): the export loads into AutoModel, but has no LM head for AutoModelForCausalLM",
            source.backbone,
            ", ".join(missing),
        )
    (decoder if missing else model).save_pretrained(output)
    _copy(source.backbone, output, _present(source.backbone, TOKENIZER_FILES))
    _remove_local_paths(output)


def copy_backbone(folder: Path, output: Path) -> None:
    """Copy the files of a backbone that transformers reads: configuration, weights and tokenizer."""
    weights = weight_names(folder)
    index = read_settings(folder).get("transformers_weights") or INDEX
    others = ["generation_config.json", *TOKENIZER_FILES, *([index] if weights != [WEIGHTS] else [])]
    output.mkdir()
    _copy(folder, output, {CONFIG, *weights, *_present(folder, others)})
    _remove_local_paths(output)


def copy_licenses(folder: Path, output: Path) -> list[str]:
    """Copy the licence and notice files of a backbone; return their names."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and _LICENSE.match(path.name))
    _copy(folder, output, names)
    return names


def _present(folder: Path, names: Iterable[str]) -> list[str]:
    return [name for name in names if (folder / name).is_file()]


def _copy(folder: Path, output: Path, names: Iterable[str]) -> None:
    for name in names:
        (output / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(folder / name, output / name)


def _remove_local_paths(folder: Path) -> None:
    """Remove the path that a model was loaded from from its JSON files."""
    for path in folder.glob("*config.json"):
        settings = json.loads(path.read_text(encoding="utf-8"))
        if any(key in settings for key in _PATH_KEYS):
            kept = {key: value for key, value in settings.items() if key not in _PATH_KEYS}
            path.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
