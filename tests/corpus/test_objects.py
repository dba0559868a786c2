"""JSON in all the forms that people have it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cllm4rec_dist.corpus.sources import encoding
from cllm4rec_dist.corpus.sources.json_stream import JsonStream
from cllm4rec_dist.errors import DataError
from tests.corpus.reading import Read, Refuse, table

ROWS: list[dict[str, Any]] = [{"u": f"u{k % 3}", "i": k % 4, "t": 1600000000 + k, "x": f"text {k}"} for k in range(6)]
PAIRS = [(f"u{k % 3}", str(k % 4)) for k in range(6)]
LINES = "\n".join(map(json.dumps, ROWS))
COLUMNS = {name: [row[name] for row in ROWS] for name in ROWS[0]}
SOURCE = table("i.json", timestamp="t", text="x")


@pytest.mark.parametrize(
    "content",
    [
        LINES,
        LINES.replace("\n", "\n\n\n"),
        LINES.replace("\n", ",\n"),
        "".join(map(json.dumps, ROWS)),
        "\n".join(json.dumps(row, indent=1) for row in ROWS),
        "\n".join(map(str, ROWS)),
        json.dumps(ROWS),
        json.dumps(ROWS, indent=2),
        "[\n" + LINES.replace("\n", ",\n") + "\n]",
        json.dumps(ROWS[:3]) + "\n" + json.dumps(ROWS[3:]),
        json.dumps({f"row {k}": row for k, row in enumerate(ROWS)}),
        json.dumps({f"row {k}": row for k, row in enumerate(ROWS)}, indent=1),
        json.dumps(COLUMNS),
        json.dumps({name: dict(enumerate(values)) for name, values in COLUMNS.items()}),
        json.dumps({name: dict(enumerate(values)) for name, values in COLUMNS.items()}, indent=1),
        "\ufeff" + LINES,
        "\ufeff" + json.dumps(ROWS),
        LINES.encode("utf-16"),
        json.dumps(ROWS).encode("utf-16"),
    ],
)
@pytest.mark.parametrize("block_bytes", [1 << 24, 16])
def test_all_layouts_hold_the_same_rows(
    read: Read, monkeypatch: pytest.MonkeyPatch, content: str | bytes, block_bytes: int
) -> None:
    monkeypatch.setattr(encoding, "BLOCK_BYTES", block_bytes)
    result = read({"i.json": content}, **SOURCE)
    assert result.pairs == PAIRS
    assert result.reviews == [f"text {k}" for k in range(6)]
    assert not result.lost


OID = {"$oid": "507f1f77bcf86cd799439011"}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("time", ["2024-03-01T00:00:00Z", {"$numberLong": "1709251200000"}, 1709251200000])
def test_mongo_notation(read: Read, indent: int | None, time: Any) -> None:
    row = {"_id": OID, "u": OID, "i": {"$numberLong": "12"}, "t": {"$date": time}, "x": "good"}
    result = read({"i.json": json.dumps([row], indent=indent)}, **SOURCE)
    assert result.pairs == [("507f1f77bcf86cd799439011", "12")]
    assert result.column("timestamp") == [1709251200.0]


@pytest.mark.parametrize(
    ("fields", "pair"),
    [
        ('"u": 100.0, "i": "a"', ("100", "a")),
        ('"u": "100.0", "i": "7"', ("100", "7")),
        (
            '"u": 12345678901234567890123, "i": 18446744073709551615',
            ("12345678901234567890123", "18446744073709551615"),
        ),
        ('"u": 9007199254740993, "i": 1.5', ("9007199254740993", "1.5")),
        ('"u": " a\\u00a0", "i": "\\ud83d\\ude00"', ("a", "😀")),
    ],
)
@pytest.mark.parametrize("form", ["{%s}\n", "[{%s}]"])
def test_ids_stay_what_they_are(read: Read, fields: str, pair: tuple[str, str], form: str) -> None:
    assert read({"i.json": form % fields}, **table("i.json")).pairs == [pair]


@pytest.mark.parametrize(
    ("fields", "value", "reason"),
    [
        ('"u": {"id": 1}, "i": 2', "{'id': 1}", "has a u that is neither text nor number"),
        ('"u": 1, "i": [2]', "[2]", "has a i that is neither text nor number"),
        ('"u": true, "i": 2', "True", "has a u that is neither text nor number"),
        ('"u": 1e22, "i": 2', "1e+22", "has a u that is a float too large to be exact"),
        ('"u": "a\\ud83d", "i": 2', "'a\\ud83d'", "has a u that contains an unpaired surrogate"),
        ('"u": 1, "i": 2, "t": {"$timestamp": {"t": 1}}', "{'t': 1}", "has a t that is a list or object"),
    ],
)
def test_values_that_are_no_ids_and_times_are_named(refuse: Refuse, fields: str, value: str, reason: str) -> None:
    content = f'{{"t": 1, {fields}}}\n'
    message = refuse({"i.json": content}, **table("i.json", timestamp="t"), on_bad_line="error")
    assert "i.json line 1" in message
    assert repr(value) in message
    assert reason in message


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ('{"a": ["b", {"c": "d"}], "n": null, "z": 1.0}', "b d 1"),
        ("[]", None),
        ("NaN", None),
        ("true", "true"),
        ("5.50", "5.5"),
        ('"half \\ud83d of it"', "half \ufffd of it"),
        ('"tab\there"', "tab\there"),
    ],
)
@pytest.mark.parametrize("form", ['{"u": 1, "i": 2, "x": %s}\n', '[{"u": 1, "i": 2, "x": %s}]'])
def test_values_of_any_type_become_texts(read: Read, value: str, text: str | None, form: str) -> None:
    assert read({"i.json": form % value}, **table("i.json", text="x")).reviews == ([] if text is None else [text])


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (b"{broken", "is not a JSON object"),
        (b"null", "is not a JSON object"),
        (b"5", "is not a JSON object"),
        (b"{'u': __import__('os').getcwd(), 'i': 1}", "is not a JSON object"),
        (b'{"u": "\xff", "i": 1}', "is not UTF-8 text"),
    ],
)
@pytest.mark.parametrize("at", [0, 3])
def test_a_bad_line_is_counted_with_its_number(read: Read, bad: bytes, reason: str, at: int) -> None:
    content = [json.dumps({**row, "x": "é"}, ensure_ascii=False).encode() for row in ROWS]
    content.insert(at, bad)
    result = read({"i.json": b"\n\n".join(content)}, **table("i.json", timestamp="t", text="x", kind="jsonl"))
    assert len(result.pairs) == 6
    assert result.lost[f"row that {reason}"][:3] == (1, "i.json", 2 * at + 1)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps(ROWS)[:-10], "line 1"),
        (json.dumps(ROWS, indent=0)[:-1], "is not JSON"),
        (json.dumps(ROWS) + " xyz", "xyz"),
        ("[\n1,\n2,\n{]", "line 4"),
        (json.dumps([ROWS]), "is not a JSON object"),
        ("[1, 2]", "is not a JSON object"),
        ("[]", "leaves no interaction"),
        ("{}", "is in no object of the file"),
        (json.dumps({"data": ROWS}), "whose fields are ['data']"),
        (json.dumps([{"user": 1, "i": 2}]), "['t', 'u', 'x'] is in no object of the file"),
        (str(ROWS), "is not JSON"),
        ('{"u": 1, "i": 2, "t": 3, "x": ' + "[" * 100_000 + "]" * 100_000 + "}", "i.json"),
    ],
)
def test_documents_that_cannot_be_read(refuse: Refuse, content: str, words: str) -> None:
    assert words in refuse({"i.json": content}, **SOURCE)


def test_a_value_that_is_nested_too_deeply_is_counted(read: Read) -> None:
    deep = json.dumps({**ROWS[0], "x": 0}).replace('"x": 0', '"x": ' + "[" * 900 + "]" * 900)
    result = read({"i.json": LINES + "\n" + deep}, **SOURCE)
    assert len(result.pairs) in (6, 7)  # the interpreter's recursion limit decides


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_the_stream_reads_values_that_are_cut_anywhere(size: int) -> None:
    values = [1, -2.5e3, 'a"b\\c\u00e9', True, None, {"k": [1, {"n": 12345}]}, [], 9]
    text = json.dumps(values)
    stream = JsonStream("x", iter([text[k : k + size] for k in range(0, len(text), size)]))
    assert list(stream.values()) == values


def test_an_error_has_the_line_also_when_the_text_comes_in_parts() -> None:
    with pytest.raises(DataError, match="x line 4"):
        list(JsonStream("x", iter(["[1,\n", '"two",\n', "3,\n", "oops]" + " " * 20])).values())


def test_a_string_that_is_never_closed_is_an_error() -> None:
    with pytest.raises(DataError, match="x line 2"):
        list(JsonStream("x", iter(['[1,\n"abc'])).values())
