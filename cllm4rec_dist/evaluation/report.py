"""Report of an evaluation as one self-contained HTML page: metrics of a model, comparison with baselines, provenance.

The page can be mailed, archived or opened offline: its Content-Security-Policy forbids loading anything and allows one
script, by hash. Titles, user names and configuration values are untrusted; the template escapes every text.

`page.py` computes the content; `report.html.j2`, `report.css` and `report.js` have the text and the design.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import polars as pl
import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined

from cllm4rec_dist.corpus.manifest import LeftOut, Manifest
from cllm4rec_dist.evaluation import formatting, page, per_user
from cllm4rec_dist.evaluation.page import CatalogSection, Group
from cllm4rec_dist.evaluation.per_user import LengthBin, Rival
from cllm4rec_dist.evaluation.plots import draw_panels, draw_sheets
from cllm4rec_dist.evaluation.results import ExampleRecommendation, ResultRow, Results, cannot_rank_note, markdown_table
from cllm4rec_dist.evaluation.training_log import read_curves, training_seconds
from cllm4rec_dist.suggestions import plural

_TEMPLATE, _SCRIPT = "report.html.j2", "report.js"


@dataclass(frozen=True)
class Background:
    """Input of a report in addition to the results; a section without its data is left out.

    Attributes:
        run: folder or URL of the run.
        split: the evaluated split.
        manifest: manifest of the corpus.
        items: item, title and popularity (training interactions) of the whole catalog, by row.
        examples: histories and lists of some users.
        share_with_hit: fraction of all users with a held-out item in a list as long as those of `examples`.
        metrics_files: JSON-lines training logs.
    """

    run: str = ""
    split: str = "test"
    manifest: Manifest | None = None
    items: pl.DataFrame | None = None
    examples: Sequence[ExampleRecommendation] = ()
    share_with_hit: float | None = None
    metrics_files: Sequence[Path] = ()


def write_report(folder: Path, results: Results, background: Background) -> Path:
    """Write `results.json`, `results.md`, the plots (PNG, light) and `report.html` into `folder`.

    Metrics by user are read from `folder`, where the evaluation and the baselines wrote them (`files.py`).

    Args:
        folder: created if absent; files of an earlier report are replaced.

    Returns:
        the path of `report.html`.

    Raises:
        DataError: if a training log or a file of metrics by user cannot be read; nothing is written then.
    """
    curves = read_curves(background.metrics_files)
    html = _render(folder, results, background, draw_panels(curves))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(results.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (folder / "results.md").write_text(markdown_table(results), encoding="utf-8")
    for name, picture in draw_sheets(results.rows, curves).items():
        (folder / f"{name}.png").write_bytes(picture)
    path = folder / "report.html"
    path.write_text(html, encoding="utf-8")
    return path


def _render(folder: Path, results: Results, background: Background, pictures: Sequence[Any]) -> str:
    groups, no_users, no_verdict = _groups(folder, results, background)
    catalog, no_catalog = _catalog(folder, results, background)
    manifest, examples = background.manifest, background.examples
    environment = _environment()
    return environment.get_template(_TEMPLATE).render(
        results=results,
        origin=results.provenance,
        split=background.split,
        groups=groups,
        no_users=no_users,
        no_verdict=no_verdict,
        catalog=catalog,
        no_catalog=no_catalog,
        num_items=0 if background.items is None else len(background.items),
        examples=examples,
        num_with_hit=sum(any(item.hit for item in example.recommended) for example in examples),
        share_with_hit=background.share_with_hit,
        manifest=manifest,
        split_text="" if manifest is None else formatting.split_text(manifest.preparation.split),
        left_out=_left_out(results, manifest),
        pictures=pictures,
        facts=_facts(results, background),
        settings=_settings(results),
        commands=_commands(results, background),
        model_meanings=formatting.meanings_of_models([row.name for row in results.rows]),
        script_hash=_script_hash(environment),
    )


def _groups(folder: Path, results: Results, background: Background) -> tuple[tuple[Group, ...], str, list[str]]:
    """Return the groups of users, the reason if there are none, and the reasons if there is no verdict."""
    users = per_user.read_users(folder)
    has_baselines = any(row.baseline for row in results.rows)
    # A file left over from an earlier evaluation must not be used.
    baselines = per_user.read_baselines(folder) if has_baselines else None
    if users is not None and not page.is_of_evaluation(users, results.rows[0]):
        users, no_users = None, f"{per_user.USERS_FILE} is of another evaluation than these results: evaluate again."
    else:
        no_users = f"Left out: there are no values per user ({per_user.USERS_FILE})."
    no_verdict = []
    if not has_baselines:
        no_verdict.append("No verdict: the evaluation was made without baselines, so there is nothing to compare with.")
    elif users is None:
        no_verdict.append(f"No verdict: a paired test needs values per user. {no_users}")
    elif baselines is None or not _match(baselines, [row for row in results.rows if row.baseline]):
        baselines = None
        file = per_user.BASELINES_FILE
        no_verdict.append(f"No verdict: the baselines' values per user ({file}) are absent or of another evaluation.")
    if users is None:
        return (), no_users, no_verdict
    parts = per_user.read_parts(folder)
    if parts is not None and not _match(parts, [row for row in results.rows[1:] if not row.baseline]):
        parts = None
    hidden = formatting.hidden_items(background.manifest)
    return page.make_groups(users, baselines, results, hidden, parts), "", no_verdict


def _match(values: pl.DataFrame, rows: Sequence[ResultRow]) -> bool:
    """Return True if the metrics by user of every row have the means of the table."""
    return all(page.is_of_evaluation(values.filter(pl.col("model") == row.name), row) for row in rows)


def _catalog(folder: Path, results: Results, background: Background) -> tuple[CatalogSection | None, str]:
    """Return the section about the catalog, or the reason if there is none."""
    recommended = per_user.read_recommended(folder)
    if recommended is None or background.items is None or recommended["count"].sum() == 0:
        return None, f"Left out: there is no count of recommended items ({per_user.RECOMMENDED_FILE})."
    lists = {results.rows[0].name: recommended}
    names = [row.name for row in results.rows if row.baseline]
    lists |= {name: counts for name, counts in per_user.read_baselines_recommended(folder).items() if name in names}
    return page.make_catalog(lists, background.items, results.num_users), ""


def _left_out(results: Results, manifest: Manifest | None) -> dict[str, dict[str, str]]:
    """Return for each reason the count, fraction and first example as text."""
    recorded = {} if manifest is None else manifest.skipped
    rows = {}
    for reason, count in results.skipped.items():
        entry = recorded.get(reason, LeftOut(count=count) if isinstance(count, int) else None)
        if entry is None:
            rows[reason] = {"count": str(count), "share": "–", "first": ""}
            continue
        share = f"{100 * entry.share:.3g}%" if entry.share else "–"
        first = entry.model_copy(update={"share": 0.0}).describe().strip().removeprefix("(").removesuffix(")")
        rows[reason] = {"count": f"{entry.count:,}", "share": share, "first": first}
    return rows


def _facts(results: Results, background: Background) -> list[tuple[str, str, str]]:
    """Return labels, values and details of the evaluated run."""
    origin, config = results.provenance, results.config
    facts = [("Run", background.run, "")] if background.run else []
    if origin is not None:
        best = ""
        if origin.best_metric is not None and origin.best_value is not None:
            best = f"validation {formatting.metric_label(origin.best_metric)} {origin.best_value:.4f}"
            best += "" if origin.best_step == origin.step else f" was best at step {origin.best_step:,}"
        facts += [
            ("Checkpoint", origin.checkpoint, f"{origin.stage}, step {origin.step:,}"),
            ("Chosen by", best or "nothing: the run was never validated", ""),
        ]
    if "backbone" in config:
        facts.append(("Backbone", formatting.backbone_name(str(config["backbone"])), ""))
    if origin is not None:
        count = formatting.short_count
        evaluated = plural(origin.num_ranks, "rank")
        trained = plural(origin.num_training_ranks, "rank")
        facts += [
            (
                "Parameters",
                count(origin.num_trained + origin.num_frozen),
                f"{count(origin.num_trained)} trained, {count(origin.num_frozen)} frozen",
            ),
            ("Hardware", origin.device, f"trained on {trained}, evaluated on {evaluated}"),
        ]
    seconds = training_seconds(background.metrics_files)
    if seconds:
        parts = ", ".join(f"{stage} {formatting.duration(value)}" for stage, value in seconds.items())
        facts.append(("Training time", formatting.duration(sum(seconds.values())), parts if len(seconds) > 1 else ""))
    facts.append(("Evaluation time", formatting.duration(results.seconds), "without fitting the baselines"))
    return facts


def _settings(results: Results) -> str:
    tree = json.loads(results.model_dump_json())["config"]
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True) if tree else ""


def _commands(results: Results, background: Background) -> list[str]:
    stage = results.config.get("stage")
    if not background.run or stage is None:
        return []
    return page.reproduce_commands(background.run, str(stage), background.split, results.metric_names)


def _best_shown(rows: Sequence[ResultRow]) -> dict[str, str]:
    """Return the best value of each metric as text; rows that look equal are equally best."""
    names = dict.fromkeys(name for row in rows for name in row.metrics)
    return {name: f"{max(row.metrics[name] for row in rows if name in row.metrics):.4f}" for name in names}


def _bins_reach(bins: Sequence[LengthBin]) -> float:
    """Return the value of the longest bar in a group of bins."""
    return max([bin.model.value for bin in bins] + [bin.baseline.value for bin in bins if bin.baseline]) or 1.0


def _tests_reach(rivals: Sequence[Rival]) -> float:
    """Return the largest distance of an interval's end from zero."""
    ends = [abs(end) for rival in rivals for end in (rival.test.low, rival.test.high) if end is not None]
    return max(ends, default=0.0) or 1.0


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("cllm4rec_dist", "evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= formatting.FILTERS
    environment.filters["base64"] = lambda content: base64.b64encode(content).decode("ascii")
    environment.globals |= {"best_shown": _best_shown, "bins_reach": _bins_reach, "tests_reach": _tests_reach}
    environment.globals["cannot_rank_note"] = cannot_rank_note
    return environment


def _script_hash(environment: Environment) -> str:
    """Return the hash of the page's script for its Content-Security-Policy."""
    assert environment.loader is not None
    script = environment.get_template(_SCRIPT).render()
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode('ascii')}"
