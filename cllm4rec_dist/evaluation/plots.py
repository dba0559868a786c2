"""Plots of a run: loss and validation curves from its training log, and bars of the model and the baselines.

Curves are small multiples with a scale for each panel, because the loss terms differ by orders of magnitude. The report
page shows each panel as a separate picture, so that text is readable on a phone, in a light and a dark version; the
folder gets whole sheets. Figures are made without pyplot, which has global state, and labels are never parsed as
formulas, because they contain user input.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from cllm4rec_dist.evaluation.results import ResultRow, metric_label
from cllm4rec_dist.evaluation.training_log import Curve, Curves


@dataclass(frozen=True)
class Picture:
    """One picture as PNG bytes, for a light and a dark page, with its alternative text."""

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


_WIDTH = 11.0  # inches of a sheet
_PANEL = (3.6, 2.3)  # inches of a panel: not wider than a phone, so that text is not scaled down
_LIGHT = _Theme("light", "#ffffff", "#1c1c22", "#6b6b76", "#e7e7ec", "#5450d6", "#b9bac6")
_DARK = _Theme("dark", "#1a1b21", "#ececf1", "#9a9aa8", "#2c2d36", "#9a97ff", "#565866")


def _select(curves: Curves, matches: Callable[[str], bool]) -> Curves:
    selected = {stage: {name: c for name, c in named.items() if matches(name)} for stage, named in curves.items()}
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


def _draw_bars(rows: Sequence[ResultRow], theme: _Theme) -> Figure:
    """Draw one panel for each metric: horizontal bars in the order of the table, models in the accent colour."""
    names = list(dict.fromkeys(name for row in rows for name in row.metrics))
    figure = Figure(figsize=(_WIDTH, 0.9 + 0.42 * len(rows)), layout="constrained")
    panels = figure.subplots(1, len(names), sharey=True, squeeze=False)[0]
    for axes, name in zip(panels, names, strict=True):
        shown = [(index, row) for index, row in enumerate(rows) if name in row.metrics]
        positions = [index for index, _ in shown]
        values = np.array([row.metrics[name] for _, row in shown])
        errors = np.array([row.stderr.get(name, 0.0) for _, row in shown])
        colors = [theme.neutral if row.baseline else theme.accent for _, row in shown]
        axes.barh(positions, values, height=0.62, color=colors)
        axes.errorbar(values, positions, xerr=errors, fmt="none", ecolor=theme.text, elinewidth=1.1, capsize=2.5)
        reach = float((values + errors).max())
        for position, value, error in zip(positions, values, errors, strict=True):
            axes.text(value + error + 0.02 * reach, position, f"{value:.3f}", va="center", fontsize=8.5)
        axes.set(title=metric_label(name), xlim=(0, reach * 1.18 or 1.0), xticks=[])
        axes.grid(visible=False)
        axes.spines["bottom"].set_visible(False)
        axes.set_yticks(range(len(rows)), [row.name for row in rows])
        axes.tick_params(axis="y", labelcolor=theme.text, labelsize=9.5)
    panels[0].invert_yaxis()
    return figure


def _smooth(values: Sequence[float]) -> np.ndarray:
    """Return the centred moving average over a twentieth of the points; the window shrinks at the ends."""
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


def _label(name: str) -> str:
    """Return `items` for `loss/items` and `Recall@20` for `valid/recall@20`."""
    return metric_label(name.rpartition("/")[2]) if "/" in name else "all terms"


Draw = Callable[[Axes, Curve, _Theme], None]


def _draw_panel(axes: Axes, curve: Curve, draw: Draw, title: str, xlabel: str, theme: _Theme) -> None:
    draw(axes, curve, theme)
    axes.set(title=title, xlabel=xlabel)
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(4))


def _draw_sheet(curves: Curves, draw: Draw, theme: _Theme) -> Figure:
    """Draw a row of panels for each stage and a column for each logged value, each panel with its scale."""
    columns = list(dict.fromkeys(name for named in curves.values() for name in named))
    figure = Figure(figsize=(_WIDTH, 2.4 * len(curves)), layout="constrained")
    panels = figure.subplots(len(curves), len(columns), squeeze=False)
    for line, (stage, named) in zip(panels, curves.items(), strict=True):
        for axes, name in zip(line, columns, strict=True):
            if name in named:
                _draw_panel(axes, named[name], draw, _label(name), f"{stage} step", theme)
            else:
                axes.set_axis_off()
    return figure


def _draw_single(curve: Curve, draw: Draw, title: str, stage: str, theme: _Theme) -> Figure:
    figure = Figure(figsize=_PANEL, layout="constrained")
    _draw_panel(figure.subplots(), curve, draw, title, f"{stage} step", theme)
    return figure


def _png(theme: _Theme, draw: Callable[..., Figure], *arguments: Any) -> bytes:
    """Return the figure of `draw(*arguments, theme)` as PNG bytes."""
    buffer = BytesIO()
    with mpl.rc_context(_style(theme)):
        draw(*arguments, theme).savefig(buffer, format="png", dpi=160, facecolor=theme.surface)
    return buffer.getvalue()


def _kinds(curves: Curves) -> list[tuple[str, Curves, Draw]]:
    """Return the curves to draw, by kind."""
    return [
        ("validation", _select(curves, lambda name: name.startswith("valid/")), _draw_validation),
        ("loss", _select(curves, lambda name: name == "loss" or name.startswith("loss/")), _draw_loss),
    ]


def draw_sheets(rows: Sequence[ResultRow], curves: Curves) -> dict[str, bytes]:
    """Return PNG sheets for the folder of a report: `metrics`, and `loss` and `validation` if there are curves."""
    sheets = {"metrics": _png(_LIGHT, _draw_bars, rows)}
    for kind, selected, draw in _kinds(curves):
        if selected:
            sheets[kind] = _png(_LIGHT, _draw_sheet, selected, draw)
    return sheets


def draw_panels(curves: Curves) -> list[Picture]:
    """Return one picture for each validation metric and loss term of each stage."""
    pictures = []
    for kind, selected, draw in _kinds(curves):
        for stage, named in selected.items():
            for name, curve in named.items():
                title = f"{kind.capitalize()}: {_label(name)}"
                light, dark = (_png(theme, _draw_single, curve, draw, title, stage) for theme in (_LIGHT, _DARK))
                pictures.append(Picture(f"{title}, {stage}", light, dark))
    return pictures
