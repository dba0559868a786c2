"""Batches of rows that readers yield, and lookup of columns by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import polars as pl

from cllm4rec_dist.errors import DataError

BATCH_ROWS = 1 << 17
"""Rows at a time of the readers that go row by row."""


@dataclass(frozen=True)
class Batch:
    """Some rows of one file.

    Attributes:
        path: of the file, for errors.
        lines: int64 [n], number of each row in the file, from 1.
        columns: n rows of the wanted columns, in any type that the file has.
    """

    path: str
    lines: np.ndarray
    columns: pl.DataFrame

    def keep(self, wanted: np.ndarray) -> Batch:
        """Only the wanted rows; bool [n]."""
        return self if wanted.all() else Batch(self.path, self.lines[wanted], self.columns.filter(wanted))


def column_indexes(path: str, header: Sequence[str], columns: Sequence[str]) -> list[int]:
    """Index of each column in the header.

    Raises:
        DataError: for one that is not there, or is there twice.
    """
    for column in columns:
        if column not in header:
            close = get_close_matches(column, header, n=1)
            cure = f"Mend the names{' or the separator' if len(header) == 1 else ''} in the recipe."
            guess = f" Did you mean {close[0]!r}?" if close else ""
            raise DataError(
                f"{path} line 1", column, f"is not among its columns {list(header)!r:.300}", f"{cure}{guess}"
            )
        if header.count(column) > 1:
            raise DataError(f"{path} line 1", column, "is the name of two columns", "Rename one of them.")
    return [header.index(column) for column in columns]


def with_partition(columns: pl.DataFrame, partition: Mapping[str, str | None], wanted: Sequence[str]) -> pl.DataFrame:
    """Wanted columns in their order, including those that the file's folders name."""
    constants = [pl.lit(partition[name], pl.String).alias(name) for name in wanted if name in partition]
    return columns.with_columns(constants).select(wanted) if constants else columns.select(wanted)
