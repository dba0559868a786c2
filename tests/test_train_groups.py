"""Runs whose tables have copies on groups of ranks: whole runs, resumes between layouts, growth."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cllm4rec_dist.checkpointing.find_run import find
from tests.checkpointing.test_warm_start import loaded_tables, other_catalog
from tests.harness import make_corpus, run_ranks
from tests.test_train import evaluated
from tests.training import Made, about, make_config, metrics, refused, run

EMBEDDINGS = {"init": "spectral", "dropout": 0.3, "lambda_l": 0.01, "lambda_c": 0.1}


def grouped(num_shards: int | None) -> dict[str, Any]:
    return {"embeddings": EMBEDDINGS | {"shard_group": num_shards}, "seed": 1}


@pytest.fixture(scope="module")
def resumed(made: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finetuning run whose legs have other numbers of ranks and of copies; the last one has two on four ranks."""
    folder = tmp_path_factory.mktemp("groups") / "parts"
    for size, num_shards, until in ((4, 2, 2), (2, 1, 4), (3, None, 7), (4, 2, None)):
        run_ranks(size, run, make_config(made, folder, "finetune", **grouped(num_shards), max_steps=until))
        assert about(folder).shard_group == num_shards
    return folder


@pytest.mark.slow
def test_a_run_resumes_with_any_copies_of_its_tables(made: Made, resumed: Path, tmp_path: Path) -> None:
    """Losses, validations and the chosen weight of the linear memory are those of one rank, within rounding."""
    run_ranks(1, run, make_config(made, tmp_path, "finetune", **grouped(None)))
    got, expected = (
        {(line["step"], "loss" in line): line for line in metrics(folder)} for folder in (resumed, tmp_path)
    )
    assert len(expected) == 9 + 3  # steps and validations
    for place, line in expected.items():
        for key in line:
            assert got[place][key] == pytest.approx(line[key], rel=2e-4, abs=1e-6), (place, key)


@pytest.mark.slow
def test_a_run_with_copies_is_evaluated_on_any_number_of_ranks(resumed: Path, tmp_path: Path) -> None:
    recorded = about(resumed, find(str(resumed))[1][0]).run
    for size in (1, 3):
        run_ranks(size, evaluated, str(resumed), str(tmp_path / str(size)))
        evaluation = json.loads((tmp_path / str(size) / "evaluation.json").read_text())
        assert evaluation["mean"]["recall@5"] == pytest.approx(recorded.best, rel=1e-6)


@pytest.mark.slow
def test_copies_of_another_catalog_start_from_a_run_with_copies(made: Made, resumed: Path, tmp_path: Path) -> None:
    other = tmp_path, make_corpus(tmp_path / "other", other_catalog(), Path(made[2])), made[2]
    starts = {"init_from": str(resumed), "allow_leak": True}
    flat, copies = (
        run_ranks(size, loaded_tables, make_config(other, tmp_path / str(size), **starts, **layout))
        for size, layout in ((2, grouped(None)), (4, grouped(2)))
    )
    for rank, tables in enumerate(copies):
        for name, rows in tables.items():
            torch.testing.assert_close(rows, flat[rank % 2][name], rtol=1e-4, atol=1e-5)
            assert torch.equal(rows, copies[rank % 2][name])


@pytest.mark.slow
def test_groups_that_do_not_divide_the_ranks_are_refused_before_anything_is_written(made: Made, tmp_path: Path) -> None:
    messages = run_ranks(2, refused, make_config(made, tmp_path / "run", **grouped(3)))
    assert all("embeddings.shard_group" in message and "does not divide the 2 ranks" in message for message in messages)
    assert not (tmp_path / "run" / "checkpoints").exists()
