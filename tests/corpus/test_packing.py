"""Rows are full, documents are whole, and nobody stands on another."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm4rec_dist.corpus.packing import FULL, balance, pack, ranges

patient = settings(deadline=None, max_examples=150)
LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=80).map(lambda found: np.array(found, dtype=np.int64))


@patient
@given(lengths=LENGTHS)
def test_documents_stand_whole_in_full_rows(lengths: np.ndarray) -> None:
    packing = pack(lengths)
    num_rows, width = packing.shape
    places = ranges(packing.starts, lengths)
    assert len(np.unique(places)) == lengths.sum() <= num_rows * width
    assert places.max() < num_rows * width
    assert (packing.starts // width == (packing.starts + lengths - 1) // width).all(), "cut by the end of a row"
    assert num_rows == 1 or lengths.sum() >= FULL * num_rows * width
    assert width >= lengths.max()


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


def test_rows_stay_near_the_longest_document() -> None:
    """Attention is paid by the row's length: many documents of real lengths are not laid out in one row."""
    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(2.5, 1.0, 400), 1, 200).astype(np.int64)
    num_rows, width = pack(lengths).shape
    assert num_rows > 20
    assert width < 2 * lengths.max()
    padded = len(lengths) * lengths.max()
    assert num_rows * width < padded / 5


@pytest.mark.parametrize(("lengths", "shape"), [([4, 4, 4], (3, 4)), ([7], (1, 7)), ([10, 10, 5], (1, 25))])
def test_shapes(lengths: list[int], shape: tuple[int, int]) -> None:
    assert pack(np.array(lengths)).shape == shape
