"""What benchmarks share: the machine in words, a table, and a JSON file of the figures."""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """Options that every benchmark has."""
    made = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--json", type=Path, default=RESULTS / f"{name}.json", help="where the figures go (%(default)s)")
    return made


def machine() -> str:
    """Processor or accelerator, and how many."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    model = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.is_file():
        found = re.search(r"^model name\s*: (.*)$", info.read_text(), re.MULTILINE)
        model = found[1] if found else model
    return f"{len(os.sched_getaffinity(0))} cores of {model}"


def tell(text: str) -> None:
    """A line for people."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def tell_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """A Markdown table: the first column to the left, the others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    align = lambda row: [c.ljust(w) if not i else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))]  # noqa: E731
    rule = ["-" * w if not i else "-" * (w - 1) + ":" for i, w in enumerate(widths)]
    for row in (align(cells[0]), rule, *map(align, cells[1:])):
        tell("| " + " | ".join(row) + " |")


def write_json(path: Path, figures: dict[str, Any]) -> None:
    """Write the figures with the date, the machine and the command."""
    path.parent.mkdir(parents=True, exist_ok=True)
    about = {
        "command": f"python -m benchmarks.{path.stem} {' '.join(sys.argv[1:])}".strip(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine(),
        "torch": torch.__version__,
    }
    path.write_text(json.dumps(about | figures, indent=1) + "\n", encoding="utf-8")
    tell(f"written to {path}")
