"""Plans a run before it starts: memory by part, communication, FLOPs, time, and what to change.

Steps of the corpus are sampled (`sampling.py`), the run is built on the meta device (`meta_run.py`), its largest
micro-batch is run there (`dry_run.py`), and ZeRO-3's gathers are simulated (`zero3_simulation.py`). Tests compare
memory and traffic with measurements. Time is a simple model of a GPU that has not been compared with measurements:

    time = FLOPs / (peak x efficiency) + bytes of the tables' optimizer / memory bandwidth + exposed communication

or the time to launch the kernels if that is longer, as for small backbones. Only the gathers of weights and the
reduce-scatters of their gradients overlap with compute, that of the backbone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from cllm4rec_dist.config import RunConfig
from cllm4rec_dist.corpus.loader import BatchLoader
from cllm4rec_dist.corpus.prompts import PromptBuilder
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.tokenizer import TokenSpace
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model import backbone
from cllm4rec_dist.model.linear_cross_entropy import max_logits_within
from cllm4rec_dist.planning import memory
from cllm4rec_dist.planning.dry_run import ATTENTION, BACKBONE, HEAD, LOOKUP, META, WORD_HEAD, DryRun, dry_run
from cllm4rec_dist.planning.hardware import GIB, Gpu
from cllm4rec_dist.planning.memory import Memory
from cllm4rec_dist.planning.meta_run import MetaRun, make_meta_run, measure_shared_words
from cllm4rec_dist.planning.sampling import MicroBatchSample, StepSample, sample_step
from cllm4rec_dist.planning.traffic import IN_GROUP, Model, Traffic, loop_traffic, step_traffic
from cllm4rec_dist.planning.zero3_simulation import Gathers
from cllm4rec_dist.system import open_backbone, require_embeddings, uses_content

RESERVED = 2 * GIB
"""Assumed for the driver, workspaces of NCCL and cuBLAS, and fragmentation of the allocator."""
LINK_EFFICIENCY = 0.7
"""Assumed fraction of a link's peak that collectives reach."""
LAUNCH_SECONDS = 6e-6
"""Assumed time to launch an operator on a GPU."""
WORTHWHILE = 0.98
"""Largest time of a step, relative to that of another layout, for which a change is suggested."""
_ADAM_ACCESSES = 7
"""fp32 accesses of a dense Adam per entry: reads weight, gradient and two moments, writes all but the gradient."""


@dataclass(frozen=True)
class Cluster:
    """GPUs of a run.

    Attributes:
        num_ranks: number of GPUs, one per rank.
        ranks_per_host: number of GPUs per host.
        efficiency: fraction of the GPU's peak that matrix products reach.
    """

    gpu: Gpu
    num_ranks: int
    ranks_per_host: int
    efficiency: float


@dataclass(frozen=True)
class Plan:
    """Requirements of a run.

    Attributes:
        memory: peak bytes of the fullest rank by part, without `RESERVED`.
        traffic: bytes that the busiest rank sends in a step, by content.
        flops: FLOPs of the busiest rank in a step, by part.
        seconds: time of a step by part.
        tokens: tokens of a step over all ranks, without padding.
        packing_efficiency: fraction of the computed positions that are tokens.
        steps_per_epoch: optimizer steps per epoch.
        linear_flops: FLOPs of a rank's CPUs for solving the linear memory, once, before finetuning.
        embedding_width: width of the user and item embeddings.
        left_out: ZeRO settings that the plan does not include.
    """

    cluster: Cluster
    stage: str
    memory: Memory
    traffic: Traffic
    flops: Counter[str]
    seconds: dict[str, float]
    tokens: float
    packing_efficiency: float
    steps_per_epoch: int
    linear_flops: int
    embedding_width: int
    left_out: list[str]

    @property
    def needed(self) -> int:
        """Bytes of memory that a GPU must have."""
        return self.memory.total() + RESERVED

    @property
    def fits(self) -> bool:
        """True if the GPU has enough memory."""
        return self.needed <= self.cluster.gpu.memory

    @property
    def step_seconds(self) -> float:
        """Time of a step."""
        return sum(self.seconds.values())

    def is_faster_than(self, other: Plan) -> bool:
        """True if this run fits, and the other does not or takes longer for a step by more than a little."""
        return self.fits and (not other.fits or self.step_seconds < WORTHWHILE * other.step_seconds)


