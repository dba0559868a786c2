"""Filters, row numbers and splits."""

from __future__ import annotations

import os
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pytest

from cllm4rec_dist.config import load_config
from cllm4rec_dist.corpus.catalog import Catalog, build_catalog
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.raw import RawData
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.corpus.sources import read_source
from cllm4rec_dist.errors import DataError
from tests.corpus.samples import interactions, raw_data, recipe, reviews

REPOSITORY = Path(__file__).parents[2]


def random_raw(num_users: int = 60, num_items: int = 40, seed: int = 0) -> RawData:
    random = np.random.default_rng(seed)
    rows = []
    for user in range(num_users):
        for item in random.permutation(num_items)[: random.integers(1, 25)]:
            rows.append((f"u{user}", f"i{item}", float(random.integers(1, 6)), float(random.integers(1000)), "text"))
    return raw_data(rows)


def by_user(catalog: Catalog, split: str) -> dict[str, list[str]]:
    lists = getattr(catalog, split)
    names = catalog.item_ids.to_list()
    return {user: [names[i] for i in lists[row]] for row, user in enumerate(catalog.user_ids)}


def test_ragged() -> None:
    lists = Ragged.from_lists([[1, 2], [], [3, 4, 5]])
    assert [row.tolist() for row in lists] == [[1, 2], [], [3, 4, 5]]
    assert [row.tolist() for row in lists.take([2, 1, 2])] == [[3, 4, 5], [], [3, 4, 5]]
    assert [row.tolist() for row in lists.slice(1, 9)] == [[], [3, 4, 5]]
    assert [row.tolist() for row in Ragged.concat([lists, lists.slice(0, 1)])] == [[1, 2], [], [3, 4, 5], [1, 2]]
    assert lists.rows.tolist() == [0, 0, 2, 2, 2]
    assert len(Ragged.from_lists([])) == 0
    with pytest.raises(IndexError):
        lists[3]


def test_rows_follow_sorted_ids_and_items_follow_time() -> None:
    rows = [("ж", "b", None, 3.0, ""), ("a", "c", None, 2.0, ""), ("ж", "a", None, 1.0, ""), ("a", "b", None, None, "")]
    catalog = build_catalog(raw_data(rows, items=[("a", "Title", "About")], users=[("ж", "Text")]), recipe())
    assert catalog.user_ids.to_list() == ["a", "ж"]
    assert catalog.item_ids.to_list() == ["a", "b", "c"]
    assert by_user(catalog, "train") == {"a": ["b", "c"], "ж": ["a", "b"]}, "an unknown time is the oldest"
    assert catalog.item_titles.to_list() == ["Title", "", ""]
    assert catalog.item_descriptions.to_list() == ["About", "", ""]
    assert catalog.user_texts.to_list() == ["", "Text"]
    assert catalog.log.counts["item without title"] == 2
    assert catalog.train.values.dtype == np.int32
    assert catalog.train.offsets.dtype == np.int64


def test_the_order_of_lines_does_not_matter() -> None:
    raw = random_raw()
    # Ties in time follow the file: make times unique.
    ordered = raw.interactions.with_columns(timestamp=pl.int_range(pl.len()).cast(pl.Float64))
    mixed = ordered.sample(fraction=1, shuffle=True, seed=1)
    mixed = mixed.with_columns(position=pl.int_range(pl.len()).cast(pl.UInt32))
    one = build_catalog(replace(raw, interactions=ordered), recipe())
    other = build_catalog(replace(raw, interactions=mixed), recipe())
    for split in ("train", "valid", "test"):
        assert by_user(one, split) == by_user(other, split)


def test_threshold_and_core_match_a_plain_loop() -> None:
    raw = random_raw()
    catalog = build_catalog(raw, recipe(rating_threshold=3, min_user_items=5, min_item_users=4))
    table = interactions(raw)
    kept = {(u, i) for u, i, r in table[["user", "item", "rating"]].itertuples(index=False) if r >= 3}
    while True:
        users, items = pd.Series([u for u, _ in kept]).value_counts(), pd.Series([i for _, i in kept]).value_counts()
        core = {(u, i) for u, i in kept if users[u] >= 5 and items[i] >= 4}
        if core == kept:
            break
        kept = core
    remaining = {
        (u, i) for split in ("train", "valid", "test") for u, names in by_user(catalog, split).items() for i in names
    }
    assert remaining == kept
    assert catalog.num_users == len({u for u, _ in kept})
    below = int((table["rating"] < 3).sum())
    assert catalog.log.counts["interaction rated below 3"] == below
    outside = "interaction outside of the core (5 items a user, 4 users an item)"
    assert catalog.log.counts[outside] == len(raw.interactions) - below - len(kept)


