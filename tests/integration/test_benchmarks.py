"""Commands that wait for a GPU run, with shrunken sizes, on a CPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import million
from cllm4rec_dist import cli

ROOT = Path(__file__).parents[2]
SMALL = "--hidden 64 --layers 2 --heads 4 --words 600 --items 1000 --users 500 --batch-users 16 --batch-texts 8"


@pytest.mark.integration
def test_the_benchmark_of_a_7b_backbone_runs(tmp_path: Path) -> None:
    told = tmp_path / "gpu.json"
    command = [sys.executable, "-m", "benchmarks.gpu", *SMALL.split(), "--steps", "2", "--warmup", "1"]
    settings = ["embeddings.dim=32", "head.compute_dtype=bf16"]
    found = subprocess.run([*command, "--json", str(told), *settings], cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert json.loads(told.read_text())["settings"] == settings
    assert json.loads(told.read_text())["tokens_per_second"] > 0


@pytest.mark.integration
def test_the_whole_way_runs_at_a_tiny_scale(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainings are commands, as in the benchmark; the others run in this process, which has imported torch already."""
    command = million.run_command

    def run_command(arguments: list[str], log: Path, metrics: Path | None = None) -> million.Usage:
        if arguments[0] in ("pretrain", "finetune"):
            return command(arguments, log, metrics)
        cli.app(arguments, standalone_mode=False)
        return million.Usage(seconds=1.0, cpu_seconds=1.0, peak_gib=1.0)

    monkeypatch.setattr(million, "run_command", run_command)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    told = tmp_path / "million.json"
    options = ["--scale", "tiny", "--folder", str(tmp_path), "--json", str(told)]
    monkeypatch.setattr(sys, "argv", ["benchmarks.million", *options])
    million.main()
    parts = {row["part"]: row for row in json.loads(told.read_text())["parts"]}
    assert {"prepare", "pretrain", "resume", "finetune", "evaluate", "recommend"} <= parts.keys()
    assert all(row["cpu_seconds"] > 0 and row["peak_gib"] > 0 for row in parts.values())
    assert all(parts[name]["first_step"]["seconds"] > 0 for name in ("pretrain", "resume", "finetune"))
    assert list(tmp_path.iterdir()) == [told], "generated data are removed"
