"""Raw data as every reader of `sources/` returns it, and the rules that all of them share.

Raw files are dirty, and a reader that drops rows in silence makes results that nobody can check. So there is one way to
leave something out, `SkipLog`, which counts it under a reason, and one place that decides what is left out, here:
unreadable values, missing ids, missing ratings where the data has ratings, second interactions of a user with an item,
texts that are empty or about nobody. Ids are exact strings: nothing is normalised, whatever the script.

Which columns mean what is left to the readers, filters by rating and count to `catalog.py`.
"""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Iterable, Set
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, Literal

import numpy as np
import pandas as pd

from cllm4rec_dist.errors import DataError

_CHUNK_ROWS = 1 << 18
_MISSING = ("", "nan", "NaN")

Row = tuple[int, Any, Any, Any, Any, Any]
"""Line number, user, item, rating, timestamp, text; None where a source has no such column."""


@dataclass
class SkipLog:
    """What is left out while reading.

    Attributes:
        on_bad_line: `skip` counts a line that cannot be read, `error` stops at it.
        skipped: reason -> count.
    """

    on_bad_line: Literal["skip", "error"] = "skip"
    skipped: Counter[str] = field(default_factory=Counter)

    def skip(self, reason: str, count: int = 1) -> None:
        """Count something that is left out."""
        if count:
            self.skipped[reason] += count

    def bad_line(self, path: str, line: int, found: object, why: str) -> None:
        """Count a line that cannot be read. DataError with its number if the recipe asks for that."""
        if self.on_bad_line == "error":
            raise DataError(
                f"{path} line {line}", f"{found!s:.120}", why, "Mend the line, or set on_bad_line: skip in the recipe."
            )
        self.skip(f"unreadable line of {path.rsplit('/', 1)[-1]}")


@dataclass(frozen=True)
class RawData:
    """What a source holds.

    Attributes:
        interactions: columns user str, item str, rating float (NaN if the source has none), timestamp float (NaN where
            unknown), text str ("" if none), position int (order in the file); one row for a user and an item.
        items: columns item str, title str, description str ("" if none); items that have interactions and a text.
        users: columns user str, text str; users that have interactions and a text.
        skipped: everything left out: reason -> count.
    """

    interactions: pd.DataFrame
    items: pd.DataFrame
    users: pd.DataFrame
    skipped: Counter[str]


def clean_text(value: object) -> str:
    """A text without HTML entities, surrounding blanks and lone surrogates; "" for anything but text and numbers."""
    if not isinstance(value, str):
        return "" if not isinstance(value, int | float) or value != value else str(value)
    text = html.unescape(value).strip()
    # JSON may hold half of a character, which no UTF-8 file can store.
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def clean_title(value: object) -> str:
    """A clean text on one line."""
    return " ".join(clean_text(value).split())


def _identifier(value: object) -> str | None:
    """An id as exact string, "" for a missing one, None for something that is no id."""
    if value is None or (isinstance(value, float) and value != value):
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    name = str(value)
    if not name.isascii() and any("\ud800" <= letter <= "\udfff" for letter in name):
        return None
    return "" if name in _MISSING or not name.strip() else name


