"""Short jobs run in this process without Ray, DeepSpeed or a process group."""

from __future__ import annotations

import subprocess
import sys

import pytest

from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.launchers import short_jobs
from cllm4rec_dist.launchers.short_jobs import launch_short, runs_here
from tests.integration.runs import clean_environment


@pytest.mark.parametrize(
    ("launcher", "workers", "environ", "expected"),
    [
        ("auto", "1", {}, True),
        ("auto", "1", {"RAY_ADDRESS": ""}, True),
        ("auto", "1", {"RAY_ADDRESS": "local"}, True),
        ("auto", "1", {"RAY_ADDRESS": "head:6379"}, False),
        ("auto", "1", {"RAY_ADDRESS": "auto"}, False),
        ("auto", "2", {}, False),
        ("auto", "1:4", {}, False),
        ("auto", "1", {"RANK": "0", "WORLD_SIZE": "2"}, False),
        ("auto", "1", {"SLURM_PROCID": "0", "MASTER_ADDR": "here"}, False),
        ("ray", "1", {}, False),
        ("process", "1", {"RANK": "0", "RAY_ADDRESS": "head:6379"}, True),
    ],
)
def test_one_worker_without_anything_to_join_runs_here(
    launcher: str, workers: str, environ: dict[str, str], expected: bool
) -> None:
    assert runs_here(launcher, workers, environ) == expected


def test_other_jobs_are_launched_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    monkeypatch.setattr(short_jobs, "launch", lambda *args, **kwargs: calls.append((args, kwargs)))
    launch_short(print, "ray", "2", x=1)
    assert calls == [((print, "ray", "2"), {"x": 1})]
    with pytest.raises(ConfigError, match="--launcher"):
        launch_short(print, "mpi", "1")


@pytest.mark.slow
def test_a_job_here_imports_neither_ray_nor_deepspeed() -> None:
    code = (
        "import sys; from cllm4rec_dist.launchers.short_jobs import launch_short\n"
        "import torch.distributed as dist\n"
        "def job(world, report, text):\n    print(text, world.size, dist.is_initialized())\n"
        "launch_short(job, 'auto', '1', text='a')\n"
        "print(*sorted({'ray', 'deepspeed'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=clean_environment()
    )
    assert result.stdout == "a 1 False\n\n"
