"""A recommender without a model: scores are sums of similarities of titles, so that tests know what to expect."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd

from cllm4rec_dist.errors import DataError
from cllm4rec_dist.serving.live import LiveRecommender
from cllm4rec_dist.serving.new_items import NewItem
from cllm4rec_dist.serving.options import ServiceOptions
from cllm4rec_dist.serving.queries import Answer, Query, Recommendation
from cllm4rec_dist.serving.recommender import RunInfo

INFO = RunInfo(
    run="/secret/place/runs/shop",
    checkpoint="best-00000010",
    step=10,
    date="2026-11-26T03:00:00+00:00",
    stage="finetune",
    best_metric="recall@20",
    best_value=0.31,
    corpus="shop",
    num_users=2,
    num_items=6,
    backbone="/secret/place/backbones/small",
    num_parameters=1000,
    num_trained=200,
    has_categories=True,
)
TITLES = {
    "s1": "Rose soap",
    "s2": "Lemon soap",
    "s3": "Rose shampoo",
    "b1": "Hair brush",
    "b2": "Tooth brush",
    "x1": "<img src=x onerror=alert(1)>",
}
CATEGORIES = {"s": "Soap & shampoo", "b": "Brushes", "x": "Other"}


class FakeItems:
    """The items of the fake shop, or others."""

    def __init__(self, titles: dict[str, str], with_categories: bool = True) -> None:
        self.ids, self.titles = list(titles), list(titles.values())
        self.categories = [CATEGORIES[item[0]] for item in titles] if with_categories else None
        self.popularity = np.arange(len(titles))[::-1].copy()

    def rows(self, items: Iterable[str]) -> list[int]:
        return [row for item in items if (row := self.row(item)) is not None]

    def row(self, item: str) -> int | None:
        return self.ids.index(item) if item in self.ids else None

    def search(self, query: str, limit: int = 10) -> list[int]:
        words = query.lower().split()
        return [row for row, title in enumerate(self.titles) if all(word in title.lower() for word in words)][:limit]


@dataclass
class FakeRecommender:
    """Scores an item by the words that its title shares with the history's.

    Attributes:
        seconds: that a batch takes.
        gate: set where batches may run.
        batches: sizes of those that ran.
    """

    info: RunInfo = INFO
    items: Any = field(default_factory=lambda: FakeItems(TITLES))
    seconds: float = 0.0
    gate: threading.Event = field(default_factory=threading.Event)
    batches: list[int] = field(default_factory=list)
    users: dict[str, tuple[str, ...]] = field(default_factory=lambda: {"ann": ("s1",)})

    def __post_init__(self) -> None:
        self.gate.set()

    def _score(self, history: Sequence[str], item: str) -> float:
        words = set(self.items.titles[self.items.row(item)].split())
        shared = [words & set(self.items.titles[self.items.row(other)].split()) for other in history]
        return float(sum(map(len, shared))) - 0.01 * self.items.row(item)

    def answer(self, queries: Sequence[Query]) -> list[Answer]:
        assert self.gate.wait(30)
        time.sleep(self.seconds)
        self.batches.append(len(queries))
        return [self._answer(query) for query in queries]

    def _answer(self, query: Query) -> Answer:
        if query.user is not None and query.user not in self.users:
            raise DataError("user", query.user, "is not a user of the run", "Send a history instead.")
        if "explode" in query.history:
            raise RuntimeError("/secret/place/model.py exploded")
        history = [*self.users.get(query.user or "", ()), *query.history]
        known = [item for item in history if self.items.row(item) is not None]
        left_out = set(query.exclude) | (set() if query.include_seen else set(known))
        listed = [
            item for item in self.items.ids if item not in left_out and (query.only is None or item in query.only)
        ]
        scored = sorted(((self._score(known, item), item) for item in listed), reverse=True)
        if query.min_score is not None:
            scored = [(score, item) for score, item in scored if score >= query.min_score]
        return Answer(
            items=tuple(
                Recommendation(item, self.items.titles[self.items.row(item)], score if known else None)
                for score, item in scored[: query.top]
            ),
            unknown_items=tuple(item for item in query.history if self.items.row(item) is None),
            fallback=not known,
            known_user=query.user is not None,
        )

    def fit_texts(self) -> None:
        if not any(self.items.titles):
            raise DataError("new_items", self.info.corpus, "has no texts", "Prepare it with texts.")

    def with_new_items(self, new_items: Sequence[NewItem]) -> FakeRecommender:
        if not new_items:
            return self
        words = {word for title in self.items.titles for word in title.split()}
        for new in new_items:
            if not words & set(new.text.split()):
                raise DataError("new_items", new.text, "has no known word", "Write more.")
        titles = dict(zip(self.items.ids, self.items.titles, strict=True))
        items = FakeItems(titles | {new.item: new.title for new in new_items}, with_categories=False)
        return replace(self, items=items, gate=self.gate, batches=self.batches)

    def known_history(self, user: str) -> tuple[str, ...] | None:
        return self.users.get(user)

    def contributions(self, history: Sequence[str], items: Sequence[str], user: str | None = None) -> pd.DataFrame:
        whole = [*self.users.get(user or "", ()), *history]
        known = [other for other in dict.fromkeys(whole) if self.items.row(other) is not None]
        table = pd.DataFrame(index=pd.Index(known, name="item"))
        for item in items:
            without = [self._score([k for k in known if k != other], item) for other in known]
            table[item] = [self._score(known, item) - score for score in without]
        return table

    def similar(self, item: str, top: int = 10) -> pd.DataFrame:
        others = [other for other in self.items.ids if other != item]
        scored = sorted(((self._score([item], other), other) for other in others), reverse=True)[:top]
        return pd.DataFrame(
            [(o, self.items.titles[self.items.row(o)], rank + 1, s) for rank, (s, o) in enumerate(scored)],
            columns=["item", "title", "rank", "score"],
        )


class FakeRun:
    """A run whose best checkpoint a test changes."""

    def __init__(self, *recommenders: FakeRecommender) -> None:
        self.checkpoints = {f"/runs/shop/{made.info.checkpoint}": made for made in recommenders}
        self.damaged: set[str] = set()
        self.best = next(iter(self.checkpoints))
        self.loads: list[str] = []

    def load(self, path: str) -> Any:
        self.loads.append(path)
        if path in self.damaged:
            raise DataError(path, "1 byte", "is not what was committed", "Use another checkpoint.")
        return self.checkpoints[path]

    def live(self) -> LiveRecommender:
        return LiveRecommender(self.load, lambda: (self.best, "as committed"), self.best)


def at_step(step: int, **changes: Any) -> FakeRecommender:
    """A recommender of another checkpoint."""
    return FakeRecommender(replace(INFO, checkpoint=f"best-{step:08d}", step=step), **changes)


def options(**changes: Any) -> ServiceOptions:
    return ServiceOptions(**({"run": "/runs/shop", "check_seconds": 0.05} | changes))
