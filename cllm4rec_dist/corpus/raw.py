"""Raw interactions and texts, collected from batches of any reader.

Readers (`sources/`) say which columns mean what. Here is decided what a row must have to be used, and what is kept of it:
ids become codes, ratings and times numbers, reviews go to a file in a temporary folder, because the reviews of a large
shop are many times larger than everything else. What cannot be used is counted (`skips.py`).

Filters by rating and count, and the split, are left to `catalog.py`.

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

from cllm4rec_dist.corpus.markup import strip_html
from cllm4rec_dist.corpus.reviews import ReviewStore
from cllm4rec_dist.corpus.skips import SkipLog, base_name
from cllm4rec_dist.corpus.row_batch import Batch
from cllm4rec_dist.corpus.times import Times, decide_order, read_times
from cllm4rec_dist.corpus.values import (
    MISSING_WORDS,
    clean_texts,
    column_ids,
    column_numbers,
    column_text,
    whole_numbers,
    without_missing,
)
from cllm4rec_dist.errors import DataError

logger = logging.getLogger(__name__)

_ROUNDED = r"^\d(\.\d+)?[eE]\+\d+$"


@dataclass(frozen=True)
class Rules:
    """What holds for the values of a source.

    Attributes:
        missing: words that stand for a missing value.
        has_rating: an interaction without a rating cannot be used.
        has_text: interactions have reviews.
        has_html: texts come from web pages.
        decimal: decimal mark of numbers in texts.
        time_format: format of `strptime` for times, or None.
        allow_unmatched: texts about none of the users or items are no error.
    """

    missing: Sequence[str] = MISSING_WORDS
    has_rating: bool = False
    has_text: bool = False
    has_html: bool = False
    decimal: str = "."
    time_format: str | None = None
    allow_unmatched: bool = False


@dataclass(frozen=True)
class RawData:
    """What a source holds.

    Attributes:
        interactions: columns user and item uint32 (codes), rating and timestamp float64 (NaN where there is none),
            has_text bool, position uint32 (order in the files), and part uint8 where the data set comes with a split
            (0 train, 1 valid, 2 test); sorted by position.
        user_ids, item_ids: external id of each code.
        items: columns item, title, description (null if none); items that have interactions and a text.
        users: columns user, text; users that have interactions and a text.
        reviews: texts of interactions, by their position.
        has_reviews: whether the source has a column of them.
        log: what was left out.
        origins: where each interaction stands.
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
        """Every text, reviews first."""
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
        """Interactions from position `start` on are on these lines."""
        if len(lines):
            whole = int(lines[-1]) - int(lines[0]) + 1 == len(lines)
            self._starts.append(start)
            self._batches.append((path, range(int(lines[0]), int(lines[-1]) + 1) if whole else lines.astype(np.int32)))

    def find(self, position: int) -> dict[str, Any]:
        """`file` and `line` of an interaction, as `SkipLog.skip` takes them; empty where unknown."""
        index = bisect_right(self._starts, position) - 1
        if index < 0:
            return {}
        path, lines = self._batches[index]
        return {"file": path, "line": int(lines[position - self._starts[index]])}


class IdCodes:
    """Gives each different text a code, from 0 on, in the order of their first use."""

    def __init__(self) -> None:
        self._categories = pl.Categories.random()
        self._alive: pl.Series | None = None
        self.size = 0

    def encode(self, ids: pl.Series) -> np.ndarray:
        """uint32 code of each id; none may be null."""
        categorical = ids.cast(pl.Categorical(self._categories))
        self._alive = categorical.head(1)  # Polars forgets categories that no series has
        codes = categorical.to_physical().to_numpy()
        self.size = max(self.size, int(codes.max()) + 1 if len(codes) else 0)
        return codes.astype(np.uint32)

    def ids(self) -> pl.Series:
        """Id of each code."""
        codes = pl.Series("id", np.arange(self.size, dtype=np.uint32))
        return codes.cat.to(pl.Categorical(self._categories)).cast(pl.String)


