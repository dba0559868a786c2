"""Scores of a column for each role: its name counts most, its values confirm or contradict it."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from cllm4rec_dist.project.column_stats import ColumnStats


def _name_points(kinds: Collection[str], weights: Mapping[str, float]) -> float:
    return sum(weight for kind, weight in weights.items() if kind in kinds)


def _id_points(stats: ColumnStats, *, is_key: bool = False) -> float:
    """Score the values as ids: ids in orders repeat, a key does not."""
    points = 0.0
    if stats.fill_ratio < 0.5:
        points -= 2
    if stats.num_distinct < 2:
        points -= 3
    if not is_key and len(stats.texts) >= 50 and stats.distinct_ratio > 0.98:
        points -= 2  # an id of the order
    if not stats.kinds & {"user", "item", "id"} and (stats.is_scale or stats.is_epoch):
        points -= 2
    if stats.num_words > 3 or stats.mean_length > 60:
        points -= 3
    numbers = stats.numbers()
    if np.isfinite(numbers).all() and (numbers != np.floor(numbers)).any():
        points -= 4
    return points - (2 if stats.times is not None and stats.texts.str.contains(r"\d[-/.:]\d").all() else 0)


def user_points(stats: ColumnStats, *, is_key: bool = False) -> float:
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
        "rating": -3,
    }
    points = _name_points(stats.kinds, names)
    if stats.kinds == {"personal"}:
        points = 2.0  # an email address is an id if there is no better one
    if {"user", "title"} <= stats.kinds and stats.num_words > 1.2:
        points -= 2
    return points + _id_points(stats, is_key=is_key)


def item_points(stats: ColumnStats, *, is_key: bool = False) -> float:
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
    return _name_points(stats.kinds, names) + _id_points(stats, is_key=is_key)


def join_ratio(orders: ColumnStats, key: ColumnStats) -> float:
    """Return the fraction of the orders' ids that are in a nearly unique column."""
    if not orders.ids or key.distinct_ratio < 0.9:
        return 0.0
    return len(orders.ids & key.ids) / len(orders.ids)


def join_points(stats: ColumnStats, others: Mapping[str, ColumnStats], kind: str) -> float:
    """Score how well the values match the ids in the best column of another file."""
    best = 0.0
    for other in others.values():
        if stats.ids and other.ids:
            ratio = len(stats.ids & other.ids) / len(stats.ids)
            named = 0.5 if {kind, "id"} & other.kinds else 0.0
            is_key = other.distinct_ratio > 0.5 or stats.values is other.values
            best = max(best, (3 if is_key else 1) * ratio + named) if ratio >= 0.3 else best
    return best


def time_points(stats: ColumnStats) -> float:
    if stats.times is None:
        return -1.0
    points = 2.0 * bool(stats.kinds & {"time"}) - 2.0 * bool(stats.kinds & {"other_time"})
    written = stats.values.dtype.is_temporal() or bool(stats.texts.str.contains(r"\d[-/.:]\d|[A-Za-z]{3}").all())
    written |= stats.is_epoch and not stats.kinds - {"time", "other_time", "order"}
    return points + 1.5 * written + 0.5 + 1.5 * ("order" in stats.kinds) + 0.3 * stats.distinct_ratio


def rating_points(stats: ColumnStats) -> float:
    if "rating" not in stats.kinds or stats.fill_ratio < 0.8:
        return 0.0
    numbers = stats.numbers(decimal_mark(stats))
    good = np.isfinite(numbers)
    if good.mean() < 0.9 or len(np.unique(numbers[good])) > 101:
        return 0.0
    return 3.0 if numbers[good].min() >= -10 and numbers[good].max() <= 100 else 0.0


def decimal_mark(stats: ColumnStats) -> str:
    commas = stats.texts.str.contains(r"^-?\d+,\d+$").any()
    return "," if commas and not stats.texts.str.contains(r"^-?\d+\.\d+$").any() else "."


def guess_threshold(ratings: np.ndarray) -> float | None:
    """Guess the lowest rating that means "liked": 4 of 5 stars, 8 of 10, 80 of 100, 1 of 0 and 1."""
    ratings = ratings[np.isfinite(ratings)]
    if not len(ratings) or ratings.min() == ratings.max():
        return None
    most = float(ratings.max())
    scale = next((scale for scale in (1, 5, 10, 100) if most <= scale), None)
    return None if scale is None else float(1 if scale == 1 else 0.8 * scale)


def review_points(stats: ColumnStats) -> float:
    if stats.num_words < 3 or stats.mean_length < 15:
        return -1.0
    return (
        3.0 * ("review" in stats.kinds) - 2.0 * bool(stats.kinds & {"title", "description"}) - ("item" in stats.kinds)
    )


def title_points(stats: ColumnStats) -> float:
    if stats.fill_ratio < 0.3 or np.isfinite(stats.numbers()).mean() > 0.9:
        return -1.0
    names = {"title": 3, "item": 0.5, "user": -3, "category": -2, "description": -1, "personal": -3, "id": -1}
    points = _name_points(stats.kinds, names)
    return points + 0.5 * (stats.num_words > 1.5) + 0.5 * (stats.distinct_ratio > 0.5)


def category_points(stats: ColumnStats) -> float:
    if "category" not in stats.kinds or not stats.num_distinct > 1 or stats.fill_ratio < 0.3:
        return 0.0
    is_number = len(stats.texts) and np.isfinite(stats.numbers()).mean() > 0.9
    repeated = stats.num_distinct <= max(20, 0.3 * len(stats.texts))
    return 3.0 * repeated - 1.5 * bool(is_number) - 0.5 * ("id" in stats.kinds) - 0.1 * bool(stats.kinds - {"category"})


def is_description(stats: ColumnStats) -> bool:
    """True for a column that describes items: long texts, or a name such as brand, author or genre."""
    if stats.fill_ratio < 0.05 or np.isfinite(stats.numbers()).mean() > 0.5 or stats.texts.str.contains("://").any():
        return False
    if stats.kinds & {"user", "personal", "price", "order", "time", "review", "other_time"}:
        return False
    return bool(stats.kinds & {"description", "category"}) or (stats.num_words > 5 and stats.distinct_ratio > 0.3)


def is_profile(stats: ColumnStats) -> bool:
    if stats.kinds & {"personal", "price", "other_time"} or stats.times is not None or not len(stats.texts):
        return False
    if {"title", "profile"} & stats.kinds == {"title"} or stats.fill_ratio < 0.05:
        return False
    return "profile" in stats.kinds or (stats.distinct_ratio < 0.5 and np.isfinite(stats.numbers()).mean() < 0.5)
