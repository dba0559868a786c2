"""Items without interactions, and the split that holds out whole items: what is kept, and that nothing leaks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from cllm4rec_dist.corpus.catalog import Catalog, build_catalog
from cllm4rec_dist.corpus.manifest import ContentKind, Manifest
from cllm4rec_dist.corpus.raw import RawData
from cllm4rec_dist.corpus.shards import Corpus, write_corpus
from cllm4rec_dist.corpus.sources import read_source
from cllm4rec_dist.errors import ConfigError, DataError
from tests.corpus.reading import Read, table
from tests.corpus.samples import BlankTokenizer, raw_data, recipe, reviews, source

ORDERS = "u,i\na,2\nb,2\nc,2\na,4\nb,4\nc,6\n"
SPLIT = {"kind": "cold_items", "valid_items": 0.2, "test_items": 0.2, "valid": 0.1, "test": 0.2}


def with_items(**options: Any) -> dict[str, Any]:
    return table() | {"items": {"path": "m.csv", "item": "i", "title": "t", "category": "c"}} | options


def write(catalog: Catalog, folder: Path, **settings: Any) -> tuple[Manifest, Corpus]:
    manifest = write_corpus(catalog, BlankTokenizer(), str(folder), recipe(**settings), progress=False)
    return manifest, Corpus.open(str(folder))


def texts_about(corpus: Corpus, kinds: set[ContentKind]) -> set[int]:
    """Item rows of the texts of some kinds."""
    records = [corpus.content.read_record(index) for index in range(len(corpus.content))]
    return {
        item
        for record in records
        for kind, item in zip(record["kind"].tolist(), record["items"].tolist(), strict=True)
        if kind in kinds
    }


def test_items_of_a_table_without_interactions_are_in_the_catalog(read: Read, tmp_path: Path) -> None:
    result = read({"i.csv": ORDERS, "m.csv": "i,t,c\n2,Two,\n3,Three,x\n5,,y\n1,One,\n6,Six,\n"}, **with_items())
    catalog = build_catalog(result.raw, recipe())
    assert catalog.item_ids.to_list() == ["1", "2", "3", "4", "6"], "rows follow the ids; 5 has a category alone"
    assert catalog.item_titles.to_list() == ["One", "Two", "Three", "", "Six"]
    assert result.lost == {"text about an item without interactions": (1, "m.csv", 4, "5")}
    names = catalog.item_ids.to_list()
    users = {user: [names[i] for i in catalog.train[row]] for row, user in enumerate(catalog.user_ids)}
    assert users == {"a": ["2", "4"], "b": ["2", "4"], "c": ["2", "6"]}
    manifest, corpus = write(catalog, tmp_path / "c")
    assert manifest.num_new_items == 2
    assert manifest.has_cold_items
    assert texts_about(corpus, {ContentKind.ITEM_TITLE}) == {0, 1, 2, 4}


def test_an_item_whose_interactions_are_filtered_out_is_not_new(read: Read) -> None:
    result = read({"i.csv": ORDERS, "m.csv": "i,t,c\n2,Two,\n6,Six,\n7,Seven,\n"}, **with_items())
    catalog = build_catalog(result.raw, recipe(min_item_users=2))
    assert catalog.item_ids.to_list() == ["2", "4", "7"]


def test_new_items_can_be_left_out(read: Read, tmp_path: Path) -> None:
    files = {"i.csv": ORDERS, "m.csv": "i,t,c\n2,Two,\n3,Three,x\n"}
    result = read(files, **with_items(new_items=False))
    catalog = build_catalog(result.raw, recipe())
    assert catalog.item_ids.to_list() == ["2", "4", "6"]
    manifest, _ = write(catalog, tmp_path / "c")
    assert not manifest.has_cold_items
    assert b"num_new_items" not in manifest.to_bytes(), "as before there were new items"


@pytest.mark.parametrize(("option", "items"), [({}, ["a"]), ({"new_items": True}, ["a", "z"])])
def test_other_formats_keep_them_where_the_recipe_says_so(
    tmp_path: Path, option: dict[str, bool], items: list[str]
) -> None:
    (tmp_path / "s.txt").write_text("u a\nv a\n")
    (tmp_path / "t.txt").write_text("a Soap\nz Pan\n")
    files = {"sequences": str(tmp_path / "s.txt"), "titles": str(tmp_path / "t.txt")}
    raw = read_source(source(format="sequences", **files, **option))
    assert build_catalog(raw, recipe()).item_ids.to_list() == items


def test_an_id_that_is_spelled_otherwise_is_no_new_item(read: Read) -> None:
    result = read({"i.csv": "u,i\na,0108\nb,5\na,6\n", "m.csv": "i,t,c\n108,A,\n5,B,\n6,C,\n9,D,\n"}, **with_items())
    assert build_catalog(result.raw, recipe()).item_ids.to_list() == ["0108", "5", "6", "9"]
    assert "some texts are not used. 1 ids of the two sides differ only in leading zeros" in result.messages


def test_a_row_of_orders_that_cannot_be_used_is_no_new_item(read: Read) -> None:
    items = {"path": "i.csv", "item": "i", "title": "t"}
    result = read({"i.csv": "u,i,t\na,1,A\n,3,C\n"}, **(table() | {"items": items}))
    assert build_catalog(result.raw, recipe()).item_ids.to_list() == ["1"]


@pytest.fixture(scope="module")
def raw() -> RawData:
    return read_source(source(format="synthetic", num_users=80, num_items=40, num_clusters=4, mean_interactions=8))


@pytest.fixture(scope="module")
def catalog(raw: RawData) -> Catalog:
    return build_catalog(raw, recipe(split=SPLIT))


def pairs(catalog: Catalog, *parts: str) -> set[tuple[str, str]]:
    users, items = catalog.user_ids.to_list(), catalog.item_ids.to_list()
    lists = [getattr(catalog, part) for part in parts]
    return {(users[u], items[i]) for part in lists for u, i in zip(part.rows, part.values, strict=True)}


def cold(catalog: Catalog) -> set[str]:
    """Items without a training interaction."""
    return set(catalog.item_ids) - {item for _, item in pairs(catalog, "train")}


def test_no_interaction_of_a_held_out_item_is_trained_on(raw: RawData, catalog: Catalog, tmp_path: Path) -> None:
    held_out = cold(catalog)
    assert 8 <= len(held_out) <= 24, "16 of 40 are expected"
    by_item = {
        item: {part for part in ("valid", "test") if item in {i for _, i in pairs(catalog, part)}} for item in held_out
    }
    assert set(map(tuple, by_item.values())) == {("valid",), ("test",)}, "an item's interactions are in one part"
    everything = build_catalog(raw, recipe(split={"kind": "none"}))
    users = set(catalog.user_ids)
    assert pairs(catalog, "train", "valid", "test") == {pair for pair in pairs(everything, "train") if pair[0] in users}
    assert (catalog.train.lengths > 0).all()
    manifest, corpus = write(catalog, tmp_path / "c", split=SPLIT)
    assert manifest.has_cold_items
    rows = {row for row, item in enumerate(catalog.item_ids) if item in held_out}
    assert rows.isdisjoint(texts_about(corpus, {ContentKind.USER_ITEM})), "reviews would leak the target"
    assert len(reviews(catalog)) <= len(catalog.train.values)
    assert rows <= texts_about(corpus, {ContentKind.ITEM_TITLE})
    described = {row for row, text in enumerate(catalog.item_descriptions) if text}
    assert rows & described <= texts_about(corpus, {ContentKind.ITEM_DESCRIPTION})


def test_other_items_are_split_at_random(raw: RawData, catalog: Catalog) -> None:
    held_out = cold(catalog)
    kept = raw.interactions.filter(~raw.item_ids.is_in(list(held_out)).gather(raw.interactions["item"]))
    warm = build_catalog(
        RawData(**(vars(raw) | {"interactions": kept})), recipe(split={"kind": "random", "valid": 0.1, "test": 0.2})
    )
    for part in ("train", "valid", "test"):
        assert {pair for pair in pairs(catalog, part) if pair[1] not in held_out} == pairs(warm, part)
    assert pairs(warm, "test")


def test_the_draw_depends_on_the_seed_and_the_item_alone(raw: RawData, catalog: Catalog) -> None:
    few = raw.interactions.filter(raw.interactions["user"] < 40)
    part = build_catalog(RawData(**(vars(raw) | {"interactions": few})), recipe(split=SPLIT))
    assert 0 < part.num_users < catalog.num_users
    assert cold(part) == cold(catalog) & set(part.item_ids)
    assert cold(build_catalog(raw, recipe(split=SPLIT, seed=1))) != cold(catalog)
    again = build_catalog(raw, recipe(split=SPLIT))
    assert pairs(again, "test") == pairs(catalog, "test")


def test_whole_users_can_be_held_out_too(raw: RawData, catalog: Catalog, tmp_path: Path) -> None:
    split = SPLIT | {"valid_users": 0.1, "test_users": 0.2, "held_out": 0.25}
    both = build_catalog(raw, recipe(split=split))
    new = both.new_users
    assert 8 <= len(new) <= 40, "24 of 80 are expected"
    assert set(new.ids).isdisjoint(both.user_ids)
    assert (new.history.lengths >= 1).all()
    names, ids = both.item_ids.to_list(), new.ids.to_list()
    is_cold = np.array([name in cold(catalog) for name in names])
    assert cold(both) >= cold(catalog) & set(names), "the draw of items does not depend on that of users"
    assert not is_cold[new.history.values].any()
    assert not is_cold[both.train.values].any()
    # Each interaction is in one list, and one with a held-out item in the list of the item's part.
    everything = build_catalog(raw, recipe(split={"kind": "none"}))
    users = set(both.user_ids) | set(new.ids)
    lists = {
        part: {(ids[u], names[i]) for u, i in zip(part_of.rows, part_of.values, strict=True)}
        for part, part_of in (("history", new.history), ("valid", new.valid), ("test", new.test))
    }
    known = pairs(both, "train", "valid", "test")
    assert known | set().union(*lists.values()) == {pair for pair in pairs(everything, "train") if pair[0] in users}
    assert len(known) + sum(map(len, lists.values())) == len(known | set().union(*lists.values()))
    for part in ("valid", "test"):
        of_items = {item for _, item in pairs(catalog, part) if item in cold(catalog)}
        other = {item for _, item in lists["test" if part == "valid" else "valid"]}
        assert of_items.isdisjoint(other)
    manifest, corpus = write(both, tmp_path / "c", split=split)
    assert manifest.has_cold_items
    assert manifest.num_new_users == len(new) == corpus.new_users().num_rows


def test_a_split_of_the_files_is_not_replaced() -> None:
    raw = raw_data([("u", "a", None, 0.0, ""), ("u", "b", None, 1.0, "")])
    given = raw.interactions.with_columns(part=pl.Series([0, 2], dtype=pl.UInt8))
    with pytest.raises(DataError, match="would replace the split of the data set's files"):
        build_catalog(RawData(**(vars(raw) | {"interactions": given})), recipe(split=SPLIT))


def test_users_who_have_held_out_items_alone_are_left_out_and_counted() -> None:
    rows = [(f"u{user}", f"i{user % 20}", None, 0.0, "") for user in range(60)]
    catalog = build_catalog(raw_data(rows), recipe(split=SPLIT))
    assert 0 < catalog.num_users < 60
    reason = "held-out interaction of a user without training items"
    assert catalog.log.counts[reason] == 60 - catalog.num_users


@pytest.mark.parametrize(
    ("split", "error", "words"),
    [
        ({"valid_items": 0, "test_items": 0}, ConfigError, "holds out no item"),
        ({"valid_items": 0.5, "test_items": 0.5}, ConfigError, "must be below 1"),
        ({"valid_users": 0.5, "test_users": 0.5}, ConfigError, "valid_users \\+ test_users must be below 1"),
        ({"held_out": 0.5}, ConfigError, "give valid_users or test_users"),
        ({"valid_items": 0, "test_items": 1e-9}, DataError, "holds out none of the 2 items"),
        ({"valid_items": 0, "test_items": 0.999999999}, DataError, "holds out all items"),
    ],
)
def test_a_share_that_cannot_be_held_out_is_refused(split: dict[str, float], error: type, words: str) -> None:
    rows = [("u", "a", None, 0.0, ""), ("u", "b", None, 1.0, "")]
    with pytest.raises(error, match=words):
        build_catalog(raw_data(rows), recipe(split={"kind": "cold_items"} | split))


def test_shares_are_about_what_the_recipe_says() -> None:
    rows = [(f"u{n % 50}", f"i{n}", None, 0.0, "") for n in range(2000)]
    catalog = build_catalog(raw_data(rows), recipe(split={"kind": "cold_items", "valid": 0, "test": 0}))
    np.testing.assert_allclose(len(catalog.test.values) / 2000, 0.1, atol=0.02)
    np.testing.assert_allclose(len(catalog.valid.values) / 2000, 0.05, atol=0.015)
