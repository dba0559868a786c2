"""Whole runs with faults: damaged checkpoints, bad losses, signals, full disks. Nothing is lost."""

from __future__ import annotations

import errno
import math
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file

import cllm4rec_dist.train as train_module
from cllm4rec_dist.checkpointing.find_run import find
from cllm4rec_dist.checkpointing.format import Checkpoint
from cllm4rec_dist.checkpointing.store import FileEntry, Store
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.collate import MicroBatch
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CheckpointError
from cllm4rec_dist.model import recommender as recommender_module
from cllm4rec_dist.step import StepResult
from cllm4rec_dist.system import System
from cllm4rec_dist.train import train
from tests.harness import run_ranks
from tests.training import Made, about, assert_equal_checkpoints, make_config, metrics, names, newest, refused, run


def flip_last_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))


@pytest.mark.slow
def test_a_damaged_checkpoint_is_quarantined_and_the_one_before_it_is_used(made: Made, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for output in (whole, broken):
        run_ranks(2, run, make_config(made, output, max_steps=8))
    flip_last_bit(newest(broken) / "shard-00001-of-00002.safetensors")  # step 8; rank 0 alone would not see it
    (broken / "checkpoints" / "step-00000006" / "replicated.safetensors").unlink()
    unfinished = broken / "checkpoints" / "step-00000007"
    unfinished.mkdir()
    for output in (whole, broken):
        run_ranks(2, run, make_config(made, output))
    assert metrics(broken) == metrics(whole)
    assert_equal_checkpoints(broken, whole)
    assert not unfinished.exists()
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        find(str(tmp_path / "nothing"))


@pytest.mark.slow
def test_a_run_with_only_damaged_checkpoints_does_not_start_from_scratch(made: Made, tmp_path: Path) -> None:
    config = make_config(made, tmp_path / "run", max_steps=2)
    run_ranks(1, run, config)
    flip_last_bit(newest(tmp_path / "run") / "replicated.safetensors")
    for _ in range(2):
        assert "holds no whole checkpoint, but damaged ones" in run_ranks(1, refused, config)[0]


def bad_batch(world: World, config: RunConfig, bad: int, value: float) -> str:
    """Train with the item loss of one step multiplied by `value`."""
    genuine, steps = train_module.train_step, iter(range(100))

    def spoiled(system: System, batches: list[MicroBatch], factor: float, largest: float) -> StepResult:
        if next(steps) == bad and world.rank == 0:
            item_loss = recommender_module.item_loss
            recommender_module.item_loss = lambda *a, **k: item_loss(*a, **k) * value
            try:
                return genuine(system, batches, factor, largest)
            finally:
                recommender_module.item_loss = item_loss
        return genuine(system, batches, factor, largest)

    train_module.train_step = spoiled
    return refused(world, config)


@pytest.mark.slow
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e4])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_bad_loss_stops_the_run_and_names_the_batch(made: Made, tmp_path: Path, value: float, precision: str) -> None:
    changes: dict[str, Any] = {"precision": precision, "max_steps": 6, "checkpoint": {"every_steps": 1, "keep": 10}}
    messages = run_ranks(2, bad_batch, make_config(made, tmp_path / "run", **changes), 4, value)
    for message in messages:
        assert "step 4 (epoch 1, users" in message
        assert "faults.on_bad_step=skip" in message
    assert names(tmp_path / "run")[-1] == "step-00000004"


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_skipped_step_changes_nothing_but_the_position(made: Made, tmp_path: Path, precision: str) -> None:
    changes: dict[str, Any] = {
        "precision": precision,
        "faults": {"on_bad_step": "skip"},
        "checkpoint": {"every_steps": 1, "keep": 10},
    }
    assert run_ranks(2, bad_batch, make_config(made, tmp_path / "run", **changes, max_steps=6), 4, math.nan) == ["", ""]
    store = Store(str(tmp_path / "run" / "checkpoints"))
    before, after, later = (Checkpoint.open(store, f"step-0000000{step}") for step in (4, 5, 6))
    assert (after.metadata.run.step, after.metadata.run.skipped_in_a_row) == (5, 1)
    assert later.metadata.run.skipped_in_a_row == 0
    for file in ("shard-00000-of-00002.safetensors", "shard-00001-of-00002.safetensors", "replicated.safetensors"):
        one, other, third = (load_file(c.file(file)) for c in (before, after, later))
        assert all(torch.equal(one[key], other[key]) for key in one)
        assert not all(torch.equal(one[key], third[key]) for key in one)
    assert [line["step"] for line in metrics(tmp_path / "run") if not line.get("accepted", True)] == [5]


