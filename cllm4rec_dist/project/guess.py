"""Guess the columns of orders, items and customers from their names and values.

Each column gets points for each role: names count most, values confirm or contradict them (ids that join two files,
dates that parse, numbers on a rating scale). If the points do not decide, nothing is guessed: `choose` prompts, or
raises an error that names the option to set.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cllm4rec_dist.corpus.about import alike_ids, spelling_hint
from cllm4rec_dist.corpus.date_order import UndecidedDates, decide_orders, numeric_formats
from cllm4rec_dist.corpus.times import read_times
from cllm4rec_dist.corpus.values import MISSING_WORDS
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.project.column_stats import ColumnStats, column_stats
from cllm4rec_dist.project.points import (
    category_points,
    decimal_mark,
    guess_threshold,
    is_description,
    is_profile,
    item_points,
    join_points,
    join_ratio,
    rating_points,
    review_points,
    time_points,
    title_points,
    user_points,
)
from cllm4rec_dist.project.sample import Sample, flatten_cure, require_columns

NONE = "none"
"""Value of an option for a column that the file does not have."""
_MIN_POINTS = 2.0
"""Least points for a guess."""
_MIN_JOIN_RATIO = 0.3
"""Least fraction of the orders' ids in a column that counts as their key."""
_DAY = 86400
_MIN_SAME_DAYS = 0.99
"""Least fraction of rows in which two columns of times have the same day, for them to mean the same."""
_MIN_MARGIN = 0.9
"""Least margin of the best guess over the second, in points."""

Choose = Callable[[str, str, Sequence[str]], str]
"""`choose(option, question, names)` returns the column that the user chooses, or raises a ConfigError."""


def refuse(option: str, question: str, names: Sequence[str]) -> str:
    """Raise a ConfigError: the `Choose` without a terminal."""
    raise ConfigError(option, list(names), f"leave it open {question}", f"Give {option} with one of them.")


@dataclass(frozen=True)
class Interactions:
    """Columns of orders; None for a missing one."""

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
    """Columns of items."""

    item: str
    title: str | None = None
    category: str | None = None
    description: tuple[str, ...] = ()
    has_html: bool = False


@dataclass(frozen=True)
class Customers:
    """Columns of customers."""

    user: str
    text: tuple[str, ...]
    has_html: bool = False
    left_out: tuple[str, ...] = ()


@dataclass(frozen=True)
class ColumnOptions:
    """Column options of the user: a column name, `none`, or None to guess."""

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
    sample: Sample, options: ColumnOptions, item_ids: Mapping[str, ColumnStats], user_ids: Mapping[str, ColumnStats]
) -> Interactions:
    """Guess the columns of orders.

    Args:
        sample: first rows of the orders.
        options: options of the user.
        item_ids, user_ids: columns of the files of items and customers by name; empty without such a file.

    Raises:
        ConfigError: for a column that cannot be guessed.
    """
    stats = {name: each for name, each in column_stats(sample).items() if name not in sample.nested}
    item = _chosen(
        sample,
        "--item-column",
        options.item,
        options.choose,
        "item",
        {name: item_points(each) + join_points(each, item_ids, "item") for name, each in stats.items()},
    )
    user = _chosen(
        sample,
        "--user-column",
        options.user,
        options.choose,
        "customer",
        {
            name: user_points(each) + join_points(each, user_ids, "user")
            for name, each in stats.items()
            if name != item or options.user == name
        },
    )
    left = {name: each for name, each in stats.items() if name not in (user, item)}
    time = _time(sample, options, left)
    left.pop(time or "", None)
    points = {name: rating_points(each) for name, each in left.items()}
    rating = _optional(sample, "--rating-column", options.rating, points)
    left.pop(rating or "", None)
    texts = left | {name: each for name, each in column_stats(sample).items() if name in sample.nested}
    text = _optional(
        sample, "--review-column", options.review, {name: review_points(each) for name, each in texts.items()}
    )
    decimal = "." if rating is None else decimal_mark(stats[rating])
    threshold = None
    if rating is not None:
        guessed = guess_threshold(stats[rating].numbers(decimal))
        threshold = guessed if options.rating_threshold is None else options.rating_threshold
    return Interactions(
        user=user,
        item=item,
        time=time,
        time_format=None if time is None else _time_format(stats[time], options),
        rating=rating,
        rating_threshold=threshold,
        decimal=decimal,
        text=text,
        has_html=text is not None and texts[text].has_tags,
    )


