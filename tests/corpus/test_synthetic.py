"""The synthetic shop: the same for a seed, and with the properties that docs/synthetic-shop.md promises."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import polars.testing
import pytest

from cllm4rec_dist.config import load_config
from cllm4rec_dist.corpus.catalog import build_catalog
from cllm4rec_dist.corpus.raw import RawData
from cllm4rec_dist.corpus.recipe import PrepareConfig, SyntheticSource
from cllm4rec_dist.corpus.synthetic import generate
from cllm4rec_dist.corpus.synthetic_texts import BRANDS, DEPARTMENTS, QUALITIES
from tests.corpus.samples import interactions, recipe

DEMO = Path(__file__).parents[2] / "shards/demo.yaml"
NAMES = {
    name: (department, kind)
    for department, kinds in enumerate(DEPARTMENTS.values())
    for kind, names in enumerate(kinds)
    for name in names.split("/")
}
"""Name of a product type -> department and type."""


def kind_of(title: str) -> tuple[int, int]:
    """Department and type of a product, by the longest name that its title ends with."""
    return NAMES[max((name for name in NAMES if title.endswith(name)), key=len)]


@pytest.fixture(scope="module")
def demo() -> PrepareConfig:
    return load_config(PrepareConfig, DEMO, [])


@pytest.fixture(scope="module")
def raw(demo: PrepareConfig) -> RawData:
    assert isinstance(demo.source, SyntheticSource)
    return generate(demo.source)


@pytest.fixture(scope="module")
def bought(raw: RawData) -> pd.DataFrame:
    """Interactions in time order for each user, with department and type of the item."""
    table = interactions(raw).sort_values(["user", "timestamp"], kind="stable")
    kinds = {item: kind_of(title) for item, title in raw.items.select("item", "title").iter_rows()}
    table["department"] = table["item"].map(lambda item: kinds[item][0])
    table["kind"] = table["item"].map(lambda item: kinds[item][1])
    return table


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


def test_popularity_and_histories_have_long_tails(bought: pd.DataFrame) -> None:
    counts = bought.groupby("item").size().sort_values(ascending=False)
    assert 0.2 < counts.iloc[: len(counts) // 10].sum() / counts.sum() < 0.5
    lengths = bought.groupby("user").size()
    assert lengths.median() < lengths.mean()
    assert lengths.max() > 3 * lengths.mean()


def test_customers_buy_what_they_are_interested_in_but_for_a_few_gifts(raw: RawData, bought: pd.DataFrame) -> None:
    departments, inside = [*DEPARTMENTS], []
    profiles = dict(raw.users.select("user", "text").iter_rows())
    for user, department in bought[["user", "department"]].itertuples(index=False):
        interests = profiles[user].removeprefix("Interested in ").split(".")[0].split(" and ")
        inside.append(departments[department] in interests)
    assert 0.8 < np.mean(inside) < 0.95


def test_customers_prefer_products_with_the_qualities_that_they_like(raw: RawData, bought: pd.DataFrame) -> None:
    quality_of = {word: index for index, (words, _) in enumerate(QUALITIES) for word in words}
    profiles = dict(raw.users.select("user", "text").iter_rows())
    named = {
        item: {quality_of[word] for word in title.split() if word in quality_of}
        for item, title in raw.items.select("item", "title").iter_rows()
    }
    hits = []
    for user, item in bought[["user", "item"]].itertuples(index=False):
        liked = {quality_of[word] for word in profiles[user].replace(",", "").split() if word in quality_of}
        hits += [bool(named[item] & liked)] if named[item] else []
    assert np.mean(hits) > 1.3 * 2 / len(QUALITIES), "a product's quality is one of two liked ones out of eight"


def test_a_purchase_is_followed_by_what_goes_with_it(bought: pd.DataFrame) -> None:
    """The next purchase in a department is more often of the next type than of the one before."""
    steps: Counter[int] = Counter()
    for _, history in bought.groupby(["user", "department"]):
        kinds = history["kind"].tolist()
        steps.update(after - before for before, after in pairwise(kinds))
    assert steps[1] > 1.2 * steps[-1]
    assert steps[0] < steps[1], "few buy a second one of a type"


def test_texts_say_the_same_in_different_words(raw: RawData) -> None:
    titles, spellings = raw.items["title"].to_list(), defaultdict(set)
    for title in titles:
        assert title.split()[0] in BRANDS
        spellings[kind_of(title)].add(max((name for name in NAMES if title.endswith(name)), key=len))
    assert np.mean([len(names) > 1 for names in spellings.values()]) > 0.5
    assert len(set(titles)) > 0.95 * len(titles)
    descriptions = raw.items["description"]
    assert 0.05 < descriptions.is_null().mean() < 0.15
    assert len(set(descriptions)) > 0.95 * descriptions.count()
    words = [set(f"{t} {d or ''}".lower().split()) for t, d in zip(titles, descriptions, strict=True)]
    for wordings, _ in QUALITIES:
        assert all(sum(word in of_item for of_item in words) > 5 for word in wordings)


def test_the_demo_holds_out_products_and_customers(raw: RawData, demo: PrepareConfig) -> None:
    catalog = build_catalog(raw, demo)
    is_cold = np.bincount(catalog.train.values, minlength=catalog.num_items) == 0
    assert 50 < is_cold.sum() < 150
    assert is_cold[catalog.test.values].any()
    assert (catalog.new_users.test.lengths > 0).sum() > 100


def test_history_says_more_than_popularity() -> None:
    source = {"format": "synthetic", "num_users": 800, "num_items": 240, "mean_interactions": 12}
    config = recipe(source=source)
    catalog = build_catalog(generate(config.source), config)  # type: ignore[arg-type]
    seen = np.zeros((catalog.num_users, catalog.num_items), dtype=np.float32)
    seen[catalog.train.rows, catalog.train.values] = 1
    # EASE (Steck, 2019).
    gram = seen.T @ seen
    inverse = np.linalg.inv(gram + 100 * np.eye(len(gram)))
    weights = -inverse / np.diag(inverse)
    np.fill_diagonal(weights, 0)

    def recall(scores: np.ndarray) -> float:
        top = np.argsort(-np.where(seen > 0, -np.inf, scores))[:, :20]
        hits = [np.isin(items, row).mean() for items, row in zip(catalog.test, top, strict=True) if len(items)]
        return float(np.mean(hits))

    popular = recall(np.broadcast_to(seen.sum(0), seen.shape))
    assert recall(seen @ weights) > 2 * popular
