"""What the columns of orders, items and customers are, by their names and by their values.

A column gets points for each thing that it could be: names give most of them, values confirm or take back (ids that
join two files, dates that can be read, numbers on a scale of stars). Where the points leave it open which column it is,
nothing is guessed: `choose` asks, or refuses with the option that decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from cllm4rec_dist.corpus.about import alike_ids, spelling_hint
from cllm4rec_dist.corpus.times import numeric_formats, read_times
from cllm4rec_dist.corpus.values import MISSING_WORDS
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.project.facts import Facts, facts_of
from cllm4rec_dist.project.points import (
    category_points,
    decimal_mark,
    guess_threshold,
    is_description,
    is_profile,
    item_points,
    join_points,
    rating_points,
    review_points,
    share_joined,
    time_points,
    title_points,
    user_points,
)
from cllm4rec_dist.project.sample import Sample, flatten_cure, require_columns

NONE = "none"
"""What an option says of a column that there shall not be."""
_ENOUGH = 2.0
"""Points from which on a guess is made."""
_JOINS = 0.3
"""Share of the orders' ids from which on a column is taken for their key."""
_SURE = 0.9
"""Points by which the best guess must be ahead of the next one."""

Choose = Callable[[str, str, Sequence[str]], str]
"""`choose(option, question, names)`: the column that the user names, or a ConfigError that names the option."""


def refuse(option: str, question: str, names: Sequence[str]) -> str:
    """The `Choose` of a command without a terminal."""
    raise ConfigError(option, list(names), f"leave it open {question}", f"Give {option} with one of them.")


@dataclass(frozen=True)
class Interactions:
    """What the columns of orders are; None for what there is not."""

    user: str
    item: str
    time: str | None = None
    time_format: str | None = None
    rating: str | None = None
    rating_threshold: float | None = None
    decimal: str = "."
    text: str | None = None
    has_html: bool = False


@dataclass(frozen=True)
class Items:
    """What the columns of items are."""

    item: str
    title: str | None = None
    category: str | None = None
    description: tuple[str, ...] = ()
    has_html: bool = False


@dataclass(frozen=True)
class Customers:
    """What the columns of customers are."""

    user: str
    text: tuple[str, ...]
    has_html: bool = False
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class ColumnOptions:
    """What the user says of columns: the name of one, `none`, or nothing."""

    user: str | None = None
    item: str | None = None
    time: str | None = None
    rating: str | None = None
    review: str | None = None
    title: str | None = None
    category: str | None = None
    items_key: str | None = None
    customers_key: str | None = None
    time_format: str | None = None
    rating_threshold: float | None = None
    choose: Choose = refuse


def guess_interactions(
    sample: Sample, wanted: ColumnOptions, item_ids: Mapping[str, Facts], user_ids: Mapping[str, Facts]
) -> Interactions:
    """The columns of orders.

    Args:
        sample: of the orders.
        wanted: what the user says.
        item_ids, user_ids: columns of the files of items and customers, by name; empty where there is no such file.

    Raises:
        ConfigError: for a column that cannot be told.
    """
    facts = {name: each for name, each in facts_of(sample).items() if name not in sample.nested}
    item = _chosen(
        sample,
        "--item-column",
        wanted.item,
        wanted.choose,
        "item",
        {name: item_points(each) + join_points(each, item_ids, "item") for name, each in facts.items()},
    )
    user = _chosen(
        sample,
        "--user-column",
        wanted.user,
        wanted.choose,
        "customer",
        {
            name: user_points(each) + join_points(each, user_ids, "user")
            for name, each in facts.items()
            if name != item or wanted.user == name
        },
    )
    left = {name: each for name, each in facts.items() if name not in (user, item)}
    time = _optional(sample, "--time-column", wanted.time, {name: time_points(each) for name, each in left.items()})
    left.pop(time or "", None)
    points = {name: rating_points(each) for name, each in left.items()}
    rating = _optional(sample, "--rating-column", wanted.rating, points)
    left.pop(rating or "", None)
    texts = left | {name: each for name, each in facts_of(sample).items() if name in sample.nested}
    text = _optional(
        sample, "--review-column", wanted.review, {name: review_points(each) for name, each in texts.items()}
    )
    decimal = "." if rating is None else decimal_mark(facts[rating])
    threshold = None
    if rating is not None:
        guessed = guess_threshold(facts[rating].numbers(decimal))
        threshold = guessed if wanted.rating_threshold is None else wanted.rating_threshold
    return Interactions(
        user=user,
        item=item,
        time=time,
        time_format=None if time is None else _time_format(facts[time], wanted),
        rating=rating,
        rating_threshold=threshold,
        decimal=decimal,
        text=text,
        has_html=text is not None and texts[text].has_tags,
    )


def guess_items(sample: Sample, wanted: ColumnOptions, orders: Facts) -> Items:
    """The columns of items.

    Args:
        sample: of the items; that of the orders where these are in the same file.
        wanted: what the user says.
        orders: the column of items in the orders.
    """
    facts = facts_of(sample)
    item = orders.name if sample.role == "orders" else _key(sample, "--items-key", wanted.items_key, wanted, orders)
    left = {name: each for name, each in facts.items() if name != item}
    title = _optional(sample, "--title-column", wanted.title, {n: title_points(each) for n, each in left.items()})
    left.pop(title or "", None)
    category = _optional(
        sample, "--category-column", wanted.category, {name: category_points(each) for name, each in left.items()}
    )
    texts = tuple(name for name, each in left.items() if name == category or is_description(each))
    used = [name for name in (title, *texts) if name is not None]
    return Items(item, title, category, texts, any(facts[name].has_tags for name in used))


