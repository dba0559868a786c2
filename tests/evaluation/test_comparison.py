"""Reports with baselines from the files of an evaluation."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from cllm4rec_dist.corpus.heldout import HeldOutUsers
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.evaluation import comparison
from cllm4rec_dist.evaluation.baseline_config import BaselineConfig
from cllm4rec_dist.evaluation.comparison import compare
from cllm4rec_dist.evaluation.metrics import mean_metrics
from cllm4rec_dist.evaluation.per_user import read_baselines, read_baselines_recommended
from tests.harness import make_backbone, make_catalog, make_corpus

METRICS = ["recall@5", "ndcg@10"]
BASELINES = ("popularity", "ease")


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    catalog = make_catalog()
    return Corpus.open(make_corpus(tmp_path / "corpus", catalog, make_backbone(tmp_path / "backbone", catalog)))


def write_evaluation(folder: Path, corpus: Corpus, url: str) -> int:
    """Write the files of `evaluate` with made-up values. Returns the number of users."""
    users = HeldOutUsers.of(corpus, "test")
    values = np.random.default_rng(0).random((len(users), 2))
    result = vars(mean_metrics(values, METRICS))
    folder.mkdir()
    columns = {"user": users.ids(corpus), "group": users.groups, "history_length": users.histories.lengths}
    pl.DataFrame(columns | dict(zip(METRICS, values.T, strict=True))).write_parquet(folder / "users.parquet")
    items = corpus.items()["item"].to_pylist()
    pl.DataFrame({"item": items, "count": range(1, len(items) + 1)}).write_parquet(folder / "recommended.parquet")
    content = {
        "run": "runs/a",
        "split": "test",
        **result,
        "groups": {"known": result},
        "notes": [],
        "examples": [],
        "share_with_hit": 0.25,
        "fingerprints": {},
        "config": {"corpus": url, "stage": "finetune", "init_from": None, "output": "runs/a"},
    }
    (folder / "evaluation.json").write_text(json.dumps(content))
    return len(users)


def test_baselines_write_their_values_and_the_report_tests_them(tmp_path, corpus):
    folder = tmp_path / "evaluation"
    num_users = write_evaluation(folder, corpus, str(tmp_path / "corpus"))
    settings = BaselineConfig(ease_lambdas=(10.0,))
    table = compare(folder, METRICS, baselines=BASELINES, seconds=1.0, settings=settings)
    assert "| Popularity |" in table
    baselines = read_baselines(folder)
    assert baselines.group_by("model", maintain_order=True).len().rows() == [
        ("Popularity", num_users),
        ("EASE", num_users),
    ]
    lists = read_baselines_recommended(folder)
    assert set(lists) == {"Popularity", "EASE"}
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert f"Paired t-test over {num_users} users" in page
    assert page.count("of 17</small>") == 3  # coverage of the model and of both baselines
    assert "No verdict" not in page
    assert "Left out: there" not in page

    # Of baselines that an earlier evaluation left behind nothing is shown.
    compare(folder, METRICS, baselines=(), seconds=1.0)
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert "No verdict: the evaluation was made without baselines" in page
    assert "Paired t-test over" not in page
    assert page.count("of 17</small>") == 1


def test_the_table_says_which_settings_were_chosen_and_on_what(tmp_path, corpus):
    folder = tmp_path / "evaluation"
    write_evaluation(folder, corpus, str(tmp_path / "corpus"))
    settings = BaselineConfig(
        names=("popularity",),
        ease_lambdas=(10.0,),
        ials_factors=(4,),
        ials_regularizations=(0.1, 1.0),
        ials_alphas=(2.0,),
        max_grid_interactions=100,
    )
    compare(folder, METRICS, baselines=("ease", "ials"), seconds=1.0, settings=settings)
    _, linear, ials = json.loads((folder / "results.json").read_text())["rows"]
    assert linear["chosen"] == {"lambda": 10.0}
    sample = ials["chosen"].pop("chosen on")
    assert re.fullmatch(rf"\d+ of {corpus.manifest.num_users} users", sample)
    assert ials["chosen"].keys() == {"factors", "regularization", "alpha"}
    assert f"alpha 2, chosen on {sample}</small>" in (folder / "report.html").read_text(encoding="utf-8")


def test_a_run_below_the_current_folder_is_named_by_its_relative_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert comparison._relative_path(str(tmp_path / "runs" / "a")) == "runs/a"
    assert comparison._relative_path("/elsewhere/a") == "/elsewhere/a"
    assert comparison._relative_path("s3://bucket/a") == "s3://bucket/a"


def test_a_folder_without_an_evaluation_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"evaluation\.json"):
        compare(tmp_path, METRICS, baselines=(), seconds=1.0)
