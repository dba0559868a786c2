"""From corpus and step number to this rank's micro-batches.

A stage is data: which documents are made of a user's items. Texts come from a stream of their own, which goes on
through its epochs while users go through theirs, so that both LLMs are trained in lockstep.

A global batch is dealt out by tokens: every rank knows how long each of its documents will be, without making it. Its
longest documents are the first micro-batch of all ranks and its shortest ones the last, because attention is paid by
the length of a row, and rows are as long as the longest document in them. Within a micro-batch documents are shared out
over the ranks by the one rule of `packing.balance`: ranks wait for each other in every layer, so the longest part is
what a step costs.

Legend: n examples, A micro-batches of a rank, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.collate import MicroBatch, collate
from cllm4rec_dist.corpus.documents import Documents
from cllm4rec_dist.corpus.packing import balance
from cllm4rec_dist.corpus.prompts import PromptBuilder
from cllm4rec_dist.corpus.shards import Corpus, ShardSet
from cllm4rec_dist.corpus.stream import EpochSampler, Examples, WindowCache, batch_range, steps_per_epoch
from cllm4rec_dist.distributed.topology import World


@dataclass(frozen=True)
class StepBatch:
    """This rank's part of a global batch.

    Attributes:
        micro_batches: `gradient_accumulation_steps` of them, some perhaps without documents.
        epoch: pass over the users.
        users: rows of the users that were read.
        texts: epoch, record and index of the texts that were read.
    """

    micro_batches: list[MicroBatch]
    epoch: int
    users: list[int]
    texts: list[tuple[int, int, int]]


class _Stream(Protocol):
    """Examples of one LLM, and the documents that are made of them."""

    def read(self, step: int) -> Examples:
        """The global batch of a step, with what is drawn for each example; `num_tokens` is one of its columns."""

    def documents(self, examples: Examples) -> Documents:
        """Documents of some of these."""


class _Users:
    """The stream of users, and the documents that a stage makes of them."""

    def __init__(self, shards: ShardSet, prompts: PromptBuilder, config: RunConfig) -> None:
        self.sampler = EpochSampler(shards.record_sizes, config.seed, config.shuffle_window)
        self._data = WindowCache(shards, self.sampler, ["users"], ("train_offsets", "train_items"))
        self._batch_size, self._prompts, self._pretrains = config.batch.users, prompts, config.stage == "pretrain"

    def read(self, step: int) -> Examples:
        """The global batch of a step; it does not cross the end of an epoch."""
        examples = self.sampler.range(*batch_range(step, self.sampler.num_examples, self._batch_size))
        data = self._data.columns(examples)
        plan = self._prompts.plan_collaborative if self._pretrains else self._prompts.plan_recommendation
        return examples.with_columns(users=data["users"], **plan(data["users"], data["counts"], examples["epochs"]))

    def documents(self, examples: Examples) -> Documents:
        histories = self._data.lists(examples)
        if self._pretrains:
            return self._prompts.collaborative(examples["users"], histories, examples["keys"])
        return self._prompts.recommendation(examples["users"], histories, examples["keys"], examples["num_masked"])


class _Texts:
    """The stream of texts."""

    def __init__(self, shards: ShardSet, prompts: PromptBuilder, config: RunConfig) -> None:
        self._sampler = EpochSampler(shards.record_sizes, config.seed, config.shuffle_window)
        self._data = WindowCache(shards, self._sampler, ["kind", "users", "items"], ("offsets", "tokens"))
        self._batch_size, self._prompts = config.batch.texts, prompts

    def read(self, step: int) -> Examples:
        """The global batch of a step; it goes on into the next epoch."""
        examples = self._sampler.range(step * self._batch_size, (step + 1) * self._batch_size)
        data = self._data.columns(examples)
        counts = data.pop("counts")
        text_ids = (examples["records"] << 20) + examples["indexes"]
        plan = self._prompts.plan_content(data["kind"], counts, examples["epochs"], text_ids)
        return examples.with_columns(**data, **plan)

    def documents(self, examples: Examples) -> Documents:
        words = self._data.lists(examples)
        return self._prompts.content(examples["kind"], examples["users"], examples["items"], words, examples["keys"])


class BatchLoader:
    """This rank's part of every global batch.

    Args:
        corpus: interactions and content.
        prompts: makes documents.
        config: batch sizes, seed, window, stage.
        world: decides the part.

    Attributes:
        steps_per_epoch: optimizer steps in which every user comes once.
        has_texts: whether the content LLM has anything to read.
        num_users: users of an epoch.
        text_record_sizes: int64 [R] texts of each record; empty where no texts are read.
    """

    def __init__(self, corpus: Corpus, prompts: PromptBuilder, config: RunConfig, world: World) -> None:
        self._space, self._world, self._batch = prompts.space, world, config.batch
        users = _Users(corpus.interactions, prompts, config)
        self._streams: list[_Stream] = [users]
        self.has_texts = config.batch.texts > 0 and corpus.content.num_examples > 0
        if self.has_texts:
            self._streams.append(_Texts(corpus.content, prompts, config))
        self.num_users = users.sampler.num_examples
        self.text_record_sizes = corpus.content.record_sizes if self.has_texts else np.empty(0, np.int64)
        self.steps_per_epoch = steps_per_epoch(self.num_users, config.batch.users)

    def examples(self, step: int) -> list[list[Examples]]:
        """Of the users, and of the texts if there are any, what each micro-batch of this rank reads at a step.

        The one rule of who reads what: parts of about equally many tokens, users and texts together. It is a function
        of the global batch, of A and of W, so each example of the batch is in one part of one rank.
        """
        loads = np.zeros((self._batch.gradient_accumulation_steps, self._world.size), np.int64)
        found = []
        for stream in self._streams:
            whole = stream.read(step)
            num_tokens = whole["num_tokens"]
            mine = []
            for members, load in zip(_by_length(num_tokens, len(loads)), loads, strict=True):
                rank, _ = balance(num_tokens[members], self._world.size, load)
                np.add.at(load, rank, num_tokens[members])
                mine.append(whole.take(np.sort(members[rank == self._world.rank])))
            found.append(mine)
        return found

    def documents(self, parts: list[Examples]) -> list[Documents]:
        """Documents of a micro-batch: over items, and over words if there are texts.

        Args:
            parts: examples of each stream, as `examples` gives them.
        """
        return [stream.documents(part) for stream, part in zip(self._streams, parts, strict=True)]

    def describe(self, step: int) -> str:
        """Which examples a step reads on all ranks, for people."""
        start, stop = batch_range(step, self.num_users, self._batch.users)
        epoch, first = divmod(start, self.num_users)
        return f"epoch {epoch}, users at positions {first} to {first + stop - start - 1} of its order"

    def make(self, step: int) -> StepBatch:
        """What this rank reads at optimizer step `step`, and what it read it from. For one thread at a time."""
        users, *texts = self.examples(step)
        return StepBatch(
            micro_batches=[self._micro_batch([*parts]) for parts in zip(users, *texts, strict=True)],
            epoch=step // self.steps_per_epoch,
            users=Examples.concat(users)["users"].tolist(),
            texts=[text for parts in texts for text in _text_ids(Examples.concat(parts))],
        )

    def _micro_batch(self, parts: list[Examples]) -> MicroBatch:
        items, *texts = self.documents(parts)
        batch = collate(items, self._space, *texts)
        return batch.pin_memory() if self._world.device.type == "cuda" else batch


def _text_ids(texts: Examples) -> list[tuple[int, int, int]]:
    return [*zip(texts["epochs"].tolist(), texts["records"].tolist(), texts["indexes"].tolist(), strict=True)]


def _by_length(lengths: np.ndarray, num_parts: int) -> list[np.ndarray]:
    """Examples in parts of about equally many tokens, from the longest ones to the shortest."""
    order = np.argsort(-lengths, kind="stable")
    middle = np.cumsum(lengths[order]) - lengths[order] / 2
    cuts = np.searchsorted(middle, lengths.sum() * np.arange(1, num_parts) / num_parts)
    return np.split(order, cuts)
