"""A synthetic data set with a known structure, for the demo, tests and a first run without a download.

Items belong to clusters of interest (coffee, hiking, ...), whose words are in their titles, descriptions and reviews.
Each cluster has two lines (for example espresso and filter). A user has one to three clusters, and strongly prefers one
line of each. Popularity within a line has a long tail. So personalized recommendations can be much better than popular
items, and texts have information about cold items that interactions lack.

Some ids are in scripts other than Latin, as in real data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl

from cllm4rec_dist.corpus.raw import InteractionCollector, RawData, Rules
from cllm4rec_dist.corpus.recipe import SyntheticSource
from cllm4rec_dist.corpus.row_batch import Batch
from cllm4rec_dist.corpus.skips import SkipLog

_TOPICS: dict[str, tuple[str, str]] = {
    "coffee": ("espresso crema portafilter tamper grinder milk steam", "filter pour kettle scale dripper beans aroma"),
    "hiking": ("trail boots summit ridge backpack map compass", "camp tent stove lantern sleeping hammock fire"),
    "music": ("guitar strings pick amplifier pedal chord fret", "piano keys sheet sonata bench metronome scale"),
    "kitchen": ("knife steel blade cutting sharpener chef onion", "oven bread flour yeast dough tin sourdough"),
    "garden": ("rose soil compost pruner trowel bloom petal", "tomato seed greenhouse harvest basil pepper sprout"),
    "cycling": ("road helmet carbon saddle cadence sprint jersey", "mountain fork tyre mud descent suspension grip"),
    "photography": ("lens portrait aperture studio flash backdrop", "landscape tripod sunset filter horizon panorama"),
    "games": ("board dice strategy castle merchant card tile", "console controller level boss arcade pixel joystick"),
    "fishing": ("river fly trout rod wader cast stream", "sea boat reel tackle mackerel bait harbour"),
    "knitting": ("wool needle scarf yarn cable mitten sweater", "cotton crochet hook lace blanket pattern doily"),
    "astronomy": ("telescope planet eyepiece saturn orbit crater", "nebula camera galaxy constellation comet"),
    "yoga": ("mat stretch balance pose breath block flow", "meditation cushion incense silence candle bell calm"),
    "painting": ("oil canvas easel palette brush varnish linseed", "watercolour paper pigment wash sketch postcard"),
    "woodwork": ("chisel plane joint oak bench mallet dovetail", "lathe bowl turning maple gouge sandpaper finish"),
    "aquarium": ("reef coral clownfish saltwater pump anemone skimmer", "tetra plant driftwood freshwater moss gravel"),
    "tea": ("green matcha whisk leaf sencha bamboo ceremony", "black assam pot lemon earl saucer biscuit"),
}
_QUALITIES = ("classic", "compact", "deluxe", "everyday", "light", "modern", "sturdy", "vintage")
_OPINIONS = (
    "better than I hoped",
    "worth its price",
    "a joy to use",
    "exactly what I needed",
    "well made",
    "good value",
)
_USER_SCRIPTS = ("用户-{}", "пользователь-{}", "مستخدم-{}", "उपयोगकर्ता-{}")
_ITEM_SCRIPTS = ("товар-{}", "商品-{}", "상품-{}", "προϊόν-{}")
_FEWEST_ITEMS = 5
_OTHER_LINE = 0.15
_ANYTHING = 0.03
_FIRST_DAY = 1_600_000_000
_ORIGIN = "synthetic data"


def generate(source: SyntheticSource) -> RawData:
    """Generate users and items with texts, and interactions with ratings, times and reviews.

    Equal configurations give equal data on every machine.
    """
    random = np.random.default_rng(source.seed)
    clusters = np.arange(source.num_items) % source.num_clusters
    lines = np.arange(source.num_items) // source.num_clusters % 2
    weights = _popularity(clusters * 2 + lines, random)
    users = _names(_USER_SCRIPTS, "user", source.num_users)
    items = _names(_ITEM_SCRIPTS, "item", source.num_items)
    words = [_line_words(cluster, line) for cluster, line in zip(clusters.tolist(), lines.tolist(), strict=True)]
    profiles, rows = [], []
    for user in users:
        tastes = _tastes(source.num_clusters, random)
        profiles.append((user, _profile(tastes, random)))
        chances = np.full(source.num_items, _ANYTHING / source.num_items)
        for cluster, line, weight in tastes:
            in_line = np.where(lines == line, 1 - _OTHER_LINE, _OTHER_LINE) * weights * (clusters == cluster)
            chances += weight * in_line / in_line.sum()
        chosen = _choose(chances, source.mean_interactions, random)
        times = _FIRST_DAY + np.sort(random.integers(0, 365 * 86_400, len(chosen)))
        liked = {cluster for cluster, _, _ in tastes}
        for item, time in zip(chosen, times, strict=True):
            rating = float(random.integers(4, 6) if clusters[item] in liked else random.integers(2, 5))
            rows.append((user, items[item], rating, float(time), _review(words[item], random)))
    collector = InteractionCollector(SkipLog(), Rules(has_rating=True, has_text=True))
    collector.add_file(_ORIGIN, [_batch(rows, ("user", "item", "rating", "timestamp", "text"))])
    raw = collector.finish()
    described = [(item, _title(words[j], random), _description(words[j], random)) for j, item in enumerate(items)]
    used_items, used_users = set(raw.item_ids), set(raw.user_ids)
    described = [row for row in described if row[0] in used_items]
    return replace(
        raw,
        items=_batch(described, ("item", "title", "description")).columns,
        users=_batch([row for row in profiles if row[0] in used_users], ("user", "text")).columns,
    )


def _batch(rows: Sequence[tuple[Any, ...]], names: Sequence[str]) -> Batch:
    return Batch(_ORIGIN, np.arange(1, len(rows) + 1), pl.DataFrame(rows, schema=list(names), orient="row"))


def _names(scripts: Sequence[str], word: str, count: int) -> list[str]:
    """Return ids, one in 25 in another script."""
    return [scripts[n // 25 % len(scripts)].format(n) if n % 25 == 12 else f"{word}-{n}" for n in range(count)]


def _line_words(cluster: int, line: int) -> tuple[str, ...]:
    """Return the cluster's name and the words of the line."""
    topic = list(_TOPICS)[cluster]
    return topic, *_TOPICS[topic][line].split()


