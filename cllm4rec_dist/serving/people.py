"""Who gets a list: users of the run, people who came later, and what each of them has had.

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
        histories: n rows of distinct items, oldest first.
        unknown_items: items of later orders that the run does not know, counted once a person.
        unknown_users: people of whom nothing is known, who were left out.
    """

    names: list[str]
    rows: np.ndarray
    histories: Ragged
    unknown_items: int
    unknown_users: list[str]


@dataclass(frozen=True)
class CorpusPeople:
    """Everyone in a corpus: the users with rows, and behind them the new users, whom a split holds out whole.

    Attributes:
        names: external ids.
        num_known: how many have rows; their positions are these.
        histories: distinct items of each, oldest first.
    """

    names: list[str]
    num_known: int
    histories: Ragged

    @classmethod
    def of(cls, corpus: Corpus, known_items: KnownItems = "all") -> CorpusPeople:
        """Read them.

        Args:
            known_items: what counts as somebody's: everything, or what predictions are evaluated from.
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
        """int64 user rows, -1 for people without one and for positions outside."""
        return np.where(positions < self.num_known, positions, -1)


def gather_people(
    corpus: Corpus,
    users: Sequence[str] | None,
    orders: Mapping[str, Sequence[str]] | None,
    known_items: KnownItems = "all",
    *,
    skip_unknown: bool = False,
) -> People:
    """The people that are asked for.

    Args:
        users: external ids, of which one that is named twice counts once. None for those of `orders`, and without
            orders for everyone in the corpus.
        orders: later orders by user, oldest first. They go behind what the corpus has of a user.
        known_items: what of the corpus counts as a user's: everything, or the training items alone.
        skip_unknown: leave out people of whom nothing is known instead of refusing them.

    Raises:
        DataError: for people of whom nothing is known.
    """
    people = CorpusPeople.of(corpus, known_items)
    if users is None and orders is None:
        return People(people.names, people.rows(np.arange(len(people.names))), people.histories, 0, [])
    orders, position_of = orders or {}, people.position_of
    wanted = list(dict.fromkeys(orders if users is None else users))
    nobody = [name for name in wanted if name not in position_of and name not in orders]
    if nobody and not skip_unknown:
        raise unknown_error("users", nobody, people.names, "user", LATER_ORDERS)
    names = [name for name in wanted if name in position_of or name in orders]
    outside = len(people.names)
    positions = np.array([position_of.get(name, outside) for name in names], dtype=np.int64)
    had = _with_nobody(people.histories).take(positions)
    later, unknown = _item_rows(corpus, [orders.get(name, ()) for name in names])
    return People(names, people.rows(positions), _distinct(had, later), unknown, nobody)


def _with_nobody(had: Ragged) -> Ragged:
    """The same with one more row, an empty one."""
    return Ragged(np.append(had.offsets, had.offsets[-1]), had.values)


def _item_rows(corpus: Corpus, orders: Sequence[Sequence[str]]) -> tuple[list[list[int]], int]:
    """Item rows of orders, and how many items are unknown."""
    if not any(orders):
        return [[] for _ in orders], 0
    row_of = {name: row for row, name in enumerate(corpus.items()["item"].to_pylist())}
    unknown = sum(len({item for item in each if item not in row_of}) for each in orders)
    return [[row_of[item] for item in each if item in row_of] for each in orders], unknown


def _distinct(had: Ragged, later: Sequence[Sequence[int]]) -> Ragged:
    """Items of each person with the later ones behind, each item once."""
    if not any(later):
        return had
    return Ragged.from_lists([first_of_each([*had[n].tolist(), *each]) for n, each in enumerate(later)])
