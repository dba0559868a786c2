"""What one evaluation found: `results.json`, and the same as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import Field, FiniteFloat, NonNegativeFloat, PositiveInt

from cllm4rec_dist.config import StrictModel


def metric_label(name: str) -> str:
    """`recall@20` -> `Recall@20`, `ndcg@100` -> `NDCG@100`."""
    return name.replace("recall", "Recall").replace("ndcg", "NDCG")


class Provenance(StrictModel):
    """Which model was evaluated, when and on what."""

    date: str
    """When the evaluation ended, ISO 8601 in UTC, to the second."""
    checkpoint: str
    """Name of the checkpoint, such as best-00000010."""
    step: int
    """Completed optimizer steps of the checkpoint."""
    stage: str
    """pretrain or finetune."""
    best_metric: str | None = None
    """Validation metric that the best checkpoint was chosen by; None where the run never validated."""
    best_value: FiniteFloat | None = None
    """Its value."""
    best_step: int | None = None
    """The step that it was reached at; another one than `step` where a checkpoint was chosen by hand."""
    num_trained: int
    """Trained parameters: embeddings, adapters or the whole backbone, head."""
    num_frozen: int
    """Frozen parameters."""
    device: str
    """The kind of GPU, or `CPU`, of the evaluation."""
    num_ranks: PositiveInt
    """Ranks of the evaluation."""
    num_training_ranks: PositiveInt
    """Ranks that wrote the checkpoint."""


class ResultRow(StrictModel):
    """One line of the table: a model or a baseline."""

    name: str
    """Name as it is shown."""
    metrics: dict[str, FiniteFloat]
    """Mean of every metric over users."""
    stderr: dict[str, NonNegativeFloat] = Field(default_factory=dict)
    """Standard error of every metric."""
    chosen: dict[str, float | str] = Field(default_factory=dict)
    """Hyper-parameters that validation chose."""
    baseline: bool = False
    """Whether this is what the model is compared against."""


class GroupResults(StrictModel):
    """The same table over a group of users."""

    group: Literal["known", "new"]
    """Users who have a row, or who have none."""
    num_users: PositiveInt
    """Users evaluated."""
    rows: tuple[ResultRow, ...] = Field(min_length=1)
    """Models and baselines in the order of the whole table."""


class Results(StrictModel):
    """What one evaluation found; `results.json` is this, as JSON."""

    schema_version: Literal[1] = 1
    """Version of this layout."""
    dataset: str
    """Name of the data set."""
    rows: tuple[ResultRow, ...] = Field(min_length=1)
    """Models and baselines over all users; the first row gives the order of the metrics."""
    groups: tuple[GroupResults, ...] = ()
    """The same for known and for new users, where there are both."""
    num_users: PositiveInt
    """Users evaluated."""
    seconds: NonNegativeFloat
    """Wall time of the evaluation."""
    config: dict[str, Any] = Field(default_factory=dict)
    """Resolved configuration of the run."""
    fingerprints: dict[str, str] = Field(default_factory=dict)
    """Name -> fingerprint of the checkpoint, corpus and tokenizer."""
    skipped: dict[str, int | str] = Field(default_factory=dict)
    """Reason -> how much data was left out for it."""
    provenance: Provenance | None = None
    """Which model this is about; None where an earlier version wrote the evaluation."""
    notes: tuple[str, ...] = ()
    """What a reader must know before comparing the model's figures, such as a leak."""

    @property
    def metric_names(self) -> list[str]:
        return list(dict.fromkeys(name for row in self.rows for name in row.metrics))


@dataclass(frozen=True)
class RecommendedItem:
    """A recommended title and whether the user took the item in the held-out data."""

    title: str
    hit: bool = False


@dataclass(frozen=True)
class ExampleRecommendation:
    """What a user had (titles), what the model recommends, best first, and how many items were held out."""

    user: str
    history: Sequence[str]
    recommended: Sequence[RecommendedItem]
    num_held_out: int


def _best_values(rows: Sequence[ResultRow], metric_names: Sequence[str]) -> dict[str, float]:
    """The best of each metric, rounded as shown: rows that look equal are equally best."""
    return {name: max(round(row.metrics[name], 4) for row in rows if name in row.metrics) for name in metric_names}


def markdown_table(results: Results) -> str:
    """Models as rows, metrics as columns, `mean ± standard error`, the best of each column in bold; notes below.

    Where there are groups of users, a table of each follows that of all.
    """
    table = _table(results.rows, results.metric_names)
    if results.groups:
        table = f"**All users** ({results.num_users:,})\n\n{table}"
    for found in results.groups:
        table += f"\n**{found.group.capitalize()} users** ({found.num_users:,})\n\n"
        table += _table(found.rows, results.metric_names)
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
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
