"""Embeddings for other programs: Parquet files with a vector for each id, and a FAISS index of the items.

Items have two vectors. `vector` is the trained embedding of the collaborative LLM (z_rec after finetuning), in units of
the backbone's embedding scale: the model's input for the item in a prompt, before `input_projection` if embeddings are
narrower than the backbone. `score_vector` is the vector whose inner product with a query is the score:

    score[i] = query . score_vector[i]
    score_vector = vector, or normalize(vector) for a cosine head; followed by the item's bias if items have one
    query        = q, or normalize(q) / temperature for a cosine head; followed by a 1 if items have a bias

q is the hidden state of the prompt's last token in the form of the head (`formula` in `scoring.json`).

Legend: U users, I items, D width of embeddings, S width of a score vector: D, or D + 1 with a bias.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from torch import Tensor

_GROUP_BYTES = 32 << 20
"""Size of a row group: large enough for fast reads, small compared with the tables."""


def score_vectors(rows: Tensor, bias: Tensor | None, similarity: str) -> Tensor:
    """Return the score vectors, [n, S], of item rows [n, D] and their biases [n]."""
    vectors = F.normalize(rows, dim=1) if similarity == "cosine" else rows
    return vectors if bias is None else torch.cat([vectors, bias[:, None]], dim=1)


def write_items(
    path: Path, ids: pa.ChunkedArray, titles: pa.ChunkedArray, rows: Tensor, bias: Tensor | None, similarity: str
) -> None:
    """Write columns item, title, vector [D] and score_vector [S], a row group at a time.

    Args:
        titles: null for an item without one.
        rows: [I, D].
        bias: [I], or None.
        similarity: dot or cosine, of the head.
    """
    vectors = {"vector": rows.shape[1], "score_vector": rows.shape[1] + (bias is not None)}
    with _writer(path, "item", {"title": pa.string()}, vectors) as writer:
        for start, stop in _groups(len(rows), sum(vectors.values())):
            scored = score_vectors(rows[start:stop], None if bias is None else bias[start:stop], similarity)
            texts = [_texts(ids, start, stop), _texts(titles, start, stop)]
            columns = [*texts, _vectors(rows[start:stop]), _vectors(scored)]
            writer.write_batch(pa.record_batch(columns, schema=writer.schema))


def write_users(path: Path, ids: pa.ChunkedArray, rows: Tensor) -> None:
    """Write columns user and vector [D], a row group at a time.

    Args:
        rows: [U, D].
    """
    with _writer(path, "user", {}, {"vector": rows.shape[1]}) as writer:
        for start, stop in _groups(len(rows), rows.shape[1]):
            columns = [_texts(ids, start, stop), _vectors(rows[start:stop])]
            writer.write_batch(pa.record_batch(columns, schema=writer.schema))


def write_index(path: Path, rows: Tensor, bias: Tensor | None, similarity: str) -> None:
    """Write an exact FAISS index of the score vectors by inner product; position i is row i of items.parquet.

    Args: as for `write_items`.
    """
    import faiss  # optional extra, see `options.py`

    index = faiss.IndexFlatIP(rows.shape[1] + (bias is not None))
    for start, stop in _groups(len(rows), index.d):
        scored = score_vectors(rows[start:stop], None if bias is None else bias[start:stop], similarity)
        index.add(scored.contiguous().numpy())
    faiss.write_index(index, str(path))


def _writer(path: Path, id_name: str, others: dict[str, pa.DataType], vectors: dict[str, int]) -> pq.ParquetWriter:
    fields = [pa.field(id_name, pa.string(), nullable=False), *(pa.field(name, kind) for name, kind in others.items())]
    fields += [pa.field(name, pa.list_(pa.float32(), width), nullable=False) for name, width in vectors.items()]
    # Dictionaries and statistics do not pay off for floats: all differ, and nobody filters by their range.
    return pq.ParquetWriter(path, pa.schema(fields), use_dictionary=False, write_statistics=[id_name, *others])


def _groups(num_rows: int, width: int) -> Iterator[tuple[int, int]]:
    """Row ranges of the row groups, for fp32 vectors of total width `width`."""
    size = max(1, _GROUP_BYTES // (4 * width))
    return ((start, min(start + size, num_rows)) for start in range(0, num_rows, size))


def _texts(texts: pa.ChunkedArray, start: int, stop: int) -> pa.Array:
    return pa.concat_arrays(texts.slice(start, stop - start).chunks)


def _vectors(rows: Tensor) -> pa.FixedSizeListArray:
    return pa.FixedSizeListArray.from_arrays(pa.array(rows.contiguous().flatten().numpy()), rows.shape[1])
