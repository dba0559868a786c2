"""Files of dense item vectors, from any embedding model: Parquet with a column of ids and a column of vectors.

    item     string or integer: external item id; also named `id` or `item_id`
    vector   list of floats, of one length; also named `vectors` or `embedding`

Items without a vector, or with one of zeros, have none. Vectors of unknown items are ignored and counted.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from cllm4rec_dist.errors import DataError
from cllm4rec_dist.filesystems import as_os_errors, locate

ID_COLUMNS = ("item", "id", "item_id")
VECTOR_COLUMNS = ("vector", "vectors", "embedding")
_FORMAT = "Write Parquet with a column `item` (external ids) and a column `vector` (lists of floats of one length)."
_BATCH_ROWS = 8192


@dataclass(frozen=True)
class ItemVectors:
    """Vectors of some items of a catalog.

    Attributes:
        values: fp32 [n, d], zero for an item without a vector.
        num_found, num_unknown: vectors in the file whose item is in the catalog, or is not.
    """

    values: np.ndarray
    num_found: int
    num_unknown: int


def require_columns(url: str) -> int:
    """Check that a file has the two columns, without reading them; return the number of its rows.

    Raises:
        DataError: if the file cannot be read or has other columns.
    """
    with _open(url) as file:
        _columns(file, url)
        return int(file.metadata.num_rows)


def require_valid(url: str) -> None:
    """Check every row of a file.

    Raises:
        DataError: as `read_item_vectors`.
    """
    read_item_vectors(url, pa.chunked_array([], pa.string()), 0, 0)


def read_item_vectors(url: str, item_ids: pa.ChunkedArray, start: int, stop: int) -> ItemVectors:
    """Read the vectors of items [start, stop) of a catalog. Every row of the file is checked.

    Args:
        item_ids: external ids of all items, string [I].

    Raises:
        DataError: for a file that cannot be read, a missing id, an id that comes twice, a vector of another length than
            the first one, or a number that is not finite; names the row, from 1.
    """
    values: np.ndarray | None = None
    ids, position = [], 0
    with _open(url) as file:
        id_column, vector_column = _columns(file, url)
        for batch in file.iter_batches(_BATCH_ROWS, columns=[id_column, vector_column]):
            batch_ids = batch[id_column].cast(pa.string())
            ids.append(batch_ids)
            _require_ids(batch_ids, url, position)
            vectors = _as_matrix(batch[vector_column], url, position, None if values is None else values.shape[1])
            if values is None:
                values = np.zeros((stop - start, vectors.shape[1]), np.float32)
            rows = pc.fill_null(pc.index_in(batch_ids, value_set=item_ids), -1).to_numpy(zero_copy_only=False)
            is_local = (rows >= start) & (rows < stop)
            values[rows[is_local] - start] = vectors[is_local]
            position += len(batch_ids)
    if values is None:
        raise DataError(url, 0, "rows: it has no vectors", _FORMAT)
    all_ids = pa.chunked_array(ids)
    _require_distinct(all_ids, url)
    num_found = pc.sum(pc.is_in(all_ids, value_set=item_ids)).as_py()
    return ItemVectors(values, num_found, len(all_ids) - num_found)


@contextmanager
def _open(url: str) -> Iterator[pq.ParquetFile]:
    fs, path = locate("embeddings.item_vectors", url, DataError)
    try:
        with as_os_errors(), fs.open(path, "rb") as source:
            yield pq.ParquetFile(source)
    except OSError as error:
        raise DataError("embeddings.item_vectors", url, f"cannot be read as Parquet ({error})", _FORMAT) from error


def _columns(file: pq.ParquetFile, url: str) -> tuple[str, str]:
    """Return the names of the two columns."""
    schema = file.schema_arrow
    names = []
    for known in (ID_COLUMNS, VECTOR_COLUMNS):
        found = [name for name in known if name in schema.names]
        if not found:
            raise DataError(f"{url}: columns", schema.names, f"have none of {', '.join(known)}", _FORMAT)
        names.append(found[0])
    id_type, vector_type = (schema.field(name).type for name in names)
    if pa.types.is_dictionary(id_type):
        id_type = id_type.value_type
    if not (pa.types.is_string(id_type) or pa.types.is_large_string(id_type) or pa.types.is_integer(id_type)):
        raise DataError(f"{url}: {names[0]}", str(id_type), "is not a type of ids", _FORMAT)
    is_list = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)
    is_number = (pa.types.is_floating, pa.types.is_integer)
    if not (any(of(vector_type) for of in is_list) and any(of(vector_type.value_type) for of in is_number)):
        raise DataError(f"{url}: {names[1]}", str(vector_type), "is not a type of vectors", _FORMAT)
    return names[0], names[1]


def _require_ids(ids: pa.Array, url: str, position: int) -> None:
    if ids.null_count:
        row = position + pc.index(pc.is_null(ids), True).as_py() + 1
        raise DataError(f"{url} row {row}", None, "is not an id", "Give every vector the id of its item.")


def _as_matrix(lists: pa.Array, url: str, position: int, width: int | None) -> np.ndarray:
    """Return the vectors of a batch, fp32 [rows, d]."""
    lengths = pc.fill_null(pc.list_value_length(lists), 0).to_numpy(zero_copy_only=False)
    expected = int(lengths[0]) if width is None else width
    wrong = np.flatnonzero((lengths != expected) | (lengths == 0))
    if len(wrong):
        row = position + int(wrong[0])
        rule = "numbers: a vector must not be empty" if lengths[wrong[0]] == 0 else f"numbers, but row 1 has {expected}"
        raise DataError(f"{url} row {row + 1}", int(lengths[wrong[0]]), rule, "Use one embedding model for all items.")
    values = pc.list_flatten(lists).cast(pa.float32()).to_numpy(zero_copy_only=False).reshape(-1, expected)
    wrong = np.flatnonzero(~np.isfinite(values).all(axis=1))
    if len(wrong):
        value = float(values[wrong[0]][~np.isfinite(values[wrong[0]])][0])
        raise DataError(
            f"{url} row {position + int(wrong[0]) + 1}", value, "is not a finite number", "Leave the item out."
        )
    return values


def _require_distinct(ids: pa.ChunkedArray, url: str) -> None:
    encoded = ids.cast(pa.large_string()).combine_chunks().dictionary_encode()
    codes = encoded.indices.to_numpy(zero_copy_only=False)
    if len(encoded.dictionary) == len(codes):
        return
    repeated = np.ones(len(codes), bool)
    repeated[np.unique(codes, return_index=True)[1]] = False
    row = int(np.flatnonzero(repeated)[0])
    first = int(np.flatnonzero(codes == codes[row])[0])
    raise DataError(
        f"{url} row {row + 1}", ids[row].as_py(), f"is also the id of row {first + 1}", "Give each item one vector."
    )
