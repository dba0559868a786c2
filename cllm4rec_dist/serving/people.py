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
        names = _names(corpus)
        known, new = _histories(corpus, known_items), _new_histories(corpus, known_items)
        return cls(names, corpus.num_users, Ragged.concat([known, new]) if len(new) else known)

    @cached_property
    def position_of(self) -> dict[str, int]:
        """Position by external id."""
        return {name: position for position, name in enumerate(self.names)}

    def rows(self, positions: np.ndarray) -> np.ndarray:
        """Return int64 user rows; -1 for people without one and for positions out of range."""
        return np.where(positions < self.num_known, positions, -1)


def _names(corpus: Corpus) -> list[str]:
    """External ids of the users with rows, then of the new users."""
    return [*corpus.ids("users")["user"].to_pylist(), *corpus.new_users()["user"].to_pylist()]


def _histories(corpus: Corpus, known_items: KnownItems, rows: np.ndarray | None = None) -> Ragged:
    """Histories of the users with these rows, or of all users with rows."""
    return corpus.split("train", rows) if known_items == "train" else corpus.history(rows)


def _new_histories(corpus: Corpus, known_items: KnownItems) -> Ragged:
    """Histories of the new users."""
    return corpus.new_user_split("history") if known_items == "train" else corpus.new_user_history()


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
    if users is None and orders is None:
        everyone = CorpusPeople.from_corpus(corpus, known_items)
        return People(everyone.names, everyone.rows(np.arange(len(everyone.names))), everyone.histories, 0, [])
    all_names = _names(corpus)
    position_of = {name: position for position, name in enumerate(all_names)}
    orders = orders or {}
    requested = list(dict.fromkeys(orders if users is None else users))
    unknown_users = [name for name in requested if name not in position_of and name not in orders]
    if unknown_users and not skip_unknown:
        raise unknown_error("users", unknown_users, all_names, "user", LATER_ORDERS)
    names = [name for name in requested if name in position_of or name in orders]
    positions = np.array([position_of.get(name, len(all_names)) for name in names], dtype=np.int64)
    histories = _histories_at(corpus, known_items, positions)
    later, unknown_items = _item_rows(corpus, new_items, [orders.get(name, ()) for name in names])
    rows = np.where(positions < corpus.num_users, positions, -1)
    return People(names, rows, _distinct(histories, later), unknown_items, unknown_users)


def _histories_at(corpus: Corpus, known_items: KnownItems, positions: np.ndarray) -> Ragged:
    """Read the histories of people at positions of `_names`; empty ones for larger positions."""
    is_known = positions < corpus.num_users
    known = _histories(corpus, known_items, positions[is_known])
    new = _new_histories(corpus, known_items)
    histories = Ragged.concat([known, new, Ragged.from_lists([[]])])
    index = np.minimum(positions - corpus.num_users, len(new)) + len(known)
    index[is_known] = np.arange(len(known))
    return histories.take(index)


def _item_rows(
    corpus: Corpus, new_items: Sequence[str], orders: Sequence[Sequence[str]]
) -> tuple[list[list[int]], int]:
    """Item rows of orders, and the number of unknown items."""
    if not any(orders):
        return [[] for _ in orders], 0
    row_of = {name: row for row, name in enumerate([*corpus.ids("items")["item"].to_pylist(), *new_items])}
    unknown = sum(len({item for item in each if item not in row_of}) for each in orders)
    return [[row_of[item] for item in each if item in row_of] for each in orders], unknown


def _distinct(histories: Ragged, later: Sequence[Sequence[int]]) -> Ragged:
    """Append later items to each history and keep the first occurrence of each item."""
    if not any(later):
        return histories
    return Ragged.from_lists([first_of_each([*histories[n].tolist(), *each]) for n, each in enumerate(later)])
