"""Embeddings are written row group by row group, and an inner product with a score vector is the head's score."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor

from cllm4rec_dist.export import embeddings
from cllm4rec_dist.model.item_head import ItemHead
from tests.harness import alone

NUM_ITEMS, D = 23, 8
ROWS, BIAS = torch.randn(NUM_ITEMS, D), torch.randn(NUM_ITEMS)
IDS = pa.chunked_array([[f"i{index}" for index in range(9)], [f"i{index}" for index in range(9, NUM_ITEMS)]])
TITLES = pa.chunked_array([[None if index % 5 == 0 else f"título {index}" for index in range(NUM_ITEMS)]])
HEADS = [(similarity, bias) for similarity in ("dot", "cosine") for bias in (None, BIAS)]


def head_scores(similarity: str, bias: Tensor | None, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """The run's own queries and scores, [n, S] and [n, NUM_ITEMS]."""
    head = ItemHead(
        NUM_ITEMS, alone(), similarity=similarity, temperature=0.2, item_bias=bias is not None, pool_residual=False
    )
    if bias is not None:
        assert head.local_bias is not None
        head.local_bias.data.copy_(bias[:, None])
    queries = head.with_bias_column(head.queries(hidden, torch.zeros_like(hidden))).detach()
    return queries, queries @ head.output_weight(ROWS).detach().T


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_GROUP_BYTES", 500)


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize(("similarity", "bias"), HEADS)
def test_items_have_titles_vectors_and_score_vectors(tmp_path: Path, similarity: str, bias: Tensor | None) -> None:
    path = tmp_path / "items.parquet"
    embeddings.write_items(path, IDS, TITLES, ROWS, bias, similarity)
    file = pq.ParquetFile(path)
    assert file.metadata.num_row_groups > 2
    table = file.read()
    assert table.schema.field("vector").type == pa.list_(pa.float32(), D)
    assert table.schema.field("score_vector").type == pa.list_(pa.float32(), D + (bias is not None))
    assert table["item"].to_pylist() == IDS.to_pylist()
    assert table["title"].to_pylist() == TITLES.to_pylist()
    assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32), ROWS.numpy())
    queries, scores = head_scores(similarity, bias, torch.randn(3, D))
    vectors = torch.tensor(table["score_vector"].to_pylist())
    torch.testing.assert_close(queries @ vectors.T, scores)


@pytest.mark.usefixtures("small_groups")
def test_users_have_vectors(tmp_path: Path) -> None:
    embeddings.write_users(tmp_path / "users.parquet", IDS, ROWS)
    table = pq.read_table(tmp_path / "users.parquet")
    assert table.column_names == ["user", "vector"]
    assert table["user"].to_pylist() == IDS.to_pylist()
    assert np.array_equal(np.array(table["vector"].to_pylist(), np.float32), ROWS.numpy())


def test_no_more_than_a_row_group_is_copied_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embeddings, "_GROUP_BYTES", 4 * 17 * 5)
    sizes: list[int] = []
    vectors = embeddings._vectors
    monkeypatch.setattr(embeddings, "_vectors", lambda rows: (sizes.append(len(rows)), vectors(rows))[1])
    embeddings.write_items(tmp_path / "items.parquet", IDS, TITLES, ROWS, BIAS, "cosine")
    assert max(sizes) == 5
    assert sum(sizes) == 2 * NUM_ITEMS


@pytest.mark.usefixtures("small_groups")
@pytest.mark.parametrize(("similarity", "bias"), HEADS)
def test_the_index_finds_the_exact_best(tmp_path: Path, similarity: str, bias: Tensor | None) -> None:
    faiss: Any = pytest.importorskip("faiss")
    embeddings.write_index(tmp_path / "items.faiss", ROWS, bias, similarity)
    queries, scores = head_scores(similarity, bias, torch.randn(6, D))
    index_scores, index_rows = faiss.read_index(str(tmp_path / "items.faiss")).search(queries.numpy(), 10)
    best = scores.topk(10)
    assert np.array_equal(index_rows, best.indices.numpy())
    assert np.allclose(index_scores, best.values.numpy(), atol=1e-5)
