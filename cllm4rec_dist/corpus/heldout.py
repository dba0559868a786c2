"""The users of an evaluation: their histories and held-out items.

Known users have a row; new users, who are held out whole, have none. One list has both, known users first.

Legend: n users.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Self

import numpy as np

from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.stateless_rng import keyed_bits

Group = Literal["known", "new"]
KNOWN: Group = "known"
NEW: Group = "new"
"""Groups of users: those with a row, and those without one."""
_SAMPLE = 0x5A3B
"""Key of the random bits by which users are sampled."""


@dataclass(frozen=True)
class HeldOutUsers:
    """The users with held-out items in a split.

    Attributes:
        known: int64 user rows of the known users.
        new: int64 positions of the new users among the corpus's new users.
        histories: n lists of item rows, in time order: the input of the prediction.
        held_out: n lists of item rows to predict.
    """

    known: np.ndarray
    new: np.ndarray
    histories: Ragged
    held_out: Ragged

    @classmethod
    def of(cls, corpus: Corpus, split: str, num_users: int | None = None) -> Self:
        """Read the users with held-out items from a corpus.

        Args:
            split: valid or test.
            num_users: size of a sample, drawn by a hash of the users' positions in the corpus: the same in every run,
                and a part of any larger one. None reads all of them.
        """
        held_out, new_held_out = corpus.split(split), corpus.new_user_split(split)
        known, new = np.flatnonzero(held_out.lengths), np.flatnonzero(new_held_out.lengths)
        if num_users is not None and num_users < len(known) + len(new):
            keys = np.concatenate([keyed_bits(_SAMPLE, 0, known), keyed_bits(_SAMPLE, 1, new)])
            is_drawn = np.zeros(len(keys), bool)
            is_drawn[np.argsort(keys, kind="stable")[:num_users]] = True
            known, new = known[is_drawn[: len(known)]], new[is_drawn[len(known) :]]
        histories = corpus.split("train").take(known), corpus.new_user_split("history").take(new)
        return cls(known, new, Ragged.concat(histories), Ragged.concat([held_out.take(known), new_held_out.take(new)]))

    def __len__(self) -> int:
        """n."""
        return len(self.held_out)

    @property
    def rows(self) -> np.ndarray:
        """int64 [n] user rows; -1 for a new user."""
        return np.concatenate([self.known, np.full(len(self.new), -1, np.int64)])

    @property
    def is_new(self) -> np.ndarray:
        """bool [n] mask of the new users."""
        return self.rows < 0

    @property
    def groups(self) -> list[Group]:
        """Group of each user."""
        return [KNOWN] * len(self.known) + [NEW] * len(self.new)

    def ids(self, corpus: Corpus) -> list[str]:
        """Return the external id of each user."""
        known, new = corpus.users()["user"].take(self.known), corpus.new_users()["user"].take(self.new)
        return [*known.to_pylist(), *new.to_pylist()]
