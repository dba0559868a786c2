"""Numbers, times and terms as the report page writes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from cllm4rec_dist.corpus.manifest import Manifest
from cllm4rec_dist.corpus.recipe import GivenSplit, LastSplit, RandomSplit, UsersSplit
from cllm4rec_dist.evaluation.metrics import parse_metric
from cllm4rec_dist.evaluation.results import metric_label

_BASELINES = {
    "Popularity": "The same list for everyone: the items with the most interactions, without those a user has.",
    "EASE": "A linear model that learns from interactions alone how much an item speaks for each other one.",
    "EASE + titles": "The same with the words of titles and descriptions, so that it sees the texts as the model does.",
    "iALS": "Matrix factorization: each user and each item is a short vector, fitted to the interactions.",
}


def share(value: float) -> str:
    """0.659 -> `65.9%`."""
    return f"{value:.1%}"


def signed(value: float) -> str:
    """-0.0412 -> `−0.0412`, with a sign in any case but zero."""
    shown = f"{abs(value):.4f}"
    if float(shown) == 0:
        return shown
    return f"{'+' if value > 0 else '−'}{shown}"


def p_value(value: float) -> str:
    """`p = 0.012`, `p < 0.001`."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def plural(count: int, noun: str) -> str:
    """`1 rank`, `2 ranks`."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def short_count(count: int) -> str:
    """1234 -> `1.23K`, 7_000_000_000 -> `7B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def duration(seconds: float) -> str:
    """`48 s`, `3 min 5 s`, `2 h 10 min`, `3 d 4 h`."""
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {name}" if rest else "")
    return f"{whole} s" if seconds >= 1 or seconds == 0 else "under 1 s"


def backbone_name(backbone: str) -> str:
    """A hub id as it is, of a folder the last part."""
    is_folder = backbone.count("/") != 1 or backbone.startswith(("/", ".", "~"))
    return PurePosixPath(backbone).name if is_folder else backbone


def date(iso: str) -> str:
    """`2026-11-26T03:20:11+00:00` -> `26 November 2026, 03:20 UTC`."""
    moment = datetime.fromisoformat(iso)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def setting(value: float | str) -> str:
    """200.0 -> `200`."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def meaning(metric: str) -> str:
    """A metric for somebody who runs a business and not an experiment."""
    parsed = parse_metric(metric)
    if parsed.kind == "recall":
        return (
            f"Of the items that a user took and the model was not shown, the share that is in the list of "
            f"{parsed.cutoff} recommendations; the mean over users. A user with more than {parsed.cutoff} such items "
            f"counts as if there were {parsed.cutoff}, so that a perfect list has 100%."
        )
    return (
        f"As recall, but the place counts: an item that a user took is worth most at the top of the list and less "
        f"further down, to place {parsed.cutoff}. 1 means that all of them are at the top."
    )


def short_meaning(metric: str) -> str:
    """A metric in a few words."""
    parsed = parse_metric(metric)
    if parsed.kind == "recall":
        return f"of what users took was in the list of {parsed.cutoff}"
    return f"of the best possible order in the list of {parsed.cutoff}"


def meanings_of_baselines(names: Sequence[str]) -> list[tuple[str, str]]:
    """Name and meaning of the baselines that are known, of the models in a table."""
    return [(name, _BASELINES[name]) for name in names if name in _BASELINES]


def split_text(split: object) -> str:
    """How the held-out items were chosen."""
    if isinstance(split, LastSplit):
        return f"last in time: {plural(split.num_test, 'item')} for the test, {split.num_valid:,} for validation"
    if isinstance(split, RandomSplit):
        return f"random: {split.test:.0%} of a user's items for the test, {split.valid:.0%} for validation"
    if isinstance(split, UsersSplit):
        return (
            f"whole users: {split.test_users:.0%} for the test, {split.valid_users:.0%} for validation, "
            f"{split.held_out:.0%} of their items to be predicted; of the others random: {split.test:.0%} and "
            f"{split.valid:.0%} of a user's items"
        )
    return "as the data set gives it" if isinstance(split, GivenSplit) else str(getattr(split, "kind", split))


def hidden_items(manifest: Manifest | None) -> str:
    """What the held-out items are, in words that follow `of`."""
    if manifest is not None and isinstance(manifest.preparation.split, LastSplit):
        return "the items that a user took next"
    return "the items that a user took and the model was not shown"


FILTERS: dict[str, Callable[..., Any]] = {
    "share": share,
    "signed": signed,
    "p_value": p_value,
    "date": date,
    "setting": setting,
    "metric": metric_label,
    "meaning": meaning,
    "short_meaning": short_meaning,
}
