"""Planned communication equals the bytes that torch's collectives send, exactly."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.measured import SentBytes
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.planning.plan import dry_run_fullest, traffic_model
from cllm4rec_dist.planning.traffic import step_traffic
from cllm4rec_dist.step import train_step
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks
from tests.planning.runs import make_config, meta_run_of, trained

STEP = 3
"""In its first steps ZeRO-3 records the order of the modules and communicates more."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("traffic")
    catalog = make_catalog()
    corpora = {}
    for family in ("gpt2", "llama"):
        backbone = make_backbone(folder / family, catalog, family=family, hidden_size=32, num_layers=3)
        corpora[family] = make_corpus(folder / f"{family}-corpus", catalog, backbone), str(backbone)
    return corpora


def sent(world: World, config: RunConfig) -> dict[str, int]:
    system, source = trained(world, config, STEP)
    with SentBytes(world) as traffic:
        train_step(system, source.make(STEP).micro_batches, 1.0)
    return dict(traffic.sent)


EAGER = {
    "stage3_max_reuse_distance": 20_000,
    "stage3_prefetch_bucket_size": 4_000,
    "stage3_max_live_parameters": 30_000,
    "stage3_param_persistence_threshold": 40,
    "reduce_bucket_size": 6_000,
}
"""Thresholds at which the weights of a small backbone are gathered and released as those of a large one."""
FAR = EAGER | {
    "stage3_max_reuse_distance": 0,
    "stage3_prefetch_bucket_size": 60_000,
    "stage3_max_live_parameters": 10**9,
}
"""Weights are prefetched so early that some are requested again while they are still available."""
CASES: dict[str, tuple[int, str, dict[str, Any], dict[str, int]]] = {
    "lora": (2, "llama", {"adapter": {"kind": "lora", "rank": 4}}, FAR),
    "lora, eager": (
        3,
        "llama",
        {
            "adapter": {"kind": "lora", "rank": 4},
            "head": {"projection": True},
            "embeddings": {"init": "prior", "dim": 12},
            "method": {"shared_user_ratio": 0.4},
            "optimizer": {"words_lr_ratio": 1.0},
        },
        EAGER,
    ),
    "checkpointed": (
        2,
        "llama",
        {
            "adapter": {"kind": "lora", "rank": 4},
            "activation_checkpointing": True,
            "precision": "bf16",
            "embeddings": {"init": "prior", "comm_dtype": "bf16"},
            "head": {"comm_dtype": "bf16"},
        },
        EAGER,
    ),
    "full": (3, "gpt2", {"adapter": {"kind": "full"}, "head": {"similarity": "dot", "item_bias": False}}, EAGER),
    "copies and hpZ": (
        4,
        "llama",
        {
            "adapter": {"kind": "lora", "rank": 4},
            "embeddings": {"init": "prior", "shard_group": 2},
            "optimizer": {"words_lr_ratio": 1.0},
            "activation_checkpointing": True,
        },
        EAGER | {"zero_hpz_partition_size": 2},
    ),
    "a copy a rank": (
        3,
        "gpt2",
        {
            "adapter": {"kind": "none"},
            "embeddings": {"init": "prior", "shard_group": 1, "dim": 12},
            "optimizer": {"sparse_embedding_updates": False},
        },
        EAGER,
    ),
    "rows only": (2, "gpt2", {"adapter": {"kind": "none"}, "batch": {"users": 9, "texts": 0}}, EAGER),
}
"""Number of ranks, family, settings and ZeRO-3 settings of each case."""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_byte_is_planned(corpora: dict[str, tuple[str, str]], tmp_path: Path, case: str) -> None:
    size, family, changes, zero = CASES[case]
    config = make_config(corpora[family], tmp_path, changes, zero)
    ranks = run_ranks(size, sent, config)
    meta_run, sample = meta_run_of(config, size, STEP)
    traced, _ = dry_run_fullest(meta_run, [sample])
    model = traffic_model(meta_run, meta_run.zero.simulate(traced.events, config.batch.gradient_accumulation_steps))
    for rank, measured in enumerate(ranks):
        planned = step_traffic(model, config, sample, rank)
        assert planned.total() == sum(measured.values()), (planned, measured)
