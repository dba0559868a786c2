"""One request for a list of items, and its answer, in external ids."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Query:
    """One request for a list.

    Attributes:
        history: item ids, oldest first. For a known user what came after training: it goes behind what the corpus has.
        user: a known user, whose row and items are used; None for anyone else.
        top: length of the list.
        exclude: item ids never to be listed (sold out); those that the run does not know are ignored.
        only: list nothing but these item ids (a category); None for the whole catalog.
        min_score: leave out items that score lower.
        include_seen: list items of the history too.
    """

    history: tuple[str, ...] = ()
    user: str | None = None
    top: int = 10
    exclude: frozenset[str] = frozenset()
    only: frozenset[str] | None = None
    min_score: float | None = None
    include_seen: bool = False


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
