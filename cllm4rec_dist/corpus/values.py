"""Convert values of raw files to texts, numbers and ids, with the same rules for all file formats.

Ids are texts without leading and trailing white space. A missing word is no id. A whole number that was stored as a
float (`100.0`, as pandas stores integer columns with gaps) becomes an integer again. Typed columns (Parquet) and single
values (JSON) follow the same rules.
"""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from decimal import Decimal
from html.entities import html5
from typing import Any

import numpy as np
import polars as pl

from cllm4rec_dist.errors import DataError

MISSING_WORDS = (
    "NULL",
    "Null",
    "null",
    "NA",
    "N/A",
    "n/a",
    "#N/A",
    "<NA>",
    "NaN",
    "nan",
    "-nan",
    "NaT",
    "None",
    "NONE",
    "\\N",
)
"""Words for a missing value in exports from databases, pandas and R."""
_EXACT: dict[Any, int] = {pl.Float64: 1 << 53, pl.Float32: 1 << 24, pl.Float16: 1 << 11}
"""Smaller integers are exact in a float of this type."""
_SURROGATES = re.compile("[\ud800-\udfff]")
_FLOAT = r"^-?\d+(\.(0|\d*[1-9]))?$"
"""A whole number, or a float as Python writes it; `4711.00` beside `4711.01` is a text."""
_WHOLE_FLOAT = r"^(-?\d+)\.0+$"
_ENTITY = re.compile(r"&(#\d+|#[xX][0-9a-fA-F]+|[A-Za-z][A-Za-z0-9]*);")


class BadValue(Exception):
    """An unusable value; the message is the reason, a clause that follows `that`: "is neither text nor number"."""

    def __init__(self, reason: str, value: object) -> None:
        super().__init__(reason)
        self.value = value


def unwrap(value: Any) -> Any:
    """Unwrap MongoDB's extended JSON: {"$oid": "..."}, {"$date": {"$numberLong": "..."}}."""
    while isinstance(value, dict) and len(value) == 1 and next(iter(value)).startswith("$"):
        (value,) = value.values()
    return value


def id_text(value: Any) -> str | None:
    """Convert a JSON value to an id, None if missing.

    Raises:
        BadValue: for a list, an object, a boolean, or a float too large to be exact.
    """
    value = unwrap(value)
    if value is None or isinstance(value, str):
        if value is not None and _SURROGATES.search(value):
            raise BadValue("contains an unpaired surrogate", ascii(value))
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadValue("is neither text nor number", value)
    if isinstance(value, float) and abs(value) >= _EXACT[pl.Float64]:
        raise BadValue("is a float too large to be exact", value)
    return _number_text(value)


def number_text(value: Any) -> str | None:
    """Convert a JSON value to the text of a number or time.

    Raises:
        BadValue: for a list or an object.
    """
    value = unwrap(value)
    if value is None or isinstance(value, str):
        return None if value is None else _SURROGATES.sub("\ufffd", value)
    if not isinstance(value, int | float):
        raise BadValue("is a list or object, not a number or time", value)
    return str(int(value)) if isinstance(value, bool) else _number_text(value)


def plain_text(value: Any) -> str | None:
    """Convert a value to text; lists and objects give their nonempty texts joined by spaces.

    Raises:
        BadValue: for bytes that are not UTF-8.
    """
    value = unwrap(value)
    if isinstance(value, str):
        return _SURROGATES.sub("\ufffd", _joined_surrogates(value))
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            raise BadValue("is binary and not UTF-8 text", value) from None
    if value is None or isinstance(value, bool):
        return None if value is None else str(value).lower()
    if isinstance(value, int | float | Decimal):
        return _number_text(value)
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    if isinstance(value, list | tuple | dict):
        return " ".join(text.strip() for part in parts if (text := plain_text(part)) and text.strip()) or None
    return str(value)


def _joined_surrogates(text: str) -> str:
    return text if not _SURROGATES.search(text) else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _number_text(value: float | Decimal) -> str | None:
    if value != value:
        return None
    if isinstance(value, float | Decimal) and math.isfinite(value) and value == int(value) and abs(int(value)) < 10**18:
        return str(int(value))
    return str(value)


def column_text(column: pl.Series, where: str) -> pl.Series:
    """Convert a column of any type to texts, null if missing.

    Args:
        column: column of a raw file.
        where: file and column, for errors.

    Raises:
        DataError: for binary values that are not UTF-8, and types that cannot be converted.
    """
    dtype = column.dtype
    if dtype == pl.String or dtype == pl.Null:
        return column.cast(pl.String)
    if isinstance(dtype, pl.Decimal):
        return column.cast(pl.String).str.replace(r"\.0+$", "").str.replace(r"(\.\d*?)0+$", "$1")
    if dtype.is_float():
        return _float_text(column)
    if dtype.is_nested():
        try:
            return pl.Series(column.name, [plain_text(value) for value in column.to_list()], dtype=pl.String)
        except BadValue as error:
            raise DataError(where, error.value, str(error), "Write the column as text.") from error
    try:
        return column.cast(pl.String)
    except pl.exceptions.PolarsError as error:
        reason = "is binary and not UTF-8 text" if dtype == pl.Binary else "is a type that cannot be read as text"
        raise DataError(where, str(dtype), reason, "Write the column as text.") from error


