"""Load this rank's micro-batches of an optimizer step.

The stage decides which documents are built from a user's items. Texts come from a separate stream with separate
epochs, so that both LLMs are trained at every step.

A global batch is split by tokens: every rank computes the length of each document without building it. The longest
documents are in the first micro-batch and the shortest in the last, because the cost of attention grows with the length
of a row, and a row is at least as long as its longest document. Within a micro-batch `packing.balance` distributes
documents over the ranks: ranks wait for each other in every layer, so the rank with the most tokens sets the step time.

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
        micro_batches: `gradient_accumulation_steps` of them; some may have no documents.
        epoch: epoch of the users.
        users: user rows in this part.
        texts: epoch, record and index of the texts in this part.
    """

    micro_batches: list[MicroBatch]
    epoch: int
    users: list[int]
    texts: list[tuple[int, int, int]]


class _Stream(Protocol):
    """Examples of one LLM, and their documents."""

    def read(self, step: int) -> Examples:
        """Read the global batch of a step, with each example's random draws and `num_tokens`."""

    def documents(self, examples: Examples) -> Documents:
        """Build the documents of some examples of a global batch."""


class _Users:
    """The stream of users, and the documents of a stage."""

    def __init__(self, shards: ShardSet, prompts: PromptBuilder, config: RunConfig) -> None:
        self.sampler = EpochSampler(shards.record_sizes, config.seed, config.shuffle_window)
        self._data = WindowCache(shards, self.sampler, ["users"], ("train_offsets", "train_items"))
        self._batch_size, self._prompts, self._pretrains = config.batch.users, prompts, config.stage == "pretrain"

    def read(self, step: int) -> Examples:
        """Read the global batch of a step; it ends at the end of an epoch."""
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
        """Read the global batch of a step; it may cross the end of an epoch."""
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
    """Loads this rank's part of every global batch.

    Args:
        corpus: interactions and content.
        prompts: builds documents.
        config: batch sizes, seed, shuffle window, stage.
        world: rank and number of ranks.

    Attributes:
        steps_per_epoch: optimizer steps of an epoch of users.
        has_texts: True if the content LLM is trained.
        num_users: users of an epoch.
        text_record_sizes: int64 [R] texts of each record; empty without texts.
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
        """Return this rank's examples of a step: for users, and for texts if there are any, a list of A micro-batches.

        Parts have about equally many tokens, users and texts together. They are a function of the global batch, A and
        W, so each example of the batch is in exactly one micro-batch of one rank.
        """
        loads = np.zeros((self._batch.gradient_accumulation_steps, self._world.size), np.int64)
        streams = []
        for stream in self._streams:
            batch = stream.read(step)
            num_tokens = batch["num_tokens"]
            micro_batches = []
            for members, load in zip(_by_length(num_tokens, len(loads)), loads, strict=True):
                rank, _ = balance(num_tokens[members], self._world.size, load)
                np.add.at(load, rank, num_tokens[members])
                micro_batches.append(batch.take(np.sort(members[rank == self._world.rank])))
            streams.append(micro_batches)
        return streams

    def documents(self, parts: list[Examples]) -> list[Documents]:
        """Build the documents of a micro-batch: over items, and over words if there are texts.

        Args:
            parts: examples of each stream, from `examples`.
        """
        return [stream.documents(part) for stream, part in zip(self._streams, parts, strict=True)]

    def describe(self, step: int) -> str:
        """Describe the users of a step on all ranks, for log lines and errors."""
        start, stop = batch_range(step, self.num_users, self._batch.users)
        epoch, first = divmod(start, self.num_users)
        return f"epoch {epoch}, users at positions {first} to {first + stop - start - 1} of its order"

    def make(self, step: int) -> StepBatch:
        """Make this rank's part of optimizer step `step`. Not safe to call from several threads at once."""
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
    """Split examples, longest first, into parts of about equally many tokens; each an index array."""
    order = np.argsort(-lengths, kind="stable")
    middle = np.cumsum(lengths[order]) - lengths[order] / 2
    cuts = np.searchsorted(middle, lengths.sum() * np.arange(1, num_parts) / num_parts)
    return np.split(order, cuts)