def _numbers(values: tuple[Any, ...], *, dates: bool) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of a column, NaN where missing, and where something stands that is no number (or ISO date)."""
    plain = [value if value is None or isinstance(value, str | int | float) else str(value) for value in values]
    column = pd.Series(plain, dtype=object)
    if column.isna().all():
        return np.full(len(column), np.nan), np.zeros(len(column), dtype=bool)
    numbers = pd.to_numeric(column, errors="coerce").to_numpy(dtype=np.float64, na_value=np.nan, copy=True)
    wrong = ~np.isfinite(numbers) & ~(column.isna() | column.isin(_MISSING)).to_numpy()
    if dates and wrong.any():
        moments = pd.to_datetime(column[wrong].astype(str), errors="coerce", utc=True, format="ISO8601")
        seconds = (moments - pd.Timestamp(0, tz="UTC")) / pd.Timedelta(seconds=1)
        numbers[wrong] = seconds.to_numpy(dtype=np.float64, na_value=np.nan)
        wrong &= np.isnan(numbers)
    return numbers, wrong


def _parse_chunk(rows: list[Row], path: str, log: SkipLog) -> pd.DataFrame:
    """Typed columns of some rows, without those that cannot be read or miss an id."""
    lines, users, items, ratings, timestamps, texts = zip(*rows, strict=True)
    user_ids, item_ids = [_identifier(value) for value in users], [_identifier(value) for value in items]
    rating, bad_rating = _numbers(ratings, dates=False)
    timestamp, bad_time = _numbers(timestamps, dates=True)
    bad_id = np.array([user is None or item is None for user, item in zip(user_ids, item_ids, strict=True)])
    for reason, bad in (
        ("has an id that is no text or number", bad_id),
        ("has a rating that is no number", bad_rating & ~bad_id),
        ("has a time that is neither a number nor an ISO 8601 date", bad_time & ~bad_rating & ~bad_id),
    ):
        for row in np.flatnonzero(bad):
            log.bad_line(path, lines[row], rows[row][1:5], reason)
    frame = pd.DataFrame(
        {
            "user": user_ids,
            "item": item_ids,
            "rating": rating,
            "timestamp": timestamp,
            "text": [clean_text(text) for text in texts],
            "position": np.array(lines, dtype=np.int64),
        }
    )
    frame = frame[~(bad_id | bad_rating | bad_time)]
    no_user, no_item = frame["user"] == "", frame["item"] == ""
    log.skip("interaction without user id", int(no_user.sum()))
    log.skip("interaction without item id", int((no_item & ~no_user).sum()))
    return frame[~(no_user | no_item)]


def collect_interactions(
    rows: Iterable[Row], path: str, log: SkipLog, *, has_rating: bool, has_text: bool
) -> pd.DataFrame:
    """Interactions of a stream of rows, in file order, the earliest of each user and item.

    Args:
        rows: values as the file has them.
        path: of the file, for errors.
        log: counts what is left out.
        has_rating: the source has ratings: an interaction without one is left out.
        has_text: the source has reviews: empty ones are counted.

    Raises:
        DataError: if no interaction is left.
    """
    stream = iter(rows)
    chunks = [_parse_chunk(chunk, path, log) for chunk in iter(lambda: list(islice(stream, _CHUNK_ROWS)), [])]
    frame = pd.concat(chunks, ignore_index=True) if chunks else pd.DataFrame()
    if has_rating and len(frame):
        unrated = frame["rating"].isna()
        log.skip("interaction without rating", int(unrated.sum()))
        frame = frame[~unrated]
    if frame.empty:
        left_out = ", ".join(f"{count} x {reason}" for reason, count in log.skipped.items()) or "the file has no rows"
        raise DataError(path, left_out, "leaves no interaction", "Check the file and the format in the recipe.")
    # An unknown time sorts first: such an interaction is never mistaken for the latest.
    earliest_first = frame.sort_values(["timestamp", "position"], na_position="first", kind="stable")
    repeated = earliest_first.duplicated(["user", "item"]).sort_index()
    log.skip("repeated interaction of a user with an item", int(repeated.sum()))
    frame = frame[~repeated].reset_index(drop=True)
    if has_text:
        log.skip("empty review", int((frame["text"] == "").sum()))
    return frame.assign(position=np.arange(len(frame), dtype=np.int64))


def collect_texts(
    rows: Iterable[tuple[Any, ...]], kind: str, columns: tuple[str, ...], known: Set[str], log: SkipLog
) -> pd.DataFrame:
    """Texts about users or items that have interactions, the first of each.

    Args:
        rows: id and one clean text for each column.
        kind: `user` or `item`; name of the id's column.
        columns: names of the texts.
        known: ids that have interactions.
        log: counts what is left out.
    """
    about = "an item" if kind == "item" else "a user"
    found: dict[str, tuple[str, ...]] = {}
    for raw_id, *texts in rows:
        name = _identifier(raw_id)
        if not name:
            log.skip(f"text about {about} without id")
        elif name not in known:
            log.skip(f"text about {about} without interactions")
        elif name in found:
            log.skip(f"second text about the same {kind}")
        elif not any(texts):
            log.skip(f"empty text about {about}")
        else:
            found[name] = tuple(texts)
    table = pd.DataFrame([(name, *texts) for name, texts in found.items()], columns=[kind, *columns])
    return table.astype(str)


def known_ids(interactions: pd.DataFrame, kind: str) -> Set[str]:
    """The users or items that have interactions."""
    return set(interactions[kind].unique())


def no_texts(kind: str, columns: tuple[str, ...]) -> pd.DataFrame:
    """The table of texts of a source that has none."""
    return collect_texts((), kind, columns, frozenset(), SkipLog())
