"""A synthetic shop, for the demo, tests and a first run without a download.

Products have a department, a type, a brand, a price level and two qualities. Customers have one to three departments of
interest, types and brands that they prefer, a price level and two qualities that they like. Each purchase is a draw
from a multinomial logit model (McFadden, 1974): the log odds of a product are its popularity plus what the customer
likes about it, and they change with what the customer already has. docs/synthetic-shop.md has all of it.

The model is made for no recommender: log odds add up over attributes, of which texts name a part in varied words.

Some ids are in scripts other than Latin, as in real data.

Legend: I items.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import polars as pl

from cllm4rec_dist.corpus import synthetic_texts
from cllm4rec_dist.corpus.raw import InteractionCollector, RawData, Rules
from cllm4rec_dist.corpus.recipe import SyntheticSource
from cllm4rec_dist.corpus.row_batch import Batch
from cllm4rec_dist.corpus.skips import SkipLog
from cllm4rec_dist.corpus.synthetic_texts import BRANDS, DEPARTMENTS, LEVELS, QUALITIES, Product

_USER_SCRIPTS = ("用户-{}", "пользователь-{}", "مستخدم-{}", "उपयोगकर्ता-{}")
_ITEM_SCRIPTS = ("товар-{}", "商品-{}", "상품-{}", "προϊόν-{}")
_FEWEST_ITEMS = 5
_POPULARITY_EXPONENT = 0.6
"""The r-th most popular item is r^-0.6 times as popular as the first, before anybody's taste."""
_BRANDS_PER_DEPARTMENT = 5
_ANYTHING = 0.05
"""Share of purchases that no taste explains, such as gifts."""
_OTHER_DEPARTMENT = -5.0
_OTHER_LEVEL = -1.0
"""Log odds of a product outside of the customer's departments, and for each price level that it is off."""
_LIKED_QUALITY = 1.0
_KIND_DEVIATION, _BRAND_DEVIATION = 0.7, 0.7
"""Standard deviations of a customer's taste for each type of product and each brand, in log odds."""
_HAS_KIND, _GOES_WITH = -1.5, 1.0
"""Log odds of another product of a type that the customer has, and of a type that goes with what the customer has."""
_FIRST_DAY = 1_600_000_000
_ORIGIN = "synthetic data"


@dataclass(frozen=True)
class _Customer:
    departments: np.ndarray
    shares: np.ndarray
    level: int
    liked: np.ndarray


def generate(source: SyntheticSource) -> RawData:
    """Generate users and items with texts, and interactions with ratings, times and reviews.

    Equal configurations give equal data on every machine.
    """
    random = np.random.default_rng(source.seed)
    users = _names(_USER_SCRIPTS, "user", source.num_users)
    items = _names(_ITEM_SCRIPTS, "item", source.num_items)
    products = _products(source, random)
    described = [
        (item, synthetic_texts.title(product, random), synthetic_texts.description(product, random))
        for item, product in zip(items, products, strict=True)
    ]
    shop = _Shop(products, source.num_clusters, random)
    profiles, rows = [], []
    for user in users:
        customer = _customer(source.num_clusters, random)
        about = customer.departments.tolist(), customer.liked.tolist(), customer.level
        profiles.append((user, synthetic_texts.profile(*about, random)))
        count = _FEWEST_ITEMS + _overdispersed(source.mean_interactions - _FEWEST_ITEMS, random)
        bought, fits = shop.purchases(customer, min(count, source.num_items), random)
        times = _FIRST_DAY + np.sort(random.integers(0, 365 * 86_400, len(bought)))
        for item, fit, time in zip(bought, fits, times, strict=True):
            is_happy = random.random() < (0.9 if fit else 0.5)
            rating = float(random.integers(4, 6) if is_happy else random.integers(1, 4))
            text = synthetic_texts.review(products[item], about[1], is_happy, random)
            rows.append((user, items[item], rating, float(time), text))
    return _collect(rows, described, profiles)


def _collect(
    rows: Sequence[tuple[Any, ...]], described: Sequence[tuple[str, ...]], profiles: Sequence[tuple[str, ...]]
) -> RawData:
    """Return the raw data; items that nobody has bought are left out."""
    collector = InteractionCollector(SkipLog(), Rules(has_rating=True, has_text=True))
    collector.add_file(_ORIGIN, [_batch(rows, ("user", "item", "rating", "timestamp", "text"))])
    raw = collector.finish()
    used = set(raw.item_ids)
    texts = _batch([row for row in described if row[0] in used], ("item", "title", "description")).columns
    texts = texts.with_columns(pl.col("description").replace("", None))
    return replace(raw, items=texts, users=_batch(profiles, ("user", "text")).columns)