@dataclass
class _Columns:
    user: list[np.ndarray] = field(default_factory=list)
    item: list[np.ndarray] = field(default_factory=list)
    rating: list[np.ndarray] = field(default_factory=list)
    timestamp: list[np.ndarray] = field(default_factory=list)
    has_text: list[np.ndarray] = field(default_factory=list)
    part: list[np.ndarray] = field(default_factory=list)


@dataclass(frozen=True)
class _UndecidedDates:
    positions: np.ndarray
    day_first: np.ndarray
    month_first: np.ndarray
    example: str


class InteractionCollector:
    """Collects interactions of batches whose columns are user, item, rating, timestamp and text.

    Args:
        log: counts what is left out.
        rules: of the source.
        names: of the columns as the user knows them, for errors.
    """

    def __init__(self, log: SkipLog, rules: Rules, names: Mapping[str, str] | None = None) -> None:
        self._log, self._rules, self._names = log, rules, dict(names or {})
        self._codes = {"user": IdCodes(), "item": IdCodes()}
        self._columns, self._origins, self._reviews = _Columns(), Origins(), ReviewStore()
        self._undecided: list[_UndecidedDates] = []
        self._size = 0
        self._paths: list[str] = []

    def add_file(self, path: str, batches: Iterable[Batch], part: int | None = None) -> None:
        """All rows of a file.

        Args:
            path: of the file.
            batches: its rows, counted as read in the log.
            part: of the split that the file is, or None.
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
            ratings, wrong = column_numbers(columns["rating"], self._where(batch, "rating"), missing, self._rules.decimal)
            bad["has a rating that is no number"] = wrong
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
        self._keep_undecided(times, keep, columns)
        for kind, found in ids.items():
            getattr(self._columns, kind).append(self._codes[kind].encode(found.filter(keep)))
        self._columns.rating.append(ratings[keep])
        self._columns.timestamp.append(times.seconds[keep])
        self._columns.has_text.append(self._add_reviews(columns, keep))
        if part is not None:
            self._columns.part.append(np.full(int(keep.sum()), part, np.uint8))
        self._origins.add(self._size, batch.path, batch.lines[keep])
        self._size += int(keep.sum())

    def _add_reviews(self, columns: pl.DataFrame, keep: np.ndarray) -> np.ndarray:
        if not self._rules.has_text or "text" not in columns.columns:
            return np.zeros(int(keep.sum()), bool)
        texts = column_text(columns["text"].filter(keep), "text")
        texts = clean_texts(strip_html(texts) if self._rules.has_html else texts, self._rules.missing)
        has_text = texts.is_not_null().to_numpy()
        self._reviews.append(self._size + np.flatnonzero(has_text), texts.drop_nulls())
        return has_text

    def _lose(self, reason: str, batch: Batch, rows: np.ndarray, *, is_gap: bool) -> None:
        if rows.any():
            first = int(np.flatnonzero(rows)[0])
            value = ", ".join("" if value is None else str(value) for value in batch.columns.row(first)[:4])
            self._log.lose(reason, batch.path, int(batch.lines[first]), value, int(rows.sum()), is_gap=is_gap)

    def _keep_undecided(self, times: Times, keep: np.ndarray, columns: pl.DataFrame) -> None:
        if times.day_first is None or times.month_first is None:
            return
        day_first, month_first = times.day_first[keep], times.month_first[keep]
        rows = np.flatnonzero(~(np.isnan(day_first) & np.isnan(month_first)))
        if len(rows):
            example = str(columns["timestamp"].filter(keep)[int(rows[0])])
            self._undecided.append(_UndecidedDates(self._size + rows, day_first[rows], month_first[rows], example))

    def _decide_dates(self, times: np.ndarray) -> np.ndarray:
        """Put times of dates like 3/4/2024 in place, and return the positions of those that are none; int64."""
        if not self._undecided:
            return np.empty(0, np.int64)
        first = self._undecided[0]
        place = self._origins.find(int(first.positions[0]))
        where = f"{place['file']} line {place['line']}: {self._names.get('timestamp', 'timestamp')}"
        positions = np.concatenate([part.positions for part in self._undecided])
        seconds, order = decide_order(
            np.concatenate([part.day_first for part in self._undecided]),
            np.concatenate([part.month_first for part in self._undecided]), where, first.example,
        )  # fmt: skip
        times[positions] = seconds
        wrong = positions[np.isnan(seconds)]
        for position in wrong.tolist():
            place = self._origins.find(position)
            self._log.lose(f"has a date that is not {order}", place["file"], place["line"], "")
        return wrong

    def finish(self) -> RawData:
        """What was collected, without texts about users and items.

        Raises:
            DataError: if no interaction is left.
        """
        values = {name: np.concatenate(parts) for name, parts in vars(self._columns).items() if parts}
        self._columns = _Columns()
        if not self._size:
            left_out = ", ".join(f"{count} x {reason}" for reason, count in self._log.counts.items())
            raise DataError(
                ", ".join(self._paths[:3]), left_out or "the file has no rows", "leaves no interaction",
                "Check the file and the format in the recipe.",
            )  # fmt: skip
        no_dates = self._decide_dates(values["timestamp"])
        ids = {}
        for kind in ("user", "item"):
            ids[kind], values[kind] = _canonical(self._codes[kind].ids(), values[kind], kind)
        frame = pl.DataFrame(values).with_columns(position=pl.Series(np.arange(self._size, dtype=np.uint32)))
        if len(no_dates):
            for path in dict.fromkeys(self._paths):
                self._log.close_file(path)
            frame = frame[np.setdiff1d(np.arange(self._size), no_dates)]
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


def _canonical(ids: pl.Series, codes: np.ndarray, kind: str) -> tuple[pl.Series, np.ndarray]:
    """Ids of a float column without `.0`, with the codes of those that then are one."""
    rounded = ids.filter(ids.str.contains(_ROUNDED))
    if len(rounded):
        logger.warning(
            "%s %s ids look like numbers that a spreadsheet has rounded, such as %r: different ones may be one now",
            f"{len(rounded):,}", kind, rounded[0],
        )  # fmt: skip
    whole = whole_numbers(ids)
    if whole is None:
        return ids, codes
    unique = IdCodes()
    new_codes = unique.encode(whole)
    return unique.ids(), new_codes[codes]


class TextCollector:
    """Collects texts about the users or items that have interactions.

    Of several rows about one, the first value of each column counts.

    Args:
        kind: `user` or `item`; also the name of the id's column.
        columns: names of the columns of texts.
        known: ids that have interactions.
        log: counts what is left out.
        rules: of the source.
        one_line: columns whose texts are made one line.
    """

    def __init__(
        self, kind: str, columns: Sequence[str], known: pl.Series, log: SkipLog, rules: Rules,
        one_line: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self._kind, self._texts, self._log, self._rules, self._one_line = kind, list(columns), log, rules, one_line
        self._known = known
        self._codes = IdCodes()
        self._codes.encode(known)
        self._num_known = self._codes.size
        self._rows: list[pl.DataFrame] = []
        self._num_rows, self._unknown = 0, 0
        self._example: dict[str, Any] | None = None
        self._paths: list[str] = []

    def add_file(self, path: str, batches: Iterable[Batch]) -> None:
        """All rows of a file: columns `kind` and the texts."""
        self._paths.append(path)
        for batch in batches:
            self._add(batch)
        self._log.close_file(path)

    def _add(self, batch: Batch) -> None:
        ids = without_missing(column_ids(batch.columns[self._kind], f"{batch.path}: {self._kind} id"), self._rules.missing)
        without = ids.is_null().to_numpy()
        if without.any():
            first = int(np.flatnonzero(without)[0])
            self._log.lose(
                f"is a text about {_an(self._kind)} without id", batch.path, int(batch.lines[first]),
                batch.columns.row(first)[1:], int(without.sum()), is_gap=True,
            )  # fmt: skip
        ids, batch = ids.filter(~without), batch.keep(~without)
        self._num_rows += len(ids)
        codes = self._codes.encode(ids)
        if (whole := whole_numbers(ids)) is not None:
            codes = np.where(codes < self._num_known, codes, self._codes.encode(whole))
        known = codes < self._num_known
        if not known.all():
            first = int(np.flatnonzero(~known)[0])
            self._unknown += int((~known).sum())
            self._example = self._example or {
                "file": batch.path, "line": int(batch.lines[first]), "value": ids[first],
            }  # fmt: skip
        texts = {name: self._clean(batch.columns[name].filter(known), batch.path, name) for name in self._texts}
        self._rows.append(pl.DataFrame({"code": codes[known], **texts}))

    def _clean(self, column: pl.Series, path: str, name: str) -> pl.Series:
        texts = column_text(column, f"{path}: {name}")
        texts = strip_html(texts) if self._rules.has_html else texts
        return clean_texts(texts, self._rules.missing, one_line=name in self._one_line)

    def finish(self) -> pl.DataFrame:
        """Columns `kind` and the texts (null where there is none), one row for each id that the files know.

        Raises:
            DataError: where the files know none of the interactions' ids, unless the recipe allows that.
        """
        log, kind = self._log, self._kind
        log.skip(
            f"text about {_an(kind)} without interactions", self._unknown, self._num_rows, **(self._example or {})
        )
        empty = pl.DataFrame(schema={"code": pl.UInt32, **dict.fromkeys(self._texts, pl.String)})
        rows = pl.concat([empty, *self._rows])
        table = rows.group_by("code", maintain_order=True).agg(pl.col(name).drop_nulls().first() for name in self._texts)
        log.skip(f"second text about the same {kind}", len(rows) - len(table), len(rows))
        self._watch_join(len(table))
        named = table.with_columns(self._codes.ids()[table["code"]].alias(kind)) if len(table) else table.with_columns(
            pl.lit(None, pl.String).alias(kind)
        )
        return named.select(kind, *self._texts)

    def _watch_join(self, num_matched: int) -> None:
        """Warn or refuse where the ids of the two sides do not meet."""
        num_known = self._num_known
        if self._num_rows == 0 or num_matched * 2 >= num_known:
            return
        ours, theirs = self._examples()
        files = ", ".join(map(base_name, self._paths[:3]))
        if num_matched == 0 and not self._rules.allow_unmatched:
            raise DataError(
                files, theirs, f"is not among the {self._kind}s of the interactions, such as {ours!r}, nor is any other"
                f" of its {self._num_rows:,} ids", "Mend the column in the recipe or the ids, or set allow_unmatched: true.",
            )  # fmt: skip
        logger.warning(
            "%s: only %s of %s %ss of the interactions are in it (%.3g %%): the interactions have for example %r, the"
            " file %r", files, f"{num_matched:,}", f"{num_known:,}", self._kind, 100 * num_matched / num_known, ours,
            theirs,
        )  # fmt: skip

    def _examples(self) -> tuple[str, str]:
        """An id of the interactions and one of the files that do not meet, alike if any are."""
        theirs = self._codes.ids()[self._num_known : self._num_known + 100_000]
        matched = pl.concat([rows["code"] for rows in self._rows]).unique() if self._rows else pl.Series([], dtype=pl.UInt32)
        ours = self._known.filter(~pl.Series(np.arange(self._num_known, dtype=np.uint32)).is_in(matched.implode()))[:100_000]
        like = {_plain(text): text for text in reversed(theirs.to_list())}
        for text in ours.to_list():
            if _plain(text) in like:
                return text, like[_plain(text)]
        return (ours[0] if len(ours) else ""), (theirs[0] if len(theirs) else "")


def _plain(name: str) -> str:
    """An id without what often differs between two files: case, leading zeros, signs, `.0`."""
    letters = "".join(letter for letter in name.casefold().removesuffix(".0") if letter.isalnum())
    return letters.lstrip("0")


def _an(kind: str) -> str:
    return f"{'an' if kind == 'item' else 'a'} {kind}"


def no_texts(kind: str, columns: Sequence[str]) -> pl.DataFrame:
    """The table of texts of a source that has none."""
    return pl.DataFrame(schema=dict.fromkeys([kind, *columns], pl.String))


def joined(table: pl.DataFrame, columns: Sequence[str], separator: str = " ") -> pl.Expr:
    """The columns' texts one behind the other, null where all are."""
    if not columns:
        return pl.lit(None, pl.String)
    parts = pl.concat_list(list(columns)).list.drop_nulls().list.join(separator)
    return pl.when(parts.str.len_bytes() > 0).then(parts)
