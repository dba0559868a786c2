"""The Python API: a trained run loaded into one process, on a CPU or one GPU, without DeepSpeed or a process group.

A known user has a trained row and a history in the corpus, held-out items included; later items are appended to it.
A user whom the split holds out entirely has a history and no row. Anyone else is represented by the given history and
the shared user row. Repeated items count once, at their first position, as in a corpus. Items unknown to the run are
ignored.

Legend: n queries, U users, I items, D hidden.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from cllm4rec_dist.distributed.topology import find_device
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.evaluation.sharded_topk import Queries
from cllm4rec_dist.evaluation.text_items import LazyTextItems
from cllm4rec_dist.evaluation.trained_run import load_local
from cllm4rec_dist.project.layout import run_of
from cllm4rec_dist.serving.feed import with_known_words
from cllm4rec_dist.serving.id_list import similar_ids
from cllm4rec_dist.serving.item_catalog import ItemCatalog
from cllm4rec_dist.serving.new_items import NewItem, checked_titles, require_new
from cllm4rec_dist.serving.people import CorpusPeople
from cllm4rec_dist.serving.queries import (
    Answer,
    Query,
    Recommendation,
    checked_histories,
    checked_id,
    checked_ids,
    checked_set,
    checked_top,
    first_of_each,
)
from cllm4rec_dist.serving.run_info import RunInfo, describe_run
from cllm4rec_dist.serving.scorer import Person, Scorer
from cllm4rec_dist.system import InferenceSystem

__all__ = ["Answer", "ItemCatalog", "Query", "Recommendation", "Recommender", "RunInfo"]

logger = logging.getLogger(__name__)

_MAX_MASKED = 1000
"""Excluded items that are masked per query; longer lists are removed from the candidates instead."""


class Recommender:
    """A trained run in this process. Thread-safe: forwards are serialized by a lock.

    Attributes:
        info: run and checkpoint that are loaded.
        items: item catalog, with search by title.
        users: external ids of the users, by row.
    """

    def __init__(self, system: InferenceSystem, info: RunInfo) -> None:
        """Wrap a system whose weights are loaded; use `load` to open a run."""
        self._system, self.info = system, info
        self.items = ItemCatalog.from_corpus(system.corpus)
        self._people = CorpusPeople.from_corpus(system.corpus)
        self.users = self._people.names[: self._people.num_known]
        self._scorer = Scorer(system)
        self._new_items: list[NewItem] = []
        self._texts = LazyTextItems(system)

    @classmethod
    def load(
        cls,
        run: str | Path,
        *,
        backbone: str | None = None,
        corpus: str | None = None,
        device: str | None = None,
        new_item_offset: float | None = None,
    ) -> Self:
        """Load a run's best checkpoint.

        Args:
            run: a run folder (its best checkpoint), a folder of one checkpoint, or a project folder of `cllm4rec init`.
            backbone: current path of the backbone, if it differs from the one recorded in the run.
            corpus: current path of the corpus, if it differs from the one recorded in the run.
            device: torch device; by default a GPU if there is one, else the CPU.
            new_item_offset: item bias of new items relative to the mean, instead of the run's.

        Raises:
            CLLM4RecError: for a missing device, no intact checkpoint, or another backbone or corpus.
        """
        system, checkpoint = load_local(run_of(str(run)), find_device(device), backbone, corpus, new_item_offset)
        return cls(system, describe_run(str(run), system, checkpoint))

    def __repr__(self) -> str:
        return (
            f"Recommender(run={self.info.run!r}, checkpoint={self.info.checkpoint!r}, num_users={self.info.num_users},"
            f" num_items={self.info.num_items})"
        )

    def with_items(self, new_items: Mapping[str, str], descriptions: Mapping[str, str] | None = None) -> Self:
        """Return a recommender that also knows products that the corpus does not have, by their texts.

        They are ranked, may be in histories, and have scores, similar items and explanations, like items of the run.
        This recommender does not change, and both share their weights.

        Args:
            new_items: title of each new product, by id.
            descriptions: further text of some of them, by id.

        Raises:
            DataError: for an id of the run, and a text without any word of the trained items' texts.
        """
        return self.with_new_items(checked_titles(new_items, descriptions))

    def with_new_items(self, new_items: Sequence[NewItem], field: str = "new_items") -> Self:
        """Like `with_items`; `field` is named in errors."""
        require_new(field, new_items, self.items)
        if not new_items:
            return self
        other = copy.copy(self)
        other._new_items = [*self._new_items, *new_items]
        other._system = self._texts.get().add(self._system, {new.item: new.text for new in other._new_items})
        other._scorer = self._scorer.for_system(other._system)
        other.items = self.items.with_new([new.item for new in new_items], [new.title for new in new_items])
        return other

    def with_feed(self, products: Sequence[NewItem], field: str) -> Self:
        """Like `with_new_items`, without the products that have no known word (`feed.py`)."""
        return self.with_new_items(with_known_words(field, products, self._texts.get()) if products else (), field)

    def fit_texts(self) -> None:
        """Fit the map from texts to items now, which `with_items` otherwise does when first called, with its errors."""
        self._texts.get()

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """Answer each query; queries share forwards up to the batch limits.

        Raises:
            DataError: for a user unknown to the run.
        """
        people = [self._person(query.user, query.history) for query in queries]
        lists = self._make_lists(queries, people)
        return [
            Answer(
                items=tuple(Recommendation(self.items.ids[row], self.items.titles[row], score) for row, score in best),
                unknown_items=self._unknown(query.history),
                fallback=person.is_unknown,
                known_user=person.row >= 0,
            )
            for query, person, best in zip(queries, people, lists, strict=True)
        ]

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
        """Recommend items for users of the run, or for arbitrary histories, in the given order.

        Args:
            users: external ids. Give either these or `histories`.
            histories: lists of item ids, oldest first, or a mapping from names to such lists.
            top: length of a list; shorter if fewer items are left.
            exclude: item ids to leave out (sold out); unknown ids are ignored.
            only: item ids to choose from (a category).
            min_score: leave out items with a lower score.
            include_seen: also list items of the history.

        Returns columns user, item, title, rank (from 1), score. The user of a history is its name or its position. If
        no item of a history is known, popular items are listed with a null score, and a warning counts these lists.

        Raises:
            DataError: for a user unknown to the run, or a value of the wrong type.
        """
        if (users is None) == (histories is None):
            given = "neither" if users is None else "both"
            raise DataError("users, histories", given, "were given", "Give one of the two.")
        names: list[object]
        if histories is None:
            names = list(checked_ids("users", users))
            requests: list[tuple[tuple[str, ...], str | None]] = [((), str(name)) for name in names]
        else:
            names, lists = checked_histories(histories)
            requests = [(history, None) for history in lists]
        more = {"exclude": checked_set("exclude", exclude), "only": None if only is None else checked_set("only", only)}
        answers = self.answer(
            [
                Query(history, user, top=top, min_score=min_score, include_seen=include_seen, **more)  # type: ignore[arg-type]
                for history, user in requests
            ]
        )
        _log_omissions(answers)
        rows = [
            (name, listed.item, listed.title, rank, listed.score)
            for name, answer in zip(names, answers, strict=True)
            for rank, listed in enumerate(answer.items, 1)
        ]
        table = pd.DataFrame(rows, columns=["user", "item", "title", "rank", "score"])
        return table.astype({"rank": "int32", "score": "float32"})

    def score(self, history: Sequence[str], items: Sequence[str], user: str | None = None) -> pd.Series:
        """Return the scores of `items` given a history, float32, indexed by item; NaN for an unknown item.

        Args:
            history: item ids, oldest first; for a known user those that came after training. May be empty.

        Raises:
            DataError: for a user unknown to the run, or a value of the wrong type.
        """
        names = checked_ids("items", items)
        person = self._person(user, checked_ids("history", history))
        rows = [self.items.row(name) for name in names]
        known = [index for index, row in enumerate(rows) if row is not None]
        scores = np.full(len(names), np.nan, dtype=np.float32)
        scores[known] = self._scorer.scores([person], [row for row in rows if row is not None])[0]
        if len(known) < len(names):
            logger.warning(
                "%d of %d items are unknown to the run and have no score", len(names) - len(known), len(names)
            )
        return pd.Series(scores, index=_index(names, "item"), name="score")

    def similar(self, item: str, top: int = 10) -> pd.DataFrame:
        """Return the items whose embeddings have the largest cosine similarity with that of `item`.

        Returns columns item, title, rank, score (the cosine).

        Raises:
            DataError: for an item unknown to the run.
        """
        row, top = self._item_row(item), checked_top(top)
        scores, rows = self._scorer.similar(row, top)
        return pd.DataFrame(
            {
                "item": [self.items.ids[neighbor] for neighbor in rows.tolist()],
                "title": [self.items.titles[neighbor] for neighbor in rows.tolist()],
                "rank": np.arange(1, len(rows) + 1, dtype=np.int32),
                "score": scores.numpy(),
            }
        )

    def known_history(self, user: str) -> list[str] | None:
        """Return a user's item ids in the corpus, oldest first; None for a user unknown to the run."""
        position = self._people.position_of.get(user)
        return (
            None if position is None else [self.items.ids[item] for item in self._people.histories[position].tolist()]
        )

    def explain(self, history: Sequence[str], item: str, user: str | None = None) -> pd.DataFrame:
        """Return each history item's contribution to the score of `item`: the score with it minus the score without it.

        Both scores are computed exactly. Contributions need not add up to the score, because items of a history
        interact.

        Args:
            history: item ids, oldest first; for a known user those that came after training.

        Returns columns item, title, contribution: one line for each distinct known item of the history (including a
        known user's items in the corpus), largest contribution first.

        Raises:
            DataError: for an item or user unknown to the run.
        """
        table = self.contributions(history, [item], user).set_axis(["contribution"], axis=1).reset_index()
        table.insert(1, "title", [self.items.titles[self._item_row(name)] for name in table["item"]])
        return table.sort_values("contribution", ascending=False, kind="stable", ignore_index=True)

    def contributions(self, history: Sequence[str], items: Sequence[str], user: str | None = None) -> pd.DataFrame:
        """Like `explain` for several items at the cost of one: one column per item, indexed by history item."""
        rows = [self._item_row(name) for name in checked_ids("items", items)]
        person = self._person(user, checked_ids("history", history))
        without = [Person(person.row, [o for o in person.items if o != left_out]) for left_out in person.items]
        scores = self._scorer.scores([person, *without], rows)
        names = [self.items.ids[row] for row in person.items]
        return pd.DataFrame(scores[:1] - scores[1:], index=_index(names, "item"), columns=_index(items, None))

    def item_embeddings(self) -> pd.DataFrame:
        """Return the trained item embeddings, then those of new items, float32 [I, D], indexed by external id."""
        rows, new_items = self._system.recommender.collaborative.items.local_rows, self._system.new_items
        return _embeddings(rows if new_items is None else torch.cat([rows, new_items.rows]), self.items.ids, "item")

    def user_embeddings(self) -> pd.DataFrame:
        """Return the trained user embeddings, float32 [U, D], indexed by external id."""
        rows = self._system.recommender.collaborative.users.local_rows
        return _embeddings(rows[: len(self.users)], self.users, "user")

    def _person(self, user: str | None, history: Sequence[str]) -> Person:
        row, items = -1, []
        if user is not None:
            position = self._people.position_of.get(checked_id("user", user))
            if position is None:
                likely = similar_ids(user, self._people.names)
                hint = f"Did you mean {', '.join(likely)}? " if likely else ""
                raise DataError(
                    "user",
                    user,
                    "is not a user of the run",
                    f"{hint}For somebody who came later, give the history alone.",
                )
            row = position if position < self._people.num_known else -1
            items = self._people.histories[position].tolist()
        return Person(row, first_of_each([*items, *self.items.rows(history)]))

    def _unknown(self, history: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(item for item in history if self.items.row(item) is None))

    def _item_row(self, item: object) -> int:
        row = self.items.row(checked_id("item", item))
        if row is None:
            likely = similar_ids(str(item), self.items.ids)
            hint = f"Did you mean {', '.join(likely)}?" if likely else "Search the items for its title."
            raise DataError("item", item, "is not an item of the run", hint)
        return row

    def _make_lists(self, queries: Sequence[Query], people: Sequence[Person]) -> list[list[tuple[int, float | None]]]:
        """Item rows and scores of each list, best first."""
        lists: list[list[tuple[int, float | None]]] = [
            self._popular(query) if person.is_unknown else [] for query, person in zip(queries, people, strict=True)
        ]
        scored = [index for index, person in enumerate(people) if not person.is_unknown]
        encoded = self._scorer.encode([people[index] for index in scored])
        groups: dict[tuple[frozenset[str] | None, frozenset[str]], list[int]] = {}
        for row, index in enumerate(scored):
            query = queries[index]
            removed = query.exclude if len(query.exclude) >= _MAX_MASKED else frozenset()
            groups.setdefault((query.only, removed), []).append(row)
        for (only, removed), rows in groups.items():
            indices = [scored[row] for row in rows]
            ranked = self._rank(
                encoded.take(rows),
                [queries[index] for index in indices],
                [people[index] for index in indices],
                self.items.candidates(only, removed),
            )
            for index, best in zip(indices, ranked, strict=True):
                lists[index] = best
        return lists

    def _rank(
        self, encoded: Queries, queries: Sequence[Query], people: Sequence[Person], candidates: np.ndarray | None
    ) -> Iterator[list[tuple[int, float | None]]]:
        """Lists of queries that share their candidates, bool [I]; None for all items."""
        size = len(self.items.ids) if candidates is None else int(candidates.sum())
        num_best = min(max(query.top for query in queries), size)
        if num_best == 0:
            yield from ([] for _ in queries)
            return
        masked = [self._masked_rows(query, person) for query, person in zip(queries, people, strict=True)]
        top_scores, top_rows = self._scorer.top(encoded, masked, num_best, candidates)
        for query, scores, rows in zip(queries, top_scores.tolist(), top_rows.tolist(), strict=True):
            lowest = -np.inf if query.min_score is None else query.min_score
            listed = zip(rows[: query.top], scores[: query.top], strict=True)
            yield [(row, score) for row, score in listed if np.isfinite(score) and score >= lowest]

    def _masked_rows(self, query: Query, person: Person) -> set[int]:
        """Item rows that are masked for a query."""
        seen = set() if query.include_seen else set(person.items)
        excluded = query.exclude if len(query.exclude) < _MAX_MASKED else ()
        return seen | set(self.items.rows(excluded))

    def _popular(self, query: Query) -> list[tuple[int, float | None]]:
        """Popular items for an unknown person. They have no score, so `min_score` removes all of them."""
        if query.min_score is not None:
            return []
        kept = self.items.candidates(query.only, query.exclude)
        order = self.items.by_popularity
        return [(row, None) for row in (order if kept is None else order[kept[order]])[: query.top].tolist()]


def _embeddings(rows: Tensor, names: Sequence[str], kind: str) -> pd.DataFrame:
    return pd.DataFrame(rows.detach().cpu().numpy().copy(), index=_index(names, kind))


def _index(names: Sequence[str], kind: str | None) -> pd.Index:
    return pd.Index(np.array(names, dtype=object), name=kind)


def _log_omissions(answers: Sequence[Answer]) -> None:
    """Warn of unknown items and of lists of popular items."""
    unknown = [answer.unknown_items for answer in answers if answer.unknown_items]
    if unknown:
        items = sum(map(len, unknown))
        logger.warning("%d items of %d histories are unknown to the run and were ignored", items, len(unknown))
    fallbacks = sum(answer.fallback for answer in answers)
    if fallbacks:
        logger.warning(
            "%d of %d histories have no known item: popular items are listed, without a score", fallbacks, len(answers)
        )
