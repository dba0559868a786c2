"""Parse times of interactions in many formats to seconds since 1970.

Numbers are Unix times whose magnitude decides the unit; texts are ISO 8601, RFC 2822, dates with names of months, or in
`time_format`. Numeric dates such as `3/4/2024` are parsed in every order of their parts (`date_order.py`).
"""

from __future__ import annotations

import calendar
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import numpy as np
import polars as pl

from cllm4rec_dist.corpus.date_order import DateOrder
from cllm4rec_dist.corpus.values import column_text, without_missing
from cllm4rec_dist.errors import DataError

_UNITS = ((1e17, 1e9), (1e14, 1e6), (1e11, 1e3))
"""(least value, units per second) of Unix times in ns, us and ms: 1e11 seconds would be the year 5138."""
_LATEST = 1e11
_DAY = 86400
_ZONE = r"(?:\s*(Z|z|UTC|GMT|[+-]\d{2}:?(?:\d{2})?))?"
_CLOCK = rf"(?:[T\s,:]+(\d{{1,2}}):(\d{{2}})(?::(\d{{2}}(?:[.,]\d+)?))?(?:\s*([AaPp]\.?\s?[Mm]\.?))?{_ZONE})?"
"""Hour, minute, second, AM or PM, and offset after a date."""
_YEAR = r"(\d{4}|\d{2})"
_WEEKDAY = r"(?i:(?:mon|tue|wed|thu|fri|sat|sun)[a-z]*\.?,?\s+)?"
_ISO = (
    r"^(\d{4}-\d{2}(?:-\d{2})?)(?:[Tt ]+(\d{2}:\d{2})(?::(\d{2}))?(?:[.,](\d{1,9})\d*)?"
    r"\s*(?:[Zz]|UTC|GMT|(?:([+-]\d{2}):?(\d{2})?(?:\s*[A-Z]{3,4}|\[[\w/+-]+\])?))?)?$"
)
_ISO_BASIC = r"^(\d{4})(\d{2})(\d{2})[Tt](\d{2})(\d{2})(\d{2})?"
_NUMERIC_DATE = rf"^(\d{{1,2}})[/.\-](\d{{1,2}})[/.\-]{_YEAR}{_CLOCK}$"
_YEAR_FIRST = rf"^(\d{{4}})[-/.](\d{{1,2}})[-/.](\d{{1,2}}){_CLOCK}$"
_CJK_DATE = r"^(\d{4})\s*[年년]\s*(\d{1,2})\s*[月월]\s*(\d{1,2})\s*[日일]"
_AMAZON_DATE = rf"^(\d{{1,2}}) (\d{{1,2}}), (\d{{4}}){_CLOCK}$"
_DAY_NAMED = rf"^{_WEEKDAY}(\d{{1,2}})(?:st|nd|rd|th)?[\s/.-]+([A-Za-z]{{3,9}})\.?,?[\s/.-]+{_YEAR}{_CLOCK}$"
_NAMED_DAY = rf"^{_WEEKDAY}([A-Za-z]{{3,9}})\.?[\s-]+(\d{{1,2}})(?:st|nd|rd|th)?,?[\s-]+{_YEAR}{_CLOCK}$"
_YEAR_NAMED = rf"^(\d{{4}})[\s/.-]+([A-Za-z]{{3,9}})\.?[\s/.-]+(\d{{1,2}}){_CLOCK}$"
_UNIX_DATE = (
    rf"^{_WEEKDAY}([A-Za-z]{{3,9}})\s+(\d{{1,2}})\s+(\d{{1,2}}):(\d{{2}}):(\d{{2}})()"
    r"(?:\s+([A-Z]{3}|[+-]\d{4}))?\s+(\d{4})$"
)
_HALF = re.compile(r"\d\s*[ap]\.?m\b", re.IGNORECASE)
_MONTHS = {
    name: f"{month:02d}"
    for month in range(1, 13)
    for name in (calendar.month_name[month].lower(), calendar.month_abbr[month].lower())
} | {"sept": "09"}


@dataclass(frozen=True)
class Times:
    """Times of some rows.

    Attributes:
        seconds: float64 [n], NaN if missing, invalid or ambiguous.
        wrong: bool [n] mask of invalid values.
        readings: float64 [n] seconds of numeric dates such as 3/4/2024 in each order of their parts, NaN if that is no
            date; empty if there are no such dates.
    """

    seconds: np.ndarray
    wrong: np.ndarray
    readings: dict[DateOrder, np.ndarray] = field(default_factory=dict)

    @property
    def is_undecided(self) -> np.ndarray:
        """Bool [n] mask of the dates whose order has to be decided."""
        undecided = np.zeros(len(self.seconds), bool)
        for seconds in self.readings.values():
            undecided |= ~np.isnan(seconds)
        return undecided


