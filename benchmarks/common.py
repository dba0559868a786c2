"""Shared by benchmarks: options, settings, a description of the machine, a table, and a JSON file of the results."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
import yaml

from cllm4rec_dist.config import RunConfig, validate

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Make a parser with the options that every benchmark has."""
    options = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    options.add_argument(
        "--json", type=Path, default=RESULTS / f"{name}.json", help="file for the results (%(default)s)"
    )
    return options


def run_config(chosen: argparse.Namespace, stage: str, **batch: int) -> RunConfig:
    """Settings of a run with LoRA on the corpus and backbone of the options.

    Args:
        batch: settings of `batch`.
    """
    return validate(
        RunConfig,
        {
            "stage": stage,
            "corpus": chosen.corpus,
            "backbone": chosen.backbone,
            "output": tempfile.gettempdir(),
            "deepspeed": str(ROOT / "ds_configs/zero3.json"),
            "adapter": {"rank": 8},
            "embeddings": {"init": "prior"},
            "batch": batch,
            "method": {"max_history": 200},
        },
        "benchmark",
    )


def pretrain_command(folder: Path, num_ranks: int, settings: Mapping[str, Any]) -> list[str]:
    """Write the settings of a pretraining run and return the command that starts it on `num_ranks` ranks.

    The run reads `corpus` and `backbone` and writes `run`, all in `folder`. It has a small adapter and random
    embeddings, and ends with `max_steps` or a signal.
    """
    common = {
        **{name: f"{folder}/{name}" for name in ("corpus", "backbone")},
        "output": f"{folder}/run",
        "deepspeed": f"{ROOT}/ds_configs/zero3.json",
        "adapter": {"rank": 8},
        "embeddings": {"init": "prior"},
        "method": {"max_history": 32},
        "epochs": 100_000,
    }
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump({**common, **settings}), encoding="utf-8")
    torchrun = [str(Path(sys.executable).parent / "torchrun"), "--standalone", f"--nproc_per_node={num_ranks}"]
    return [*torchrun, "launch/pretrain.py", "--config", str(config)]


def machine() -> str:
    """Describe the processor or accelerators."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        match = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)
        model = match[1] if match else model
    return f"{len(os.sched_getaffinity(0))} cores of {model}"


def show(text: str) -> None:
    """Print a line."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def show_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a Markdown table, with the first column left-aligned and the others right-aligned."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    rule = ["-" * w if not i else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    aligned = [
        [c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))] for row in cells
    ]
    for row in (aligned[0], rule, *aligned[1:]):
        show("| " + " | ".join(row) + " |")


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Write results with the date, the machine and the command."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "command": f"python -m benchmarks.{path.stem} {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "torch": torch.__version__,
    }
    path.write_text(json.dumps(about | figures, indent=1) + "\n", encoding="utf-8")
    show(f"written to {path}")
