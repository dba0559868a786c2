"""Backbone folders of every family, and ways to change a copy of one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

_LLAMA_TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TARGETS = {
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "llama": _LLAMA_TARGETS,
    "mistral": _LLAMA_TARGETS,
    "qwen2": _LLAMA_TARGETS,
}
"""Linear layers of the families that `build-backbone` builds."""
FAMILIES = list(TARGETS)
WIDTH = 16


def copied(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to))


def changed(folder: Path, to: Path, **settings: Any) -> Path:
    """A copy with other settings in its config.json, and without those given as None."""
    copy = copied(folder, to)
    path = copy / "config.json"
    tree = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({key: value for key, value in tree.items() if settings.get(key, 0) is not None}))
    return copy


def sharded(folder: Path, to: Path) -> Path:
    """A copy whose weights are in several files under an index."""
    copy = copied(folder, to)
    (copy / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(copy, max_shard_size="20KB")
    assert len(list(copy.glob("model-*-of-*.safetensors"))) > 2
    return copy


def rewrite(path: Path, **tensors: Tensor) -> None:
    """Put tensors into a weight file."""
    save_file(load_file(path) | tensors, path, {"format": "pt"})