def read_times(values: pl.Series, where: str, time_format: str | None, missing: Sequence[str]) -> Times:
    """Parse the times of a column of any type.

    Args:
        values: column of n rows.
        where: file and column, for errors.
        time_format: `strptime` format of all texts, or None.
        missing: words for a missing time.

    Raises:
        DataError: for types that cannot be times.
    """
    dtype = values.dtype
    if dtype == pl.Date or isinstance(dtype, pl.Datetime):
        return Times(_epoch(values.cast(pl.Datetime("us"))), np.zeros(len(values), bool))
    if dtype.is_numeric() and time_format is None:
        seconds = _seconds(values.cast(pl.Float64).fill_null(np.nan).to_numpy())
        wrong = np.abs(seconds) > _LATEST
        seconds[wrong] = np.nan
        return Times(seconds, wrong)
    if dtype == pl.Boolean or dtype.is_nested() or dtype.is_temporal():
        raise DataError(where, str(dtype), "is not a type of times", "Name a column of times, or none.")
    texts = without_missing(column_text(values, where), missing)
    if dtype.is_integer() and time_format is not None:
        texts = texts.str.zfill(len(datetime(2024, 11, 25, tzinfo=UTC).strftime(time_format)))  # 1112025 is 01.11.2025
    has_text = texts.is_not_null().to_numpy()
    if time_format is not None:
        seconds = _parse(texts, time_format)
        return Times(seconds, has_text & np.isnan(seconds))
    return _guess(texts, has_text)


def _guess(texts: pl.Series, has_text: np.ndarray) -> Times:
    seconds = _seconds(texts.cast(pl.Float64, strict=False).fill_null(np.nan).to_numpy())
    seconds[np.abs(seconds) > _LATEST] = np.nan
    left = np.flatnonzero(np.isnan(seconds) & has_text)
    for parse in (_iso, _year_first, _amazon, _named, _rfc_2822):
        if len(left):
            seconds[left] = parse(texts[left])
            left = left[np.isnan(seconds[left])]
    wrong = has_text & np.isnan(seconds)
    if not len(left):
        return Times(seconds, wrong)
    day_first, month_first, year_first = readings = np.full((3, len(seconds)), np.nan)
    readings[:, left] = _numeric_dates(texts[left])
    same = (day_first == month_first) & (np.isnan(year_first) | (year_first == day_first))
    seconds[same] = day_first[same]
    readings[:, same] = np.nan
    times = Times(seconds, wrong, {"day-first": day_first, "month-first": month_first, "year-first": year_first})
    times.wrong[same | times.is_undecided] = False
    return times


def far_times(seconds: np.ndarray) -> np.ndarray:
    """Return a bool [n] mask of outliers; False for NaN.

    Outliers are times on the first day of 1970 if the median is later, and those farther from the median than both
    twenty years and ten times the interquartile range.
    """
    present = seconds[~np.isnan(seconds)]
    if not len(present):
        return np.zeros(len(seconds), bool)
    low, median, high = np.percentile(present, [25, 50, 75])
    is_epoch = (np.abs(seconds) < _DAY) & (median > 365 * _DAY)
    return is_epoch | (np.abs(seconds - median) > max(20 * 365.25 * _DAY, 10 * (high - low)))


