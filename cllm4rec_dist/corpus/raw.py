"""Collect raw interactions and reviews from the batches of any reader.

Readers (`sources/`) assign the columns. This module decides which rows can be used, and converts them: ids become
codes, ratings and times become numbers, and reviews go to a temporary folder, because those of a large shop are many
times larger than everything else. Unusable rows are counted (`skips.py`). `about.py` collects texts about users and
items; `catalog.py` filters by rating and count, and splits.

Legend: N interactions, U users, I items.
"""

from __future__ import annotations

import logging
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import polars as pl

from cllm4rec_dist.corpus.date_order import UndecidedDates, decide_orders
from cllm4rec_dist.corpus.ids import IdCodes, canonical_ids
from cllm4rec_dist.corpus.markup import strip_html
from cllm4rec_dist.corpus.reviews import ReviewStore
from cllm4rec_dist.corpus.row_batch import Batch
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.times import Times, compact_dates, date_text, far_times, read_times
from cllm4rec_dist.corpus.values import (
    MISSING_WORDS,
    clean_texts,
    column_ids,
    column_numbers,
    column_text,
    without_missing,
)
from cllm4rec_dist.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Rules:
    """How to read the values of a source.

    Attributes:
        missing: words for a missing value.
        has_rating: an interaction without a rating cannot be used.
        has_text: interactions have reviews.
        has_html: texts come from web pages.
        decimal: decimal mark of numbers in texts.
        time_format: `strptime` format of times, or None.
        allow_unmatched: accept texts of which none is about a user or item with interactions.
        new_items: keep texts about items without interactions.
    """

    missing: Sequence[str] = MISSING_WORDS
    has_rating: bool = False
    has_text: bool = False
    has_html: bool = False
    decimal: str = "."
    time_format: str | None = None
    allow_unmatched: bool = False
    new_items: bool = False


@dataclass(frozen=True)
class RawData:
    """The contents of a source.

    Attributes:
        interactions: columns user and item uint32 (codes), rating and timestamp float64 (NaN if missing), has_text
            bool, position uint32 (order in the files), and part uint8 (0 train, 1 valid, 2 test) if the data set comes
            with a split; sorted by position.
        user_ids, item_ids: external id of each code.
        items: columns item, title, description (null if none) and, if the source has it, category; items that have
            interactions and a text, and with `Rules.new_items` those that have a text and no interactions.
        users: columns user, text; users that have interactions and a text.
        reviews: reviews by position of their interaction.
        has_reviews: True if the source has a column of reviews.
        log: counts of what was left out.
        origins: file and line of each interaction.
    """

    interactions: pl.DataFrame
    user_ids: pl.Series
    item_ids: pl.Series
    items: pl.DataFrame
    users: pl.DataFrame
    reviews: ReviewStore
    has_reviews: bool
    log: SkipLog
    origins: Origins

    def texts(self) -> Iterator[str]:
        """Yield every text, reviews first."""
        yield from self.reviews
        for table, columns in ((self.items, ("title", "description")), (self.users, ("text",))):
            for column in columns:
                yield from table[column].drop_nulls()


