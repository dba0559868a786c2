"""The run of `test_launchers.py` under Ray Train on a local Ray, and as a submitted Ray job."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.integration.ray_cluster import TOKEN, ray_head
from tests.integration.runs import BIN, ROOT, clean_environment, finish, foreign_lines, losses, losses_of

pytestmark = pytest.mark.integration


def test_ray_train_starts_a_local_ray_by_itself_and_shows_nothing_of_it(config: Path, wanted: list[float]) -> None:
    output = config.parent / "local-ray"
    started = subprocess.Popen(
        [sys.executable, "launch/pretrain.py", "--config", str(config), f"output={output}", "--workers", "2"],
        cwd=ROOT,
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    told = finish(started)
    assert started.returncode == 0, told[-3000:]
    assert losses_of(output) == wanted
    assert foreign_lines(told) == []
    first, second, *_ = told.splitlines()
    assert first.endswith(f"pretrain: reading {config}")
    assert second.endswith("starting Ray with 2 workers (takes about 10 s)")
    assert told.count(f"pretrain of {output}") == 1
    assert f"next: cllm4rec finetune -c {config} init_from={output}" in told


def test_ray_job_submit(config: Path, wanted: list[float]) -> None:
    with ray_head(num_cpus=3) as (_, address):
        command = (str(BIN / "ray"), "job", "submit", "--address", address, "--working-dir", ".", "--", sys.executable)
        assert losses(config, *command, "--workers", "2", environment=TOKEN) == wanted
