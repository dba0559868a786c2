"""Ragged arrays: rows of different lengths as offsets and values, for all lists of items or words.

Legend: N rows, M values in all rows together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Ragged:
    """N rows of different lengths; row n is values[offsets[n] : offsets[n + 1]].

    Attributes:
        offsets: int64 [N + 1], from 0 to M, not decreasing.
        values: [M], any dtype.
    """

    offsets: np.ndarray
    values: np.ndarray

    def __post_init__(self) -> None:
        assert self.offsets[0] == 0
        assert self.offsets[-1] == len(self.values)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Return a view of a row's values; IndexError outside of [0, N)."""
        if not 0 <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        return (self[row] for row in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """int64 [N] number of values in each row."""
        return np.diff(self.offsets)

    @property
    def rows(self) -> np.ndarray:
        """int64 [M] row of each value; with `values` the coordinates of a sparse matrix."""
        return np.repeat(np.arange(len(self)), self.lengths)

    @classmethod
    def from_lengths(cls, lengths: np.ndarray, values: np.ndarray) -> Ragged:
        """Build from the length of each row and the values of all rows in order."""
        offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
        np.cumsum(lengths, out=offsets[1:])
        return cls(offsets, values)

    @classmethod
    def from_lists(cls, lists: Sequence[Sequence[int] | np.ndarray], dtype: np.typing.DTypeLike = np.int32) -> Ragged:
        """Build from a sequence for each row; there may be no row."""
        parts = [np.asarray(part, dtype=dtype) for part in lists]
        lengths = np.array([len(part) for part in parts], dtype=np.int64)
        return cls.from_lengths(lengths, np.concatenate([np.empty(0, dtype), *parts]))

    def take(self, rows: np.ndarray | Sequence[int]) -> Ragged:
        """Select rows in the given order; a row may be repeated."""
        rows = np.asarray(rows, dtype=np.int64)
        starts = self.offsets[rows]
        lengths = self.offsets[rows + 1] - starts
        return self.from_lengths(lengths, self.values[ranges(starts, lengths)])

    def keep(self, mask: np.ndarray) -> Ragged:
        """Keep all rows, but only the values where `mask`, bool [M], is true."""
        return self.from_lengths(np.bincount(self.rows[mask], minlength=len(self)), self.values[mask])

    def last(self, count: int) -> Ragged:
        """Keep at most the last `count` values of each row."""
        lengths = np.minimum(self.lengths, count)
        return self.from_lengths(lengths, self.values[ranges(self.offsets[1:] - lengths, lengths)])

    def slice(self, start: int, stop: int) -> Ragged:
        """Return rows [start, stop) without copying the values; `stop` may exceed N."""
        offsets = self.offsets[start : stop + 1]
        return Ragged(offsets - offsets[0], self.values[offsets[0] : offsets[-1]])

    @classmethod
    def concat(cls, parts: Sequence[Ragged]) -> Ragged:
        """Concatenate the rows of one or more parts."""
        lengths = np.concatenate([part.lengths for part in parts])
        return cls.from_lengths(lengths, np.concatenate([part.values for part in parts]))

    @classmethod
    def hstack(cls, parts: Sequence[Ragged]) -> Ragged:
        """Join row n of all parts into one row, for each n; one or more parts with the same number of rows."""
        lengths = np.stack([part.lengths for part in parts])
        joined = cls.from_lengths(lengths.sum(0), np.empty(lengths.sum(), parts[0].values.dtype))
        starts = joined.offsets[:-1] + np.cumsum(lengths, axis=0) - lengths
        for part, start in zip(parts, starts, strict=True):
            joined.values[ranges(start, part.lengths)] = part.values
        return joined


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Concatenate arange(start, start + length) for each start and length: int64 [sum of lengths]."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1] if len(ends) else 0) + np.repeat(starts - ends + lengths, lengths)
