"""Configuration of runs: settings, how files and overrides become them, and what a resumed run may change."""

from cllm4rec_dist.config.loading import StrictModel, dotted_items, load_config, validate
from cllm4rec_dist.config.schema import (
    METRIC_NAME,
    AdapterConfig,
    BackboneConfig,
    BatchConfig,
    CheckpointConfig,
    EmbeddingsConfig,
    FaultsConfig,
    HeadConfig,
    MethodConfig,
    OptimizerConfig,
    RunConfig,
    TrackerName,
    ValidationConfig,
)

__all__ = [
    "METRIC_NAME",
    "AdapterConfig",
    "BackboneConfig",
    "BatchConfig",
    "CheckpointConfig",
    "EmbeddingsConfig",
    "FaultsConfig",
    "HeadConfig",
    "MethodConfig",
    "OptimizerConfig",
    "RunConfig",
    "StrictModel",
    "TrackerName",
    "ValidationConfig",
    "dotted_items",
    "load_config",
    "validate",
]
