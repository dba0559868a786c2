"""What the tests of launchers share: a small run, started by any command, and its losses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.harness import make_backbone, make_catalog, make_corpus

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
NOISE = 2e-4
"""Relative difference of losses that fp32 sums in another order make, as in tests/test_train.py."""

CONFIG = """
corpus: {folder}/corpus
backbone: {folder}/backbone
output: {folder}/unset
deepspeed: {root}/ds_configs/zero3.json
epochs: 2
adapter: {{rank: 4}}
batch: {{users: 9, texts: 7}}
method: {{max_history: 100}}
optimizer: {{lr: 1.0e-2, embeddings_lr: 5.0e-3, warmup_steps: 2}}
"""


def write_config(folder: Path) -> Path:
    """A configuration of a small pretraining of six steps, with the corpus and the backbone that it names."""
    catalog = make_catalog()
    make_corpus(folder / "corpus", catalog, make_backbone(folder / "backbone", catalog))
    path = folder / "run.yaml"
    path.write_text(CONFIG.format(folder=folder, root=ROOT))
    return path


def clean_environment(**more: str) -> dict[str, str]:
    """Ours without a launcher's variables: whichever launcher runs the tests must not be joined."""
    launchers = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
    clean = {key: value for key, value in os.environ.items() if key not in launchers}
    return clean | {"OMP_NUM_THREADS": "1", "PATH": f"{BIN}:{clean['PATH']}"} | more


def losses_of(output: Path) -> list[float]:
    """The loss of every step that a run has written down."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


def foreign_lines(told: str) -> list[str]:
    """Lines that are not ours: a library has written them."""
    ours = re.compile(r"\d\d:\d\d:\d\d |  [a-z]+ {2,}\S|[a-z]+ done: |next: |error: ")
    return [line for line in told.splitlines() if line.strip() and not ours.match(line)]


def finish(started: subprocess.Popen[str], timeout: int = 600) -> str:
    """What a command told, at its end. One that goes on for longer is killed, or it would slow all later tests."""
    try:
        told, _ = started.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        started.kill()
        raise
    return told


def wait_for_step(output: Path, step: int, started: subprocess.Popen[str]) -> None:
    """Until a run has taken so many steps."""
    deadline = time.monotonic() + 480
    while not (output / "metrics.jsonl").exists() or len(losses_of(output)) < step:
        assert started.poll() is None, finish(started)[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)


def losses(config: Path, *command: str, environment: dict[str, str] | None = None, timeout: int = 600) -> list[float]:
    """Run `command` on the configuration and give the loss of every step."""
    output = Path(tempfile.mkdtemp(prefix="run-", dir=config.parent)) / "run"
    everything = [*command, "launch/pretrain.py", "--config", str(config), f"output={output}"]
    if "--workers" in command:  # options of the script go behind it
        workers = everything.index("--workers")
        everything = everything[:workers] + everything[workers + 2 :] + everything[workers : workers + 2]
    found = subprocess.run(
        everything,
        cwd=ROOT,
        env=clean_environment(**(environment or {})),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert found.returncode == 0, found.stdout[-3000:] + found.stderr[-3000:]
    return losses_of(output)
