"""Amazon reviews and the Yelp open dataset: JSON lines with texts of users about items."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from cllm4rec_dist.corpus.raw import (
    RawData,
    Row,
    SkipLog,
    clean_text,
    clean_title,
    collect_interactions,
    collect_texts,
    known_ids,
    no_texts,
)
from cllm4rec_dist.corpus.recipe import AmazonSource, YelpSource
from cllm4rec_dist.corpus.sources.files import read_objects, require_field

Objects = Iterator[tuple[int, dict[str, Any]]]


def _checked(path: str, log: SkipLog, *required: tuple[str, ...]) -> Objects:
    """The objects of a file whose first one has at least one field of each group."""
    objects = read_objects(path, log)
    for first in objects:
        for fields in required:
            require_field(path, first[1], fields)
        return chain([first], objects)
    return iter(())


def _joined(value: object) -> str:
    """A description that is a text or a list of paragraphs."""
    parts = value if isinstance(value, list) else [value]
    return " ".join(text for part in parts if (text := clean_text(part)))


def read_amazon(source: AmazonSource) -> RawData:
    """Reviews and metadata; the text of a review is its body, or its title where it has no body."""
    log = SkipLog(source.on_bad_line)
    rows = _amazon_2023(source.reviews, log) if source.edition == "2023" else _amazon_2014(source.reviews, log)
    interactions = collect_interactions(rows, source.reviews, log, has_rating=True, has_text=True)
    items = no_texts("item", ("title", "description"))
    if source.metadata is not None:
        key = "parent_asin" if source.edition == "2023" else "asin"
        described = (
            (entry.get(key), clean_title(entry.get("title")), _joined(entry.get("description")))
            for _, entry in _checked(source.metadata, log, (key,))
        )
        items = collect_texts(described, "item", ("title", "description"), known_ids(interactions, "item"), log)
    return RawData(interactions, items, no_texts("user", ("text",)), log.skipped)


def _amazon_2014(path: str, log: SkipLog) -> Iterator[Row]:
    for line, entry in _checked(path, log, ("reviewerID",), ("asin",)):
        text = entry.get("reviewText") or entry.get("summary")
        yield line, entry.get("reviewerID"), entry.get("asin"), entry.get("overall"), entry.get("unixReviewTime"), text


def _amazon_2023(path: str, log: SkipLog) -> Iterator[Row]:
    for line, entry in _checked(path, log, ("user_id",), ("parent_asin", "asin")):
        item = entry.get("parent_asin") or entry.get("asin")
        text = entry.get("text") or entry.get("title")
        yield line, entry.get("user_id"), item, entry.get("rating"), entry.get("timestamp"), text


def read_yelp(source: YelpSource) -> RawData:
    """Reviews; a business's description is its categories and city, a user's text when they joined and were elite."""
    log = SkipLog(source.on_bad_line)
    reviews = _checked(source.reviews, log, ("user_id",), ("business_id",))
    rows: Iterator[Row] = (
        (line, e.get("user_id"), e.get("business_id"), e.get("stars"), e.get("date"), e.get("text"))
        for line, e in reviews
    )
    interactions = collect_interactions(rows, source.reviews, log, has_rating=True, has_text=True)
    items, users = no_texts("item", ("title", "description")), no_texts("user", ("text",))
    if source.businesses is not None:
        described = (
            (e.get("business_id"), clean_title(e.get("name")), _business(e))
            for _, e in _checked(source.businesses, log, ("business_id",))
        )
        items = collect_texts(described, "item", ("title", "description"), known_ids(interactions, "item"), log)
    if source.users is not None:
        profiles = ((e.get("user_id"), _member(e)) for _, e in _checked(source.users, log, ("user_id",)))
        users = collect_texts(profiles, "user", ("text",), known_ids(interactions, "user"), log)
    return RawData(interactions, items, users, log.skipped)


def _business(entry: dict[str, Any]) -> str:
    categories, city = clean_title(entry.get("categories")), clean_title(entry.get("city"))
    return ", ".join(part for part in (categories, city and f"in {city}") if part)


def _member(entry: dict[str, Any]) -> str:
    # Counts and averages of the user's reviews are left out: they include the held-out ones.
    since, elite = clean_title(entry.get("yelping_since"))[:4], clean_title(entry.get("elite"))
    return ", ".join(part for part in (since and f"member since {since}", elite and f"elite in {elite}") if part)
