"""A decoder of a pretrained one's shape with random weights."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cllm4rec_dist.model.hub import local_folder
from cllm4rec_dist.model.pretrained import load_config


def write_random_backbone(backbone: str, folder: Path, seed: int) -> None:
    """Write a decoder with the configuration and tokenizer of another one, and random weights, to `folder`.

    Args:
        backbone: folder or hub id.

    Raises:
        ConfigError: if the backbone cannot be read.
    """
    source = local_folder(backbone, weights=False)
    torch.manual_seed(seed)
    decoder = AutoModelForCausalLM.from_config(load_config(source), dtype=torch.float32)
    AutoTokenizer.from_pretrained(source, local_files_only=True).save_pretrained(folder)
    decoder.save_pretrained(folder)
