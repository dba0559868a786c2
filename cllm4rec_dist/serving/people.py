"""People who get a list: users of the run and people who came later, each with a history.

Legend: n people.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np

from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.serving.known_ids import LATER_ORDERS, unknown_error
from cllm4rec_dist.serving.queries import first_of_each

KnownItems = Literal["all", "train"]


@dataclass(frozen=True)
class People:
    """n people in the order of their lists.

    Attributes:
        names: external ids.
        rows: int64 [n] user rows; -1 for people without one.
        histories: distinct items of each person, oldest first.
        unknown_items: unknown items of later orders, counted once per person.
        unknown_users: people without a row or an order, who were left out.
    """

    names: list[str]
    rows: np.ndarray
    histories: Ragged
    unknown_items: int
    unknown_users: list[str]


@dataclass(frozen=True)
class CorpusPeople:
    """Everyone in a corpus: users with rows, then the new users, whom the split holds out entirely.

    Attributes:
        names: external ids.
        num_known: number of users with rows; their positions are their rows.
        histories: distinct items of each, oldest first.
    """

    names: list[str]
    num_known: int
    histories: Ragged

    @classmethod
    def from_corpus(cls, corpus: Corpus, known_items: KnownItems = "all") -> CorpusPeople:
        """Read the people of a corpus.

        Args:
            known_items: items of a history: all, or only those from which evaluation predicts.
        """
        known, new = corpus.users()["user"].to_pylist(), corpus.new_users()["user"].to_pylist()
        if known_items == "train":
            parts = [corpus.split("train"), corpus.new_user_split("history")]
        else:
            parts = [corpus.history(), corpus.new_user_history()]
        return cls([*known, *new], len(known), Ragged.concat(parts) if new else parts[0])

    @cached_property
    def position_of(self) -> dict[str, int]:
        """Position by external id."""
        return {name: position for position, name in enumerate(self.names)}

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Return int64 user rows; -1 for people without one and for positions out of range."""
        return np.where(positions < self.num_known, positions, -1)


def gather_people(
    corpus: Corpus,
    users: Sequence[str] | None,
    orders: Mapping[str, Sequence[str]] | None,
    known_items: KnownItems = "all",
    *,
    skip_unknown: bool = False,
    new_items: Sequence[str] = (),
) -> People:
    """Collect the people to recommend for, with their histories.

    Args:
        users: external ids; duplicates count once. None for the users of `orders`, or everyone in the corpus if there
            are no orders.
        orders: later orders by user, oldest first. They are appended to the user's items in the corpus.
        known_items: corpus items of a history: all, or the training items only.
        skip_unknown: leave out people who are neither in the corpus nor in `orders` instead of raising.
        new_items: ids of items after those of the corpus, which orders may have.

    Raises:
        DataError: for people who are neither in the corpus nor in `orders`.
    """
    people = CorpusPeople.from_corpus(corpus, known_items)
    if users is None and orders is None:
        return People(people.names, people.rows(np.arange(len(people.names))), people.histories, 0, [])
    orders, position_of = orders or {}, people.position_of
    requested = list(dict.fromkeys(orders if users is None else users))
    unknown_users = [name for name in requested if name not in position_of and name not in orders]
    if unknown_users and not skip_unknown:
        raise unknown_error("users", unknown_users, people.names, "user", LATER_ORDERS)
    names = [name for name in requested if name in position_of or name in orders]
    outside = len(people.names)
    positions = np.array([position_of.get(name, outside) for name in names], dtype=np.int64)
    histories = _with_empty_row(people.histories).take(positions)
    later, unknown_items = _item_rows(corpus, new_items, [orders.get(name, ()) for name in names])
    return People(names, people.rows(positions), _distinct(histories, later), unknown_items, unknown_users)


def _with_empty_row(histories: Ragged) -> Ragged:
    """Append an empty row."""
    return Ragged(np.append(histories.offsets, histories.offsets[-1]), histories.values)


def _item_rows(
    corpus: Corpus, new_items: Sequence[str], orders: Sequence[Sequence[str]]
) -> tuple[list[list[int]], int]:
    """Item rows of orders, and the number of unknown items."""
    if not any(orders):
        return [[] for _ in orders], 0
    row_of = {name: row for row, name in enumerate([*corpus.items()["item"].to_pylist(), *new_items])}
    unknown = sum(len({item for item in each if item not in row_of}) for each in orders)
    return [[row_of[item] for item in each if item in row_of] for each in orders], unknown


def _distinct(histories: Ragged, later: Sequence[Sequence[int]]) -> Ragged:
    """Append later items to each history and keep the first occurrence of each item."""
    if not any(later):
        return histories
    return Ragged.from_lists([first_of_each([*histories[n].tolist(), *each]) for n, each in enumerate(later)])
