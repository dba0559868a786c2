"""Ids, ratings and texts follow the same rules in all file formats."""

from __future__ import annotations

import polars as pl
import pytest

from cllm4rec_dist.corpus.values import MISSING_WORDS, clean_texts, unescape_entities
from tests.corpus.reading import Read, table


def ids(read: Read, *users: str) -> list[str]:
    """Users of a CSV file, as they are read."""
    return [user for user, _ in read({"i.csv": "u;i\n" + "".join(f"{user};1\n" for user in users)}, **table()).pairs]


@pytest.mark.parametrize("blank", [" ", "\t", "\u00a0", "\u3000", " \u2003 "])
def test_blanks_at_the_ends_of_ids_are_off(read: Read, blank: str) -> None:
    assert ids(read, "a", f"{blank}a", f"a{blank}", f"a{blank}b") == ["a", "a", "a", f"a{blank}b"]


def test_whole_numbers_of_a_float_column(read: Read) -> None:
    assert ids(read, "100.0", "7.0", "100") == ["100", "7", "100"]
    assert ids(read, "100.0", "1.5") == ["100", "1.5"]
    assert ids(read, "1.0", "v2") == ["1.0", "v2"]  # a column of texts
    assert ids(read, "100.00", "7.00") == ["100", "7"]  # a decimal column of a database


@pytest.mark.parametrize("names", [["4711.00", "4711.01"], ["4711", "4711.00"], ["1.0", "1.10"]])
def test_numbers_of_variants_stay_as_they_are(read: Read, names: list[str]) -> None:
    assert ids(read, *names) == names


@pytest.mark.parametrize("name", ["0108775015", "S1", "1e5", "12345678901234567890123", "007", "1,5", "-1"])
def test_other_ids_stay_as_they_are(read: Read, name: str) -> None:
    assert ids(read, name, "x") == [name, "x"]


def test_ids_with_and_without_zeros_in_a_column_of_texts_are_warned_of(read: Read) -> None:
    rows = "".join(f"{user},1\n" for user in ("1.0", "1", "v2", "3.0"))
    result = read({"i.csv": f"u,i\n{rows}"}, **table())
    assert "WARNING: 1 user ids are others with .0, such as '1.0' and '1'" in result.messages


def test_ids_that_a_spreadsheet_has_rounded_are_reported(read: Read) -> None:
    result = read({"i.csv": "u,i\n1.23457E+12,a\n"}, **table())
    assert result.pairs == [("1.23457E+12", "a")]
    assert "WARNING: 1 user ids look like numbers rounded by a spreadsheet" in result.messages


@pytest.mark.parametrize("word", ["", " ", *MISSING_WORDS])
def test_missing_words_are_no_ids_ratings_times_and_texts(read: Read, word: str) -> None:
    rows = f"{word},1,3,1,x\na,{word},3,1,x\na,1,{word},1,x\na,2,3,{word},x\na,3,3,1,{word}\n"
    result = read({"i.csv": "u,i,r,t,x\n" + rows}, **table(rating="r", timestamp="t", text="x"))
    assert result.pairs == [("a", "2"), ("a", "3")]
    assert result.column("timestamp") == [None, 1.0]
    assert result.reviews == ["x"]
    assert {reason: count for reason, (count, *_) in result.lost.items()} == {
        "row that has no user id": 1,
        "row that has no item id": 1,
        "row that has no rating": 1,
    }


def test_the_recipe_may_name_other_missing_words(read: Read) -> None:
    result = read({"i.csv": "u,i\nNA,1\n?,2\n,3\n"}, **table(), missing=["?"])
    assert result.pairs == [("NA", "1")]


@pytest.mark.parametrize(
    ("text", "decimal", "rating"),
    [("4", ".", 4.0), (" +3 ", ".", 3.0), ("1e0", ".", 1.0), ("-1", ".", -1.0), ("4,5", ",", 4.5), ("4.5", ",", 4.5)],
)
def test_ratings(read: Read, text: str, decimal: str, rating: float) -> None:
    result = read({"i.csv": f"u;i;r\na;1;{text}\n"}, **table(rating="r", decimal=decimal))
    assert result.column("rating") == [rating]


@pytest.mark.parametrize("text", ["5/5", "inf", "0x5", "1_000", "4,5", "four"])
def test_a_rating_that_is_no_number_is_counted_with_its_value(read: Read, text: str) -> None:
    result = read({"i.csv": f"u;i;r\na;1;4\na;2;{text}\n"}, **table(rating="r"))
    assert result.pairs == [("a", "1")]
    assert result.lost == {"row that has a rating that is not a number": (1, "i.csv", 3, f"a, 2, {text}")}


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Tom &amp; Jerry", "Tom & Jerry"),
        ("5 &lt; 6 &#34;q&#x22; &hearts;", '5 < 6 "q" ♥'),
        ("AT&T R&D ?a=1&region=2&copy=3", "AT&T R&D ?a=1&region=2&copy=3"),
        ("&notanentity;", "&notanentity;"),
    ],
)
def test_entities_become_letters_and_all_else_stays(text: str, clean: str) -> None:
    assert unescape_entities(pl.Series([text, None])).to_list() == [clean, None]


def test_texts_are_cleaned_in_one_way() -> None:
    texts = pl.Series(["  a \n b ", "&nbsp;", "None", None, "x"])
    assert clean_texts(texts, MISSING_WORDS).to_list() == ["a \n b", None, None, None, "x"]
    assert clean_texts(texts, MISSING_WORDS, one_line=True).to_list() == ["a b", None, None, None, "x"]