def compact_dates(numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Parse numbers that are dates without marks, such as 24112025, 20251124, 202511 and 11.2025.

    Args:
        numbers: float64 [n], NaN if missing.

    Returns:
        float64 [n] seconds since 1970 by `strptime` format, for each format in which all numbers are dates.
    """
    present = ~np.isnan(numbers)
    if not present.any() or numbers[present].min() < 1 or numbers[present].max() > 99_999_999:
        return {}
    has_fraction = bool((numbers[present] != np.floor(numbers[present])).any())
    digits = np.rint(numbers[present] * 10_000 if has_fraction else numbers[present]).astype(np.int64)
    first, second, last = digits // 1_000_000, digits // 10_000 % 100, digits % 10_000
    ones = np.ones_like(digits)
    forms = {
        "%d%m%Y": (last, second, first),
        "%m%d%Y": (last, first, second),
        "%Y%m%d": (digits // 10_000, last // 100, digits % 100),
        "%Y%m": (digits // 100, digits % 100, ones),
    }
    found = {}
    for form, parts in ({"%m.%Y": (last, digits // 10_000, ones)} if has_fraction else forms).items():
        seconds = _days(*parts)
        if not np.isnan(seconds).any():
            found[form] = np.full(len(numbers), np.nan)
            found[form][present] = seconds
    return found


def _days(year: np.ndarray, month: np.ndarray, day: np.ndarray) -> np.ndarray:
    """Convert dates from 1900 to 2100 to seconds, NaN for others."""
    months = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    days = months.astype("datetime64[D]") + (day - 1)
    is_date = (year >= 1900) & (year <= 2100) & (month >= 1) & (month <= 12) & (days.astype("datetime64[M]") == months)
    return np.where(is_date, days.astype("datetime64[s]").astype(np.float64), np.nan)


def date_text(seconds: float) -> str:
    """Format a time as a date for a message, or as a number if it is out of the calendar's range."""
    try:
        return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d}"
    except (ValueError, OverflowError, OSError):
        return f"{seconds:g} s"


def _seconds(numbers: np.ndarray) -> np.ndarray:
    """Convert Unix times of any unit to seconds."""
    size = np.abs(numbers)
    divisor = np.ones(len(numbers))
    for least, parts in reversed(_UNITS):
        divisor[size >= least] = parts
    return numbers / divisor


def _epoch(moments: pl.Series) -> np.ndarray:
    return (moments.dt.epoch("us").cast(pl.Float64) / 1e6).fill_null(np.nan).to_numpy().copy()


def _parse(texts: pl.Series, time_format: str) -> np.ndarray:
    """Parse texts in a format to seconds, NaN for others."""
    time_format = time_format.replace(".%f", "%.f").replace("%f", "%6f")  # fractions of a second as Polars writes them
    for read in (texts.str.to_datetime, texts.str.to_date):
        try:
            return _epoch(read(time_format, strict=False).cast(pl.Datetime("us")))
        except pl.exceptions.PolarsError:
            continue
    raise DataError("time_format", time_format, "is not a strptime format", "Write for example '%d/%m/%Y %H:%M'.")


def check_time_format(time_format: str) -> str:
    """Return the format; ValueError if no time can be parsed with it."""
    moment = datetime(2024, 11, 25, 13, 14, 15, tzinfo=UTC)
    try:
        (seconds,) = _parse(pl.Series([moment.strftime(time_format)]), time_format)
        is_read = bool(abs(seconds - moment.timestamp()) < 366 * 86400)
    except DataError:
        is_read = False
    if not is_read:
        raise ValueError(f"{time_format!r} is not a strptime format; write for example '%d/%m/%Y %H:%M'")
    return time_format


def _iso(texts: pl.Series) -> np.ndarray:
    """Parse ISO 8601: 2024-03-01 or 20240301T100000, with a time after T or a space, fractions, an offset or Z."""
    texts = texts.str.replace(_ISO_BASIC, "${1}-${2}-${3}T${4}:${5}:${6}").str.replace(r"(T\d{2}:\d{2}):($|\D)", "$1$2")
    date, clock, second, fraction, hours, minutes = _groups(texts, _ISO)
    date = pl.select(pl.when(date.str.len_bytes() == 7).then(date + "-01").otherwise(date)).to_series()
    texts = pl.select(
        pl.concat_str(date, pl.lit("T"), clock.fill_null("00:00"), pl.lit(":"), second.fill_null("00"))
    ).to_series()
    seconds = _epoch(texts.str.to_datetime("%Y-%m-%dT%H:%M:%S", strict=False))
    part = ("0." + fraction.fill_null("0")).cast(pl.Float64).to_numpy()
    return seconds + part - _offset(hours.fill_null("+00") + minutes.fill_null("00"))


def _offset(zones: pl.Series) -> np.ndarray:
    """Return the UTC offset of zones such as +0130, -05:00, Z and UTC in seconds; zero without a zone."""
    digits = zones.str.extract(r"^[+-](\d{2})", 1).fill_null("0").cast(pl.Float64) * 3600
    minutes = zones.str.extract(r"^[+-]\d{2}:?(\d{2})$", 1).fill_null("0").cast(pl.Float64) * 60
    sign = np.where(zones.str.starts_with("-").fill_null(False).to_numpy(), -1.0, 1.0)
    return sign * (digits + minutes).to_numpy()


