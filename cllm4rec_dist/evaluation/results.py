"""Results of one evaluation: `results.json` and a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Self

from pydantic import Field, FiniteFloat, NonNegativeFloat, PositiveInt

from cllm4rec_dist.config import StrictModel


def metric_label(name: str) -> str:
    """Return `Recall@20` for `recall@20` and `NDCG@100` for `ndcg@100`."""
    return name.replace("recall", "Recall").replace("ndcg", "NDCG")


MODEL = "CLLM4Rec"
"""Name of the evaluated model in tables."""
LLM_ALONE, LINEAR_ALONE = "CLLM4Rec (LLM alone)", "Linear memory alone"
"""Names of its parts, if it has a linear memory."""


class Provenance(StrictModel):
    """The evaluated model, and time and hardware of the evaluation."""

    date: str
    """When the evaluation ended, ISO 8601 in UTC, to the second."""
    checkpoint: str
    """Name of the checkpoint, such as best-00000010."""
    step: int
    """Completed optimizer steps of the checkpoint."""
    stage: str
    """pretrain or finetune."""
    best_metric: str | None = None
    """Validation metric that selected the best checkpoint; None if the run never validated."""
    best_value: FiniteFloat | None = None
    """Best value of that metric."""
    best_step: int | None = None
    """Step of the best value; differs from `step` if another checkpoint was given."""
    num_trained: int
    """Trained parameters: embeddings, adapters or the whole backbone, head."""
    num_frozen: int
    """Frozen parameters."""
    device: str
    """Name of the GPU, or `CPU`, of the evaluation."""
    num_ranks: PositiveInt
    """Number of ranks of the evaluation."""
    num_training_ranks: PositiveInt
    """Number of ranks that wrote the checkpoint."""


class ResultRow(StrictModel):
    """One line of the table: a model or a baseline."""

    name: str
    """Name shown in tables."""
    metrics: dict[str, FiniteFloat]
    """Mean of every metric over users."""
    stderr: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Standard error of every metric."""
    chosen: dict[str, float | str] = Field(default_factory=dict)
    """Hyper-parameters that validation selected."""
    baseline: bool = False
    """True for a baseline."""
    cannot_rank: bool = False
    """True if it gives nearly every user's candidates equal scores. It has no metrics then: they would be those of the
    order of the rows."""

    def without_metrics(self) -> Self:
        """Return the row of a model that cannot rank the candidates."""
        return self.model_copy(update={"metrics": {}, "stderr": {}, "cannot_rank": True})


class GroupResults(StrictModel):
    """Results over one group of users."""

    group: Literal["known", "new"]
    """Users with a row, or without one."""
    num_users: PositiveInt
    """Number of evaluated users."""
    rows: tuple[ResultRow, ...] = Field(min_length=1)
    """Models and baselines, in the order of `Results.rows`."""


class ItemGroupResults(StrictModel):
    """Results over one group of held-out items."""

    group: str
    """Which items are held out, and among which they are ranked."""
    num_users: PositiveInt
    """Number of users with held-out items of the group."""
    rows: tuple[ResultRow, ...] = Field(min_length=1)
    """The model, its baselines and text neighbours."""


class Results(StrictModel):
    """Contents of `results.json`."""

    schema_version: Literal[1] = 1
    """Version of this file's format."""
    dataset: str
    """Name of the data set."""
    rows: tuple[ResultRow, ...] = Field(min_length=1)
    """Models and baselines over all users; the first row gives the order of the metrics."""
    groups: tuple[GroupResults, ...] = ()
    """Results for known and for new users, if there are both."""
    item_groups: tuple[ItemGroupResults, ...] = ()
    """Results for warm and for cold items, if the split holds out whole items."""
    num_users: PositiveInt
    """Number of evaluated users."""
    seconds: NonNegativeFloat
    """Wall time of the evaluation."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Resolved configuration of the run."""
    fingerprints: dict[str, str] = Field(default_factory=dict)
    """Name -> fingerprint of backbone, corpus and tokenizer."""
    skipped: dict[str, int | str] = Field(default_factory=dict)
    """Reason -> amount of data that was left out for it."""
    provenance: Provenance | None = None
    """The evaluated model; None if an earlier version wrote the evaluation."""
    baselines_left_out: dict[str, str] = Field(default_factory=dict)
    """Name of a baseline that could not be fitted -> the reason."""
    notes: tuple[str, ...] = ()
    """Caveats for comparing the model's metrics, such as a leak."""

    @property
    def metric_names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row.metrics))


@dataclass(frozen=True)
class RecommendedItem:
    """Title of a recommended item; `hit` is True if it is a held-out item of the user."""

    title: str
    hit: bool = False


@dataclass(frozen=True)
class ExampleRecommendation:
    """Titles of a user's history, the model's recommendations, best first, and the number of held-out items."""

    user: str
    history: Sequence[str]
    recommended: Sequence[RecommendedItem]
    num_held_out: int


def _best_values(rows: Sequence[ResultRow], metric_names: Sequence[str]) -> dict[str, float]:
    """Return the best value of each metric, rounded as shown: rows that look equal are equally best."""
    return {
        name: max((round(row.metrics[name], 4) for row in rows if name in row.metrics), default=0.0)
        for name in metric_names
    }


def cannot_rank_note(rows: Sequence[ResultRow]) -> str:
    """Return a sentence about the models of a table that cannot rank the candidates; empty if all can."""
    names = ", ".join(row.name for row in rows if row.cannot_rank)
    return names and f"{names}: cannot rank these items, because all of a user's candidates have the same score."


def markdown_table(results: Results) -> str:
    """Format a table with models as rows and metrics as columns, `mean ± standard error`, the best in bold; then notes.

    If there are groups of users or items, their tables follow that of all.
    """
    table = _table(results.rows, results.metric_names)
    if results.groups or results.item_groups:
        table = f"**All users** ({results.num_users:,})\n\n{table}"
    for group in results.groups:
        table += f"\n**{group.group.capitalize()} users** ({group.num_users:,})\n\n"
        table += _table(group.rows, results.metric_names)
    for items in results.item_groups:
        table += f"\n**{items.group}** ({items.num_users:,} users)\n\n"
        table += _table(items.rows, results.metric_names)
    table += "".join(f"\n{name} is left out: {reason}.\n" for name, reason in results.baselines_left_out.items())
    return table + "".join(f"\n**{note}**\n" for note in results.notes)


def _table(rows: Sequence[ResultRow], metric_names: Sequence[str]) -> str:
    best = _best_values(rows, metric_names)

    def cell(row: ResultRow, name: str) -> str:
        if name not in row.metrics:
            return "–"
        value = f"{row.metrics[name]:.4f}"
        shown = f"**{value}**" if round(row.metrics[name], 4) == best[name] else value
        return f"{shown} ± {row.stderr[name]:.4f}" if name in row.stderr else shown

    lines = [["Model", *map(metric_label, best)], ["---", *("---:" for _ in best)]]
    for row in rows:
        name = " ".join(row.name.split()).replace("|", "\\|")
        lines.append([name, *(cell(row, metric) for metric in best)])
    note = cannot_rank_note(rows)
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + (f"\n{note}\n" if note else "")
