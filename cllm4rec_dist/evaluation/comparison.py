"""Comparison of an evaluated model with the baselines on the same split, as one report."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import polars as pl
import pyarrow as pa
import scipy.sparse as sp

from cllm4rec_dist.checkpointing.run_folder import EVALUATION_FILE, METRICS_FILE
from cllm4rec_dist.corpus.heldout import KNOWN, NEW, Group, HeldOutUsers
from cllm4rec_dist.corpus.ragged import Ragged
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.views import interaction_matrix, texts_of_table
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.evaluation.baseline_config import BaselineConfig
from cllm4rec_dist.evaluation.baseline_models import select_baselines
from cllm4rec_dist.evaluation.baseline_names import LABELS, BaselineName
from cllm4rec_dist.evaluation.baselines import BaselineResult, run_baselines
from cllm4rec_dist.evaluation.files import BASELINES_FILE, BASELINES_RECOMMENDED_FILE
from cllm4rec_dist.evaluation.group_baselines import group_rows
from cllm4rec_dist.evaluation.item_groups import cannot_rank, item_groups
from cllm4rec_dist.evaluation.metrics import mean_metrics
from cllm4rec_dist.evaluation.report import Background, write_report
from cllm4rec_dist.evaluation.results import (
    MODEL,
    ExampleRecommendation,
    GroupResults,
    ItemGroupResults,
    RecommendedItem,
    ResultRow,
    Results,
    markdown_table,
)
from cllm4rec_dist.evaluation.split_data import SplitData


def compare(
    folder: Path,
    metrics: Sequence[str],
    *,
    baselines: Sequence[BaselineName],
    seconds: float,
    settings: BaselineConfig | None = None,
) -> str:
    """Fit the baselines, write results, plots and report into `folder`, and return the table as Markdown.

    Args:
        folder: folder with `evaluation.json`, written by `inference.evaluate_run`.
        baselines: names of the baselines to fit; may be empty.
        seconds: duration of the evaluation.
        settings: grids and limits of the baselines, whose own names are not used; None for the defaults.

    Raises:
        DataError: if `folder` has no evaluation.
    """
    try:
        evaluated: dict[str, Any] = json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(str(folder), EVALUATION_FILE, f"cannot be read ({error})", "Evaluate a run first.") from error
    config = evaluated["config"]
    corpus = Corpus.open(config["corpus"], verify=False)
    items = corpus.items()
    splits = _Splits.of(corpus, evaluated["split"], evaluated.get("sample"))
    users, data = splits.users, splits.data(texts_of_table(items)) if baselines else None
    settings = settings or BaselineConfig()
    fitted, left_out = _fit_baselines(data, metrics, settings.model_copy(update={"names": tuple(baselines)}))
    if fitted:
        _write_values(fitted, users.ids(corpus), users, items, metrics, folder)
    rows = _model_rows(evaluated)
    rows += [_baseline_row(baseline, metrics) for baseline in fitted]
    results = Results(
        dataset=f"{corpus.manifest.name} ({evaluated['split']})",
        rows=tuple(rows),
        groups=_groups(evaluated, fitted, users, metrics),
        item_groups=_item_groups(evaluated, corpus, data, fitted, metrics, settings),
        num_users=evaluated["num_users"],
        seconds=seconds,
        config=config,
        fingerprints=evaluated["fingerprints"],
        provenance=evaluated.get("provenance"),
        notes=tuple(evaluated["notes"]),
        baselines_left_out={LABELS[name]: reason for name, reason in left_out.items()},
        skipped={reason: entry.count for reason, entry in corpus.manifest.skipped.items()},
    )
    background = Background(
        run=_relative_path(evaluated["run"]),
        split=evaluated["split"],
        manifest=corpus.manifest,
        items=_items(items, splits.popularity),
        examples=[_example(e) for e in evaluated["examples"]],
        share_with_hit=evaluated["share_with_hit"],
        metrics_files=_logs(evaluated),
    )
    write_report(folder, results, background)
    return markdown_table(results) + f"\n\nReport: {os.path.relpath(folder / 'report.html')}"


def _relative_path(path: str) -> str:
    """Return a path relative to the current folder if it is below it; other paths and URLs unchanged."""
    here = Path.cwd()
    return str(Path(path).relative_to(here)) if Path(path).is_relative_to(here) else path


def _logs(evaluated: dict[str, Any]) -> list[Path]:
    """Find the training logs of the run that this one started from and of this one, which may have been moved."""
    config = evaluated["config"]
    initial, current, original = (
        Path(run) / METRICS_FILE if run else None for run in (config["init_from"], evaluated["run"], config["output"])
    )
    latest = current if current is not None and current.is_file() else original
    return [log for log in (initial, latest) if log is not None and log.is_file()]


def _items(table: pa.Table, popularity: np.ndarray) -> pl.DataFrame:
    """Return item, title (or its id) and number of training interactions of the whole catalog, by row."""
    items = pl.DataFrame({"item": table["item"].to_pylist(), "title": table["title"].to_pylist()})
    title = pl.when(pl.col("title").fill_null("") == "").then("item").otherwise("title").alias("title")
    return items.with_columns(title, pl.Series("popularity", popularity))


def _fit_baselines(
    data: SplitData | None, metrics: Sequence[str], config: BaselineConfig
) -> tuple[list[BaselineResult], dict[BaselineName, str]]:
    """Return the results of the baselines that can run, and the reasons for leaving out others."""
    if data is None:
        return [], {}
    return run_baselines(data, metrics, config), select_baselines(data, config)[1]


@dataclass(frozen=True)
class _Splits:
    """What is read of the interactions of a corpus, each split once.

    Attributes:
        train: items of each known user.
        new_histories: items of each new user.
        valid, users: users with held-out items in validation and in the evaluated split, or a sample of each.
    """

    num_items: int
    train: Ragged
    new_histories: Ragged
    valid: HeldOutUsers
    users: HeldOutUsers

    @classmethod
    def of(cls, corpus: Corpus, split: str, num_users: int | None) -> Self:
        """Read a corpus.

        Args:
            num_users: size of a sample of the users with held-out items; None for all of them.
        """
        names = dict.fromkeys(("train", "valid", split))
        known = dict(zip(names, corpus.splits([*names]), strict=True))
        of_new = ("history", "valid", split)
        new = dict(zip(of_new, corpus.new_user_splits(of_new), strict=True))
        by_split = {
            name: HeldOutUsers.among((known[name], known["train"]), (new[name], new["history"]), num_users=num_users)
            for name in ("valid", split)
        }
        return cls(corpus.num_items, known["train"], new["history"], by_split["valid"], by_split[split])

    @property
    def popularity(self) -> np.ndarray:
        """Number of training interactions of each item, int64 [I]."""
        return np.bincount(self.train.values, minlength=self.num_items)

    def data(self, item_texts: list[str]) -> SplitData:
        """Return the matrices of known and new users on which baselines are fitted and evaluated."""
        return SplitData(
            train=interaction_matrix(self.train, self.num_items),
            valid=self._held_out(self.valid),
            test=self._held_out(self.users),
            item_texts=item_texts,
            new_histories=interaction_matrix(self.new_histories, self.num_items) if len(self.new_histories) else None,
        )

    def _held_out(self, users: HeldOutUsers) -> sp.csr_matrix:
        lengths = np.zeros(len(self.train) + len(self.new_histories), np.int64)
        lengths[np.concatenate([users.known, len(self.train) + users.new])] = users.held_out.lengths
        return interaction_matrix(Ragged.from_lengths(lengths, users.held_out.values), self.num_items)


def _model_rows(means: dict[str, Any]) -> list[ResultRow]:
    """Return the row of the model, and those of its parts if it has a linear memory.

    Args:
        means: of all users or of a group, as in `evaluation.json`.
    """
    parts = {MODEL: means, **means.get("parts", {})}
    rows = []
    for name, part in parts.items():
        row = ResultRow(name=name, metrics=part["mean"], stderr=part["stderr"])
        is_tied = cannot_rank(part.get("num_tied", 0), part["num_users"])
        rows.append(row.without_metrics() if is_tied else row)
    return rows


def _baseline_row(baseline: BaselineResult, metrics: Sequence[str], chosen: np.ndarray | None = None) -> ResultRow:
    """Return the row of a baseline over all users, or over the chosen ones; bool [n]."""
    result = mean_metrics(baseline.values if chosen is None else baseline.values[chosen], metrics)
    settings: dict[str, float | str] = dict(baseline.chosen)
    if baseline.chosen_on:
        settings["chosen on"] = baseline.chosen_on
    return ResultRow(name=baseline.label, metrics=result.mean, stderr=result.stderr, chosen=settings, baseline=True)


def _groups(
    evaluated: dict[str, Any], baselines: Sequence[BaselineResult], users: HeldOutUsers, metrics: Sequence[str]
) -> tuple[GroupResults, ...]:
    """Return the tables for known and for new users; empty if there is only one group."""
    groups: dict[str, Any] = evaluated["groups"]
    if len(groups) < 2:
        return ()
    results = []
    masks: list[tuple[Group, np.ndarray]] = [(KNOWN, ~users.is_new), (NEW, users.is_new)]
    for name, chosen in masks:
        model = groups[name]
        rows = _model_rows(model)
        rows += [_baseline_row(baseline, metrics, chosen) for baseline in baselines]
        results.append(GroupResults(group=name, num_users=model["num_users"], rows=tuple(rows)))
    return tuple(results)


def _item_groups(
    evaluated: dict[str, Any],
    corpus: Corpus,
    data: SplitData | None,
    baselines: Sequence[BaselineResult],
    metrics: Sequence[str],
    settings: BaselineConfig,
) -> tuple[ItemGroupResults, ...]:
    """Return the tables for warm and for cold items; empty unless the split holds out whole items."""
    means: dict[str, Any] = evaluated.get("item_groups", {})
    groups = [group for group in item_groups(corpus, evaluated["split"]) if group.name in means]
    others: list[list[ResultRow]] = [[] for _ in groups]
    if groups and data is not None:
        others = group_rows(data, groups, baselines, metrics, settings)
    return tuple(
        ItemGroupResults(
            group=group.name,
            num_users=means[group.name]["num_users"],
            rows=(*_model_rows(means[group.name]), *rows),
        )
        for group, rows in zip(groups, others, strict=True)
    )


def _write_values(
    baselines: Sequence[BaselineResult],
    ids: Sequence[str],
    users: HeldOutUsers,
    items: pa.Table,
    metrics: Sequence[str],
    folder: Path,
) -> None:
    """Write each baseline's metrics by user, for paired tests, and its counts of recommended items.

    Args:
        ids: external ids of the users.
        items: of the corpus.
    """
    columns = {"user": [*ids], "group": users.groups}
    tables = [
        pl.DataFrame(columns | {name: baseline.values[:, index] for index, name in enumerate(metrics)}).select(
            pl.lit(baseline.label).alias("model"), pl.all()
        )
        for baseline in baselines
    ]
    pl.concat(tables).write_parquet(folder / BASELINES_FILE)
    names = pl.Series(items["item"].to_pylist())
    lists = [pl.DataFrame({"model": baseline.label, "item": names, "count": baseline.listed}) for baseline in baselines]
    pl.concat(lists).filter(pl.col("count") > 0).write_parquet(folder / BASELINES_RECOMMENDED_FILE)


def _example(example: dict[str, Any]) -> ExampleRecommendation:
    recommended = [RecommendedItem(item["title"], item["hit"]) for item in example["recommended"]]
    return ExampleRecommendation(example["user"], example["history"], recommended, example["num_held_out"])
