"""Parquet columns of every type: read right, or refused with column and type."""

from __future__ import annotations

import datetime as dt
import io
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.corpus.reading import Read, Refuse, table

TEXT = pa.array(["a", "b"])
NOON = dt.datetime(2024, 1, 1, 12)
SECONDS = 1704110400.0


def parquet(**columns: pa.Array) -> dict[str, bytes]:
    sink = io.BytesIO()
    pq.write_table(pa.table({"u": TEXT, "i": pa.array(["x", "y"])} | columns), sink)
    return {"i.parquet": sink.getvalue()}


def source(**columns: str) -> dict[str, Any]:
    return table("i.parquet", **columns)


@pytest.mark.parametrize(
    ("column", "ids"),
    [
        (TEXT.cast(pa.large_string()), ["a", "b"]),
        (TEXT.cast(pa.string_view()), ["a", "b"]),
        (TEXT.dictionary_encode(), ["a", "b"]),
        (TEXT.cast(pa.dictionary(pa.int8(), pa.string())), ["a", "b"]),
        (pa.array([5, 6]).dictionary_encode(), ["5", "6"]),
        (pa.array([1, 2], pa.int8()), ["1", "2"]),
        (pa.array([2**64 - 1, 1], pa.uint64()), ["18446744073709551615", "1"]),
        (pa.array([2**62 + 1, 1]), ["4611686018427387905", "1"]),
        (pa.array([100.0, None]), ["100"]),
        (pa.array([float("nan"), 7.0]), ["7"]),
        (pa.array([1.5, 2.0]), ["1.5", "2"]),
        (pa.array([100.0, 1.0], pa.float32()), ["100", "1"]),
        (pa.array(np.array([100, 2.5], np.float16)), ["100", "2.5"]),
        (pa.array([Decimal("100.00"), Decimal("1.50")]), ["100", "1.5"]),
        (pa.array([Decimal("100"), Decimal("20")]), ["100", "20"]),
        (pa.array([Decimal(10**40), None]), [str(10**40)]),
        (pa.array([b"a", b"caf\xc3\xa9"]), ["a", "café"]),
        (pa.array([b"a", b"b"], pa.binary_view()), ["a", "b"]),
        (pa.array([b"ab", b"cd"], pa.binary(2)), ["ab", "cd"]),
        (
            pa.ExtensionArray.from_storage(pa.uuid(), pa.array([bytes(range(16)), None], pa.binary(16))),
            ["00010203-0405-0607-0809-0a0b0c0d0e0f"],
        ),
    ],
)
def test_ids_of_every_type(read: Read, column: pa.Array, ids: list[str]) -> None:
    assert [user for user, _ in read(parquet(u=column), **source()).pairs] == ids


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([True, False]), "'Boolean' is not a type of ids"),
        (pa.array([dt.date(2024, 1, 1)] * 2), "'Date' is not a type of ids"),
        (pa.array([["a"], ["b"]]), "'List(String)' is not a type of ids"),
        (pa.array([{"a": 1}] * 2), "Struct"),
        (pa.array([dt.time(1, 2)] * 2), "'Time' is not a type of ids"),
        (pa.array([b"\xff\xfe", b"b"]), "'Binary' is binary and not UTF-8 text"),
        (pa.array([1e17, 1.0]), "cannot distinguish"),
        (pa.array([16777217.0, 1.0], pa.float32()), "cannot distinguish"),
        (pa.array([float("inf"), 1.0]), "cannot distinguish"),
        (pa.array([None, None]), "leaves no interaction"),
    ],
)
def test_columns_that_are_no_ids_are_refused_by_name(refuse: Refuse, column: pa.Array, words: str) -> None:
    message = refuse(parquet(u=column), **source())
    assert words in message
    assert "leaves no" in words or message.startswith("i.parquet: u:")


def stamps(unit: str, zone: str | None) -> pa.Array:
    moments = pa.array([NOON, None])
    return (
        moments.cast(pa.timestamp(unit))
        if zone is None
        else moments.cast(pa.timestamp(unit, "UTC")).cast(pa.timestamp(unit, zone))
    )


@pytest.mark.parametrize(
    "column",
    [
        *(stamps(unit, zone) for unit in ("s", "ms", "us", "ns") for zone in (None, "UTC", "Europe/Berlin", "+02:00")),
        *(pa.array([int(SECONDS) * factor, None]) for factor in (1, 10**3, 10**6, 10**9)),
        pa.array([SECONDS, float("nan")]),
        pa.array([int(SECONDS), None], pa.uint64()),
        pa.array([Decimal("1704110400.0"), None]),
        pa.array(["2024-01-01T12:00:00Z", "NaT"]),
        pa.array(["2024-01-01T12:00:00Z", None]).dictionary_encode(),
        pa.array([b"2024-01-01 12:00", None]),
    ],
)
def test_times_of_every_type(read: Read, column: pa.Array) -> None:
    assert read(parquet(t=column), **source(timestamp="t")).column("timestamp") == [SECONDS, None]


