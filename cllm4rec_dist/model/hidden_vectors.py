"""Dense vectors of the items' texts from the frozen backbone: mean hidden states after its middle layer.

Every rank has the texts of its items, packed like any other documents; all run the backbone together.

Legend: n items of this rank, D width, R rows of L packed positions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from cllm4rec_dist.corpus.packing import pack
from cllm4rec_dist.corpus.ragged import Ragged, ranges
from cllm4rec_dist.corpus.shards import ContentKind, Corpus
from cllm4rec_dist.distributed.collectives import gather_integers
from cllm4rec_dist.distributed.topology import RowPartition, World
from cllm4rec_dist.model.item_features import join_parts, records_of, send_to_owners

_BATCH_TOKENS = 8192
_MAX_TOKENS = 1 << 24
"""More than any text has."""

Encode = Callable[[Tensor, Tensor], Tensor]
"""Maps word ids and positions of packed documents, int64 [R, L], to hidden states [R, L, D]; a collective."""


@contextmanager
def recorded_output(layer: nn.Module) -> Iterator[list[Tensor]]:
    """Record the hidden states that a decoder layer returns, in a list."""
    outputs: list[Tensor] = []

    def record(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> None:
        outputs.append(output[0] if isinstance(output, tuple) else output)

    handle = layer.register_forward_hook(record)
    try:
        yield outputs
    finally:
        handle.remove()


def local_item_texts(corpus: Corpus, partition: RowPartition, world: World) -> Ragged:
    """Word ids of this rank's items, n rows: title, then description, cut to the length that the corpus allows a text.

    Exchanges the texts.
    """
    kinds = ContentKind.ITEM_TITLE, ContentKind.ITEM_DESCRIPTION
    items, positions, words = [], [], []
    for index in records_of(corpus.content, world):
        record = corpus.content.read_record(index)
        texts = Ragged(record["offsets"].astype(np.int64), record["tokens"])
        for order, kind in enumerate(kinds):
            rows = np.flatnonzero(record["kind"] == kind)
            selected = texts.take(rows)
            items.append(np.repeat(record["items"][rows], selected.lengths))
            positions.append(order * _MAX_TOKENS + ranges(np.zeros_like(selected.lengths), selected.lengths))
            words.append(selected.values)
    entries = join_parts(items), join_parts(positions), join_parts(words)
    rows, position, word = send_to_owners(entries, partition, world)
    by_text = np.lexsort((position, rows))
    lengths = np.bincount(rows, minlength=partition.num_local(world.rank))
    texts = Ragged.from_lengths(lengths, word[by_text].astype(np.int64))
    kept = np.minimum(texts.lengths, corpus.manifest.preparation.max_text_tokens)
    return Ragged.from_lengths(kept, texts.values[ranges(texts.offsets[:-1], kept)])


def mean_hidden_states(texts: Ragged, width: int, encode: Encode, world: World) -> Tensor:
    """Mean hidden state of each text, [n, D] fp32; zero for an empty one.

    Ranks may have different numbers of texts; every rank calls `encode` equally often.
    """
    batches = [*_batches(texts.lengths)]
    num_batches = max(count for (count,) in gather_integers([len(batches)], world, what="batches of texts"))
    means = torch.zeros(len(texts), width, device=world.device)
    for rows in batches + [np.empty(0, np.int64)] * (num_batches - len(batches)):
        batch = texts.take(rows)
        (num_rows, length), (starts, _), _ = pack(batch.lengths, np.empty(0, np.int64))
        words, positions = np.zeros((2, num_rows * length), np.int64)
        at = ranges(starts, batch.lengths)
        words[at], positions[at] = batch.values, ranges(np.zeros_like(starts), batch.lengths)
        packed = (torch.from_numpy(x.reshape(num_rows, length)).to(world.device) for x in (words, positions))
        hidden = encode(*packed).flatten(0, 1).float()
        document = torch.from_numpy(np.repeat(rows, batch.lengths)).to(world.device)
        means.index_add_(0, document, hidden[torch.from_numpy(at).to(world.device)])
    lengths = torch.from_numpy(texts.lengths).to(means)
    return means / lengths.clamp_min(1)[:, None]


def _batches(lengths: np.ndarray) -> Iterator[np.ndarray]:
    """Split the texts that are not empty, the longest first, into batches of about `_BATCH_TOKENS` tokens."""
    order = np.argsort(-lengths, kind="stable")[: np.count_nonzero(lengths)]
    batch = np.cumsum(lengths[order]) // _BATCH_TOKENS
    return (part for part in np.split(order, np.flatnonzero(np.diff(batch)) + 1) if len(part))
