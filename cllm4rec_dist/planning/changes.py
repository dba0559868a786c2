"""Changes to a run that make it fit or its step faster, by the plans of changed runs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.config.embedding_width import NARROW_WIDTH
from cllm4rec_dist.corpus.manifest import load_manifest
from cllm4rec_dist.distributed.topology import shard_group_size
from cllm4rec_dist.planning.plan import Cluster, Plan, make_plan

_NUM_NEGATIVES = 30_000
"""Size of a sample whose gradients differ from exact ones by 1 to 2 % (docs/performance.md#a-sampled-softmax)."""
_SAMPLED_SHARE = 10
"""A catalog this many times as large as a sample is worth sampling: there it takes a tenth of the head's time."""


@dataclass(frozen=True)
class FasterRun:
    """A change that makes a step faster.

    Attributes:
        settings: overrides, or a setting of the DeepSpeed file.
        cost: disadvantage of the change.
        plan: plan with this change and all before it.
    """

    settings: str
    cost: str
    plan: Plan


def faster_runs(config: RunConfig, plan: Plan, num_samples: int) -> Iterator[FasterRun]:
    """Yield changes with a faster step that fit, each on top of the ones before.

    On several hosts it tries groups of one, two, four, ... hosts and of all ranks for `embeddings.shard_group`, and hpZ
    within a host; for a large catalog a sampled softmax.
    """
    cluster, best, fastest = plan.cluster, plan, config
    hpz: int | None = None
    if cluster.num_ranks > cluster.ranks_per_host and cluster.num_ranks % cluster.ranks_per_host == 0:
        current = shard_group_size(config.embeddings.shard_group, cluster.num_ranks)
        for size in sorted({*_group_sizes(cluster)} - {current}, reverse=True):
            changed = _changed(config, {"embeddings.shard_group": size})
            other = None if changed is None else make_plan(changed, cluster, num_samples)
            if changed is not None and other is not None and other.is_faster_than(best):
                best, fastest = other, changed
        if best is not plan:
            settings = f"embeddings.shard_group={fastest.embeddings.shard_group}"
            yield FasterRun(settings, "sums of table gradients", best)
        other = make_plan(fastest, cluster, num_samples, hpz=cluster.ranks_per_host)
        if other.is_faster_than(best):
            best, hpz = other, cluster.ranks_per_host
            yield FasterRun(f"zero_hpz_partition_size: {hpz} in the DeepSpeed file", "a copy of the weights", best)
    num_items = load_manifest(config.corpus)[0].num_items
    if config.head.num_negatives == 0 and num_items >= _SAMPLED_SHARE * _NUM_NEGATIVES:
        changes: dict[str, Any] = {"head.num_negatives": _NUM_NEGATIVES}
        if config.optimizer.words_lr_ratio:
            changes["optimizer.words_lr_ratio"] = 0.0
        sampled = _changed(fastest, changes)
        other = None if sampled is None else make_plan(sampled, cluster, num_samples, hpz=hpz)
        if other is not None and other.is_faster_than(best):
            cost = "noise in the item softmax" + ", no shared updates" * ("optimizer.words_lr_ratio" in changes)
            yield FasterRun(_overrides(changes), cost, other)


def _group_sizes(cluster: Cluster) -> Iterator[int]:
    """Yield the numbers of ranks of one, two, four, ... hosts that divide all ranks, and of all hosts."""
    size = cluster.ranks_per_host
    while size < cluster.num_ranks:
        if cluster.num_ranks % size == 0:
            yield size
        size *= 2
    yield cluster.num_ranks


_MAX_GPU_FACTOR = 64
"""Largest multiple of the given number of GPUs that is tried."""
_CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"precision": "bf16"}, "rounding; faster on GPUs"),
    ({"activation_checkpointing": True}, "a third more compute in the backbone"),
    ({"embeddings.dim": NARROW_WIDTH}, "narrower rows, in both stages"),
    ({"batch.gradient_accumulation_steps": 2}, "more, smaller passes"),
    ({"batch.gradient_accumulation_steps": 4}, "more, smaller passes"),
    ({"batch.gradient_accumulation_steps": 8}, "more, smaller passes"),
    ({"optimizer.embeddings_state": "int8"}, "moments of embeddings in 8 bits"),
    ({"optimizer.embeddings_state": "cpu"}, "embeddings are stepped on the host"),
    ({"quantization": "nf4"}, "frozen weights in 4 bits, which is slower"),
]
"""Settings that need less memory, and their costs, cheapest first."""


@dataclass(frozen=True)
class Change:
    """A change that needs less memory.

    Attributes:
        settings: overrides, or an option of the command.
        cost: disadvantage of the change.
        needed: bytes that a GPU must have with this change and all before it.
    """

    settings: str
    cost: str
    needed: int


def suggest_changes(config: RunConfig, plan: Plan, num_samples: int) -> Iterator[Change]:
    """Yield changes until the run fits, cheapest first, each on top of those before."""
    cluster = plan.cluster
    for settings, cost in _CHANGES:
        if plan.fits:
            return
        if settings.get("embeddings.dim", 0) >= plan.embedding_width:
            continue
        changed = _changed(config, settings)
        if changed is None:
            continue
        plan = make_plan(changed, cluster, num_samples)
        config = changed
        yield Change(_overrides(settings), cost, plan.needed)
    max_ranks = min(cluster.num_ranks * _MAX_GPU_FACTOR, config.batch.users)
    while not plan.fits and 2 * cluster.num_ranks <= max_ranks:
        cluster = replace(cluster, num_ranks=2 * cluster.num_ranks)
        plan = make_plan(config, cluster, num_samples)
        yield Change(f"--gpus {cluster.num_ranks}", "twice the GPUs", plan.needed)


def _overrides(settings: Mapping[str, Any]) -> str:
    """Format settings as arguments of a command."""
    return " ".join(f"{key}={value}" for key, value in settings.items())


def _changed(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig | None:
    """Return the configuration with changed settings; None if they change nothing or are not allowed."""
    tree = config.model_dump(mode="json")
    for key, value in settings.items():
        *sections, leaf = key.split(".")
        node = tree
        for section in sections:
            node = node[section]
        if node[leaf] == value or (leaf == "gradient_accumulation_steps" and node[leaf] >= value):
            return None
        node[leaf] = value
    if settings.get("quantization") and config.adapter.kind == "full":
        return None
    return validate(RunConfig, tree, "plan")