def guess_customers(sample: Sample, wanted: ColumnOptions, orders: Facts) -> Customers:
    """The columns of customers; what tells who somebody is (names, addresses) is left out."""
    facts = facts_of(sample)
    is_same_file = sample.role == "orders"
    user = orders.name if is_same_file else _key(sample, "--customers-key", wanted.customers_key, wanted, orders)
    left = {name: each for name, each in facts.items() if name != user}
    texts = tuple(name for name, each in left.items() if is_profile(each))
    return Customers(
        user, texts, any(facts[name].has_tags for name in texts), tuple(name for name in left if name not in texts)
    )


def _key(sample: Sample, option: str, given: str | None, wanted: ColumnOptions, orders: Facts) -> str:
    """The column whose values are the ids in a column of the orders.

    One that joins far better than all others is it, whatever its name.

    Raises:
        DataError: where no column has an id of the orders, and no name speaks of one.
    """
    what = "item" if sample.role == "items" else "customer"
    facts = {name: each for name, each in facts_of(sample).items() if name not in sample.nested}
    shares = {name: share_joined(orders, each) for name, each in facts.items()}
    best, margin = _best(shares)
    if given is None and best is not None and shares[best] >= _JOINS and margin >= shares[best] / 2:
        return best
    name_points = item_points if what == "item" else user_points
    kind = "item" if what == "item" else "user"
    points = {
        name: name_points(each, is_key=True) + join_points(orders, {name: each}, kind) for name, each in facts.items()
    }
    is_open = not any(points[name] >= _ENOUGH for name in points)
    if given is None and is_open and not sample.nested and max(shares.values(), default=0.0) == 0:
        raise _unjoined(sample, option, what, orders, facts)
    return _chosen(sample, option, given, wanted.choose, what, points)


def _unjoined(sample: Sample, option: str, what: str, orders: Facts, facts: Mapping[str, Facts]) -> DataError:
    """That no column has an id of the orders, with one that has them spelt in another way."""
    hint = ""
    for each in facts.values():
        alike = alike_ids(sorted(orders.ids), sorted(each.ids))
        if len(alike) >= _JOINS * len(orders.ids):
            hint = f" In {each.name!r}{spelling_hint(*alike[0], len(alike)).replace(' ids of the two sides', ' ids')}"
            break
    return DataError(
        f"--{sample.role}",
        list(facts),
        f"are its columns, and none of them has ids of the {what}s of the orders, such as {orders.example!r}",
        f"Check the files: the values of one column must be those of the {what}s in --orders; {option} names it.{hint}",
    )


def _chosen(
    sample: Sample, option: str, wanted: str | None, choose: Choose, what: str, points: Mapping[str, float]
) -> str:
    """The column that must be there."""
    if wanted is not None and wanted not in sample.nested:
        return require_columns(sample, option, wanted)
    best, margin = _best(points)
    if wanted is None and best is not None and points[best] >= _ENOUGH and margin >= _SURE:
        return best
    question = f"which column of --{sample.role} has the id of the {what}"
    if sample.nested and (best is None or wanted is not None or points[best] < _ENOUGH):
        raise DataError(option, wanted or list(points), f"leave it open {question}", flatten_cure(sample))
    likely = sorted((name for name in points if points[name] > -2), key=lambda name: -points[name]) or sample.names
    return choose(option, question, likely)


def _optional(sample: Sample, option: str, wanted: str | None, points: Mapping[str, float]) -> str | None:
    """The column that need not be there."""
    if wanted is not None:
        return None if wanted == NONE else require_columns(sample, option, wanted)
    best, _ = _best(points)
    return best if best is not None and points[best] >= _ENOUGH else None


def _best(points: Mapping[str, float]) -> tuple[str | None, float]:
    """The name with most points, the first one of several, and by how many it is ahead."""
    ranked = sorted(points, key=lambda name: -points[name])
    if not ranked:
        return None, 0.0
    second = points[ranked[1]] if len(ranked) > 1 else float("-inf")
    return ranked[0], points[ranked[0]] - second


def _time_format(facts: Facts, wanted: ColumnOptions) -> str | None:
    """The format of times, where the values alone do not say it: `3/4/2024`, `20240304`."""
    if wanted.time_format is not None:
        return wanted.time_format
    if facts.is_compact_date:
        return "%Y%m%d"
    times = facts.times
    if times is None or times.day_first is None or times.month_first is None:
        return None
    both = ~np.isnan(times.day_first) | ~np.isnan(times.month_first)
    only_day, only_month = np.isnan(times.month_first[both]).any(), np.isnan(times.day_first[both]).any()
    example = facts.texts.filter(pl.Series(both))[0] if len(both) == len(facts.texts) else facts.example
    formats = numeric_formats(example)
    if formats is None or only_day != only_month:
        found = None if formats is None or only_day == only_month else formats[0 if only_day else 1]
        return found if found is not None and _fits(facts, found) else None
    if "." in formats[0]:
        return formats[0] if _fits(facts, formats[0]) else None  # dates with points have the day first everywhere
    question = f"how {example!r} of column {facts.name!r} is read, with the day or the month first"
    return wanted.choose("--time-format", question, formats)


def _fits(facts: Facts, time_format: str) -> bool:
    """True if a format reads all that can be read without it."""
    assert facts.times is not None
    read = read_times(facts.values.filter(facts.values.is_not_null()), facts.name, time_format, MISSING_WORDS)
    return int(np.isnan(read.seconds).sum()) <= int(facts.times.wrong.sum())
