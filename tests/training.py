"""Small training runs, as many tests need them; the fixture `made` has their corpus and backbone."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from cllm4rec_dist.checkpointing.format import ADAPTER, LINEAR_NEIGHBORS, Checkpoint, CheckpointMetadata
from cllm4rec_dist.checkpointing.run_folder import METRICS_FILE
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.distributed.adam import MOMENTS
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CLLM4RecError
from cllm4rec_dist.train import train

Made = tuple[Path, str, str]
"""A folder, and the paths of a corpus and of a backbone."""


def make_config(made: Made, output: Path, stage: str = "pretrain", **changes: Any) -> RunConfig:
    tree = {
        "stage": stage,
        "corpus": made[1],
        "backbone": made[2],
        "output": str(output),
        "epochs": 3,
        "batch": {"users": 9, "texts": 7, "gradient_accumulation_steps": 2},
        "adapter": {"kind": "lora", "rank": 4},
        "embeddings": {"init": "spectral", "dropout": 0.3, "lambda_l": 0.01, "lambda_c": 0.1},
        "method": {"max_history": 100},
        "optimizer": {"lr": 1e-2, "embeddings_lr": 5e-3, "warmup_steps": 2},
        "checkpoint": {"every_steps": 3, "keep": 10},
        "validation": {"metrics": ["recall@5", "ndcg@10"], "batch_users": 5},
    } | changes
    return validate(RunConfig, tree, "test")


def run(world: World, config: RunConfig) -> None:
    train(world, lambda metrics: None, config)


def refused(world: World, config: RunConfig) -> str:
    try:
        train(world, lambda metrics: None, config)
    except CLLM4RecError as error:
        return str(error)
    return ""


def metrics(folder: Path) -> list[dict[str, Any]]:
    volatile = {"time", "tokens_per_second", "stage", "packing_efficiency"}  # depend on machine or ranks
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in volatile} for line in lines]


def names(run: Path) -> list[str]:
    return Store(f"{run}/checkpoints").names("step-")


def newest(run: Path) -> Path:
    return run / "checkpoints" / names(run)[-1]


def about(run: Path, name: str | None = None) -> CheckpointMetadata:
    return Checkpoint.open(Store(f"{run}/checkpoints"), name or names(run)[-1]).metadata


def contents(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Everything that a run resumes from, tables and adapters whole."""
    about, whole = checkpoint.metadata, checkpoint.base or checkpoint
    first_file = f"shard-00000-of-{about.world_size:05d}.safetensors"
    with safe_open(whole.file(first_file), framework="pt") as tensors:
        saved = [*tensors.keys()]
    result = checkpoint.replicated()
    for name in saved:
        table, _, last = name.rpartition(".")
        parameter = table if last in MOMENTS else name
        size = about.num_user_rows if parameter.endswith(".users") else about.num_items
        if parameter.startswith(ADAPTER):
            size = math.prod(about.shapes[parameter.removeprefix(ADAPTER)])
        value = checkpoint.rows(name, size, 0, size, "I32" if name == LINEAR_NEIGHBORS else "F32")
        assert value is not None
        result[name] = value
    return result


def assert_equal_checkpoints(one: Path, other: Path) -> None:
    """Check that the newest checkpoints of two runs are equal bit for bit, with moments and step counts."""
    files = sorted(path.name for path in newest(one).glob("*.safetensors"))
    assert files == sorted(path.name for path in newest(other).glob("*.safetensors"))
    for file in files:
        first, second = load_file(newest(one) / file), load_file(newest(other) / file)
        assert first.keys() == second.keys()
        for key in first:
            assert torch.equal(first[key], second[key]), key
