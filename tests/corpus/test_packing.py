"""Rows are full, documents are whole, and nobody stands on another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm4rec_dist.corpus.packing import FULL, balance, pack
from cllm4rec_dist.corpus.ragged import ranges

patient = settings(deadline=None, max_examples=150)
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=80).map(lambda found: np.array(found, dtype=np.int64))
GROUPS = st.lists(st.just(np.empty(0, np.int64)) | LENGTHS, min_size=1, max_size=3)


@patient
@given(groups=GROUPS)
def test_documents_stand_whole_in_rows_of_one_length(groups: list[np.ndarray]) -> None:
    packings = pack(groups)
    width = packings[0].shape[1]
    for packing, lengths in zip(packings, groups, strict=True):
        places = ranges(packing.starts, lengths)
        assert packing.shape[0] >= 1
        assert packing.shape[1] == width >= lengths.max(initial=1)
        assert len(np.unique(places)) == lengths.sum() <= packing.shape[0] * width
        assert places.max(initial=0) < packing.shape[0] * width
        assert (packing.starts // width == (packing.starts + lengths - 1) // width).all(), "cut by the end of a row"


def filled(groups: list[np.ndarray]) -> float:
    """Share of all places that hold a token."""
    shapes = [packing.shape for packing in pack(groups)]
    return sum(int(lengths.sum()) for lengths in groups) / sum(rows * width for rows, width in shapes)


@patient
@given(lengths=LENGTHS)
def test_a_group_alone_is_full(lengths: np.ndarray) -> None:
    assert filled([lengths]) >= FULL


@pytest.mark.parametrize(("num_users", "num_texts"), [(128, 32), (128, 400), (256, 32), (1024, 1024), (1024, 0)])
def test_many_documents_of_real_lengths_are_full_together(num_users: int, num_texts: int) -> None:
    for seed in range(10):
        random = np.random.default_rng(seed)
        users = np.clip(random.lognormal(2.5, 1.0, num_users), 1, 200).astype(np.int64)
        assert filled([users, random.integers(10, 70, num_texts)]) >= FULL


@pytest.mark.parametrize(
    ("groups", "shapes"),
    [
        ([[], []], [(1, 1), (1, 1)]),
        ([[7], []], [(1, 7), (1, 7)]),
        ([[5] * 40, []], [(40, 5), (1, 5)]),  # padding is one short row
        ([[9], [2, 2]], [(1, 9), (1, 9)]),
        ([[2] * 12, [6, 6]], [(4, 6), (2, 6)]),  # the second one decides the length
    ],
)
def test_shapes_of_two_groups(groups: list[list[int]], shapes: list[tuple[int, int]]) -> None:
    assert [packing.shape for packing in pack([np.array(group, np.int64) for group in groups])] == shapes


@patient
@given(lengths=LENGTHS, num_parts=st.integers(1, 9))
def test_parts_differ_by_less_than_one_document(lengths: np.ndarray, num_parts: int) -> None:
    part, before = balance(lengths, num_parts)
    loads = np.bincount(part, lengths, num_parts)
    assert loads.max() - loads.min() <= lengths.max()
    for number in range(num_parts):
        own = np.flatnonzero(part == number)
        order = own[np.argsort(before[own])]
        assert before[order].tolist() == (np.cumsum(lengths[order]) - lengths[order]).tolist()


@patient
@given(lengths=LENGTHS, loads=st.lists(st.integers(0, 500), min_size=1, max_size=9))
def test_parts_that_have_something_already_get_less(lengths: np.ndarray, loads: list[int]) -> None:
    part, before = balance(lengths, len(loads), np.array(loads))
    total = np.bincount(part, lengths, len(loads)) + loads
    got = np.bincount(part, minlength=len(loads)) > 0
    assert total[got].max() - total.min() <= lengths.max()
    assert (before >= np.array(loads)[part]).all()


def test_rows_stay_near_the_longest_document() -> None:
    """Attention is paid by the row's length: many documents of real lengths are not laid out in one row."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(2.5, 1.0, 400), 1, 200).astype(np.int64)
    num_rows, width = pack([lengths])[0].shape
    assert num_rows > 20
    assert width < 2 * lengths.max()
    padded = len(lengths) * lengths.max()
    assert num_rows * width < padded / 5


@pytest.mark.parametrize(("lengths", "shape"), [([4, 4, 4], (3, 4)), ([7], (1, 7)), ([10, 10, 5], (1, 25))])
def test_shapes(lengths: list[int], shape: tuple[int, int]) -> None:
    assert pack([np.array(lengths)])[0].shape == shape
