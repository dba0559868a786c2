"""Row ranges, each rank's part of a range, and Slurm's rank variables."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributed.tensor import Shard

from cllm4rec_dist.distributed.topology import RowPartition, World, adopt_slurm_environment, find_device
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.launchers.launch import launch

patient = settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.too_slow])
"""A slow machine must not fail a test."""

SIZES = st.integers(1, 9)
ROWS = st.integers(0, 60)


@patient
@given(num_rows=ROWS, size=SIZES)
def test_ranges_cover_all_rows_once_in_rank_order(num_rows: int, size: int) -> None:
    partition = RowPartition(num_rows, size)
    covered = [row for rank in range(size) for row in range(*partition.range(rank))]
    assert covered == list(range(num_rows))
    assert [partition.num_local(rank) for rank in range(size)] == [
        stop - start for start, stop in map(partition.range, range(size))
    ]


@patient
@given(num_rows=ROWS, size=SIZES)
def test_rows_are_partitioned_as_by_dtensor(num_rows: int, size: int) -> None:
    partition = RowPartition(num_rows, size)
    for rank in range(size):
        count, start = Shard.local_shard_size_and_offset(num_rows, size, rank)
        assert (partition.num_local(rank), partition.range(rank)[0]) == (count, start)


@patient
@given(num_rows=ROWS, size=SIZES)
def test_the_owner_of_a_row_is_the_row_divided_by_the_block(num_rows: int, size: int) -> None:
    partition = RowPartition(num_rows, size)
    for rank in range(size):
        assert all(row // partition.block == rank for row in range(*partition.range(rank)))


@patient
@given(num_rows=ROWS, size=SIZES)
def test_only_trailing_ranks_hold_less_than_a_block(num_rows: int, size: int) -> None:
    partition = RowPartition(num_rows, size)
    lengths = [partition.num_local(rank) for rank in range(size)]
    assert lengths == sorted(lengths, reverse=True)
    assert all(length == partition.block for length in lengths[: num_rows // partition.block])


def test_ranks_after_the_last_row_hold_none() -> None:
    partition = RowPartition(5, 4)
    assert [partition.range(rank) for rank in range(4)] == [(0, 2), (2, 4), (4, 5), (5, 5)]
    assert [RowPartition(2, 4).num_local(rank) for rank in range(4)] == [1, 1, 0, 0]
    assert [RowPartition(0, 2).range(rank) for rank in range(2)] == [(0, 0), (0, 0)]


@patient
@given(start=st.integers(0, 1000), length=st.integers(0, 50), size=SIZES)
def test_shares_cover_the_positions_once_and_differ_by_at_most_one(start: int, length: int, size: int) -> None:
    worlds = [World(rank, size, rank, torch.device("cpu")) for rank in range(size)]
    shares = [world.local_range(start, start + length) for world in worlds]
    assert [position for share in shares for position in range(*share)] == list(range(start, start + length))
    lengths = [stop - first for first, stop in shares]
    assert max(lengths) - min(lengths) <= 1


def test_rank_0_is_the_main_one() -> None:
    assert [World(rank, 3, rank, torch.device("cpu")).is_main for rank in range(3)] == [True, False, False]


SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "1", "MASTER_ADDR": "node1"}


def test_slurms_variables_set_torchs() -> None:
    environ = dict(SLURM)
    adopt_slurm_environment(environ)
    assert {name: environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")} == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
    }


def test_a_rank_that_a_launcher_set_is_not_changed() -> None:
    environ = SLURM | {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    before = dict(environ)
    adopt_slurm_environment(environ)
    assert environ == before


def test_an_interactive_slurm_shell_without_a_rendezvous_is_not_changed() -> None:
    for missing in ("MASTER_ADDR", "SLURM_PROCID"):
        environ = {name: value for name, value in SLURM.items() if name != missing}
        before = dict(environ)
        adopt_slurm_environment(environ)
        assert environ == before


def test_tasks_of_srun_that_cannot_find_each_other_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # `deepspeed --launcher slurm` sets no MASTER_ADDR: every task would silently train alone into one output.
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    with pytest.raises(ConfigError, match="each of 2 tasks would train alone"):
        launch(len, "auto", "1")


@pytest.mark.parametrize("name", ["cuda:9", "cuda", "foo", "cuda:x", "", "meta", "cpu:3"])
def test_a_device_that_the_host_does_not_have_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=rf"device: '{name}' is no device of this host, which has cpu\. Name one"):
        find_device(name)


def test_a_device_of_the_host_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("cpu") == find_device(None) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device(None) == torch.device("cuda")
    assert [find_device(name) for name in ("cuda", "cuda:1")] == [torch.device("cuda"), torch.device("cuda", 1)]
    with pytest.raises(ConfigError, match="which has cpu, cuda:0, cuda:1"):
        find_device("cuda:2")
