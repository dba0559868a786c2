"""Evaluation of known and new users: the same on any number of ranks, and the files that it writes."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
import torch

from cllm4rec_dist.checkpointing.run_folder import METRICS_FILE
from cllm4rec_dist.corpus.heldout import HeldOutUsers
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.evaluation.comparison import compare
from cllm4rec_dist.evaluation.inference import LIST_LENGTH, _choose_examples, evaluate_run, load
from cllm4rec_dist.evaluation.metrics import user_metrics
from cllm4rec_dist.evaluation.topk import rank_users
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks, with_new_users
from tests.training import Made, make_config, run

METRICS = ["recall@5", "ndcg@10"]
BASELINES = ("popularity", "ease", "title_ease", "ials")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """A run in `run`, on a corpus of 23 known users and 10 new ones, with a shared user row."""
    folder = tmp_path_factory.mktemp("inference")
    catalog = with_new_users(make_catalog(num_items=60))
    backbone = make_backbone(folder / "backbone", catalog)
    made = folder, make_corpus(folder / "corpus", catalog, backbone), str(backbone)
    method = {"max_history": 100, "shared_user_ratio": 0.3}
    run_ranks(2, run, make_config(made, folder / "run", "finetune", method=method, max_steps=3))
    return made


def evaluated(world: World, folder: str, output: str, split: str, options: dict[str, Any]) -> None:
    evaluate_run(world, lambda metrics: None, folder, split, METRICS, 4, output, **options)


def lists(world: World, folder: str, split: str, without_rows: bool) -> dict[str, list[int]]:
    """Rank the catalog for each user separately; returns the list of each."""
    system, _ = load(folder, world)
    users = HeldOutUsers.of(system.corpus, split)
    ranked = []
    for index in range(len(users)):
        row = np.array([-1 if without_rows else users.rows[index]])
        history = users.histories.take([index])
        (ranking,) = rank_users(system, row, history, 60, 1, seen=history)
        ranked.append(ranking.items[0][np.isfinite(ranking.scores[0])].tolist())
    return dict(zip(users.ids(system.corpus), ranked, strict=True))


def held(world: World, folder: str) -> tuple[set[str], int]:
    """Names of the tables of a loaded run, and how many tensors outside of them are as large as one of them."""
    system, _ = load(folder, world)
    tables = {name: p for name, p, _ in system.recommender.sharded_parameters() if p.dim() == 2}
    storages = {p.untyped_storage().data_ptr() for p in tables.values()}
    shapes = {p.shape for p in tables.values()}
    others = {
        each.untyped_storage().data_ptr()
        for each in gc.get_objects()
        if type(each) in (torch.Tensor, torch.nn.Parameter) and each.shape in shapes
    }
    return set(tables), len(others - storages)


@pytest.mark.parametrize("size", [1, 2])
def test_predictions_hold_neither_moments_nor_the_content_llm(trained: Made, size: int) -> None:
    tables = {"collaborative.users", "collaborative.items", "head.bias"}
    assert run_ranks(size, held, str(trained[0] / "run")) == [(tables, 0)] * size


@pytest.mark.parametrize(
    ("num_hits", "num_misses", "shown"), [(500, 500, (18, 18)), (3, 500, (3, 33)), (500, 5, (31, 5)), (2, 1, (2, 1))]
)
def test_examples_have_both_hits_and_misses_if_there_are_any(
    num_hits: int, num_misses: int, shown: tuple[int, int]
) -> None:
    has_hit = np.arange(num_hits + num_misses) < num_hits
    chosen = _choose_examples(np.full(len(has_hit), 4), has_hit)
    assert (has_hit[chosen].sum(), (~has_hit[chosen]).sum()) == shown
    assert (np.diff(chosen) > 0).all()
    lengths = np.where(np.arange(len(has_hit)) % 2, 9, 1)
    assert (lengths[_choose_examples(lengths, has_hit)] >= np.median(lengths)).all()


@pytest.mark.slow
@pytest.mark.parametrize("without_rows", [False, True])
def test_values_of_users_are_those_of_their_lists_on_any_number_of_ranks(
    trained: Made, tmp_path: Path, without_rows: bool
) -> None:
    folder, corpus = str(trained[0] / "run"), Corpus.open(trained[1])
    users = HeldOutUsers.of(corpus, "test")
    (expected,) = run_ranks(1, lists, folder, "test", without_rows)
    counts = np.zeros(corpus.num_items, int)
    for size in (1, 3):
        output = tmp_path / str(size)
        run_ranks(size, evaluated, folder, str(output), "test", {"without_rows": without_rows})
        table = pl.read_parquet(output / "users.parquet")
        assert table.columns == ["user", "group", "history_length", *METRICS]
        assert table["group"].to_list() == ["known"] * 23 + ["new"] * 5
        assert table["user"].to_list() == users.ids(corpus)
        counts[:] = 0
        for index, (user, _, length, *values) in enumerate(table.iter_rows()):
            items = expected[user]
            assert length == len(users.histories[index])
            assert set(users.histories[index]).isdisjoint(items)
            exact = user_metrics(np.array([items]), users.held_out.take([index]), METRICS)[0]
            assert values == pytest.approx(exact)
            counts[items[:LIST_LENGTH]] += 1
        recommended = pl.read_parquet(output / "recommended.parquet")
        names = corpus.items()["item"].to_pylist()
        assert dict(recommended.iter_rows()) == {names[i]: int(n) for i, n in enumerate(counts) if n}

        content = json.loads((output / "evaluation.json").read_text())
        assert content["num_users"] == 28
        for name in METRICS:
            assert content["mean"][name] == pytest.approx(table[name].mean())
            for group in ("known", "new"):
                part = table.filter(pl.col("group") == group)
                assert content["groups"][group]["mean"][name] == pytest.approx(part[name].mean())
                assert content["groups"][group]["num_users"] == len(part)
        assert any("without their rows" in note for note in content["notes"]) == without_rows


@pytest.mark.slow
def test_a_sample_of_users_has_the_values_that_they_have_among_all(trained: Made, tmp_path: Path) -> None:
    """Those of the model and of the baselines, which select by a sample of the validation users, too."""
    folder = str(trained[0] / "run")
    tables = {}
    for size in (None, 9):
        output = tmp_path / str(size)
        run_ranks(2, evaluated, folder, str(output), "test", {"num_users": size, "baselines": True})
        compare(output, METRICS, baselines=("popularity",), seconds=1.0)
        tables[size] = [pl.read_parquet(output / name) for name in ("users.parquet", "baselines.parquet")]
    content = json.loads((tmp_path / "9" / "evaluation.json").read_text())
    assert (content["num_users"], content["sample"]) == (9, 9)
    assert content["notes"] == ["a sample of 9 of 28 users was ranked"]
    for every, sampled in zip(tables[None], tables[9], strict=True):
        assert len(sampled) == 9
        columns = ["user", *METRICS]
        same = every.filter(pl.col("user").is_in(sampled["user"].implode()))
        for (user, *values), (other, *expected) in zip(
            sampled[columns].iter_rows(), same[columns].iter_rows(), strict=True
        ):
            assert user == other
            assert values == pytest.approx(expected)


@pytest.mark.slow
def test_rows_matter_only_to_known_users(trained: Made) -> None:
    folder = str(trained[0] / "run")
    ((with_rows, without),) = run_ranks(1, both_lists, folder)
    differs = {user for user, items in with_rows.items() if items != without[user]}
    assert differs
    assert all(user.startswith("user-") for user in differs)


def both_lists(world: World, folder: str) -> tuple[dict[str, list[int]], dict[str, list[int]]]:
    return lists(world, folder, "test", False), lists(world, folder, "test", True)


@pytest.mark.slow
def test_validation_while_training_counts_known_and_new_users_once_each(trained: Made, tmp_path: Path) -> None:
    folder = trained[0] / "run"
    run_ranks(2, evaluated, str(folder), str(tmp_path), "valid", {})
    content = json.loads((tmp_path / "evaluation.json").read_text())
    assert content["num_users"] == 28
    logged = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    (validated,) = [line for line in logged if "valid/recall@5" in line]
    for name in METRICS:
        assert validated[f"valid/{name}"] == pytest.approx(content["mean"][name], abs=1e-6)


@pytest.mark.slow
def test_the_table_compares_known_and_new_users_with_baselines(trained: Made, tmp_path: Path) -> None:
    run_ranks(1, evaluated, str(trained[0] / "run"), str(tmp_path), "test", {"baselines": True})
    text = compare(tmp_path, METRICS, baselines=BASELINES, seconds=1.0)
    for title in ("**All users** (28)", "**Known users** (23)", "**New users** (5)"):
        assert title in text
    assert text.count("| CLLM4Rec |") == text.count("| EASE |") == text.count("| iALS |") == 3
    results = json.loads((tmp_path / "results.json").read_text())
    assert text.count("| CLLM4Rec (LLM alone) |") == text.count("| Linear memory alone |") == 3
    values = pl.concat(pl.read_parquet(tmp_path / f"{name}.parquet") for name in ("parts", "baselines"))
    users = pl.read_parquet(tmp_path / "users.parquet")
    assert values.columns == ["model", "user", "group", *METRICS]
    for row in results["rows"][1:]:
        table = values.filter(pl.col("model") == row["name"])
        assert table.select("user", "group").equals(users.select("user", "group"))
        for name in METRICS:
            assert row["metrics"][name] == pytest.approx(table[name].mean())
    assert [group["group"] for group in results["groups"]] == ["known", "new"]
    for group in results["groups"]:
        for row in group["rows"]:
            table = users if row["name"] == "CLLM4Rec" else values.filter(pl.col("model") == row["name"])
            part = table.filter(pl.col("group") == group["group"])
            assert group["num_users"] == len(part)
            assert row["metrics"]["ndcg@10"] == pytest.approx(part["ndcg@10"].mean())
    # Baseline files of an earlier evaluation are removed.
    run_ranks(1, evaluated, str(trained[0] / "run"), str(tmp_path), "valid", {})
    assert not (tmp_path / "baselines.parquet").exists()