def interrupted(world: World, config: RunConfig) -> tuple[int, bool]:
    """Send a signal to one rank at its fourth batch."""
    genuine, steps = train_module.train_step, iter(range(100))

    def signalled(*arguments: Any) -> StepResult:
        if next(steps) == 4 and world.rank == 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return genuine(*arguments)

    train_module.train_step = signalled
    result = train(world, lambda metrics: None, config)
    return result.state.step, result.interrupted


@pytest.mark.slow
def test_a_signal_to_one_rank_saves_and_stops_all_at_the_same_step(made: Made, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run_ranks(2, run, make_config(made, whole))
    assert run_ranks(2, interrupted, make_config(made, parts)) == [(5, True), (5, True)]
    assert names(parts)[-1] == "step-00000005"
    run_ranks(2, run, make_config(made, parts))
    assert metrics(parts) == metrics(whole)
    assert_equal_checkpoints(parts, whole)


@pytest.mark.slow
def test_a_signal_does_not_wait_for_the_linear_memory_which_no_step_needs(made: Made, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    late = {"checkpoint": {"every_steps": 9}, "validation": {"metrics": ["recall@5"], "every_epochs": 3}}
    settings = late | {"linear": {"neighbors": 5}}
    run_ranks(2, run, make_config(made, whole, "finetune", **settings))
    config = make_config(made, parts, "finetune", **settings)
    assert run_ranks(2, interrupted, config) == [(5, True), (5, True)]
    assert about(parts).linear is None
    run_ranks(2, run, config)
    assert about(parts).linear is not None
    assert metrics(parts) == metrics(whole)
    assert_equal_checkpoints(parts, whole)

    settings |= {"validation": {"every_epochs": 0}, "max_steps": 5}
    last = make_config(made, tmp_path / "last", "finetune", **settings)
    assert run_ranks(2, interrupted, last) == [(5, True), (5, True)]
    assert about(tmp_path / "last").linear is not None, "the run is finished, so no later checkpoint has it"


def on_a_failing_store(world: World, config: RunConfig, failing: list[str]) -> str:
    """Train with a full disk under the named checkpoints, on rank 1."""
    genuine = Store.write

    def write(store: Store, name: str, file: str, make: Any) -> FileEntry:
        if world.rank == 1 and name in failing:
            (Path(store.url) / name).mkdir(exist_ok=True)
            (Path(store.url) / name / file).write_bytes(b"half of")
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return genuine(store, name, file, make)

    Store.write = write  # type: ignore[method-assign]
    return refused(world, config)


@pytest.mark.slow
def test_a_full_disk_harms_no_earlier_checkpoint_and_stops_no_step(made: Made, tmp_path: Path) -> None:
    output = tmp_path / "run"
    messages = run_ranks(2, on_a_failing_store, make_config(made, output), ["step-00000006"])
    assert messages == ["", ""]
    assert names(output) == ["step-00000003", "step-00000009"]
    assert metrics(output)[-1]["step"] == 9
    # The last checkpoint of a run is not optional.
    messages = run_ranks(2, on_a_failing_store, make_config(made, output, epochs=4), ["step-00000012"])
    assert all("could not store the last checkpoint" in message for message in messages)
    assert names(output) == ["step-00000003", "step-00000009"]
    assert not (output / "checkpoints" / "step-00000012").exists()
    run_ranks(2, run, make_config(made, output, epochs=4))
    assert names(output)[-1] == "step-00000012"


def on_a_store_that_cannot_tidy_up(world: World, config: RunConfig) -> str:
    def fails(*arguments: Any) -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    genuine = Store.names
    Store.remove = fails  # type: ignore[method-assign]
    Store.names = lambda store, prefix: (  # type: ignore[method-assign]
        fails() if threading.current_thread().name == "checkpoint" and prefix == "best-" else genuine(store, prefix)
    )
    return refused(world, config)


@pytest.mark.slow
def test_old_checkpoints_that_cannot_be_removed_stop_nothing(made: Made, tmp_path: Path) -> None:
    config = make_config(made, tmp_path / "run", checkpoint={"every_steps": 3, "keep": 1})
    assert run_ranks(2, on_a_store_that_cannot_tidy_up, config) == ["", ""]
    assert names(tmp_path / "run") == ["step-00000003", "step-00000006", "step-00000009"]


@pytest.mark.slow
def test_two_runs_do_not_share_an_output(made: Made, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "_LOCK_TIMEOUT_SECONDS", 0.2)
    with FileLock(tmp_path / ".lock"):
        assert "is being written by another run" in run_ranks(1, refused, make_config(made, tmp_path))[0]
