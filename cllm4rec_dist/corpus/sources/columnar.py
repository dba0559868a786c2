"""Parquet files, a batch of rows at a time."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from cllm4rec_dist.corpus.row_batch import BATCH_ROWS, Batch, column_indexes, with_partition
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.sources.files import PARQUET_MAGIC, RawFile, open_binary
from cllm4rec_dist.errors import DataError


def read_parquet(file: RawFile, columns: Sequence[str], log: SkipLog) -> Iterator[Batch]:
    """Yield the given columns of each row, with the file's types; `lines` are row numbers from 1.

    Raises:
        DataError: if the file is not Parquet, is damaged, or lacks a column.
    """
    with open_binary(file.path) as content:
        if content.read(4) != PARQUET_MAGIC:
            raise DataError("file", file.path, "is not Parquet", "Fix the path or kind in the recipe.")
        content.seek(0)
        try:
            table = pq.ParquetFile(content if content.seekable() else io.BytesIO(content.read()))
        except (ValueError, OSError, pa.ArrowException) as error:
            raise DataError("file", file.path, f"is not Parquet ({error})", "Download the file again.") from error
        in_file = [name for name in columns if name not in file.partition]
        column_indexes(file.path, table.schema_arrow.names, in_file)
        first = 1
        for batch in _batches(table, in_file, file.path):
            lines = np.arange(first, first + batch.num_rows)
            first += batch.num_rows
            log.read(file.path, batch.num_rows)
            frame = _frame(batch, in_file, file.path)
            if not in_file:
                frame = pl.DataFrame({"": lines})
            yield Batch(file.path, lines, with_partition(frame, file.partition, columns))


def _batches(table: pq.ParquetFile, columns: list[str], path: str) -> Iterator[pa.RecordBatch]:
    batches = table.iter_batches(batch_size=4 * BATCH_ROWS, columns=columns)
    while True:
        try:
            batch = next(batches, None)
            if batch is not None:
                batch.validate(full=True)  # detects texts that are not UTF-8
        except (ValueError, OSError, pa.ArrowException) as error:
            raise DataError("file", path, f"is damaged ({error})", "Download the file again.") from error
        if batch is None:
            return
        yield batch


def _frame(batch: pa.RecordBatch, columns: list[str], path: str) -> pl.DataFrame:
    series = {}
    for name in columns:
        column = batch.column(name)
        try:
            series[name] = pl.Series(name, pl.from_arrow(_plain(column)))
        except (
            pl.exceptions.PolarsError,
            pl.exceptions.PanicException,
            pa.ArrowException,
            TypeError,
            ValueError,
        ) as error:
            raise DataError(
                f"{path}: {name}", str(column.type), f"is a type that cannot be read ({error})", "Write it as text."
            ) from error
    return pl.DataFrame(series)


def _plain(column: pa.Array) -> pa.Array:
    """Convert extension types, list views, maps and wide decimals to types that Polars reads."""
    if isinstance(column, pa.UuidArray):
        return pa.array([None if value is None else str(value) for value in column.to_pylist()], pa.string())
    if isinstance(column, pa.ExtensionArray):
        column = column.storage
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_map(column.type):
        column = column.cast(pa.list_(pa.struct({"key": column.type.key_type, "value": column.type.item_type})))
    elif pa.types.is_list_view(column.type) or pa.types.is_large_list_view(column.type):
        column = column.cast(pa.large_list(column.type.value_type))
    elif pa.types.is_decimal256(column.type):
        column = column.cast(pa.string())
    return column
