"""Operations on ragged arrays equal those on lists."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm4rec_dist.corpus.ragged import Ragged, ranges

LISTS = st.lists(st.lists(st.integers(-9, 9), max_size=5), max_size=6)


def as_lists(ragged: Ragged) -> list[list[int]]:
    return [row.tolist() for row in ragged]


@settings(deadline=None)
@given(lists=LISTS, count=st.integers(0, 6), data=st.data())
def test_rows_are_taken_cut_and_joined_as_lists_are(lists: list[list[int]], count: int, data: st.DataObject) -> None:
    ragged = Ragged.from_lists(lists)
    assert as_lists(ragged) == lists
    assert as_lists(ragged.last(count)) == [row[max(0, len(row) - count) :] for row in lists]
    assert as_lists(ragged.keep(ragged.values > 0)) == [[v for v in row if v > 0] for row in lists]
    others = [data.draw(st.lists(st.integers(-9, 9), max_size=3)) for _ in lists]
    joined = Ragged.hstack([ragged, Ragged.from_lists(others), ragged])
    assert as_lists(joined) == [row + other + row for row, other in zip(lists, others, strict=True)]
    assert as_lists(Ragged.concat([ragged, Ragged.from_lists(others)])) == lists + others
    rows = data.draw(st.lists(st.integers(0, len(lists) - 1), max_size=8)) if lists else []
    assert as_lists(ragged.take(rows)) == [lists[row] for row in rows]


@settings(deadline=None)
@given(pairs=st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 4)), max_size=6))
def test_ranges(pairs: list[tuple[int, int]]) -> None:
    starts, lengths = np.array(pairs, np.int64).reshape(-1, 2).T
    expected = [value for start, length in pairs for value in range(start, start + length)]
    assert ranges(starts, lengths).tolist() == expected
