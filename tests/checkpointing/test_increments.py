"""Checkpoints that hold changed rows: the same bits as whole ones, less to write, and no damage that goes unseen."""

from __future__ import annotations

import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from cllm4rec_dist.checkpointing.format import ADAPTER, LINEAR_NEIGHBORS, Checkpoint, changed_rows_name
from cllm4rec_dist.checkpointing.increments import superseded
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.distributed.adam import MOMENTS
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks
from tests.training import Made, about, make_config, metrics, names, run

OPTIMIZER = {"lr": 1e-2, "embeddings_lr": 5e-3, "warmup_steps": 2}
SAMPLED = {"num_negatives": 5, "item_bias": True}
EMBEDDINGS = {"init": "spectral", "dropout": 0.3, "lambda_l": 0.01, "lambda_c": 0.1}
LAYOUTS: dict[str, tuple[int, str, dict[str, Any]]] = {
    "two ranks": (2, "pretrain", {}),
    "three ranks, items sampled": (3, "finetune", {"head": SAMPLED}),
    "copies of the tables": (4, "finetune", {"embeddings": EMBEDDINGS | {"shard_group": 2}}),
    "moments on the host": (1, "pretrain", {"optimizer": OPTIMIZER | {"embeddings_state": "cpu"}, "head": SAMPLED}),
    "packed moments": (2, "pretrain", {"optimizer": OPTIMIZER | {"embeddings_state": "int8"}}),
}


def saving(full_every: int, every_steps: int = 1, keep: int = 20) -> dict[str, Any]:
    return {"checkpoint": {"every_steps": every_steps, "keep": keep, "full_every": full_every}}


def few_users(**changes: Any) -> dict[str, Any]:
    """Six steps of four users and two texts, so that a step leaves most rows alone."""
    return {"batch": {"users": 4, "texts": 2}, "max_steps": 6, **changes}


def opened(run: Path, name: str) -> Checkpoint:
    return Checkpoint.open(Store(f"{run}/checkpoints"), name)


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


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def changed_rows(checkpoint: Checkpoint, table: str) -> Tensor:
    """The rows of a table that the files of a checkpoint hold."""
    about = checkpoint.metadata
    num_rows = about.num_user_rows if table.endswith("users") else about.num_items
    partition = about.partition(table, num_rows)
    found = []
    for rank in range(partition.world_size):
        tensors = load_file(checkpoint.file(f"shard-{rank:05d}-of-{about.world_size:05d}.safetensors"))
        local = tensors.get(changed_rows_name(table), torch.arange(partition.num_local(rank)))
        assert len(tensors[table]) == len(tensors[f"{table}.exp_avg"]) == len(local)
        found.append(local + partition.range(rank)[0])
    return torch.cat(found)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A backbone that is wide enough for moments in 8 bits."""
    folder, catalog = tmp_path_factory.mktemp("wide"), make_catalog()
    backbone = make_backbone(folder / "backbone", catalog, hidden_size=64)
    return folder, make_corpus(folder / "corpus", catalog, backbone), str(backbone)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_checkpoint_has_the_bits_of_a_whole_one(made: Made, wide: Made, tmp_path: Path, layout: str) -> None:
    size, stage, changes = LAYOUTS[layout]
    where = wide if layout == "packed moments" else made
    for full_every in (1, 3):
        config = make_config(where, tmp_path / str(full_every), stage, **few_users(**changes), **saving(full_every))
        run_ranks(size, run, config)
    assert metrics(tmp_path / "3") == metrics(tmp_path / "1")
    bases = [about(tmp_path / "3", name).base for name in names(tmp_path / "3")]
    assert [base and base.name for base in bases] == [
        None, "step-00000001", "step-00000001", None, "step-00000004", "step-00000004"
    ]  # fmt: skip
    tables = ["collaborative.users", *(["content.users", "content.items"] if stage == "pretrain" else [])]
    tables += ["collaborative.items", "head.bias"] if "head" in changes else []
    for name in names(tmp_path / "3"):
        whole, other = opened(tmp_path / "1", name), opened(tmp_path / "3", name)
        expected = contents(whole)
        assert same(contents(other), expected), name
        assert whole.external_ids("users") == other.external_ids("users")
        if other.base is None:
            continue
        assert {"users.parquet", "items.parquet"}.isdisjoint(other.marker.files)
        before = contents(other.base)
        for table in tables:
            differs = (expected[table] != before[table]).flatten(1).any(dim=1) if expected[table].dim() > 1 else (
                expected[table] != before[table]
            )  # fmt: skip
            stored = changed_rows(other, table)
            assert set(differs.nonzero().flatten().tolist()) <= set(stored.tolist()), (name, table)
            if table.endswith("users"):
                assert len(stored) < len(expected[table]), (name, table)
