"""Items without training interactions in a trained system: which they are, and their rows from texts.

Training only pushes the rows of such items away from everybody's queries, so they are replaced when a run is loaded.
This happens in corpora that have such items on purpose: new items, or a split of kind `cold_items`.

Legend: I items.
"""

from __future__ import annotations

import logging

import numpy as np
import torch
from torch import Tensor

from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model.text_rows import fit_text_rows
from cllm4rec_dist.system import InferenceSystem, item_texts

logger = logging.getLogger(__name__)


def training_counts(corpus: Corpus) -> np.ndarray:
    """Return the number of training interactions of each item, int64 [I]."""
    return np.bincount(corpus.split("train").values, minlength=corpus.num_items)


def fill_cold_rows(system: InferenceSystem) -> None:
    """Replace rows and biases of items without training interactions by those of their texts. Collective.

    Only in a corpus with such items on purpose (`Manifest.has_cold_items`).
    """
    model = system.recommender
    first, _ = model.item_partition.range(system.world.rank)
    items = model.collaborative.items.local_rows
    fill_rows(system.corpus, items, model.head.local_bias, first, system.world)


@torch.no_grad()
def fill_rows(corpus: Corpus, local_rows: Tensor, local_bias: Tensor | None, first: int, world: World) -> None:
    """Like `fill_cold_rows`, in place for a block of item rows [local items, D] and biases [local items, 1].

    Args:
        first: item of the first local row.
    """
    counts = training_counts(corpus) if corpus.manifest.has_cold_items else np.ones(1, np.int64)
    if counts.all():
        return
    texts = item_texts(corpus)
    rows_of = fit_text_rows(texts, counts, local_rows, local_bias, first, world)
    if rows_of is None:
        return
    local = np.flatnonzero(counts[first : first + len(local_rows)] == 0)
    rows = rows_of([texts[first + index] for index in local])
    has_row = rows.norm(dim=1) > 0
    index = torch.from_numpy(local)[has_row].to(local_rows.device)
    local_rows[index] = rows[has_row].to(local_rows)
    if local_bias is not None:
        local_bias[index] = rows_of.bias
    logger.info("rows of %s items without training interactions come from their texts", f"{int((counts == 0).sum()):,}")
