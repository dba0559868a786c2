"""The Python API: a trained run loaded into one process, on a CPU or one GPU, without DeepSpeed or a process group."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from cllm4rec_dist.serving.queries import Answer, Query, Recommendation

__all__ = ["Answer", "ItemCatalog", "Query", "Recommendation", "Recommender", "RunInfo"]


@dataclass(frozen=True)
class RunInfo:
    """What is served.

    Attributes:
        run: as it was given to `Recommender.load`.
        checkpoint: name of the checkpoint, such as best-00000010.
        step: completed optimizer steps.
        date: when the checkpoint was written, ISO 8601 in UTC, to the second.
        stage: pretrain or finetune.
        best_metric, best_value: validation metric that the checkpoint was chosen by, and its value; None where the run
            never validated.
        corpus: name of the corpus.
        num_users, num_items: rows of the run.
        backbone: path or hub id.
        num_parameters: backbone, adapters, tables and head together.
        num_trained: of these the trained ones.
        has_categories: True where the corpus has a category of its items.
    """

    run: str
    checkpoint: str
    step: int
    date: str
    stage: str
    best_metric: str | None
    best_value: float | None
    corpus: str
    num_users: int
    num_items: int
    backbone: str
    num_parameters: int
    num_trained: int
    has_categories: bool


@dataclass(frozen=True)
class ItemCatalog:
    """The items of a run, by row.

    Attributes:
        ids: I external ids.
        titles: I titles, "" where an item has none.
        categories: I categories, "" where an item has none; None where the corpus has no categories.
        popularity: int64 [I] training interactions.
    """

    ids: Sequence[str]
    titles: Sequence[str]
    categories: Sequence[str] | None
    popularity: np.ndarray

    def row(self, item: str) -> int | None:
        """Row of an external id; None for one that the run does not know."""
        raise NotImplementedError

    def search(self, query: str, limit: int = 10) -> list[int]:
        """Rows of the items that a search finds, best first.

        An item is found where every word of `query` is in its title; the last word may be the beginning of one. Case
        and accents are ignored. An item whose id is the query comes first, then items by popularity.
        """
        raise NotImplementedError


class Recommender:
    """A trained run in this process. Safe to use from several threads; see `load`.

    Attributes:
        info: what is loaded.
        items: the items, with search by title.
    """

    info: RunInfo
    items: ItemCatalog

    @classmethod
    def load(cls, run: str | Path, *, backbone: str | None = None, corpus: str | None = None) -> Self:
        """Read a run's best checkpoint.

        Args:
            run: a run folder (its best checkpoint), a folder of one checkpoint, or a project folder of `cllm4rec init`.
            backbone, corpus: where they are now, if not where the run says.

        Raises:
            CLLM4RecError: where there is no whole checkpoint, or the backbone or corpus is gone or another one.
        """
        raise NotImplementedError

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """One answer for each query, in one batched forward.

        Raises:
            DataError: for a query that is invalid, such as a user that the run does not know.
        """
        raise NotImplementedError

    def recommend(
        self,
        users: Sequence[str] | None = None,
        histories: Sequence[Sequence[str]] | Mapping[str, Sequence[str]] | None = None,
        top: int = 10,
        exclude: Collection[str] = (),
        only: Collection[str] | None = None,
        min_score: float | None = None,
        include_seen: bool = False,
    ) -> pd.DataFrame:
        """Lists for users, or for histories of anyone, in the order given.

        Returns columns user, item, title, rank (from 1), score; a history's user is its position in `histories`.
        """
        raise NotImplementedError

    def score(self, history: Sequence[str], items: Sequence[str], user: str | None = None) -> pd.Series:
        """Scores of `items` after a history, indexed by item."""
        raise NotImplementedError

    def similar(self, item: str, top: int = 10) -> pd.DataFrame:
        """Items whose trained rows have the largest cosine with that of `item`: item, title, rank, score."""
        raise NotImplementedError

    def item_embeddings(self) -> pd.DataFrame:
        """Trained item rows, float32 [I, D], indexed by external id."""
        raise NotImplementedError

    def user_embeddings(self) -> pd.DataFrame:
        """Trained user rows, float32 [U, D], indexed by external id."""
        raise NotImplementedError

    def explain(self, history: Sequence[str], item: str, user: str | None = None) -> pd.DataFrame:
        """What each item of a history contributes to a score: the score with it minus the score without it.

        Returns columns item, title, contribution, a line for each distinct known item, largest first.
        """
        raise NotImplementedError
