"""Documents: sequences of tokens, and what is predicted in them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cllm4rec_dist.corpus.ragged import Ragged


@dataclass(frozen=True)
class Documents:
    """n documents of one LLM, as lists laid end to end.

    Attributes:
        tokens: ids of the common id space.
        queries: positions in the document whose hidden states predict.
        target_query: for each target the index of its query in the document's `queries`.
        targets: item rows, or word ids.
        keys: int64 [n] seeds of the dropout of embeddings.
    """

    tokens: Ragged
    queries: Ragged
    target_query: Ragged
    targets: Ragged
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)
