"""The linear memory in a checkpoint: it is held as an index, and written as the rows that it was made of."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from cllm4rec_dist.checkpointing.async_saver import AsyncSaver
from cllm4rec_dist.checkpointing.checkpoint import read
from cllm4rec_dist.checkpointing.format import LINEAR_NEIGHBORS, LINEAR_WEIGHTS, Checkpoint, RunState, shard_file
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.evaluation.trained_run import load_local
from cllm4rec_dist.model.linear_fit import LinearSettings
from cllm4rec_dist.system import InferenceSystem
from tests.harness import make_backbone, make_catalog, make_corpus, make_run

NUM_ITEMS, WIDTH = 17, 6
NEIGHBORS = [[1, 4, 9, 16], [], [0], [3, 5, 6, 7, 8], [2, 12]]
WEIGHTS = [0.5, -0.0, 0.0, -1.25, 3.0]


def rows() -> tuple[Tensor, Tensor]:
    """Rows with explicit zeros, without neighbors, and none as long as the matrix is wide."""
    neighbors = torch.full((NUM_ITEMS, WIDTH), -1, dtype=torch.int32)
    weights = torch.zeros(NUM_ITEMS, WIDTH)
    for item in range(NUM_ITEMS):
        chosen = NEIGHBORS[item % len(NEIGHBORS)]
        neighbors[item, : len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        weights[item, : len(chosen)] = torch.tensor(WEIGHTS[: len(chosen)])
    return neighbors, weights


def saved(system: InferenceSystem, folder: Path) -> Path:
    """Save a loaded system, and return the path of its shard."""
    system.engine.steps_taken = lambda: 0.0  # type: ignore[attr-defined]
    saver = AsyncSaver(Store(f"{folder}/checkpoints"), system, keep=2)  # type: ignore[arg-type]
    saver.save(RunState(step=7, best=0.25, best_step=7, best_metric="recall@5", linear_weight=0.5), "best-")
    saver.finish()
    return folder / "checkpoints/best-00000007" / shard_file(0, 1)


@pytest.fixture
def system(tmp_path: Path) -> InferenceSystem:
    catalog = make_catalog(num_items=NUM_ITEMS)
    backbone = make_backbone(tmp_path / "backbone", catalog)
    run = make_run(tmp_path / "run", make_corpus(tmp_path / "corpus", catalog, backbone), backbone)
    return load_local(str(run), torch.device("cpu"))[0]


def test_a_linear_memory_is_written_as_the_rows_that_filled_it(system: InferenceSystem, tmp_path: Path) -> None:
    system.linear.fill(*rows(), LinearSettings())
    shard = saved(system, tmp_path / "first")
    tensors = load_file(shard)
    for name, expected in zip((LINEAR_NEIGHBORS, LINEAR_WEIGHTS), rows(), strict=True):
        assert (tensors[name].dtype, tensors[name].shape) == (expected.dtype, expected.shape)
        assert tensors[name].numpy().tobytes() == expected.numpy().tobytes(), name

    again, _ = load_local(str(tmp_path / "first"), torch.device("cpu"))
    assert saved(again, tmp_path / "second").read_bytes() == shard.read_bytes()


def test_a_linear_memory_is_read_where_it_is_mapped_and_outlives_its_file(
    system: InferenceSystem, tmp_path: Path
) -> None:
    system.linear.fill(*rows(), LinearSettings())
    shard = saved(system, tmp_path / "saved")
    opened = Checkpoint.open(Store(f"{tmp_path}/saved/checkpoints"), "best-00000007")
    linear = read(system, opened, moments=False).linear
    assert linear is not None
    shard.unlink()
    system.linear.fill(*linear, LinearSettings())
    for part, expected in zip(system.linear.rows(), rows(), strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=0)
