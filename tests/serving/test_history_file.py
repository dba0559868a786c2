"""Files of later orders, as shops write them."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.serving.history_file import read_histories


@pytest.mark.parametrize(
    ("content", "wanted"),
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
    tmp_path: Path, content: str, wanted: dict[str, tuple[str, ...]]
) -> None:
    path = tmp_path / "orders"
    path.write_text(content, encoding="utf-8")
    found = read_histories(str(path))
    assert found == wanted
    assert list(found) == list(wanted)


def test_parquet_and_named_columns(tmp_path: Path) -> None:
    path = tmp_path / "orders.parquet"
    pl.DataFrame({"who": [3.0, 4.0, 3.0], "b": ["x", "y", "z"], "c": [2, 1, 1]}).write_parquet(path)
    assert read_histories(str(path), item_column="b", time_column="c") == {"3": ("z", "x"), "4": ("y",)}
    assert read_histories(str(path), user_column="b", item_column="who") == {"x": ("3",), "y": ("4",), "z": ("3",)}


def test_columns_that_are_not_there_or_cannot_be_told_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text("x_ref,item\nu1,a\n")
    with pytest.raises(ConfigError, match=r"--user-column: .*no column with a usual name of users, only x_ref, item"):
        read_histories(str(path))
    with pytest.raises(ConfigError, match=r"--user-column: 'X_Ref' is no column .* Did you mean x_ref\?"):
        read_histories(str(path), user_column="X_Ref")
    assert read_histories(str(path), user_column="x_ref") == {"u1": ("a",)}


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
        read_histories(str(path), **columns)


@pytest.mark.parametrize("given", [{"user_column": "sku"}, {"item_column": "customer"}, {"time_column": "sku"}])
def test_a_column_that_is_named_is_not_guessed_too(tmp_path: Path, given: dict[str, str]) -> None:
    path = tmp_path / "orders.csv"
    path.write_text("customer,sku\nu1,a\n")
    with pytest.raises(ConfigError, match="no column with a usual name"):
        read_histories(str(path), **given)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--history: .*does not exist"):
        read_histories(str(tmp_path / "nothing.csv"))
    (tmp_path / "empty.csv").write_text("user,item\n")
    with pytest.raises(DataError):
        read_histories(str(tmp_path / "empty.csv"))
