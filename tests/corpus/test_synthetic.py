"""Synthetic data is deterministic and learnable."""

from __future__ import annotations

import numpy as np
import polars.testing

from cllm4rec_dist.corpus.catalog import build_catalog
from cllm4rec_dist.corpus.recipe import SyntheticSource
from cllm4rec_dist.corpus.synthetic import generate
from tests.corpus.samples import interactions, recipe


def test_same_seed_same_data() -> None:
    config = SyntheticSource(
        format="synthetic", num_users=50, num_items=40, num_clusters=5, mean_interactions=8, seed=3
    )
    one, two = generate(config), generate(config)
    for name in ("interactions", "items", "users"):
        polars.testing.assert_frame_equal(getattr(one, name), getattr(two, name))
    assert list(one.reviews) == list(two.reviews)
    other = generate(config.model_copy(update={"seed": 4}))
    assert not one.interactions["item"].equals(other.interactions["item"])


def test_shape_and_scripts() -> None:
    raw = generate(SyntheticSource(format="synthetic", num_users=120, num_items=110, mean_interactions=10))
    table = interactions(raw)
    assert table["user"].nunique() == 120
    assert not table.duplicated(["user", "item"]).any()
    assert table.groupby("user").size().min() >= 5
    assert 8 < table.groupby("user").size().mean() < 12
    assert {"用户-12", "пользователь-37"} <= set(raw.users["user"])
    assert {"товар-12", "商品-37"} <= set(raw.items["item"])
    assert (table["text"] != "").all()


def test_fewest_items() -> None:
    raw = generate(SyntheticSource(format="synthetic", num_users=3, num_items=5, num_clusters=1))
    assert interactions(raw).groupby("user").size().tolist() == [5, 5, 5]


def test_history_says_more_than_popularity() -> None:
    source = {"format": "synthetic", "num_users": 400, "num_items": 240}
    config = recipe(source=source)
    catalog = build_catalog(generate(config.source), config)  # type: ignore[arg-type]
    seen = np.zeros((catalog.num_users, catalog.num_items), dtype=np.float32)
    seen[catalog.train.rows, catalog.train.values] = 1
    # EASE (Steck, 2019).
    gram = seen.T @ seen
    inverse = np.linalg.inv(gram + 20 * np.eye(len(gram)))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)

    def recall(scores: np.ndarray) -> float:
        top = np.argsort(-np.where(seen > 0, -np.inf, scores))[:, :20]
        hits = [np.isin(items, row).mean() for items, row in zip(catalog.test, top, strict=True) if len(items)]
        return float(np.mean(hits))

    popular = recall(np.broadcast_to(seen.sum(0), seen.shape))
    assert recall(seen @ weights) > 2 * popular