def _float_text(column: pl.Series) -> pl.Series:
    """Convert floats to texts: whole numbers without `.0`, null for NaN."""
    is_whole = (column.is_finite() & (column == column.round()) & (column.abs() < 1e18)).fill_null(False)
    integers = column.set(~is_whole, 0).cast(pl.Int64).cast(pl.String)
    return column.fill_nan(None).cast(pl.String).zip_with(~is_whole, integers)


def column_ids(column: pl.Series, where: str) -> pl.Series:
    """Convert a column of any type to ids; missing words are not removed.

    Raises:
        DataError: for types that cannot be ids, and floats too large to be exact.
    """
    dtype = column.dtype
    if dtype == pl.Boolean or dtype.is_nested() or dtype.is_temporal():
        raise DataError(where, str(dtype), "is not a type of ids", "Name a column of texts or whole numbers.")
    if dtype.is_float():
        largest = np.nanmax(np.abs(column.cast(pl.Float64).fill_null(np.nan).to_numpy()), initial=0)
        if largest >= _EXACT[dtype]:
            raise DataError(
                where,
                str(dtype),
                f"has ids up to {largest:.0f}, which such floats cannot distinguish",
                "Write the column as text or whole numbers.",
            )
    return column_text(column, where)


def column_numbers(
    column: pl.Series, where: str, missing: Sequence[str], decimal: str = "."
) -> tuple[np.ndarray, np.ndarray]:
    """Convert a column to float64 [n], NaN if missing; also return a bool [n] mask of invalid values.

    Raises:
        DataError: for types that cannot be numbers.
    """
    dtype = column.dtype
    if dtype.is_nested() or dtype.is_temporal():
        raise DataError(where, str(dtype), "is not a type of numbers", "Name a column of numbers.")
    if dtype.is_numeric() or dtype == pl.Boolean:
        values = column.cast(pl.Float64)
        infinite = values.is_infinite().fill_null(False).to_numpy()
        return values.fill_null(np.nan).to_numpy().copy(), infinite
    texts = without_missing(column_text(column, where), missing)
    if decimal != ".":
        texts = texts.str.replace(decimal, ".", literal=True)
    values = texts.cast(pl.Float64, strict=False)
    wrong = (texts.is_not_null() & ~values.is_finite().fill_null(False)).to_numpy()
    return values.fill_null(np.nan).to_numpy().copy(), wrong


def without_missing(texts: pl.Series, missing: Sequence[str]) -> pl.Series:
    """Strip white space; null for an empty text or a missing word."""
    texts = texts.str.strip_chars()
    is_missing = (texts.str.len_bytes() == 0) | texts.is_in(list(missing))
    return texts.set(is_missing.fill_null(False), None)


def is_float_column(ids: pl.Series) -> bool:
    """True if all ids are numbers and some look like `100.0`, as pandas writes integers of a column with gaps.

    Also if all of them look like `100.00`, as databases write integers of a decimal column.
    """
    is_whole = ids.str.contains(_WHOLE_FLOAT)
    return bool(is_whole.any()) and bool(is_whole.all() or ids.str.contains(_FLOAT).all())


def whole_ids(ids: pl.Series) -> pl.Series:
    """Convert ids such as `100.0` to `100`."""
    return ids.str.replace(_WHOLE_FLOAT, "$1")


def unescape_entities(texts: pl.Series) -> pl.Series:
    """Replace HTML entities (`&amp;`, `&#34;`) with their characters; leave anything else unchanged."""
    has_entity = texts.str.contains(r"&#?\w+;").fill_null(False)
    if not has_entity.any():
        return texts
    changed = [_ENTITY.sub(_entity, text) for text in texts.filter(has_entity).to_list()]
    return texts.scatter(has_entity.arg_true(), changed)


def _entity(match: re.Match[str]) -> str:
    name = match[1]
    return html.unescape(match[0]) if name.startswith("#") else html5.get(f"{name};", match[0])


def clean_texts(texts: pl.Series, missing: Sequence[str], *, one_line: bool = False) -> pl.Series:
    """Unescape HTML entities, strip white space and remove missing words; null if nothing is left.

    Args:
        one_line: collapse white space into single spaces, as in a title.
    """
    texts = unescape_entities(texts)
    if one_line:
        texts = texts.str.replace_all(r"\s+", " ")
    return without_missing(texts, missing)
