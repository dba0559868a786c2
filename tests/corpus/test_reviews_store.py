"""Texts of interactions on disk, sorted by buckets."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest

from cllm4rec_dist.corpus import reviews
from cllm4rec_dist.corpus.reviews import ReviewStore

NUM_POSITIONS = 300


def filled() -> ReviewStore:
    """A store of texts at some positions, added in parts."""
    store = ReviewStore()
    rng = np.random.default_rng(0)
    positions = np.flatnonzero(rng.random(NUM_POSITIONS) < 0.7)
    for part in np.array_split(positions, 11):
        store.append(part, pl.Series([f"text {position} {'é' * (position % 50)}" for position in part.tolist()]))
    return store


def ranked(store: ReviewStore, ranks: np.ndarray) -> list[tuple[int, str]]:
    return [row for table in store.sorted_by(ranks) for row in table.select("rank", "text").iter_rows()]


RANKS = {
    "reversed": np.arange(NUM_POSITIONS)[::-1].copy(),
    "shuffled": np.random.default_rng(1).permutation(NUM_POSITIONS),
    "some left out": np.where(np.arange(NUM_POSITIONS) % 3 == 0, np.arange(NUM_POSITIONS) // 3, -1),
    "all left out": np.full(NUM_POSITIONS, -1),
}


@pytest.mark.parametrize("order", RANKS)
@pytest.mark.parametrize("flush_bytes", [1, 1000])
def test_many_buckets_give_the_order_of_one(monkeypatch: pytest.MonkeyPatch, order: str, flush_bytes: int) -> None:
    whole = ranked(filled(), RANKS[order])
    assert [rank for rank, _ in whole] == sorted(rank for rank, _ in whole)
    monkeypatch.setattr(reviews, "_FLUSH_BYTES", flush_bytes)
    monkeypatch.setattr(reviews, "_BUCKET_BYTES", 500)
    assert ranked(filled(), RANKS[order]) == whole


def test_each_text_comes_with_its_rank() -> None:
    for rank, text in ranked(filled(), RANKS["shuffled"]):
        assert int(text.split()[1]) == int(np.flatnonzero(RANKS["shuffled"] == rank)[0])


def test_a_store_can_be_sorted_twice_and_read_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reviews, "_FLUSH_BYTES", 500)
    monkeypatch.setattr(reviews, "_BUCKET_BYTES", 500)
    store = filled()
    assert ranked(store, RANKS["reversed"]) == ranked(store, RANKS["reversed"])
    positions = [int(text.split()[1]) for text in store]
    assert positions == sorted(positions)


def test_an_empty_store_gives_nothing() -> None:
    assert list(ReviewStore()) == []
    assert ranked(ReviewStore(), np.empty(0, np.int64)) == []
