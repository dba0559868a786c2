"""Search by words of the title."""

from __future__ import annotations

import numpy as np
import pytest

from cllm4rec_dist.serving.item_catalog import ItemCatalog

TITLES = [
    "Café crème, 250 g",  # 0
    "Coffee maker",  # 1
    "Coffee-Filter No. 4",  # 2
    "Filter coffee maker",  # 3
    "STRASSE",  # 4
    "Die Straße",  # 5
    "東京の地図",  # 6
    "",  # 7
    "two\nlines of coffee",  # 8
    "Coff",  # 9
]
CATALOG = ItemCatalog(
    [f"id-{row}" for row in range(len(TITLES))], TITLES, None, np.array([0, 1, 2, 3, 0, 1, 0, 0, 9, 0])
)


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("coffee", [8, 3, 2, 1]),
        ("coffee maker", [3, 1]),
        ("maker coffee", [3, 1]),
        ("coffee mak", [3, 1]),
        ("mak coffee", []),  # the last word alone may be unfinished
        ("coff", [9, 8, 3, 2, 1]),  # the whole word before the popular ones
        ("CAFE CREME", [0]),
        ("cafe\u0301", [0]),
        ("straße", [5, 4]),
        ("地図", [6]),
        ("地球", []),
        ("250", [0]),
        ("id-7", [7]),
        (" id-7 ", [7]),
        ("", []),
        ("  ?! ", []),
        ("lines", [8]),
        ("nothing", []),
        ('"coffee" AND (maker', []),
    ],
)
def test_items_are_found_by_words_of_their_titles(query: str, expected: list[int]) -> None:
    assert CATALOG.search(query) == expected


@pytest.mark.parametrize(
    ("title", "queries"),
    [
        ("Œuvres complètes", ["oeuvres", "ŒUVRES", "oeu"]),
        ("Bücher über Ærø", ["aero", "ærø", "bucher"]),
        ("Smørrebrød", ["smorrebrod", "smørre", "SMØR"]),
        ("Łódź", ["lodz", "łódź", "Ło"]),
        ("Straße", ["strasse", "STRASSE", "straße"]),
        ("Þórr, ðe ıslak đak", ["thorr", "de", "islak", "dak", "þórr"]),
        ("CŒUR", ["coeur", "cœ"]),
        ("Oeuf", ["œuf"]),
        ("Schöpfkelle für Öl", ["schoepfkelle", "SCHOEPF", "schopfkelle oel", "Schöpfkelle fuer ol", "o\u0308l"]),
        ("Scho\u0308pfkelle", ["schoepfkelle", "schöpf"]),
        ("Grødbolle på smør", ["groedbolle", "paa", "grodbolle smoer", "på"]),
    ],
)
def test_letters_that_have_no_accent_to_drop_are_spelt_out(title: str, queries: list[str]) -> None:
    catalog = ItemCatalog(["1", "2"], [title, "other"], None, np.array([0, 0]))
    assert {query: catalog.search(query) for query in queries} == {query: [0] for query in queries}


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("LIV/003-7", [1, 4]),  # the id itself before more popular ones that begin with it
        ("LIV/003", [2, 4, 1]),
        ("liv/003-", [4, 1]),
        ("LIV/", [4, 1, 2, 3, 0]),
        ("LIV/003-70", [4]),
        ("liv", [0, 4, 1, 2, 3]),  # a title's word before beginnings of ids
        ("LIV/9", []),
        ("/003", []),
        ("sku_", [5]),
        ("œ:", [6]),
    ],
)
def test_items_are_found_by_the_beginning_of_their_id(query: str, expected: list[int]) -> None:
    ids = ["x", "LIV/003-7", "LIV/003", "LIV/1", "LIV/003-70", "SKU_1", "Œ:1"]
    catalog = ItemCatalog(ids, ["Liv", *[""] * 6], None, np.array([0, 1, 1, 0, 9, 0, 0]))
    assert catalog.search(query) == expected


def test_titles_do_not_crowd_out_an_id_with_punctuation() -> None:
    ids = ["a", "b", "rose-soap"]
    catalog = ItemCatalog(ids, ["Rose soap", "Rose soap", "Brush"], None, np.array([2, 1, 0]))
    assert catalog.search("rose-so", limit=2) == [2, 0]


def test_no_more_are_found_than_asked_for() -> None:
    assert CATALOG.search("coffee", limit=2) == [8, 3]
    named = ItemCatalog(["coffee", "b"], ["tea", "coffee"], None, np.array([0, 0]))
    assert named.search("coffee") == [0, 1]
    assert named.search("coffee", limit=1) == [0]


def test_items_with_all_words_whole() -> None:
    assert CATALOG.titled("coffee maker") == [3, 1]
    assert CATALOG.titled("coffee mak") == []
    assert CATALOG.titled("") == []


def test_a_catalog_without_titles_finds_ids_alone() -> None:
    bare = ItemCatalog(["a", "b"], ["", ""], None, np.array([0, 0]))
    assert bare.search("a") == [0]
    assert bare.search("tea") == []


def test_candidates_are_a_category_without_what_is_sold_out() -> None:
    assert CATALOG.candidates(None, ()) is None
    assert CATALOG.candidates(None, ["id-1", "nothing"]).nonzero()[0].tolist() == [0, 2, 3, 4, 5, 6, 7, 8, 9]  # type: ignore[union-attr]
    assert CATALOG.candidates(["id-1", "id-2", "nothing"], ["id-1"]).nonzero()[0].tolist() == [2]  # type: ignore[union-attr]
    assert not CATALOG.candidates([], ()).any()  # type: ignore[union-attr]


def test_popular_items_are_in_the_order_of_rows_where_equally_so() -> None:
    assert CATALOG.by_popularity.tolist() == [8, 3, 2, 1, 5, 0, 4, 6, 7, 9]
