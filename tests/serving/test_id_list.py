"""Files of ids: blanks, repeats and encodings of the programs that write them."""

from __future__ import annotations

import codecs
from pathlib import Path

import pytest

from cllm4rec_dist.errors import DataError
from cllm4rec_dist.serving.id_list import read_ids


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", []),
        (b"\n \n\t\r\n", []),
        (b"u1\nu2\n", ["u1", "u2"]),
        (b"  u1 \t\r\nu2\r\n\r\nu1", ["u1", "u2"]),
        (b"u1\ru2\r", ["u1", "u2"]),
        (codecs.BOM_UTF8 + b"u1\nu2", ["u1", "u2"]),
        (codecs.BOM_UTF16_LE + "u1\r\nü 2\r\n".encode("utf-16-le"), ["u1", "ü 2"]),
        (codecs.BOM_UTF16_BE + "u1\n".encode("utf-16-be"), ["u1"]),
        ("a\u2028b\x0bc\n".encode(), ["a\u2028b\x0bc"]),
    ],
)
def test_ids_are_distinct_lines_without_blanks_around_them(tmp_path: Path, content: bytes, expected: list[str]) -> None:
    path = tmp_path / "users.txt"
    path.write_bytes(content)
    assert read_ids(path, "--users-file") == expected


def test_what_is_no_list_is_one_clear_message(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"nothing\.txt.*cannot be read"):
        read_ids(tmp_path / "nothing.txt", "--users-file")
    with pytest.raises(DataError, match="cannot be read"):
        read_ids(tmp_path, "--users-file")
    (tmp_path / "latin.txt").write_bytes("Zoë\n".encode("latin-1"))
    with pytest.raises(DataError, match="is not UTF-8 text"):
        read_ids(tmp_path / "latin.txt", "--users-file")
