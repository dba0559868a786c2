"""Points for each thing that a column could be: its name gives most of them, its values confirm or take back."""

from __future__ import annotations

from collections.abc import Collection, Mapping

import numpy as np

from cllm4rec_dist.project.facts import Facts


def _says(kinds: Collection[str], weights: Mapping[str, float]) -> float:
    return sum(weight for kind, weight in weights.items() if kind in kinds)


def _id_points(facts: Facts, *, is_key: bool = False) -> float:
    """What values say about a column of ids: those of orders come again and again, a key does not."""
    points = 0.0
    if facts.share_given < 0.5:
        points -= 2
    if facts.num_distinct < 2:
        points -= 3
    if not is_key and len(facts.texts) >= 50 and facts.share_distinct > 0.98:
        points -= 2  # an id of the order
    if not facts.kinds & {"user", "item", "id"} and (facts.is_scale or facts.is_epoch):
        points -= 2
    if facts.num_words > 3 or facts.mean_length > 60:
        points -= 3
    numbers = facts.numbers()
    if np.isfinite(numbers).all() and (numbers != np.floor(numbers)).any():
        points -= 4
    return points - (2 if facts.times is not None and facts.texts.str.contains(r"\d[-/.:]\d").all() else 0)


def user_points(facts: Facts, *, is_key: bool = False) -> float:
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
    points = _says(facts.kinds, names)
    if facts.kinds == {"personal"}:
        points = 2.0  # an address of mail is an id, if there is no better one
    if {"user", "title"} <= facts.kinds and facts.num_words > 1.2:
        points -= 2
    return points + _id_points(facts, is_key=is_key)


def item_points(facts: Facts, *, is_key: bool = False) -> float:
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
    return _says(facts.kinds, names) + _id_points(facts, is_key=is_key)


def share_joined(orders: Facts, key: Facts) -> float:
    """Share of the orders' ids that a column has, which has each only once or so."""
    if not orders.ids or key.share_distinct < 0.9:
        return 0.0
    return len(orders.ids & key.ids) / len(orders.ids)


def join_points(facts: Facts, others: Mapping[str, Facts], kind: str) -> float:
    """How well values are ids of another file, which says an id of each only once or so."""
    best = 0.0
    for other in others.values():
        if facts.ids and other.ids:
            share = len(facts.ids & other.ids) / len(facts.ids)
            named = 0.5 if {kind, "id"} & other.kinds else 0.0
            is_key = other.share_distinct > 0.5 or facts.values is other.values
            best = max(best, (3 if is_key else 1) * share + named) if share >= 0.3 else best
    return best


def time_points(facts: Facts) -> float:
    if facts.times is None:
        return -1.0
    points = 2.0 * bool(facts.kinds & {"time"}) - 2.0 * bool(facts.kinds & {"other_time"})
    written = facts.values.dtype.is_temporal() or bool(facts.texts.str.contains(r"\d[-/.:]\d|[A-Za-z]{3}").all())
    written |= facts.is_epoch and not facts.kinds - {"time", "other_time", "order"}
    return points + 1.5 * written + 0.5 + 0.2 * ("order" in facts.kinds) + 0.3 * facts.share_distinct


def rating_points(facts: Facts) -> float:
    if "rating" not in facts.kinds or facts.share_given < 0.8:
        return 0.0
    numbers = facts.numbers(decimal_mark(facts))
    good = np.isfinite(numbers)
    if good.mean() < 0.9 or len(np.unique(numbers[good])) > 101:
        return 0.0
    return 3.0 if numbers[good].min() >= -10 and numbers[good].max() <= 100 else 0.0


def decimal_mark(facts: Facts) -> str:
    commas = facts.texts.str.contains(r"^-?\d+,\d+$").any()
    return "," if commas and not facts.texts.str.contains(r"^-?\d+\.\d+$").any() else "."


def guess_threshold(ratings: np.ndarray) -> float | None:
    """The least rating that means that somebody liked it: 4 of 5 stars, 8 of 10, 80 of 100, 1 of 0 and 1."""
    ratings = ratings[np.isfinite(ratings)]
    if not len(ratings) or ratings.min() == ratings.max():
        return None
    most = float(ratings.max())
    scale = next((scale for scale in (1, 5, 10, 100) if most <= scale), None)
    return None if scale is None else float(1 if scale == 1 else 0.8 * scale)


def review_points(facts: Facts) -> float:
    if facts.num_words < 3 or facts.mean_length < 15:
        return -1.0
    return (
        3.0 * ("review" in facts.kinds) - 2.0 * bool(facts.kinds & {"title", "description"}) - ("item" in facts.kinds)
    )


def title_points(facts: Facts) -> float:
    if facts.share_given < 0.3 or np.isfinite(facts.numbers()).mean() > 0.9:
        return -1.0
    names = {"title": 3, "item": 0.5, "user": -3, "category": -2, "description": -1, "personal": -3, "id": -1}
    points = _says(facts.kinds, names)
    return points + 0.5 * (facts.num_words > 1.5) + 0.5 * (facts.share_distinct > 0.5)


def category_points(facts: Facts) -> float:
    if "category" not in facts.kinds or not facts.num_distinct > 1 or facts.share_given < 0.3:
        return 0.0
    is_number = len(facts.texts) and np.isfinite(facts.numbers()).mean() > 0.9
    repeated = facts.num_distinct <= max(20, 0.3 * len(facts.texts))
    return 3.0 * repeated - 1.5 * bool(is_number) - 0.5 * ("id" in facts.kinds) - 0.1 * bool(facts.kinds - {"category"})


def is_description(facts: Facts) -> bool:
    """Words about an item: long texts, and what its name says (a brand, an author, a genre)."""
    if np.isfinite(facts.numbers()).mean() > 0.5 or facts.share_given < 0.05 or facts.texts.str.contains("://").any():
        return False
    if facts.kinds & {"user", "personal", "price", "order", "time", "review", "other_time"}:
        return False
    return bool(facts.kinds & {"description", "category"}) or (facts.num_words > 5 and facts.share_distinct > 0.3)


def is_profile(facts: Facts) -> bool:
    if facts.kinds & {"personal", "price", "other_time"} or facts.times is not None or not len(facts.texts):
        return False
    if {"title", "profile"} & facts.kinds == {"title"} or facts.share_given < 0.05:
        return False
    return "profile" in facts.kinds or (facts.share_distinct < 0.5 and np.isfinite(facts.numbers()).mean() < 0.5)
