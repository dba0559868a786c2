"""Sizes of the backbone that tests of several libraries use, and of its adapters."""

from __future__ import annotations

from cllm4rec_dist.config import AdapterConfig

LORA = AdapterConfig(kind="lora", rank=2, alpha=4)
NUM_LAYERS, WIDTH = 6, 16
