"""Pictures of a run: loss and validation curves from its training log, and bars against the baselines.

What it is for: `report.py` puts these pictures on its page and into its folder. Curves are small multiples with a scale
for each panel, because the loss terms differ by orders of magnitude; every picture is drawn for a light and for a dark
page. Figures are made without pyplot, which keeps state for the whole process, and labels are never read as formulas,
since names come from outside.

What it leaves to others: the numbers themselves (`train.py` writes the log) and the page (`report.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cllm4rec_dist.errors import DataError

Curve = tuple[list[int], list[float]]
Curves = dict[str, dict[str, Curve]]
"""stage -> name of the logged value -> (steps, values), steps ascending."""


@dataclass(frozen=True)
class BarRow:
    """One line of the bar chart; `highlighted` tells a model from a baseline."""

    name: str
    metrics: dict[str, float]
    stderr: dict[str, float]
    highlighted: bool


@dataclass(frozen=True)
class Picture:
    """One picture as PNG bytes, for a light and a dark page, with the text that stands for it."""

    name: str
    caption: str
    light: bytes
    dark: bytes


@dataclass(frozen=True)
class _Theme:
    name: str
    surface: str
    text: str
    muted: str
    grid: str
    accent: str
    neutral: str


_WIDTH = 11.0  # inches of every picture: the page shows them equally wide, so that their letters are equally large
_LIGHT = _Theme("light", "#ffffff", "#1c1c22", "#6b6b76", "#e7e7ec", "#5450d6", "#b9bac6")
_DARK = _Theme("dark", "#1a1b21", "#ececf1", "#9a9aa8", "#2c2d36", "#9a97ff", "#565866")


def metric_label(name: str) -> str:
    """`recall@20` -> `Recall@20`, `ndcg@100` -> `NDCG@100`."""
    return name.replace("recall", "Recall").replace("ndcg", "NDCG")


def _read_lines(path: Path) -> list[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise DataError("metrics file", str(path), f"cannot be read ({error})", "Give the log of a run.") from error
    lines = text.split("\n")
    # A run that is killed while it writes leaves a last line without its end: it was never logged.
    entries = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            entry = json.loads(line)
            int(entry["step"])
        except (ValueError, TypeError, KeyError) as error:
            raise DataError(
                f"{path} line {number}", line[:80], "must be a JSON object with a step", "Remove the line."
            ) from error
        entries.append(entry)
    return entries


def read_curves(metrics_files: Sequence[Path]) -> Curves:
    """Read JSON-lines training logs into curves.

    A line without a `stage` belongs to the stage before it. A step that was logged twice (a resumed run repeats the
    steps after its checkpoint) keeps the later value. Values that are not finite numbers are left out.

    Raises:
        DataError: names the file and line that cannot be read.
    """
    by_step: dict[str, dict[str, dict[int, float]]] = {}
    for path in metrics_files:
        stage = path.stem
        for entry in _read_lines(path):
            stage = str(entry.get("stage", stage))
            for name, value in entry.items():
                if name != "step" and isinstance(value, int | float) and np.isfinite(value):
                    by_step.setdefault(stage, {}).setdefault(name, {})[int(entry["step"])] = float(value)
    return {
        stage: {name: (sorted(points), [points[step] for step in sorted(points)]) for name, points in named.items()}
        for stage, named in by_step.items()
    }


def _select(curves: Curves, wanted: Callable[[str], bool]) -> Curves:
    selected = {stage: {name: c for name, c in named.items() if wanted(name)} for stage, named in curves.items()}
    return {stage: named for stage, named in selected.items() if named}


def _style(theme: _Theme) -> Any:
    # Any: matplotlib types its keys as one literal of every setting, which a plain dict does not match.
    return {
        "figure.facecolor": theme.surface,
        "axes.facecolor": theme.surface,
        "axes.edgecolor": theme.grid,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "axes.titlelocation": "left",
        "figure.constrained_layout.w_pad": 0.12,
        "figure.constrained_layout.h_pad": 0.1,
        "axes.titlesize": 10.5,
        "axes.titleweight": "bold",
        "axes.titlecolor": theme.text,
        "axes.titlepad": 9,
        "axes.labelcolor": theme.muted,
        "axes.labelsize": 8.5,
        "grid.color": theme.grid,
        "grid.linewidth": 0.8,
        "xtick.color": theme.muted,
        "ytick.color": theme.muted,
        "xtick.labelsize": 8.5,
        "ytick.labelsize": 8.5,
        "xtick.major.size": 0,
        "ytick.major.size": 0,
        "text.color": theme.text,
        "text.parse_math": False,
    }


def _draw_bars(rows: Sequence[BarRow], theme: _Theme) -> Figure:
    """One panel a metric: horizontal bars in the order of the table, models in the accent colour."""
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.42 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        shown = [(place, row) for place, row in enumerate(rows) if name in row.metrics]
        places = [place for place, _ in shown]
        values = np.array([row.metrics[name] for _, row in shown])
        errors = np.array([row.stderr.get(name, 0.0) for _, row in shown])
        colors = [theme.accent if row.highlighted else theme.neutral for _, row in shown]
        axes.barh(places, values, height=0.62, color=colors)
        axes.errorbar(values, places, xerr=errors, fmt="none", ecolor=theme.text, elinewidth=1.1, capsize=2.5)
        reach = float((values + errors).max())
        for place, value, error in zip(places, values, errors, strict=True):
            axes.text(value + error + 0.02 * reach, place, f"{value:.3f}", va="center", fontsize=8.5)
        axes.set(title=metric_label(name), xlim=(0, reach * 1.18 or 1.0), xticks=[])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.tick_params(axis="y", labelcolor=theme.text, labelsize=9.5)
    panels[0].invert_yaxis()
    return figure


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Centred moving average over a twentieth of the points; the window shrinks at the ends."""
    window = np.ones(1 + 2 * (len(values) // 40))
    return np.convolve(values, window, "same") / np.convolve(np.ones(len(values)), window, "same")


def _draw_loss(axes: Axes, curve: Curve, theme: _Theme) -> None:
    steps, values = curve
    axes.plot(steps, values, color=theme.accent, alpha=0.28, linewidth=0.9)
    axes.plot(steps, _smooth(values), color=theme.accent, linewidth=1.8)


def _draw_validation(axes: Axes, curve: Curve, theme: _Theme) -> None:
    steps, values = curve
    best = int(np.argmax(values))
    axes.plot(steps, values, color=theme.accent, linewidth=1.8, marker="o", markersize=3.5)
    axes.plot(steps[best], values[best], "o", markersize=8, mfc=theme.surface, mec=theme.accent, mew=2)
    axes.annotate(
        f"{values[best]:.4f}",
        (steps[best], values[best]),
        (0, 8),
        textcoords="offset points",
        ha="center",
        fontsize=8.5,
    )
    axes.margins(y=0.18)


def _draw_curves(curves: Curves, draw: Callable[[Axes, Curve, _Theme], None], theme: _Theme) -> Figure:
    """A row of panels for each stage, a column for each logged value, a scale for each panel."""
    columns = list(dict.fromkeys(name for named in curves.values() for name in named))
    figure = Figure(figsize=(_WIDTH, 2.4 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), len(columns), squeeze=False)
    for line, (stage, named) in zip(panels, curves.items(), strict=True):
        for axes, name in zip(line, columns, strict=True):
            if name not in named:
                axes.set_axis_off()
                continue
            draw(axes, named[name], theme)
            label = metric_label(name.rpartition("/")[2]) if "/" in name else "all terms"
            axes.set(title=label, xlabel=f"{stage} step")
            axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
            axes.yaxis.set_major_locator(MaxNLocator(4))
    return figure


def _picture(name: str, caption: str, draw: Callable[[_Theme], Figure]) -> Picture:
    drawn = []
    for theme in (_LIGHT, _DARK):
        buffer = BytesIO()
        with mpl.rc_context(_style(theme)):
            draw(theme).savefig(buffer, format="png", dpi=160, facecolor=theme.surface)
        drawn.append(buffer.getvalue())
    return Picture(name, caption, *drawn)


def make_pictures(rows: Sequence[BarRow], curves: Curves) -> list[Picture]:
    """Bars of `rows`, and the loss and validation curves that `curves` has."""
    pictures = [
        _picture(
            "metrics",
            "Test metrics, mean over users; lines are one standard error either side.",
            lambda theme: _draw_bars(rows, theme),
        )
    ]
    losses = _select(curves, lambda name: name == "loss" or name.startswith("loss/"))
    if losses:
        caption = "Training loss and its terms; the strong line is a moving average."
        pictures.append(_picture("loss", caption, lambda theme: _draw_curves(losses, _draw_loss, theme)))
    validation = _select(curves, lambda name: name.startswith("valid/"))
    if validation:
        caption = "Validation metrics during training; the ring marks the best."
        pictures.append(
            _picture("validation", caption, lambda theme: _draw_curves(validation, _draw_validation, theme))
        )
    return pictures
