"""Whole users held out: who they are, what is kept of them, and that nothing of theirs is trained on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cllm4rec_dist.corpus.catalog import Catalog, build_catalog
from cllm4rec_dist.corpus.heldout import HeldOutUsers
from cllm4rec_dist.corpus.manifest import Manifest
from cllm4rec_dist.corpus.raw import RawData
from cllm4rec_dist.corpus.shards import Corpus, write_corpus
from cllm4rec_dist.corpus.sources import read_source
from cllm4rec_dist.errors import ConfigError, CorpusError, DataError
from tests.corpus.samples import BlankTokenizer, raw_data, recipe, source

SPLIT = {"kind": "users", "valid_users": 0.2, "test_users": 0.3, "held_out": 0.25}


@pytest.fixture(scope="module")
def raw() -> RawData:
    return read_source(source(format="synthetic", num_users=60, num_items=30, num_clusters=4, mean_interactions=8))


@pytest.fixture(scope="module")
def catalog(raw: RawData) -> Catalog:
    return build_catalog(raw, recipe(split=SPLIT))


def everything(catalog: Catalog) -> dict[str, list[str]]:
    """All items of every user, in order of their ids."""
    names = catalog.item_ids.to_numpy()
    items_of = {
        user: np.concatenate([getattr(catalog, part)[row] for part in ("train", "valid", "test")])
        for row, user in enumerate(catalog.user_ids)
    }
    new = catalog.new_users
    items_of |= {
        user: np.concatenate([new.history[row], new.valid[row], new.test[row]]) for row, user in enumerate(new.ids)
    }
    return {user: sorted(names[items]) for user, items in items_of.items()}


def write(catalog: Catalog, folder: Path, **settings: Any) -> tuple[Manifest, Corpus]:
    manifest = write_corpus(catalog, BlankTokenizer(), str(folder), recipe(**settings), progress=False)
    return manifest, Corpus.open(str(folder))


def test_each_held_out_user_has_a_history_and_items_to_predict(raw: RawData, catalog: Catalog) -> None:
    new = catalog.new_users
    valid, test = new.valid.lengths > 0, new.test.lengths > 0
    assert (valid ^ test).all()
    assert 5 <= valid.sum() <= 20  # 12 of 60 are expected
    assert 9 <= test.sum() <= 28  # 18 are expected
    lengths = new.history.lengths + new.valid.lengths + new.test.lengths
    assert (lengths >= 3).all()
    held = np.clip(np.floor(lengths * 0.25 + 0.5), 1, lengths - 1)
    assert (new.valid.lengths + new.test.lengths == held).all()
    # Nobody is lost, nobody is on both sides, and a user's items are those of the data.
    assert set(catalog.user_ids).isdisjoint(new.ids)
    assert everything(catalog) == everything(build_catalog(raw, recipe(split={"kind": "none"})))
    assert (catalog.train.lengths > 0).all()
    assert catalog.valid.lengths.sum() > 0, "known users have held-out items too"


def test_nothing_of_theirs_is_in_what_is_trained_on(catalog: Catalog, tmp_path: Path) -> None:
    new = set(catalog.new_users.ids)
    manifest, corpus = write(catalog, tmp_path / "c", split=SPLIT)
    assert new.isdisjoint(corpus.users()["user"].to_pylist())
    records = [corpus.content.read_record(index) for index in range(len(corpus.content))]
    users = np.concatenate([record["users"] for record in records])
    assert int(users.max()) < corpus.num_users == len(catalog.user_ids)
    assert manifest.num_content["user_item"] == len(catalog.reviews.users)
    assert manifest.num_content["user_item"] <= len(catalog.train.values)
    pairs = set(zip(catalog.train.rows.tolist(), catalog.train.values.tolist(), strict=True))
    assert pairs.issuperset(zip(catalog.reviews.users.tolist(), catalog.reviews.items.tolist(), strict=True))
    text = b"".join(path.read_bytes() for path in (tmp_path / "c" / "content").iterdir())
    assert not any(f"user {user}".encode() in text for user in new)


def test_reviews_and_profiles_of_held_out_users_are_counted() -> None:
    rows = [
        (f"u{user:02d}", f"i{item}", 5, item, f"says u{user:02d} of i{item}") for user in range(30) for item in range(4)
    ]
    made = build_catalog(
        raw_data(rows, users=[(f"u{user:02d}", "a profile") for user in range(30)]),
        recipe(split=SPLIT | {"valid": 0, "test": 0}),
    )
    num_new = len(made.new_users)
    assert num_new > 0
    assert made.log.counts["profile of a user who is held out"] == num_new
    assert made.log.counts["review of a held-out interaction"] == 4 * num_new
    texts = [text for table in made.reviews.store.sorted_by(made.reviews.ranks) for text in table["text"]]
    assert len(texts) == 4 * (30 - num_new)
    for text, user, item in zip(texts, made.reviews.users, made.reviews.items, strict=True):
        assert text == f"says {made.user_ids[int(user)]} of {made.item_ids[int(item)]}"


def test_who_is_held_out_depends_on_nobody_else(raw: RawData, catalog: Catalog) -> None:
    gone = catalog.user_ids[0]
    code = raw.user_ids.to_list().index(gone)
    rest = raw.interactions.filter(raw.interactions["user"] != code)
    fewer = build_catalog(dataclasses.replace(raw, interactions=rest), recipe(split=SPLIT))
    assert fewer.new_users.ids.to_list() == catalog.new_users.ids.to_list()
    other = build_catalog(raw, recipe(split=SPLIT, seed=1))
    assert other.new_users.ids.to_list() != catalog.new_users.ids.to_list()


def test_a_corpus_gives_back_its_new_users(catalog: Catalog, tmp_path: Path) -> None:
    manifest, corpus = write(catalog, tmp_path / "c", split=SPLIT)
    new = catalog.new_users
    assert manifest.num_new_users == len(new) == corpus.new_users().num_rows
    assert corpus.new_users()["user"].to_pylist() == new.ids.to_list()
    for part in ("history", "valid", "test"):
        lists = corpus.new_user_split(part)
        assert lists.offsets.tolist() == getattr(new, part).offsets.tolist()
        assert lists.values.tolist() == getattr(new, part).values.tolist()
        assert lists.values.dtype == np.int32
        assert manifest.num_new_interactions[part] == len(lists.values)
    assert corpus.new_user_history()[0].tolist() == [*new.history[0], *new.valid[0], *new.test[0]]
    again, _ = write(catalog, tmp_path / "again", split=SPLIT)
    assert again.to_bytes() == manifest.to_bytes()


def test_other_corpora_say_nothing_of_new_users(raw: RawData, tmp_path: Path) -> None:
    manifest, corpus = write(build_catalog(raw, recipe()), tmp_path / "c")
    assert b"new" not in manifest.to_bytes()
    assert corpus.new_users().num_rows == 0
    assert len(corpus.new_user_split("history")) == 0
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == [
        "content",
        "interactions",
        "items.parquet",
        "manifest.json",
        "users.parquet",
    ]


def test_evaluation_sees_known_users_first_and_then_new_ones(catalog: Catalog, tmp_path: Path) -> None:
    _, corpus = write(catalog, tmp_path / "c", split=SPLIT)
    users = HeldOutUsers.of(corpus, "test")
    num_known = int((catalog.test.lengths > 0).sum())
    assert users.is_new.tolist() == [False] * num_known + [True] * int((catalog.new_users.test.lengths > 0).sum())
    assert users.rows[:num_known].tolist() == np.flatnonzero(catalog.test.lengths).tolist()
    ids = users.ids(corpus)
    for index, user in enumerate(ids):
        if users.is_new[index]:
            row = catalog.new_users.ids.to_list().index(user)
            expected = catalog.new_users.history[row], catalog.new_users.test[row]
        else:
            row = catalog.user_ids.to_list().index(user)
            expected = catalog.train[row], catalog.test[row]
        assert users.histories[index].tolist() == expected[0].tolist()
        assert users.held_out[index].tolist() == expected[1].tolist()


def test_a_sample_of_users_is_always_the_same_and_part_of_larger_ones(catalog: Catalog, tmp_path: Path) -> None:
    _, corpus = write(catalog, tmp_path / "c", split=SPLIT)
    every = HeldOutUsers.of(corpus, "test")
    position = {user: index for index, user in enumerate(every.ids(corpus))}
    smaller: set[str] = set()
    for size in (1, 2, 5, len(every) - 1, len(every), 1000):
        drawn = HeldOutUsers.of(corpus, "test", size)
        names = drawn.ids(corpus)
        assert len(names) == len(drawn) == min(size, len(every))
        assert smaller <= set(names)
        smaller = set(names)
        index = np.array([position[name] for name in names])
        assert (np.diff(index) > 0).all()
        assert drawn.rows.tolist() == every.rows[index].tolist()
        for part in ("histories", "held_out"):
            assert getattr(drawn, part).values.tolist() == getattr(every, part).take(index).values.tolist()
            assert getattr(drawn, part).offsets.tolist() == getattr(every, part).take(index).offsets.tolist()
        assert drawn.num_all == len(every)


def test_digests_cover_held_out_users(raw: RawData, catalog: Catalog, tmp_path: Path) -> None:
    with_them, _ = write(catalog, tmp_path / "a", split=SPLIT)
    assert sorted(with_them.split_digests) == ["history", "test", "train", "valid"]
    other = SPLIT | {"held_out": 0.5}
    changed, _ = write(build_catalog(raw, recipe(split=other)), tmp_path / "b", split=other)
    assert changed.split_digests["train"] == with_them.split_digests["train"]
    for name in ("history", "valid", "test"):
        assert changed.split_digests[name] != with_them.split_digests[name], name


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ({"kind": "users", "valid_users": 0, "test_users": 0}, "holds out no user"),
        ({"kind": "users", "valid_users": 0.5, "test_users": 0.5}, "valid_users \\+ test_users must be below 1"),
        ({"kind": "users", "valid": 0.6, "test": 0.5}, "valid \\+ test must be below 1"),
        ({"kind": "users", "held_out": 1}, "less than 1"),
    ],
)
def test_splits_that_leave_nothing_are_refused(split: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        recipe(split=split)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"test_users": 1e-9}, "split.test_users.*holds out none of the 60 users"),
        ({"valid_users": 0.98, "test_users": 0.019}, "holds out (all users|nobody)"),
    ],
)
def test_a_split_that_holds_out_nobody_or_everybody_is_refused(
    raw: RawData, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        build_catalog(raw, recipe(split=SPLIT | settings))


def test_users_with_too_few_items_are_never_held_out_and_train() -> None:
    rows = [(f"few-{user}", item, 5, 0, "") for user in range(40) for item in ("a", "b")]
    rows += [(f"many-{user}", item, 5, 0, "") for user in range(40) for item in ("a", "b", "c")]
    made = build_catalog(raw_data(rows), recipe(split=SPLIT))
    assert len(made.new_users) > 5
    assert all(user.startswith("many") for user in made.new_users.ids)
    assert {f"few-{user}" for user in range(40)} <= set(made.user_ids)
    assert not any("hold any out" in reason for reason in made.log.counts)


def test_everything_is_trained_on_without_a_split(raw: RawData, tmp_path: Path) -> None:
    catalog = build_catalog(raw, recipe(split={"kind": "none"}))
    assert len(catalog.train.values) == sum(len(part.values) for part in (catalog.train, catalog.valid, catalog.test))
    assert len(catalog.train.values) == sum(
        len(getattr(build_catalog(raw, recipe()), part).values) for part in ("train", "valid", "test")
    )
    manifest, _ = write(catalog, tmp_path / "c", split={"kind": "none"})
    assert manifest.num_held_out("valid") == manifest.num_held_out("test") == 0


@pytest.mark.parametrize("damage", ["items", "columns", "nulls", "rows"])
def test_a_damaged_table_of_new_users_is_refused(catalog: Catalog, tmp_path: Path, damage: str) -> None:
    """Also if its checksum is correct."""
    manifest, corpus = write(catalog, tmp_path / "c", split=SPLIT)
    table = pq.read_table(tmp_path / "c" / "new_users.parquet")
    lists = table["history"].to_pylist()
    if damage == "items":
        lists[0][0] = corpus.num_items
    elif damage == "nulls":
        lists[0] = None
    index = table.schema.get_field_index("history")
    table = table.set_column(index, "history", pa.array(lists, table.schema.field(index).type))
    if damage == "columns":
        table = table.drop_columns(["history"])
    elif damage == "rows":
        table = table.slice(1)
    pq.write_table(table, tmp_path / "c" / "new_users.parquet")
    opened = Corpus(str(tmp_path / "c"), corpus._fs, corpus._root, manifest, corpus.fingerprint)
    with pytest.raises(CorpusError, match=r"new_users\.parquet"):
        opened.new_user_split("history")
