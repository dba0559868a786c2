"""Documents: token sequences and their prediction targets."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cllm4rec_dist.corpus.ragged import Ragged


@dataclass(frozen=True)
class Documents:
    """n documents of one LLM, as ragged arrays with a row for each document.

    Attributes:
        tokens: token ids (`tokenizer.TokenSpace`).
        queries: positions in the document whose hidden states predict.
        target_query: for each target, the index of its query in the document's `queries`.
        targets: item rows or word ids.
        keys: int64 [n] seeds of the embedding dropout.
    """

    tokens: Ragged
    queries: Ragged
    target_query: Ragged
    targets: Ragged
    keys: np.ndarray

    def __len__(self) -> int:
        return len(self.tokens)
