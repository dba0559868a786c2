"""Products given by their texts alone: as if the corpus had them, with the same weights."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import polars as pl
import pytest
import torch
from fastapi.testclient import TestClient
from typer.testing import CliRunner

from cllm4rec_dist.cli import app
from cllm4rec_dist.corpus.catalog import Catalog
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.evaluation.linear_tuning import init_linear_memory
from cllm4rec_dist.serving.live import LiveRecommender
from cllm4rec_dist.serving.queries import Query
from cllm4rec_dist.serving.recommender import Recommender
from cllm4rec_dist.serving.web import create_app
from tests.harness import make_backbone, make_catalog, make_corpus, make_run
from tests.serving.fake import options

TITLES = {"x-new-1": "quiet mountain kilim", "x-new-2": "blue espresso zanzibar"}
DESCRIPTIONS = {"x-new-2": "kilim kilim zanzibar"}
BASKET = ["item-003", "item-011", "item-000"]
BOTH = pytest.mark.parametrize("kind", ["paper", "mixed"])
SETTINGS: dict[str, dict[str, Any]] = {
    "paper": {"linear": {"neighbors": 0}, "head": {"item_bias": False, "projection": False, "pool_residual": False}},
    "mixed": {
        "linear_weight": 0.7,
        "linear": {"neighbors": 6, "regularization": 1.0},
        "head": {"similarity": "cosine", "item_bias": True, "pool_residual": True, "projection": True},
        "method": {"shared_user_ratio": 0.2, "max_history": 100},
    },
}


def with_new_items(catalog: Catalog) -> Catalog:
    """The catalog with the new products as its last items."""
    added = {
        "item_ids": list(TITLES),
        "item_titles": list(TITLES.values()),
        "item_descriptions": [DESCRIPTIONS.get(name, "") for name in TITLES],
    }
    series = {name: pl.concat([getattr(catalog, name), pl.Series(values)]) for name, values in added.items()}
    return dataclasses.replace(catalog, num_new_items=len(TITLES), **series)


@dataclasses.dataclass(frozen=True)
class Pair:
    inside: Recommender
    """The corpus has the new products."""
    outside: Recommender
    """It does not; the weights are the same."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Pair]:
    folder, catalog = tmp_path_factory.mktemp("new"), make_catalog()
    backbone = make_backbone(folder / "backbone", catalog)
    corpora = {
        "inside": make_corpus(folder / "inside", with_new_items(catalog), backbone),
        "outside": make_corpus(folder / "outside", catalog, backbone),
    }
    result = {}
    for kind, settings in SETTINGS.items():
        inside, outside = (
            Recommender.load(make_run(folder / f"{name}-{kind}", corpus, backbone, **settings), device="cpu")
            for name, corpus in corpora.items()
        )
        _copy_weights(inside, outside)
        result[kind] = Pair(inside, outside)
    return result


def _copy_weights(inside: Recommender, outside: Recommender) -> None:
    """Fit the linear memory inside, and give what is there to the other recommender, too."""
    given, taken = inside._system, outside._system
    num_items = taken.corpus.num_items
    with torch.no_grad():
        for (_, source, _), (_, target, _) in zip(
            given.recommender.sharded_parameters(), taken.recommender.sharded_parameters(), strict=True
        ):
            target.copy_(source[: len(target)])
        projections = given.recommender.head.projection, taken.recommender.head.projection
        if projections[0] is not None and projections[1] is not None:
            projections[1].copy_(projections[0])
        taken.engine.set_weights(given.engine.weights())  # type: ignore[attr-defined]
        if not given.linear.is_empty:
            init_linear_memory(given)  # type: ignore[arg-type]
            neighbors, weights = given.linear.rows()
            taken.linear.fill(neighbors[:num_items], weights[:num_items], given.linear.settings)
        outside._scorer._output_weight = taken.recommender.output_weight()


def grown(pair: Pair) -> Recommender:
    return pair.outside.with_items(TITLES, DESCRIPTIONS)


@BOTH
def test_scores_and_lists_are_those_of_a_corpus_that_has_the_product(pairs: dict[str, Pair], kind: str) -> None:
    pair = pairs[kind]
    inside, outside = pair.inside, grown(pair)
    assert outside.items.ids == list(inside.items.ids)
    queries = [
        Query(tuple(BASKET), top=50),
        Query((), "user-008", top=50),
        Query(("item-005",), "user-003", top=4, exclude=frozenset(["item-007", "x-new-1"])),
        Query(tuple(BASKET), top=3, only=frozenset(["x-new-2", "item-001", "x-new-1"])),
        Query(tuple(BASKET), top=3, only=frozenset(["x-new-2"])),
        Query((), "user-008", top=50, include_seen=True, min_score=0.1),
        Query(("nothing",), top=50),
    ]
    listed = set()
    for expected, answer in zip(inside.answer(queries), outside.answer(queries), strict=True):
        assert [entry.item for entry in answer.items] == [entry.item for entry in expected.items]
        assert [entry.title for entry in answer.items] == [entry.title for entry in expected.items]
        if expected.fallback:
            assert answer.fallback
        else:
            scores = [[entry.score for entry in each.items] for each in (answer, expected)]
            np.testing.assert_allclose(*scores, atol=2e-5)
        listed |= {entry.item for entry in answer.items}
    assert listed >= set(TITLES)
    score = outside.score(BASKET, outside.items.ids)
    np.testing.assert_allclose(score, inside.score(BASKET, inside.items.ids), atol=2e-5)
    assert len(set(score[list(TITLES)])) == 2


