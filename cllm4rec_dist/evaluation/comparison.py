"""An evaluated model beside the baselines on the same split, as one report."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.evaluation.baselines import BaselineConfig, SplitData, run_baselines
from cllm4rec_dist.evaluation.files import EVALUATION_FILE
from cllm4rec_dist.evaluation.report import Background, write_report
from cllm4rec_dist.evaluation.results import (
    ExampleRecommendation,
    RecommendedItem,
    ResultRow,
    Results,
    markdown_table,
)
from cllm4rec_dist.log import METRICS_FILE
from cllm4rec_dist.system import interaction_matrix


def compare(folder: Path, metrics: Sequence[str], *, with_baselines: bool, seconds: float) -> str:
    """Fit the baselines, write results, pictures and page into `folder`, and return the table as Markdown.

    Args:
        folder: holds `evaluation.json`, written by `inference.evaluate_run`.
        seconds: that the evaluation took.

    Raises:
        DataError: where `folder` has no evaluation.
    """
    try:
        evaluated: dict[str, Any] = json.loads((folder / EVALUATION_FILE).read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(str(folder), EVALUATION_FILE, f"cannot be read ({error})", "Evaluate a run first.") from error
    config = evaluated["config"]
    corpus = Corpus.open(config["corpus"], verify=False)
    rows = [ResultRow(name="CLLM4Rec", metrics=evaluated["mean"], stderr=evaluated["stderr"])]
    if with_baselines:
        rows += _baselines(corpus, metrics, evaluated["split"])
    results = Results(
        dataset=f"{corpus.manifest.name} ({evaluated['split']})",
        rows=tuple(rows),
        num_users=evaluated["num_users"],
        seconds=seconds,
        config=config,
        fingerprints=evaluated["fingerprints"],
        provenance=evaluated.get("provenance"),
        notes=tuple(evaluated["notes"]),
        skipped={reason: found.count for reason, found in corpus.manifest.skipped.items()},
    )
    background = Background(
        run=evaluated["run"],
        split=evaluated["split"],
        manifest=corpus.manifest,
        items=_items(corpus),
        examples=[_example(e) for e in evaluated["examples"]],
        metrics_files=_logs(evaluated),
    )
    write_report(folder, results, background)
    return markdown_table(results) + f"\n\nReport: {os.path.relpath(folder / 'report.html')}"


def _logs(evaluated: dict[str, Any]) -> list[Path]:
    """Training logs of the run that this one started from, and of this one, where it is or where it was written."""
    config = evaluated["config"]
    before, own, written = (
        Path(run) / METRICS_FILE if run else None for run in (config["init_from"], evaluated["run"], config["output"])
    )
    here = own if own is not None and own.is_file() else written
    return [log for log in (before, here) if log is not None and log.is_file()]


def _items(corpus: Corpus) -> pl.DataFrame:
    """Item, title (its id where it has none) and training interactions of the whole catalog, by row."""
    table = corpus.items()
    popularity = np.bincount(corpus.split("train").values, minlength=corpus.num_items)
    items = pl.DataFrame({"item": table["item"].to_pylist(), "title": table["title"].to_pylist()})
    title = pl.when(pl.col("title").fill_null("") == "").then("item").otherwise("title").alias("title")
    return items.with_columns(title, pl.Series("popularity", popularity))


def _baselines(corpus: Corpus, metrics: Sequence[str], split: str) -> list[ResultRow]:
    items = corpus.items()
    titles, descriptions = items["title"].to_pylist(), items["description"].to_pylist()
    data = SplitData(
        train=interaction_matrix(corpus, "train"),
        valid=interaction_matrix(corpus, "valid"),
        test=interaction_matrix(corpus, split),
        item_texts=[f"{title} {description}".strip() for title, description in zip(titles, descriptions, strict=True)],
    )
    found = run_baselines(data, metrics, BaselineConfig())
    return [
        ResultRow(name=b.label, metrics=b.metrics, stderr=b.stderr, chosen=dict(b.chosen), baseline=True) for b in found
    ]


def _example(example: dict[str, Any]) -> ExampleRecommendation:
    recommended = [RecommendedItem(item["title"], item["hit"]) for item in example["recommended"]]
    return ExampleRecommendation(example["user"], example["history"], recommended)
