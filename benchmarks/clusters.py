"""What `cllm4rec plan` expects of a 7B backbone with up to 100 million users and items on up to 4,096 GPUs.

    python -m benchmarks.clusters

A corpus of 100 million items is not needed: batches come from a corpus of 200,000 users and items, and each of its ids
becomes one of a range of ids of the large catalog. Every GPU has 32 users and 16 texts in a step, LoRA, bf16 and
activation checkpointing. `plain` has rows as wide as the backbone, sharded over all GPUs, and an item softmax in fp32.
`scaled` has `embeddings.dim: 256`, `head.compute_dtype: bf16`, hpZ within a host of 8 GPUs, and the fastest
`embeddings.shard_group` that fits. Nothing of this has been compared with such clusters.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig

from benchmarks.catalogs import make_corpus
from benchmarks.common import parser, show, show_table, write_json
from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.corpus.collate import MicroBatch
from cllm4rec_dist.corpus.loader import BatchLoader
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model.linear_cross_entropy import max_logits_within
from cllm4rec_dist.planning.hardware import GIB, GPUS
from cllm4rec_dist.planning.meta_run import make_meta_run
from cllm4rec_dist.planning.plan import Cluster, Plan, plan_samples, prompt_builder_of
from cllm4rec_dist.planning.sampling import count_step
from cllm4rec_dist.planning.traffic import IN_GROUP

SIZES = ((10_000_000, 1_000_000), (100_000_000, 10_000_000), (100_000_000, 100_000_000))
"""Users and items."""
_SMALL = 200_000
_RANKS = 64
_USERS, _TEXTS = 32, 16
_HOST = 8
_SCALED: dict[str, Any] = {"head": {"compute_dtype": "bf16"}, "embeddings": {"dim": 256}}


def main() -> None:
    options = parser("clusters", __doc__)
    options.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512, 4096])
    options.add_argument("--hidden", type=int, default=4096, help="width of the backbone (%(default)s)")
    options.add_argument("--layers", type=int, default=32)
    chosen = options.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        make_corpus(Path(folder), _SMALL, _SMALL, hidden=16, num_texts=20_000)
        decoder = LlamaConfig(
            hidden_size=chosen.hidden,
            num_hidden_layers=chosen.layers,
            num_attention_heads=32,
            num_key_value_heads=32,
            intermediate_size=chosen.hidden * 43 // 16,
            vocab_size=32_000,
        )
        decoder.architectures = ["LlamaForCausalLM"]
        decoder.save_pretrained(Path(folder) / "backbone")
        rows = []
        for num_ranks in chosen.gpus:
            for num_users, num_items in SIZES:
                for name, plan, group in layouts(folder, chosen.hidden, num_ranks, num_users, num_items):
                    about = {"gpus": num_ranks, "users": num_users, "items": num_items, "layout": name}
                    rows.append({**about, **figures(plan, group)})
                    show(f"{num_ranks} GPUs, {num_items:,} items, {name}: {plan.step_seconds:.2f} s a step")
    show_table([key.replace("_", " ") for key in rows[0]], [[*row.values()] for row in rows])
    write_json(chosen.json, {"rows": rows})


def layouts(
    folder: str, hidden: int, num_ranks: int, num_users: int, num_items: int
) -> Iterator[tuple[str, Plan, int]]:
    """Yield the plain layout and the fastest scaled one that fits, or the smallest: name, plan, ranks of a group."""
    cluster = Cluster(GPUS["h100"], num_ranks, _HOST, 0.45)
    batches = [spread(batch, num_users, num_items) for batch in small_batches(folder, num_ranks)]
    plain = {"head": {"projection": True}, "embeddings": {"dim": hidden}}
    yield "plain", plan_for(folder, plain, cluster, batches, (num_users, num_items), num_ranks, 1), num_ranks
    sizes = [size for size in (8, 64, 512, 4096) if size <= num_ranks]
    plans = {size: plan_for(folder, _SCALED, cluster, batches, (num_users, num_items), size, _HOST) for size in sizes}
    best = min(plans, key=lambda size: (not plans[size].fits, plans[size].step_seconds if plans[size].fits else -size))
    yield "scaled", plans[best], best


def small_batches(folder: str, num_ranks: int) -> Iterator[MicroBatch]:
    """Yield a micro-batch for each rank, from several steps of a run on 64."""
    config = run_config(folder, {}, None)
    corpus = Corpus.open(config.corpus, verify=False)
    prompts = prompt_builder_of(config, corpus)
    device = torch.device("cpu")
    loaders = [BatchLoader(corpus, prompts, config, World(rank, _RANKS, 0, device)) for rank in range(_RANKS)]
    for index in range(num_ranks):
        (batch,) = loaders[index % _RANKS].make(index // _RANKS).micro_batches
        yield batch


def run_config(folder: str, changes: dict[str, Any], shard_group: int | None) -> RunConfig:
    """Settings of a run on 64 ranks; its batch is that of each rank in any cluster."""
    tree = {
        "stage": "pretrain",
        "corpus": f"{folder}/corpus",
        "backbone": f"{folder}/backbone",
        "output": folder,
        "precision": "bf16",
        "activation_checkpointing": True,
        "batch": {"users": _USERS * _RANKS, "texts": _TEXTS * _RANKS},
    } | changes
    tree["embeddings"] = tree.get("embeddings", {}) | {"shard_group": shard_group}
    return validate(RunConfig, tree, "benchmark")


def spread(batch: MicroBatch, num_users: int, num_items: int) -> MicroBatch:
    """Replace each id of the small catalog by a random one of its range in the large one."""
    generator = torch.Generator().manual_seed(int(batch.keys.sum()) & 0xFFFF)

    def enlarged(ids: torch.Tensor, size: int) -> torch.Tensor:
        factor = size // _SMALL
        return ids.clamp(max=_SMALL - 1) * factor + torch.randint(factor, ids.shape, generator=generator)

    ids = {name: enlarged(rows, num_users if name.endswith("users") else num_items) for name, rows in batch.ids.items()}
    targets = {name: enlarged(t, num_items) if name == "items" else t for name, t in batch.targets.items()}
    return replace(batch, ids=ids, targets=targets)


def plan_for(
    folder: str,
    changes: dict[str, Any],
    cluster: Cluster,
    batches: Sequence[MicroBatch],
    sizes: tuple[int, int],
    shard_group: int,
    hpz: int,
) -> Plan:
    """Plan a step in which each rank has one of `batches`."""
    config = run_config(folder, changes, shard_group)
    room = max_logits_within(cluster.gpu.memory)
    meta_run = make_meta_run(config, *sizes, True, cluster.num_ranks, room, hpz)
    return plan_samples(meta_run, cluster, [count_step([batches], *sizes, shard_group)], 1)


def figures(plan: Plan, group: int) -> dict[str, Any]:
    """The figures of a row: memory in GiB, bytes in GB, seconds."""
    traffic = plan.traffic
    tables = sum(plan.memory[part] for part in ("tables", "optimizer"))
    communication = sum(seconds for part, seconds in plan.seconds.items() if "communication" in part)
    return {
        "group": group,
        "memory": round(plan.needed / GIB, 1),
        "fits": "yes" if plan.fits else "no",
        "tables_and_moments": round(tables / GIB, 1),
        "item_head": round(plan.memory["heads"] / GIB, 1),
        "sent": round(float(traffic.total()) / 1e9, 1),
        "for_lookups_and_head": round(float(sum(traffic[name] for name in IN_GROUP)) / 1e9, 2),
        "table_gradients": round(float(traffic["table gradients"]) / 1e9, 2),
        "step": round(plan.step_seconds, 2),
        "head_share": f"{plan.seconds['item head'] / plan.step_seconds:.0%}",
        "communication_share": f"{communication / plan.step_seconds:.0%}",
    }


if __name__ == "__main__":
    main()