@BOTH
def test_the_linear_memory_of_a_product_is_that_of_a_corpus_that_has_it(pairs: dict[str, Pair], kind: str) -> None:
    inside, new = pairs[kind].inside._system.linear, grown(pairs[kind])._system.new_items
    assert new is not None
    if kind == "paper":
        assert new.linear.is_empty
        return
    neighbors, weights = new.linear.rows()
    expected_neighbors, expected_weights = inside.rows()
    assert neighbors.tolist() == expected_neighbors[-2:].tolist()
    assert (weights.abs().sum(dim=1) > 0).all()
    assert 18 in neighbors[0].tolist(), "new products are neighbors of each other"
    torch.testing.assert_close(weights, expected_weights[-2:])


@BOTH
def test_a_history_may_have_a_product_without_interactions(pairs: dict[str, Pair], kind: str) -> None:
    pair = pairs[kind]
    history = ["item-003", "x-new-2", "item-000"]
    for linear_weight in (0.0, pair.inside._system.linear.weight):
        inside, outside = pair.inside, grown(pair)
        # The linear memory of the corpus without the product does not have it among the neighbors of other items.
        names = inside.items.ids if linear_weight == 0.0 else list(TITLES)
        with pytest.MonkeyPatch.context() as patch:
            for recommender in (inside, outside):
                patch.setattr(recommender._system.linear, "weight", linear_weight)
            for items in (history, ["x-new-1"]):
                expected = inside.score(items, names)
                np.testing.assert_allclose(outside.score(items, names), expected, atol=2e-5)
    alone = outside.recommend(histories=[["x-new-1"]], top=5)
    assert "x-new-1" not in set(alone["item"])
    assert alone["score"].notna().all()


@BOTH
def test_explanations_of_and_by_new_products_are_differences_of_scores(pairs: dict[str, Pair], kind: str) -> None:
    outside = grown(pairs[kind])
    history = ["item-003", "x-new-1", "item-000"]
    for item in ("x-new-2", "item-007"):
        table = outside.explain(history, item)
        assert sorted(table["item"]) == sorted(history)
        whole = outside.score(history, [item])[item]
        for name, title, contribution in table.itertuples(index=False):
            without = outside.score([other for other in history if other != name], [item])[item]
            assert contribution == pytest.approx(whole - without, abs=3e-5)
            assert title == outside.items.titles[outside.items.row_of[name]]


@BOTH
def test_similar_items_and_embeddings_are_those_of_a_corpus_that_has_it(pairs: dict[str, Pair], kind: str) -> None:
    inside, outside = pairs[kind].inside, grown(pairs[kind])
    for item in ("x-new-1", "item-003"):
        expected, result = inside.similar(item, 50), outside.similar(item, 50)
        pd.testing.assert_frame_equal(result, expected, atol=2e-5)
        assert len(result) == 18
    pd.testing.assert_frame_equal(outside.item_embeddings(), inside.item_embeddings(), atol=1e-6)


def test_the_first_recommender_does_not_change_and_products_can_be_added_one_after_the_other(
    pairs: dict[str, Pair],
) -> None:
    pair = pairs["mixed"]
    before = pair.outside.score(BASKET, pair.outside.items.ids)
    first, second = ({name: TITLES[name]} for name in TITLES)
    outside = pair.outside.with_items(first).with_items(second, DESCRIPTIONS)
    np.testing.assert_allclose(
        outside.score(BASKET, outside.items.ids), pair.inside.score(BASKET, pair.inside.items.ids), atol=2e-5
    )
    assert "x-new-1" not in pair.outside.items.ids
    assert pair.outside.score(BASKET, pair.outside.items.ids).equals(before)
    assert pair.outside.with_items({}) is pair.outside


def test_threads_may_have_products_of_their_own(pairs: dict[str, Pair]) -> None:
    outside = pairs["mixed"].outside
    titles = [{f"n{index}": title} for index, title in enumerate(["quiet trail", "blue tea", "mountain"] * 4)]
    expected = [outside.with_items(title).recommend(histories=[BASKET], top=30) for title in titles]
    with ThreadPoolExecutor(4) as pool:
        results = pool.map(lambda title: outside.with_items(title).recommend(histories=[BASKET], top=30), titles)
    for one, other in zip(results, expected, strict=True):
        pd.testing.assert_frame_equal(one, other, atol=1e-6)


