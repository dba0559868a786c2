"""Text of any encoding becomes right UTF-8, or the file is refused; never mojibake, never lost rows."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cllm4rec_dist.corpus.sources import encoding
from tests.corpus.reading import Read, Refuse, table

WESTERN = "Café Olé naïve"
TEXTS = {
    "western": WESTERN,
    "quotes": "Café “x” – €5",
    "russian": "Хорошая книга о войне и мире",
    "japanese": "これはとても良い本です。おすすめします",
    "chinese": "这是一本很好的书我喜欢它",
    "polish": "Zażółć gęślą jaźń świetna książka",
    "turkish": "Çok güzel bir kitap şiddetle öneririm",
}
WITH_TEXT = table(text="x")


def rows(text: str) -> str:
    return "u,i,x\n" + "".join(f"u{k % 4},i{k % 5},{text} {k}\n" for k in range(30))


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("western", "latin-1"),
        ("western", "mac_roman"),
        ("quotes", "cp1252"),
        ("russian", "cp1251"),
        ("russian", "koi8-r"),
        ("japanese", "shift_jis"),
        ("japanese", "euc_jp"),
        ("chinese", "gbk"),
        ("polish", "cp1250"),
        ("polish", "iso8859-2"),
        ("turkish", "cp1254"),
        ("western", "utf-16-be"),
        ("japanese", "utf-32"),
    ],
)
def test_the_recipe_names_the_encoding(read: Read, text: str, name: str) -> None:
    result = read({"i.csv": rows(TEXTS[text]).encode(name)}, **table(text="x", encoding=name))
    assert result.reviews == [f"{TEXTS[text]} {k}" for k in range(30)]


def test_a_refusal_shows_the_line_and_no_bytes(refuse: Refuse) -> None:
    message = refuse({"i.csv": rows("Žluťoučký kůň").encode("cp1250")}, **WITH_TEXT)
    assert "is the line read as cp1252" in message
    assert "u0,i0,Žluouèký kùò 0" in message.replace("�", "")
    assert "b'" not in message


def test_a_damaged_line_is_shown_without_bytes(read: Read) -> None:
    content = rows(WESTERN).encode().replace(f"{WESTERN} 7".encode(), b"Caf\xe9")
    (lost,) = read({"i.csv": content}, **WITH_TEXT).lost.values()
    assert lost[3] == "u3,i2,Caf\\xe9"


@pytest.mark.parametrize("name", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-le", "utf-16-be"])
def test_unicode_is_recognised(read: Read, name: str) -> None:
    result = read({"i.csv": rows(WESTERN).encode(name)}, **WITH_TEXT)
    assert result.reviews == [f"{WESTERN} {k}" for k in range(30)]


@pytest.mark.parametrize(
    ("text", "name"), [("western", "latin-1"), ("quotes", "cp1252"), ("russian", "cp1251"), ("turkish", "cp1254")]
)
def test_a_legacy_encoding_is_reported_once_or_refused(read: Read, text: str, name: str) -> None:
    result = read({"i.csv": rows(TEXTS[text]).encode(name)}, **WITH_TEXT)
    assert result.reviews == [f"{TEXTS[text]} {k}" for k in range(30)]
    assert result.messages.count("is not UTF-8 (30 lines)") == 1
    assert f"line 2 as 'u0,i0,{TEXTS[text]} 0'" in result.messages


@pytest.mark.parametrize(("text", "name"), [("polish", "cp1250"), ("japanese", "shift_jis"), ("western", "cp437")])
def test_an_encoding_that_cannot_be_told_is_refused(refuse: Refuse, text: str, name: str) -> None:
    message = refuse({"i.csv": rows(TEXTS[text]).encode(name)}, **WITH_TEXT)
    assert "i.csv line 2" in message
    assert "encoding: cp1252" in message


def test_a_damaged_line_among_utf8_is_counted(read: Read) -> None:
    content = rows(WESTERN).encode() + b"u1,i1,caf\xe9\n"
    result = read({"i.csv": content}, **WITH_TEXT)
    assert len(result.reviews) == 30
    assert result.lost["row that is not UTF-8 text"][:3] == (1, "i.csv", 32)


@pytest.mark.parametrize("name", ["klingon", "rot13", "hex", "undefined"])
def test_a_codec_that_is_no_encoding_is_refused(refuse: Refuse, name: str) -> None:
    assert "is not an encoding" in refuse({"i.csv": "u,i\na,b\n"}, **table(encoding=name))


@pytest.mark.parametrize("name", ["utf-16", "ascii"])
def test_an_encoding_that_does_not_fit_is_refused(refuse: Refuse, name: str) -> None:
    assert "does not fit the file" in refuse({"i.csv": "u,i\na,é\n"}, **table(encoding=name))


@given(
    text=st.text(alphabet="aé日\r\n", max_size=40),
    name=st.sampled_from(["utf-8", "utf-16", "utf-16-le", "utf-8-sig"]),
    size=st.integers(3, 9),
)
@settings(max_examples=200, deadline=None)
def test_letters_and_line_ends_may_straddle_blocks(
    tmp_path_factory: pytest.TempPathFactory, text: str, name: str, size: int
) -> None:
    path = tmp_path_factory.getbasetemp() / "blocks.txt"
    path.write_bytes(text.encode(name))
    whole = b"".join(encoding.utf8_blocks(str(path), name))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoding, "BLOCK_BYTES", size)
        blocks = list(encoding.utf8_blocks(str(path), name))
    assert b"".join(blocks) == whole
    assert all(block.endswith(b"\n") for block in blocks[:-1])


def test_a_carriage_return_within_a_text_stays(tmp_path: Path) -> None:
    path = tmp_path / "x.txt"
    path.write_bytes(b"a\rb\r\nc\n")
    assert b"".join(encoding.utf8_blocks(str(path))) == b"a\rb\nc\n"
