"""The Python API: a trained run loaded into one process, on a CPU or one GPU, without DeepSpeed or a process group.

People are known or not. A known user has a row of their own and the items that the corpus has, held-out ones included;
what they took later goes behind these. Users whom a split holds out whole have items and no row. Anyone else is their
history alone, with the row that the model has for people without one. An item counts once, where it first came, as in a
corpus; items that the run does not know are left out.

Legend: n queries, U users, I items, D hidden.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.distributed.topology import find_device
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.evaluation.topk import encode_histories, sharded_topk
from cllm4rec_dist.evaluation.trained_run import load_local
from cllm4rec_dist.project.layout import run_of
from cllm4rec_dist.serving.id_list import similar_ids
from cllm4rec_dist.serving.item_catalog import ItemCatalog
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
from cllm4rec_dist.system import InferenceSystem

__all__ = ["Answer", "ItemCatalog", "Query", "Recommendation", "Recommender", "RunInfo"]

logger = logging.getLogger(__name__)

_BATCH = 256
"""Histories in a forward at most."""
_BATCH_ITEMS = 1 << 15
"""Items of all histories of a forward at most: bounds its memory."""
_MANY = 1000
"""Excluded items from which on they are cut out of the catalog instead of being masked query by query."""


@dataclass(frozen=True)
class _Person:
    """A user row, or -1, and the distinct item rows of the whole history, oldest first."""

    row: int
    items: list[int]

    @property
    def is_nobody(self) -> bool:
        """True where nothing is known that a list could be made of."""
        return self.row < 0 and not self.items


class Recommender:
    """A trained run in this process. Threads may share one; their forwards take turns.

    Attributes:
        info: what is loaded.
        items: the items, with search by title.
        users: external ids of the users by row.
    """

    def __init__(self, system: InferenceSystem, info: RunInfo) -> None:
        """Of a system with its weights; `load` makes one of a run."""
        self._system, self.info = system, info
        self.items = ItemCatalog.of(system.corpus)
        self._people = CorpusPeople.of(system.corpus)
        self.users = self._people.names[: self._people.num_known]
        system.train(False)
        with torch.no_grad():
            self._operand = system.recommender.output_weight()
        self._forward = threading.Lock()  # a forward keeps state in the backbone

    @classmethod
    def load(
        cls, run: str | Path, *, backbone: str | None = None, corpus: str | None = None, device: str | None = None
    ) -> Self:
        """Read a run's best checkpoint.

        Args:
            run: a run folder (its best checkpoint), a folder of one checkpoint, or a project folder of `cllm4rec init`.
            backbone, corpus: where they are now, if not where the run says.
            device: as torch names it; a GPU where there is one, else the CPU.

        Raises:
            CLLM4RecError: where there is no whole checkpoint, the backbone or corpus is gone or another one, or the
                device is not there.
        """
        system, checkpoint = load_local(run_of(str(run)), find_device(device), backbone, corpus)
        return cls(system, describe_run(str(run), system, checkpoint))

    def __repr__(self) -> str:
        return (
            f"Recommender(run={self.info.run!r}, checkpoint={self.info.checkpoint!r}, num_users={self.info.num_users},"
            f" num_items={self.info.num_items})"
        )

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        """One answer for each query, of forwards over as many queries as fit.

        Raises:
            DataError: for a user that the run does not know.
        """
        people = [self._person(query.user, query.history) for query in queries]
        listed = self._listed(queries, people)
        return [
            Answer(
                items=tuple(Recommendation(self.items.ids[row], self.items.titles[row], score) for row, score in best),
                unknown_items=self._unknown(query.history),
                fallback=person.is_nobody,
                known_user=person.row >= 0,
            )
            for query, person, best in zip(queries, people, listed, strict=True)
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
        """Lists for users of the run, or for histories of anyone, in the order given.

        Args:
            users: external ids. Either these or `histories` must be given.
            histories: item ids, oldest first: a list of them for each person, or by name.
            top: length of a list; one is shorter where fewer items are left.
            exclude: item ids never to be listed (sold out); those that the run does not know are ignored.
            only: list nothing but these item ids (a category).
            min_score: leave out items that score lower.
            include_seen: list items of the history too.

        Returns columns user, item, title, rank (from 1), score. The user of a history is its name or its position. A
        score is null where popular items are listed, because nothing is known of a history; a warning counts these.

        Raises:
            DataError: for a user that the run does not know, or a value of another kind.
        """
        if (users is None) == (histories is None):
            given = "neither" if users is None else "both"
            raise DataError("users, histories", given, "were given", "Give one of the two.")
        names: list[object]
        if histories is None:
            names = list(checked_ids("users", users))
            asked: list[tuple[tuple[str, ...], str | None]] = [((), str(name)) for name in names]
        else:
            names, lists = checked_histories(histories)
            asked = [(history, None) for history in lists]
        more = {"exclude": checked_set("exclude", exclude), "only": None if only is None else checked_set("only", only)}
        answers = self.answer(
            [
                Query(history, user, top=top, min_score=min_score, include_seen=include_seen, **more)  # type: ignore[arg-type]
                for history, user in asked
            ]
        )
        _tell_losses(answers)
        rows = [
            (name, found.item, found.title, rank, found.score)
            for name, answer in zip(names, answers, strict=True)
            for rank, found in enumerate(answer.items, 1)
        ]
        table = pd.DataFrame(rows, columns=["user", "item", "title", "rank", "score"])
        return table.astype({"rank": "int32", "score": "float32"})

    def score(self, history: Sequence[str], items: Sequence[str], user: str | None = None) -> pd.Series:
        """Scores of `items` after a history, float32, indexed by item; NaN for an item that the run does not know.

        Args:
            history: item ids, oldest first; for a known user what came after training. May be empty.

        Raises:
            DataError: for a user that the run does not know, or a value of another kind.
        """
        names = checked_ids("items", items)
        person = self._person(user, checked_ids("history", history))
        rows = [self.items.row(name) for name in names]
        known = [place for place, row in enumerate(rows) if row is not None]
        scores = np.full(len(names), np.nan, dtype=np.float32)
        scores[known] = self._scores([person], [row for row in rows if row is not None])[0]
        if len(known) < len(names):
            logger.warning(
                "%d of %d items are unknown to the run and have no score", len(names) - len(known), len(names)
            )
        return pd.Series(scores, index=_index(names, "item"), name="score")

    def similar(self, item: str, top: int = 10) -> pd.DataFrame:
        """Items whose trained rows have the largest cosine with that of `item`.

        Returns columns item, title, rank, score (the cosine).

        Raises:
            DataError: for an item that the run does not know.
        """
        row, top = self._item_row(item), checked_top(top)
        model, device = self._system.recommender, self._system.world.device
        normalized = self._normalized_items
        num_best = min(top, len(normalized) - 1)
        scores, rows = torch.empty(0), torch.empty(0, dtype=torch.int64)
        if num_best:
            itself = torch.tensor([[0, row]], device=device)
            query = normalized[row : row + 1]
            found = sharded_topk(query, normalized, num_best, itself, model.item_partition, self._system.world)
            scores, rows = found[0][0].cpu(), found[1][0].cpu()
        return pd.DataFrame(
            {
                "item": [self.items.ids[found] for found in rows.tolist()],
                "title": [self.items.titles[found] for found in rows.tolist()],
                "rank": np.arange(1, len(rows) + 1, dtype=np.int32),
                "score": scores.numpy(),
            }
        )

    def known_history(self, user: str) -> list[str] | None:
        """Item ids that the corpus has of a user, oldest first; None for a user that the run does not know."""
        position = self._people.position_of.get(user)
        return (
            None if position is None else [self.items.ids[item] for item in self._people.histories[position].tolist()]
        )

    def explain(self, history: Sequence[str], item: str, user: str | None = None) -> pd.DataFrame:
        """What each item of a history contributes to the score of `item`: the score with it minus the one without it.

        Differences of scores that are all computed, nothing is estimated. They need not add up to the score, as items
        of a history act together.

        Args:
            history: item ids, oldest first; for a known user what came after training.

        Returns columns item, title, contribution, a line for each distinct item of the history (of a known user the
        items of the corpus too) that the run knows, the largest contribution first.

        Raises:
            DataError: for an item or a user that the run does not know.
        """
        table = self.contributions(history, [item], user).set_axis(["contribution"], axis=1).reset_index()
        table.insert(1, "title", [self.items.titles[self._item_row(name)] for name in table["item"]])
        return table.sort_values("contribution", ascending=False, kind="stable", ignore_index=True)

    def contributions(self, history: Sequence[str], items: Sequence[str], user: str | None = None) -> pd.DataFrame:
        """As `explain`, for several items at the cost of one: a column for each, indexed by the item of the history."""
        rows = [self._item_row(name) for name in checked_ids("items", items)]
        person = self._person(user, checked_ids("history", history))
        without = [_Person(person.row, [o for o in person.items if o != left_out]) for left_out in person.items]
        scores = self._scores([person, *without], rows)
        names = [self.items.ids[row] for row in person.items]
        return pd.DataFrame(scores[:1] - scores[1:], index=_index(names, "item"), columns=_index(items, None))

    def item_embeddings(self) -> pd.DataFrame:
        """Trained item rows, float32 [I, D], indexed by external id."""
        return _embeddings(self._system.recommender.collaborative.items.local_rows, self.items.ids, "item")

    def user_embeddings(self) -> pd.DataFrame:
        """Trained user rows, float32 [U, D], indexed by external id."""
        rows = self._system.recommender.collaborative.users.local_rows
        return _embeddings(rows[: len(self.users)], self.users, "user")

    @property
    def _normalized_items(self) -> Tensor:
        return F.normalize(self._system.recommender.collaborative.items.local_rows.detach(), dim=1)

    def _person(self, user: str | None, history: Sequence[str]) -> _Person:
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
                    f"{hint}Give the history alone for somebody who came later.",
                )
            row = position if position < self._people.num_known else -1
            items = self._people.histories[position].tolist()
        return _Person(row, first_of_each([*items, *self.items.rows(history)]))

    def _unknown(self, history: Sequence[str]) -> tuple[str, ...]:
        return tuple(dict.fromkeys(item for item in history if self.items.row(item) is None))

    def _item_row(self, item: object) -> int:
        row = self.items.row(checked_id("item", item))
        if row is None:
            likely = similar_ids(str(item), self.items.ids)
            hint = f"Did you mean {', '.join(likely)}?" if likely else "Search the items for its title."
            raise DataError("item", item, "is not an item of the run", hint)
        return row

    def _queries(self, people: Sequence[_Person]) -> Tensor:
        """What the item operand is multiplied with for each person, [n, D or D+1]."""
        found = torch.empty(len(people), self._operand.shape[1], device=self._operand.device)
        for batch in _batches([len(person.items) for person in people]):
            users = np.array([people[place].row for place in batch], dtype=np.int64)
            histories = Ragged.from_lists([people[place].items for place in batch])
            with torch.no_grad(), self._forward:
                found[torch.tensor(batch)] = encode_histories(self._system, users, histories).to(found.dtype)
        return found

    def _scores(self, people: Sequence[_Person], rows: Sequence[int]) -> np.ndarray:
        """float32 [n, len(rows)] scores of items."""
        chosen = self._operand[torch.tensor(rows, dtype=torch.int64, device=self._operand.device)]
        return (self._queries(people) @ chosen.T).float().cpu().numpy()

    def _listed(self, queries: Sequence[Query], people: Sequence[_Person]) -> list[list[tuple[int, float | None]]]:
        """Item rows and scores of each list, best first."""
        listed: list[list[tuple[int, float | None]]] = [
            self._popular(query) if person.is_nobody else [] for query, person in zip(queries, people, strict=True)
        ]
        able = [place for place, person in enumerate(people) if not person.is_nobody]
        encoded = self._queries([people[place] for place in able])
        groups: dict[tuple[frozenset[str] | None, frozenset[str]], list[int]] = {}
        for number, place in enumerate(able):
            query = queries[place]
            cut = query.exclude if len(query.exclude) >= _MANY else frozenset()
            groups.setdefault((query.only, cut), []).append(number)
        for (only, cut), numbers in groups.items():
            places = [able[number] for number in numbers]
            ranked = self._best(
                encoded[torch.tensor(numbers)],
                [queries[p] for p in places],
                [people[p] for p in places],
                self.items.candidates(only, cut),
            )
            for place, best in zip(places, ranked, strict=True):
                listed[place] = best
        return listed

    def _best(
        self, encoded: Tensor, queries: Sequence[Query], people: Sequence[_Person], candidates: np.ndarray | None
    ) -> Iterator[list[tuple[int, float | None]]]:
        """The lists of queries that choose among the same candidates, bool [I] or all items."""
        world, partition = self._system.world, self._system.recommender.item_partition
        left_out = [self._left_out(query, person) for query, person in zip(queries, people, strict=True)]
        pairs = [(number, row) for number, rows in enumerate(left_out) for row in rows]
        seen = torch.tensor(pairs, dtype=torch.int64, device=world.device).view(-1, 2)
        size = len(self.items.ids) if candidates is None else int(candidates.sum())
        num_best = min(max(query.top for query in queries), size)
        if num_best == 0:
            yield from ([] for _ in queries)
            return
        mask = None if candidates is None else torch.from_numpy(candidates).to(world.device)
        with torch.no_grad():
            found = sharded_topk(encoded, self._operand, num_best, seen, partition, world, candidates=mask)
        for query, scores, rows in zip(queries, found[0].tolist(), found[1].tolist(), strict=True):
            lowest = -np.inf if query.min_score is None else query.min_score
            listed = zip(rows[: query.top], scores[: query.top], strict=True)
            yield [(row, score) for row, score in listed if np.isfinite(score) and score >= lowest]

    def _left_out(self, query: Query, person: _Person) -> set[int]:
        """Item rows that are masked for one query."""
        seen = set() if query.include_seen else set(person.items)
        excluded = query.exclude if len(query.exclude) < _MANY else ()
        return seen | set(self.items.rows(excluded))

    def _popular(self, query: Query) -> list[tuple[int, float | None]]:
        """The list for somebody of whom nothing is known; none has a score that could reach a `min_score`."""
        if query.min_score is not None:
            return []
        kept = self.items.candidates(query.only, query.exclude)
        order = self.items.by_popularity
        return [(row, None) for row in (order if kept is None else order[kept[order]])[: query.top].tolist()]


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of histories that go through the backbone together, of like length."""
    batch: list[int] = []
    for place in sorted(range(len(lengths)), key=lengths.__getitem__):
        longest = max(1, lengths[place])
        if batch and (len(batch) == _BATCH or (len(batch) + 1) * longest > _BATCH_ITEMS):
            yield batch
            batch = []
        batch.append(place)
    if batch:
        yield batch


def _embeddings(rows: Tensor, names: Sequence[str], kind: str) -> pd.DataFrame:
    return pd.DataFrame(rows.detach().cpu().numpy().copy(), index=_index(names, kind))


def _index(names: Sequence[str], kind: str | None) -> pd.Index:
    return pd.Index(np.array(names, dtype=object), name=kind)


def _tell_losses(answers: Sequence[Answer]) -> None:
    """Log what lists were made without."""
    unknown = [answer.unknown_items for answer in answers if answer.unknown_items]
    if unknown:
        items = sum(map(len, unknown))
        logger.warning("%d items of %d histories are unknown to the run and were left out", items, len(unknown))
    fallbacks = sum(answer.fallback for answer in answers)
    if fallbacks:
        logger.warning(
            "nothing is known of %d of %d histories: popular items are listed, without a score", fallbacks, len(answers)
        )
