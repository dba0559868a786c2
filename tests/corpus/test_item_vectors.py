"""Files of item vectors: matched by external id, and refused with the row at fault."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from cllm4rec_dist.corpus.item_vectors import read_item_vectors, require_columns, require_valid
from cllm4rec_dist.errors import DataError

IDS = pa.chunked_array([["a", "b"], ["c", "d", "17"]])


def write(path: Path, ids: Any, vectors: Any, names: tuple[str, str] = ("item", "vector")) -> str:
    pq.write_table(pa.table({names[0]: ids, names[1]: vectors}), path)
    return str(path)


def test_vectors_follow_the_ids_of_the_catalog(tmp_path: Path) -> None:
    url = write(tmp_path / "v", ["d", "x", "a"], [[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    found = read_item_vectors(url, IDS, 0, 5)
    assert found.values.tolist() == [[5, 6], [0, 0], [0, 0], [1, 2], [0, 0]]
    assert (found.num_found, found.num_unknown) == (2, 1)
    part = read_item_vectors(url, IDS, 3, 5)
    assert part.values.tolist() == [[1, 2], [0, 0]]
    assert (part.num_found, part.num_unknown) == (2, 1)
    assert require_columns(url) == 3


@pytest.mark.parametrize("names", [("id", "embedding"), ("item_id", "vectors")])
@pytest.mark.parametrize(
    "kind", [pa.list_(pa.float64()), pa.large_list(pa.float32()), pa.list_(pa.float16(), 2), pa.list_(pa.int8())]
)
def test_usual_names_and_types_are_read(tmp_path: Path, names: tuple[str, str], kind: pa.DataType) -> None:
    values = np.array([[1, 2], [3, 4]], np.float16 if kind == pa.list_(pa.float16(), 2) else np.int64).tolist()
    if kind == pa.list_(pa.float16(), 2):
        vectors = pa.FixedSizeListArray.from_arrays(pa.array(np.array([1, 2, 3, 4], np.float16)), 2)
    else:
        vectors = pa.array(values, kind)
    ids = pa.array(["17", "b"]).dictionary_encode() if names[0] == "id" else pa.array([17, 18], pa.int32())
    found = read_item_vectors(write(tmp_path / "v", ids, vectors, names), IDS, 0, 5)
    assert found.values[4].tolist() == [1, 2]


REFUSED: list[tuple[Any, Any, str]] = [
    (["a", "b", "a"], [[1.0], [2.0], [3.0]], "row 3: 'a' is also the id of row 1"),
    (["x", "y", "y"], [[1.0], [2.0], [3.0]], "row 3: 'y' is also the id of row 2"),
    (["a", "b"], [[1.0, 2.0], [3.0]], "row 2: 1 numbers, but row 1 has 2"),
    (["a", "b"], [[1.0], [float("nan")]], "row 2: nan is not a finite number"),
    (["a", "b"], [[float("inf")], [1.0]], "row 1: inf is not a finite number"),
    (["a", "b"], [[1.0], None], "row 2: 0 numbers: a vector must not be empty"),
    (["a", "b"], pa.array([[1.0], [None]]), "row 2: nan is not a finite number"),
    (["a", None], [[1.0], [2.0]], "row 2: None is not an id"),
    (pa.array([], pa.string()), pa.array([], pa.list_(pa.float32())), "has no vectors"),
    ([1.5], [[1.0]], "is not a type of ids"),
    (["a"], ["text"], "is not a type of vectors"),
    (["a"], [["text"]], "is not a type of vectors"),
]


@pytest.mark.parametrize(("ids", "vectors", "message"), REFUSED)
def test_a_wrong_file_is_refused_with_its_row(tmp_path: Path, ids: Any, vectors: Any, message: str) -> None:
    url = write(tmp_path / "v", ids, vectors)
    with pytest.raises(DataError) as caught:
        require_valid(url)
    assert message in str(caught.value)
    assert url in str(caught.value)


def test_the_row_is_counted_over_batches(tmp_path: Path) -> None:
    vectors = np.ones((20_000, 1))
    vectors[17_000] = np.nan
    url = write(tmp_path / "v", [str(i) for i in range(20_000)], vectors.tolist())
    with pytest.raises(DataError, match="row 17001"):
        require_valid(url)


def test_other_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("id,vector\n")
    for url, message in (
        (str(tmp_path / "text"), "cannot be read as Parquet"),
        (str(tmp_path / "none"), "cannot be read as Parquet"),
        (write(tmp_path / "v", ["a"], [[1.0]], ("sku", "vector")), "have none of item, id, item_id"),
        (write(tmp_path / "w", ["a"], [[1.0]], ("item", "x")), "have none of vector, vectors, embedding"),
    ):
        with pytest.raises(DataError, match=message):
            require_columns(url)
