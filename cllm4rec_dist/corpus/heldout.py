"""The users of an evaluation: their histories and held-out items.

Known users have a row; new users, who are held out whole, have none. One list has both, known users first.

Legend: n users.
"""

from __future__ import annotations

from collections.abc import Sequence
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
        num_all: users with held-out items in the corpus, of whom these may be a sample.
    """

    known: np.ndarray
    new: np.ndarray
    histories: Ragged
    held_out: Ragged
    num_all: int

    @classmethod
    def of(cls, corpus: Corpus, split: str, num_users: int | None = None) -> Self:
        """Read the users with held-out items from a corpus; of a sample, the histories of its users alone.

        Args:
            split: valid or test.
            num_users: size of a sample, drawn by a hash of the users' positions in the corpus: the same in every run,
                and a part of any larger one. None reads all of them.
        """
        new = corpus.new_user_splits((split, "history"))
        if num_users is None:
            return cls.among(corpus.splits((split, "train")), new)
        held_out, (new_held_out, new_histories) = corpus.split(split), new
        rows, new_rows, num_all = _draw(held_out, new_held_out, num_users)
        histories = Ragged.concat([corpus.split("train", rows), new_histories.take(new_rows)])
        held_out = Ragged.concat([held_out.take(rows), new_held_out.take(new_rows)])
        return cls(rows, new_rows, histories, held_out, num_all)

    @classmethod
    def among(cls, known: Sequence[Ragged], new: Sequence[Ragged], *, num_users: int | None = None) -> Self:
        """Choose the users with held-out items, or a sample of them.

        Args:
            known, new: held-out items and histories of all known and of all new users of a corpus.
            num_users: as of `of`.
        """
        held_out, histories = known
        new_held_out, new_histories = new
        rows, new_rows, num_all = _draw(held_out, new_held_out, num_users)
        return cls(
            rows,
            new_rows,
            Ragged.concat([histories.take(rows), new_histories.take(new_rows)]),
            Ragged.concat([held_out.take(rows), new_held_out.take(new_rows)]),
            num_all,
        )

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
        known, new = corpus.ids("users")["user"].take(self.known), corpus.new_users()["user"].take(self.new)
        return [*known.to_pylist(), *new.to_pylist()]


def _draw(held_out: Ragged, new_held_out: Ragged, num_users: int | None) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the rows of known users with held-out items, the positions of new ones, both ascending, and their number.

    Args:
        num_users: size of a sample; the number is that of all users nevertheless.
    """
    rows, new_rows = np.flatnonzero(held_out.lengths), np.flatnonzero(new_held_out.lengths)
    num_all = len(rows) + len(new_rows)
    if num_users is not None and num_users < num_all:
        keys = np.concatenate([keyed_bits(_SAMPLE, 0, rows), keyed_bits(_SAMPLE, 1, new_rows)])
        is_drawn = np.zeros(len(keys), bool)
        is_drawn[np.argsort(keys, kind="stable")[:num_users]] = True
        rows, new_rows = rows[is_drawn[: len(rows)]], new_rows[is_drawn[len(rows) :]]
    return rows, new_rows, num_all
