"""Our slices of weights and optimizer state equal those of DeepSpeed's universal checkpoint."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.loader import BatchLoader
from cllm4rec_dist.distributed.engine import MOMENTS
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.step import train_step
from cllm4rec_dist.system import assemble, init_embeddings
from tests.harness import run_ranks
from tests.training import Made, make_config


def saved_by_deepspeed(world: World, config: RunConfig, folder: str) -> dict[str, dict[str, Tensor]]:
    """Take three steps, save DeepSpeed's checkpoint, and return this rank's slices as in our checkpoint."""
    system = assemble(config, world)
    init_embeddings(system)
    source = BatchLoader(system.corpus, system.prompts, config, world)
    for step in range(3):
        train_step(system, source.make(step).micro_batches, 1.0, math.inf)
    system.engine._engine.save_checkpoint(folder, tag="three")
    moments, steps = system.engine.moments(), system.engine.steps_taken()
    assert steps == 3
    return {
        name: {"fp32": weight.clone()} | {key: moments[name][key].clone() for key in MOMENTS}
        for name, weight in system.engine.weights().items()
    }


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3])
def test_slices_put_together_are_the_universal_checkpoint(made: Made, tmp_path: Path, size: int) -> None:
    config = make_config(made, tmp_path / "run")
    slices = run_ranks(size, saved_by_deepspeed, config, str(tmp_path / "deepspeed"))
    convert = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", "--no_strict"]
    subprocess.run(
        [*convert, "--input_folder", str(tmp_path / "deepspeed/three"), "--output_folder", str(tmp_path / "universal")],
        check=True,
        capture_output=True,
    )
    folders = {path.name: path for path in (tmp_path / "universal/zero").iterdir() if path.is_dir()}
    compared = 0
    for name in slices[0]:
        (folder,) = [path for key, path in folders.items() if key.endswith(name)]
        for key in ("fp32", *MOMENTS):
            theirs = torch.load(folder / f"{key}.pt", weights_only=True).flatten()
            ours = torch.cat([part[name][key] for part in slices])
            assert torch.equal(ours, theirs[: len(ours)]), (name, key)
            assert not theirs[len(ours) :].any()  # padding
            assert ours.any() or key == "fp32" or "lora_A" in name
            compared += 1
    assert compared >= 3 * 2 * 2
