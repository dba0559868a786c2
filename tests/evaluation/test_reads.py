"""What each command reads of a corpus: only the splits that it needs, and none of them twice."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest

from cllm4rec_dist.corpus.shards import SPLITS, Corpus, ShardSet
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.evaluation.comparison import compare
from cllm4rec_dist.evaluation.inference import evaluate_run
from cllm4rec_dist.serving.bulk import BulkRequest, recommend_users
from tests.harness import make_backbone, make_catalog, make_corpus, make_run, run_ranks
from tests.training import Made, make_config, run

METRICS = ["recall@5"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder = tmp_path_factory.mktemp("reads")
    catalog = make_catalog(num_items=40)
    backbone = make_backbone(folder / "backbone", catalog)
    corpus = make_corpus(folder / "corpus", catalog, backbone)
    make_run(folder / "run", corpus, backbone, linear_weight=0.5)
    return folder, corpus, str(backbone)


def reads_of(command: Callable[..., Any], *arguments: Any) -> Counter[str]:
    """Run a command; return how often each split of a record of users, and each table, was read, at most."""
    records, read_record = Counter[tuple[int, str]](), ShardSet.read_record
    tables, read_table = Counter[str](), Corpus._table

    def count_record(self: ShardSet, index: int, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
        arrays = read_record(self, index, names)
        records.update((index, name.removesuffix("_items")) for name in arrays if name.endswith("_items"))
        return arrays

    def count_table(self: Corpus, kind: str, num_rows: int, columns: list[str] | None = None) -> Any:
        tables[kind] += 1
        return read_table(self, kind, num_rows, columns)

    with mock.patch.object(ShardSet, "read_record", count_record), mock.patch.object(Corpus, "_table", count_table):
        command(*arguments)
    most = {name: max((n for (_, split), n in records.items() if split == name), default=0) for name in SPLITS}
    num_records = Counter(split for _, split in records)
    return Counter(most | dict(tables) | {f"records of {name}": n for name, n in num_records.items()})


def counted(world: World, command: Callable[..., Any], *arguments: Any) -> Counter[str]:
    return reads_of(command, world, lambda metrics: None, *arguments)


def counted_training(world: World, config: Any) -> Counter[str]:
    return reads_of(run, world, config)


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2])
def test_an_evaluation_reads_the_users_histories_and_one_split_once(made: Made, tmp_path: Path, size: int) -> None:
    folder = str(made[0] / "run")
    for reads in run_ranks(size, counted, evaluate_run, folder, "test", METRICS, 4, str(tmp_path)):
        assert {name: reads[name] for name in (*SPLITS, "users", "items")} == {
            "train": 1,
            "valid": 0,
            "test": 1,
            "users": 1,
            "items": 1,
        }


def test_a_comparison_reads_every_split_once(made: Made, tmp_path: Path) -> None:
    folder = str(made[0] / "run")
    run_ranks(1, counted, evaluate_run, folder, "test", METRICS, 4, str(tmp_path))
    kinds = (*SPLITS, "users", "items")
    reads = reads_of(lambda: compare(tmp_path, METRICS, baselines=("popularity",), seconds=1.0))
    assert {name: reads[name] for name in kinds} == dict.fromkeys(kinds, 1)


def test_lists_for_one_user_read_one_record_of_held_out_items(made: Made, tmp_path: Path) -> None:
    corpus = Corpus.open(made[1], verify=False)
    assert len(corpus.interactions) > 1
    request = BulkRequest(top=3, users=[corpus.users()["user"][5].as_py()])
    (reads,) = run_ranks(1, counted, recommend_users, str(made[0] / "run"), request, str(tmp_path / "lists"))
    assert reads["records of valid"] == reads["records of test"] == 1
    assert reads["items"] == reads["users"] == 1


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_training_never_reads_the_test_split(made: Made, tmp_path: Path, stage: str) -> None:
    config = make_config(made, tmp_path / "run", stage, max_steps=2)
    for reads in run_ranks(2, counted_training, config):
        assert reads["test"] == 0
        assert (reads["valid"] > 0) == (stage == "finetune")
