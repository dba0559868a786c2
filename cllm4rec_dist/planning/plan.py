"""What a run will need, before anything starts: memory by part, bytes on the wire, FLOPs, time, and what to change.

Real steps of the corpus are counted (`sampling.py`), the run is put together on the meta device (`meta_run.py`) and its
fullest micro-batch is run there (`dry_run.py`); ZeRO-3's rules say what is gathered (`zero3_simulation.py`). Memory and
traffic are sums over these and are held to measurements by tests; time is a simple model of a GPU that nobody has
measured yet:

    time = FLOPs / (peak x efficiency) + bytes of the tables' optimizer / memory's bandwidth + wire that is not hidden

or the time to launch the kernels where that is longer, as it is for small backbones. Gathering weights and scattering
their gradients hides behind the backbone's own compute and nothing else hides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.corpus.loader import BatchLoader
from cllm4rec_dist.corpus.prompts import PromptBuilder
from cllm4rec_dist.corpus.shards import Corpus
from cllm4rec_dist.corpus.tokenizer import TokenSpace
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model import backbone
from cllm4rec_dist.model.sharded_cross_entropy import max_logits_within
from cllm4rec_dist.planning import memory
from cllm4rec_dist.planning.dry_run import ATTENTION, BACKBONE, HEAD, LOOKUP, META, WORD_HEAD, DryRun, dry_run
from cllm4rec_dist.planning.hardware import GIB, Gpu
from cllm4rec_dist.planning.memory import Memory
from cllm4rec_dist.planning.meta_run import MetaRun, make_meta_run
from cllm4rec_dist.planning.sampling import MicroBatchSample, StepSample, sample_step
from cllm4rec_dist.planning.traffic import Model, Traffic, loop_traffic, step_traffic
from cllm4rec_dist.planning.zero3_simulation import Gathers
from cllm4rec_dist.system import open_backbone, require_embeddings, uses_content

RESERVED = 2 * GIB
"""Assumed for the driver, NCCL's and cuBLAS's workspaces and what the allocator cannot use."""
WIRE_SHARE = 0.7
"""Assumed share of a link's peak that collectives reach."""
LAUNCH_SECONDS = 6e-6
"""Assumed time in which a host gives a GPU one more operator to do."""
_ADAM_PASSES = 7
"""fp32 values that a dense Adam reads and writes for one entry: weight, gradient, two moments; three of them back."""


@dataclass(frozen=True)
class Place:
    """Where a run is to be.

    Attributes:
        num_ranks: GPUs, a rank each.
        ranks_per_host: of them on one host.
        efficiency: share of the GPU's peak that matrix products reach.
    """

    gpu: Gpu
    num_ranks: int
    ranks_per_host: int
    efficiency: float


@dataclass(frozen=True)
class Plan:
    """What a run needs.

    Attributes:
        memory: bytes of the fullest rank by part at its fullest moment, `RESERVED` left out.
        traffic: bytes that the busiest rank sends in a step, by what is sent.
        flops: of the busiest rank in a step, by part.
        seconds: of a step, by what takes them.
        tokens: real ones of a step, all ranks together.
        packing_efficiency: share of the computed places that are real tokens.
        steps_per_epoch: optimizer steps.
        left_out: settings of ZeRO that are not in the figures.
    """

    place: Place
    stage: str
    memory: Memory
    traffic: Traffic
    flops: Counter[str]
    seconds: dict[str, float]
    tokens: float
    packing_efficiency: float
    steps_per_epoch: int
    left_out: list[str]

    @property
    def needed(self) -> int:
        """Bytes that a GPU must have."""
        return self.memory.total() + RESERVED

    @property
    def fits(self) -> bool:
        """Whether the GPU has them."""
        return self.needed <= self.place.gpu.memory

    @property
    def step_seconds(self) -> float:
        """Of one step."""
        return sum(self.seconds.values())


