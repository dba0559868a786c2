"""Files of a shop as people have them: a semicolon for a separator, German dates, and lines that are dirty.

Customers have an interest and buy mostly in it, so that a recommender has something to learn. Everything is drawn from
a seed. `make_shop` says what it has written, for tests that count.
"""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

INTERESTS = {
    "Garten": ("Rosenschere", "Gießkanne", "Hochbeet", "Blumentopf", "Rasendünger", "Gartenschlauch"),
    "Küche": ("Kochtopf", "Schneidebrett", "Messer", "Pfanne", "Schüssel", "Reibe"),
    "Büro": ("Ordner", "Füller", "Notizbuch", "Locher", "Lampe", "Kalender"),
    "Sport": ("Hantel", "Matte", "Springseil", "Trinkflasche", "Laufschuh", "Handtuch"),
    "Musik": ("Gitarre", "Stimmgerät", "Notenpult", "Kopfhörer", "Plektrum", "Metronom"),
    "Kinder": ("Bausteine", "Puppe", "Puzzle", "Malkasten", "Roller", "Kuscheltier"),
}
COLOURS = ("rot", "blau", "grün", "schwarz", "weiß", "gelb", "grau")


@dataclass(frozen=True)
class Shop:
    """What was written.

    Attributes:
        orders, products, customers: the files.
        later_orders: orders that came afterwards, some of them by new customers.
        num_customers, num_products: that have usable lines in `orders`, and all that are in `products`.
        new_customers: ids that are in `later_orders` alone.
        num_dirty: lines of `orders` that cannot be used or come again.
    """

    orders: Path
    products: Path
    customers: Path
    later_orders: Path
    num_customers: int
    num_products: int
    new_customers: tuple[str, ...]
    num_dirty: int


def make_shop(folder: Path, num_customers: int, num_products: int, seed: int = 7) -> Shop:
    """Write the files of a shop to a folder, which is made."""
    draw = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    products = _products(draw, num_products)
    _write(folder / "artikel.csv", ["Artikelnummer", "Bezeichnung", "Warengruppe", "Beschreibung", "Preis"], products)
    names = [f"K{number:05d}" for number in range(1, num_customers + 1)]
    _write(folder / "kunden.csv", ["Kundennummer", "Name", "Altersgruppe", "Ort"], _people(draw, names))
    orders, dirty = _dirty(draw, _orders(draw, names, products, datetime(2025, 1, 6)))
    header = ["Bestellnummer", "Kundennummer", "Artikelnummer", "Bestelldatum", "Menge", "Preis"]
    _write(folder / "bestellungen.csv", header, orders)
    new = tuple(f"N{number:05d}" for number in range(1, max(2, num_customers // 20) + 1))
    later = _orders(draw, [*draw.sample(names, num_customers // 10), *new], products, datetime(2026, 3, 2))
    _write(folder / "bestellungen-neu.csv", header, later)
    return Shop(
        orders=folder / "bestellungen.csv",
        products=folder / "artikel.csv",
        customers=folder / "kunden.csv",
        later_orders=folder / "bestellungen-neu.csv",
        num_customers=num_customers,
        num_products=num_products,
        new_customers=new,
        num_dirty=dirty,
    )


def _products(draw: random.Random, count: int) -> list[list[str]]:
    """Number, title, category, description, price. Some titles run over two lines, some descriptions are HTML."""
    rows = []
    for number in range(1, count + 1):
        category = list(INTERESTS)[number % len(INTERESTS)]
        thing, colour = draw.choice(INTERESTS[category]), draw.choice(COLOURS)
        title = f"{thing} {colour} Nr. {number}"
        if number % 40 == 0:
            title = f'{thing} "Profi";\n{colour} Nr. {number}'
        text = f"<p>{thing} in {colour} f&uuml;r {category}.</p><br/>Ein Artikel, der lange h&auml;lt."
        rows.append([f"A-{number:04d}", title, category, text if number % 3 else "", f"{draw.uniform(2, 90):.2f}"])
    return [[*row[:4], row[4].replace(".", ",")] for row in rows]


def _people(draw: random.Random, names: list[str]) -> list[list[str]]:
    ages, towns = ("18-29", "30-44", "45-59", "60+"), ("Köln", "Leipzig", "Münster", "Bern")
    return [[name, f"Person {name[1:]}", draw.choice(ages), draw.choice(towns)] for name in names]


def _orders(draw: random.Random, names: list[str], products: list[list[str]], start: datetime) -> list[list[str]]:
    """Lines of orders in no order: each customer has 3 to 14 products, most of them of one category."""
    by_interest = {category: [row for row in products if row[2] == category] for category in INTERESTS}
    rows = []
    for number, name in enumerate(names):
        interest = draw.choice(list(INTERESTS))
        bought: set[str] = set()
        moment = start + timedelta(days=draw.randrange(200))
        for _ in range(draw.randint(3, 14)):
            among = by_interest[interest] if draw.random() < 0.85 else products
            row = among[min(int(draw.expovariate(6 / len(among))), len(among) - 1)]
            if row[0] in bought:
                continue
            bought.add(row[0])
            moment += timedelta(days=draw.randrange(1, 25), minutes=draw.randrange(600))
            rows.append([f"B{number:06d}", name, row[0], f"{moment:%d.%m.%Y %H:%M}", str(draw.randint(1, 3)), row[4]])
    draw.shuffle(rows)
    return rows


def _dirty(draw: random.Random, rows: list[list[str]]) -> tuple[list[list[str]], int]:
    """The rows with repeated ones, ones without ids or with an impossible date, and ones that are cut."""
    share = max(3, len(rows) // 150)
    repeated = draw.sample(rows, share)
    without_customer = [[row[0], "", *row[2:]] for row in draw.sample(rows, share)]
    without_item = [[*row[:2], "NULL", *row[3:]] for row in draw.sample(rows, share)]
    no_date = [[*row[:3], "31.02.2025 10:00", *row[4:]] for row in draw.sample(rows, share)]
    cut = [row[:3] for row in draw.sample(rows, share)]
    dirty = [*repeated, *without_customer, *without_item, *no_date, *cut]
    mixed = [*rows, *dirty]
    draw.shuffle(mixed)
    return mixed, len(dirty)


def _write(path: Path, header: list[str], rows: list[list[str]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter=";")
        writer.writerow(header)
        writer.writerows(rows)