@pytest.mark.parametrize(
    "column", [pa.array([dt.date(2024, 1, 1)] * 2), pa.array([dt.date(2024, 1, 1)] * 2, pa.date64())]
)
def test_dates(read: Read, column: pa.Array) -> None:
    assert read(parquet(t=column), **source(timestamp="t")).column("timestamp") == [1704067200.0] * 2


@pytest.mark.parametrize(
    ("column", "ratings"),
    [
        (pa.array(np.array([4, 2.5], np.float16)), [4.0, 2.5]),
        (pa.array([Decimal("4.50")] * 2), [4.5, 4.5]),
        (pa.array(["4.5", "5"]).dictionary_encode(), [4.5, 5.0]),
        (pa.array([b"4", b"5"]), [4.0, 5.0]),
        (pa.array([True, False]), [1.0, 0.0]),
        (pa.array([4, None], pa.int8()), [4.0]),
        (pa.array([float("inf"), 1.0]), [1.0]),
    ],
)
def test_ratings_of_every_type(read: Read, column: pa.Array, ratings: list[float]) -> None:
    assert read(parquet(r=column), **source(rating="r")).column("rating") == ratings


MAP = pa.map_(pa.string(), pa.string())


@pytest.mark.parametrize(
    ("column", "texts"),
    [
        (pa.array([["a", "b"], ["c", None]]), ["a b", "c"]),
        (pa.array([[["a"], ["b"]], None]), ["a b"]),
        (pa.array([{"a": "x", "b": 1.0}, {"a": None, "b": None}]), ["x 1"]),
        (pa.array([[{"a": "x"}], [{"a": "y"}]]), ["x", "y"]),
        (pa.array([[("k", "v")], [("k2", "v2")]], MAP), ["k v", "k2 v2"]),
        (pa.array([["a", "b"], ["c", "d"]], pa.list_(pa.string(), 2)), ["a b", "c d"]),
        (pa.array([["a"], ["b"]], pa.list_view(pa.string())), ["a", "b"]),
        (pa.ListArray.from_arrays(pa.array([0, 1, 2]), TEXT.dictionary_encode()), ["a", "b"]),
        (pa.DictionaryArray.from_arrays(pa.array([0, None]), pa.array(["x"])), ["x"]),
        (pa.array([[b"caf\xc3\xa9"], [b"x"]]), ["café", "x"]),
        (pa.array([[1.0, float("nan")], [None]]), ["1"]),
        (pa.array([0.1, 2.0], pa.float32()), ["0.1", "2"]),
        (pa.array([True, None]), ["true"]),
        (pa.array([dt.date(2024, 1, 1), None]), ["2024-01-01"]),
        (pa.array([None, None]), []),
    ],
)
def test_texts_of_every_type(read: Read, column: pa.Array, texts: list[str]) -> None:
    assert read(parquet(x=column), **source(text="x")).reviews == texts


@pytest.mark.parametrize(
    ("columns", "roles", "words"),
    [
        ({"x": pa.array([b"\xff", b"a"])}, {"text": "x"}, "i.parquet: x: 'Binary' is binary and not UTF-8"),
        ({"x": pa.array([[b"\xff"], [b"a"]])}, {"text": "x"}, "i.parquet: x: b'\\xff' is binary"),
        ({"x": pa.array([dt.timedelta(1)] * 2)}, {"text": "x"}, 'i.parquet: x: "Duration'),
        ({"t": pa.array([dt.time(1, 2)] * 2)}, {"timestamp": "t"}, "i.parquet: t: 'Time' is not a type of times"),
        ({"t": pa.array([True, False])}, {"timestamp": "t"}, "'Boolean' is not a type of times"),
        ({"r": pa.array([[4], [5]])}, {"rating": "r"}, "i.parquet: r: 'List(Int64)' is not a type of numbers"),
        ({"r": pa.array([NOON] * 2)}, {"rating": "r"}, "is not a type of numbers"),
        ({}, {"text": "m.n"}, "'m.n' is not among its columns"),
    ],
)
def test_types_that_cannot_be_used_are_refused_by_name(
    refuse: Refuse, columns: dict[str, pa.Array], roles: dict[str, str], words: str
) -> None:
    assert words in refuse(parquet(**columns), **source(**roles))


def test_parts_may_have_different_types(read: Read) -> None:
    files = {
        f"o/{name}": next(iter(parquet(**columns).values()))
        for name, columns in {
            "a": {"u": TEXT, "i": pa.array([1, 2])},
            "b": {"u": pa.array([5, 6]), "i": pa.array(["1", "2"])},
            "c": {"u": pa.array([5.0, 6.0]), "i": pa.array([1.0, 2.0])},
        }.items()
    }
    result = read(files, **table("o"))
    assert result.pairs == [("a", "1"), ("b", "2"), ("5", "1"), ("6", "2"), ("5", "1"), ("6", "2")]