TOO_FEW = "users have too few items to hold any out: all of theirs are trained on"


def test_random_split_shares(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    catalog = build_catalog(random_raw(), recipe())
    train, valid, test = (getattr(catalog, split).lengths for split in ("train", "valid", "test"))
    total = train + valid + test
    expected = np.where(total < 3, 0, np.floor(total / 10 + 0.5))
    np.testing.assert_array_equal(valid, expected)
    np.testing.assert_array_equal(test, expected)
    num_whole = int((total < 5).sum())
    assert num_whole > 0
    assert f"{num_whole} of {len(total)} {TOO_FEW}" in caplog.text
    assert not any("hold any out" in reason for reason in catalog.log.counts), "they train: nothing is left out"


def test_every_user_keeps_a_training_item() -> None:
    catalog = build_catalog(random_raw(), recipe(split={"kind": "random", "valid": 0.49, "test": 0.5}))
    assert catalog.train.lengths.min() == 1


def test_random_split_depends_on_seed_and_user_alone() -> None:
    raw = random_raw()
    wanted = raw.user_ids < "u3"
    fewer = replace(raw, interactions=raw.interactions.filter(wanted[raw.interactions["user"]]))
    whole, part = build_catalog(raw, recipe()), build_catalog(fewer, recipe())
    for split in ("train", "valid", "test"):
        everyone = by_user(whole, split)
        assert by_user(part, split) == {user: everyone[user] for user in part.user_ids}
    assert by_user(build_catalog(raw, recipe(seed=1)), "test") != by_user(whole, "test")


def test_random_split_is_not_the_order_of_time() -> None:
    rows = [(f"u{u}", f"i{i}", None, float(i), "") for u in range(400) for i in range(10)]
    held_out = build_catalog(raw_data(rows), recipe()).test.values
    counts = np.bincount(held_out, minlength=10)
    assert counts.sum() == 400
    assert counts.min() > 15
    assert counts.max() < 70


def test_last_split() -> None:
    rows = [("u", item, None, float(time), "") for time, item in enumerate("edcba")]
    rows += [("v", item, None, float(time), "") for time, item in enumerate("ab")]
    catalog = build_catalog(raw_data(rows), recipe(split={"kind": "last", "num_valid": 1, "num_test": 2}))
    assert by_user(catalog, "train") == {"u": ["e", "d"], "v": ["a", "b"]}
    assert by_user(catalog, "valid") == {"u": ["c"], "v": []}
    assert by_user(catalog, "test") == {"u": ["b", "a"], "v": []}


def test_last_split_of_a_user_that_is_too_short_is_said_and_not_counted_as_left_out(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level("INFO")
    rows = [("u", item, None, float(time), "") for time, item in enumerate("abc")]
    catalog = build_catalog(raw_data(rows), recipe(split={"kind": "last", "num_valid": 2, "num_test": 2}))
    assert by_user(catalog, "train") == {"u": ["a", "b", "c"]}
    assert f"1 of 1 {TOO_FEW}" in caplog.text
    assert catalog.log.counts == {"item without title": 3}


def test_reviews_of_held_out_interactions_stay_out() -> None:
    rows = [("u", f"i{n}", None, float(n), f"review {n}" if n != 1 else "") for n in range(5)]
    catalog = build_catalog(raw_data(rows), recipe(split={"kind": "last", "num_valid": 1, "num_test": 1}))
    assert reviews(catalog) == ["review 0", "review 2"]
    assert catalog.reviews.items.tolist() == [0, 2]
    assert catalog.reviews.users.tolist() == [0, 0]
    assert catalog.log.counts["review of a held-out interaction"] == 2


def test_threshold_without_ratings_is_refused() -> None:
    with pytest.raises(DataError, match=r"rating_threshold: 4\.0 needs ratings"):
        build_catalog(raw_data([("u", "i", None, None, "")]), recipe(rating_threshold=4))


def test_filters_that_leave_nothing_are_refused() -> None:
    raw = raw_data([("u", "i", 3.0, None, "")])
    with pytest.raises(DataError, match="above every rating"):
        build_catalog(raw, recipe(rating_threshold=4))
    with pytest.raises(DataError, match="min_user_items, min_item_users"):
        build_catalog(raw, recipe(min_user_items=2))


@pytest.mark.slow
def test_a_hundred_thousand_users_take_seconds() -> None:
    random = np.random.default_rng(0)
    frame = pd.DataFrame(
        {"user": random.integers(100_000, size=600_000), "item": random.integers(20_000, size=600_000)}
    )
    frame = frame.drop_duplicates().astype(str)
    rows = [(user, item, None, None, "") for user, item in frame.itertuples(index=False)]
    raw = raw_data(rows)
    start = time.perf_counter()
    catalog = build_catalog(raw, recipe())
    assert catalog.num_users > 90_000
    assert time.perf_counter() - start < 30


def test_ml_100k_after_its_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(os.environ.get("CLLM4REC_DATA") or REPOSITORY.parent / "shared" / "data")
    if not (folder / "ml-100k").is_dir():
        pytest.skip("needs the raw files of ml-100k: set CLLM4REC_DATA to the folder that holds ml-100k/")
    monkeypatch.setenv("CLLM4REC_DATA", str(folder))
    config = load_config(PrepareConfig, REPOSITORY / "shards" / "ml-100k.yaml")
    catalog = build_catalog(read_source(config.source), config)
    assert (catalog.num_users, catalog.num_items) == (938, 1447)
    assert sum(len(lists.values) for lists in (catalog.train, catalog.valid, catalog.test)) == 55_361


def test_what_is_left_out_names_its_first_place() -> None:
    rows = [("u", f"i{n}", 5.0 - n % 2, float(n), "") for n in range(6)]
    catalog = build_catalog(raw_data([*rows, ("u", "i0", 5.0, 9.0, "")]), recipe(rating_threshold=5))
    repeated = catalog.log.skipped["repeated interaction of a user with an item"]
    assert (repeated.count, repeated.total, repeated.file, repeated.line, repeated.value) == (
        1,
        4,
        "sample",
        7,
        "u i0 5",
    )
    below = catalog.log.skipped["interaction rated below 5"]
    assert (below.count, below.total, below.line, below.value) == (3, 7, 2, "u i1 4")


def test_the_earliest_interaction_that_is_rated_high_enough_counts() -> None:
    rows = [("u", "a", 2.0, 1.0, ""), ("u", "b", 5.0, 2.0, ""), ("u", "a", 5.0, 3.0, ""), ("u", "b", 1.0, 4.0, "")]
    catalog = build_catalog(raw_data(rows), recipe(rating_threshold=4))
    assert [catalog.item_ids[int(item)] for item in catalog.train.values] == ["b", "a"], "bought again, returned later"


def test_building_twice_counts_nothing_twice() -> None:
    raw = raw_data([("u", "i", 3.0, None, ""), ("u", "i", 3.0, None, "")])
    assert build_catalog(raw, recipe()).log.counts == build_catalog(raw, recipe()).log.counts


GIVEN = {"kind": "given"}


def with_parts(rows: list[tuple[str, str, int]]) -> RawData:
    raw = raw_data([(user, item, None, None, "") for user, item, _ in rows])
    parts = pl.Series("part", [part for *_, part in rows], dtype=pl.UInt8)
    return replace(raw, interactions=raw.interactions.with_columns(parts))


def test_a_given_split_is_kept() -> None:
    rows = [("u", "a", 0), ("u", "b", 1), ("u", "c", 2), ("v", "a", 0), ("new", "a", 2)]
    catalog = build_catalog(with_parts(rows), recipe(split=GIVEN))
    assert by_user(catalog, "train") == {"u": ["a"], "v": ["a"]}
    assert by_user(catalog, "valid") == {"u": ["b"], "v": []}
    assert by_user(catalog, "test") == {"u": ["c"], "v": []}
    assert catalog.log.counts["held-out interaction of a user without training items"] == 1


def test_a_split_that_contradicts_the_files_is_refused() -> None:
    with pytest.raises(DataError, match="would replace the split"):
        build_catalog(with_parts([("u", "a", 0), ("u", "b", 1)]), recipe(split={"kind": "last"}))
    with pytest.raises(DataError, match="needs files of a split"):
        build_catalog(raw_data([("u", "a", None, None, "")]), recipe(split=GIVEN))
    with pytest.raises(DataError, match="no training interaction"):
        build_catalog(with_parts([("u", "a", 1)]), recipe(split=GIVEN))


@pytest.mark.parametrize("settings", [{}, {"rating_threshold": 4}, {"min_user_items": 3}])
def test_reviews_of_interactions_that_are_left_out_at_the_end_of_the_files(settings: dict[str, int]) -> None:
    rows = [(f"u{u}", f"i{i}", 5.0, float(i), f"u{u} on i{i}") for u in range(3) for i in range(4)]
    last = [("u0", "i0", 2.0, 99.0, "again"), ("u9", "i9", 1.0, 99.0, "late")]
    split = {"kind": "last", "num_valid": 0, "num_test": 0}
    catalog = build_catalog(raw_data(rows + last), recipe(split=split, **settings))
    expected = [text for *_, text in rows] + ([] if settings else ["late"])
    assert sorted(reviews(catalog)) == sorted(expected)
