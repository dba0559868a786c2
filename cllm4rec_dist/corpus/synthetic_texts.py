"""Words of the synthetic shop: what products are called, described as and praised for.

A property of a product can be worded in several ways, as in a real shop: titles, descriptions and reviews each draw
their own wording, and none of them names every property. `synthetic.py` draws products and purchases.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DEPARTMENTS: dict[str, tuple[str, ...]] = {
    "coffee": (
        "espresso machine/coffee maker/brewer",
        "coffee grinder/burr mill",
        "milk frother/steam jug",
        "tamper/portafilter",
        "coffee blend/arabica roast",
    ),
    "hiking": (
        "hiking boot/trail shoe",
        "backpack/rucksack",
        "trekking pole/walking stick",
        "water bottle/hydration flask",
        "map case/compass",
    ),
    "music": (
        "acoustic guitar/western guitar/six-string",
        "amplifier/combo amp",
        "effects pedal/stompbox",
        "guitar string/string set",
        "tuner/capo",
    ),
    "kitchen": (
        "chef's knife/cook's blade",
        "cutting board/chopping block",
        "knife sharpener/whetstone",
        "frying pan/skillet",
        "stock pot/casserole",
    ),
    "garden": (
        "greenhouse/cold frame",
        "seed set/vegetable seed mix",
        "potting soil/compost",
        "pruner/garden cutter",
        "watering can/garden hose",
    ),
    "cycling": (
        "road bike/racing bicycle",
        "helmet/head protection",
        "saddle/bike seat",
        "jersey/cycling top",
        "tyre/inner tube",
    ),
    "photography": (
        "camera/mirrorless body",
        "lens/prime/zoom",
        "tripod/camera stand",
        "flash/strobe",
        "camera bag/lens pouch",
    ),
    "games": ("game console/gaming system", "controller/gamepad", "racing game/driving game", "headset", "memory card"),
    "fishing": (
        "fishing rod/angling rod",
        "reel/spinning reel",
        "line/braid",
        "lure/bait set",
        "tackle box/bait case",
    ),
    "knitting": (
        "wool/merino yarn/skein",
        "knitting needle/needle set",
        "crochet hook",
        "pattern book/sweater pattern",
        "stitch marker/row counter",
    ),
    "astronomy": (
        "telescope/refractor/reflector",
        "eyepiece/ocular",
        "star chart/sky atlas",
        "telescope mount/star tracker",
        "moon filter",
    ),
    "yoga": ("yoga mat/exercise mat", "cushion/bolster", "yoga block/cork brick", "strap/stretch band", "incense"),
    "painting": (
        "easel/painting stand",
        "oil paint/oil colour",
        "brush set/paintbrush",
        "canvas/stretched frame",
        "palette/mixing tray",
    ),
    "woodwork": (
        "workbench/joiner's bench",
        "chisel/wood chisel set",
        "hand plane/smoothing plane",
        "mallet/hammer",
        "sandpaper/abrasive sheet",
    ),
    "aquarium": (
        "fish tank/aquarium",
        "filter/pump",
        "aquarium light/tank lamp",
        "water plant/aquatic moss",
        "fish food/flake mix",
    ),
    "tea": (
        "teapot/tea jug",
        "kettle/water boiler",
        "green tea/sencha",
        "black tea/assam/earl grey",
        "tea cup/mug",
    ),
}
"""Product types of each department, most expensive first; a type is followed by what is bought for it (a kettle after
a teapot). Names of one type are divided by `/`."""
QUALITIES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("quiet", "silent", "low-noise"), ("hardly makes a sound", "cannot be heard next door", "lets the baby sleep on")),
    (("compact", "mini", "space-saving"), ("fits into any corner", "takes little room", "can be put away in a drawer")),
    (("sturdy", "rugged", "heavy-duty"), ("will last for years", "survives rough use", "feels solid")),
    (("organic", "recycled", "sustainable"), ("is kind to nature", "comes without plastic", "has a clean conscience")),
    (("light", "featherweight", "ultralight"), ("weighs next to nothing", "is easy to carry", "floats like a feather")),
    (
        ("vintage", "retro", "classic"),
        ("looks like in grandmother's days", "has old-time charm", "never goes out of style"),
    ),
    (("smart", "connected", "digital"), ("works with a phone", "has a clever app", "sets itself up")),
    (("colourful", "bright", "patterned"), ("brings colour into the house", "cheers everybody up", "stands out")),
)
"""Qualities of products: words in titles, and phrases in descriptions and reviews."""
LEVELS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("basic", "starter", "value"), ("costs little", "is good for beginners", "is cheap and does the job")),
    (("standard", "everyday", "regular"), ("is fairly priced", "is right for every day", "offers a good balance")),
    (("professional", "premium", "master"), ("is made for experts", "has the finest finish", "is worth every cent")),
)
"""Price levels, cheapest first: words and phrases as for qualities."""
BRANDS = (
    "Alvero",
    "Brandt",
    "Corvina",
    "Dunmore",
    "Elsing",
    "Farrow",
    "Gilmar",
    "Hartwig",
    "Ilsaro",
    "Jorvik",
    "Kestrel",
    "Lindqvist",
    "Morland",
    "Norrik",
    "Oakes",
    "Pellier",
    "Quarrow",
    "Rosmund",
    "Solveig",
    "Tarn",
    "Umbra",
    "Velden",
    "Wexley",
    "Yarrow",
)
_OPINIONS = (
    ("Very happy with it", "Would buy it again", "Exactly what I needed", "Better than I hoped", "A joy to use"),
    ("Not for me", "I expected more", "It is all right", "Could be better"),
)
_OCCASIONS = ("", "", "Bought it as a gift. ", "Arrived quickly. ", "My second one. ", "After long comparing. ")


@dataclass(frozen=True)
class Product:
    """A product of the shop.

    Attributes:
        department, kind: index of the department and of the type in it.
        brand, level: index of brand and price level.
        qualities: indexes of its two qualities.
    """

    department: int
    kind: int
    brand: int
    level: int
    qualities: tuple[int, int]


def kind_name(department: int, kind: int, random: np.random.Generator) -> str:
    """Draw one of the names of a product type."""
    return pick([*DEPARTMENTS.values()][department][kind].split("/"), random)


def pick(choices: Sequence[str], random: np.random.Generator) -> str:
    """Draw one of some texts."""
    return choices[int(random.integers(len(choices)))]


def title(product: Product, random: np.random.Generator) -> str:
    """Return brand, name and one or two of quality and level, such as `Tarn retro coffee maker`."""
    level, quality = pick(LEVELS[product.level][0], random), pick(QUALITIES[product.qualities[0]][0], random)
    shown = [(quality,), (level,), (level, quality)][int(random.integers(3))]
    return " ".join(filter(None, [BRANDS[product.brand], *shown, kind_name(product.department, product.kind, random)]))


def description(product: Product, random: np.random.Generator) -> str:
    """Return two sentences, or "" for a tenth of the products, as in a real shop."""
    if random.random() < 0.1:
        return ""
    name = kind_name(product.department, product.kind, random)
    first, second = product.qualities
    word, said = pick(QUALITIES[second][0], random), pick(QUALITIES[first][1], random)
    department, level = [*DEPARTMENTS][product.department], pick(LEVELS[product.level][1], random)
    return f"{word.capitalize()} {name} for {department}. {said.capitalize()} and {level}."


def review(product: Product, liked: Sequence[int], is_happy: bool, random: np.random.Generator) -> str:
    """Return what a customer writes: about a quality that the customer likes, or else any, or the price."""
    about = [quality for quality in product.qualities if quality in liked] or [*product.qualities]
    phrases = [QUALITIES[about[int(random.integers(len(about)))]][1], LEVELS[product.level][1]]
    said = pick(phrases[int(random.random() < 0.3)], random)
    name = kind_name(product.department, product.kind, random)
    return f"{pick(_OCCASIONS, random)}{pick(_OPINIONS[not is_happy], random)}: the {name} {said}."


def profile(departments: Sequence[int], liked: Sequence[int], level: int, random: np.random.Generator) -> str:
    """Return a customer's profile: interests, and what products should be like."""
    interests = " and ".join([*DEPARTMENTS][department] for department in departments)
    qualities = " and ".join(pick(QUALITIES[quality][0], random) for quality in liked)
    word = pick(LEVELS[level][0], random)
    return f"Interested in {interests}. Likes things that are {qualities}, and often buys {word} ones."
