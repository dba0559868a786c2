"""Configuration of runs: settings, loading from files and overrides, and which settings may change on resume."""

from cllm4rec_dist.config.loading import StrictModel, dotted_items, load_config, path_override, validate
from cllm4rec_dist.config.schema import (
    BACKBONE_VECTORS,
    METRIC_NAME,
    AdapterConfig,
    BackboneConfig,
    BatchConfig,
    CheckpointConfig,
    EmbeddingsConfig,
    FaultsConfig,
    HeadConfig,
    LinearConfig,
    MethodConfig,
    OptimizerConfig,
    RunConfig,
    TrackerName,
    ValidationConfig,
)

__all__ = [
    "BACKBONE_VECTORS",
    "METRIC_NAME",
    "AdapterConfig",
    "BackboneConfig",
    "BatchConfig",
    "CheckpointConfig",
    "EmbeddingsConfig",
    "FaultsConfig",
    "HeadConfig",
    "LinearConfig",
    "MethodConfig",
    "OptimizerConfig",
    "RunConfig",
    "StrictModel",
    "TrackerName",
    "ValidationConfig",
    "dotted_items",
    "load_config",
    "path_override",
    "validate",
]
