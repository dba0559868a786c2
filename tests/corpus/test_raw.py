"""Joins, counts of what is left out, and texts of several rows, which all readers share."""

from __future__ import annotations

from typing import Any

import pytest

from tests.corpus.reading import Read, Refuse, table

ROWS = "u,i\na,1\nb,2\na,3\nb,4\n"


def with_items(**options: Any) -> dict[str, Any]:
    return table() | {"items": {"path": "m.csv", "item": "i", "title": "t"}} | options


def read_items(read: Read, interactions: str, items: str, **options: Any) -> tuple[set[str | None], str]:
    """Titles that were matched, and the messages."""
    result = read({"i.csv": interactions, "m.csv": items}, **with_items(**options))
    return {title for title, _ in result.items.values()}, result.messages


@pytest.mark.parametrize(
    ("interactions", "items"),
    [
        (ROWS, "i,t\n1,A\n2,B\n3,C\n4,D\n"),
        (ROWS, "i,t\n 1,A\n2\u00a0,B\n3,C\n4\t,D\n"),
        (ROWS, "i,t\n1.0,A\n2.0,B\n3.0,C\n4.0,D\n"),
        (ROWS, "i,t\n1.0,A\n2.0,B\nx7,Z\n3.0,C\n4.0,D\n"),
        ("u,i\na,1.0\nb,2.0\na,3.0\nb,4.0\n", "i,t\n1,A\n2,B\n3,C\n4,D\n"),
        ("u,i\na,1.0\nb,2.0\na,3.0\nb,4.0\na,x\n", "i,t\n1,A\n2,B\n3,C\n4,D\n"),
    ],
)
def test_both_sides_of_a_join_follow_one_rule(read: Read, interactions: str, items: str) -> None:
    titles, messages = read_items(read, interactions, items, new_items=False)
    assert titles == {"A", "B", "C", "D"}
    assert messages.count("WARNING") == messages.count("has no row for 1 of 5") == interactions.count("a,x")


@pytest.mark.parametrize(
    ("interactions", "items", "ours", "theirs"),
    [
        ("u,i\na,0108\nb,0109\na,5\n", "i,t\n777,Z\n108,A\n109,B\n5,C\n", "0108", "108"),
        ("u,i\na,s1\nb,s2\na,x\n", "i,t\nS1,A\nS2,B\nx,C\n", "s1", "S1"),
        ("u,i\na,A-1\nb,B-2\na,x\n", "i,t\nA1,A\nx,C\n", "A-1", "A1"),
        ("u,i\na,1\nb,2\na,3\n", "i,t\n1,A\n", "2", "1"),
    ],
)
def test_a_join_below_half_is_reported_with_ids_that_resemble_each_other(
    read: Read, interactions: str, items: str, ours: str, theirs: str
) -> None:
    _, messages = read_items(read, interactions, items)
    assert "WARNING: m.csv: only 1 of 3 items of the interactions are in it (33.3 %)" in messages
    assert f"have for example {ours!r}, the file {theirs!r}" in messages


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ("i,t\nZ1,A\n", ["m.csv: 'Z1'", "such as '1'", "1 ids", "allow_unmatched"]),
        ("i,t\n", ["m.csv", "no ids of items", "allow_unmatched"]),
        ("", ["m.csv", "no ids of items"]),
    ],
)
def test_a_join_that_matches_nothing_is_refused(refuse: Refuse, items: str, words: list[str]) -> None:
    message = refuse({"i.csv": ROWS, "m.csv": items}, **with_items())
    assert all(word in message for word in words), message


def test_unless_the_recipe_allows_it(read: Read) -> None:
    titles, messages = read_items(read, ROWS, "i,t\nZ1,A\n", allow_unmatched=True, new_items=False)
    assert titles == set()
    assert "only 0 of 4 items" in messages


def test_users_are_joined_alike(refuse: Refuse) -> None:
    source = table() | {"users": {"path": "p.csv", "user": "u", "text": ["x"]}}
    assert "not among the users of the interactions" in refuse({"i.csv": ROWS, "p.csv": "u,x\nA,y\n"}, **source)


def test_a_text_about_an_unknown_item_is_counted_with_its_place(read: Read) -> None:
    result = read({"i.csv": ROWS, "m.csv": "i,t\n1,A\n9,Z\n2,B\n8,Y\n"}, **with_items(new_items=False))
    assert result.lost == {"text about an item without interactions": (2, "m.csv", 3, "9")}
    assert result.raw.log.skipped["text about an item without interactions"].total == 4


