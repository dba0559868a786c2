"""The cache of factors: read at any world size, and not used if anything in it is wrong."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cllm4rec_dist.corpus.manifest import INIT_CACHE
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.init_cache import InitCache, cache_key
from tests.damage import flip_bit
from tests.harness import alone, run_ranks

NUM_ROWS, NUM_FACTORS = 11, 3
KEY = cache_key({"seed": 0})
FACTORS = torch.arange(NUM_ROWS * NUM_FACTORS).view(NUM_ROWS, NUM_FACTORS).float()


def write(world: World, folder: str) -> None:
    partition = RowPartition(NUM_ROWS, world.size)
    local = FACTORS[slice(*partition.range(world.rank))]
    InitCache(f"{folder}/corpus", f"{folder}/run", world).write(KEY, local, partition)


def read(world: World, folder: str, key: str = KEY) -> list[Tensor]:
    """Return this rank's rows in a list, which is empty without a valid entry."""
    cache = InitCache(f"{folder}/corpus", f"{folder}/run", world)
    rows = cache.read(key, RowPartition(NUM_ROWS, world.size), NUM_FACTORS)
    return [] if rows is None else [rows]


def entry(folder: Path, parent: str = "corpus") -> Path:
    return folder / parent / INIT_CACHE / KEY


@pytest.mark.parametrize(("writers", "readers"), [(1, 3), (3, 1), (3, 2), (7, 1)])
def test_an_entry_is_read_by_another_number_of_ranks(tmp_path: Path, writers: int, readers: int) -> None:
    run_ranks(writers, write, str(tmp_path)) if writers > 1 else write(alone(), str(tmp_path))
    parts = run_ranks(readers, read, str(tmp_path)) if readers > 1 else [read(alone(), str(tmp_path))]
    assert torch.equal(torch.cat([part[0] for part in parts]), FACTORS)
    assert not [*(tmp_path / "corpus" / INIT_CACHE).glob("*.partial")]


def cut_short(folder: Path) -> None:
    file = min(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-1])


def flipped(folder: Path) -> None:
    flip_bit(min(folder.glob("*.safetensors")), random.Random(0))


def removed(folder: Path) -> None:
    min(folder.glob("*.safetensors")).unlink()


def without_index(folder: Path) -> None:
    (folder / "factors.json").unlink()


def of_other_rows(folder: Path) -> None:
    index = json.loads((folder / "factors.json").read_text())
    index["files"][0]["stop"] -= 1
    (folder / "factors.json").write_text(json.dumps(index))


def foreign(folder: Path) -> None:
    (folder / "factors.json").write_text('["something else"]')


@pytest.mark.parametrize("damage", [cut_short, flipped, removed, without_index, of_other_rows, foreign])
def test_a_damaged_entry_is_not_used_and_written_anew(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    write(alone(), str(tmp_path))
    damage(entry(tmp_path))
    assert read(alone(), str(tmp_path)) == []
    write(alone(), str(tmp_path))
    assert torch.equal(read(alone(), str(tmp_path))[0], FACTORS)


def test_no_rank_uses_an_entry_that_another_cannot_read(tmp_path: Path) -> None:
    run_ranks(3, write, str(tmp_path))
    flip_bit(max(entry(tmp_path).glob("*.safetensors")), random.Random(0))
    assert run_ranks(3, read, str(tmp_path)) == [[], [], []]


def test_other_settings_have_another_entry(tmp_path: Path) -> None:
    write(alone(), str(tmp_path))
    assert read(alone(), str(tmp_path), cache_key({"seed": 1})) == []


def test_factors_go_to_the_run_where_the_corpus_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "corpus").write_text("a file, into which nobody can write, not even the root user of tests")
    write(alone(), str(tmp_path))
    assert entry(tmp_path, "run").is_dir()
    assert torch.equal(read(alone(), str(tmp_path))[0], FACTORS)
    (tmp_path / "run").rename(tmp_path / "elsewhere")
    (tmp_path / "run").write_text("a file, too")
    write(alone(), str(tmp_path))
    assert read(alone(), str(tmp_path)) == []