def guess_items(sample: Sample, options: ColumnOptions, orders: ColumnStats) -> Items:
    """Guess the columns of items.

    Args:
        sample: first rows of the items; of the orders, if both are in one file.
        options: options of the user.
        orders: column of item ids in the orders.
    """
    stats = column_stats(sample)
    item = orders.name if sample.role == "orders" else _key(sample, "--items-key", options.items_key, options, orders)
    left = {name: each for name, each in stats.items() if name != item}
    title = _optional(sample, "--title-column", options.title, {n: title_points(each) for n, each in left.items()})
    left.pop(title or "", None)
    category = _optional(
        sample, "--category-column", options.category, {name: category_points(each) for name, each in left.items()}
    )
    texts = tuple(name for name, each in left.items() if name == category or is_description(each))
    used = [name for name in (title, *texts) if name is not None]
    return Items(item, title, category, texts, any(stats[name].has_tags for name in used))


def guess_customers(sample: Sample, options: ColumnOptions, orders: ColumnStats) -> Customers:
    """Guess the columns of customers; personal data (names, addresses) is left out."""
    stats = column_stats(sample)
    is_same_file = sample.role == "orders"
    user = orders.name if is_same_file else _key(sample, "--customers-key", options.customers_key, options, orders)
    left = {name: each for name, each in stats.items() if name != user}
    texts = tuple(name for name, each in left.items() if is_profile(each))
    return Customers(
        user, texts, any(stats[name].has_tags for name in texts), tuple(name for name in left if name not in texts)
    )


def _key(sample: Sample, option: str, given: str | None, options: ColumnOptions, orders: ColumnStats) -> str:
    """Guess the column whose values are the ids in a column of the orders.

    A column that joins far better than all others is chosen whatever its name is.

    Raises:
        DataError: if no column has an id of the orders and no name suggests one.
    """
    what = "item" if sample.role == "items" else "customer"
    stats = {name: each for name, each in column_stats(sample).items() if name not in sample.nested}
    ratios = {name: join_ratio(orders, each) for name, each in stats.items()}
    best, margin = _best(ratios)
    if given is None and best is not None and ratios[best] >= _MIN_JOIN_RATIO and margin >= ratios[best] / 2:
        return best
    name_points = item_points if what == "item" else user_points
    kind = "item" if what == "item" else "user"
    points = {
        name: name_points(each, is_key=True) + join_points(orders, {name: each}, kind) for name, each in stats.items()
    }
    is_undecided = not any(points[name] >= _MIN_POINTS for name in points)
    if given is None and is_undecided and not sample.nested and max(ratios.values(), default=0.0) == 0:
        raise _unjoined(sample, option, what, orders, stats)
    return _chosen(sample, option, given, options.choose, what, points)


def _unjoined(
    sample: Sample, option: str, what: str, orders: ColumnStats, stats: Mapping[str, ColumnStats]
) -> DataError:
    """Return the error that no column has an id of the orders, with a hint at one that spells them differently."""
    hint = ""
    for each in stats.values():
        alike = alike_ids(sorted(orders.ids), sorted(each.ids))
        if len(alike) >= _MIN_JOIN_RATIO * len(orders.ids):
            hint = f" In {each.name!r}{spelling_hint(*alike[0], len(alike)).replace(' ids of the two sides', ' ids')}"
            break
    return DataError(
        f"--{sample.role}",
        list(stats),
        f"are its columns, and none of them has ids of the {what}s of the orders, such as {orders.example!r}",
        f"Check the files: the values of one column must be those of the {what}s in --orders; {option} names it.{hint}",
    )