def _popularity(groups: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Return the weight of each item: 1 / rank^0.7, with random ranks in each group."""
    weights = np.empty(len(groups))
    for group in np.unique(groups):
        members = np.flatnonzero(groups == group)
        weights[random.permutation(members)] = 1 / np.arange(1, len(members) + 1) ** 0.7
    return weights


def _tastes(num_clusters: int, random: np.random.Generator) -> list[tuple[int, int, float]]:
    """Draw cluster, preferred line and weight of a user's one to three interests."""
    chosen = random.choice(num_clusters, min(int(random.integers(1, 4)), num_clusters), replace=False)
    weights = random.dirichlet(np.full(len(chosen), 3.0))
    return [
        (int(cluster), int(random.integers(2)), float(weight)) for cluster, weight in zip(chosen, weights, strict=True)
    ]


def _choose(chances: np.ndarray, mean: float, random: np.random.Generator) -> np.ndarray:
    """Draw unique items by their weights without replacement; at least five."""
    count = min(_FEWEST_ITEMS + int(random.poisson(mean - _FEWEST_ITEMS)), len(chances))
    # Sorting log weights with Gumbel noise is sampling without replacement.
    return np.argsort(-(np.log(chances) + random.gumbel(size=len(chances))))[:count]


def _pick(words: Sequence[str], count: int, random: np.random.Generator) -> list[str]:
    return [words[index] for index in random.permutation(len(words))[:count]]


def _title(words: Sequence[str], random: np.random.Generator) -> str:
    topic, *rest = words
    return " ".join([*_pick(_QUALITIES, 1, random), *_pick(rest, 2, random), f"for {topic}"]).capitalize()


def _description(words: Sequence[str], random: np.random.Generator) -> str:
    topic, *rest = words
    first, second, third = _pick(rest, 3, random)
    return f"Made for people who love {topic}: goes well with {first}, {second} and {third}."


def _review(words: Sequence[str], random: np.random.Generator) -> str:
    topic, *rest = words
    first, second = _pick(rest, 2, random)
    (opinion,) = _pick(_OPINIONS, 1, random)
    return f"I wanted it for the {first} and the {second}. For {topic} it is {opinion}."


def _profile(tastes: list[tuple[int, int, float]], random: np.random.Generator) -> str:
    def interest(cluster: int, line: int) -> str:
        topic, *rest = _line_words(cluster, line)
        return f"{topic} ({' and '.join(_pick(rest, 2, random))})"

    return "Spends free time on " + ", ".join(interest(cluster, line) for cluster, line, _ in tastes) + "."
