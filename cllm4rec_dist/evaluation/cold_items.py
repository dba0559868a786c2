"""Items without training interactions in a trained system: which they are, and their rows from texts.

Training only pushes the rows of such items away from everybody's queries, so they are replaced when a run is loaded,
and while a run is validated. This happens in corpora that have such items on purpose: new items, or a split of kind
`cold_items`.

Legend: I items.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.views import item_texts
from cllm4rec_dist.distributed.collectives import all_reduce_sum
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model.text_rows import DEFAULT_OFFSET, fit_text_rows
from cllm4rec_dist.system import InferenceSystem

logger = logging.getLogger(__name__)


def fill_cold_rows(system: InferenceSystem) -> None:
    """Replace rows and biases of items without training interactions by those of their texts. Collective.

    Only in a corpus with such items on purpose (`Manifest.has_cold_items`).
    """
    if not system.corpus.manifest.has_cold_items:
        return
    num_filled = int(_fill(system, system.corpus.training_counts()).sum())
    if num_filled:
        offset = system.config.head.new_item_offset
        logger.info(
            "rows of %s new items, without training interactions, come from their texts; offset of their bias: %g",
            f"{num_filled:,}",
            DEFAULT_OFFSET if offset is None else offset,
        )


@contextmanager
def cold_rows_filled(system: InferenceSystem) -> Iterator[np.ndarray]:
    """Fill the rows of cold items within the context; then the trained rows are back, bit for bit. Collective.

    Yields bool [I], the items that are filled: cold ones with a known word.
    """
    if not system.corpus.manifest.has_cold_items:
        yield np.zeros(system.corpus.num_items, bool)
        return
    model, counts = system.recommender, system.corpus.training_counts()
    first, last = model.item_partition.range(model.world.rank)
    cold = torch.from_numpy(np.flatnonzero(counts[first:last] == 0)).to(system.world.device)
    bias = model.head.local_bias
    filled = [model.collaborative.items.local_rows.detach(), *([] if bias is None else [bias.detach()])]
    trained = [values[cold] for values in filled]
    try:
        yield _fill(system, counts)
    finally:
        for values, before in zip(filled, trained, strict=True):
            values[cold] = before


def _fill(system: InferenceSystem, counts: np.ndarray) -> np.ndarray:
    model = system.recommender
    first, _ = model.item_partition.range(model.world.rank)
    rows, bias = model.collaborative.items.local_rows, model.head.local_bias
    return fill_rows(system.corpus, counts, rows, bias, first, model.world, system.config.head.new_item_offset)


@torch.no_grad()
def fill_rows(
    corpus: Corpus,
    counts: np.ndarray,
    local_rows: Tensor,
    local_bias: Tensor | None,
    first: int,
    world: World,
    offset: float | None,
) -> np.ndarray:
    """Replace rows [local items, D] and biases [local items, 1] of cold items, in place. Collective.

    Args:
        counts: training interactions of each item, int64 [I].
        first: item of the first local row.
        offset: `head.new_item_offset`.

    Returns:
        bool [I], the items of all ranks that are filled: cold ones with a known word.
    """
    is_filled = np.zeros(len(counts), bool)
    if counts.all():
        return is_filled
    texts = item_texts(corpus)
    rows_of = fit_text_rows(texts, counts, local_rows, local_bias, first, world, offset)
    if rows_of is None:
        return is_filled
    local = np.flatnonzero(counts[first : first + len(local_rows)] == 0)
    rows = rows_of([texts[first + index] for index in local])
    has_row = rows.norm(dim=1) > 0
    index = torch.from_numpy(local)[has_row].to(local_rows.device)
    local_rows[index] = rows[has_row].to(local_rows)
    if local_bias is not None:
        local_bias[index] = rows_of.bias
    is_filled[local[has_row.numpy()] + first] = True
    of_all = all_reduce_sum(torch.from_numpy(is_filled.astype(np.float32)).to(world.device), world, "filled items")
    return of_all.cpu().numpy() > 0
