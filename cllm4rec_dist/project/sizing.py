"""Choose model and batch sizes for the data and the machine.

The rules extrapolate from the runs in launch/configs/, which were tuned on 938 to 22,363 users; docs/first-run.md
describes them. All choices are in the files that `cllm4rec init` writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from cllm4rec_dist.project.machine import Machine

_FEW_CUSTOMERS = 200_000
"""Up to this number every user gets an embedding; beyond it, those with one or two items cost more than they teach."""
_MAX_LOST_FRACTION = 0.01
"""Largest fraction of the interactions that is left out with rare items."""
_BYTES_PER_ENTRY = 24
"""Bytes per entry of the embedding tables: two sets of fp32 rows, each with two moments."""
_MANY_INTERACTIONS = 20
"""Mean interactions of an item with which it needs nothing from items with the same words (docs/shared-words.md)."""
_MICRO_BATCH_TOKENS = 1 << 13
"""Maximum tokens of a micro-batch per 4 GiB of memory."""


@dataclass(frozen=True)
class DataStats:
    """Statistics of the data, after the rating filter.

    Attributes:
        users, items: number of distinct users and items.
        item_counts: int64 [items], users of each item.
        history_lengths: int64 [users], items of each user.
        num_texts, num_letters: number of texts, and of characters in them.
        is_estimate: True if only a part of the data was read.
        best_counts: int64 [users], users of the most popular item of each user; empty if unknown.
    """

    users: int
    items: int
    item_counts: np.ndarray
    history_lengths: np.ndarray
    num_texts: int = 0
    num_letters: int = 0
    is_estimate: bool = False
    best_counts: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))

    @property
    def interactions(self) -> int:
        """Number of distinct user-item pairs."""
        return int(self.item_counts.sum())

    def users_with(self, core: Core) -> int:
        """Return the number of users who keep an item after the rare ones are left out."""
        return int((self.best_counts >= core.min_item_users).sum()) if len(self.best_counts) else self.users


@dataclass(frozen=True)
class Core:
    """Least items of a user and least users of an item (k-core filter)."""

    min_user_items: int
    min_item_users: int


@dataclass(frozen=True)
class Sizes:
    """Sizes in the run files.

    Attributes:
        hidden_size, num_layers, num_heads, vocab_size: sizes of the small decoder.
        users, texts: users and texts per step.
        gradient_accumulation_steps: micro-batches per step.
        max_history: maximum items in a prompt.
        dropout: dropout of user and item embeddings.
        shares_words: items share updates through the words of their texts in the second stage.
        pretrain_epochs, finetune_epochs: passes over the users.
        patience: validations without improvement before early stopping.
        warmup_steps: warm-up of the learning rates; one epoch at most, so that a run of one epoch works.
        precision: fp32 or bf16.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    vocab_size: int
    users: int
    texts: int
    gradient_accumulation_steps: int
    max_history: int
    dropout: float
    shares_words: bool
    pretrain_epochs: int
    finetune_epochs: int
    patience: int
    warmup_steps: int
    precision: str


def choose_core(data: DataStats) -> Core:
    """Choose filters that keep (almost) all users, and all items except rare ones."""
    total = max(1, data.interactions)
    min_item_users = 1
    for least in (2, 3, 5):
        if data.item_counts[data.item_counts < least].sum() <= _MAX_LOST_FRACTION * total:
            min_item_users = least
    return Core(1 if data.users <= _FEW_CUSTOMERS else 3, min_item_users)


def choose_sizes(data: DataStats, machine: Machine) -> Sizes:
    """Choose sizes for the data that fit the machine."""
    has_gpu = bool(machine.gpu_memory)
    users = _power_of_two(data.users / 16, 16, 1024 if has_gpu else 256)
    steps = math.ceil(data.users / users)
    lengths = data.history_lengths
    max_history = next(size for size in (50, 100, 200, 400) if size >= min(np.percentile(lengths, 99), 400))
    pretrain_epochs = min(6, max(2, math.ceil(100 / steps)))
    finetune_epochs = min(40, max(14, math.ceil(900 / steps)))
    memory = min(machine.gpu_memory) if has_gpu else machine.memory
    num_tokens = users * (np.minimum(lengths, max_history).mean() + 10)
    return Sizes(
        hidden_size=_width(data, memory * max(1, len(machine.gpu_memory)), has_gpu=has_gpu),
        num_layers=2 if has_gpu else 1,
        num_heads=4,
        vocab_size=int(np.clip(round(8 * math.sqrt(data.num_letters), -2), 500, 16_000)),
        users=users,
        texts=_power_of_two(data.num_texts / steps, 8, 64) if data.num_texts else 0,
        gradient_accumulation_steps=_power_of_two(num_tokens / (_MICRO_BATCH_TOKENS * max(1, memory >> 32)), 1, 16),
        max_history=max_history,
        dropout=0.5 if lengths.mean() >= 20 else 0.7,
        shares_words=data.num_letters > 0 and data.interactions < _MANY_INTERACTIONS * data.items,
        pretrain_epochs=pretrain_epochs,
        finetune_epochs=finetune_epochs,
        patience=8 if steps < 40 else 3,
        warmup_steps=min(100, math.ceil(data.users_with(choose_core(data)) / users)),
        precision="bf16" if has_gpu else "fp32",
    )


def _width(data: DataStats, memory: int, *, has_gpu: bool) -> int:
    """Choose the hidden size of embeddings and decoder by the catalog's size, within half of the memory."""
    width = 128 if data.items < 1000 else 512 if has_gpu and data.items >= 100_000 else 256
    rows = data.users + data.items
    while width > 64 and rows * width * _BYTES_PER_ENTRY > memory / 2:
        width //= 2
    return width


def _power_of_two(value: float, least: int, most: int) -> int:
    """Round up to a power of two, within limits."""
    return min(most, max(least, 1 << max(0, math.ceil(math.log2(max(value, 1))))))
