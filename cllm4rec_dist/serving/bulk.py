"""Batch recommendation: write lists for many people to files, on one process or on all ranks."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from cllm4rec_dist.distributed.collectives import all_reduce_sum
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.evaluation import topk
from cllm4rec_dist.evaluation.text_items import TextItems
from cllm4rec_dist.evaluation.topk import Ranking
from cllm4rec_dist.evaluation.trained_run import load
from cllm4rec_dist.log import ReportMetrics, progress_bar
from cllm4rec_dist.serving.feed import new_products, with_known_words
from cllm4rec_dist.serving.item_catalog import ItemCatalog
from cllm4rec_dist.serving.known_ids import NEW_ITEMS
from cllm4rec_dist.serving.new_items import NewItem, require_new
from cllm4rec_dist.serving.people import KnownItems, People, gather_people
from cllm4rec_dist.serving.recommendations import FileFormat, list_schema, make_folder, write_recommendations
from cllm4rec_dist.suggestions import plural
from cllm4rec_dist.system import InferenceSystem

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BulkRequest:
    """Request for lists. All ids are external.

    Attributes:
        top: length of a list; shorter if fewer items are left.
        users: people who get a list; None for those of `orders`, or everyone in the corpus if there are no orders.
        orders: later orders by user, oldest first.
        skip_unknown_users: leave out people who are neither in the corpus nor in `orders` instead of raising.
        known_items: corpus items that a prompt shows and a list leaves out: `all`, including held-out items, or
            `train`.
        exclude: items to leave out.
        only: items to choose from; None for the whole catalog.
        min_score: leave out items with a lower score, and lists without scores.
        include_seen: also list items of the history.
        titles: write a column of titles.
        file_format: format of the files.
        batch_users: people per forward of a rank.
        new_items: products of a file, of which those that can be added (`feed.py`) may be listed and ordered.
    """

    top: int
    users: Sequence[str] | None = None
    orders: Mapping[str, Sequence[str]] | None = None
    skip_unknown_users: bool = False
    known_items: KnownItems = "all"
    exclude: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    min_score: float | None = None
    include_seen: bool = False
    titles: bool = False
    file_format: FileFormat = "parquet"
    batch_users: int = 256
    new_items: tuple[NewItem, ...] = ()


@dataclass
class _Counts:
    """Counts of one rank."""

    rows: int = 0
    fallbacks: int = 0
    short: int = 0
    people: int = 0
    new_items: int = 0

    def total(self, world: World) -> _Counts:
        """Sum over all ranks. One all-reduce."""
        local = torch.tensor([self.rows, self.fallbacks, self.short, self.people, self.new_items], device=world.device)
        return _Counts(*all_reduce_sum(local, world, "counts").tolist())


def recommend_users(
    world: World,
    report: ReportMetrics,
    run: str,
    request: BulkRequest,
    output: str,
    backbone: str | None = None,
    corpus: str | None = None,
    new_item_offset: float | None = None,
) -> None:
    """Write the requested lists to `output`, one file per rank (see `recommendations.py`). Collective.

    People keep the order of the request; each rank writes a consecutive part, in rank order.

    Args:
        backbone, corpus: current paths, if they differ from those in the checkpoint.
        new_item_offset: offset of the item biases of new items, instead of the run's.

    Raises:
        DataError: for unknown people, unless `skip_unknown_users` is set, for a new item that comes twice, and if
            none can be added.
    """
    system, _ = load(run, world, backbone, corpus, new_item_offset)
    items = ItemCatalog.from_corpus(system.corpus, with_titles=request.titles)
    products = new_products(NEW_ITEMS, request.new_items, items)
    if products:
        require_new(NEW_ITEMS, products, items)
        texts = TextItems.fit(system)
        products = with_known_words(NEW_ITEMS, products, texts)
        system = texts.add(system, {new.item: new.text for new in products})
    new_ids = [new.item for new in products]
    people = gather_people(
        system.corpus,
        request.users,
        request.orders,
        request.known_items,
        skip_unknown=request.skip_unknown_users,
        new_items=new_ids,
    )
    if products:
        items = items.with_new(new_ids, [new.title for new in products])
    folder, counts = Path(output), _Counts()
    make_folder(folder)
    bar = progress_bar(world, len(people.names), "recommend", "user")
    lists = _lists(system, people, items, request, bar.update)
    is_new = np.append(system.corpus.training_counts() == 0, np.ones(len(products), bool))
    tables = _tables(lists, people.names, items, is_new, request, counts)
    write_recommendations(tables, folder, world, request.file_format, titles=request.titles)
    bar.close()
    counts = counts.total(world)
    if world.is_main:
        logger.info("%s: %s", folder, _summary(people, counts, request))
    report({"users": float(len(people.names)), "rows": float(counts.rows)})


@dataclass(frozen=True)
class _Lists:
    """Lists of some people.

    Attributes:
        people: int64 [m] position of the person of each entry; entries of a person are consecutive, best first.
        items: int64 [m] item rows.
        ranks: int64 [m], from 1.
        scores: float32 [m], NaN for a popular item.
        lengths: number of entries of each person.
        fallbacks: number of people who get popular items.
    """

    people: np.ndarray
    items: np.ndarray
    ranks: np.ndarray
    scores: np.ndarray
    lengths: np.ndarray
    fallbacks: int


def _lists(
    system: InferenceSystem, people: People, items: ItemCatalog, request: BulkRequest, progress: Callable[[int], object]
) -> Iterator[_Lists]:
    candidates = items.candidates(request.only, request.exclude)
    order = items.by_popularity if candidates is None else items.by_popularity[candidates[items.by_popularity]]
    popular = order[: request.top] if request.min_score is None else order[:0]
    unknown = (people.rows < 0) & (people.histories.lengths == 0)
    seen = None if request.include_seen else people.histories
    rankings = topk.rank_users(
        system,
        people.rows,
        people.histories,
        request.top,
        request.batch_users,
        progress,
        seen=seen,
        candidates=candidates,
    )
    for ranked in rankings:
        yield _select(ranked, unknown[ranked.index], popular, request.min_score)


def _select(ranked: Ranking, unknown: np.ndarray, popular: np.ndarray, min_score: float | None) -> _Lists:
    """Select the items to list; people with `unknown` set get the `popular` items, without a score."""
    listed = np.isfinite(ranked.scores) & (ranked.scores >= (-np.inf if min_score is None else min_score))
    items, scores = ranked.items.copy(), ranked.scores.astype(np.float32)
    listed[unknown] = np.arange(items.shape[1]) < len(popular)
    items[unknown, : len(popular)] = popular
    scores[unknown] = np.nan
    index, column = np.nonzero(listed)
    lengths = listed.sum(axis=1)
    return _Lists(
        ranked.index[index], items[index, column], column + 1, scores[index, column], lengths, int(unknown.sum())
    )


def _tables(
    lists: Iterable[_Lists],
    names: Sequence[str],
    items: ItemCatalog,
    is_new: np.ndarray,
    request: BulkRequest,
    counts: _Counts,
) -> Iterator[pa.Table]:
    schema = list_schema(titles=request.titles)
    ids, titles = pa.array(items.ids, pa.string()), pa.array(items.titles, pa.string())
    users = pa.array(names, pa.string())
    for batch in lists:
        counts.rows += len(batch.items)
        counts.fallbacks += batch.fallbacks
        counts.short += int((batch.lengths < request.top).sum())
        counts.people += len(batch.lengths)
        counts.new_items += int(is_new[batch.items].sum())
        columns = {
            "user": users.take(pa.array(batch.people)),
            "item": ids.take(pa.array(batch.items)),
            "title": titles.take(pa.array(batch.items)),
            "rank": pa.array(batch.ranks, pa.int32()),
            "score": pa.array(batch.scores, pa.float32(), from_pandas=True),  # NaN becomes null
        }
        yield pa.table([columns[name] for name in schema.names], schema=schema)


def _summary(people: People, counts: _Counts, request: BulkRequest) -> str:
    """Summary for the log: what was written and what was left out."""
    parts = [f"{plural(counts.people, 'user')}, {plural(counts.rows, 'row')}"]
    if counts.fallbacks:
        parts.append(f"{plural(counts.fallbacks, 'user')} without a known item (popular items, without a score)")
    if counts.new_items:
        parts.append(f"{plural(counts.new_items, 'row')} with new items")
    if people.unknown_items:
        parts.append(f"{plural(people.unknown_items, 'ordered item')} unknown to the run and left out")
    if counts.short:
        parts.append(f"{plural(counts.short, 'user')} with fewer than {plural(request.top, 'item')}")
    if people.unknown_users:
        parts.append(
            f"{plural(len(people.unknown_users), 'unknown user')} left out, such as {people.unknown_users[0]!r}"
        )
    return "; ".join(parts)
