"""What the columns of orders, items and customers are, by their names and by their values.

A column gets points for each thing that it could be: names give most of them, values confirm or take back (ids that
join two files, dates that can be read, numbers on a scale of stars). Where the points leave it open which column it is,
nothing is guessed: `choose` asks, or refuses with the option that decides it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from cllm4rec_dist.corpus.times import numeric_formats, read_times
from cllm4rec_dist.corpus.values import MISSING_WORDS
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.project.facts import Facts, facts_of
from cllm4rec_dist.project.sample import Sample, require_columns

NONE = "none"
"""What an option says of a column that there shall not be."""
_ENOUGH = 2.0
"""Points from which on a guess is made."""
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
class Wanted:
    """What the user says of columns: the name of one, `none`, or nothing."""

    user: str | None = None
    item: str | None = None
    time: str | None = None
    rating: str | None = None
    review: str | None = None
    title: str | None = None
    category: str | None = None
    time_format: str | None = None
    rating_threshold: float | None = None
    choose: Choose = refuse


def guess_interactions(
    sample: Sample, wanted: Wanted, item_ids: Mapping[str, Facts], user_ids: Mapping[str, Facts]
) -> Interactions:
    """The columns of orders.

    Args:
        sample: of the orders.
        wanted: what the user says.
        item_ids, user_ids: columns of the files of items and customers, by name; empty where there is no such file.

    Raises:
        ConfigError: for a column that cannot be told.
    """
    facts = facts_of(sample)
    item = _chosen(
        sample,
        "--item-column",
        wanted.item,
        wanted.choose,
        "item",
        {name: _item_points(each) + _join_points(each, item_ids, "item") for name, each in facts.items()},
    )
    user = _chosen(
        sample,
        "--user-column",
        wanted.user,
        wanted.choose,
        "customer",
        {
            name: _user_points(each) + _join_points(each, user_ids, "user")
            for name, each in facts.items()
            if name != item or wanted.user == name
        },
    )
    left = {name: each for name, each in facts.items() if name not in (user, item)}
    time = _optional(sample, "--time-column", wanted.time, {name: _time_points(each) for name, each in left.items()})
    left.pop(time or "", None)
    points = {name: _rating_points(each) for name, each in left.items()}
    rating = _optional(sample, "--rating-column", wanted.rating, points)
    left.pop(rating or "", None)
    text = _optional(
        sample, "--review-column", wanted.review, {name: _review_points(each) for name, each in left.items()}
    )
    decimal = "." if rating is None else _decimal_mark(facts[rating])
    threshold = None
    if rating is not None:
        guessed = _threshold(facts[rating].numbers(decimal))
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
        has_html=text is not None and facts[text].has_tags,
    )


def guess_items(sample: Sample, wanted: Wanted, orders: Facts) -> Items:
    """The columns of items.

    Args:
        sample: of the items; may be of the same file as the orders.
        wanted: what the user says.
        orders: the column of items in the orders.
    """
    facts = facts_of(sample)
    points = {name: _item_points(each) + _join_points(orders, {name: each}, "item") for name, each in facts.items()}
    item = _chosen(sample, "", orders.name if sample.role == "orders" else None, wanted.choose, "item", points)
    left = {name: each for name, each in facts.items() if name != item}
    title = _optional(sample, "--title-column", wanted.title, {n: _title_points(each) for n, each in left.items()})
    left.pop(title or "", None)
    category = _optional(
        sample, "--category-column", wanted.category, {name: _category_points(each) for name, each in left.items()}
    )
    texts = tuple(name for name, each in left.items() if name == category or _is_description(each))
    used = [name for name in (title, *texts) if name is not None]
    return Items(item, title, category, texts, any(facts[name].has_tags for name in used))


def guess_customers(sample: Sample, wanted: Wanted, orders: Facts) -> Customers:
    """The columns of customers; what tells who somebody is (names, addresses) is left out."""
    facts = facts_of(sample)
    points = {name: _user_points(each) + _join_points(orders, {name: each}, "user") for name, each in facts.items()}
    user = _chosen(sample, "", None, wanted.choose, "customer", points)
    left = {name: each for name, each in facts.items() if name != user}
    texts = tuple(name for name, each in left.items() if _is_profile(each))
    return Customers(
        user, texts, any(facts[name].has_tags for name in texts), tuple(name for name in left if name not in texts)
    )


def _chosen(
    sample: Sample, option: str, wanted: str | None, choose: Choose, what: str, points: Mapping[str, float]
) -> str:
    """The column that must be there."""
    if wanted is not None:
        return require_columns(sample, option, wanted)
    best, margin = _best(points)
    if best is not None and points[best] >= _ENOUGH and margin >= _SURE:
        return best
    likely = sorted((name for name in points if points[name] > -2), key=lambda name: -points[name]) or sample.names
    if option:
        return choose(option, f"which column of --{sample.role} has the id of the {what}", likely)
    raise DataError(
        f"--{sample.role}",
        likely,
        f"are its columns, and none of them, or several, have ids of the {what}s of the orders",
        f"Check the files: the values of one column must be those of the {what}s in --orders.",
    )


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


def _says(kinds: Collection[str], weights: Mapping[str, float]) -> float:
    return sum(weight for kind, weight in weights.items() if kind in kinds)


def _id_points(facts: Facts) -> float:
    """What values say about a column of ids that come again and again."""
    points = 0.0
    if facts.share_given < 0.5:
        points -= 2
    if facts.num_distinct < 2:
        points -= 3
    if len(facts.texts) >= 50 and facts.share_distinct > 0.98:
        points -= 2  # an id of the order
    if facts.num_words > 3 or facts.mean_length > 60:
        points -= 3
    numbers = facts.numbers()
    if np.isfinite(numbers).all() and (numbers != np.floor(numbers)).any():
        points -= 4
    return points - (2 if facts.times is not None and facts.texts.str.contains(r"\d[-/.:]\d").all() else 0)


def _user_points(facts: Facts) -> float:
    names = {
        "user": 3,
        "id": 1,
        "order": -3,
        "item": -2,
        "personal": -1,
        "profile": -3,
        "time": -3,
        "quantity": -1,
        "price": -3,
        "category": -3,
    }
    points = _says(facts.kinds, names)
    if facts.kinds == {"personal"}:
        points = 1.0  # an address of mail is an id, if there is no better one
    if {"user", "title"} <= facts.kinds and facts.num_words > 1.2:
        points -= 2
    return points + _id_points(facts)


def _item_points(facts: Facts) -> float:
    names = {
        "item": 3,
        "id": 1,
        "order": -3,
        "user": -2,
        "title": -2,
        "price": -3,
        "quantity": -1,
        "category": -3,
        "time": -3,
        "review": -3,
        "rating": -3,
        "description": -2,
    }
    return _says(facts.kinds, names) + _id_points(facts)


def _join_points(facts: Facts, others: Mapping[str, Facts], kind: str) -> float:
    """How well values are ids of another file, which says an id of each only once or so."""
    best = 0.0
    for other in others.values():
        if facts.ids and other.ids:
            share = len(facts.ids & other.ids) / len(facts.ids)
            named = 0.5 if {kind, "id"} & other.kinds else 0.0
            is_key = other.share_distinct > 0.5 or facts.values is other.values
            best = max(best, (3 if is_key else 1) * share + named) if share >= 0.3 else best
    return best


def _time_points(facts: Facts) -> float:
    if facts.times is None:
        return -1.0
    points = 2.0 * bool(facts.kinds & {"time"}) - 2.0 * bool(facts.kinds & {"other_time"})
    written = facts.values.dtype.is_temporal() or bool(facts.texts.str.contains(r"\d[-/.:]\d|[A-Za-z]{3}").all())
    return points + 1.5 * written + 0.5 + 0.2 * ("order" in facts.kinds) + 0.3 * facts.share_distinct


def _rating_points(facts: Facts) -> float:
    if "rating" not in facts.kinds or facts.share_given < 0.8:
        return 0.0
    numbers = facts.numbers(_decimal_mark(facts))
    good = np.isfinite(numbers)
    if good.mean() < 0.9 or len(np.unique(numbers[good])) > 101:
        return 0.0
    return 3.0 if numbers[good].min() >= -10 and numbers[good].max() <= 100 else 0.0


def _decimal_mark(facts: Facts) -> str:
    commas = facts.texts.str.contains(r"^-?\d+,\d+$").any()
    return "," if commas and not facts.texts.str.contains(r"^-?\d+\.\d+$").any() else "."


def _threshold(ratings: np.ndarray) -> float | None:
    """The least rating that means that somebody liked it: 4 of 5 stars, 8 of 10, 80 of 100, 1 of 0 and 1."""
    ratings = ratings[np.isfinite(ratings)]
    if not len(ratings) or ratings.min() == ratings.max():
        return None
    most = float(ratings.max())
    scale = next((scale for scale in (1, 5, 10, 100) if most <= scale), None)
    return None if scale is None else float(1 if scale == 1 else 0.8 * scale)


def _review_points(facts: Facts) -> float:
    if facts.num_words < 3 or facts.mean_length < 15:
        return -1.0
    return (
        3.0 * ("review" in facts.kinds) - 2.0 * bool(facts.kinds & {"title", "description"}) - ("item" in facts.kinds)
    )


def _title_points(facts: Facts) -> float:
    if facts.share_given < 0.3 or np.isfinite(facts.numbers()).mean() > 0.9:
        return -1.0
    names = {"title": 3, "item": 0.5, "user": -3, "category": -2, "description": -1, "personal": -3, "id": -1}
    points = _says(facts.kinds, names)
    return points + 0.5 * (facts.num_words > 1.5) + 0.5 * (facts.share_distinct > 0.5)


def _category_points(facts: Facts) -> float:
    if "category" not in facts.kinds or not facts.num_distinct > 1 or facts.share_given < 0.3:
        return 0.0
    is_number = len(facts.texts) and np.isfinite(facts.numbers()).mean() > 0.9
    repeated = facts.num_distinct <= max(20, 0.3 * len(facts.texts))
    return 3.0 * repeated - 1.5 * bool(is_number) - 0.5 * ("id" in facts.kinds) - 0.1 * bool(facts.kinds - {"category"})


def _is_description(facts: Facts) -> bool:
    """Words about an item: long texts, and what its name says (a brand, an author, a genre)."""
    if np.isfinite(facts.numbers()).mean() > 0.5 or facts.share_given < 0.05 or facts.texts.str.contains("://").any():
        return False
    if facts.kinds & {"user", "personal", "price", "order", "time", "review", "other_time"}:
        return False
    return bool(facts.kinds & {"description", "category"}) or (facts.num_words > 5 and facts.share_distinct > 0.3)


def _is_profile(facts: Facts) -> bool:
    if facts.kinds & {"personal", "price", "other_time"} or facts.times is not None or not len(facts.texts):
        return False
    if {"title", "profile"} & facts.kinds == {"title"} or facts.share_given < 0.05:
        return False
    return "profile" in facts.kinds or (facts.share_distinct < 0.5 and np.isfinite(facts.numbers()).mean() < 0.5)


def _time_format(facts: Facts, wanted: Wanted) -> str | None:
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
