"""Files of new products, as shops write them."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from cllm4rec_dist.corpus.manifest import ItemColumns
from cllm4rec_dist.corpus.sources import read_source
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.serving.new_item_file import read_new_items
from cllm4rec_dist.serving.new_items import NewItem
from tests.corpus.samples import source

RECIPE = ItemColumns(item="Nr", title="Bezeichnung", description=("Marke", "Farbe"), html=True)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (
            "item_id,title,description\nb,Rose soap,With honey\na,Brush,\n",
            [("b", "Rose soap", "With honey"), ("a", "Brush", "")],
        ),
        ("SKU;Name;price\n007;Rose  soap;3,50\n", [("007", "Rose soap", "")]),
        ("item_id:token\tmovie_title:token_seq\n5\tHeat\n", [("5", "Heat", "")]),
        ("id,name\n5,Rose soap\n", [("5", "Rose soap", "")]),
        ("id,sku,name\n5,r-1,Rose soap\n", [("r-1", "Rose soap", "")]),
        ("product\ttext\n5\tRose soap\n", [("5", "", "Rose soap")]),
        ('{"item": 5, "title": "Rose soap", "x": 1}\n{"item": "6"}\n', [("5", "Rose soap", ""), ("6", "", "")]),
        ("id_x,Nr,Bezeichnung,Farbe,title\n1,7,<b>Rose</b> soap,red,none\n", [("7", "Rose soap", "red")]),
        ("item,title\n1.0,Rose\n2.0,Soap\n", [("1", "Rose", ""), ("2", "Soap", "")]),
        (
            "item,title,description\nb,,\na,Soap,\nb,Rose,red\na,Tea,green\nb,Soap,\n",
            [("b", "Rose", "red"), ("a", "Soap", "green")],
        ),
    ],
)
def test_columns_are_those_of_the_recipe_or_have_usual_names(
    tmp_path: Path, content: str, expected: list[tuple[str, str, str]]
) -> None:
    path = tmp_path / "new"
    path.write_text(content, encoding="utf-8")
    assert read_new_items(str(path), RECIPE) == [NewItem(*row) for row in expected]


def test_parquet_with_gaps_and_lists(tmp_path: Path) -> None:
    path = tmp_path / "new.parquet"
    pl.DataFrame({"item": [3.0, 4.0], "title": ["Rose", None], "description": [["a", "b"], None]}).write_parquet(path)
    assert read_new_items(str(path)) == [NewItem("3", "Rose", "a b"), NewItem("4", "", "")]


def test_a_product_has_the_text_that_prepare_gives_it(tmp_path: Path) -> None:
    (tmp_path / "orders.csv").write_text("user,item\nu1,a\nu2,a\n")
    content = 'Nr,Bezeichnung,Marke,Farbe\na,Brush,,\nn,<i>Rose</i>  soap &amp; &#34;x&#34;,NULL,"red\n blue"\n'
    content += "n,,Acme,\n"  # a further row of the same product, as of a variant
    (tmp_path / "items.csv").write_text(content)
    table = {"path": str(tmp_path / "items.csv"), **RECIPE.model_dump()}
    orders = {"path": str(tmp_path / "orders.csv"), "user": "user", "item": "item"}
    raw = read_source(source(format="table", interactions=orders, items=table))
    prepared = {
        row["item"]: NewItem(row["item"], row["title"] or "", row["description"] or "") for row in raw.items.to_dicts()
    }
    assert prepared["n"] == NewItem("n", 'Rose soap & "x"', "Acme red blue")
    assert read_new_items(str(tmp_path / "items.csv"), RECIPE) == [prepared["a"], prepared["n"]]


@pytest.mark.parametrize(
    ("content", "error", "message"),
    [
        ("", DataError, "--new-items: .*is empty"),
        ("item,title\n", DataError, "--new-items: .*has no product"),
        ("item,title\na,Rose\n,Soap\n", DataError, "--new-items: .*line 3: '' has no id"),
        ("x,title\na,Rose\n", ConfigError, "none with a usual name for ids, only x, title"),
        ("item,price\na,3\n", ConfigError, "none with a usual name for titles or descriptions, only item, price"),
    ],
)
def test_what_is_no_file_of_products_is_refused(
    tmp_path: Path, content: str, error: type[Exception], message: str
) -> None:
    path = tmp_path / "new.csv"
    path.write_text(content)
    with pytest.raises(error, match=message):
        read_new_items(str(path), RECIPE)


def test_an_encoding_that_cannot_be_detected_is_refused_with_a_cure_that_helps(tmp_path: Path) -> None:
    path = tmp_path / "new.csv"
    path.write_bytes(b"item_id;title\nn;" + bytes(range(0x81, 0x9F)) * 3 + b"\n")
    with pytest.raises(DataError, match=r"cannot be detected\. Save it as UTF-8\.$"):
        read_new_items(str(path))


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"--new-items: .*Give a file of new products"):
        read_new_items(str(tmp_path / "nothing.csv"))


def test_a_legacy_encoding_is_reported_once_with_a_cure_that_helps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "new.csv"
    path.write_bytes("item_id;title\nn;Röse soap\n".encode("cp1252"))
    assert read_new_items(str(path)) == [NewItem("n", "Röse soap", "")]
    (warning,) = [message for message in caplog.messages if "is not UTF-8" in message]
    assert warning.endswith("If that is wrong, save it as UTF-8.")
