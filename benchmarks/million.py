"""The whole way at 200,000 users and items (A) and at a million of each (B): time and peak memory of every command.

    python -m benchmarks.million                     both, one after the other
    python -m benchmarks.million --scale A           the smaller one
    python -m benchmarks.million --scale tiny        a check that every command runs, without figures to compare

Generates orders and products, and runs what a user would run, one process after the other: build-backbone, prepare,
pretrain for a few steps, pretrain again for two more (resume), finetune, evaluate on a sample of users with the
baselines that fit, recommend for one user and for 2,000. All settings but sizes (steps, users of a sample) are the
defaults. CPU seconds are those of a command and all its processes; peak memory is their largest resident sum.

They are printed beside the figures of the first such run, before what it showed was fixed: other generated data of the
same sizes, wall times on an idle machine.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import psutil
import yaml

from benchmarks.common import ROOT, parser, show, show_table, write_json

_RECIPE = """name: million
source:
  format: table
  interactions: {{path: {folder}/orders.parquet, user: customer, item: sku, timestamp: time}}
  items: {{path: {folder}/products.parquet, item: sku, title: title}}
min_user_items: 3
split: {{kind: last, num_valid: 1, num_test: 1}}
"""
_BACKBONE = {"family": "llama", "hidden_size": 64, "num_layers": 2, "num_heads": 4}
_STEPS, _MORE_STEPS = 4, 2
_POLL_SECONDS = 0.2
_EARLIER: dict[tuple[str, str], str] = {
    ("A", "pretrain"): "first step 38.7 s, peak 1.9 GiB",
    ("A", "resume"): "10.4 s",
    ("A", "finetune"): "first step 41.3 s",
    ("A", "evaluate"): "status 2",
    ("A", "recommend"): "1.3 ms a user",
    ("B", "pretrain"): "first step 155.6 s, peak 6.7 GiB",
    ("B", "resume"): "24.5 s",
    ("B", "evaluate"): "over an hour, then status 2",
    ("B", "recommend"): "3.9 ms a user",
}


@dataclass(frozen=True)
class Scale:
    """Size of a catalog, and how many users are evaluated and recommended for."""

    num_users: int
    num_items: int
    num_interactions: int
    num_evaluated: int = 1000
    num_recommended: int = 2000


SCALES = {
    "tiny": Scale(600, 400, 8_000, 50, 100),
    "A": Scale(200_000, 200_000, 2_800_000),
    "B": Scale(1_000_000, 1_000_000, 9_700_000),
}


@dataclass
class Usage:
    """What a command took: seconds, CPU seconds and peak memory in GiB; `first_step` up to the first step's end."""

    seconds: float
    cpu_seconds: float
    peak_gib: float
    first_step: dict[str, float] = field(default_factory=dict)


def make_tables(folder: Path, scale: Scale) -> None:
    """Write orders and products.

    Histories are log-normal in length. A customer likes three of a thousand groups of products, has seven in eight
    orders from these, and buys a product of a group by the square of its rank. Titles have six words of 20,000, whose
    frequencies follow Zipf's law.
    """
    random = np.random.default_rng(0)
    mean = scale.num_interactions / scale.num_users
    lengths = np.clip(random.lognormal(np.log(mean) - 0.32, 0.8, scale.num_users).astype(np.int64), 3, 200)
    users = np.repeat(np.arange(scale.num_users), lengths)
    num_groups = min(1000, scale.num_items // 20)
    liked = random.integers(0, num_groups, (scale.num_users, 3))
    group = liked[users, random.integers(0, 3, len(users))]
    group = np.where(random.random(len(users)) < 0.875, group, random.integers(0, num_groups, len(users)))
    rank = (scale.num_items // num_groups * random.random(len(users)) ** 2).astype(np.int64)
    order = random.permutation(len(users))
    orders = pl.DataFrame(
        {
            "customer": users[order],
            "sku": (group + num_groups * rank)[order],
            "time": 1_500_000_000 + random.integers(0, 10**8, len(users)),
        }
    )
    orders.with_columns(pl.format("C{}", "customer").alias("customer"), pl.format("SKU-{}", "sku").alias("sku")).unique(
        ["customer", "sku"], keep="first", maintain_order=True
    ).write_parquet(folder / "orders.parquet")
    words = pl.Series(_words(20_000, random))
    columns = [words.gather((20_000 ** random.random(scale.num_items)).astype(np.int64)) for _ in range(6)]
    pl.DataFrame({"sku": np.arange(scale.num_items)}).select(
        pl.format("SKU-{}", "sku").alias("sku"),
        pl.concat_str([column.alias(str(n)) for n, column in enumerate(columns)], separator=" ").alias("title"),
    ).write_parquet(folder / "products.parquet")


def _words(count: int, random: np.random.Generator) -> list[str]:
    """Make different words of two to four syllables."""
    syllables = [consonant + vowel for consonant in "bdfghklmnprstvz" for vowel in "aeiou"]
    words: dict[str, None] = {}
    while len(words) < count:
        words["".join(random.choice(syllables, random.integers(2, 5)))] = None
    return list(words)


def run_command(arguments: list[str], log: Path, metrics: Path | None = None) -> Usage:
    """Run `cllm4rec` with these arguments to its end and measure it.

    Args:
        log: file for its output.
        metrics: log of the steps of a run, which is watched for the first one.

    Raises:
        RuntimeError: if the command fails.
    """
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    logged = _num_lines(metrics)
    with log.open("w", encoding="utf-8") as output:
        started = time.perf_counter()
        child = psutil.Popen(
            [sys.executable, "-m", "cllm4rec_dist", *arguments], cwd=ROOT, env=environ, stdout=output, stderr=output
        )
        peak, cpu, first_step = 0, 0.0, {}
        while child.poll() is None:
            resident, cpu = _measure(child, cpu)
            peak = max(peak, resident)
            if not first_step and _num_lines(metrics) > logged:
                first_step = {"seconds": round(time.perf_counter() - started, 1), "cpu_seconds": round(cpu, 1)}
            time.sleep(_POLL_SECONDS)
        seconds = time.perf_counter() - started
    if child.returncode:
        last = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-20:])
        raise RuntimeError(f"cllm4rec {' '.join(arguments)} ended with status {child.returncode}:\n{last}")
    return Usage(round(seconds, 1), round(cpu, 1), round(peak / 2**30, 2), first_step)


