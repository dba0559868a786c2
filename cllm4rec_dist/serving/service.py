"""The service without HTTP: turns valid requests into queries, and answers into response models."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from itertools import islice
from pathlib import PurePath

import pandas as pd

from cllm4rec_dist.errors import DataError
from cllm4rec_dist.serving import schemas
from cllm4rec_dist.serving.batching import Batcher, OverloadError
from cllm4rec_dist.serving.live import LiveRecommender, Outcome, Served
from cllm4rec_dist.serving.new_items import NewItem, violations
from cllm4rec_dist.serving.options import MAX_EXPLAINED, ServiceOptions
from cllm4rec_dist.serving.problems import (
    MAX_REPORTED,
    RequestError,
    did_you_mean,
    from_input_error,
    request_error,
    shown,
)
from cllm4rec_dist.serving.queries import Answer, Query
from cllm4rec_dist.serving.telemetry import Telemetry

STUCK_SECONDS = 60.0
"""Time on one batch after which the model is reported as unhealthy."""


class Service:
    """A live recommender with its request queue and metrics, for one event loop.

    Args:
        live: the recommender in use.
        options: settings of the service.
        replica: name of this replica, for its metrics.
    """

    def __init__(self, live: LiveRecommender, options: ServiceOptions, replica: str) -> None:
        self.live, self.options, self.telemetry = live, options, Telemetry(replica)
        self.batcher: Batcher[Query, tuple[Served, Answer]] = Batcher(
            self._answer, options.max_batch, options.max_waiting, self.telemetry.batch_size.observe
        )
        self.telemetry.step.set_function(lambda: live.info.step)
        self.telemetry.waiting.set_function(lambda: self.batcher.num_held)

    async def recommend(self, request: schemas.RecommendRequest) -> schemas.RecommendAnswer:
        """Recommend items for a user, a history, or both."""
        current = self.live.current
        new_items, query = _new_items(request.new_items, current), _query(request, current)
        reasons: Sequence[list[schemas.Contribution] | None] | None = None
        async with self._deadline():
            if new_items:
                served, answer = await self.batcher.call(partial(_answer_with, new_items, query, current))
            else:
                served, answer = await self.batcher.submit(query)
            if request.explain and not answer.fallback:
                reasons = await self.batcher.call(partial(_reasons, served, query, answer))
        self.telemetry.fallbacks.inc(answer.fallback)
        self.telemetry.unknown_items.inc(len(answer.unknown_items))
        return schemas.RecommendAnswer(
            items=[
                schemas.RecommendedItem(
                    item=listed.item,
                    title=listed.title,
                    category=served.category(listed.item),
                    score=listed.score,
                    because=because,
                )
                for listed, because in zip(answer.items, reasons or [None] * len(answer.items), strict=True)
            ],
            unknown_items=list(answer.unknown_items),
            fallback=answer.fallback,
            known_user=answer.known_user,
            checkpoint=served.recommender.info.checkpoint,
        )

    async def similar(self, request: schemas.SimilarRequest) -> schemas.SimilarAnswer:
        """Return the most similar items of an item."""
        served = self.live.current
        new_items = _new_items(request.new_items, served)
        if served.recommender.items.row(request.item) is None and request.item not in {new.item for new in new_items}:
            raise request_error(
                "item", f"{shown(request.item)} is not an item of this run", "Find items with GET /items?query=TITLE."
            )
        async with self._deadline():
            served, table = await self.batcher.call(partial(_similar_with, new_items, request, served))
        return schemas.SimilarAnswer(
            items=[
                schemas.SimilarItem(item=item, title=title, category=served.category(item), score=score)
                for item, title, score in zip(table["item"], table["title"], table["score"], strict=True)
            ],
            checkpoint=served.recommender.info.checkpoint,
        )

    def find(self, query: str, limit: int) -> schemas.FoundItems:
        """Search items by title or id. Thread-safe."""
        served = self.live.current
        items = served.recommender.items
        return schemas.FoundItems(
            items=[
                schemas.Item(item=items.ids[row], title=items.titles[row], category=served.category(items.ids[row]))
                for row in items.search(query, limit)
            ]
        )

    def run(self) -> schemas.Run:
        """Describe the run in use; paths are reduced to their last component."""
        info = self.live.info
        return schemas.Run(
            run=_name(self.options.run, info.stage),
            checkpoint=info.checkpoint,
            step=info.step,
            date=info.date,
            stage=info.stage,
            best_metric=info.best_metric,
            best_value=info.best_value,
            corpus=info.corpus,
            num_users=info.num_users,
            num_items=info.num_items,
            backbone=PurePath(info.backbone).name,
            num_parameters=info.num_parameters,
            num_trained=info.num_trained,
            has_categories=info.has_categories,
            version=version("cllm4rec_dist"),
        )

    def health(self) -> schemas.Health:
        """Report whether the model answers or hangs."""
        info = self.live.info
        status = "ok" if self.batcher.busy_seconds() < STUCK_SECONDS else "stuck"
        return schemas.Health(status=status, checkpoint=info.checkpoint, step=info.step)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Check for new checkpoints inside the context; finish pending requests on exit."""
        watch = asyncio.create_task(self.live.watch(self.options.check_seconds, self._count_reload))
        try:
            yield
        finally:
            watch.cancel()
            await self.batcher.close()

    def _count_reload(self, outcome: Outcome) -> None:
        if outcome != "unchanged":
            self.telemetry.reloads.labels(outcome).inc()

    def _answer(self, queries: Sequence[Query]) -> list[tuple[Served, Answer] | Exception]:
        """Answer a batch. If it fails, each query is retried alone, so that an error affects only its own query."""
        served = self.live.current
        try:
            return [(served, answer) for answer in served.recommender.answer(queries)]
        except Exception as error:
            if len(queries) == 1:
                return [from_input_error(error) if isinstance(error, DataError) else error]
        return [answer for query in queries for answer in self._answer([query])]

    @asynccontextmanager
    async def _deadline(self) -> AsyncIterator[None]:
        """Turn overload and timeouts inside the context into status 503 with a Retry-After header."""
        seconds = self.options.timeout_seconds
        try:
            async with asyncio.timeout(seconds):
                yield
        except OverloadError as error:
            raise request_error(
                "service",
                f"has {error.value} requests to answer already",
                "Send the request again later.",
                503,
                retry_after="1",
            ) from None
        except TimeoutError:
            raise request_error(
                "service",
                f"did not answer within {seconds:g} seconds",
                "Send the request again later.",
                503,
                retry_after="5",
            ) from None


