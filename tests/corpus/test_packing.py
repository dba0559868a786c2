"""Rows are full, documents are whole, and none overlap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm4rec_dist.corpus.packing import FULL, balance, pack
from cllm4rec_dist.corpus.ragged import ranges

patient = settings(deadline=None, max_examples=150)
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=80).map(lambda lengths: np.array(lengths, dtype=np.int64))
GROUP = st.just(np.empty(0, np.int64)) | LENGTHS


@patient
@given(first=GROUP, second=GROUP)
def test_documents_stand_whole_in_full_rows(first: np.ndarray, second: np.ndarray) -> None:
    (rows, width), all_starts, content_start = pack(first, second)
    groups = first, second
    placed = [ranges(starts, lengths) for starts, lengths in zip(all_starts, groups, strict=True)]
    positions = np.concatenate(placed)
    assert len(np.unique(positions)) == len(positions) == first.sum() + second.sum()
    assert len(positions) >= FULL * rows * width or (rows, width) == (1, 1)
    assert positions.max(initial=0) < rows * width
    assert placed[0].max(initial=-1) < content_start
    assert placed[1].min(initial=rows * width) >= content_start
    for starts, lengths in zip(all_starts, groups, strict=True):
        assert (starts // width == (starts + lengths - 1) // width).all(), "cut by the end of a row"


@pytest.mark.parametrize(
    ("first", "second", "shape", "content_start"),
    [
        ([], [], (1, 1), 0),
        ([7], [], (1, 7), 7),
        ([], [7], (1, 7), 0),
        ([5] * 40, [], (40, 5), 200),
        ([9], [2, 2], (1, 13), 9),
        ([2] * 12, [6, 6], (6, 6), 24),  # the second one decides the length
        ([4, 2], [2, 4], (3, 4), 6),  # they share the second row
    ],
)
def test_shapes_of_two_groups(first: list[int], second: list[int], shape: tuple[int, int], content_start: int) -> None:
    packed_shape, _, start = pack(np.array(first, np.int64), np.array(second, np.int64))
    assert (packed_shape, start) == (shape, content_start)


@patient
@given(lengths=LENGTHS, num_parts=st.integers(1, 9))
def test_parts_differ_by_less_than_one_document(lengths: np.ndarray, num_parts: int) -> None:
    part, before = balance(lengths, num_parts)
    loads = np.bincount(part, lengths, num_parts)
    assert loads.max() - loads.min() <= lengths.max()
    for index in range(num_parts):
        members = np.flatnonzero(part == index)
        order = members[np.argsort(before[members])]
        assert before[order].tolist() == (np.cumsum(lengths[order]) - lengths[order]).tolist()


@patient
@given(lengths=LENGTHS, loads=st.lists(st.integers(0, 500), min_size=1, max_size=9))
def test_parts_that_have_something_already_get_less(lengths: np.ndarray, loads: list[int]) -> None:
    part, before = balance(lengths, len(loads), np.array(loads))
    total = np.bincount(part, lengths, len(loads)) + loads
    got = np.bincount(part, minlength=len(loads)) > 0
    assert total[got].max() - total.min() <= lengths.max()
    assert (before >= np.array(loads)[part]).all()


@pytest.mark.parametrize(("num_users", "num_texts"), [(128, 32), (128, 400), (400, 0), (1024, 1024)])
def test_rows_stay_near_the_longest_document(num_users: int, num_texts: int) -> None:
    """The cost of attention grows with the row length: many documents of real lengths are not packed into one row."""
    for seed in range(5):
        random = np.random.default_rng(seed)
        users = np.clip(random.lognormal(2.5, 1.0, num_users), 1, 200).astype(np.int64)
        (rows, length), _, _ = pack(users, random.integers(10, 70, num_texts))
        assert length < 1.3 * users.max()
        assert rows * length < num_users * users.max() + num_texts * 70
