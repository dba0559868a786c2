"""How large a model and its batches should be for some data on some machine.

The rule follows the runs in launch/configs/, which were tuned on 938 to 22,363 users, and grows from there; it is
written out in docs/first-run.md. Everything that it chooses is in the files that `cllm4rec init` writes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np

from cllm4rec_dist.project.machine import Machine

_FEW_CUSTOMERS = 200_000
"""Up to so many, everyone gets a row; beyond, those with one or two items cost more than they teach."""
_LOST_SHARE = 0.01
"""Share of the interactions that rare items may cost."""
_BYTES_PER_ENTRY = 24
"""Of the tables: two sets of fp32 rows, each with two moments."""
_PLACES = 1 << 13
"""Tokens of a micro-batch for each 4 GiB of memory, at most."""


@dataclass(frozen=True)
class Numbers:
    """Size of the data, after ratings are filtered.

    Attributes:
        users, items: distinct ones in the interactions.
        item_counts: int64, users of each item.
        history_lengths: int64, items of each user.
        num_texts, num_letters: texts about users and items, and letters in them.
        is_estimate: from a part of the data.
        best_counts: int64, users of the most popular item of each user; empty where unknown.
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
        """Of a user with an item, each pair once."""
        return int(self.item_counts.sum())

    def users_with(self, core: Core) -> int:
        """Users who keep an item once the rare ones are left out."""
        return int((self.best_counts >= core.min_item_users).sum()) if len(self.best_counts) else self.users


@dataclass(frozen=True)
class Core:
    """Fewest items of a user and fewest users of an item."""

    min_user_items: int
    min_item_users: int


@dataclass(frozen=True)
class Sizes:
    """What the run files say.

    Attributes:
        hidden_size, num_layers, num_heads, vocab_size: of the small decoder.
        users, texts: of a step.
        gradient_accumulation_steps: micro-batches of a step.
        max_history: items in a prompt.
        dropout: of user and item embeddings.
        pretrain_epochs, finetune_epochs, patience: passes over the users, and validations without a better one.
        warmup_steps: of the learning rates; one epoch of the corpus at most, so that a run of one can be tried.
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
    pretrain_epochs: int
    finetune_epochs: int
    patience: int
    warmup_steps: int
    precision: str


def choose_core(numbers: Numbers) -> Core:
    """Everyone who bought something, and every item but those that hardly anybody bought."""
    total = max(1, numbers.interactions)
    fewest = 1
    for least in (2, 3, 5):
        if numbers.item_counts[numbers.item_counts < least].sum() <= _LOST_SHARE * total:
            fewest = least
    return Core(1 if numbers.users <= _FEW_CUSTOMERS else 3, fewest)


def choose_sizes(numbers: Numbers, machine: Machine) -> Sizes:
    """Sizes for the data that fit the machine."""
    has_gpu = bool(machine.gpu_memory)
    users = _power_of_two(numbers.users / 16, 16, 1024 if has_gpu else 256)
    steps = math.ceil(numbers.users / users)
    lengths = numbers.history_lengths
    max_history = next(size for size in (50, 100, 200, 400) if size >= min(np.percentile(lengths, 99), 400))
    pretrain_epochs = min(6, max(2, math.ceil(100 / steps)))
    finetune_epochs = min(40, max(14, math.ceil(900 / steps)))
    memory = min(machine.gpu_memory) if has_gpu else machine.memory
    places = users * (np.minimum(lengths, max_history).mean() + 10)
    return Sizes(
        hidden_size=_width(numbers, memory * max(1, len(machine.gpu_memory)), has_gpu=has_gpu),
        num_layers=2 if has_gpu else 1,
        num_heads=4,
        vocab_size=int(np.clip(round(8 * math.sqrt(numbers.num_letters), -2), 500, 16_000)),
        users=users,
        texts=_power_of_two(numbers.num_texts / steps, 8, 64) if numbers.num_texts else 0,
        gradient_accumulation_steps=_power_of_two(places / (_PLACES * max(1, memory >> 32)), 1, 16),
        max_history=max_history,
        dropout=0.5 if lengths.mean() >= 20 else 0.7,
        pretrain_epochs=pretrain_epochs,
        finetune_epochs=finetune_epochs,
        patience=8 if steps < 40 else 3,
        warmup_steps=min(100, math.ceil(numbers.users_with(choose_core(numbers)) / users)),
        precision="bf16" if has_gpu else "fp32",
    )


def _width(numbers: Numbers, memory: int, *, has_gpu: bool) -> int:
    """Of embeddings and decoder: as wide as the catalog deserves, and as half of the memory holds."""
    wanted = 128 if numbers.items < 1000 else 512 if has_gpu and numbers.items >= 100_000 else 256
    rows = numbers.users + numbers.items
    while wanted > 64 and rows * wanted * _BYTES_PER_ENTRY > memory / 2:
        wanted //= 2
    return wanted


def _power_of_two(value: float, least: int, most: int) -> int:
    """The next power of two from `value` on, within limits."""
    return min(most, max(least, 1 << max(0, math.ceil(math.log2(max(value, 1))))))
