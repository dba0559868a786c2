"""Columns are guessed by their names in several languages and by their values; what stays open is refused."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from cllm4rec_dist.corpus.sources.records import Dialect
from cllm4rec_dist.errors import ConfigError, DataError
from cllm4rec_dist.project.column_stats import column_stats
from cllm4rec_dist.project.guess import (
    ColumnOptions,
    Customers,
    Interactions,
    Items,
    guess_customers,
    guess_interactions,
    guess_items,
)
from cllm4rec_dist.project.sample import read_sample
from cllm4rec_dist.project.words import kinds_of

ROWS = 200
_draw = random.Random(3)
MOMENTS = [datetime(2025, 1, 1) + timedelta(hours=_draw.randrange(8000)) for _ in range(ROWS)]
USERS = [f"u{_draw.randrange(40)}" for _ in range(ROWS)]
ITEMS = [f"{100 + _draw.randrange(30)}" for _ in range(ROWS)]
CATALOG = [f"{100 + index}" for index in range(30)]
STARS = [str(_draw.randint(1, 5)) for _ in range(ROWS)]
NAMES = [f"Blue thing number {index}" for index in range(30)]
WORDS = [f"I like this thing a lot, said customer {index % 50}." for index in range(ROWS)]


def column(values: Sequence[str], rows: int = ROWS) -> list[str]:
    return [values[index % len(values)] for index in range(rows)]


def write(path: Path, columns: dict[str, Sequence[Any]], separator: str = ",") -> str:
    pl.DataFrame({name: list(values) for name, values in columns.items()}).write_csv(path, separator=separator)
    return str(path)


def guess(orders: str, items: str | None = None, options: ColumnOptions | None = None) -> tuple[Interactions, Items]:
    """What `init` makes of files of orders and items."""
    options = options or ColumnOptions()
    sample = read_sample("orders", orders, Dialect())
    about = sample if items is None else read_sample("items", items, Dialect())
    guessed = guess_interactions(sample, options, {} if items is None else column_stats(about), {})
    return guessed, guess_items(about, options, column_stats(sample)[guessed.item])


LANGUAGES = {
    "english": ("order_id customer_id product_id quantity price order_date", "product_id name category brand", ","),
    "camel": ("orderId customerId sku qty unitPrice purchasedAt", "sku productTitle productCategory manufacturer", ","),
    "german": (
        "Bestellnummer Kundennummer Artikelnummer Menge Preis Bestelldatum",
        "Artikelnummer Bezeichnung Warengruppe Marke",
        ";",
    ),
    "french": ("commande id_client id_produit quantité prix date_commande", "id_produit libellé catégorie marque", ";"),
    "spanish": ("pedido cliente código_producto cantidad precio fecha", "código_producto nombre categoría marca", ";"),
    "italian": ("ordine utente articolo quantità prezzo data", "articolo nome categoria marca", ";"),
    "dutch": ("bestelling klantnummer artikelnummer aantal prijs datum", "artikelnummer naam categorie merk", ";"),
    "russian": ("заказ клиент товар количество цена дата", "товар название категория бренд", ";"),
}


@pytest.mark.parametrize("language", LANGUAGES)
def test_columns_of_a_shop_in_many_languages(language: str, tmp_path: Path) -> None:
    orders, items, separator = LANGUAGES[language]
    order, user, item, quantity, price, time = orders.split()
    key, title, category, brand = items.split()
    columns = {
        order: [f"B{index}" for index in range(ROWS)],
        user: USERS,
        item: ITEMS,
        quantity: column("123"),
        price: column(["9.90", "12.00"]),
        time: [f"{moment:%Y-%m-%d %H:%M:%S}" for moment in MOMENTS],
    }
    catalog = {key: CATALOG, title: NAMES, category: column(["A", "B", "C"], 30), brand: column(["X & Y", "Z Ltd"], 30)}
    guessed, about = guess(
        write(tmp_path / "orders.csv", columns, separator), write(tmp_path / "items.csv", catalog, separator)
    )
    assert (guessed.user, guessed.item, guessed.time) == (user, item, time)
    assert (guessed.rating, guessed.text, guessed.time_format) == (None, None, None), "a quantity is no rating"
    assert (about.item, about.title, about.category) == (key, title, category)
    assert category in about.description
    assert price not in about.description


def test_a_retailer_with_everything_in_one_file_and_dates_of_america(tmp_path: Path) -> None:
    columns = {
        "InvoiceNo": [f"{536365 + index // 2}" for index in range(ROWS)],
        "StockCode": ITEMS,
        "Description": [f"RED HEART NO {item}" for item in ITEMS],
        "Quantity": column("126"),
        "InvoiceDate": [f"{m.month}/{m.day}/{m.year} {m.hour}:{m.minute:02d}" for m in MOMENTS],
        "UnitPrice": column(["2.55", "3.39"]),
        "CustomerID": USERS,
        "Country": column(["UK", "France"]),
    }
    guessed, about = guess(write(tmp_path / "retail.csv", columns))
    assert (guessed.user, guessed.item, guessed.time) == ("CustomerID", "StockCode", "InvoiceDate")
    assert guessed.time_format == "%m/%d/%Y %H:%M"
    assert about.item == "StockCode"
    assert "Description" in (about.title, *about.description)


def test_reviews_as_json_lines(tmp_path: Path) -> None:
    rows = [
        {
            "reviewerID": USERS[n],
            "asin": ITEMS[n],
            "reviewerName": "A. Name",
            "helpful": [0, 1],
            "reviewText": WORDS[n],
            "overall": float(STARS[n]),
            "summary": "Good",
            "unixReviewTime": int(MOMENTS[n].timestamp()),
        }
        for n in range(ROWS)
    ]
    (tmp_path / "reviews.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    items = json.dumps(
        [{"asin": key, "title": name, "categories": ["Toys"]} for key, name in zip(CATALOG, NAMES, strict=True)]
    )
    (tmp_path / "items.json").write_text(items)
    guessed, about = guess(str(tmp_path / "reviews.json"), str(tmp_path / "items.json"))
    assert guessed == Interactions(
        user="reviewerID", item="asin", time="unixReviewTime", rating="overall", rating_threshold=4.0, text="reviewText"
    )
    assert (about.item, about.title) == ("asin", "title")


def test_typed_columns_of_parquet(tmp_path: Path) -> None:
    frame = pl.DataFrame(
        {
            "member": [int(user[1:]) for user in USERS],
            "film": [int(item) for item in ITEMS],
            "seen_on": MOMENTS,
            "stars": [float(star) * 2 for star in STARS],
            "flag": [True] * ROWS,
        }
    )
    frame.rename({"seen_on": "date"}).write_parquet(tmp_path / "views.parquet")
    guessed, _ = guess(str(tmp_path / "views.parquet"))
    assert (guessed.user, guessed.item, guessed.time) == ("member", "film", "date")
    assert (guessed.rating, guessed.rating_threshold) == ("stars", 8.0)


def test_columns_with_meaningless_names_are_recognised_by_their_join(tmp_path: Path) -> None:
    orders = write(tmp_path / "orders.csv", {"customer": USERS, "b": ITEMS, "c": column("12345")})
    items = write(tmp_path / "items.csv", {"x": CATALOG, "title": NAMES})
    guessed, about = guess(orders, items)
    assert (guessed.user, guessed.item, about.item) == ("customer", "b", "x")


def test_ids_are_preferred_to_names_and_to_ids_of_orders(tmp_path: Path) -> None:
    columns = {
        "customer_id": [f"o{index}" for index in range(ROWS)],
        "customer_unique_id": USERS,
        "customer_name": [f"Name of {user}" for user in USERS],
        "order_item_id": column("123"),
        "product_id": ITEMS,
        "product_name": [f"Thing of {item}" for item in ITEMS],
        "shipped_at": ["2025-03-01"] * ROWS,
        "order_purchase_timestamp": [f"{moment:%Y-%m-%d %H:%M:%S}" for moment in MOMENTS],
    }
    guessed, about = guess(write(tmp_path / "olist.csv", columns))
    assert (guessed.user, guessed.item, guessed.time) == (
        "customer_unique_id",
        "product_id",
        "order_purchase_timestamp",
    )
    assert about.title == "product_name"


def test_two_equally_likely_columns_are_not_guessed(tmp_path: Path) -> None:
    path = write(tmp_path / "orders.csv", {"customer_id": USERS, "client_id": column(USERS[::-1]), "sku": ITEMS})
    with pytest.raises(ConfigError, match=r"--user-column: \['customer_id', 'client_id'\] leave it open"):
        guess(path)
    assert guess(path, options=ColumnOptions(user="client_id"))[0].user == "client_id"
    questions: list[str] = []

    def choose(option: str, question: str, names: Sequence[str]) -> str:
        questions.append(f"{option} {question} {list(names)}")
        return names[1]

    assert guess(path, options=ColumnOptions(choose=choose))[0].user == "client_id"
    assert questions == [
        "--user-column which column of --orders has the id of the customer ['customer_id', 'client_id']"
    ]


DATES = [
    ("%d.%m.%Y", [1, 2, 3], "%d.%m.%Y"),
    ("%d.%m.%y %H:%M", [1, 2, 3], "%d.%m.%y %H:%M"),
    ("%d/%m/%Y", [11, 12, 13], "%d/%m/%Y"),
    ("%m/%d/%Y %I:%M %p", [11, 12, 13], "%m/%d/%Y %I:%M %p"),
    ("%Y%m%d", [11, 12, 13], "%Y%m%d"),
    ("%Y-%m-%d", [11, 12, 13], None),
]


@pytest.mark.parametrize(("written", "days", "format_"), DATES)
def test_the_date_format_is_set_if_the_values_do_not_decide_it(
    written: str, days: list[int], format_: str | None, tmp_path: Path
) -> None:
    times = [datetime(2025, 1 + index % 9, days[index % 3], 10, 30).strftime(written) for index in range(ROWS)]
    guessed, _ = guess(write(tmp_path / "orders.csv", {"user": USERS, "item": ITEMS, "date": times}))
    assert (guessed.time, guessed.time_format) == ("date", format_)


def test_dates_that_may_be_read_in_two_ways_are_refused_with_both(tmp_path: Path) -> None:
    path = write(
        tmp_path / "orders.csv", {"user": USERS, "item": ITEMS, "date": column(["3/4/2025 9:00", "5/6/2025 9:30"])}
    )
    with pytest.raises(ConfigError, match=r"\['%d/%m/%Y %H:%M', '%m/%d/%Y %H:%M'\] leave it open how '3/4/2025 9:00'"):
        guess(path)
    assert guess(path, options=ColumnOptions(time_format="%m/%d/%Y %H:%M"))[0].time_format == "%m/%d/%Y %H:%M"


@pytest.mark.parametrize(
    ("values", "threshold", "decimal"),
    [
        ("12345", 4, "."),
        (["4,5", "3,0", "5,0"], 4, ","),
        ("01", 1, "."),
        (["10", "7", "3"], 8, "."),
        (["80", "55"], 80, "."),
        ("5", None, "."),
    ],
)
def test_the_threshold_follows_the_scale(
    values: Sequence[str], threshold: float | None, decimal: str, tmp_path: Path
) -> None:
    columns = {"user": USERS, "item": ITEMS, "rating": column(values)}
    guessed, _ = guess(write(tmp_path / "orders.csv", columns, ";"))
    assert (guessed.rating, guessed.rating_threshold, guessed.decimal) == ("rating", threshold, decimal)


def test_ratings_that_most_rows_lack_are_left_alone(tmp_path: Path) -> None:
    columns = {"user": USERS, "item": ITEMS, "rating": column(["", "", "5", ""])}
    assert guess(write(tmp_path / "orders.csv", columns))[0].rating is None


def test_options_of_the_user_override_guesses(tmp_path: Path) -> None:
    columns = {"user": USERS, "item": ITEMS, "rating": STARS, "date": column(["2025-01-01", "2025-01-02"])}
    path = write(tmp_path / "orders.csv", columns)
    guessed, _ = guess(path, options=ColumnOptions(user="item", item="user", rating="none", time="none"))
    assert (guessed.user, guessed.item, guessed.rating, guessed.time) == ("item", "user", None, None)
    with pytest.raises(ConfigError, match=r"--time-column: 'dat' is no column of orders.csv.*Did you mean 'date'"):
        guess(path, options=ColumnOptions(time="dat"))


def test_personal_data_stays_out_of_the_texts(tmp_path: Path) -> None:
    orders = read_sample("orders", write(tmp_path / "orders.csv", {"customer": USERS, "item": ITEMS}), Dialect())
    people = sorted(set(USERS))
    columns = {
        "customer": people,
        "name": [f"Jane {user}" for user in people],
        "email": [f"{user}@x.de" for user in people],
        "phone": [f"+49 {index}" for index in range(len(people))],
        "birthday": ["1990-01-01"] * len(people),
        "street": column(["Main Street", "High Street"], len(people)),
        "age_group": column(["18-29", "60+"], len(people)),
        "city": column(["Bern", "Leipzig"], len(people)),
    }
    sample = read_sample("customers", write(tmp_path / "customers.csv", columns), Dialect())
    guessed = guess_customers(sample, ColumnOptions(), column_stats(orders)["customer"])
    assert guessed == Customers(
        "customer", ("age_group", "city"), left_out=("name", "email", "phone", "birthday", "street")
    )


def test_files_that_do_not_join_are_refused(tmp_path: Path) -> None:
    orders = write(tmp_path / "orders.csv", {"customer": USERS, "sku": ITEMS})
    items = write(tmp_path / "items.csv", {"colour": column(["red", "blue"], 30), "words": NAMES})
    with pytest.raises(DataError, match=r"--items: .*none of them has ids .* --items-key names it"):
        guess(orders, items)


def test_a_separator_splits_header_and_rows(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(
        "customer;sku;note, long\n" + "".join(f"{u};{i};a, b, c, d\n" for u, i in zip(USERS, ITEMS, strict=True))
    )
    sample = read_sample("orders", str(path), Dialect())
    assert (sample.dialect.separator, sample.names) == (";", ["customer", "sku", "note, long"])


@pytest.mark.parametrize(
    "text", ["u1,5,2025-01-01\nu2,6,2025-01-02\n", "ann,tea,x\nbob,tea,x\nann,milk,y\nbob,milk,z\n"]
)
def test_a_file_without_a_header_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(text)
    with pytest.raises(DataError, match="--orders-names user,item,date"):
        read_sample("orders", str(path), Dialect())
    named = read_sample("orders", str(path), Dialect(names=("user", "item", "date")))
    assert len(named.columns) == text.count("\n")


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("Country", {"profile"}),
        ("username", {"user", "title"}),
        ("KundenNr.", {"user", "id"}),
        ("database", set()),
        ("état", set()),
        ("parent_asin", {"item"}),
        ("Bestelldatum", {"order", "time"}),
    ],
)
def test_names_are_cut_into_words(name: str, kinds: set[str]) -> None:
    assert kinds_of(name) == kinds


def test_the_key_of_items_is_what_joins_whatever_its_name(tmp_path: Path) -> None:
    many = [f"R{index:03d}" for index in range(120)]
    orders = write(tmp_path / "orders.csv", {"client": column(USERS, 240), "Cote": column(many, 240)})
    names = [f"Thing number {index}" for index in range(120)]
    keys = {"id": [str(index) for index in range(120)], "Ref interne": names[::-1], "Cote": many, "title": names}
    guessed, about = guess(orders, write(tmp_path / "items.csv", keys))
    assert (guessed.item, about.item, about.title) == ("Cote", "Cote", "title")


def test_an_ambiguous_key_is_refused_with_its_option(tmp_path: Path) -> None:
    orders = write(tmp_path / "orders.csv", {"customer": USERS, "sku": ITEMS})
    items = write(tmp_path / "items.csv", {"left": CATALOG, "right": CATALOG, "title": NAMES})
    with pytest.raises(ConfigError, match=r"--items-key: \['left', 'right'\] leave it open .* Give --items-key"):
        guess(orders, items)
    assert guess(orders, items, ColumnOptions(items_key="right"))[1].item == "right"
    with pytest.raises(ConfigError, match=r"--items-key: 'rigth' is no column .* Did you mean 'right'"):
        guess(orders, items, ColumnOptions(items_key="rigth"))


def test_ids_that_differ_only_in_spelling_are_reported(tmp_path: Path) -> None:
    orders = write(tmp_path / "orders.csv", {"customer": USERS, "sku": [f"sku-{item}" for item in ITEMS]})
    items = write(tmp_path / "items.csv", {"Cote": [f"SKU-{key}" for key in CATALOG], "words": NAMES})
    with pytest.raises(DataError, match=r"In 'Cote' \d+ ids differ only in upper and lower case, such as 'sku-100'"):
        guess(orders, items)


@pytest.mark.parametrize("name", ["creado_ms", "creado", "created_ms", "ts_ms", "erstellt", "créé", "xyz"])
@pytest.mark.parametrize("unit", [1, 10**3, 10**6, 10**9])
def test_epochs_of_any_unit_are_times(name: str, unit: int, tmp_path: Path) -> None:
    epochs = [int(moment.timestamp()) * unit for moment in MOMENTS]
    columns = {
        "user": USERS,
        "item": ITEMS,
        "quantity": column("123"),
        name: epochs,
        "serial": range(10**9, 10**9 + ROWS),
    }
    guessed, _ = guess(write(tmp_path / "orders.csv", columns))
    assert (guessed.user, guessed.item, guessed.time, guessed.time_format) == ("user", "item", name, None)


def times(days_later: Sequence[int], pattern: str = "%Y-%m-%d") -> list[str]:
    return [f"{each + timedelta(days=days_later[row % len(days_later)]):{pattern}}" for row, each in enumerate(MOMENTS)]


@pytest.mark.parametrize(
    ("purchase", "other"),
    [
        ("order_date", "ship_date"),
        ("Bestelldatum", "Zahldatum"),
        ("order_ts", "etl_timestamp"),
        ("date", "loaded_at"),
        ("order_date", "created_at"),
        ("InvoiceDate", "DueDate"),
    ],
)
def test_the_time_of_the_purchase_and_not_another_one(purchase: str, other: str, tmp_path: Path) -> None:
    later = times([1, 4, 9], "%Y-%m-%d %H:%M:%S")
    path = write(tmp_path / "orders.csv", {"user": USERS, "item": ITEMS, other: later, purchase: times([0])})
    assert guess(path)[0].time == purchase


@pytest.mark.parametrize("names", [("Bestelldatum", "Rechnungsdatum"), ("time", "day"), ("c3", "c4")])
def test_two_columns_that_could_be_the_time_of_the_purchase_are_a_question(
    names: tuple[str, str], tmp_path: Path
) -> None:
    first, second = names
    path = write(tmp_path / "orders.csv", {"user": USERS, "item": ITEMS, first: times([0]), second: times([0, 3, 20])})
    with pytest.raises(ConfigError, match="leave it open which column has the time of the purchase"):
        guess(path)
    assert guess(path, options=ColumnOptions(time=second))[0].time == second


def test_two_columns_of_the_same_time_are_no_question(tmp_path: Path) -> None:
    epochs = [int(moment.timestamp()) for moment in MOMENTS]
    columns = {"user": USERS, "item": ITEMS, "reviewTime": times([0], "%m %d, %Y"), "unixReviewTime": epochs}
    assert guess(write(tmp_path / "orders.csv", columns))[0].time == "unixReviewTime"


@pytest.mark.parametrize("name", ["Note", "note"])
def test_a_rating_is_no_id_of_a_customer(name: str, tmp_path: Path) -> None:
    columns = {"Qui": USERS, name: STARS, "produit": ITEMS, "x": column("12345"), "date": [f"{m}" for m in MOMENTS]}
    path = write(tmp_path / "orders.csv", columns)
    with pytest.raises(ConfigError, match=r"--user-column: \['Qui'\] leave it open"):
        guess(path)
    guessed, _ = guess(path, options=ColumnOptions(user="Qui"))
    assert (guessed.rating, guessed.rating_threshold) == (name, 4.0)


@pytest.mark.parametrize("name", ["user", "Item", "order date", "id"])
def test_a_name_that_two_columns_have_is_refused(name: str, tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text(f"{name},{name},sku\n" + "".join(f"{u},x,{i}\n" for u, i in zip(USERS, ITEMS, strict=True)))
    with pytest.raises(DataError, match=rf"--orders: '{name}' is the name of several columns .* Rename all but one"):
        read_sample("orders", str(path), Dialect())


def test_a_repeated_name_without_a_kind_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text("user,x1,x1,sku\n" + "".join(f"{u},a,b,{i}\n" for u, i in zip(USERS, ITEMS, strict=True)))
    sample = read_sample("orders", str(path), Dialect())
    assert (sample.names, sample.repeated) == (["user", "sku"], ("x1",))


def test_a_first_line_of_excel_names_the_separator(tmp_path: Path) -> None:
    path = tmp_path / "orders.csv"
    path.write_text("sep=;\ncustomer;sku\n" + "".join(f"{u};{i}\n" for u, i in zip(USERS, ITEMS, strict=True)))
    sample = read_sample("orders", str(path), Dialect())
    assert (sample.names, sample.dialect.separator, len(sample.columns)) == (["customer", "sku"], ";", ROWS)


def test_ids_inside_of_objects_are_refused_with_a_line_that_flattens(tmp_path: Path) -> None:
    rows = [
        {
            "customer": {"id": u, "name": "Ann"},
            "lines": [{"sku": i, "qty": 1}, {"sku": "z", "qty": 2}],
            "day": "2025-01-01",
        }
        for u, i in zip(USERS, ITEMS, strict=True)
    ]
    lines, array = tmp_path / "lines.json", tmp_path / "my array.json"
    lines.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    array.write_text(json.dumps(rows))
    pattern = r"'customer', 'lines' hold objects, .*jq -c '%s\. \+ \(\.customer // {}.*\.lines\[\]\?.*%s > flat.json"
    with pytest.raises(DataError, match=pattern % ("", "lines.json")):
        guess(str(lines))
    with pytest.raises(DataError, match=pattern % (r"\.\[\] \| ", "my array.json'")):
        guess(str(array))
    for column_ in ("customer", "customer.id"):
        with pytest.raises(DataError, match=r"--user-column.*Flatten the file first"):
            guess(str(lines), options=ColumnOptions(user=column_, item="day"))
    pl.DataFrame(rows).write_parquet(tmp_path / "orders.parquet")
    with pytest.raises(DataError, match=r"explode\('lines'\).*unnest\('customer'\)"):
        guess(str(tmp_path / "orders.parquet"))


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize(
    ("wrap", "path"),
    [
        (lambda rows: {"orders": rows}, ".orders"),
        (lambda rows: {"meta": {"count": 3}, "data": {"my orders": rows}, "next": None}, '.data["my orders"]'),
    ],
)
def test_rows_in_a_field_of_one_object_are_refused_with_a_line_that_writes_them(
    tmp_path: Path, wrap: Any, path: str, indent: int | None
) -> None:
    rows = [{"customer": u, "sku": i} for u, i in zip(USERS, ITEMS, strict=True)]
    file = tmp_path / "api.json"
    file.write_text(json.dumps(wrap(rows), indent=indent))
    with pytest.raises(DataError, match=re.escape(f"whose rows are in its field {path}. ")) as caught:
        guess(str(file))
    assert caught.value.cure.endswith(f"jq -c '{path}[]' {file} > flat.json")


def test_a_field_without_any_value_is_no_description(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    rows = [{"customer": u, "sku": i, "note": None} for u, i in zip(USERS, ITEMS, strict=True)]
    (tmp_path / "orders.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert guess(str(tmp_path / "orders.json"))[1].description == ()
    assert not recwarn.list


def test_each_file_has_its_own_encoding(tmp_path: Path) -> None:
    """One that the user names is that of the files that are not UTF-8."""
    rows = "".join(f"{key};{name} für Café\n" for key, name in zip(CATALOG, NAMES, strict=True))
    (tmp_path / "utf8.csv").write_text(f"sku;title\n{rows}", encoding="utf-8")
    (tmp_path / "ansi.csv").write_text(f"sku;title\n{rows}", encoding="cp1252")
    for given in ("auto", "cp1252"):
        for name, encoding in (("utf8", None), ("ansi", "cp1252")):
            sample = read_sample("items", str(tmp_path / f"{name}.csv"), Dialect(encoding=given))
            assert sample.encoding == encoding
            assert sample.columns["title"][0].endswith("für Café")
    parts = read_sample("items", str(tmp_path / "*.csv"), Dialect())
    assert parts.encoding is None, "each part has its own"


@pytest.mark.parametrize(
    ("user", "item", "date"),
    [("membre", "article", "ts_ms"), ("Email", "Lineitem sku", "Created at"), ("会员", "商品", "日期")],
)
def test_columns_of_other_shops(user: str, item: str, date: str, tmp_path: Path) -> None:
    people = [f"{name}@x.org" for name in USERS] if user == "Email" else USERS
    times = [int(moment.timestamp()) * 1000 if date == "ts_ms" else f"{moment:%Y年%m月%d日}" for moment in MOMENTS]
    guessed, _ = guess(write(tmp_path / "orders.csv", {date: times, user: people, "x": column("ab"), item: ITEMS}))
    assert (guessed.user, guessed.item, guessed.time) == (user, item, date)
