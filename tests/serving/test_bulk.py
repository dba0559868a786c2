"""Lists for many people: those of the Python API, in order, whatever the number of ranks."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.evaluation import topk
from cllm4rec_dist.serving.bulk import BulkRequest, recommend_users
from cllm4rec_dist.serving.new_items import NewItem
from cllm4rec_dist.serving.queries import Query
from cllm4rec_dist.serving.recommender import Recommender
from tests.harness import alone, make_catalog, run_ranks

ORDERS = {
    "Zoe": ("item-003", "?", "item-011", "item-003"),
    "user-008": ("item-005", "item-000"),
    "Al": ("?",),
    "user-003": (),
    "Bo": ("item-000", "item-001", "item-002", "item-004", "item-006"),
}


def write(world: World, run: str, request: BulkRequest, output: str) -> None:
    recommend_users(world, lambda metrics: None, run, request, output)


def written(folder: Path) -> pd.DataFrame:
    """The lists of all files, by rank."""
    return pd.concat([pd.read_parquet(path) for path in sorted(folder.iterdir())], ignore_index=True)


def said(caplog: pytest.LogCaptureFixture, run: Path, request: BulkRequest, output: Path) -> str:
    """The closing line."""
    logging.getLogger("cllm4rec_dist").propagate = True
    caplog.clear()
    with caplog.at_level(logging.INFO, "cllm4rec_dist"):
        write(alone(), str(run), request, str(output))
    return caplog.messages[-1]


def test_lists_are_those_of_the_python_api(
    runs: dict[str, Path], recommenders: dict[str, Recommender], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recommender = recommenders["cosine"]
    request = BulkRequest(
        top=4, orders=ORDERS, titles=True, exclude=frozenset(["item-007", "!"]), min_score=None, batch_users=2
    )
    line = said(caplog, runs["cosine"], request, tmp_path / "out")
    result = written(tmp_path / "out")
    assert result.columns.tolist() == ["user", "item", "title", "rank", "score"]
    assert result["user"].drop_duplicates().tolist() == list(ORDERS)
    for name, items in ORDERS.items():
        user = name if name.startswith("user") else None
        (answer,) = recommender.answer([Query(items, user, top=4, exclude=request.exclude)])
        rows = result[result["user"] == name]
        assert rows["item"].tolist() == [entry.item for entry in answer.items]
        assert rows["title"].tolist() == [entry.title for entry in answer.items]
        expected = [np.nan if entry.score is None else entry.score for entry in answer.items]
        np.testing.assert_allclose(rows["score"], expected, atol=1e-5)
        assert rows["rank"].tolist() == list(range(1, 5))
    assert line == (
        f"{tmp_path / 'out'}: 5 users, 20 rows; 1 user without a known item (popular items, without a score);"
        " 2 ordered items unknown to the run and left out"
    )


def test_the_closing_line_counts_what_is_short_or_left_out(
    runs: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    request = BulkRequest(
        top=9, users=["user-001", "nobody", "x"], only=frozenset(["item-000", "item-001", "item-002"])
    )
    with pytest.raises(DataError, match="are not users of the run"):
        write(alone(), str(runs["paper"]), request, str(tmp_path / "out"))
    line = said(caplog, runs["paper"], replace(request, skip_unknown_users=True), tmp_path / "out")
    assert line.endswith("1 user with fewer than 9 items; 2 unknown users left out, such as 'nobody'")
    assert said(caplog, runs["paper"], BulkRequest(top=9, users=[]), tmp_path / "out").endswith("out: 0 users, 0 rows")
    assert written(tmp_path / "out").empty
    nothing = BulkRequest(top=9, only=frozenset(["?"]))
    assert "23 users, 0 rows; 23 users with fewer" in said(caplog, runs["paper"], nothing, tmp_path / "out")


def test_a_lowest_score_leaves_out_what_is_below_and_popular_items(runs: dict[str, Path], tmp_path: Path) -> None:
    request = BulkRequest(top=17, orders=ORDERS)
    write(alone(), str(runs["paper"]), request, str(tmp_path / "all"))
    write(alone(), str(runs["paper"]), replace(request, min_score=1.0), str(tmp_path / "some"))
    everything = written(tmp_path / "all")
    assert everything["score"].isna().sum() == 17
    assert written(tmp_path / "some").equals(everything[everything["score"] >= 1.0].reset_index(drop=True))


def test_what_a_user_has_is_in_the_prompt_and_left_out_of_the_list(runs: dict[str, Path], tmp_path: Path) -> None:
    catalog = make_catalog()
    kept = {"train": (catalog.train,), "all": (catalog.train, catalog.valid, catalog.test)}
    scores = {}
    for known, splits in kept.items():
        for include_seen in (False, True):
            request = BulkRequest(top=17, known_items=known, include_seen=include_seen)  # type: ignore[arg-type]
            write(alone(), str(runs["cosine"]), request, str(tmp_path / f"{known}-{include_seen}"))
            result = written(tmp_path / f"{known}-{include_seen}")
            scores[known, include_seen] = {(u, i): s for u, i, _, s in result.itertuples(index=False)}
            for user, name in enumerate(catalog.user_ids):
                rows = result[result["user"] == name]
                seen = {catalog.item_ids[int(i)] for split in splits for i in split[user]}
                assert set(rows["item"]) == set(catalog.item_ids) - (set() if include_seen else seen)
                assert rows["rank"].tolist() == list(range(1, len(rows) + 1))
                assert rows["score"].is_monotonic_decreasing
        # What is left out changes no score of the rest.
        rest = scores[known, False]
        assert rest == pytest.approx({pair: scores[known, True][pair] for pair in rest}, rel=1e-5)
    # The prompt ends with the held-out items: with room for few items, other ones than before.
    one, other = scores["all", True], scores["train", True]
    assert sum(abs(one[pair] - other[pair]) > 1e-4 for pair in one) > len(one) / 2


def test_windows_and_batches_change_nothing(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(alone(), str(runs["paper"]), BulkRequest(top=5), str(tmp_path / "whole"))
    monkeypatch.setattr(topk, "_WINDOW", 2)
    write(alone(), str(runs["paper"]), BulkRequest(top=5, batch_users=3), str(tmp_path / "parts"))
    whole, parts = written(tmp_path / "whole"), written(tmp_path / "parts")
    assert whole["user"].drop_duplicates().tolist() == [f"user-{row:03d}" for row in range(23)]
    assert whole.drop(columns="score").equals(parts.drop(columns="score"))
    np.testing.assert_allclose(whole["score"], parts["score"], atol=1e-5)


def _all_requests(world: World, run: str, output: str, requests: dict[str, Any]) -> None:
    for name, request in requests.items():
        write(world, run, request, f"{output}/{name}")


@pytest.mark.slow
def test_ranks_with_deepspeed_write_the_lists_of_one_process_in_the_same_order(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    requests = {
        "everyone": BulkRequest(top=5, batch_users=3),
        "orders": BulkRequest(top=5, orders=ORDERS, only=frozenset(f"item-{i:03d}" for i in range(0, 17, 2))),
        "one": BulkRequest(top=17, users=["user-003"], batch_users=4),
        "nobody": BulkRequest(top=5, users=[]),
        "new": BulkRequest(
            top=19,
            orders=ORDERS | {"Di": ("sku-1",)},
            batch_users=2,
            new_items=(NewItem("sku-1", "quiet mountain trail"), NewItem("sku-2", "blue", "espresso")),
        ),
    }
    for name in ("paper", "cosine"):
        _all_requests(alone(), str(runs[name]), str(tmp_path / f"{name}-1"), requests)
        run_ranks(2, _all_requests, str(runs[name]), str(tmp_path / f"{name}-2"), requests)
        for request in requests:
            one, two = (written(tmp_path / f"{name}-{size}" / request) for size in (1, 2))
            assert one.drop(columns="score").equals(two.drop(columns="score")), (name, request)
            np.testing.assert_allclose(one["score"], two["score"], atol=1e-4)
        assert len(list((tmp_path / f"{name}-2" / "everyone").iterdir())) == 2
        assert {"sku-1", "sku-2"} <= set(written(tmp_path / f"{name}-2" / "new")["item"])
