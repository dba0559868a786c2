"""The demo's table has new customers and new products, beside baselines on the same candidates."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path

import pytest

from cllm4rec_dist.config import RunConfig, load_config
from cllm4rec_dist.corpus.catalog import build_catalog
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.corpus.sources import read_source
from cllm4rec_dist.evaluation.baseline_config import BaselineConfig
from cllm4rec_dist.evaluation.comparison import compare
from cllm4rec_dist.evaluation.inference import evaluate_run
from tests.harness import alone, make_backbone, make_corpus, make_run

ROOT = Path(__file__).parents[2]
METRICS = ["recall@20", "recall@40", "ndcg@100"]
SMALL = ["source.num_users=200", "source.num_items=120", "source.num_clusters=4"]
GROUPS = [
    "All users",
    "Known users",
    "New users",
    "Warm items, ranked among all items",
    "Warm items, ranked among warm items",
    "Cold items, ranked among all items",
    "Cold items, ranked among cold items",
]


@pytest.mark.slow
def test_new_customers_and_new_products_have_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_config(PrepareConfig, ROOT / "shards/demo.yaml", SMALL)
    catalog = build_catalog(read_source(recipe.source), recipe)
    backbone = make_backbone(tmp_path / "backbone", catalog)
    corpus = make_corpus(tmp_path / "corpus", catalog, backbone, **recipe.preparation().model_dump())
    run = str(make_run(tmp_path / "run", corpus, backbone, linear_weight=2.0))
    one_point = {"title_ease_lambdas": (10.0,), "title_ease_alphas": (3.0,)}
    monkeypatch.setattr("cllm4rec_dist.evaluation.comparison.BaselineConfig", partial(BaselineConfig, **one_point))
    evaluate_run(alone(), lambda metrics: None, run, "test", METRICS, 64, str(tmp_path / "out"), baselines=True)
    table = compare(tmp_path / "out", METRICS, baselines=("popularity", "title_ease"), seconds=1.0)
    headings = [line.rsplit(" (", 1)[0].strip("*") for line in table.splitlines() if line.startswith("**")]
    assert headings == GROUPS
    for heading in GROUPS:
        part = table.split(f"**{heading}**")[1].split("\n**")[0]
        names = [line.split(" | ")[0].strip("| ") for line in part.splitlines() if line.startswith("| ")][2:]
        parts = ["CLLM4Rec", "CLLM4Rec (LLM alone)", "Linear memory alone"]
        expected = [*parts, "Popularity", "EASE + titles"]
        assert names == expected + ["Text neighbours"] * ("ranked" in heading)
        values = {
            line.split(" | ")[0].strip("| "): line.split(" | ", 1)[1] for line in part.splitlines() if " | " in line
        }
        assert len({values[name] for name in parts}) == 3


def test_warm_up_ends_before_the_first_validation() -> None:
    """Else the first epochs change next to nothing, and chance decides which of them is the best."""
    recipe = load_config(PrepareConfig, ROOT / "shards/demo.yaml", [])
    num_users = build_catalog(read_source(recipe.source), recipe).num_users
    for stage in ("pretrain", "finetune"):
        config = load_config(RunConfig, ROOT / f"launch/configs/demo-{stage}.yaml", [f"stage={stage}"])
        steps = math.ceil(num_users / config.batch.users)
        assert config.optimizer.warmup_steps <= steps * (config.epochs if stage == "pretrain" else 1)
