"""Time and peak memory of `cllm4rec prepare` on random tables, by size and file type.

    python -m benchmarks.prepare                                   1M, 5M and 20M interactions, CSV and Parquet
    python -m benchmarks.prepare --rows 1 --against 209f533       and the code of another commit, in turns

There are a twentieth as many users as interactions, and as many items (Zipf); every item has a title of eight words,
and a twentieth of the rows are duplicates. Each measurement is a separate process: import, reading, filtering,
splitting, tokenizing and writing. Seconds for 100M are extrapolated from the two largest sizes, not measured.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from benchmarks.common import parser, show, show_table, write_json
from cllm4rec_dist.model.build_backbone import train_tokenizer

ROOT = Path(__file__).parents[1]
_WORDS = ["river", "mountain", "espresso", "trail", "quiet", "blue", "garden", "lantern", "violin", "harbour", "maple"]
_RECIPE = """name: benchmark
source:
  format: table
  interactions: {{path: {folder}/orders.{kind}, user: customer, item: sku, rating: stars,
    timestamp: time, kind: {kind}}}
{items}
rating_threshold: 2
min_user_items: 3
split: {{kind: random, valid: 0.1, test: 0.1}}
"""
_ITEMS = "  items: {{path: {folder}/items.{kind}, kind: {kind}, item: sku, title: title}}"


def make_tables(folder: Path, num_rows: int) -> None:
    """Write orders and items as CSV and as Parquet."""
    random = np.random.default_rng(0)
    num_ids = max(100, num_rows // 20)
    popularity = np.cumsum(1 / np.arange(1, num_ids + 1) ** 0.8)
    items = np.searchsorted(popularity, random.random(num_rows) * popularity[-1]).astype(np.int64)
    users = (num_ids * random.random(num_rows) ** 1.5).astype(np.int64)
    repeated = num_rows // 20
    users[-repeated:], items[-repeated:] = users[:repeated], items[:repeated]
    orders = pl.DataFrame(
        {
            "customer": users,
            "sku": items,
            "stars": random.integers(1, 6, num_rows),
            "time": 1_500_000_000 + random.integers(0, 10**8, num_rows),
        }
    )
    orders = orders.with_columns(
        pl.format("C{}", "customer").alias("customer"), pl.format("SKU-{}", "sku").alias("sku")
    )
    titles = pl.concat_str([pl.Series(f"w{n}", random.choice(_WORDS, num_ids)) for n in range(8)], separator=" ")
    about = pl.DataFrame({"sku": np.arange(num_ids)}).select(
        pl.format("SKU-{}", "sku").alias("sku"), titles.alias("title")
    )
    for name, table in (("orders", orders), ("items", about)):
        table.write_csv(folder / f"{name}.csv")
        table.write_parquet(folder / f"{name}.parquet")


def measure(folder: Path, kind: str, code: Path, with_titles: bool) -> dict[str, float]:
    """Measure seconds, CPU seconds and peak memory in GiB of a run of prepare with the package below `code`."""
    recipe = folder / "recipe.yaml"
    items = _ITEMS.format(folder=folder, kind=kind) if with_titles else ""
    recipe.write_text(_RECIPE.format(folder=folder, kind=kind, items=items))
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [
        sys.executable,
        "-c",
        _MEASURED,
        "prepare",
        str(recipe),
        str(folder / "corpus"),
        "--tokenizer",
        str(folder / "tokenizer"),
        "--overwrite",
    ]
    run = subprocess.run(
        command, env=os.environ | {"PYTHONPATH": str(code)}, cwd=code, capture_output=True, text=True, check=False
    )
    seconds, after = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    if run.returncode:
        raise SystemExit(run.stderr[-3000:])
    peak = int(run.stdout.rsplit("PEAK ", 1)[1])
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1), "peak_gib": round(peak / 2**20, 2)}


_MEASURED = """
import resource, sys
from cllm4rec_dist.cli import main
try:
    main(sys.argv[1:])
except SystemExit as end:
    if end.code:
        raise
print("PEAK", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def checkout(commit: str, folder: Path) -> Path:
    """Check out another commit."""
    subprocess.run(
        ["git", "worktree", "add", "--detach", str(folder), commit], cwd=ROOT, check=True, capture_output=True
    )
    return folder


def main() -> None:
    """Measure, and print and write the results."""
    options = parser("prepare", __doc__)
    options.add_argument("--rows", default="1,5,20", help="millions of interactions, comma-separated (%(default)s)")
    options.add_argument("--kinds", default="csv,parquet", help="comma-separated (%(default)s)")
    options.add_argument("--against", help="commit to compare with")
    options.add_argument("--against-rows", default="1,5", help="millions for that (%(default)s)")
    run(options.parse_args())


def run(chosen: argparse.Namespace) -> None:
    """Run all measurements, one after the other."""
    sizes = [float(part) for part in chosen.rows.split(",")]
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        old = checkout(chosen.against, Path(scratch) / "code") if chosen.against else None
        try:
            for size in sizes:
                folder = Path(scratch) / f"{size:g}M"
                folder.mkdir()
                make_tables(folder, round(size * 1e6))
                train_tokenizer([" ".join(_WORDS)] * 50, 400).save_pretrained(folder / "tokenizer")
                for kind in chosen.kinds.split(","):
                    for titles in (False, True):
                        rows.append({"code": "this", "millions": size, "kind": kind, "titles": titles})
                        rows[-1] |= measure(folder, kind, ROOT, titles)
                        show(str(rows[-1]))
                    if old is not None and size in [float(part) for part in chosen.against_rows.split(",")]:
                        rows.append({"code": chosen.against, "millions": size, "kind": kind, "titles": True})
                        rows[-1] |= measure(folder, kind, old, True)
                        show(str(rows[-1]))
        finally:
            if old is not None:
                subprocess.run(["git", "worktree", "remove", "--force", str(old)], cwd=ROOT, check=True)
    header = ["millions", "kind", "titles", "code", "seconds", "CPU seconds", "peak GiB"]
    show_table(
        header,
        [
            [
                f"{r['millions']:g}",
                r["kind"],
                "yes" if r["titles"] else "no",
                r["code"],
                r["seconds"],
                r["cpu_seconds"],
                r["peak_gib"],
            ]
            for r in rows
        ],
    )
    figures: dict[str, Any] = {"rows": rows}
    if len(sizes) > 1:
        figures["line"] = {kind: _line(rows, kind) for kind in chosen.kinds.split(",")}
        show(f"100M on the line through the two largest: {figures['line']}")
    write_json(chosen.json, figures)


def _line(rows: list[dict[str, Any]], kind: str) -> dict[str, float]:
    points = sorted(
        (r["millions"], r["seconds"], r["peak_gib"])
        for r in rows
        if r["kind"] == kind and r["code"] == "this" and not r["titles"]
    )
    (a, seconds_a, peak_a), (b, seconds_b, peak_b) = points[-2:]
    step = (100 - b) / (b - a)
    return {
        "seconds": round(seconds_b + step * (seconds_b - seconds_a)),
        "peak_gib": round(peak_b + step * (peak_b - peak_a), 1),
    }


if __name__ == "__main__":
    main()
