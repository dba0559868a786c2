"""One request for a list of items, its answer, and the checks of what people give as ids and numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Real
from operator import index

from cllm4rec_dist.errors import DataError

_SHOWN = 3
"""Ids of a list that a message repeats."""


@dataclass(frozen=True)
class Query:
    """One request for a list.

    Attributes:
        history: item ids, oldest first. For a known user what came after training: it goes behind what the corpus has.
        user: a known user, whose row and items are used; None for anyone else.
        top: length of the list.
        exclude: item ids never to be listed (sold out); those that the run does not know are ignored.
        only: list nothing but these item ids (a category); None for the whole catalog.
        min_score: leave out items that score lower; of a fallback that is all of them.
        include_seen: list items of the history too.

    Raises:
        DataError: for a value of another kind.
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
        title: the item's title; "" where it has none.
        score: the model's; None where popular items are listed for want of a history.
    """

    item: str
    title: str
    score: float | None


@dataclass(frozen=True)
class Answer:
    """The list that a query asked for.

    Attributes:
        items: best first; fewer than asked for where no more are left.
        unknown_items: of the query's history, not known to the run and left out.
        fallback: True where nothing is known of the history, so that popular items are listed.
        known_user: True where the user has a row in the run.
    """

    items: tuple[Recommendation, ...]
    unknown_items: tuple[str, ...]
    fallback: bool
    known_user: bool


def checked_id(field: str, value: object) -> str:
    """An external id.

    Raises:
        DataError: for anything but a text.
    """
    if isinstance(value, str):
        return str(value)
    cure = "Give the id as text."
    if isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value):
        cure = f"Ids are texts: give {str(value).removesuffix('.0')!r}, with leading zeros if the data has them."
    raise DataError(field, value, "is not a text", cure)


def checked_ids(field: str, values: object) -> tuple[str, ...]:
    """External ids in order, of a list, a tuple, an array or a column.

    Raises:
        DataError: for one text, what has no order, or an element that is not a text.
    """
    if isinstance(values, tuple) and all(type(value) is str for value in values):
        return values
    if isinstance(values, Set | Mapping):
        raise DataError(field, type(values).__name__, "has no order", "Give a list of ids, the oldest first.")
    return tuple(checked_id(f"{field}[{place}]", value) for place, value in enumerate(_each(field, values)))


def checked_set(field: str, values: object) -> frozenset[str]:
    """External ids in no order.

    Raises:
        DataError: for one text, or an element that is not a text.
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
    """The length of a list.

    Raises:
        DataError: for anything but a whole number of 1 or more.
    """
    try:
        top = 0 if isinstance(value, bool) else index(value)  # type: ignore[arg-type]
    except TypeError:
        top = 0
    if top < 1:
        raise DataError("top", value, "must be a whole number of 1 or more", "Write for example top=10.")
    return top


def checked_number(field: str, value: object) -> float:
    """A real number.

    Raises:
        DataError: for anything else, NaN included.
    """
    if isinstance(value, bool) or not isinstance(value, Real) or math.isnan(value):
        raise DataError(field, value, "must be a number", f"Leave {field} out for no limit.")
    return float(value)


def checked_histories(histories: object) -> tuple[list[object], list[tuple[str, ...]]]:
    """Names and items of several histories: a list of lists, named by position, or lists by name.

    Raises:
        DataError: where it is neither.
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
    """Distinct values in the order of their first place: an item counts once, where it first came, as in a corpus."""
    return list(dict.fromkeys(values))
