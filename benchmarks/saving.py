"""Cost of asynchronous checkpoints for the training loop.

    python -m benchmarks.saving                      one save per minute for six minutes, 2 ranks, 0.9 GB checkpoints

A run trains a small decoder with large tables. Each minute is one measurement, which compares the steps while a
checkpoint is copied, written, hashed and committed with the other steps. The cost is the extra time of the steps during
the save, as a fraction of the minute.
"""

from __future__ import annotations

import json
import re
import statistics
import subprocess
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.catalogs import make_corpus
from benchmarks.common import ROOT, parser, pretrain_command, show, show_table, write_json

_SAVED = re.compile(r"checkpoint step-(\d+): copied in ([\d.]+) s, [\d.]+ MB written in ([\d.]+) s")
_MEGABYTES = re.compile(r"([\d.]+) MB written")


def main() -> None:
    options = parser("saving", __doc__)
    options.add_argument("--users", type=int, default=200_000)
    options.add_argument("--items", type=int, default=100_000)
    options.add_argument("--hidden", type=int, default=128, help="width of the decoder and of every row (%(default)s)")
    options.add_argument("--ranks", type=int, default=2)
    options.add_argument("--every", type=float, default=1.0, help="minutes between checkpoints (%(default)s)")
    options.add_argument("--saves", type=int, default=5)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log = train(Path(folder), chosen)
        figures = measure(Path(folder) / "run", log)
    minutes = figures["intervals"]
    show_table(
        ["save", "copied (s)", "written (s)", "step during it (ms)", "step without (ms)", "cost of the interval (%)"],
        [
            [
                i + 1,
                f"{m['copied_s']:.2f}",
                f"{m['written_s']:.1f}",
                f"{m['step_saving_ms']:.1f}",
                f"{m['step_alone_ms']:.1f}",
                f"{m['cost_percent']:.2f}",
            ]
            for i, m in enumerate(minutes)
        ],
    )
    show(f"{figures['megabytes']:.0f} MB a checkpoint; cost {figures['cost_percent']:.2f} % of the loop's time")
    write_json(chosen.json, figures)


def train(folder: Path, chosen: Any) -> str:
    """Build a corpus and train until enough checkpoints are written; return the log."""
    make_corpus(folder, chosen.users, chosen.items, chosen.hidden)
    checkpoint = {"every_steps": 1_000_000_000, "every_minutes": chosen.every, "keep": 2}
    settings = {"batch": {"users": 32, "texts": 32}, "checkpoint": checkpoint}
    running = subprocess.Popen(
        pretrain_command(folder, chosen.ranks, settings),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert running.stdout is not None
    lines, written = [], 0
    for line in running.stdout:
        lines.append(line)
        if " written in " in line:
            written += 1
            show(line.rstrip())
        # One more interval's steps belong to the last save that counts.
        if written == chosen.saves + 1:
            running.terminate()
            break
    running.communicate()
    return "".join(lines)


def measure(run: Path, log: str) -> dict[str, Any]:
    """Compute the cost of each interval that starts with a save, from the times of all steps."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    ends = [line["time"] for line in lines if "loss" in line]
    saves: dict[int, dict[str, float]] = {}
    for step, copied, written in _SAVED.findall(log):
        saves[int(step)] = {"copied_s": float(copied), "written_s": float(written)}
    steps = sorted(saves)
    intervals = []
    for first, stop in pairwise(steps):
        # A save begins after its step, so the copy is part of the time from that step's end to the next one's.
        interval = [(start, end - start) for start, end in pairwise(ends[first - 1 : stop])]
        until = ends[first - 1] + saves[first]["copied_s"] + saves[first]["written_s"]
        during = [seconds for start, seconds in interval if start < until]
        alone = [seconds for start, seconds in interval if start >= until]
        lost = sum(during) - len(during) * statistics.mean(alone)
        intervals.append(
            saves[first]
            | {
                "step_saving_ms": 1e3 * statistics.mean(during),
                "step_alone_ms": 1e3 * statistics.mean(alone),
                "cost_percent": 100 * lost / sum(alone + during),
            }
        )
    costs = [interval["cost_percent"] for interval in intervals]
    return {
        "megabytes": float(_MEGABYTES.findall(log)[-1]),
        "cost_percent": statistics.median(costs),
        "cost_percent_range": [min(costs), max(costs)],
        "intervals": intervals,
    }


if __name__ == "__main__":
    main()
