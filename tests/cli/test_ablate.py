"""Cells of an ablation that run at once: their GPUs and cores, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from cllm4rec_dist.cli import app
from cllm4rec_dist.cli.ablate import _environments
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.project.machine import Machine


@pytest.mark.parametrize(
    ("machine", "environ", "gpus", "threads"),
    [
        (Machine(16, 1, (1, 1)), {}, ["0", "1", "0"], "5"),
        (Machine(16, 1, (1, 1, 1, 1)), {"CUDA_VISIBLE_DEVICES": "2,MIG-5"}, ["2", "MIG-5", "2"], "5"),
        (Machine(2, 1, (1,)), {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "7"}, [None] * 3, "7"),
        (Machine(2, 1), {}, [None] * 3, "1"),
    ],
    ids=["in turn", "visible ones", "none visible", "no GPU"],
)
def test_cells_share_gpus_and_cores(
    machine: Machine, environ: dict[str, str], gpus: list[str | None], threads: str
) -> None:
    environments = _environments(3, machine, environ)
    assert [one.get("CUDA_VISIBLE_DEVICES") for one in environments] == gpus
    assert {one["OMP_NUM_THREADS"] for one in environments} == {threads}


@pytest.mark.parametrize("options", [["--launcher", "ray"], ["--workers", "2"]], ids=["ray", "two ranks"])
def test_cells_of_several_processes_run_one_after_the_other(tmp_path: Path, options: list[str]) -> None:
    files = ["--pretrain", "a.yaml", "--finetune", "b.yaml", "--output", str(tmp_path / "out")]
    with pytest.raises(ConfigError, match=r"--jobs: 2 needs cells of one process") as error:
        app(["ablate", *files, "--jobs", "2", *options], standalone_mode=False)
    assert "leave --jobs out" in str(error.value)
    assert not (tmp_path / "out").exists()