def test_the_service_answers_with_the_scores_of_the_python_api(pairs: dict[str, Pair]) -> None:
    outside, expected = pairs["mixed"].outside, grown(pairs["mixed"])
    live = LiveRecommender(lambda path: outside, lambda: ("run", "as committed"), "run")
    new_items = [{"item": name, "title": TITLES[name], "description": DESCRIPTIONS.get(name, "")} for name in TITLES]
    history = [*BASKET, "x-new-1"]
    request = {"history": history, "top": 20, "new_items": new_items, "explain": True}
    with TestClient(create_app(live, options())) as client:
        answer = client.post("/recommend", json=request).json()
        similar = client.post("/similar", json={"item": "x-new-1", "top": 3, "new_items": new_items}).json()
        plain = client.post("/recommend", json={"history": BASKET, "top": 20}).json()
        unknown = client.post("/recommend", json={"new_items": [{"item": "n", "title": "zanzibar"}]})
    table = expected.recommend(histories=[history], top=20)
    assert [entry["item"] for entry in answer["items"]] == table["item"].tolist()
    np.testing.assert_allclose([entry["score"] for entry in answer["items"]], table["score"], atol=2e-5)
    for entry in answer["items"][:3]:
        reasons = expected.explain(history, entry["item"]).set_index("item")["contribution"]
        given = {why["item"]: why["contribution"] for why in entry["because"]}
        np.testing.assert_allclose(pd.Series(given)[reasons.index], reasons, atol=3e-5)
    assert [entry["item"] for entry in similar["items"]] == expected.similar("x-new-1", 3)["item"].tolist()
    assert not {entry["item"] for entry in plain["items"]} & set(TITLES)
    assert unknown.status_code == 422
    assert unknown.json()["errors"][0]["constraint"].startswith('"zanzibar" has no word')


def test_a_request_leaves_nothing_behind(pairs: dict[str, Pair]) -> None:
    extended = grown(pairs["mixed"])
    extended.recommend(histories=[BASKET])
    references = [weakref.ref(extended), weakref.ref(extended._system.new_items)]
    del extended
    gc.collect()
    assert [reference() for reference in references] == [None, None]


@pytest.mark.parametrize(
    ("new_items", "descriptions", "message"),
    [
        ({"item-003": "blue tea"}, None, "new_items: 'item-003' is an item of the run already"),
        ({"n": " "}, None, "new_items: 'n' has no text"),
        ({"n": ""}, {"n": "\n"}, "new_items: 'n' has no text"),
        ({"n": "???"}, None, "has no word that a trained item's title or description has"),
        ({"n": "zanzibar"}, None, "new_items: text of 'n': 'zanzibar' has no word"),
        ({"n": 3}, None, "is not a text"),
        ({" ": "blue"}, None, "new_items: ' ' is an empty id"),
        ({3: "blue"}, None, "new_items: id: 3 is not a text"),
        (["blue"], None, "is no mapping from ids to texts"),
        ({"n": "blue"}, {"m": "tea"}, "descriptions: 'm' is not in new_items"),
    ],
)
def test_what_cannot_be_added_is_refused_by_name(
    pairs: dict[str, Pair], new_items: Any, descriptions: Any, message: str
) -> None:
    with pytest.raises(DataError, match=message.replace("?", r"\?")):
        pairs["paper"].outside.with_items(new_items, descriptions)


def test_a_product_that_was_added_is_known(pairs: dict[str, Pair]) -> None:
    with pytest.raises(DataError, match="new_items: 'x-new-1' is an item of the run already"):
        grown(pairs["paper"]).with_items({"x-new-1": "blue"})


def test_a_corpus_without_texts_is_refused_and_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    catalog = make_catalog()
    backbone = make_backbone(tmp_path / "backbone", catalog)
    bare = dataclasses.replace(catalog, item_titles=pl.Series([""] * catalog.num_items))
    run = make_run(tmp_path / "run", make_corpus(tmp_path / "corpus", bare, backbone), backbone)
    with pytest.raises(DataError, match="has no item with words in its title or description"):
        Recommender.load(run, device="cpu").with_items({"n": "blue tea"})
    caplog.set_level("INFO", "cllm4rec_dist")
    recommender = Recommender.load(run, device="cpu")
    live = LiveRecommender(lambda path: recommender, lambda: ("run", "as committed"), "run")
    assert "requests cannot have new items" in caplog.text
    with TestClient(create_app(live, options())) as client:
        assert client.post("/recommend", json={"history": ["item-003"]}).status_code == 200
        response = client.post("/recommend", json={"new_items": [{"item": "n", "title": "blue tea"}]})
    assert response.status_code == 422
    assert "has no item with words in its title or description" in response.json()["detail"]
    new = tmp_path / "new.csv"
    new.write_text("item,title\nn,blue tea\n")
    monkeypatch.setattr(Recommender, "load", lambda *args, **options: pytest.fail("read the model"))
    with pytest.raises(DataError, match="--new-items: 'n' cannot be added: no item of the run has a title"):
        CliRunner().invoke(
            app, ["recommend", str(run), "--basket", "item-003", "--new-items", str(new)], catch_exceptions=False
        )
