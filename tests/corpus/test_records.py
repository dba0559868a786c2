"""Delimited text: quotes, escapes, line ends and field counts; no row is ever lost in silence."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.sources import encoding
from cllm4rec_dist.corpus.sources.delimited import read_delimited
from cllm4rec_dist.corpus.sources.files import RawFile
from cllm4rec_dist.corpus.sources.records import Dialect, LineReader
from cllm4rec_dist.errors import DataError
from tests.corpus.reading import Read, Refuse, table

ROWS = [f"u{k % 4},i{k % 5},{1600000000 + k},text {k}" for k in range(20)]
HEADER = "u,i,t,x"
TEXTS = {"timestamp": "t", "text": "x"}

Parsed = tuple[list[tuple[Any, ...]], dict[str, tuple[int, int | None]]] | str


def lines(*extra: str, header: str = HEADER, end: str = "\n") -> str:
    """Twenty rows; `extra` are lines from line 7 on."""
    return end.join([header, *ROWS[:5], *extra, *ROWS[5:], ""])


def parse(path: Path, content: bytes, dialect: Dialect, block_bytes: int = 1 << 24) -> Parsed:
    """Line numbers and fields of a file of columns a and b and what was lost, or the message of its refusal."""
    path.write_bytes(content)
    log = SkipLog()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BLOCK_BYTES", block_bytes)
        try:
            batches = list(read_delimited(RawFile(str(path)), ("a", "b"), dialect, log, ("a",)))
        except DataError as error:
            return str(error)
    empty = pl.DataFrame(schema={"a": pl.String, "b": pl.String})
    columns = pl.concat([empty, *(batch.columns for batch in batches)])
    numbers = [line for batch in batches for line in batch.lines.tolist()]
    rows = [
        (number, *(field or None for field in row)) for number, row in zip(numbers, columns.iter_rows(), strict=True)
    ]
    return rows, {reason: (skip.count, skip.line) for reason, skip in log.skipped.items()}


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("records") / "x.csv"


FIELD = st.text(alphabet='a"\n,x ;é', max_size=6)


@given(rows=st.lists(st.tuples(FIELD, FIELD), max_size=8), end=st.sampled_from(["\n", "\r\n"]))
@settings(max_examples=60, deadline=None)
def test_what_the_csv_module_writes_is_read_back(path: Path, rows: list[tuple[str, str]], end: str) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator=end)
    writer.writerow(["a", "b"])
    writer.writerows(rows)
    dialect = Dialect(",", "double", None, "utf-8")
    result = parse(path, text.getvalue().encode(), dialect)
    assert not isinstance(result, str)
    assert [row[1:] for row in result[0]] == [
        tuple(field or None for field in row) for row in rows if row != ("a", "b")
    ]


MESSY = st.text(alphabet='a "\n,\\1é\r', max_size=60)
QUOTING = st.sampled_from(["auto", "double", "none"])
ESCAPE = st.sampled_from([None, "\\"])


@pytest.mark.slow
@given(body=MESSY, quoting=QUOTING, escape=ESCAPE)
@settings(max_examples=100, deadline=None)
def test_blocks_of_any_size_give_the_same_rows(path: Path, body: str, quoting: Any, escape: str | None) -> None:
    dialect = Dialect(",", quoting, escape, "utf-8")
    content = f"a,b\n1,2\n{body}".encode()
    whole = parse(path, content, dialect)
    assert parse(path, content, dialect, 5) == whole
    assert parse(path, content, dialect, 11) == whole


@pytest.mark.parametrize("quoting", ["auto", "double", "none"])
@pytest.mark.parametrize("block_bytes", range(3, 24))
def test_an_escaped_line_end_may_end_a_block(path: Path, quoting: Any, block_bytes: int) -> None:
    dialect = Dialect(",", quoting, "\\", "utf-8")
    rows, lost = parse(path, b"a,b\n1,x\\\ny\\\nz\n2,w\n", dialect, block_bytes)
    assert rows == [(2, "1", "x\ny\nz"), (5, "2", "w")]
    assert not lost


@given(body=MESSY.filter(lambda text: "\r" not in text), quoting=QUOTING, escape=ESCAPE)
@settings(max_examples=100, deadline=None)
def test_plain_lines_are_read_as_the_line_reader_would(path: Path, body: str, quoting: Any, escape: str | None) -> None:
    def every_line(reader: LineReader, text: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        return np.array([bool(text[a:b].tobytes().strip()) for a, b in zip(starts, ends, strict=True)], bool)

    dialect = Dialect(",", quoting, escape, "utf-8")
    content = f"a,b\n1,2\n{body}".encode()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LineReader, "is_special", every_line)
        one_by_one = parse(path, content, dialect)
    assert parse(path, content, dialect) == one_by_one


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("mark", ["", '"'])
def test_line_ends_of_all_systems(read: Read, end: str, mark: str) -> None:
    quoted = lines(end=end).replace("text", f"{mark}text").replace(end, mark + end) if mark else lines(end=end)
    result = read({"i.csv": quoted.replace(f"x{mark}", "x", 1)}, **table(**TEXTS))
    assert result.reviews == [f"text {k}" for k in range(20)]
    assert not result.lost


@pytest.mark.parametrize(
    ("line", "options", "review"),
    [
        ('u1,i1,1600000000,"a, ""b"" c"', {}, 'a, "b" c'),
        ('u1,i1,1600000000,5" pipe', {}, '5" pipe'),
        ('u1,i1,1600000000,"hello', {}, '"hello'),
        ('u1,i1,1600000000,"so" he said', {}, '"so" he said'),
        ('u1,i1,1600000000,"C:\\"', {}, "C:\\"),
        ('u1,i1,1600000000,"two\n\nlines, and more"', {}, "two\n\nlines, and more"),
        ('u1,i1,1600000000,"two\na,b,3,d\nrows"', {"quoting": "double"}, "two\na,b,3,d\nrows"),
        ('u1,i1,1600000000,"quoted"', {"quoting": "none"}, '"quoted"'),
        ('u1,i1,1600000000,"he said \\"hi\\", ok"', {"escape": "\\"}, 'he said "hi", ok'),
        ('u1,i1,1600000000,"he said ""hi"", ok"', {"escape": '"'}, 'he said "hi", ok'),
        ('"u1", "i1", "1600000000", "a, ""b"""', {}, 'a, "b"'),
        ('"u1" ,"i1" ,"1600000000" , "a" ', {}, "a"),
        ('u1,i1,1600000000, "a" and "b"', {}, '"a" and "b"'),
        ('u1,i1,1600000000, "a', {}, '"a'),
        ("u1,i1,1600000000,a\\,b", {"escape": "\\"}, "a,b"),
        ("u1,i1,1600000000,a\\\nb", {"escape": "\\", "quoting": "none"}, "a\nb"),
        ("u1,i1,1600000000,a\\\nb", {"escape": "\\"}, "a\nb"),
        ('u1,i1,1600000000,"' + "long, " * 50_000 + 'end"', {}, "long, " * 50_000 + "end"),
        ("u1,i1,1600000000,a\u2028b\x0cc\x85d", {}, "a\u2028b\x0cc\x85d"),
    ],
)
def test_one_odd_line_among_plain_ones(read: Read, line: str, options: dict[str, Any], review: str) -> None:
    result = read({"i.csv": lines(line)}, **table(**TEXTS, **options))
    assert result.reviews == [*(f"text {k}" for k in range(5)), review, *(f"text {k}" for k in range(5, 20))]
    assert not result.lost


