"""Updates that items share through the words of their texts.

An item's row is taken to be the sum of a part of its own and of its words' parts, as in a factorization machine with
item features (LightFM, Kula 2015):

    row_i = own_i + sum over w of T_iw part_w,     T the TF-IDF of `item_features.py`

Both kinds of parts are trained by Adam, so that what an item learns moves the items with the same words too: most of a
catalog has few interactions of its own. Only the sum is stored, since the forward needs no more. A step adds Adam's
update of the words, whose gradient is T^T G, to the rows through T; beside T only the moments of the words are kept.

Legend: n items of this rank, V words that at least two items have, d width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
import torch
from torch import Tensor

from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.distributed.collectives import all_reduce_in_place, all_reduce_sum
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.item_features import local_tfidf, to_sparse_csr

MAX_WORDS = 1 << 14
"""Words that are shared at most, the most frequent ones: their moments are on every rank."""


@dataclass(frozen=True)
class SharedWords:
    """This rank's rows of T, by which items share updates.

    Attributes:
        weights: CSR [n, V] fp32.
        transposed: CSR [V, n], its transpose.
        lr_ratio: learning rate of the words' parts relative to that of the rows.
        world: the ranks that together hold the items.
    """

    weights: Tensor
    transposed: Tensor
    lr_ratio: float
    world: World

    @property
    def num_words(self) -> int:
        """V."""
        return self.weights.shape[1]

    def gradient(self, gradient: Tensor) -> Tensor:
        """Gradient of the words' parts from that of this rank's rows: [n, d] -> [V, d]. All-reduces it."""
        total = self.transposed @ gradient
        all_reduce_in_place(total, self.world, "gradients of shared words")
        return total

    def add_update(self, rows: Tensor, update: Tensor) -> None:
        """Add the words' update [V, d] to this rank's rows [n, d] in place. No collective."""
        rows.addmm_(self.weights, update)


def load_shared_words(
    corpus: Corpus, num_words: int, partition: RowPartition, world: World, lr_ratio: float
) -> SharedWords | None:
    """Read the words of the items' texts; None if no two items have one in common. Collective.

    Args:
        num_words: words of the backbone.
        partition: of the items.
    """
    weights = local_item_words(corpus, num_words, partition, world)
    if weights.shape[1] == 0:
        return None
    return SharedWords(to_sparse_csr(weights, world), to_sparse_csr(weights.T.tocsr(), world), lr_ratio, world)


def local_item_words(corpus: Corpus, num_words: int, partition: RowPartition, world: World) -> sp.csr_matrix:
    """This rank's rows of T, [n, V] fp32. Collective."""
    tfidf = local_tfidf(corpus, num_words, partition, world)
    local = torch.from_numpy(np.bincount(tfidf.indices, minlength=num_words)).to(world.device)
    num_items = all_reduce_sum(local, world, "items of each word").cpu().numpy()
    frequent = np.argsort(-num_items, kind="stable")[:MAX_WORDS]
    return tfidf[:, np.sort(frequent[num_items[frequent] > 1])]
