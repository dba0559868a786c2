"""pandas, polars and pyarrow read the same embeddings, and numpy and faiss find the same lists in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from cllm4rec_dist.export import embeddings

NUM_ITEMS, D = 300, 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("embeddings")
    rows, bias = torch.randn(NUM_ITEMS, D), torch.randn(NUM_ITEMS)
    ids = pa.chunked_array([[f"item-{index}" for index in range(NUM_ITEMS)]])
    titles = pa.chunked_array([["Tea", *[None] * (NUM_ITEMS - 1)]])
    embeddings.write_items(made / "items.parquet", ids, titles, rows, bias, "cosine")
    embeddings.write_index(made / "items.faiss", rows, bias, "cosine")
    return made


def test_pandas_polars_and_pyarrow_read_the_same(folder: Path) -> None:
    path = folder / "items.parquet"
    arrow, pandas, polars = pq.read_table(path), pd.read_parquet(path), pl.read_parquet(path)
    assert polars.schema["vector"] == pl.Array(pl.Float32, D)
    assert polars.schema["score_vector"] == pl.Array(pl.Float32, D + 1)
    for name in ("item", "title"):
        assert polars[name].to_list() == arrow[name].to_pylist()
        assert [None if pd.isna(value) else value for value in pandas[name]] == arrow[name].to_pylist()
    for name, width in (("vector", D), ("score_vector", D + 1)):
        flat = arrow[name].combine_chunks().values.to_numpy().reshape(NUM_ITEMS, width)
        assert np.array_equal(np.stack(pandas[name].to_numpy()), flat)
        assert np.array_equal(polars[name].to_numpy(), flat)


def test_similar_items_by_numpy_and_by_sql(folder: Path) -> None:
    duckdb = pytest.importorskip("duckdb")
    table = pd.read_parquet(folder / "items.parquet")
    vectors = np.stack(table["vector"].to_numpy())
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = table["item"].to_numpy()[np.argsort(-(unit @ unit[7]), kind="stable")[:5]].tolist()
    query = f"""
        SELECT b.item FROM '{folder / "items.parquet"}' a, '{folder / "items.parquet"}' b WHERE a.item = 'item-7'
        ORDER BY list_cosine_similarity(a.vector, b.vector) DESC LIMIT 5"""
    assert [row[0] for row in duckdb.sql(query).fetchall()] == expected


def test_faiss_and_numpy_give_equal_lists(folder: Path) -> None:
    faiss = pytest.importorskip("faiss")
    table = pl.read_parquet(folder / "items.parquet")
    queries = np.random.default_rng(0).standard_normal((20, D + 1)).astype(np.float32)
    expected = np.argsort(-(queries @ table["score_vector"].to_numpy().T), axis=1, kind="stable")[:, :10]
    _, result = faiss.read_index(str(folder / "items.faiss")).search(queries, 10)
    assert [[table["item"][int(row)] for row in rows] for rows in result] == [
        [table["item"][int(row)] for row in rows] for rows in expected
    ]
