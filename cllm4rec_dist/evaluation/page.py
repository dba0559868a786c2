"""Contents of the report page, computed from an evaluation for the template: verdicts, tables and fractions."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from cllm4rec_dist.evaluation import per_user
from cllm4rec_dist.evaluation.coverage import CatalogUse, catalog_use, share_of_popular
from cllm4rec_dist.evaluation.per_user import LengthBin, Rival
from cllm4rec_dist.evaluation.results import ResultRow, Results, metric_label

POPULARITY = "Popularity"
"""Name of the baseline that recommends the same popular items to everyone."""
NUM_MOST_RECOMMENDED = 10
_GROUP_TITLES = {"known": "Known users", "new": "New users"}
_PHRASES = {
    "ahead": ("ahead", "of"),
    "level": ("level", "with"),
    "behind": ("behind", ""),
    "too few users": ("too few users to tell", "from"),
}


@dataclass(frozen=True)
class Verdict:
    """The model against the best baseline of each metric, for one group of users.

    Attributes:
        tone: ahead, level or behind; selects the colour.
        rivals: comparison with the best baseline of each metric.
        popularity: comparison with popularity; empty if it is not among the baselines.
    """

    tone: str
    headline: str
    lead: str
    rivals: tuple[Rival, ...]
    popularity: tuple[Rival, ...]


@dataclass(frozen=True)
class Group:
    """A group of users (known or new): verdict, table and bins.

    Attributes:
        title: empty if the evaluation has a single group.
        rows: metrics of the model and the baselines over these users.
        baseline: name of the baseline shown with the model in `bins`; None without baselines.
        bins: the first metric by length of history.
    """

    title: str
    num_users: int
    verdict: Verdict | None
    rows: tuple[ResultRow, ...]
    baseline: str | None
    bins: tuple[LengthBin, ...]


@dataclass(frozen=True)
class MostRecommended:
    """An item that is in many lists; `share` is its fraction of all lists."""

    title: str
    count: int
    share: float


@dataclass(frozen=True)
class CatalogSection:
    """How the lists use the catalog.

    Attributes:
        uses: catalog use by model name.
        training_share: fraction of training interactions with the most popular tenth.
    """

    uses: Mapping[str, CatalogUse]
    training_share: float
    most_recommended: tuple[MostRecommended, ...]


def join_words(words: Sequence[str]) -> str:
    """Join words as in `a`, `a and b`, `a, b and c`."""
    return " and ".join(filter(None, [", ".join(words[:-1]), *words[-1:]]))


def headline(rivals: Sequence[Rival], *, comparable: bool = True) -> tuple[str, str]:
    """Return the verdict as one sentence, and its tone.

    Args:
        rivals: one test for each metric, at least one.
        comparable: False if notes limit the comparison; the tone is then level.
    """
    by_verdict: dict[str, list[Rival]] = {}
    for rival in rivals:
        by_verdict.setdefault(rival.test.verdict, []).append(rival)
    names = {rival.name for rival in rivals}
    whom = names.pop() if len(names) == 1 else "the best baseline"
    parts: list[str] = []
    for verdict, (phrase, preposition) in _PHRASES.items():
        metrics = [metric_label(rival.metric) for rival in by_verdict.get(verdict, [])]
        if metrics:
            object_words = () if parts else (preposition, whom)  # the first part names the baseline
            where = "every metric" if len(metrics) == len(rivals) > 1 else join_words(metrics)
            parts.append(" ".join(filter(None, (phrase, *object_words, "in", where))))
    sentence = ", ".join(parts) + "."
    if not comparable:
        return f"See the warning above; by the metrics alone {sentence}", "level"
    sentence = sentence[0].upper() + sentence[1:]
    verdicts = set(by_verdict)
    tone = "ahead" if "ahead" in verdicts and "behind" not in verdicts else "level"
    return sentence, "behind" if "behind" in verdicts and "ahead" not in verdicts else tone


def lead(rival: Rival, popularity: Rival | None, hidden: str) -> str:
    """Describe the first metric in one sentence.

    Args:
        rival: comparison with the best baseline.
        popularity: comparison with popularity, if that is not the best baseline.
        hidden: description of the held-out items, such as "the items that a user took last".
    """
    kind, _, cutoff = rival.metric.partition("@")
    if kind != "recall":
        ends = "" if popularity is None else f" and {popularity.baseline:.3f} for {popularity.name}"
        return (
            f"{metric_label(rival.metric)} is {rival.model:.3f} for the model, "
            f"{rival.baseline:.3f} for {rival.name}{ends}."
        )
    ends = "" if popularity is None else f", and the {cutoff} most popular items {popularity.baseline:.1%}"
    return (
        f"Of {hidden}, the model's list of {cutoff} held {rival.model:.1%} on average; "
        f"the list of {rival.name}, the best baseline, held {rival.baseline:.1%}{ends}."
    )


def make_verdict(
    users: pl.DataFrame, baselines: pl.DataFrame, metrics: Sequence[str], hidden: str, *, comparable: bool
) -> Verdict | None:
    """Return the verdict for some users; None if no baseline has a value for any of them."""
    best_rivals = [per_user.best_rival(users, baselines, metric) for metric in metrics]
    rivals = tuple(rival for rival in best_rivals if rival is not None)
    if not rivals:
        return None
    over_popularity = [per_user.compare_with(users, baselines, POPULARITY, rival.metric) for rival in rivals]
    others = tuple(rival for rival in over_popularity if rival is not None)
    sentence, tone = headline(rivals, comparable=comparable)
    first = others[0] if others and rivals[0].name != POPULARITY else None
    return Verdict(tone, sentence, lead(rivals[0], first, hidden), rivals, others)


def make_groups(
    users: pl.DataFrame,
    baselines: pl.DataFrame | None,
    results: Results,
    hidden: str,
    parts: pl.DataFrame | None = None,
) -> tuple[Group, ...]:
    """Return the groups of known and new users that the evaluation has.

    Args:
        parts: metrics by user of the LLM alone and of the linear memory alone, as `baselines`.
    """
    present = [group for group in per_user.GROUPS if (users["group"] == group).any()]
    return tuple(
        _make_group(
            _GROUP_TITLES[group] if len(present) > 1 else "",
            per_user.group_of(users, group),
            None if baselines is None else per_user.group_of(baselines, group),
            results,
            hidden,
            None if parts is None else per_user.group_of(parts, group),
        )
        for group in present
    )


def _make_group(
    title: str,
    users: pl.DataFrame,
    baselines: pl.DataFrame | None,
    results: Results,
    hidden: str,
    parts: pl.DataFrame | None,
) -> Group:
    metrics = results.metric_names
    rows, verdict, baseline = [_row(results.rows[0], users, metrics)], None, None
    for row in results.rows[1:]:
        values = baselines if row.baseline else parts
        of_row = None if values is None else values.filter(pl.col("model") == row.name)
        if of_row is not None and len(of_row):
            rows.append(_row(row, of_row, metrics))
    if baselines is not None:
        verdict = make_verdict(users, baselines, metrics, hidden, comparable=not results.notes)
        rival = per_user.best_rival(users, baselines, metrics[0])
        baseline = rival.name if rival is not None else None
    bins = per_user.by_history_length(users, baselines, baseline, metrics[0])
    return Group(title, len(users), verdict, tuple(rows), baseline, tuple(bins))


def _row(row: ResultRow, users: pl.DataFrame, metrics: Sequence[str]) -> ResultRow:
    """A row of the table with means over the given users."""
    means = per_user.means(users, metrics)
    return row.model_copy(
        update={
            "metrics": {name: mean.value for name, mean in means.items()},
            "stderr": {name: mean.stderr for name, mean in means.items()},
        }
    )


def is_of_evaluation(users: pl.DataFrame, row: ResultRow) -> bool:
    """Return True if per-user values have the same means as a row of the table, over all users or over one group."""
    parts = [users, *(per_user.group_of(users, group) for group in per_user.GROUPS)]
    return any(
        means.keys() == row.metrics.keys() and all(abs(means[m].value - row.metrics[m]) < 1e-6 for m in means)
        for means in (per_user.means(part, list(row.metrics)) for part in parts)
    )


def make_catalog(recommended: Mapping[str, pl.DataFrame], items: pl.DataFrame, num_lists: int) -> CatalogSection:
    """Return coverage, popularity and concentration of each model's lists; the first one is the model itself.

    Args:
        recommended: by model name, items and the number of lists that contain them.
        items: item, title and popularity of the whole catalog, by row.
        num_lists: number of lists of the model.
    """
    popularity = items["popularity"].to_numpy()
    counts = {
        name: items.join(listed, on="item", how="left", maintain_order="left")["count"].fill_null(0).to_numpy()
        for name, listed in recommended.items()
    }
    of_model = next(iter(counts.values()))
    order = np.argsort(-of_model.astype(np.int64), kind="stable")[:NUM_MOST_RECOMMENDED]
    titles = items["title"]
    return CatalogSection(
        uses={name: catalog_use(count, popularity) for name, count in counts.items()},
        training_share=share_of_popular(popularity, popularity),
        most_recommended=tuple(
            MostRecommended(titles[int(row)], int(of_model[row]), float(of_model[row] / num_lists))
            for row in order
            if of_model[row]
        ),
    )


def reproduce_commands(run: str, stage: str, split: str, metrics: Sequence[str]) -> list[str]:
    """Return shell commands that repeat the training and the evaluation of a run."""
    return [
        f"cllm4rec {stage} --config {shlex.quote(f'{run}/config.yaml')} output=NEW_RUN",
        f"cllm4rec evaluate NEW_RUN --split {split} --metrics {shlex.quote(','.join(metrics))}",
    ]
