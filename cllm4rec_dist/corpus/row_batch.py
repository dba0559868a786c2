"""Batches of rows from readers, and lookup of columns by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import numpy as np
import polars as pl

from cllm4rec_dist.errors import DataError

BATCH_ROWS = 1 << 17
"""Rows per batch of the readers that parse row by row."""


@dataclass(frozen=True)
class Batch:
    """Some rows of one file.

    Attributes:
        path: path of the file, for errors.
        lines: int64 [n] line of each row in the file, from 1.
        columns: n rows of the selected columns, with the file's types.
    """

    path: str
    lines: np.ndarray
    columns: pl.DataFrame

    def keep(self, mask: np.ndarray) -> Batch:
        """Keep only the rows where `mask`, bool [n], is true."""
        return self if mask.all() else Batch(self.path, self.lines[mask], self.columns.filter(mask))


def column_indexes(path: str, header: Sequence[str], columns: Sequence[str]) -> list[int]:
    """Return the index of each column in the header.

    Raises:
        DataError: if a column is missing or occurs twice.
    """
    for column in columns:
        if column not in header:
            close = get_close_matches(column, header, n=1)
            cure = f"Fix the names{' or the separator' if len(header) == 1 else ''} in the recipe."
            guess = f" Did you mean {close[0]!r}?" if close else ""
            raise DataError(
                f"{path} line 1", column, f"is not among its columns {list(header)!r:.300}", f"{cure}{guess}"
            )
        if header.count(column) > 1:
            raise DataError(f"{path} line 1", column, "is the name of two columns", "Rename one of them.")
    return [header.index(column) for column in columns]


def with_partition(columns: pl.DataFrame, partition: Mapping[str, str | None], names: Sequence[str]) -> pl.DataFrame:
    """Select columns by name, including the partition columns of the file's folders."""
    constants = [pl.lit(partition[name], pl.String).alias(name) for name in names if name in partition]
    return columns.with_columns(constants).select(names) if constants else columns.select(names)
