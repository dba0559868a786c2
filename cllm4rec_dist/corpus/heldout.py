"""Who is evaluated on a split, from what history, and against what.

Known users have a row; new users, who are held out whole, have none. Both stand in one list, known ones first.

Legend: n users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.shards import Corpus

Group = Literal["known", "new"]
KNOWN: Group = "known"
NEW: Group = "new"
"""Groups of users: those who have a row, and those who have none."""


@dataclass(frozen=True)
class HeldOutUsers:
    """The users of whom a split holds out items.

    Attributes:
        known: int64, rows of the known ones among the corpus's users.
        new: int64, positions of the new ones among the corpus's new users.
        histories: n rows of items that a prediction is made from, in time order.
        held_out: n rows of items that it is held against.
    """

    known: np.ndarray
    new: np.ndarray
    histories: Ragged
    held_out: Ragged

    @classmethod
    def of(cls, corpus: Corpus, split: str) -> Self:
        """Read those of a corpus.

        Args:
            split: valid or test.
        """
        held_out, new_held_out = corpus.split(split), corpus.new_user_split(split)
        known, new = np.flatnonzero(held_out.lengths), np.flatnonzero(new_held_out.lengths)
        histories = corpus.split("train").take(known), corpus.new_user_split("history").take(new)
        return cls(known, new, Ragged.concat(histories), Ragged.concat([held_out.take(known), new_held_out.take(new)]))

    def __len__(self) -> int:
        """n."""
        return len(self.held_out)

    @property
    def rows(self) -> np.ndarray:
        """int64 [n], the row of each; -1 for a new user."""
        return np.concatenate([self.known, np.full(len(self.new), -1, np.int64)])

    @property
    def is_new(self) -> np.ndarray:
        """bool [n]."""
        return self.rows < 0

    @property
    def groups(self) -> list[Group]:
        """Group of each."""
        return [KNOWN] * len(self.known) + [NEW] * len(self.new)

    def ids(self, corpus: Corpus) -> list[str]:
        """External id of each."""
        known, new = corpus.users()["user"].take(self.known), corpus.new_users()["user"].take(self.new)
        return [*known.to_pylist(), *new.to_pylist()]
