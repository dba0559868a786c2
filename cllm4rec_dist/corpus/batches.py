"""From corpus and step number to this rank's micro-batches.

A stage is data: which documents are made of a user's items. Texts come from a stream of their own, which goes on
through its epochs while users go through theirs, so that both LLMs are trained in lockstep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.prompts import Composer, Document, DocumentBatch, collate
from cllm4rec_dist.corpus.shards import Corpus, ShardSet
from cllm4rec_dist.corpus.stream import EpochOrder, Example, RecordCache, batch_range, steps_per_epoch
from cllm4rec_dist.topology import World


@dataclass(frozen=True)
class MicroBatch:
    """What one engine forward reads: documents over items, and documents over words (None without content LLM)."""

    items: DocumentBatch
    words: DocumentBatch | None

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on `device`."""
        return MicroBatch(self.items.to(device), None if self.words is None else self.words.to(device))


class BatchSource:
    """This rank's part of every global batch.

    Args:
        corpus: interactions and content.
        composer: makes documents.
        config: batch sizes, seed, window, stage.
        world: decides the part.

    Attributes:
        steps_per_epoch: optimizer steps in which every user comes once.
        has_texts: whether the content LLM has anything to read.
    """

    def __init__(self, corpus: Corpus, composer: Composer, config: RunConfig, world: World) -> None:
        self._composer, self._world, self._batch = composer, world, config.batch
        self._document: Callable[[int, np.ndarray, int], Document] = (
            composer.collaborative if config.stage == "pretrain" else composer.recommendation
        )
        self._users = self._stream(corpus.interactions, config)
        self.has_texts = config.batch.texts > 0 and corpus.content.num_examples > 0
        self._texts = self._stream(corpus.content, config) if self.has_texts else None
        self.steps_per_epoch = steps_per_epoch(self._users[0].num_examples, config.batch.users)

    @staticmethod
    def _stream(shards: ShardSet, config: RunConfig) -> tuple[EpochOrder, RecordCache]:
        window = config.shuffle_records
        return EpochOrder(shards.record_sizes, config.seed, window), RecordCache(shards, 2 * window)

    def documents(self, step: int) -> tuple[list[Document], list[Document]]:
        """This rank's documents over items and over words of optimizer step `step`."""
        order, _ = self._users
        start, stop = batch_range(step, order.num_examples, self._batch.users)
        items = [self._user_document(example) for example in order.range(*self._world.share(start, stop))]
        if self._texts is None:
            return items, []
        start = step * self._batch.texts
        examples = self._texts[0].range(*self._world.share(start, start + self._batch.texts))
        return items, [self._text_document(example) for example in examples]

    def describe(self, step: int) -> str:
        """Which examples a step reads on all ranks, for people."""
        start, stop = batch_range(step, self._users[0].num_examples, self._batch.users)
        epoch, first = divmod(start, self._users[0].num_examples)
        return f"epoch {epoch}, users at positions {first} to {first + stop - start - 1} of its order"

    def make(self, step: int) -> list[MicroBatch]:
        """The same as `accumulation` micro-batches, some perhaps without documents."""
        items, words = self.documents(step)
        content: list[DocumentBatch] | list[None] = (
            self._split(words) if self.has_texts else [None] * self._batch.accumulation
        )
        return [MicroBatch(i, w) for i, w in zip(self._split(items), content, strict=True)]

    def _split(self, documents: list[Document]) -> list[DocumentBatch]:
        """Micro-batches of documents of like length, so that little is padded. Sums do not depend on the split."""
        documents.sort(key=lambda document: len(document.token_ids))
        parts = self._batch.accumulation
        bounds = [len(documents) * part // parts for part in range(parts + 1)]
        return [collate(documents[a:b], self._composer.space) for a, b in pairwise(bounds)]

    def _user_document(self, example: Example) -> Document:
        record = self._users[1][example.record]
        start, stop = record["train_offsets"][example.index : example.index + 2]
        return self._document(int(record["users"][example.index]), record["train_items"][start:stop], example.epoch)

    def _text_document(self, example: Example) -> Document:
        assert self._texts is not None
        record, i = self._texts[1][example.record], example.index
        start, stop = record["offsets"][i : i + 2]
        words = record["tokens"][start:stop]
        unique = (example.record << 20) + i
        return self._composer.content(
            int(record["kind"][i]), int(record["users"][i]), int(record["items"][i]), words, example.epoch, unique
        )
