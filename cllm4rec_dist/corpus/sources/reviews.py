"""Readers of Amazon reviews, the Yelp open dataset and Steam: JSON lines with reviews."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import polars as pl

from cllm4rec_dist.corpus.about import TextCollector
from cllm4rec_dist.corpus.raw import InteractionCollector, RawData, Rules
from cllm4rec_dist.corpus.recipe import AmazonSource, FileSource, SteamSource, YelpSource
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.sources.files import RawFile, find_files
from cllm4rec_dist.corpus.sources.objects import Getter, Object, object_batches, read_objects, require_fields
from cllm4rec_dist.corpus.values import id_text, number_text, plain_text

Groups = Sequence[tuple[str, ...]]


def _field(*names: str, convert: Callable[[Any], str | None]) -> Callable[[Object], str | None]:
    """Return a getter of the first field with a value."""

    def get(entry: Object) -> str | None:
        for name in names:
            value = entry.get(name)
            if value is not None and value != "":
                return convert(value)
        return None

    return get


def _rules(source: FileSource, *, html: bool = False, rating: bool = True) -> Rules:
    return Rules(
        missing=source.missing,
        has_rating=rating,
        has_text=True,
        has_html=html,
        allow_unmatched=source.allow_unmatched,
        new_items=source.new_items,
    )


def _read_reviews(
    source: FileSource,
    paths: Sequence[str],
    getters: Sequence[Getter],
    required: Groups,
    rules: Rules,
    log: SkipLog,
    expand: Callable[[Iterator[tuple[int, Object]]], Iterator[tuple[int, Object]]] | None = None,
) -> RawData:
    collector = InteractionCollector(log, rules)
    for file in find_files(paths):
        objects = require_fields(file.path, read_objects(file, log, source.encoding), *required)
        if expand is not None:
            objects = expand(objects)
        collector.add_file(file.path, object_batches(file, objects, getters, log))
    return collector.finish()


def _add_texts(
    collector: TextCollector,
    source: FileSource,
    files: Sequence[RawFile],
    getters: Sequence[Getter],
    required: Groups,
    log: SkipLog,
) -> pl.DataFrame:
    for file in files:
        objects = require_fields(file.path, read_objects(file, log, source.encoding), *required)
        collector.add_file(file.path, object_batches(file, objects, getters, log))
    return collector.finish()


def read_amazon(source: AmazonSource) -> RawData:
    """Read reviews and metadata; the text of a review is its body, or its title if it has no body."""
    log, rules = SkipLog(source.on_bad_line, source.max_lost), _rules(source, html=True)
    is_2023 = source.edition == "2023"
    user, rating, key = ("user_id", "rating", "parent_asin") if is_2023 else ("reviewerID", "overall", "asin")
    items = ("parent_asin", "asin") if is_2023 else ("asin",)
    times = ("timestamp",) if is_2023 else ("unixReviewTime", "reviewTime")
    texts = ("text", "title") if is_2023 else ("reviewText", "summary")
    getters: list[Getter] = [
        ("user", _field(user, convert=id_text)),
        ("item", _field(*items, convert=id_text)),
        ("rating", _field(rating, convert=number_text)),
        ("timestamp", _field(*times, convert=number_text)),
        ("text", _field(*texts, convert=plain_text)),
    ]
    raw = _read_reviews(source, source.reviews, getters, [(user,), items], rules, log)
    if source.metadata is not None:
        about: list[Getter] = [
            ("item", _field(key, convert=id_text)),
            ("title", _field("title", convert=plain_text)),
            ("description", _field("description", convert=plain_text)),
        ]
        collector = TextCollector("item", ("title", "description"), raw.item_ids, log, rules, one_line=("title",))
        items_table = _add_texts(collector, source, find_files(source.metadata), about, [(key,)], log)
        raw = replace(raw, items=items_table)
    return raw


def read_yelp(source: YelpSource) -> RawData:
    """Read reviews, businesses (with categories and city) and users (with years of joining and of elite status)."""
    log, rules = SkipLog(source.on_bad_line, source.max_lost), _rules(source)
    getters: list[Getter] = [
        ("user", _field("user_id", convert=id_text)),
        ("item", _field("business_id", convert=id_text)),
        ("rating", _field("stars", convert=number_text)),
        ("timestamp", _field("date", convert=number_text)),
        ("text", _field("text", convert=plain_text)),
    ]
    raw = _read_reviews(source, source.reviews, getters, [("user_id",), ("business_id",)], rules, log)
    if source.businesses is not None:
        about: list[Getter] = [
            ("item", _field("business_id", convert=id_text)),
            ("title", _field("name", convert=plain_text)),
            ("description", _business),
        ]
        items = TextCollector(
            "item", ("title", "description"), raw.item_ids, log, rules, one_line=("title", "description")
        )
        table = _add_texts(items, source, find_files(source.businesses), about, [("business_id",)], log)
        raw = replace(raw, items=table)
    if source.users is not None:
        profile: list[Getter] = [("user", _field("user_id", convert=id_text)), ("text", _member)]
        users = TextCollector("user", ("text",), raw.user_ids, log, rules, one_line=("text",))
        raw = replace(raw, users=_add_texts(users, source, find_files(source.users), profile, [("user_id",)], log))
    return raw


def _business(entry: Object) -> str | None:
    categories, city = plain_text(entry.get("categories")), plain_text(entry.get("city"))
    return ", ".join(part for part in (categories, city and f"in {city}") if part) or None


def _member(entry: Object) -> str | None:
    # Counts and averages of the user's reviews would leak held-out reviews.
    since, elite = (plain_text(entry.get("yelping_since")) or "")[:4], plain_text(entry.get("elite"))
    return (
        ", ".join(part for part in (since and f"member since {since}", elite and f"elite in {elite}") if part) or None
    )


def read_steam(source: SteamSource) -> RawData:
    """Read reviews, or lists of games; without ratings, every game is an interaction."""
    log, rules = SkipLog(source.on_bad_line, source.max_lost), _rules(source, rating=False)
    users, items = ("username", "user_id"), ("product_id", "item_id")
    getters: list[Getter] = [
        ("user", _field(*users, convert=id_text)),
        ("item", _field(*items, convert=id_text)),
        ("timestamp", _field("date", convert=number_text)),
        ("text", _field("text", "review", convert=plain_text)),
    ]
    required = [users, (*items, "items", "reviews")]
    raw = _read_reviews(source, source.reviews, getters, required, rules, log, _each_game)
    if source.games is not None:
        about: list[Getter] = [
            ("item", _field("id", convert=id_text)),
            ("title", _field("title", "app_name", convert=plain_text)),
            ("description", _game),
        ]
        games = TextCollector("item", ("title", "description"), raw.item_ids, log, rules, one_line=("title",))
        table = _add_texts(games, source, find_files(source.games), about, [("id", "app_name", "title")], log)
        raw = replace(raw, items=table)
    return raw


def _each_game(objects: Iterator[tuple[int, Object]]) -> Iterator[tuple[int, Object]]:
    """Yield an object for each game; split objects with all games of a user."""
    for line, entry in objects:
        games = entry.get("items", entry.get("reviews"))
        if not isinstance(games, list):
            yield line, entry
            continue
        for game in games:
            # Dates are sentences ("Posted November 5, 2011."), some without a year: use the file's order instead.
            fields = game if isinstance(game, dict) else {"item_id": game}
            row = {"user_id": entry.get("user_id"), "item_id": fields.get("item_id"), "review": fields.get("review")}
            yield line, row


def _game(entry: Object) -> str | None:
    parts = [("genres", entry.get("genres")), ("tags", entry.get("tags"))]
    texts = [f"{name}: {', '.join(map(str, value))}" for name, value in parts if isinstance(value, list) and value]
    return ", ".join(texts) or None
