"""Times of interactions in whatever form a file has them, as seconds since 1970.

Numbers are epochs of any unit, told by their size; texts are ISO 8601, RFC 2822, dates with names of months, or what
`time_format` says. `3/4/2024` is the third of April or the fourth of March: that is decided by the file itself, where
one of its days is above 12, and else not at all.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime

import numpy as np
import polars as pl

from cllm4rec_dist.corpus.values import column_text, without_missing
from cllm4rec_dist.errors import DataError

logger = logging.getLogger(__name__)

_UNITS = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))
"""Epochs from so much on are in so many parts of a second: 1e11 seconds would be the year 5138."""
_CLOCK = r"(?:[T ,]+(\d{1,2}):(\d{2})(?::(\d{2})(?:[.,]\d+)?)?\s*([AaPp]\.?\s?[Mm]\.?)?)?"
_NUMERIC_DATE = rf"^(\d{{1,2}})([/.\-])(\d{{1,2}})[/.\-](\d{{4}}|\d{{2}}){_CLOCK}$"
_AMAZON_DATE = r"^(\d{1,2}) (\d{1,2}), (\d{4})$"
_YEAR_FIRST = rf"^(\d{{4}})[/.](\d{{1,2}})[/.](\d{{1,2}}){_CLOCK}$"
_NAMED = ("%d %b %Y", "%d %B %Y", "%b %d, %Y", "%B %d, %Y", "%b %d %Y", "%B %d %Y", "%d-%b-%Y", "%Y-%b-%d", "%d/%b/%Y")
_NAMED_CLOCKS = ("", " %H:%M:%S", " %H:%M", " %I:%M:%S %p", " %I:%M %p", ":%H:%M:%S %z")
_UNIX_DATE = "%a %b %d %H:%M:%S %Y"


@dataclass(frozen=True)
class Times:
    """Times of some rows.

    Attributes:
        seconds: float64 [n], NaN where missing, wrong or undecided.
        wrong: bool [n], a value that is no time.
        day_first, month_first: float64 [n] seconds of dates like 3/4/2024 in either reading, NaN where it is none; None
            where there is no such date.
    """

    seconds: np.ndarray
    wrong: np.ndarray
    day_first: np.ndarray | None = None
    month_first: np.ndarray | None = None


def read_times(values: pl.Series, where: str, time_format: str | None, missing: Sequence[str]) -> Times:
    """Times of a column of any type.

    Args:
        values: the column, n rows.
        where: names file and column, for errors.
        time_format: format of `strptime` that all texts have, or None.
        missing: words that stand for a missing time.

    Raises:
        DataError: for types that are no times.
    """
    dtype = values.dtype
    if dtype == pl.Date or isinstance(dtype, pl.Datetime):
        return Times(_epoch(values.cast(pl.Datetime("us"))), np.zeros(len(values), bool))
    if dtype.is_numeric() and time_format is None:
        numbers = values.cast(pl.Float64).fill_null(np.nan).to_numpy().copy()
        return Times(_seconds(numbers), np.isinf(numbers))
    if dtype == pl.Boolean or dtype.is_nested() or dtype.is_temporal():
        raise DataError(where, str(dtype), "is a type that is no time", "Name a column of times, or none.")
    texts = without_missing(column_text(values, where), missing)
    given = texts.is_not_null().to_numpy()
    if time_format is not None:
        seconds = _parse(texts, time_format)
        return Times(seconds, given & np.isnan(seconds))
    return _guess(texts, given)


def _guess(texts: pl.Series, given: np.ndarray) -> Times:
    numbers = texts.cast(pl.Float64, strict=False).fill_null(np.nan).to_numpy().copy()
    numbers[~np.isfinite(numbers)] = np.nan
    seconds = _seconds(numbers)
    left = np.flatnonzero(np.isnan(seconds) & given)
    for parse in (_iso, _year_first, _amazon, _named, _rfc_2822):
        if len(left):
            seconds[left] = parse(texts[left])
            left = left[np.isnan(seconds[left])]
    wrong = given & np.isnan(seconds)
    if not len(left):
        return Times(seconds, wrong)
    day_first, month_first = np.full((2, len(seconds)), np.nan)
    day_first[left], month_first[left] = _numeric_dates(texts[left])
    return Times(seconds, wrong & np.isnan(day_first) & np.isnan(month_first), day_first, month_first)


def decide_order(day_first: np.ndarray, month_first: np.ndarray, where: str, example: str) -> tuple[np.ndarray, str]:
    """Seconds of dates like 3/4/2024 in the order that they decide themselves, and its name.

    Args:
        day_first, month_first: seconds in either reading, NaN where it is none.
        where, example: file, line and column of the first, and its text.

    Raises:
        DataError: where the dates do not decide it, or contradict each other.
    """
    only_day, only_month = int(np.isnan(month_first).sum()), int(np.isnan(day_first).sum())
    if (only_day > 0) == (only_month > 0):
        raise DataError(
            where, example, f"may be day-first or month-first: {only_day:,} dates can only be the one, {only_month:,} only"
            " the other", "Set time_format in the recipe, for example '%d/%m/%Y' or '%m/%d/%Y %I:%M:%S %p'.",
        )  # fmt: skip
    order = "day-first" if only_day else "month-first"
    logger.warning(
        "%s: dates like %r are read as %s, because %s of them are no dates the other way round", where, example, order,
        f"{only_day or only_month:,}",
    )  # fmt: skip
    return (day_first if only_day else month_first), order


def _seconds(numbers: np.ndarray) -> np.ndarray:
    size = np.abs(numbers)
    divisor = np.ones(len(numbers))
    for least, parts in reversed(_UNITS):
        divisor[size >= least] = parts
    return numbers / divisor


def _epoch(moments: pl.Series) -> np.ndarray:
    return (moments.dt.epoch("us").cast(pl.Float64) / 1e6).fill_null(np.nan).to_numpy().copy()


def _parse(texts: pl.Series, time_format: str) -> np.ndarray:
    """Seconds of texts in a format, NaN for others."""
    for read in (texts.str.to_datetime, texts.str.to_date):
        try:
            moments = read(time_format, strict=False)
            return _epoch(moments.cast(pl.Datetime("us")))
        except pl.exceptions.PolarsError:
            continue
    raise DataError("time_format", time_format, "is no format of strptime", "Write for example '%d/%m/%Y %H:%M'.")


def check_time_format(time_format: str) -> str:
    """The format. ValueError for one that strptime does not know."""
    try:
        _parse(pl.Series(["x"]), time_format)
    except DataError as error:
        raise ValueError(f"{error.constraint}. {error.cure}") from None
    return time_format


def _iso(texts: pl.Series) -> np.ndarray:
    """ISO 8601: 2024-03-01, with a time behind T or a blank, fractions and an offset or Z."""
    parts = texts.str.extract_groups(
        r"^(\d{4}-\d{2}-\d{2})(?:[Tt ]+(\d{2}:\d{2})(?::(\d{2}))?(?:[.,](\d{1,9})\d*)?\s*(?:([Zz]|UTC|GMT)|([+-]\d{2}):?(\d{2})?)?)?$"
    ).struct.unnest()
    date, clock, second, fraction, _, hours, minutes = (parts[:, index] for index in range(7))
    texts = pl.select(
        pl.concat_str(date, pl.lit("T"), clock.fill_null("00:00"), pl.lit(":"), second.fill_null("00"))
    ).to_series()
    seconds = _epoch(texts.str.to_datetime("%Y-%m-%dT%H:%M:%S", strict=False))
    part = ("0." + fraction.fill_null("0")).cast(pl.Float64).to_numpy()
    offset = (hours.fill_null("0").cast(pl.Float64) * 3600).to_numpy()
    sign = np.where(hours.fill_null("+").str.starts_with("-").to_numpy(), -1.0, 1.0)
    offset = offset + sign * 60 * minutes.fill_null("0").cast(pl.Float64).to_numpy()
    return seconds + part - offset


def _from_parts(year: pl.Series, month: pl.Series, day: pl.Series, clock: Sequence[pl.Series]) -> np.ndarray:
    """Seconds of dates in parts, NaN where they are no dates."""
    hour, minute, second, half = clock
    full_year = pl.when(year.str.len_bytes() > 2).then(year).otherwise(
        pl.when(year.cast(pl.Int32, strict=False) < 69).then("20" + year).otherwise("19" + year)
    )
    date = pl.select(pl.concat_str(full_year, month.str.zfill(2), day.str.zfill(2), separator="-")).to_series()
    seconds = _epoch(date.str.to_datetime("%Y-%m-%d", strict=False))
    hours, minutes, rest = (part.fill_null("0").cast(pl.Float64).to_numpy().copy() for part in (hour, minute, second))
    afternoon = half.str.to_lowercase().str.starts_with("p").fill_null(False).to_numpy()
    hours[half.is_not_null().to_numpy() & (hours == 12)] = 0
    seconds[(hours > 24) | (minutes > 59) | (rest > 60)] = np.nan
    return seconds + 3600 * (hours + 12 * afternoon) + 60 * minutes + rest


def _groups(texts: pl.Series, pattern: str) -> list[pl.Series]:
    return texts.str.extract_groups(pattern).struct.unnest().get_columns()


def _numeric_dates(texts: pl.Series) -> tuple[np.ndarray, np.ndarray]:
    first, _, second, year, *clock = _groups(texts, _NUMERIC_DATE)
    return _from_parts(year, second, first, clock), _from_parts(year, first, second, clock)


def _year_first(texts: pl.Series) -> np.ndarray:
    year, month, day, *clock = _groups(texts, _YEAR_FIRST)
    return _from_parts(year, month, day, clock)


def _amazon(texts: pl.Series) -> np.ndarray:
    """Amazon's reviewTime, `09 13, 2009`."""
    month, day, year = _groups(texts, _AMAZON_DATE)
    none = pl.Series([None] * len(texts), dtype=pl.String)
    return _from_parts(year, month, day, [none] * 4)


def _named(texts: pl.Series) -> np.ndarray:
    """Dates with the name of the month, and `date`'s own form."""
    seconds = np.full(len(texts), np.nan)
    if not texts.str.contains(r"[A-Za-z]{3}").any():
        return seconds
    plain = texts.str.replace(r"(\d)(?:st|nd|rd|th)\b", "$1").str.replace(r"^[A-Z][a-z]{2,8},?\s+(\d)", "$1")
    for form in [date + clock for date in _NAMED for clock in _NAMED_CLOCKS] + [_UNIX_DATE]:
        left = np.isnan(seconds)
        if not left.any():
            break
        source = texts if form == _UNIX_DATE else plain
        seconds[left] = _parse(source.filter(left), form)
    return seconds


def _rfc_2822(texts: pl.Series) -> np.ndarray:
    """RFC 2822: Fri, 01 Mar 2024 10:00:00 +0100."""
    return np.array([_mail_date(text) for text in texts.to_list()], dtype=np.float64)


def _mail_date(text: str) -> float:
    if "," not in text and ":" not in text or not any(letter.isalpha() for letter in text):
        return float("nan")
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return float("nan")
    return moment.timestamp() if moment.tzinfo else moment.replace(tzinfo=UTC).timestamp()