def make_plan(config: RunConfig, place: Place, num_samples: int = 2) -> Plan:
    """Plan a run.

    Args:
        num_samples: steps of the first epoch, evenly apart, whose batches are counted.

    Raises:
        ConfigError, CorpusError: as the run would.
    """
    corpus = Corpus.open(config.corpus, verify=False)
    prompts = prompt_builder_of(config, corpus)
    source = BatchLoader(corpus, prompts, config, World(0, 1, 0, META))
    steps = source.steps_per_epoch
    chosen = sorted({number * steps // num_samples for number in range(num_samples)})
    samples = [sample_step(corpus, prompts, config, place.num_ranks, step) for step in chosen]
    meta_run = make_meta_run(
        config,
        corpus.num_users,
        corpus.num_items,
        source.has_texts,
        place.num_ranks,
        max_logits_within(place.gpu.memory),
    )
    traced, unit = dry_run_fullest(meta_run, samples)
    gathers = meta_run.zero.simulate(traced.events, config.batch.gradient_accumulation_steps)
    model = traffic_model(meta_run, gathers)
    sent = (step_traffic(model, config, s, rank) for s in samples for rank in range(place.num_ranks))
    traffic = max(sent, key=Counter.total) + loop_traffic(place.num_ranks)
    flops = max((step_flops(s, traced, unit) for s in samples), key=Counter.total)
    batches = [batch for s in samples for sample in s.micro_batches for batch in sample.batches]
    tokens = sum(batch.num_tokens for batch in batches)
    return Plan(
        place,
        config.stage,
        needed_memory(meta_run, traced, gathers),
        traffic,
        flops,
        step_seconds(meta_run, place, traced, flops, traffic),
        tokens / len(samples),
        tokens / sum(batch.word_ids.numel() for batch in batches),
        steps,
        meta_run.left_out,
    )


def prompt_builder_of(config: RunConfig, corpus: Corpus) -> PromptBuilder:
    """What makes a run's documents. ConfigError and CorpusError as the run has them, without a look at weights."""
    folder, decoder, tokenizer = open_backbone(config, corpus, weights=False)
    if uses_content(config, corpus):
        backbone.require_head(folder, decoder, None)
    require_embeddings(corpus, tokenizer, decoder.vocab_size)
    space = TokenSpace(decoder.vocab_size, config.method.num_user_rows(corpus.num_users), corpus.num_items)
    return PromptBuilder(tokenizer, space, config.method, config.seed)


def dry_run_fullest(meta_run: MetaRun, samples: list[StepSample]) -> tuple[DryRun, tuple[MicroBatchSample, int]]:
    """Dry-run the micro-batch that computes most positions, and say which one it is: the micro-batch and the rank."""
    batches = [
        (sample, index, rank)
        for sample in samples
        for index in range(len(sample.micro_batches))
        for rank in range(sample.num_ranks)
    ]
    sample, index, rank = max(batches, key=lambda b: b[0].micro_batches[b[1]].num_positions[b[2]])
    share = sample.share(index, rank)
    # Another one before it, whose gradients are there already, where there is one.
    shares = [share] * min(2, len(sample.micro_batches))
    return dry_run(meta_run.dual, meta_run.model, meta_run.config, shares), (sample.micro_batches[index], rank)


def needed_memory(meta_run: MetaRun, traced: DryRun, gathers: Gathers) -> Memory:
    """Bytes of a rank by part at its fullest moment."""
    moments = memory.in_passes(meta_run, traced, gathers), memory.in_step(meta_run, traced)
    return memory.resident(meta_run) + max(moments, key=Counter.total)


def traffic_model(meta_run: MetaRun, gathers: Gathers) -> Model:
    """What the traffic of a run is computed from."""
    reduced = [p for p in meta_run.trained if p is not getattr(meta_run.dual, "anchor", None)]  # it has no gradient
    return Model(
        meta_run.model.words.embedding.shape[1],
        gathers,
        meta_run.zero.padded(reduced),
        meta_run.dtype.itemsize,
        meta_run.num_groups,
    )


def step_flops(sample: StepSample, traced: DryRun, unit: tuple[MicroBatchSample, int]) -> Counter[str]:
    """FLOPs of a step's slowest ranks: those of the dry-run micro-batch, by what each part grows with."""
    total: Counter[str] = Counter()
    one = _work(*unit)
    for batch in sample.micro_batches:
        most: Counter[str] = max((_work(batch, rank) for rank in range(sample.num_ranks)), key=lambda w: w[BACKBONE])
        for part, size in one.items():
            total[part] += traced.flops[part] * most[part] // max(1, size)
    return total


def _work(batch: MicroBatchSample, rank: int) -> Counter[str]:
    """What the FLOPs of each part are proportional to."""
    own = batch.batches[rank]
    rows, length = own.word_ids.shape
    return Counter(
        {
            BACKBONE: rows * length,
            ATTENTION: rows * length * length,
            HEAD: sum(batch.queries),
            WORD_HEAD: len(own.query_positions.get("text", ())),
        }
    )


def step_seconds(
    meta_run: MetaRun, place: Place, traced: DryRun, flops: Mapping[str, int], traffic: Traffic
) -> dict[str, float]:
    """The model of the module's docstring."""
    gpu = place.gpu
    dtype_peak = gpu.bf16 if meta_run.config.precision == "bf16" else gpu.fp32
    reached = dict.fromkeys(flops, dtype_peak * place.efficiency) | {HEAD: gpu.fp32 * place.efficiency}
    compute = {part: count / reached[part] for part, count in flops.items()}
    launches = {
        part: n * LAUNCH_SECONDS * meta_run.config.batch.gradient_accumulation_steps
        for part, n in traced.operators.items()
    }
    body = max(compute[BACKBONE] + compute[ATTENTION], launches[BACKBONE])
    link = WIRE_SHARE * (gpu.link if place.num_ranks <= place.ranks_per_host else gpu.network)
    hidden = (traffic["weights"] + traffic["weight gradients"]) / link
    exposed = max(0.0, float(hidden) - body)
    others = (traffic.total() - traffic["weights"] - traffic["weight gradients"]) / link
    # The operand of the item softmax has a dense gradient, whatever lookups give.
    tables = {
        meta_run.model.collaborative.items,
        *(t for t in meta_run.model.tables.values() if not t.sparse_gradients),
    }
    entries = sum(table.local_rows.numel() for table in tables)
    return {
        "backbone": body,
        "item head": max(compute[HEAD], launches[HEAD]),
        "word head": max(compute[WORD_HEAD], launches.get(WORD_HEAD, 0.0)),
        "lookup": launches[LOOKUP],
        "optimizer": entries * _ADAM_PASSES * 4 / gpu.bandwidth,
        "weights on the wire": exposed,
        "rest of the wire": float(others),
    }


_MOST_TIMES = 64
"""How many times the asked number of GPUs is tried at most."""
_CHANGES: list[tuple[dict[str, Any], str]] = [
    ({"precision": "bf16"}, "rounding; faster on GPUs"),
    ({"activation_checkpointing": True}, "a third more work in the backbone"),
    ({"batch.gradient_accumulation_steps": 2}, "more, smaller passes"),
    ({"batch.gradient_accumulation_steps": 4}, "more, smaller passes"),
    ({"batch.gradient_accumulation_steps": 8}, "more, smaller passes"),
    ({"optimizer.embeddings_state": "int8"}, "moments of rows in 8 bits"),
    ({"optimizer.embeddings_state": "cpu"}, "rows are stepped on the host"),
    ({"quantization": "nf4"}, "frozen weights in 4 bits, which is slower"),
]
"""Settings and what they cost, from the least to the most."""


@dataclass(frozen=True)
class Change:
    """A way to need less.

    Attributes:
        settings: overrides, or an option of the command.
        cost: what it costs.
        needed: bytes a GPU must have with it and all changes before it.
    """

    settings: str
    cost: str
    needed: int


def suggest_changes(config: RunConfig, plan: Plan, num_samples: int) -> Iterator[Change]:
    """Settings to change, the one that costs least first, each on top of those before, until the run fits."""
    place = plan.place
    for settings, cost in _CHANGES:
        if plan.fits:
            return
        changed = _changed(config, settings)
        if changed is None:
            continue
        plan = make_plan(changed, place, num_samples)
        config = changed
        yield Change(" ".join(f"{key}={value}" for key, value in settings.items()), cost, plan.needed)
    most = min(place.num_ranks * _MOST_TIMES, config.batch.users)
    while not plan.fits and 2 * place.num_ranks <= most:
        place = replace(place, num_ranks=2 * place.num_ranks)
        plan = make_plan(config, place, num_samples)
        yield Change(f"--gpus {place.num_ranks}", "twice the GPUs", plan.needed)


def _changed(config: RunConfig, settings: Mapping[str, Any]) -> RunConfig | None:
    """The configuration with other settings; None where they are no change or not allowed."""
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
