"""Files of later orders, as shops write them."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from cllm4rec_dist.corpus.manifest import OrderColumns
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.serving.history_file import HistoryFormat, read_histories


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("user_id,item_id\nu2,b\nu1,a\nu2,a\n", {"u2": ("b", "a"), "u1": ("a",)}),
        ("Customer ID;SKU;qty;Order date\nu1;a;1;2024-01-05\nu1;b;2;2024-01-01\n", {"u1": ("b", "a")}),
        ("customer\tproduct\tweight\n000101\t007\t3\n", {"000101": ("007",)}),
        ("\ufeffuser,item,timestamp\nu1,a,1700000000\nu1,b,1600000000\n\n", {"u1": ("b", "a")}),
        ('{"user": "u1", "item": "a"}\n{"user": "u1", "item": 5}\n', {"u1": ("a", "5")}),
        ("user,item\n,a\nu1,b\nu1,b\nu1,\nu2,c\nu3,d\n", {"u1": ("b", "b"), "u2": ("c",), "u3": ("d",)}),
    ],
)
def test_users_come_in_the_order_of_their_first_line(
    tmp_path: Path, content: str, expected: dict[str, tuple[str, ...]]
) -> None:
    path = tmp_path / "orders"
    path.write_text(content, encoding="utf-8")
    result = read_histories(str(path))
    assert result == expected
    assert list(result) == list(expected)


def test_parquet_and_named_columns(tmp_path: Path) -> None:
    path = tmp_path / "orders.parquet"
    pl.DataFrame({"who": [3.0, 4.0, 3.0], "b": ["x", "y", "z"], "c": [2, 1, 1]}).write_parquet(path)
    assert read_histories(str(path), HistoryFormat(item_column="b", time_column="c")) == {"3": ("z", "x"), "4": ("y",)}
    assert read_histories(str(path), HistoryFormat(user_column="b", item_column="who")) == {
        "x": ("3",),
        "y": ("4",),
        "z": ("3",),
    }


def test_columns_that_are_not_there_or_cannot_be_told_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text("x_ref,item\nu1,a\n")
    with pytest.raises(ConfigError, match=r"--user-column: .*no column with a usual name of users, only x_ref, item"):
        read_histories(str(path))
    with pytest.raises(ConfigError, match=r"--user-column: 'X_Ref' is not a column .* Did you mean x_ref\?"):
        read_histories(str(path), HistoryFormat(user_column="X_Ref"))
    assert read_histories(str(path), HistoryFormat(user_column="x_ref")) == {"u1": ("a",)}


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (
            {"user_column": "sku", "item_column": "sku"},
            r"--user-column, --item-column: 'sku' cannot be the column of both",
        ),
        ({"user_column": "at", "time_column": "at"}, r"--user-column, --time-column: 'at' cannot be"),
        ({"item_column": "sku", "time_column": "sku"}, r"--item-column, --time-column: 'sku' cannot be"),
    ],
)
def test_one_column_cannot_be_two_things(tmp_path: Path, columns: dict[str, str], message: str) -> None:
    path = tmp_path / "orders.csv"
    path.write_text("customer,sku,at\nu1,a,2024-01-05\n")
    with pytest.raises(ConfigError, match=message):
        read_histories(str(path), HistoryFormat(**columns))


@pytest.mark.parametrize("given", [{"user_column": "sku"}, {"item_column": "customer"}, {"time_column": "sku"}])
def test_a_column_that_is_named_is_not_guessed_too(tmp_path: Path, given: dict[str, str]) -> None:
    path = tmp_path / "orders.csv"
    path.write_text("customer,sku\nu1,a\n")
    with pytest.raises(ConfigError, match="no column with a usual name"):
        read_histories(str(path), HistoryFormat(**given))


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--history: .*does not exist"):
        read_histories(str(tmp_path / "nothing.csv"))
    (tmp_path / "empty.csv").write_text("user,item\n")
    with pytest.raises(DataError):
        read_histories(str(tmp_path / "empty.csv"))


SPANISH = OrderColumns(user="cliente", item="producto", timestamp="fecha", time_format="%d/%m/%Y")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("cliente;producto;fecha\nu1;a;03/04/2026\nu1;b;04/03/2026\n", ("b", "a")),
        ("cliente;producto;fecha\nu1;a;2026-04-03\nu1;b;2026-03-04\n", ("b", "a")),
        ("date,cliente,sku,producto\n2026-02-01,u1,x,a\n2026-01-01,u1,y,b\n", ("b", "a")),
        ("customer,sku\nu1,a\n", ("a",)),
        ("sep=;\ncliente;producto\nu1;a\n", ("a",)),
        ("cliente;producto;x,y,z,w,v\nu1;a;1,2,3,4,5\n", ("a",)),
    ],
)
def test_columns_of_the_recipe_come_first(tmp_path: Path, content: str, expected: tuple[str, ...]) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(content, encoding="utf-8")
    assert read_histories(str(path), recipe=SPANISH) == {"u1": expected}


def test_a_named_column_is_not_the_recipes_other_one(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text("cliente,producto,quien\nu1,a,v1\n")
    assert read_histories(str(path), HistoryFormat("quien"), SPANISH) == {"v1": ("a",)}
    assert read_histories(str(path), HistoryFormat("producto", "cliente"), SPANISH) == {"a": ("u1",)}


def test_a_file_of_another_form_is_read_as_the_options_say(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_bytes("user~item~date\nŽofie~a~03/04/2026\nŽofie~b~04/03/2026\n".encode("cp1250"))
    given = HistoryFormat(time_format="%d/%m/%Y", separator="~", encoding="cp1250")
    assert read_histories(str(path), given) == {"Žofie": ("b", "a")}
    with pytest.raises(DataError, match=r"\(recommend: --encoding\)"):
        read_histories(str(path), HistoryFormat(separator="~"))
    with pytest.raises(DataError, match=r"\(recommend: --time-format\)"):
        read_histories(str(path), HistoryFormat(separator="~", encoding="cp1250"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (HistoryFormat(encoding="klingon"), "--encoding: 'klingon' is refused: 'klingon' is not an encoding"),
        (HistoryFormat(time_format="day"), "--time-format: 'day' is refused: 'day' is not a strptime format"),
    ],
)
def test_an_encoding_and_a_format_of_no_kind_are_refused(tmp_path: Path, given: HistoryFormat, words: str) -> None:
    path = tmp_path / "orders.csv"
    path.write_text("user,item,date\nu1,a,2026-01-01\n")
    with pytest.raises(ConfigError, match=words):
        read_histories(str(path), given)


def test_a_legacy_encoding_is_reported_once_with_the_option_that_sets_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "orders.csv"
    path.write_bytes("user;item\nJürgen;Röse\nBjörn;Seife\n".encode("cp1252"))
    assert list(read_histories(str(path))) == ["Jürgen", "Björn"]
    (warning,) = [message for message in caplog.messages if "is not UTF-8" in message]
    assert warning.endswith("If that is wrong, give --encoding.")
