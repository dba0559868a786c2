"""Small runs, planned and measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.corpus.loader import BatchLoader
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.planning.meta_run import MetaRun, make_meta_run, measure_shared_words
from cllm4rec_dist.planning.plan import prompt_builder_of
from cllm4rec_dist.planning.sampling import StepSample, sample_step
from cllm4rec_dist.step import train_step
from cllm4rec_dist.system import System, assemble, init_embeddings

MAX_LOGITS = 1 << 20


def make_config(made: tuple[str, str], folder: Path, changes: dict[str, Any], zero: dict[str, Any]) -> RunConfig:
    """Configure a run over a corpus and a backbone, with ZeRO-3 settings in a new file."""
    settings = json.loads(Path("ds_configs/zero3.json").read_text())
    settings["zero_optimization"] |= zero
    (folder / "ds.json").write_text(json.dumps(settings))
    tree = {
        "stage": "pretrain",
        "corpus": made[0],
        "backbone": made[1],
        "output": "unused",
        "deepspeed": str(folder / "ds.json"),
        "embeddings": {"init": "prior"},
        "batch": {"users": 9, "texts": 7, "gradient_accumulation_steps": 2},
        "shuffle_window": 3,
    } | changes
    return validate(RunConfig, tree, "test")


def meta_run_of(config: RunConfig, num_ranks: int, step: int) -> tuple[MetaRun, StepSample]:
    """Build the run on the meta device, and sample a step of its corpus."""
    corpus = Corpus.open(config.corpus)
    prompts = prompt_builder_of(config, corpus)
    words = measure_shared_words(config, corpus, prompts.space.num_words, num_ranks)
    meta_run = make_meta_run(
        config, corpus.num_users, corpus.num_items, True, num_ranks, MAX_LOGITS, shared_words=words
    )
    return meta_run, sample_step(corpus, prompts, config, num_ranks, step)


def trained(world: World, config: RunConfig, steps: int) -> tuple[System, BatchLoader]:
    """Assemble a run and train `steps` steps."""
    system = assemble(config, world)
    init_embeddings(system)
    source = BatchLoader(system.corpus, system.prompts, config, world)
    for step in range(steps):
        system.train(True)
        train_step(system, source.make(step).micro_batches, 1.0)
    return system, source
