"""Table of an ablation: means over seeds with standard errors, and paired tests of each variant against the first."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from cllm4rec_dist.ablation.cells import Cell
from cllm4rec_dist.ablation.variants import Variant
from cllm4rec_dist.checkpointing.run_folder import METRICS_FILE
from cllm4rec_dist.evaluation.files import USERS_FILE
from cllm4rec_dist.evaluation.formatting import duration, short_count
from cllm4rec_dist.evaluation.results import ResultRow, Results, metric_label
from cllm4rec_dist.evaluation.statistics import PairedTest, paired_test
from cllm4rec_dist.evaluation.training_log import training_seconds

TABLE_FILE = "ablation.md"
JSON_FILE = "ablation.json"


@dataclass(frozen=True)
class VariantResult:
    """Results of one variant.

    Attributes:
        seeds: evaluated seeds.
        values: float64 [seeds, M], mean of each metric over users.
        users: float64 [users], first metric of each user, averaged over the seeds.
        num_trained: trained parameters.
        seconds: mean training time of both stages.
    """

    variant: Variant
    seeds: tuple[int, ...]
    values: np.ndarray
    users: pl.DataFrame
    num_trained: int | None
    seconds: float | None

    @property
    def means(self) -> np.ndarray:
        """Mean of each metric over seeds, [M]."""
        return self.values.mean(axis=0)

    @property
    def stderr(self) -> np.ndarray | None:
        """Standard error of each mean over seeds, [M]; None for one seed."""
        count = len(self.seeds)
        return self.values.std(axis=0, ddof=1) / np.sqrt(count) if count > 1 else None


def write_table(cells: Sequence[Cell], output: Path) -> str:
    """Write the table of the evaluated cells as Markdown and JSON into `output`, and return the Markdown.

    Raises:
        DataError: if a log cannot be read.
    """
    evaluated = [cell for cell in cells if cell.is_evaluated]
    if not evaluated:
        return "no variant has been evaluated"
    metrics = _results(evaluated[0]).metric_names
    variants = {cell.variant.name: cell.variant for cell in evaluated}
    rows = [_variant_result(variant, evaluated, metrics) for variant in variants.values()]
    tests = [_test(rows[0], row, metrics[0]) for row in rows[1:]]
    baselines = next((found for cell in evaluated if (found := _baselines(cell))), [])
    table = _markdown(rows, tests, baselines, metrics)
    (output / TABLE_FILE).write_text(table, encoding="utf-8")
    content = {"metrics": metrics, "variants": list(_as_json(rows, tests, metrics))}
    (output / JSON_FILE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return table


def _results(cell: Cell) -> Results:
    return Results.model_validate_json((cell.evaluation / "results.json").read_text(encoding="utf-8"))


def _baselines(cell: Cell) -> list[ResultRow]:
    return [row for row in _results(cell).rows if row.baseline]


def _variant_result(variant: Variant, evaluated: Iterable[Cell], metrics: Sequence[str]) -> VariantResult:
    cells = [cell for cell in evaluated if cell.variant.name == variant.name]
    results = [_results(cell) for cell in cells]
    values = np.array([[result.rows[0].metrics[name] for name in metrics] for result in results])
    users = pl.concat([pl.read_parquet(cell.evaluation / USERS_FILE, columns=["user", metrics[0]]) for cell in cells])
    origin = results[0].provenance
    return VariantResult(
        variant,
        tuple(cell.seed for cell in cells),
        values,
        users.group_by("user").mean().sort("user"),
        None if origin is None else origin.num_trained,
        _seconds(cells),
    )


def _seconds(cells: Iterable[Cell]) -> float | None:
    """Return the mean training time of cells; None without logs."""
    times = []
    for cell in cells:
        logs = [run / METRICS_FILE for run in dict.fromkeys((cell.pretrain_run, cell.ranked_run))]
        found = [log for log in logs if log.is_file()]
        if found:
            times.append(sum(training_seconds(found).values()))
    return float(np.mean(times)) if times else None


def _test(first: VariantResult, other: VariantResult, metric: str) -> PairedTest:
    """Test a variant against the first one over the users of both, by the seeds' mean of each user."""
    both = other.users.join(first.users, on="user", suffix="_first").sort("user")
    return paired_test(both[metric].to_numpy(), both[f"{metric}_first"].to_numpy())


def _markdown(
    rows: Sequence[VariantResult], tests: Sequence[PairedTest], baselines: Sequence[ResultRow], metrics: Sequence[str]
) -> str:
    difference = f"{metric_label(metrics[0])} against {rows[0].variant.config.label} (95 % interval)"
    head = ["Variant", "Seeds", *map(metric_label, metrics), difference, "Trained", "Training"]
    lines = [head, ["---", *("---:" for _ in head[1:])]]
    for row, test in zip(rows, [None, *tests], strict=True):
        lines.append(
            [
                row.variant.config.label,
                str(len(row.seeds)),
                *_cells(row),
                "–" if test is None else _difference(test),
                "–" if row.num_trained is None else short_count(row.num_trained),
                "–" if row.seconds is None else duration(row.seconds),
            ]
        )
    for baseline in baselines:
        values = [f"{baseline.metrics[name]:.4f}" if name in baseline.metrics else "–" for name in metrics]
        lines.append([baseline.name, "", *values, "–", "–", "–"])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{table}\n± is the standard error over seeds. Intervals and verdicts are of a paired test over users.\n"


def _cells(row: VariantResult) -> Iterator[str]:
    for index, mean in enumerate(row.means):
        yield f"{mean:.4f}" if row.stderr is None else f"{mean:.4f} ± {row.stderr[index]:.4f}"


def _difference(test: PairedTest) -> str:
    if test.difference is None or test.low is None or test.high is None:
        return test.verdict
    return f"{test.difference:+.4f} ({test.low:+.4f} to {test.high:+.4f}), {test.verdict}"


def _as_json(
    rows: Sequence[VariantResult], tests: Sequence[PairedTest], metrics: Sequence[str]
) -> Iterator[Mapping[str, Any]]:
    for row, test in zip(rows, [None, *tests], strict=True):
        yield {
            "name": row.variant.name,
            "label": row.variant.config.label,
            "seeds": row.seeds,
            "values": {name: row.values[:, index].tolist() for index, name in enumerate(metrics)},
            "mean": dict(zip(metrics, row.means.tolist(), strict=True)),
            "stderr": None if row.stderr is None else dict(zip(metrics, row.stderr.tolist(), strict=True)),
            "against_first": None if test is None else vars(test),
            "num_trained": row.num_trained,
            "training_seconds": row.seconds,
        }
