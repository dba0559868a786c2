"""What models read of a corpus: texts of its items, and interactions as a matrix."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import scipy.sparse as sp

from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.shards import Corpus


def item_texts(corpus: Corpus) -> list[str]:
    """Title and description of each item."""
    return texts_of_table(corpus.items())


def texts_of_table(items: pa.Table) -> list[str]:
    """Like `item_texts`, from the table of the items."""
    titles, descriptions = items["title"].to_pylist(), items["description"].to_pylist()
    return [
        f"{title or ''} {description or ''}".strip() for title, description in zip(titles, descriptions, strict=True)
    ]


def interaction_matrix(lists: Ragged, num_items: int) -> sp.csr_matrix:
    """Binary matrix [n, I] of n users' items, fp32."""
    ones = np.ones(len(lists.values), dtype=np.float32)
    return sp.csr_matrix((ones, lists.values, lists.offsets), shape=(len(lists), num_items))