@pytest.mark.parametrize(
    ("line", "options", "message"),
    [
        ('u1,i1,1600000000,"a\nu2,i2,1600000001,b\nc"', {}, "i.csv line 7:.*continues for 2 lines.*look like rows"),
        ('u1,i1,1600000000,"never closed', {"quoting": "double"}, "i.csv line 7:.*never closed"),
        ('u1,i1,1600000000,"he said \\"hi\\", ok"', {}, "i.csv line 7:.*escape: "),
    ],
)
def test_quotes_whose_meaning_cannot_be_told_are_refused(
    refuse: Refuse, line: str, options: dict[str, Any], message: str
) -> None:
    assert re.search(message, refuse({"i.csv": lines(line)}, **table(**TEXTS, **options)))


@pytest.mark.parametrize(
    ("line", "options", "reason"),
    [
        ("u1,i1,1600000000,a,b", {}, "has 5 fields instead of 4"),
        ("u1", {}, "has 1 field instead of 4"),
        ('u1,i1,1600000000, "a, b"', {"quoting": "double"}, "has 5 fields instead of 4"),
        ('u1,i1,1600000000,"a"b', {"quoting": "double"}, "has quotes that are not doubled"),
    ],
)
def test_a_line_that_is_no_row_is_counted_with_its_line(
    read: Read, line: str, options: dict[str, Any], reason: str
) -> None:
    text = 'u1,i1,1600000000,"two\nlines"'
    result = read({"i.csv": lines(text, "", line)}, **table(**TEXTS, **options))
    assert len(result.pairs) == 21
    assert result.lost == {f"row that {reason}": (1, "i.csv", 10, line)}
    assert f"The first is line 10: {line!r} {reason}" in result.messages


def test_the_first_lost_line_is_reported_whichever_way_it_was_read(read: Read) -> None:
    result = read({"i.csv": lines("u1", 'u2"')}, **table(**TEXTS))
    assert result.lost == {"row that has 1 field instead of 4": (2, "i.csv", 7, "u1")}


@pytest.mark.parametrize("header", ['"u","i","t","x"', '"u", "i", "t" ,"x"', "\ufeffu,i,t,x", "\n\n u , i,t,x"])
def test_headers_with_quotes_marks_and_blank_lines(read: Read, header: str) -> None:
    assert len(read({"i.csv": lines(header=header)}, **table(**TEXTS)).reviews) == 20


def test_a_name_in_the_header_may_run_over_lines(read: Read) -> None:
    content = lines(header='"u","i","t","long\nname"')
    result = read({"i.csv": content}, **table(timestamp="t", text="long\nname"))
    assert len(result.reviews) == 20
    assert not result.lost


