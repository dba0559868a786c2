"""Which files a path means, and what is inside of them whatever their names say."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import os
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.corpus.reading import Content, Read, Refuse, table

CSV = b"u,i\na,1\nb,2\n"
SWAPPED = b"i,u\n3,a\n"


def zst(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return bytes(sink.getvalue().to_pybytes())


def zipped(*members: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        for member in members:
            archive.writestr(member, CSV)
    return sink.getvalue()


def parquet(**columns: Any) -> bytes:
    sink = io.BytesIO()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue()


def tar(mode: Any) -> bytes:
    sink = io.BytesIO()
    with tarfile.open(fileobj=sink, mode=mode) as archive:
        member = tarfile.TarInfo("i.csv")
        member.size = len(CSV)
        archive.addfile(member, io.BytesIO(CSV))
    return sink.getvalue()


@pytest.mark.parametrize("suffix", ["gz", "bz2", "xz", "zst", "zip", "csv"])
@pytest.mark.parametrize(
    ("kind", "pack"),
    [
        ("gz", gzip.compress),
        ("bz2", bz2.compress),
        ("xz", lzma.compress),
        ("zst", zst),
        ("zip", lambda _: zipped("i.csv")),
        ("csv", bytes),
    ],
)
def test_compression_is_known_by_the_first_bytes(
    read: Read, suffix: str, kind: str, pack: Callable[[bytes], bytes]
) -> None:
    name = f"i.{suffix}"
    result = read({name: pack(CSV)}, **table(name))
    assert result.pairs == [("a", "1"), ("b", "2")]
    assert result.messages.count("its first bytes mean") == (suffix != kind)


@pytest.mark.parametrize(("flags", "method", "reason"), [(1, 0, "encrypted"), (0, 9, "compression")])
def test_a_zip_archive_that_python_cannot_unpack_is_refused(
    refuse: Refuse, flags: int, method: int, reason: str
) -> None:
    content = bytearray(zipped("i.csv"))
    for mark, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = content.index(mark) + offset
        content[place] |= flags
        content[place + 2] = method
    message = refuse({"i.zip": bytes(content)}, **table("i.zip"))
    assert reason in message
    assert "Unpack it and give the file" in message


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, zst])
def test_joined_streams_are_read_to_the_end(read: Read, pack: Callable[[bytes], bytes]) -> None:
    assert len(read({"i": pack(CSV) + pack(b"c,3\n")}, **table("i")).pairs) == 3


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zst])
@pytest.mark.parametrize("cut", [-1, -12])
def test_a_file_that_was_cut_off_is_refused(refuse: Refuse, pack: Callable[[bytes], bytes], cut: int) -> None:
    content = pack(CSV * 500)[:cut]
    message = refuse({"i": content}, **table("i"))
    assert message.startswith("file: 'i' cannot be read")


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_damaged_file_is_refused(refuse: Refuse, pack: Callable[[bytes], bytes]) -> None:
    content = bytearray(pack(b"u,i\n" + bytes(f"{'a' * 40},1\n" * 50, "ascii")))
    content[len(content) // 2] ^= 0xFF
    assert "Download the file again" in refuse({"i": bytes(content)}, **table("i"))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (zipped("a.csv", "b.csv"), "a zip archive of 2 files"),
        (zipped(), "a zip archive of 0 files"),
        (zipped("a.csv")[:-30], "cannot be read"),
        (zipped("xl/workbook.xml"), "is an Excel workbook. Save its sheet as CSV"),
        (zipped("mimetype", "content.xml"), "is an OpenDocument file. Save its sheet as CSV"),
        (b"%PDF-1.7 u,i", "is a PDF document"),
        (b'\xef\xbb\xbf<?xml version="1.0"?><u/>', "is an XML file"),
        (b"\n<!DOCTYPE HTML><p>Please log in", "is an HTML page"),
        (tar("w"), "is a tar archive"),
        (tar("w:gz"), "is a tar archive"),
        (b"ORC\x00\x01", "is an ORC file"),
        (gzip.compress(b"SQLite format 3\x00"), "is an SQLite database"),
        (gzip.compress(b""), "leaves no interaction"),
        (b"", "leaves no interaction"),
        (parquet(u=["a"], i=["b"])[:-10], "is not Parquet"),
    ],
    ids=[
        "zip of two",
        "empty zip",
        "cut zip",
        "Excel",
        "OpenDocument",
        "PDF",
        "XML",
        "HTML",
        "tar",
        "tar.gz",
        "ORC",
        "SQLite.gz",
        "empty.gz",
        "empty",
        "cut Parquet",
    ],
)
def test_what_cannot_be_read_is_named(refuse: Refuse, content: bytes, words: str) -> None:
    assert words in refuse({"i": content}, **table("i"))


@pytest.mark.parametrize("header", ["ORCID", "ARROW1"])
def test_a_header_that_begins_like_a_binary_file_is_text(read: Read, header: str) -> None:
    result = read({"i.csv": f"{header},i\na,1\n"}, **table("i.csv", user=header))
    assert result.pairs == [("a", "1")]


def test_a_zstandard_file_may_begin_with_a_frame_to_skip(read: Read) -> None:
    skipped = b"\x50\x2a\x4d\x18\x04\x00\x00\x00size"  # as pzstd writes
    assert read({"i.zst": skipped + zst(CSV) + skipped + zst(b"c,3\n")}, **table("i.zst")).pairs == [
        ("a", "1"),
        ("b", "2"),
        ("c", "3"),
    ]


def test_a_zip_archive_may_hold_hidden_files_beside_the_one(read: Read) -> None:
    assert len(read({"i.zip": zipped("a.csv", "__MACOSX/._a.csv")}, **table("i.zip")).pairs) == 2


@pytest.mark.parametrize("pack", [gzip.compress, zst])
def test_compressed_parquet(read: Read, pack: Callable[[bytes], bytes]) -> None:
    assert read({"i.parquet": pack(parquet(u=["a"], i=["b"]))}, **table("i.parquet")).pairs == [("a", "b")]


@pytest.mark.parametrize(
    ("files", "path", "pairs"),
    [
        ({"a.csv": CSV, "b.csv": SWAPPED}, ["a.csv", "b.csv"], 3),
        ({"p-2.csv": SWAPPED, "p-1.csv.gz": gzip.compress(CSV), "p-3.csv": ""}, "p-*", 3),
        ({"x/p-1.csv": CSV, "x/y/p-2.csv": SWAPPED}, "x/**/*.csv", 3),
        ({"o/part-0": CSV, "o/part-1.csv": SWAPPED, "o/_SUCCESS": "", "o/.part-0.crc": "x", "o/part-2": ""}, "o", 3),
        ({"data[1].csv": CSV}, "data[1].csv", 2),
        ({"a.csv": CSV}, ["a.csv", "*.csv"], 2),
    ],
)
def test_several_files(read: Read, files: dict[str, Content], path: Any, pairs: int) -> None:
    result = read(files, **table(path))
    assert result.pairs == [("a", "1"), ("b", "2"), ("a", "3")][:pairs]


def test_a_file_that_is_named_twice_is_read_once_and_reported(read: Read) -> None:
    assert "a.csv is named more than once" in read({"a.csv": CSV}, **table(["a.csv", "a.csv"])).messages


def test_parts_of_spark_may_lack_a_header(read: Read) -> None:
    files: dict[str, Content] = {"o/part-0": "a,1\n", "o/part-1": "b,2\n"}
    assert read(files, **table("o", names=["u", "i"])).pairs == [("a", "1"), ("b", "2")]


@pytest.mark.parametrize(
    ("files", "pairs"),
    [
        ({"h/u=a/p.csv": "i,t\n1,9\n", "h/u=b%20c/p.csv": "t,i\n9,2\n"}, [("a", "1"), ("b c", "2")]),
        ({"h/u=a/p": parquet(i=[1]), "h/u=b/p": parquet(i=[2.0])}, [("a", "1"), ("b", "2")]),
        ({"h/u=a/i=1/p": parquet(z=[1, 2])}, [("a", "1"), ("a", "1")]),
        ({"h/u=a/i=1/p.csv": "z\n1\n2\n"}, [("a", "1"), ("a", "1")]),
        ({"h/u=a/p.json": '{"i": 1}\n'}, [("a", "1")]),
    ],
)
def test_columns_that_folders_name(read: Read, files: dict[str, Content], pairs: list[tuple[str, str]]) -> None:
    assert read(files, **table("h")).pairs == pairs


@pytest.mark.parametrize("path", ["h/u=*", "h/u=*/p.csv", "h/u=[ab]*/*.csv", "h/**/*.csv"])
def test_columns_that_the_folders_of_a_pattern_name(read: Read, path: str) -> None:
    files: dict[str, Content] = {"h/u=a/p.csv": "i,t\n1,9\n", "h/u=b%20c/p.csv": "t,i\n9,2\n"}
    assert read(files, **table(path)).pairs == [("a", "1"), ("b c", "2")]


def test_a_folder_whose_name_looks_like_a_pattern(read: Read) -> None:
    assert read({"p[1]/a.csv": CSV, "p1/b.csv": SWAPPED}, **table("p[1]")).pairs == [("a", "1"), ("b", "2")]


def test_a_pipe_is_no_file(refuse: Refuse, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "is neither a file nor a folder" in refuse({}, **table(str(tmp_path / "pipe")))


def test_a_null_of_hive_is_a_missing_id(read: Read) -> None:
    files: dict[str, Content] = {"h/u=a/p.csv": "i\n1\n", "h/u=__HIVE_DEFAULT_PARTITION__/p.csv": "i\n9\n"}
    result = read(files, **table("h"))
    assert result.pairs == [("a", "1")]
    assert result.lost["row that has no user id"][0] == 1


@pytest.mark.parametrize(
    ("files", "path", "words"),
    [
        ({}, "no.csv", "'no.csv' does not exist"),
        ({"a.csv": CSV}, "q-*", "'q-*' matches no file"),
        ({"o/_SUCCESS": ""}, "o", "is a folder without files"),
        ({"o/a.csv": CSV, "o/b.csv": "u\nx\n"}, "o", "'i' is not among its columns"),
    ],
)
def test_paths_that_mean_nothing(refuse: Refuse, files: dict[str, Content], path: str, words: str) -> None:
    assert words in refuse(files, **table(path))