def _from_parts(year: pl.Series, month: pl.Series, day: pl.Series, clock: Sequence[pl.Series]) -> np.ndarray:
    """Convert the parts of dates to seconds, NaN for invalid dates."""
    hour, minute, second, half, zone = clock
    full_year = (
        pl.when(year.str.len_bytes() > 2)
        .then(year)
        .otherwise(pl.when(year.cast(pl.Int32, strict=False) < 69).then("20" + year).otherwise("19" + year))
    )
    date = pl.select(pl.concat_str(full_year, month.str.zfill(2), day.str.zfill(2), separator="-")).to_series()
    seconds = _epoch(date.str.to_datetime("%Y-%m-%d", strict=False))
    clocks = (hour, minute, second.str.replace(",", ".", literal=True))
    hours, minutes, rest = (part.fill_null("0").cast(pl.Float64).to_numpy().copy() for part in clocks)
    has_half = (half.str.len_bytes() > 0).fill_null(False).to_numpy()
    afternoon = half.str.to_lowercase().str.starts_with("p").fill_null(False).to_numpy()
    seconds[(hours > 23) | (minutes > 59) | (rest > 60) | (has_half & ((hours > 12) | (hours == 0)))] = np.nan
    hours[has_half & (hours == 12)] = 0
    return seconds + 3600 * (hours + 12 * afternoon) + 60 * minutes + rest - _offset(zone)


def _groups(texts: pl.Series, pattern: str) -> list[pl.Series]:
    return texts.str.extract_groups(pattern).struct.unnest().get_columns()


def _numeric_dates(texts: pl.Series) -> np.ndarray:
    """Parse dates such as 3/4/2024, day-first, month-first and, with two digits, year-first: float64 [3, n]."""
    first, second, last, *clock = _groups(texts, _NUMERIC_DATE)
    two_digits = pl.select(pl.when((first.str.len_bytes() == 2) & (last.str.len_bytes() == 2)).then(first)).to_series()
    orders = ((last, second, first), (last, first, second), (two_digits, second, last))
    return np.stack([_from_parts(*parts, clock) for parts in orders])


def _year_first(texts: pl.Series) -> np.ndarray:
    """Parse 2024/3/1, 2024.03.01 and 2024年3月1日, with a clock of 12 or 24 hours."""
    texts = texts.str.replace(_CJK_DATE, "$1-$2-$3")
    year, month, day, *clock = _groups(texts, _YEAR_FIRST)
    return _from_parts(year, month, day, clock)


def _amazon(texts: pl.Series) -> np.ndarray:
    """Parse Amazon's reviewTime, `09 13, 2009`."""
    month, day, year, *clock = _groups(texts, _AMAZON_DATE)
    return _from_parts(year, month, day, clock)


def _named(texts: pl.Series) -> np.ndarray:
    """Parse dates with the name of the month."""
    seconds = np.full(len(texts), np.nan)
    if not texts.str.contains(r"[A-Za-z]{3}").any():
        return seconds
    orders = {_DAY_NAMED: "dmy", _NAMED_DAY: "mdy", _YEAR_NAMED: "ymd"}
    for pattern, order in orders.items():
        *date, hour, minute, second, half, zone = _groups(texts, pattern)
        parts = dict(zip(order, date, strict=True))
        parsed = _from_parts(parts["y"], _month(parts["m"]), parts["d"], [hour, minute, second, half, zone])
        seconds = np.where(np.isnan(seconds), parsed, seconds)
    month, day, hour, minute, second, half, zone, year = _groups(texts, _UNIX_DATE)
    has_offset = zone.is_null() | zone.str.contains(r"^(UTC|GMT|[+-]\d{4})$")
    parsed = _from_parts(year, _month(month), day, [hour, minute, second, half, zone])
    return np.where(np.isnan(seconds) & has_offset.to_numpy(), parsed, seconds)


def _month(names: pl.Series) -> pl.Series:
    return names.str.to_lowercase().replace_strict(_MONTHS, default=None, return_dtype=pl.String)


def _rfc_2822(texts: pl.Series) -> np.ndarray:
    """Parse RFC 2822: Fri, 01 Mar 2024 10:00:00 +0100."""
    return np.array([_mail_date(text) for text in texts.to_list()], dtype=np.float64)


def _mail_date(text: str) -> float:
    if ("," not in text and ":" not in text) or not any(letter.isalpha() for letter in text) or _HALF.search(text):
        return float("nan")
    try:
        moment = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return float("nan")
    return moment.timestamp() if moment.tzinfo else moment.replace(tzinfo=UTC).timestamp()