def _chosen(
    sample: Sample, option: str, given: str | None, choose: Choose, what: str, points: Mapping[str, float]
) -> str:
    """Return the given or guessed name of a required column."""
    if given is not None and given not in sample.nested:
        return require_columns(sample, option, given)
    best, margin = _best(points)
    if given is None and best is not None and points[best] >= _MIN_POINTS and margin >= _MIN_MARGIN:
        return best
    question = f"which column of --{sample.role} has the id of the {what}"
    if sample.nested and (best is None or given is not None or points[best] < _MIN_POINTS):
        raise DataError(option, given or list(points), f"leave it open {question}", flatten_cure(sample))
    likely = sorted((name for name in points if points[name] > -2), key=lambda name: -points[name]) or sample.names
    return choose(option, question, likely)


def _optional(sample: Sample, option: str, given: str | None, points: Mapping[str, float]) -> str | None:
    """Return the given or guessed name of an optional column, or None."""
    if given is not None:
        return None if given == NONE else require_columns(sample, option, given)
    best, _ = _best(points)
    return best if best is not None and points[best] >= _MIN_POINTS else None


def _time(sample: Sample, options: ColumnOptions, stats: Mapping[str, ColumnStats]) -> str | None:
    """Return the given or guessed name of the column of times, or None.

    Two columns that could be it are no question if they are at most a day apart, as a date and its Unix time are.
    """
    points = {name: time_points(each) for name, each in stats.items()}
    best = _optional(sample, "--time-column", options.time, points)
    if options.time is not None or best is None:
        return best
    rivals = [
        name
        for name in points
        if name != best
        and points[name] >= max(_MIN_POINTS, points[best] - _MIN_MARGIN)
        and not _are_same_days(stats[best], stats[name])
    ]
    if not rivals:
        return best
    question = "which column has the time of the purchase"
    return options.choose("--time-column", question, sorted([best, *rivals], key=lambda name: -points[name]))


def _are_same_days(stats: ColumnStats, other: ColumnStats) -> bool:
    """True if the times of two columns are at most a day apart in nearly all rows that have both."""
    first, second = stats.seconds, other.seconds
    both = ~np.isnan(first) & ~np.isnan(second)
    return bool(both.sum() >= 0.5 * len(both)) and bool((np.abs(first - second)[both] <= _DAY).mean() >= _MIN_SAME_DAYS)


def _best(points: Mapping[str, float]) -> tuple[str | None, float]:
    """Return the first name with the most points, and its margin over the second."""
    ranked = sorted(points, key=lambda name: -points[name])
    if not ranked:
        return None, 0.0
    second = points[ranked[1]] if len(ranked) > 1 else float("-inf")
    return ranked[0], points[ranked[0]] - second


def _time_format(stats: ColumnStats, options: ColumnOptions) -> str | None:
    """Return the format of times if the values alone do not decide it, as in `3/4/2024` or `20240304`."""
    if options.time_format is not None:
        return options.time_format
    if stats.is_compact_date:
        return "%Y%m%d"
    if stats.times is None or not stats.times.is_undecided.any():
        return None
    rows = np.flatnonzero(stats.times.is_undecided)
    example = stats.texts[int(rows[0])] if len(stats.times.seconds) == len(stats.texts) else stats.example
    dates = UndecidedDates(rows, {order: each[rows] for order, each in stats.times.readings.items()}, example)
    formats = numeric_formats(example)
    order = decide_orders({"": dates})[""]
    if order is None and "." in example:
        order = "day-first"  # dates with points have the day first everywhere
    if order is not None or not formats:
        return formats[order] if order in formats and _fits(stats, formats[order]) else None
    likely = [form for order, form in formats.items() if order in dates.possible] or [*formats.values()]
    question = f"how {example!r} of column {stats.name!r} is read"
    return options.choose("--time-format", question, likely)


def _fits(stats: ColumnStats, time_format: str) -> bool:
    """True if a format parses all values that parse without it."""
    assert stats.times is not None
    read = read_times(stats.values.filter(stats.values.is_not_null()), stats.name, time_format, MISSING_WORDS)
    return int(np.isnan(read.seconds).sum()) <= int(stats.times.wrong.sum())
