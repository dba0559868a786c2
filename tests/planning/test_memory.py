"""Memory and FLOPs of a plan, against tensors and products that are counted in a real step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.measured import LiveMemory
from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.planning import memory
from cllm4rec_dist.planning.dry_run import ATTENTION
from cllm4rec_dist.planning.plan import dry_run_fullest, needed_memory, step_flops
from cllm4rec_dist.planning.tracing import Trace, emulate_kernels
from cllm4rec_dist.step import train_step
from tests.harness import make_backbone, make_catalog, make_corpus, run_ranks
from tests.planning.runs import make_config, meta_run_of, trained

STEP = 2
ZERO = {
    "reduce_bucket_size": 500_000,
    "stage3_param_persistence_threshold": 1_000,
    "stage3_prefetch_bucket_size": 100_000,
    "stage3_max_reuse_distance": 200_000,
}
HPZ = {"zero_hpz_partition_size": 2}
CASES: dict[str, tuple[int, str, dict[str, Any]]] = {
    "lora": (1, "llama", {}),
    "checkpointed": (2, "llama", {"activation_checkpointing": True, "head": {"projection": True}}),
    "full, bf16": (
        2,
        "gpt2",
        {"adapter": {"kind": "full"}, "precision": "bf16", "head": {"comm_dtype": "bf16"}},
    ),
    "wide catalog": (
        1,
        "qwen2",
        {
            "adapter": {"kind": "none"},
            "batch": {"users": 8, "texts": 4},
            "head": {"projection": True},
            "embeddings": {"init": "prior", "dim": 32},
            "optimizer": {"words_lr_ratio": 1.0},
        },
    ),
    "sampled": (2, "qwen2", {"batch": {"users": 8, "texts": 4}, "head": {"num_negatives": 3000}}),
    "hpZ": (2, "llama", {}),
    "a copy a rank": (2, "llama", {"embeddings": {"init": "prior", "shard_group": 1}}),
    "wide and dense": (
        1,
        "qwen2",
        {
            "adapter": {"kind": "none"},
            "batch": {"users": 8, "texts": 4},
            "optimizer": {"sparse_embedding_updates": False},
        },
    ),
}
"""Number of ranks, family and settings of each case."""


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    folder = tmp_path_factory.mktemp("memory")
    corpora = {}
    for family, num_items in (("llama", 160), ("gpt2", 160), ("qwen2", 30_000)):
        catalog = make_catalog(num_users=160, num_items=num_items)
        backbone = make_backbone(folder / family, catalog, family=family, hidden_size=128, num_layers=3, num_heads=4)
        corpus = make_corpus(folder / f"{family}-corpus", catalog, backbone, examples_per_record=100)
        corpora[family] = corpus, str(backbone)
    return corpora


def held(world: World, config: RunConfig) -> dict[str, int]:
    system, source = trained(world, config, STEP)
    batches = source.make(STEP).micro_batches
    with LiveMemory() as memory:
        train_step(system, batches, 1.0)
    with FlopCounterMode(display=False) as flops:
        train_step(system, batches, 1.0)
    return {"before": memory.before, "highest": memory.highest, "flops": flops.get_total_flops()}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_memory_and_flops_are_planned(corpora: dict[str, tuple[str, str]], tmp_path: Path, case: str) -> None:
    size, family, changes = CASES[case]
    batch = {"batch": {"users": 64, "texts": 32, "gradient_accumulation_steps": 2}, "shuffle_window": 16}
    config = make_config(corpora[family], tmp_path, batch | changes, ZERO | (HPZ if case == "hpZ" else {}))
    measured = run_ranks(size, held, config)
    meta_run, sample = meta_run_of(config, size, STEP)
    traced, unit = dry_run_fullest(meta_run, [sample])
    gathers = meta_run.zero.simulate(traced.events, config.batch.gradient_accumulation_steps)
    needed = needed_memory(meta_run, traced, gathers)
    flops = step_flops(sample, traced, unit)
    assert memory.resident(meta_run).total() == pytest.approx(measured[0]["before"], rel=0.05)
    assert needed.total() == pytest.approx(max(m["highest"] for m in measured), rel=0.10)
    # torch does not count attention on CPUs; the test below compares it with torch's formulas. A plan uses the slowest
    # rank of each micro-batch, which differs between micro-batches.
    slowest = max(m["flops"] for m in measured)
    planned = flops.total() - flops[ATTENTION]
    # torch counts one of the two products by which items share updates, as if its sparse factor were dense.
    planned += 2 * meta_run.model.item_partition.num_rows * memory.shared_word_parts(meta_run).numel()
    if case == "sampled":  # rows may be drawn twice, which a plan cannot know
        assert slowest <= planned <= 1.03 * slowest
    else:
        assert planned == pytest.approx(slowest, rel=0 if size == 1 else 0.02, abs=0)


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_counted_as_by_torch(masked: bool) -> None:
    query, key, value = (torch.empty(3, 4, 50, 16, device="meta", requires_grad=True) for _ in range(3))
    mask = torch.empty(3, 1, 50, 50, dtype=torch.bool, device="meta") if masked else None
    with Trace() as trace, emulate_kernels(trace):
        torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask).sum().backward()
    shape = query.shape
    expected = sdpa_flop_count(shape, shape, shape) + sdpa_backward_flop_count(shape, shape, shape, shape)
    assert trace.flops == {"attention": expected}
