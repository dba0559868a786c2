"""From corpus and step number to this rank's micro-batches.

A stage is data: which documents are made of a user's items. Texts come from a stream of their own, which goes on
through its epochs while users go through theirs, so that both LLMs are trained in lockstep.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.packing import balance
from cllm4rec_dist.corpus.prompts import Composer, Document, DocumentBatch, collate_groups
from cllm4rec_dist.corpus.shards import Corpus, ShardSet
from cllm4rec_dist.corpus.stream import EpochOrder, Example, RecordCache, batch_range, steps_per_epoch
from cllm4rec_dist.topology import World


@dataclass(frozen=True)
class MicroBatch:
    """What one engine forward reads: documents over items, and documents over words (None without content LLM).

    The rows of both have one length.
    """

    items: DocumentBatch
    words: DocumentBatch | None = None

    def to(self, device: torch.device) -> MicroBatch:
        """The same batch on `device`."""
        return MicroBatch(self.items.to(device), None if self.words is None else self.words.to(device))


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of a global batch.

    Attributes:
        micro_batches: `accumulation` of them, some perhaps without documents.
        epoch: pass over the users.
        users: rows of the users that were read, in the order of the stream.
        texts: record and index of the texts that were read, in the order of the stream.
    """

    micro_batches: list[MicroBatch]
    epoch: int
    users: list[int]
    texts: list[tuple[int, int]]


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
        num_users: users of an epoch.
        text_record_sizes: int64 [R] texts of each record; empty where no texts are read.
    """

    def __init__(self, corpus: Corpus, composer: Composer, config: RunConfig, world: World) -> None:
        self._composer, self._world, self._batch = composer, world, config.batch
        self._document: Callable[[int, np.ndarray, int], Document] = (
            composer.collaborative if config.stage == "pretrain" else composer.recommendation
        )
        self._users = self._stream(corpus.interactions, config)
        self.has_texts = config.batch.texts > 0 and corpus.content.num_examples > 0
        self._texts = self._stream(corpus.content, config) if self.has_texts else None
        self.num_users = self._users[0].num_examples
        self.text_record_sizes = corpus.content.record_sizes if self.has_texts else np.empty(0, np.int64)
        self.steps_per_epoch = steps_per_epoch(self.num_users, config.batch.users)

    @staticmethod
    def _stream(shards: ShardSet, config: RunConfig) -> tuple[EpochOrder, RecordCache]:
        window = config.shuffle_records
        return EpochOrder(shards.record_sizes, config.seed, window), RecordCache(shards, 2 * window)

    def examples(self, step: int) -> tuple[list[Example], list[Example]]:
        """The users and the texts that this rank reads at optimizer step `step`: the one rule of who reads what."""
        order, _ = self._users
        users = order.range(*self._world.share(*batch_range(step, self.num_users, self._batch.users)))
        if self._texts is None:
            return users, []
        start = step * self._batch.texts
        return users, self._texts[0].range(*self._world.share(start, start + self._batch.texts))

    def documents(self, step: int) -> tuple[list[Document], list[Document]]:
        """This rank's documents over items and over words of optimizer step `step`."""
        return self._compose(*self.examples(step))

    def describe(self, step: int) -> str:
        """Which examples a step reads on all ranks, for people."""
        start, stop = batch_range(step, self.num_users, self._batch.users)
        epoch, first = divmod(start, self.num_users)
        return f"epoch {epoch}, users at positions {first} to {first + stop - start - 1} of its order"

    def make(self, step: int) -> StepBatch:
        """What this rank reads at optimizer step `step`, and what it read it from. For one thread at a time."""
        users, texts = self.examples(step)
        items, words = self._compose(users, texts)
        groups = [self._split(items), self._split(words)] if self.has_texts else [self._split(items)]
        return StepBatch(
            [MicroBatch(*collate_groups(parts, self._composer.space)) for parts in zip(*groups, strict=True)],
            step // self.steps_per_epoch,
            [self._user_row(example) for example in users],
            [(example.record, example.index) for example in texts],
        )

    def _compose(self, users: list[Example], texts: list[Example]) -> tuple[list[Document], list[Document]]:
        return [self._user_document(e) for e in users], [self._text_document(e) for e in texts]

    def _split(self, documents: list[Document]) -> list[list[Document]]:
        """Micro-batches of about equally many tokens. Sums do not depend on the split."""
        lengths = np.array([len(document.token_ids) for document in documents], dtype=np.int64)
        part, _ = balance(lengths, self._batch.accumulation)
        members = [np.flatnonzero(part == number) for number in range(self._batch.accumulation)]
        return [[documents[n] for n in numbers] for numbers in members]

    def _user_row(self, example: Example) -> int:
        return int(self._users[1][example.record]["users"][example.index])

    def _user_document(self, example: Example) -> Document:
        record = self._users[1][example.record]
        start, stop = record["train_offsets"][example.index : example.index + 2]
        return self._document(self._user_row(example), record["train_items"][start:stop], example.epoch)

    def _text_document(self, example: Example) -> Document:
        assert self._texts is not None
        record, i = self._texts[1][example.record], example.index
        start, stop = record["offsets"][i : i + 2]
        words = record["tokens"][start:stop]
        unique = (example.record << 20) + i
        return self._composer.content(
            int(record["kind"][i]), int(record["users"][i]), int(record["items"][i]), words, example.epoch, unique
        )
