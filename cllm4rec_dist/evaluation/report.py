"""Results as people read them: `results.json`, a Markdown table, pictures and one self-contained HTML page.

What it is for: one folder that answers "how good is it, against what, and from which run". The page holds everything
in itself (inline pictures, no script, no external resource), so that it can be mailed, archived or opened offline, and
follows the reader's light or dark setting. Titles, user names and configuration values come from outside, so every
text passes `html.escape`.

What it leaves to others: computing the numbers (`ranking.py`, `baselines.py`), the training log (`train.py`) and
drawing (`plots.py`).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, FiniteFloat, NonNegativeFloat, PositiveInt

from cllm4rec_dist.config import StrictModel, validate
from cllm4rec_dist.errors import DataError
from cllm4rec_dist.evaluation.plots import BarRow, Picture, make_pictures, metric_label, read_curves


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


class Results(StrictModel):
    """What one evaluation found; `results.json` is this, as JSON."""

    schema_version: Literal[1] = 1
    """Version of this layout."""
    dataset: str
    """Name of the data set."""
    rows: tuple[ResultRow, ...] = Field(min_length=1)
    """Models and baselines; the first row gives the order of the metrics."""
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
    """What a user had (titles) and what the model recommends, best first."""

    user: str
    history: Sequence[str]
    recommended: Sequence[RecommendedItem]


def _best_values(results: Results) -> dict[str, float]:
    """The best of each metric, rounded as shown: rows that look equal are equally best."""
    return {
        name: max(round(row.metrics[name], 4) for row in results.rows if name in row.metrics)
        for name in results.metric_names
    }


def markdown_table(results: Results) -> str:
    """Models as rows, metrics as columns, `mean ± standard error`, the best of each column in bold; notes below."""
    best = _best_values(results)

    def cell(row: ResultRow, name: str) -> str:
        if name not in row.metrics:
            return "–"
        value = f"{row.metrics[name]:.4f}"
        shown = f"**{value}**" if round(row.metrics[name], 4) == best[name] else value
        return f"{shown} ± {row.stderr[name]:.4f}" if name in row.stderr else shown

    lines = [["Model", *map(metric_label, best)], ["---", *("---:" for _ in best)]]
    for row in results.rows:
        name = " ".join(row.name.split()).replace("|", "\\|")
        lines.append([name, *(cell(row, metric) for metric in best)])
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return table + "".join(f"\n**{note}**\n" for note in results.notes)


def read_results(path: Path) -> Results:
    """Read a `results.json`.

    Raises:
        DataError: when the file is absent or not JSON.
        ConfigError: when it has another layout or version.
    """
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(
            "results", str(path), f"cannot be read ({error})", "Give a results.json of an evaluation."
        ) from error
    return validate(Results, tree, source=str(path))


_CSS = """
:root{color-scheme:light dark;--bg:#f6f6f9;--surface:#fff;--text:#1c1c22;--muted:#6b6b76;--line:#e7e7ec;
--accent:#5450d6;--soft:#efeefc;--good:#15803d;--bad:#b91c1c}
@media(prefers-color-scheme:dark){:root{--bg:#111217;--surface:#1a1b21;--text:#ececf1;--muted:#9a9aa8;--line:#2c2d36;
--accent:#9a97ff;--soft:#25253b;--good:#4ade80;--bad:#f87171}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);
font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1080px;margin:0 auto;padding:48px 20px 80px}
h1{font-size:30px;line-height:1.2;letter-spacing:-.02em;margin:0 0 4px;overflow-wrap:anywhere}
h2{font-size:18px;letter-spacing:-.01em;margin:44px 0 12px}
.muted,small{color:var(--muted)}p{margin:0}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(180px,1fr));gap:14px;margin-top:26px}
.card{background:var(--surface);border:1px solid var(--line);border-radius:14px;padding:18px 20px}
.tile b{display:block;font-size:30px;line-height:1.25;letter-spacing:-.02em;font-variant-numeric:tabular-nums}
.good{color:var(--good);font-weight:600}
.note{border-color:var(--bad);color:var(--bad);font-weight:600;margin-top:26px}
.scroll{overflow-x:auto;padding:6px 0}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:10px 20px;text-align:left;border-bottom:1px solid var(--line);vertical-align:top}
tr:last-child td{border-bottom:0}
th{font-size:12.5px;font-weight:600;color:var(--muted)}
.number{text-align:right;white-space:nowrap}
.own{background:var(--soft)}.own td:first-child{box-shadow:inset 3px 0 var(--accent)}
.best{font-weight:700;color:var(--accent)}
td small{display:block;font-size:12px}
figure{margin:0 0 16px}figure img{width:100%;display:block}figcaption{color:var(--muted);font-size:13px;margin-top:10px}
.example{display:grid;grid-template-columns:1fr 1fr;gap:24px;margin-bottom:14px}
@media(max-width:700px){.example{grid-template-columns:1fr}}
h3{font-size:12.5px;font-weight:600;color:var(--muted);margin:0 0 8px}
.example ul,.example ol{margin:0;padding-left:20px}.example li{margin:3px 0;overflow-wrap:anywhere}
.hit{font-weight:600}.hit::after{content:" ✓";color:var(--good)}
.mono,pre{font:12.5px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
pre{margin:14px 0 0;overflow-x:auto}summary{cursor:pointer;font-weight:600}
"""


def _headline(results: Results) -> str:
    """A tile a metric: the best model (or, without one, the best baseline), and its distance from the best baseline."""
    models = [row for row in results.rows if not row.baseline]
    tiles = []
    for name in results.metric_names:
        shown = max(
            (row for row in models or results.rows if name in row.metrics),
            key=lambda row: row.metrics[name],
            default=None,
        )
        if shown is None:
            continue
        rivals = [row for row in results.rows if row.baseline and row is not shown and name in row.metrics]
        note = escape(shown.name)
        if models and rivals:
            rival = max(rivals, key=lambda row: row.metrics[name])
            if rival.metrics[name] > 0:
                change = shown.metrics[name] / rival.metrics[name] - 1
                tone = "good" if change > 0 else "muted"
                note = f'<span class="{tone}">{change:+.1%}</span> against {escape(rival.name)}'
        label = escape(metric_label(name))
        tiles.append(
            f'<div class="card tile"><small>{label}</small><b>{shown.metrics[name]:.4f}</b><small>{note}</small></div>'
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _notes(results: Results) -> str:
    return "".join(f'<p class="card note">{escape(note)}</p>' for note in results.notes)


def _table(results: Results) -> str:
    best = _best_values(results)

    def cell(row: ResultRow, name: str) -> str:
        if name not in row.metrics:
            return '<td class="number muted">–</td>'
        tone = " best" if round(row.metrics[name], 4) == best[name] else ""
        error = f"<small>± {row.stderr[name]:.4f}</small>" if name in row.stderr else ""
        return f'<td class="number"><span class="{tone.strip()}">{row.metrics[name]:.4f}</span>{error}</td>'

    head = "".join(f'<th class="number">{escape(metric_label(name))}</th>' for name in best)
    body = []
    for row in results.rows:
        chosen = ", ".join(
            f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.chosen.items()
        )
        title = f"<td>{escape(row.name)}<small>{escape(chosen)}</small></td>"
        own = "" if row.baseline else ' class="own"'
        body.append(f"<tr{own}>{title}{''.join(cell(row, name) for name in best)}</tr>")
    return f'<div class="card scroll"><table><tr><th>Model</th>{head}</tr>{"".join(body)}</table></div>'


def _pairs(title: str, pairs: Mapping[str, object]) -> str:
    if not pairs:
        return ""
    rows = "".join(
        f'<tr><td>{escape(key)}</td><td class="mono">{escape(str(value))}</td></tr>' for key, value in pairs.items()
    )
    return f'<h2>{escape(title)}</h2><div class="card scroll"><table>{rows}</table></div>'


def _figures(pictures: Sequence[Picture]) -> str:
    def source(png: bytes) -> str:
        return f"data:image/png;base64,{base64.b64encode(png).decode('ascii')}"

    return "".join(
        f'<figure class="card"><picture><source media="(prefers-color-scheme: dark)" srcset="{source(picture.dark)}">'
        f'<img src="{source(picture.light)}" alt="{escape(picture.caption)}"></picture>'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
        for picture in pictures
    )


def _examples(examples: Sequence[ExampleRecommendation]) -> str:
    if not examples:
        return ""
    hit, cards = ' class="hit"', []
    for example in examples:
        history = "".join(f"<li>{escape(title)}</li>" for title in example.history)
        recommended = "".join(f"<li{hit if item.hit else ''}>{escape(item.title)}</li>" for item in example.recommended)
        cards.append(
            f'<div class="card example"><div><h3>History of {escape(example.user)}</h3><ul>{history}</ul></div>'
            f"<div><h3>Recommended, best first</h3><ol>{recommended}</ol></div></div>"
        )
    legend = '<p class="muted">✓ marks what the user took in the held-out data.</p><br>'
    any_hit = any(item.hit for example in examples for item in example.recommended)
    return f"<h2>Examples</h2>{legend if any_hit else ''}{''.join(cards)}"


def _page(results: Results, pictures: Sequence[Picture], examples: Sequence[ExampleRecommendation]) -> str:
    title = escape(results.dataset)
    config = ""
    if results.config:
        text = yaml.safe_dump(json.loads(results.model_dump_json())["config"], sort_keys=False, allow_unicode=True)
        config = (
            '<h2>Configuration</h2><details class="card"><summary>As resolved</summary>'
            f"<pre>{escape(text)}</pre></details>"
        )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}: recommendation results</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1"><style>{_CSS}</style></head><body><main>'
        f"<h1>{title}</h1><p class='muted'>{results.num_users:,} users evaluated in {results.seconds:,.0f} s</p>"
        f"{_notes(results)}{_headline(results)}<h2>Models</h2>{_table(results)}<h2>Charts</h2>{_figures(pictures)}{_examples(examples)}"
        f"{_pairs('Left out of the data', results.skipped)}{_pairs('Fingerprints', results.fingerprints)}{config}"
        "</main></body></html>\n"
    )


def write_report(
    out_dir: Path, results: Results, metrics_files: Sequence[Path], examples: Sequence[ExampleRecommendation]
) -> Path:
    """Write `results.json`, `results.md`, the pictures (PNG, light) and `report.html` into `out_dir`.

    Args:
        out_dir: made when absent; files of an earlier report are replaced.
        results: what the evaluation found.
        metrics_files: JSON-lines training logs, may be none.
        examples: what to show of the recommendations, may be none.

    Returns:
        the path of `report.html`.

    Raises:
        DataError: when a metrics file cannot be read; nothing is written then.
    """
    bars = [BarRow(row.name, row.metrics, row.stderr, highlighted=not row.baseline) for row in results.rows]
    pictures = make_pictures(bars, read_curves(metrics_files))
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / "results.json").write_text(results.model_dump_json(indent=2) + "\n", encoding="utf-8")
    (out_dir / "results.md").write_text(markdown_table(results), encoding="utf-8")
    for picture in pictures:
        (out_dir / f"{picture.name}.png").write_bytes(picture.light)
    page = out_dir / "report.html"
    page.write_text(_page(results, pictures, examples), encoding="utf-8")
    return page