def _measure(process: psutil.Popen, cpu: float) -> tuple[int, float]:
    """Return the resident bytes of a process and its descendants, and their CPU seconds, at least `cpu`."""
    resident, seconds = 0, 0.0
    try:
        for each in (process, *process.children(recursive=True)):
            times = each.cpu_times()
            resident += each.memory_info().rss
            seconds += times.user + times.system + (times.children_user + times.children_system) * (each == process)
    except psutil.Error:
        return resident, cpu  # a process has just ended
    return resident, max(cpu, seconds)


def _num_lines(path: Path | None) -> int:
    return path.read_bytes().count(b"\n") if path is not None and path.is_file() else 0


def run_scale(name: str, folder: Path) -> list[dict[str, Any]]:
    """Run all commands at a scale in `folder` and return what each took."""
    scale, rows = SCALES[name], list[dict[str, Any]]()
    started = time.process_time()
    make_tables(folder, scale)
    show(f"{name}: tables made in {time.process_time() - started:.0f} CPU seconds")
    (folder / "recipe.yaml").write_text(_RECIPE.format(folder=folder), encoding="utf-8")
    settings = {"corpus": f"{folder}/corpus", "backbone": f"{folder}/backbone", "log_every": 1}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")

    def measure(part: str, *arguments: str, metrics: Path | None = None) -> None:
        usage = run_command([*arguments], folder / f"{part}.log", metrics)
        rows.append({"scale": name, "part": part, **vars(usage), "earlier": _EARLIER.get((name, part), "")})
        show(str(rows[-1]))

    backbone = [f"{key}={value}" for key, value in _BACKBONE.items()]
    measure("build-backbone", "build-backbone", f"{folder}/recipe.yaml", f"{folder}/backbone", *backbone)
    measure("prepare", "prepare", f"{folder}/recipe.yaml", f"{folder}/corpus", "--tokenizer", f"{folder}/backbone")
    run, tuned = folder / "pretrain", folder / "finetune"
    for part, steps in (("pretrain", _STEPS), ("resume", _STEPS + _MORE_STEPS)):
        last = [f"output={run}", f"max_steps={steps}", "--launcher", "process"]
        measure(part, "pretrain", "--config", f"{folder}/run.yaml", *last, metrics=run / "metrics.jsonl")
    sample = f"validation.users={scale.num_evaluated}"
    last = [f"output={tuned}", f"init_from={run}", f"max_steps={_STEPS}", sample, "--launcher", "process"]
    measure("finetune", "finetune", "--config", f"{folder}/run.yaml", *last, metrics=tuned / "metrics.jsonl")
    measure("evaluate", "evaluate", str(tuned), "--users", str(scale.num_evaluated))
    users = pl.read_parquet(folder / "corpus/users.parquet")["user"]
    (folder / "some.txt").write_text("\n".join(users.gather_every(len(users) // scale.num_recommended)), "utf-8")
    measure("one user", "recommend", str(tuned), f"{folder}/one", "--user", users[0])
    measure("recommend", "recommend", str(tuned), f"{folder}/lists", "--users-file", f"{folder}/some.txt")
    alone, many = rows[-2], rows[-1]
    num_more = len((folder / "some.txt").read_text(encoding="utf-8").split()) - 1
    many["ms_a_user"] = round(1e3 * (many["cpu_seconds"] - alone["cpu_seconds"]) / num_more, 2)
    return rows


def main() -> None:
    """Run the scales, and print and write the figures."""
    options = parser("million", __doc__)
    options.add_argument("--scale", nargs="+", choices=list(SCALES), default=["A", "B"], help="(%(default)s)")
    options.add_argument("--folder", type=Path, help="for data and runs; a temporary one if left out")
    options.add_argument("--note", help="written beside the figures, such as what else ran")
    run(options.parse_args())


def run(chosen: argparse.Namespace) -> None:
    """Run the chosen scales, each in a folder that is removed after it."""
    rows: list[dict[str, Any]] = []
    for name in chosen.scale:
        folder = Path(tempfile.mkdtemp(prefix=f"million-{name}-", dir=chosen.folder))
        try:
            rows += run_scale(name, folder)
        finally:
            shutil.rmtree(folder)
    show_table(
        ["scale", "part", "CPU seconds", "to the first step", "ms a user", "peak GiB", "at first"],
        [
            [
                row["scale"],
                row["part"],
                row["cpu_seconds"],
                row["first_step"].get("cpu_seconds", ""),
                row.get("ms_a_user", ""),
                row["peak_gib"],
                row["earlier"],
            ]
            for row in rows
        ],
    )
    write_json(chosen.json, {"note": chosen.note, "parts": rows})


if __name__ == "__main__":
    main()
