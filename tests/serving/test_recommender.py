"""The Python API against a dense fp64 reference that scores one history at a time, without packing or lookups."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.distributed.local_engine import LocalEngine
from cllm4rec_dist.errors import CheckpointError, ConfigError, DataError
from cllm4rec_dist.model.backbone import load_backbone
from cllm4rec_dist.serving.queries import Query
from cllm4rec_dist.serving.recommender import Recommender
from tests.conftest import RUNS

KNOWN, ITEMS = "user-008", 17
BASKET = ("item-003", "item-011", "item-000")
BOTH = pytest.mark.parametrize("name", list(RUNS))


class Dense:
    """Scores of every item after a history, in fp64, from the weights of a loaded run."""

    def __init__(self, recommender: Recommender) -> None:
        self.recommender, system = recommender, recommender._system
        self.system = system
        folder, config = Path(system.config.backbone), system.config
        self.decoder = LocalEngine(
            load_backbone(folder, config.adapter, torch.float64, config.seed), torch.device("cpu")
        )
        self.decoder.set_weights({name: w.double() for name, w in system.engine.weights().items()})
        self.decoder.train(False)
        model = system.recommender
        self.words = model.words.embedding.double()
        self.users, self.items = (
            t.local_rows.detach().double() for t in (model.collaborative.users, model.collaborative.items)
        )

    def history(self, items: list[int], user: int) -> list[int]:
        known = [] if user < 0 else self.system.corpus.history()[user].tolist()
        result: list[int] = []
        for item in [*known, *items]:
            if item not in result:
                result.append(item)
        return result

    def inputs(self, rows: Tensor) -> Tensor:
        """What the backbone reads for rows."""
        projection = self.system.recommender.input_projection
        return rows if projection is None else rows @ projection.detach().double()

    @torch.no_grad()
    def scores(self, items: list[int], user: int) -> Tensor:
        """[I] of a history that is complete."""
        config, space = self.system.config, self.system.prompts.space
        shown = items[-config.method.max_history :]
        documents = self.system.prompts.prediction(np.array([0]), Ragged.from_lists([shown]))
        row = user
        if user < 0:
            row = space.num_users - 1 if config.method.shared_user_ratio > 0 else -1
        person = torch.zeros(self.words.shape[1], dtype=torch.float64) if row < 0 else self.inputs(self.users[row])
        tokens = []
        for token in documents.tokens[0].tolist():
            if token < space.first_user:
                tokens.append(self.words[token])
            else:
                tokens.append(person if token < space.first_item else self.inputs(self.items[token - space.first_item]))
        hidden = self.decoder(torch.stack(tokens)[None], None, len(tokens))[0, -1]
        head, weight = self.system.recommender.head, self.items
        length = weight.shape[1] ** 0.5
        if head.projection is not None:
            hidden = hidden / hidden.square().mean().sqrt() @ head.projection.detach().double()
        if head.pool_residual and shown:
            hidden = hidden + length * F.normalize(self.items[shown].sum(0), dim=0)
        if head.log_temperature is not None:
            shortest = length / 2 if head.projection is not None else 0.0
            hidden = hidden / hidden.norm().clamp_min(shortest) / head.log_temperature.detach().double().exp()
            weight = F.normalize(weight, dim=1)
        bias = 0.0 if head.local_bias is None else head.local_bias.detach().double()[:, 0]
        return weight @ hidden + bias + self.linear(items)

    def linear(self, items: list[int]) -> Tensor:
        """Scores of the linear memory after a history, times its weight: [I]."""
        memory = self.system.linear
        neighbors, weights = memory.rows()
        in_history = torch.isin(neighbors, torch.tensor(items, dtype=torch.int32))
        return memory.weight * (weights.double() * in_history).sum(dim=1)


def rows(recommender: Recommender, items: Any) -> list[int]:
    return [recommender.items.row_of[item] for item in items if item in recommender.items.row_of]


@pytest.fixture(scope="module")
def dense(recommenders: dict[str, Recommender]) -> dict[str, Dense]:
    return {name: Dense(recommender) for name, recommender in recommenders.items()}


PEOPLE: dict[str, tuple[tuple[str, ...], str | None]] = {
    "a known user": ((), KNOWN),
    "a known user with later orders": (("item-005", "item-003"), KNOWN),
    "a basket": (BASKET, None),
    "repeated and unknown items": (("item-003", "nothing", "item-011", "item-003", "item-000"), None),
    "a long history": (tuple(f"item-{i:03d}" for i in range(12)), None),
}


@BOTH
@pytest.mark.parametrize("who", list(PEOPLE))
def test_scores_and_lists_equal_the_dense_reference(
    recommenders: dict[str, Recommender], dense: dict[str, Dense], name: str, who: str
) -> None:
    recommender, reference = recommenders[name], dense[name]
    history, user = PEOPLE[who]
    row = -1 if user is None else recommender.users.index(user)
    items = reference.history(rows(recommender, history), row)
    expected = reference.scores(items, row)
    result = recommender.score(list(history), recommender.items.ids, user)
    assert result.index.tolist() == list(recommender.items.ids)
    np.testing.assert_allclose(result.to_numpy(), expected.numpy(), atol=2e-5)

    (answer,) = recommender.answer([Query(history, user, top=50)])
    order = [i for i in expected.argsort(descending=True).tolist() if i not in items]
    assert [entry.item for entry in answer.items] == [recommender.items.ids[i] for i in order]
    np.testing.assert_allclose([entry.score for entry in answer.items], expected[order].numpy(), atol=2e-5)
    assert (answer.fallback, answer.known_user) == (False, user is not None)
    assert answer.unknown_items == tuple(item for item in history if item == "nothing")


@BOTH
def test_explanations_are_differences_of_dense_scores(
    recommenders: dict[str, Recommender], dense: dict[str, Dense], name: str
) -> None:
    recommender, reference = recommenders[name], dense[name]
    for history, user in (PEOPLE["repeated and unknown items"], PEOPLE["a known user with later orders"]):
        row = -1 if user is None else recommender.users.index(user)
        items = reference.history(rows(recommender, history), row)
        result = recommender.explain(history, "item-007", user)
        assert result["contribution"].is_monotonic_decreasing
        assert sorted(result["item"]) == sorted(recommender.items.ids[i] for i in items)
        whole = reference.scores(items, row)[7]
        for item, title, contribution in result.itertuples(index=False):
            row_of_item = recommender.items.row_of[item]
            without = reference.scores([i for i in items if i != row_of_item], row)[7]
            assert contribution == pytest.approx(float(whole - without), abs=3e-5)
            assert title == recommender.items.titles[row_of_item]


def test_contributions_to_several_items_are_those_of_each(recommender: Recommender) -> None:
    both = recommender.contributions(BASKET, ["item-007", "item-001"])
    assert both.index.tolist() == list(BASKET)
    for item in ("item-007", "item-001"):
        one = recommender.explain(BASKET, item).set_index("item")["contribution"]
        np.testing.assert_allclose(both[item].loc[one.index], one, atol=1e-6)


def test_items_whose_ids_are_names_of_columns_are_explained(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {"item-003": "item", "item-011": "title", "item-000": "contribution", "item-007": "index"}
    expected = recommender.explain(BASKET, "item-007")
    ids = [names.get(name, name) for name in recommender.items.ids]
    row_of = {name: row for row, name in enumerate(ids)}
    monkeypatch.setattr(recommender, "items", replace(recommender.items, ids=ids))
    for item in names.values():
        history = [names[other] for other in BASKET]
        result = recommender.explain(history, item)
        assert result.columns.tolist() == ["item", "title", "contribution"]
        assert sorted(result["item"]) == sorted(history)
        assert result["title"].tolist() == [recommender.items.titles[row_of[name]] for name in result["item"]]
    result = recommender.explain(history, "index")
    assert result["item"].tolist() == [names[name] for name in expected["item"]]
    np.testing.assert_allclose(result["contribution"], expected["contribution"], atol=1e-6)


def test_answers_do_not_depend_on_what_else_is_asked(recommender: Recommender) -> None:
    queries = [Query(history[:n], user, top=n + 1) for history, user in PEOPLE.values() for n in range(4)]
    queries += [Query(BASKET, only=frozenset(["item-001", "item-002"])), Query(BASKET, exclude=frozenset(["item-001"]))]
    together = recommender.answer(queries)
    for query, answer in zip(queries, together, strict=True):
        (alone,) = recommender.answer([query])
        assert [entry.item for entry in alone.items] == [entry.item for entry in answer.items]
        if not answer.fallback:
            scores = [[entry.score for entry in each.items] for each in (alone, answer)]
            np.testing.assert_allclose(scores[0], scores[1], atol=1e-5)


def test_lists_are_in_the_order_given(recommender: Recommender) -> None:
    users = ["user-012", "user-003", "user-012"]
    result = recommender.recommend(users=users, top=2)
    assert result.columns.tolist() == ["user", "item", "title", "rank", "score"]
    assert result["user"].tolist() == [user for user in users for _ in range(2)]
    assert result["rank"].tolist() == [1, 2] * 3
    named = recommender.recommend(histories={"Ann": BASKET, "Bo": BASKET[:1]}, top=1)
    assert named["user"].tolist() == ["Ann", "Bo"]
    numbered = recommender.recommend(histories=[BASKET, BASKET[:1]], top=1)
    assert numbered["user"].tolist() == [0, 1]
    assert numbered["item"].tolist() == named["item"].tolist()
    series = recommender.recommend(histories=[pd.Series(BASKET), np.array(BASKET[:1])], top=1)
    assert series["item"].tolist() == named["item"].tolist()
    assert recommender.recommend(users=[]).empty


def test_what_is_excluded_is_not_listed_and_only_that_of_a_category_is(
    recommender: Recommender, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recommender.recommend(histories=[BASKET], top=50)
    assert len(whole) == ITEMS - len(BASKET)
    sold_out = whole["item"][:3].tolist()
    for many in (1000, 2):  # masked query by query, or cut out of the catalog
        monkeypatch.setattr("cllm4rec_dist.serving.recommender._MAX_MASKED", many)
        left = recommender.recommend(histories=[BASKET], top=50, exclude=[*sold_out, "nothing"])
        assert left["item"].tolist() == whole["item"][3:].tolist()
    category = ["nothing", *whole["item"][5:9], BASKET[0]]
    some = recommender.recommend(histories=[BASKET], only=category)
    assert some["item"].tolist() == whole["item"][5:9].tolist()
    np.testing.assert_allclose(some["score"], whole["score"][5:9], atol=1e-5)
    assert recommender.recommend(histories=[BASKET], only=["nothing"]).empty
    assert recommender.recommend(histories=[BASKET], only=[]).empty
    middle = float(whole["score"][4])
    assert len(recommender.recommend(histories=[BASKET], top=50, min_score=middle)) == 5
    seen = recommender.recommend(histories=[BASKET], top=50, include_seen=True)
    assert len(seen) == ITEMS
    assert set(BASKET) <= set(seen["item"])


def test_nothing_known_of_a_history_lists_popular_items_and_says_so(
    recommender: Recommender, caplog: pytest.LogCaptureFixture
) -> None:
    popular = [recommender.items.ids[row] for row in np.argsort(-recommender.items.popularity, kind="stable")]
    with caplog.at_level(logging.WARNING, "cllm4rec_dist"):
        logging.getLogger("cllm4rec_dist").propagate = True
        result = recommender.recommend(histories=[[], ["nothing", "nobody"], BASKET], top=3, exclude=popular[:1])
    assert "2 of 3 histories have no known item: popular items" in caplog.text
    assert "2 items of 1 histories are unknown" in caplog.text
    assert result["item"][:6].tolist() == popular[1:4] * 2
    assert result["score"].isna().tolist() == [True] * 6 + [False] * 3
    (answer,) = recommender.answer([Query(("nothing",), top=2)])
    assert answer.fallback
    assert [entry.score for entry in answer.items] == [None, None]
    assert recommender.recommend(histories=[[]], min_score=0.0).empty


def test_neighbours_are_those_of_the_cosine(recommender: Recommender) -> None:
    rows = recommender.item_embeddings()
    assert rows.shape == (ITEMS, 16)
    assert rows.index.tolist() == list(recommender.items.ids)
    assert recommender.user_embeddings().shape == (23, 16)
    unit = rows.to_numpy(np.float64) / np.linalg.norm(rows.to_numpy(np.float64), axis=1, keepdims=True)
    cosines = unit @ unit[4]
    order = [i for i in np.argsort(-cosines) if i != 4]
    result = recommender.similar("item-004", top=99)
    assert result["item"].tolist() == [recommender.items.ids[i] for i in order]
    assert result["rank"].tolist() == list(range(1, ITEMS))
    np.testing.assert_allclose(result["score"], cosines[order], atol=1e-6)


def test_a_recommender_shows_its_run_and_size(recommender: Recommender) -> None:
    checkpoint = recommender.info.checkpoint
    assert checkpoint.startswith("best-")
    assert repr(recommender) == (
        f"Recommender(run={recommender.info.run!r}, checkpoint={checkpoint!r}, num_users=23, num_items={ITEMS})"
    )


def test_embeddings_have_a_row_for_each_user_and_none_for_the_shared_one(recommenders: dict[str, Recommender]) -> None:
    assert len(recommenders["cosine"].user_embeddings()) == 23


WRONG: list[tuple[dict[str, Any], str]] = [
    ({}, "users, histories: 'neither'"),
    ({"users": ["user-001"], "histories": [BASKET]}, "users, histories: 'both'"),
    ({"users": "user-001"}, r"users: 'user-001' is one text.*Write \['user-001'\]"),
    ({"users": [1]}, r"users\[0\]: 1 is not a text. Ids are texts: give '1'"),
    ({"users": [float("nan")]}, r"users\[0\]: nan is not a text"),
    ({"users": [None]}, r"users\[0\]: None is not a text"),
    ({"users": 7}, "users: 7 is not a list"),
    ({"users": ["user-8"]}, "is not a user of the run. Did you mean user-008"),
    ({"histories": ["a", "b"]}, r"\['a', 'b'\] is one history, not a list of them. Write \[\['a', 'b'\]\]\."),
    ({"histories": list("abcde")}, r"is one history, .* Write \[\['a', 'b', 'c', \.\.\.\]\]\."),
    ({"histories": "item-001"}, r"'item-001' is one history, .* Write \[\['item-001'\]\]\."),
    ({"histories": [["item-001"], "item-002"]}, r"histories\[1\]: 'item-002' is one text"),
    ({"histories": [{"item-001"}]}, r"histories\[0\]: 'set' has no order"),
    ({"histories": [["item-001", 2.0]]}, r"histories\[0\]\[1\]: 2.0 is not a text. Ids are texts: give '2'"),
    ({"histories": {1: BASKET}}, "histories: name: 1 is not a text"),
    ({"histories": [BASKET], "top": 0}, "top: 0 must be a whole number"),
    ({"histories": [BASKET], "top": 2.5}, "top: 2.5 must be a whole number"),
    ({"histories": [BASKET], "top": True}, "top: True must be a whole number"),
    ({"histories": [BASKET], "top": None}, "top: None must be"),
    ({"histories": [BASKET], "exclude": "item-001"}, "exclude: 'item-001' is one text"),
    ({"histories": [BASKET], "only": [3]}, "only: element: 3 is not a text"),
    ({"histories": [BASKET], "min_score": "high"}, "min_score: 'high' must be a number"),
    ({"histories": [BASKET], "min_score": float("nan")}, "min_score: nan must be a number"),
]


@pytest.mark.parametrize(("given", "message"), WRONG, ids=[message for _, message in WRONG])
def test_wrong_input_is_one_clear_message(recommender: Recommender, given: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        recommender.recommend(**given)


def test_other_calls_check_their_input_too(recommender: Recommender) -> None:
    with pytest.raises(DataError, match=r"is not an item of the run\. Did you mean item-003"):
        recommender.similar("ITEM-003")
    with pytest.raises(DataError, match="item: 3 is not a text"):
        recommender.similar(3)  # type: ignore[arg-type]
    with pytest.raises(DataError, match="top: -1"):
        recommender.similar("item-003", top=-1)
    with pytest.raises(DataError, match="is not an item of the run"):
        recommender.explain(BASKET, "x")
    with pytest.raises(DataError, match="history: 'item-003' is one text"):
        recommender.explain("item-003", "item-001")
    with pytest.raises(DataError, match="items: 'item-003' is one text"):
        recommender.score([], "item-003")
    with pytest.raises(DataError, match="user: 'x' is not a user"):
        recommender.score([], ["item-003"], user="x")
    with pytest.raises(DataError, match="history"):
        Query(history=["item-001", None])  # type: ignore[arg-type]
    assert Query(history=["item-001"]).history == ("item-001",)  # type: ignore[arg-type]


def test_an_unknown_item_has_no_score(recommender: Recommender) -> None:
    result = recommender.score(BASKET, ["item-001", "nothing", "item-001"])
    assert result.isna().tolist() == [False, True, False]
    assert recommender.score([], []).empty
    assert len(recommender.score([], ["item-001"])) == 1


def test_info_says_what_is_loaded(recommender: Recommender, runs: dict[str, Path]) -> None:
    info = recommender.info
    assert (info.run, info.checkpoint, info.step, info.stage) == (str(runs["paper"]), "best-00000007", 7, "finetune")
    assert (info.best_metric, info.best_value, info.corpus) == ("recall@5", 0.25, "test")
    assert (info.num_users, info.num_items, info.has_categories) == (23, ITEMS, False)
    assert info.date.endswith("+00:00")
    assert 0 < info.num_trained < info.num_parameters


def test_a_project_folder_and_a_checkpoint_folder_will_do(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "shop/runs").mkdir(parents=True)
    for file in ("recipe.yaml", "finetune.yaml"):
        (tmp_path / "shop" / file).write_text("")
    (tmp_path / "shop/runs/finetune").symlink_to(runs["cosine"])
    for path in (tmp_path / "shop", runs["cosine"] / "checkpoints/best-00000007"):
        assert Recommender.load(path, device="cpu").info.checkpoint == "best-00000007"
    with pytest.raises(CheckpointError, match="neither a checkpoint nor a run"):
        Recommender.load(tmp_path)
    for device in ("cuda:9", "foo"):
        with pytest.raises(ConfigError, match=f"device: '{device}' is no device of this host"):
            Recommender.load(runs["cosine"], device=device)
