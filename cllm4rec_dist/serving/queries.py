"""A query for a list of items, its answer, and validation of ids and numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real
from operator import index

from cllm4rec_dist.errors import DataError

_SHOWN = 3
"""Number of ids that an error message repeats."""


@dataclass(frozen=True)
class Query:
    """A query for a list of items.

    Attributes:
        history: item ids, oldest first. For a known user those after training; they are appended to the corpus' items.
        user: id of a known user, whose row and items are used; None for anyone else.
        top: length of the list.
        exclude: item ids to leave out (sold out); unknown ids are ignored.
        only: item ids to choose from (a category); None for the whole catalog.
        min_score: leave out items with a lower score; a fallback list has no scores, so all of it.
        include_seen: also list items of the history.

    Raises:
        DataError: for a value of the wrong type.
    """

    history: tuple[str, ...] = ()
    user: str | None = None
    top: int = 10
    exclude: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    min_score: float | None = None
    include_seen: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "history", checked_ids("history", self.history))
        object.__setattr__(self, "exclude", checked_set("exclude", self.exclude))
        if self.only is not None:
            object.__setattr__(self, "only", checked_set("only", self.only))
        if self.user is not None:
            checked_id("user", self.user)
        object.__setattr__(self, "top", checked_top(self.top))
        if self.min_score is not None:
            object.__setattr__(self, "min_score", checked_number("min_score", self.min_score))


@dataclass(frozen=True)
class Recommendation:
    """An item of a list.

    Attributes:
        title: the item's title; "" if it has none.
        score: the model's score; None in a fallback list of popular items.
    """

    item: str
    title: str
    score: float | None


@dataclass(frozen=True)
class Answer:
    """Answer to a query.

    Attributes:
        items: best first; fewer than `top` if no more are left.
        unknown_items: items of the history that are unknown to the run and were ignored.
        fallback: True if there is no user row and no known item, so that popular items are listed.
        known_user: True if the user has a row in the run.
    """

    items: tuple[Recommendation, ...]
    unknown_items: tuple[str, ...]
    fallback: bool
    known_user: bool


def checked_id(field: str, value: object) -> str:
    """Validate an external id.

    Raises:
        DataError: if it is not a string.
    """
    if isinstance(value, str):
        return str(value)
    cure = "Give the id as text."
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        cure = f"Ids are texts: give {str(value).removesuffix('.0')!r}, with leading zeros if the data has them."
    raise DataError(field, value, "is not a text", cure)


def checked_ids(field: str, values: object) -> tuple[str, ...]:
    """Validate ordered external ids: a list, tuple, array or column.

    Raises:
        DataError: for a single string, an unordered collection, or an element that is not a string.
    """
    if isinstance(values, tuple) and all(type(value) is str for value in values):
        return values
    if isinstance(values, Set | Mapping):
        raise DataError(field, type(values).__name__, "has no order", "Give a list of ids, the oldest first.")
    return tuple(checked_id(f"{field}[{position}]", value) for position, value in enumerate(_each(field, values)))


def checked_set(field: str, values: object) -> frozenset[str]:
    """Validate a collection of external ids whose order does not matter.

    Raises:
        DataError: for a single string, or an element that is not a string.
    """
    if isinstance(values, frozenset) and all(type(value) is str for value in values):
        return values
    return frozenset(checked_id(f"{field}: element", value) for value in _each(field, values))


def _each(field: str, values: object) -> Iterable[object]:
    if isinstance(values, str | bytes):
        raise DataError(field, values, "is one text, not a list of ids", f"Write [{values!r}].")
    if not isinstance(values, Iterable):
        raise DataError(field, values, "is not a list of ids", "Give a list of texts.")
    return values


def checked_top(value: object) -> int:
    """Validate the length of a list.

    Raises:
        DataError: if it is not an integer of at least 1.
    """
    try:
        top = 0 if isinstance(value, bool) else index(value)  # type: ignore[arg-type]
    except TypeError:
        top = 0
    if top < 1:
        raise DataError("top", value, "must be a whole number of 1 or more", "Write for example top=10.")
    return top


def checked_number(field: str, value: object) -> float:
    """Validate a real number.

    Raises:
        DataError: for anything else, including NaN.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise DataError(field, value, "must be a number", f"Leave {field} out for no limit.")
    return float(value)


def checked_histories(histories: object) -> tuple[list[object], list[tuple[str, ...]]]:
    """Validate histories and return their names and item ids.

    Args:
        histories: a list of lists, which are named by position, or a mapping from names to lists.

    Raises:
        DataError: if it is neither.
    """
    if isinstance(histories, Mapping):
        names, lists = list(histories), list(histories.values())
        for name in names:
            checked_id("histories: name", name)
    else:
        lists = [histories] if isinstance(histories, str) else list(_each("histories", histories))
        names = list(range(len(lists)))
        if lists and all(isinstance(part, str) for part in lists):
            shown = ", ".join([*(repr(str(part)) for part in lists[:_SHOWN]), *(["..."] if lists[_SHOWN:] else [])])
            value = histories if isinstance(histories, str) else lists[:_SHOWN]
            raise DataError("histories", value, "is one history, not a list of them", f"Write [[{shown}]].")
    return names, [checked_ids(f"histories[{name!r}]", part) for name, part in zip(names, lists, strict=True)]


def first_of_each(values: Sequence[int]) -> list[int]:
    """Return distinct values in the order of their first occurrence, as a corpus keeps the items of a history."""
    return list(dict.fromkeys(values))