def test_a_repeated_header_is_left_out_and_counted(read: Read) -> None:
    result = read({"i.csv": lines(HEADER, '"u","i","t","x"')}, **table(**TEXTS))
    assert len(result.pairs) == 20
    assert result.lost == {"repeated header": (2, "i.csv", 7, "u, i, t, x")}


def test_files_with_byte_order_marks_may_be_joined(read: Read) -> None:
    part = "\ufeffu,i\n" + "".join(f"u{n},i{n}\n" for n in range(5))
    result = read({"i.csv": part + part}, **table())
    assert len(result.pairs) == 10
    assert result.lost == {"repeated header": (1, "i.csv", 7, "u, i")}


def test_a_header_that_does_not_decode_costs_no_row(read: Read) -> None:
    content = b"u,i,\xff\n" + "u1,i1,é\n".encode() * 5
    assert len(read({"i.csv": content}, **table()).pairs) == 5


def test_blank_lines_of_a_single_column_are_no_rows(read: Read) -> None:
    result = read({"h/u=a/part-0.csv": 'i\n1\n\n"2"\n   \n'}, **table("h"))
    assert result.pairs == [("a", "1"), ("a", "2")]
    assert not result.lost


@pytest.mark.parametrize(
    ("content", "options", "pairs"),
    [
        ("u\ti\na\tb,c\n", {}, [("a", "b,c")]),
        ("u;i\na;b\n", {}, [("a", "b")]),
        ("u|i\na|b\n", {}, [("a", "b")]),
        ("u||i\na||b|c\n", {"separator": "||"}, [("a", "b|c")]),
        ("u::i\na::b:c\n", {"separator": "::"}, [("a", "b:c")]),
        ("u\x01i\na\x01b\n", {"separator": "\x01"}, [("a", "b")]),
        ("u¦i\na¦b\n", {"separator": "¦"}, [("a", "b")]),
        ("1,2\n3,4\n", {"names": ["u", "i"]}, [("1", "2"), ("3", "4")]),
    ],
)
def test_separators(read: Read, content: str, options: dict[str, Any], pairs: list[tuple[str, str]]) -> None:
    assert read({"i.csv": content}, **table(**options)).pairs == pairs


@pytest.mark.parametrize(
    ("content", "options", "words"),
    [
        ("u^i\na^b\n", {}, ["'u' is not among its columns", "separator"]),
        ("u,i,i\n1,2,3\n", {}, ["'i' is the name of two columns"]),
        ("u,item\n1,2\n", {}, ["'i' is not among its columns"]),
        ("u,i,\n1,2\n3,4\n", {}, ["line 2", "2 fields instead of 3", "max_lost"]),
        ("", {}, ["leaves no interaction"]),
        ("u,i\n", {}, ["leaves no interaction"]),
        ("u,i\na,b\x00c\n", {}, ["neither text nor Parquet"]),
        ("1,2,3\n4,5,6\n", {"names": ["u", "i"]}, ["line 1", "3 fields instead of 2"]),
    ],
)
def test_files_that_cannot_be_read(refuse: Refuse, content: str, options: dict[str, Any], words: list[str]) -> None:
    message = refuse({"i.csv": content}, **table(**options))
    assert all(word in message for word in words), message


def test_a_stray_mark_swallows_nothing(read: Read) -> None:
    rows = [f"{k % 50}\t{k % 40}\t{1600000000 + k}\ttext {k}" for k in range(500)]
    rows[20] = '0\t0\t1600000020\t"so it begins'
    result = read({"i.csv": "\n".join(["u\ti\tt\tx", *rows])}, **table(**TEXTS))
    assert len(result.pairs) == 500
    assert "(1 lines, the first is line 22)" in result.messages


@pytest.mark.parametrize("where", ["u1", "u1,i1,x"])
def test_on_bad_line_error_stops_with_the_line(refuse: Refuse, where: str) -> None:
    message = refuse({"i.csv": f"u,i\na,b\n\n{where}\n"}, **table(), on_bad_line="error")
    assert message.startswith("i.csv line 4:")


@pytest.mark.parametrize("first", ["sep=;", '"sep=;"', "SEP=;", "\ufeffsep=;", "sep=;;", "sep=;\r"])
@pytest.mark.parametrize("columns", ["u;i", "u;i;t"])
def test_a_first_line_that_names_the_separator_is_read_over(read: Read, first: str, columns: str) -> None:
    rows = "".join(f"{';'.join(row.split(',')[: columns.count(';') + 1])}\n" for row in ROWS)
    result = read({"i.csv": f"{first}\n{columns}\n{rows}"}, **table())
    assert result.pairs == [tuple(row.split(",")[:2]) for row in ROWS]
    assert not result.lost
    assert result.raw.origins.find(0) == {"file": "i.csv", "line": 3}


def test_the_named_separator_counts_where_the_recipe_names_none(read: Read) -> None:
    content = "sep=|\nu,x|i\na,b|1\nc,d|2\n"
    source = {"format": "table", "interactions": {"path": "i.csv", "user": "u,x", "item": "i"}}
    assert read({"i.csv": content}, **source).pairs == [("a,b", "1"), ("c,d", "2")]