def _batch(rows: Sequence[tuple[Any, ...]], names: Sequence[str]) -> Batch:
    return Batch(_ORIGIN, np.arange(1, len(rows) + 1), pl.DataFrame(rows, schema=list(names), orient="row"))


def _names(scripts: Sequence[str], word: str, count: int) -> list[str]:
    """Return ids, one in 25 in another script."""
    return [scripts[n // 25 % len(scripts)].format(n) if n % 25 == 12 else f"{word}-{n}" for n in range(count)]


def _overdispersed(mean: float, random: np.random.Generator) -> int:
    """Draw a count from a geometric distribution: most customers buy little, a few a lot."""
    return int(random.geometric(1 / (1 + mean))) - 1


def _products(source: SyntheticSource, random: np.random.Generator) -> list[Product]:
    """Draw the products, evenly over departments and types; a brand has a level that most of its products have."""
    brand_levels = random.integers(0, len(LEVELS), len(BRANDS))
    brands = [random.choice(len(BRANDS), _BRANDS_PER_DEPARTMENT, replace=False) for _ in range(source.num_clusters)]
    kinds = [len(of_department) for of_department in DEPARTMENTS.values()]
    products = []
    for item in range(source.num_items):
        department = item % source.num_clusters
        brand = int(random.choice(brands[department]))
        level = int(brand_levels[brand] if random.random() < 0.7 else random.integers(len(LEVELS)))
        first, second = random.choice(len(QUALITIES), 2, replace=False).tolist()
        kind = item // source.num_clusters % kinds[department]
        products.append(Product(department, kind, brand, level, (first, second)))
    return products


def _customer(num_departments: int, random: np.random.Generator) -> _Customer:
    """Draw one to three departments of interest and their shares, a price level and two liked qualities."""
    departments = random.choice(num_departments, min(int(random.integers(1, 4)), num_departments), replace=False)
    shares = random.dirichlet(np.full(len(departments), 3.0))
    liked = random.choice(len(QUALITIES), 2, replace=False)
    return _Customer(departments, shares, int(random.integers(len(LEVELS))), liked)


class _Shop:
    """Attributes of the products as arrays, and the purchases of customers.

    Args:
        products: I products.
        num_departments: departments in use.
    """

    def __init__(self, products: Sequence[Product], num_departments: int, random: np.random.Generator) -> None:
        self._departments = np.array([product.department for product in products])
        self._levels = np.array([product.level for product in products])
        self._brands = np.array([product.brand for product in products])
        self._qualities = np.array([product.qualities for product in products])
        numbers = {
            kind: number
            for number, kind in enumerate(
                (d, k) for d, kinds in enumerate(DEPARTMENTS.values()) for k in range(len(kinds))
            )
        }
        self._kinds = np.array([numbers[product.department, product.kind] for product in products])
        self._following = [numbers.get((department, kind + 1)) for department, kind in numbers]
        self._num_departments = num_departments
        ranks = random.permutation(len(products)) + 1
        self._popularity = -_POPULARITY_EXPONENT * np.log(ranks)

    def _taste(self, customer: _Customer, random: np.random.Generator) -> np.ndarray:
        """Return what a customer likes about each product, in log odds; float64 [I]."""
        interest = np.full(self._num_departments, _OTHER_DEPARTMENT)
        interest[customer.departments] = np.log(customer.shares)
        kinds = random.normal(0, _KIND_DEVIATION, len(self._following))
        brands = random.normal(0, _BRAND_DEVIATION, len(BRANDS))
        return (
            interest[self._departments]
            + kinds[self._kinds]
            + brands[self._brands]
            + _OTHER_LEVEL * abs(self._levels - customer.level)
            + _LIKED_QUALITY * np.isin(self._qualities, customer.liked).sum(axis=1)
        )

    def purchases(self, customer: _Customer, count: int, random: np.random.Generator) -> tuple[list[int], list[bool]]:
        """Draw different items, one after the other, and for each whether it is from a department of interest."""
        taste, bought = self._taste(customer, random), list[int]()
        is_bought = np.zeros(len(taste), bool)
        needs = np.zeros(len(self._following))
        for _ in range(count):
            log_odds = self._popularity + (0 if random.random() < _ANYTHING else taste + needs[self._kinds])
            # The largest sum with Gumbel noise is a draw by the odds.
            item = int(np.argmax(np.where(is_bought, -np.inf, log_odds + random.gumbel(size=len(taste)))))
            bought.append(item)
            is_bought[item] = True
            kind = self._kinds[item]
            following = self._following[kind]
            if following is not None and needs[kind] >= 0 and needs[following] == 0:
                needs[following] = _GOES_WITH
            needs[kind] = _HAS_KIND
        return bought, np.isin(self._departments[bought], customer.departments).tolist()