def test_an_item_of_several_rows_has_the_first_value_of_each_column(read: Read) -> None:
    items = "i,t,d\n1,,D1\n1,A,D2\n2,NULL,\n1,B,\n2,C,D3\n"
    source = table() | {"items": {"path": "m.csv", "item": "i", "title": "t", "description": ["d"]}}
    result = read({"i.csv": "u,i\na,1\na,2\n", "m.csv": items}, **source)
    assert result.items == {"1": ("A", "D1"), "2": ("C", "D3")}
    assert result.lost == {"second text about the same item": (2, "m.csv", 3, "1")}, "C comes again as it was"


def test_one_file_of_orders_and_items_loses_nothing_by_being_read_twice(read: Read) -> None:
    flat = "u,i,t\n" + "a,1,A\nb,1,A\nb,2,\nc,2,B\nbad\n,3,C\nd,,D\n" * 3
    source = table() | {"items": {"path": "i.csv", "item": "i", "title": "t"}}
    result = read({"i.csv": flat}, **source)
    assert result.items == {"1": ("A", None), "2": ("B", None)}
    assert result.lost == {
        "row that has 1 field instead of 3": (3, "i.csv", 6, "bad"),
        "row that has no user id": (3, "i.csv", 7, ", 3"),
        "row that has no item id": (3, "i.csv", 8, "d,"),
        "text about an item without interactions": (3, "i.csv", 7, "3"),
    }
    assert result.messages.count("WARNING") == 1


@pytest.mark.parametrize(
    ("ours", "theirs", "what"),
    [
        (
            ["sku-1", "sku-2", "sku-3"],
            ["SKU-1", "SKU-2", "sku-3"],
            "2 ids of the two sides differ only in upper and lower",
        ),
        (["007", "008", "9"], ["7", "8", "9"], "2 ids of the two sides differ only in leading zeros, such as '007'"),
        (
            ["M\u00fcsli-1", "M\u00fcsli-2", "x"],
            ["Mu\u0308sli-1", "Mu\u0308sli-2", "x"],
            "2 ids of the two sides differ only in Unicode form",
        ),
        (
            ["A-1", "A-2", "x"],
            ["a001", "a002", "x"],
            "2 ids of the two sides differ only in punctuation, zeros or case",
        ),
    ],
)
def test_ids_that_differ_in_their_spelling_alone_are_hinted_at(
    read: Read, refuse: Refuse, ours: list[str], theirs: list[str], what: str
) -> None:
    orders = "u,i\n" + "".join(f"a,{item}\n" for item in ours)
    items = "i,t\n" + "".join(f"{item},T\n" for item in theirs)
    messages = read({"i.csv": orders, "m.csv": items}, **with_items()).messages
    assert what in messages
    assert "write them equally in both files" in messages
    nothing = refuse(
        {"i.csv": orders[: orders.rindex("a,")], "m.csv": items[: items.rindex(theirs[2])]}, **with_items()
    )
    assert what in nothing


def test_a_row_without_id_is_no_sign_of_a_wrong_recipe(read: Read) -> None:
    result = read({"i.csv": "u,i\n,1\n,2\n\n,3\na,4\n"}, **table())
    assert result.pairs == [("a", "4")]
    assert result.lost == {"row that has no user id": (3, "i.csv", 2, ", 1")}
    assert "WARNING: i.csv: 3 of 4 rows (75 %) are left out: 3 x has no user id. The first is line 2" in result.messages


@pytest.mark.parametrize(("lost", "warned"), [(3, False), (4, True)])
def test_more_than_one_percent_lost_is_a_warning(read: Read, lost: int, warned: bool) -> None:
    result = read({"i.csv": "u,i\n" + "a,1\n" * (300 - lost) + "bad\n" * lost}, **table())
    assert ("WARNING" in result.messages) == warned
    assert result.lost["row that has 1 field instead of 2"][0] == lost
    assert result.raw.log.skipped["row that has 1 field instead of 2"].share == lost / 300


def test_more_than_half_lost_is_refused_unless_max_lost_allows_it(read: Read, refuse: Refuse) -> None:
    files = {"i.csv": "u,i\nx\na,1\ny\nz\n"}
    message = refuse(files, **table())
    assert message.startswith("i.csv line 2: 'x' has 1 field instead of 2: 3 of 4 rows (75 %)")
    assert read(files, **table(), max_lost=0.75).pairs == [("a", "1")]


def test_each_file_is_judged_by_itself(refuse: Refuse) -> None:
    files = {"a.csv": "u,i\n" + "a,1\n" * 50, "b.csv": "u,i\na,1\nx\ny\n"}
    assert refuse(files, **table(["a.csv", "b.csv"])).startswith("b.csv line 3: 'x'")


def test_the_first_place_is_that_of_the_first_file(read: Read) -> None:
    files = {"a.csv": "u,i\na,1\na,2\n,3\n", "b.csv": "u,i\n,1\na,1\n"}
    assert read(files, **table(["a.csv", "b.csv"])).lost["row that has no user id"] == (2, "a.csv", 4, ", 3")
