"""Formatting of numbers, times and terms on the report page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import datetime
from pathlib import PurePosixPath
from typing import Any

from cllm4rec_dist.corpus.manifest import Manifest
from cllm4rec_dist.corpus.split_settings import ColdItemsSplit, GivenSplit, LastSplit, RandomSplit, UsersSplit
from cllm4rec_dist.evaluation.metrics import parse_metric
from cllm4rec_dist.evaluation.results import LINEAR_ALONE, LLM_ALONE, metric_label
from cllm4rec_dist.suggestions import plural

_MODELS = {
    LLM_ALONE: "The model's ranking by the language model's score alone, without the linear memory.",
    LINEAR_ALONE: "The ranking by the linear memory alone: each item is predicted from its most related items by a"
    " ridge regression on interactions and words of titles, without a language model.",
    "Popularity": "The items with the most interactions, the same for everyone, without those a user already has.",
    "EASE": "A linear model that learns from interactions how strongly each item predicts each other item.",
    "EASE + titles": "EASE that also uses the words of titles and descriptions, as the model does.",
    "Sparse EASE + titles": "The same, but each item is predicted from its most related items alone.",
    "iALS": "Matrix factorization: each user and each item is a short vector, fitted to the interactions.",
}


def share(value: float) -> str:
    """Format 0.659 as `65.9%`."""
    return f"{value:.1%}"


def signed(value: float) -> str:
    """Format -0.0412 as `−0.0412`, with a sign unless it is zero."""
    shown = f"{abs(value):.4f}"
    if float(shown) == 0:
        return shown
    return f"{'+' if value > 0 else '−'}{shown}"


def p_value(value: float) -> str:
    """Format as `p = 0.012` or `p < 0.001`."""
    return "p < 0.001" if value < 0.001 else f"p = {value:.3f}"


def short_count(count: int) -> str:
    """Format 1234 as `1.23K` and 7_000_000_000 as `7B`."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def duration(seconds: float) -> str:
    """Format as `48 s`, `3 min 5 s`, `2 h 10 min` or `3 d 4 h`."""
    whole = round(seconds)
    for size, unit, smaller, name in ((86400, "d", 3600, "h"), (3600, "h", 60, "min"), (60, "min", 1, "s")):
        if whole >= size:
            rest = whole % size // smaller
            return f"{whole // size} {unit}" + (f" {rest} {name}" if rest else "")
    return f"{whole} s" if seconds >= 1 or seconds == 0 else "under 1 s"


def backbone_name(backbone: str) -> str:
    """Return a hub id unchanged, and the last part of a folder's path."""
    is_folder = backbone.count("/") != 1 or backbone.startswith(("/", ".", "~"))
    return PurePosixPath(backbone).name if is_folder else backbone


def date(iso: str) -> str:
    """Format `2026-11-26T03:20:11+00:00` as `26 November 2026, 03:20 UTC`."""
    moment = datetime.fromisoformat(iso)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def setting(value: float | str) -> str:
    """Format 200.0 as `200`."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def meaning(metric: str) -> str:
    """Explain a metric to readers who do not know it."""
    parsed = parse_metric(metric)
    if parsed.kind == "recall":
        return (
            f"Of a user's items that were hidden from the model, the fraction that is in the list of {parsed.cutoff} "
            f"recommendations; the mean over users. A user with more than {parsed.cutoff} such items counts as if "
            f"there were {parsed.cutoff}, so that a perfect list has 100%."
        )
    return (
        f"As recall, but the rank counts: a hidden item is worth most at the top of the list and less further down, to "
        f"rank {parsed.cutoff}. 1 means that all of them are at the top."
    )


def short_meaning(metric: str) -> str:
    """Explain a metric in a few words."""
    parsed = parse_metric(metric)
    if parsed.kind == "recall":
        return f"of what users took was in the list of {parsed.cutoff}"
    return f"of the best possible order in the list of {parsed.cutoff}"


def meanings_of_models(names: Sequence[str]) -> list[tuple[str, str]]:
    """Return names and explanations of the baselines and parts of the model among the models of a table."""
    return [(name, _MODELS[name]) for name in names if name in _MODELS]


def split_text(split: object) -> str:
    """Describe how the held-out items were chosen."""
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
    if isinstance(split, ColdItemsSplit):
        return (
            f"whole items: {split.test_items:.0%} for the test, {split.valid_items:.0%} for validation; of the others "
            f"{split_text(split.of_other_items())}"
        )
    return "as the data set gives it" if isinstance(split, GivenSplit) else str(getattr(split, "kind", split))


def hidden_items(manifest: Manifest | None) -> str:
    """Describe the held-out items, as a phrase that follows `of`."""
    if manifest is not None and isinstance(manifest.preparation.split, LastSplit):
        return "the items that a user took last"
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
