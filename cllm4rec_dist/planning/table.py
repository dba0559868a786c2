"""Formats a plan as Markdown or JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from cllm4rec_dist.planning.changes import Change, FasterRun
from cllm4rec_dist.planning.hardware import GIB
from cllm4rec_dist.planning.memory import PARTS
from cllm4rec_dist.planning.plan import RESERVED, Plan

_UNITS = ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def format_plan(plan: Plan) -> str:
    """Format a plan as Markdown tables."""
    cluster = plan.cluster
    free = cluster.gpu.memory - plan.needed
    lines = [
        f"{plan.stage} on {cluster.num_ranks} x {cluster.gpu.name}, {cluster.ranks_per_host} per host",
        "",
        *_table(
            ("memory of the fullest GPU", "bytes", ""),
            [
                *((part, _bytes(plan.memory[part]), what) for part, what in PARTS.items()),
                ("reserved", _bytes(RESERVED), "assumed: driver, workspaces of libraries, fragmentation"),
                (
                    "needed",
                    _bytes(plan.needed),
                    f"of {_bytes(cluster.gpu.memory)}: "
                    + (f"fits, {_bytes(free)} free" if plan.fits else f"does NOT fit, {_bytes(-free)} too much"),
                ),
            ],
        ),
        "",
        *_table(
            ("sent by the busiest GPU in a step", "bytes", "share"),
            [
                (what, _short(size), f"{float(size / max(1, plan.traffic.total())):.1%}")
                for what, size in plan.traffic.most_common()
            ]
            + [("total", _short(plan.traffic.total()), "")],
        ),
        "",
        *_table(
            ("computed by the busiest GPU in a step", "FLOPs", "share"),
            [
                (what, _short(size), f"{size / max(1, plan.flops.total()):.1%}")
                for what, size in plan.flops.most_common()
            ]
            + [("total", _short(plan.flops.total()), "")],
        ),
        "",
        *_table(
            ("time of a step", "seconds", "share"),
            [(what, f"{seconds:.3g}", f"{seconds / plan.step_seconds:.1%}") for what, seconds in plan.seconds.items()]
            + [("total", f"{plan.step_seconds:.3g}", f"matrix products at {cluster.efficiency:.0%} of their peak")],
        ),
        "",
        f"An epoch: {plan.steps_per_epoch:,} steps, {_duration(plan.steps_per_epoch * plan.step_seconds)};"
        f" {plan.tokens:,.0f} tokens per step, {plan.packing_efficiency:.1%} of the computed positions,"
        f" {plan.tokens / plan.step_seconds:,.0f} tokens/s.",
        *(
            [f"Before the first step: {_short(plan.linear_flops)} FLOPs of each rank's CPUs for the linear memory."]
            if plan.linear_flops
            else []
        ),
        "Tests compare memory and bytes with measurements on CPUs. The one run on a GPU took 2.3 times as long as"
        " planned (docs/performance.md).",
    ]
    if plan.left_out:
        lines.append(f"Not included: {', '.join(plan.left_out)}.")
    return "\n".join(lines)


def format_changes(changes: Iterable[Change], gpu_memory: int) -> str:
    """Format changes as a Markdown table, each on top of those before."""
    rows = [(c.settings, _bytes(c.needed), "fits" if c.needed <= gpu_memory else "", c.cost) for c in changes]
    return "\n".join(_table(("change, on top of those before", "needs", "", "costs"), rows))


def format_faster_runs(runs: Iterable[FasterRun]) -> str:
    """Format changes that make a step faster as a Markdown table, each on top of those before."""
    rows = [(run.settings, f"{run.plan.step_seconds:.3g} s", _bytes(run.plan.needed), run.cost) for run in runs]
    return "\n".join(_table(("faster, on top of those before", "a step", "needs", "costs"), rows))


def as_json(plan: Plan, changes: Iterable[Change] = ()) -> dict[str, Any]:
    """Convert a plan to JSON values, in bytes, FLOPs and seconds."""
    cluster = plan.cluster
    return {
        "stage": plan.stage,
        "gpu": cluster.gpu.name,
        "gpus": cluster.num_ranks,
        "gpus_per_host": cluster.ranks_per_host,
        "efficiency": cluster.efficiency,
        "fits": plan.fits,
        "gpu_memory": cluster.gpu.memory,
        "needed": plan.needed,
        "memory": {**plan.memory, "reserved": RESERVED},
        "traffic": _floats(plan.traffic),
        "flops": dict(plan.flops),
        "seconds": plan.seconds,
        "step_seconds": plan.step_seconds,
        "steps_per_epoch": plan.steps_per_epoch,
        "linear_flops": plan.linear_flops,
        "epoch_seconds": plan.step_seconds * plan.steps_per_epoch,
        "tokens": plan.tokens,
        "packing_efficiency": plan.packing_efficiency,
        "left_out": plan.left_out,
        "changes": [vars(change) for change in changes],
    }


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {key: float(value) for key, value in values.items()}


def _table(header: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    """Format a Markdown table whose second column is right-aligned."""
    cells = [header, *rows]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    rule = tuple("-" * (width - 1) + ":" if column == 1 else "-" * width for column, width in enumerate(widths))

    def pad(column: int, cell: str) -> str:
        return cell.rjust(widths[column]) if column == 1 else cell.ljust(widths[column])

    padded = [[pad(*pair) for pair in enumerate(row)] for row in (cells[0], rule, *cells[1:])]
    return ["| " + " | ".join(row) + " |" for row in padded]


def _bytes(size: float) -> str:
    return f"{size / GIB:.2f} GiB" if size >= GIB / 100 else f"{size / (1 << 20):.2f} MiB"


def _short(count: Any) -> str:
    value = float(count)
    for size, letter in _UNITS:
        if value >= size:
            return f"{value / size:.3g} {letter}"
    return f"{value:.0f}"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