def _name(run: str, stage: str) -> str:
    """Display name of a run: its last path component that is neither the stage nor `runs`.

    SHOP/runs/finetune -> SHOP; runs/DEMO/finetune -> DEMO; RUN -> RUN.
    """
    parts = [part for part in PurePath(run).parts if part not in (stage, "runs")]
    return parts[-1] if parts else stage


def _query(request: schemas.RecommendRequest, served: Served) -> Query:
    """Build the query of a request. Raises RequestError if this run cannot answer it."""
    known = () if request.user is None else served.recommender.known_history(request.user)
    if known is None:
        raise request_error(
            "user",
            f"{shown(request.user)} is not a user of this run",
            "For somebody who came later, leave user out and send their items as history.",
        )
    num_items = len({*known, *request.history})
    if request.explain and num_items > MAX_EXPLAINED:
        raise request_error(
            "explain",
            f"requires a history of at most {MAX_EXPLAINED} items, but this one has {num_items}",
            "Leave explain out, or send a shorter history without user.",
        )
    exclude = frozenset(request.exclude)
    for index, category in enumerate(request.exclude_categories):
        if category not in served.items_of:
            raise _unknown_category(index, category, served)
        exclude |= served.items_of[category]
    return Query(
        history=tuple(request.history),
        user=request.user,
        top=request.top,
        exclude=exclude,
        only=None if request.only is None else frozenset(request.only),
        min_score=request.min_score,
        include_seen=request.include_seen,
    )


def _new_items(given: Sequence[schemas.NewItem], served: Served) -> list[NewItem]:
    """Return the new products of a request. Raises RequestError if they are no new ones."""
    new_items = [NewItem(new.item, new.title, new.description) for new in given]
    wrong = islice(violations("new_items", new_items, served.recommender.items), MAX_REPORTED)
    if found := [violation for error in wrong for violation in from_input_error(error).violations]:
        raise RequestError(found)
    return new_items


def _with_new_items(new_items: Sequence[NewItem], served: Served) -> Served:
    """Add products to what is served, for one request. Raises RequestError if nothing is known of their words."""
    try:
        return replace(served, recommender=served.recommender.with_new_items(new_items))
    except DataError as error:
        raise from_input_error(error) from None


def _answer_with(new_items: Sequence[NewItem], query: Query, served: Served) -> tuple[Served, Answer]:
    served = _with_new_items(new_items, served)
    (answer,) = served.recommender.answer([query])
    return served, answer


def _similar_with(
    new_items: Sequence[NewItem], request: schemas.SimilarRequest, served: Served
) -> tuple[Served, pd.DataFrame]:
    served = _with_new_items(new_items, served)
    return served, served.recommender.similar(request.item, request.top)


def _unknown_category(index: int, category: str, served: Served) -> Exception:
    field = f"exclude_categories.{index}"
    if not served.items_of:
        return request_error(
            "exclude_categories",
            "cannot be used: the items of this run have no categories",
            "Leave it out, or prepare the corpus with a category column.",
        )
    cure = f"{did_you_mean(category, list(served.items_of))}GET /items shows an item's category."
    return request_error(field, f"{shown(category)} is not a category of this run", cure)


def _reasons(served: Served, query: Query, answer: Answer) -> list[list[schemas.Contribution]]:
    """Contributions of the history to each listed item, largest first."""
    table = served.recommender.contributions(query.history, [listed.item for listed in answer.items], query.user)
    columns = (table[listed.item] for listed in answer.items)
    items = served.recommender.items
    names = [(items.ids[row], items.titles[row]) for row in items.rows(table.index)]
    return [
        [
            schemas.Contribution(item=item, title=title, contribution=value)
            for value, (item, title) in sorted(zip(column, names, strict=True), key=lambda pair: -pair[0])
        ]
        for column in columns
    ]