def make_plan(config: RunConfig, cluster: Cluster, num_samples: int = 2, hpz: int | None = None) -> Plan:
    """Plan a run.

    Args:
        num_samples: number of evenly spaced steps of the first epoch to sample.
        hpz: ranks of a group of hpZ; those of the DeepSpeed file if None.

    Raises:
        ConfigError, CorpusError: as in the run.
    """
    corpus = Corpus.open(config.corpus, verify=False)
    prompts = prompt_builder_of(config, corpus)
    source = BatchLoader(corpus, prompts, config, World(0, 1, 0, META))
    steps = source.steps_per_epoch
    sampled = sorted({index * steps // num_samples for index in range(num_samples)})
    samples = [sample_step(corpus, prompts, config, cluster.num_ranks, step) for step in sampled]
    meta_run = make_meta_run(
        config,
        corpus.num_users,
        corpus.num_items,
        source.has_texts,
        cluster.num_ranks,
        max_logits_within(cluster.gpu.memory),
        hpz,
        measure_shared_words(config, corpus, prompts.space.num_words, cluster.num_ranks),
    )
    return plan_samples(meta_run, cluster, samples, steps)


def plan_samples(meta_run: MetaRun, cluster: Cluster, samples: list[StepSample], steps_per_epoch: int) -> Plan:
    """Plan a run from sampled steps."""
    config = meta_run.config
    traced, unit = dry_run_fullest(meta_run, samples)
    gathers = meta_run.zero.simulate(traced.events, config.batch.gradient_accumulation_steps)
    model = traffic_model(meta_run, gathers)
    sent = (step_traffic(model, config, s, rank) for s in samples for rank in range(cluster.num_ranks))
    traffic = max(sent, key=Counter.total) + loop_traffic(cluster.num_ranks)
    flops = max((step_flops(s, traced, unit) for s in samples), key=Counter.total)
    batches = [batch for s in samples for sample in s.micro_batches for batch in sample.batches]
    tokens = sum(batch.num_tokens for batch in batches)
    return Plan(
        cluster,
        config.stage,
        needed_memory(meta_run, traced, gathers),
        traffic,
        flops,
        step_seconds(meta_run, cluster, traced, flops, traffic),
        tokens / len(samples),
        tokens / sum(batch.word_ids.numel() for batch in batches),
        steps_per_epoch,
        linear_flops(meta_run),
        meta_run.model.collaborative.items.local_rows.shape[1],
        meta_run.left_out,
    )


def linear_flops(meta_run: MetaRun) -> int:
    """FLOPs of a rank's ridge regressions, without the sparse products before them."""
    neighbors = memory.linear_neighbors(meta_run)
    return meta_run.model.item_partition.num_rows * 2 * neighbors**3 // 3


def prompt_builder_of(config: RunConfig, corpus: Corpus) -> PromptBuilder:
    """Make the prompt builder of a run without reading weights. ConfigError and CorpusError as in the run."""
    folder, decoder, tokenizer = open_backbone(config, corpus, weights=False)
    if uses_content(config, corpus):
        backbone.require_head(folder, decoder, None)
    require_embeddings(corpus, tokenizer, decoder.vocab_size)
    space = TokenSpace(decoder.vocab_size, config.method.num_user_rows(corpus.num_users), corpus.num_items)
    return PromptBuilder(tokenizer, space, config.method, config.seed, config.stage)


def dry_run_fullest(meta_run: MetaRun, samples: list[StepSample]) -> tuple[DryRun, tuple[MicroBatchSample, int]]:
    """Dry-run the micro-batch with most positions; return the trace, and the micro-batch and rank that were traced."""
    batches = [
        (sample, index, rank)
        for sample in samples
        for index in range(len(sample.micro_batches))
        for rank in range(sample.num_ranks)
    ]
    sample, index, rank = max(batches, key=lambda b: b[0].micro_batches[b[1]].num_positions[b[2]])
    largest = sample.of_rank(index, rank)
    # With gradient accumulation, run it twice, so that the traced one has gradients to add to.
    repeated = [largest] * min(2, len(sample.micro_batches))
    return dry_run(meta_run.dual, meta_run.model, meta_run.config, repeated), (sample.micro_batches[index], rank)


def needed_memory(meta_run: MetaRun, traced: DryRun, gathers: Gathers) -> Memory:
    """Peak bytes of a rank by part."""
    moments = memory.in_passes(meta_run, traced, gathers), memory.in_step(meta_run, traced)
    return memory.resident(meta_run) + memory.until_step(meta_run) + max(moments, key=Counter.total)


def traffic_model(meta_run: MetaRun, gathers: Gathers) -> Model:
    """Collect what determines the traffic of a run."""
    config, tables = meta_run.config, meta_run.model.tables
    sparse = {name: table.width for name, table in tables.items() if table.sparse_gradients}
    if config.head.num_negatives and sparse and meta_run.model.head.local_bias is not None:
        sparse |= {"head.bias": 1}
    elif not config.head.num_negatives:
        sparse.pop("collaborative.items", None)
    dense = [
        ("users" if name.endswith("users") else "items", parameter.shape[1])
        for name, parameter, _ in meta_run.model.sharded_parameters()
        if name not in sparse
    ]
    reduced = [p for p in meta_run.trained if p is not getattr(meta_run.dual, "anchor", None)]  # it has no gradient
    return Model(
        meta_run.model.collaborative.items.width,
        gathers,
        meta_run.zero.settings.hpz,
        meta_run.zero.padded(reduced),
        meta_run.dtype.itemsize,
        meta_run.num_groups,
        sum(parameter.numel() for _, parameter in meta_run.model.replicated_parameters()),
        dense,
        sparse,
        -(-config.head.num_negatives // meta_run.num_shards),
        memory.shared_word_parts(meta_run).numel(),
    )


def step_flops(sample: StepSample, traced: DryRun, unit: tuple[MicroBatchSample, int]) -> Counter[str]:
    """FLOPs of the slowest rank of each micro-batch in a step, scaled from those of the traced micro-batch."""
    total: Counter[str] = Counter()
    one = _work(*unit)
    for batch in sample.micro_batches:
        most: Counter[str] = max((_work(batch, rank) for rank in range(sample.num_ranks)), key=lambda w: w[BACKBONE])
        for part, size in one.items():
            total[part] += traced.flops[part] * most[part] // max(1, size)
    return +total


def _work(batch: MicroBatchSample, rank: int) -> Counter[str]:
    """Quantity to which the FLOPs of each part are proportional."""
    local = batch.batches[rank]
    rows, length = local.word_ids.shape
    return Counter(
        {
            BACKBONE: rows * length,
            ATTENTION: rows * length * length,
            HEAD: sum(batch.queries_with(rank)),
            WORD_HEAD: len(local.query_positions.get("text", ())),
            LOOKUP: sum(map(len, local.id_positions.values())),
        }
    )


def step_seconds(
    meta_run: MetaRun, cluster: Cluster, traced: DryRun, flops: Mapping[str, int], traffic: Traffic
) -> dict[str, float]:
    """Estimate the time of a step by part, with the model in the module's docstring."""
    gpu = cluster.gpu
    peak_by_dtype, config = {"bf16": gpu.bf16, "fp32": gpu.fp32}, meta_run.config
    peaks = dict.fromkeys((BACKBONE, ATTENTION, WORD_HEAD), peak_by_dtype[config.precision])
    peaks |= {HEAD: peak_by_dtype[config.head.compute_dtype], LOOKUP: gpu.fp32}
    compute = {part: flops.get(part, 0) / (peak * cluster.efficiency) for part, peak in peaks.items()}
    launches = {
        part: n * LAUNCH_SECONDS * meta_run.config.batch.gradient_accumulation_steps
        for part, n in traced.operators.items()
    }
    decoder = max(compute[BACKBONE] + compute[ATTENTION], launches[BACKBONE])
    link, hpz_link, group_link = (
        LINK_EFFICIENCY * (gpu.link if num_ranks <= cluster.ranks_per_host else gpu.network)
        for num_ranks in (cluster.num_ranks, meta_run.zero.settings.hpz, meta_run.num_shards)
    )
    in_hpz = traffic["weights in hpZ groups"]
    overlapped = traffic["weights"] + traffic["weight gradients"]
    exposed = max(0.0, float(overlapped / link + in_hpz / hpz_link) - decoder)
    in_group = sum(size for what, size in traffic.items() if what in IN_GROUP)
    others = (traffic.total() - overlapped - in_hpz - in_group) / link + in_group / group_link
    # The weight of an item softmax without samples has a dense gradient, even if lookups have sparse ones.
    tables = [] if config.head.num_negatives else [meta_run.model.collaborative.items]
    if not config.optimizer.sparse_embedding_updates:
        tables = [*meta_run.model.tables.values()]
    entries = sum(table.local_rows.numel() for table in tables)
    entries += sum(parameter.numel() for _, parameter in meta_run.model.replicated_parameters())
    entries += memory.shared_word_parts(meta_run).numel()
    return {
        "backbone": decoder,
        "item head": max(compute[HEAD], launches[HEAD]),
        "word head": max(compute[WORD_HEAD], launches.get(WORD_HEAD, 0.0)),
        "lookup": max(compute[LOOKUP], launches[LOOKUP]),
        "optimizer": (entries * _ADAM_ACCESSES + _shared_word_accesses(meta_run)) * 4 / gpu.bandwidth,
        "communication of weights": exposed,
        "other communication": float(others),
    }


def _shared_word_accesses(meta_run: MetaRun) -> int:
    """fp32 accesses of the two sparse products by which items share updates: a row for each entry."""
    return 2 * meta_run.shared_words.num_entries * meta_run.model.collaborative.items.width