class Origins:
    """File and line of each interaction."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._batches: list[tuple[str, np.ndarray | range]] = []

    def add(self, start: int, path: str, lines: np.ndarray) -> None:
        """Add the lines of the interactions at positions `start`, `start + 1`, ..."""
        if len(lines):
            first, last = int(lines[0]), int(lines[-1])
            is_range = last - first + 1 == len(lines)
            self._starts.append(start)
            self._batches.append((path, range(first, last + 1) if is_range else lines.astype(np.int32)))

    def find(self, position: int) -> dict[str, Any]:
        """Return `file` and `line` of an interaction, as arguments of `SkipLog.skip`; empty if unknown."""
        index = bisect_right(self._starts, position) - 1
        if index < 0:
            return {}
        path, lines = self._batches[index]
        return {"file": path, "line": int(lines[position - self._starts[index]])}


@dataclass
class _Columns:
    user: list[np.ndarray] = field(default_factory=list)
    item: list[np.ndarray] = field(default_factory=list)
    rating: list[np.ndarray] = field(default_factory=list)
    timestamp: list[np.ndarray] = field(default_factory=list)
    has_text: list[np.ndarray] = field(default_factory=list)
    part: list[np.ndarray] = field(default_factory=list)


def read_texts(
    batch: Batch, column: str, where: str, rules: Rules, log: SkipLog, *, one_line: bool = False
) -> pl.Series:
    """Return the cleaned texts of a column, null if missing or a fragment of a page's script.

    Args:
        batch: rows of a file.
        column: name of the column.
        where: file and column, for errors.
        rules: how to read the source.
        log: counts fragments of scripts.
        one_line: collapse white space into single spaces, as in a title.
    """
    texts = column_text(batch.columns[column], where)
    if rules.has_html:
        raw, texts = texts, strip_html(texts)
        gone = np.flatnonzero((raw.is_not_null() & texts.is_null()).to_numpy())
        if len(gone):
            first = int(gone[0])
            line = int(batch.lines[first])
            log.skip("text that is the remains of a script", len(gone), file=batch.path, line=line, value=raw[first])
    return clean_texts(texts, rules.missing, one_line=one_line)


class InteractionCollector:
    """Collects interactions from batches with the columns user, item, rating, timestamp and text.

    Args:
        log: counts what is left out.
        rules: how to read the source.
        names: names of the columns in the files, for errors.
    """

    def __init__(self, log: SkipLog, rules: Rules, names: Mapping[str, str] | None = None) -> None:
        self._log, self._rules, self._names = log, rules, dict(names or {})
        self._codes = {"user": IdCodes(), "item": IdCodes()}
        self._columns, self._origins, self._reviews = _Columns(), Origins(), ReviewStore()
        self._undecided: dict[str, list[UndecidedDates]] = {}
        self._size = 0
        self._paths: list[str] = []

    def add_file(self, path: str, batches: Iterable[Batch], part: int | None = None) -> None:
        """Add all rows of a file.

        Args:
            path: path of the file.
            batches: rows of the file; the reader has counted them in the log.
            part: part of the split that the file is (0 train, 1 valid, 2 test), or None.
        """
        self._paths.append(path)
        for batch in batches:
            self._add(batch, part)
        self._log.close_file(path)

    def _where(self, batch: Batch, column: str) -> str:
        return f"{batch.path}: {self._names.get(column, column)}"

    def _add(self, batch: Batch, part: int | None) -> None:
        columns, missing = batch.columns, self._rules.missing
        ids = {
            kind: without_missing(column_ids(columns[kind], self._where(batch, kind)), missing)
            for kind in ("user", "item")
        }
        bad = {f"has no {kind} id": ids[kind].is_null().to_numpy() for kind in ids}
        ratings = np.full(len(columns), np.nan)
        if "rating" in columns.columns:
            ratings, wrong = column_numbers(
                columns["rating"], self._where(batch, "rating"), missing, self._rules.decimal
            )
            bad["has a rating that is not a number"] = wrong
            if self._rules.has_rating:
                bad["has no rating"] = np.isnan(ratings) & ~wrong
        times = Times(np.full(len(columns), np.nan), np.zeros(len(columns), bool))
        if "timestamp" in columns.columns:
            where = self._where(batch, "timestamp")
            times = read_times(columns["timestamp"], where, self._rules.time_format, missing)
            bad["has a time that cannot be read"] = times.wrong
        keep = np.ones(len(columns), bool)
        for reason, rows in bad.items():
            self._lose(reason, batch, rows & keep, is_gap=reason.startswith("has no "))
            keep &= ~rows
        self._keep_undecided(times, keep, batch)
        for kind, texts in ids.items():
            getattr(self._columns, kind).append(self._codes[kind].encode(texts.filter(keep)))
        self._columns.rating.append(ratings[keep])
        self._columns.timestamp.append(times.seconds[keep])
        self._columns.has_text.append(self._add_reviews(batch, keep))
        if part is not None:
            self._columns.part.append(np.full(int(keep.sum()), part, np.uint8))
        self._origins.add(self._size, batch.path, batch.lines[keep])
        self._size += int(keep.sum())

    def _add_reviews(self, batch: Batch, keep: np.ndarray) -> np.ndarray:
        """Store the reviews of the kept rows; return a bool mask of the kept rows with a review."""
        if not self._rules.has_text or "text" not in batch.columns.columns:
            return np.zeros(int(keep.sum()), bool)
        texts = read_texts(batch.keep(keep), "text", self._where(batch, "text"), self._rules, self._log)
        has_text = texts.is_not_null().to_numpy()
        self._reviews.append(self._size + np.flatnonzero(has_text), texts.drop_nulls())
        return has_text

    def _lose(self, reason: str, batch: Batch, rows: np.ndarray, *, is_gap: bool) -> None:
        if rows.any():
            first = int(np.flatnonzero(rows)[0])
            value = ", ".join("" if value is None else str(value) for value in batch.columns.row(first)[:4])
            self._log.lose(reason, batch.path, int(batch.lines[first]), value, int(rows.sum()), is_gap=is_gap)

    def _keep_undecided(self, times: Times, keep: np.ndarray, batch: Batch) -> None:
        rows = np.flatnonzero(times.is_undecided[keep])
        if len(rows):
            example = str(batch.columns["timestamp"].filter(keep)[int(rows[0])])
            readings = {order: seconds[keep][rows] for order, seconds in times.readings.items()}
            part = UndecidedDates(self._size + rows, readings, example)
            self._undecided.setdefault(batch.path, []).append(part)

    def _decide_dates(self, times: np.ndarray) -> None:
        """Set the times of numeric dates such as 3/4/2024.

        Raises:
            DataError: if the order of a file's dates cannot be decided.
        """
        files = {path: UndecidedDates.join(parts) for path, parts in self._undecided.items()}
        for path, order in decide_orders(files).items():
            dates = files[path]
            line = self._origins.find(int(dates.positions[0]))["line"]
            where = f"{path} line {line}: {self._names.get('timestamp', 'timestamp')}"
            if order is None:
                raise dates.refusal(where)
            level = logging.INFO if order == dates.order else logging.WARNING  # the file itself does not decide
            logger.log(level, "%s: dates like %r are read as %s", where, dates.example, order)
            times[dates.positions] = dates.readings[order]

    def _decide_compact_dates(self, times: np.ndarray) -> None:
        """Set the times of numbers that are all dates, such as 24112025, instead of seconds since 1970.

        Raises:
            DataError: if they are dates in several forms.
        """
        dates = {} if self._rules.time_format is not None else compact_dates(times)
        if not dates:
            return
        largest, (form, *others) = int(np.nanargmax(times)), dates
        origin = self._origins.find(largest)
        name = self._names.get("timestamp", "timestamp")
        where = f"{origin.get('file', '?')} line {origin.get('line', '?')}: {name}"
        example = f"{times[largest]:.{4 * ('.' in form)}f}"
        if others:
            cure = f"Set time_format, for example {' or '.join(map(repr, dates))}."
            raise DataError(where, example, "is ambiguous: all times of the source are dates in several forms", cure)
        logger.warning("%s: numbers like %s are all dates and are read as %s, not as seconds", where, example, form)
        times[:] = dates[form]

    def _warn_of_far_times(self, times: np.ndarray) -> None:
        """Warn about implausible times, such as 0 for a missing time or the year 9999 as a placeholder."""
        is_far = far_times(times)
        if not is_far.any():
            return
        first, usual = int(np.flatnonzero(is_far)[0]), times[~is_far & ~np.isnan(times)]
        origin = self._origins.find(first)
        logger.warning(
            "%s line %s: %s: %s of %s times are far from all the others (%s to %s), such as %s. They are kept as read:"
            " old ones come first in a user's history, late ones last, where items are held out. If they mean a missing"
            " time, leave them empty in the file.",
            origin.get("file", "?"),
            origin.get("line", "?"),
            self._names.get("timestamp", "timestamp"),
            f"{int(is_far.sum()):,}",
            f"{int((~np.isnan(times)).sum()):,}",
            date_text(usual.min()),
            date_text(usual.max()),
            date_text(times[first]),
        )

    def finish(self) -> RawData:
        """Return what was collected, without texts about users and items.

        Raises:
            DataError: if there is no interaction.
        """
        values = {name: np.concatenate(parts) for name, parts in vars(self._columns).items() if parts}
        self._columns = _Columns()
        if not self._size:
            left_out = ", ".join(f"{count} x {reason}" for reason, count in self._log.counts.items())
            raise DataError(
                ", ".join(self._paths[:3]),
                left_out or "no row of an interaction",
                "leaves no interaction",
                "Check the file and the format in the recipe.",
            )
        self._decide_dates(values["timestamp"])
        self._decide_compact_dates(values["timestamp"])
        self._warn_of_far_times(values["timestamp"])
        ids = {}
        for kind in ("user", "item"):
            ids[kind], values[kind] = canonical_ids(self._codes[kind].ids(), values[kind], kind)
        frame = pl.DataFrame(values).with_columns(position=pl.Series(np.arange(self._size, dtype=np.uint32)))
        return RawData(
            interactions=frame,
            user_ids=ids["user"],
            item_ids=ids["item"],
            items=no_texts("item", ("title", "description")),
            users=no_texts("user", ("text",)),
            reviews=self._reviews,
            has_reviews=self._rules.has_text,
            log=self._log,
            origins=self._origins,
        )


def no_texts(kind: str, columns: Sequence[str]) -> pl.DataFrame:
    """Return an empty table of texts."""
    return pl.DataFrame(schema=dict.fromkeys([kind, *columns], pl.String))
