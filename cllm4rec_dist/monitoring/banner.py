"""Banner of a training run, logged before its first step: data, model, machine, steps and initial weights."""

from __future__ import annotations

import platform
import zlib
from dataclasses import asdict

import torch

from cllm4rec_dist.config import OptimizerConfig, RunConfig
from cllm4rec_dist.corpus.manifest import Manifest
from cllm4rec_dist.distributed.collectives import gather_integers
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.model import backbone
from cllm4rec_dist.model.linear_fit import LinearSettings
from cllm4rec_dist.model.text_rows import DEFAULT_OFFSET
from cllm4rec_dist.monitoring.progress import Schedule
from cllm4rec_dist.system import InferenceSystem, System

_DTYPES = {"fp32": "fp32", "bf16": "bf16 (embeddings, optimizer and losses fp32)"}


def banner_rows(system: System, schedule: Schedule, ranks: str, origin: str) -> list[tuple[str, str]]:
    """Return the labels and texts of a run's banner.

    Args:
        ranks: result of `describe_ranks`.
        origin: text that names the checkpoint it resumes from or the run it starts from.
    """
    config, manifest = system.config, system.corpus.manifest
    trained, frozen = parameter_counts(system)
    rows = [
        ("data", describe_data(manifest)),
        ("backbone", _backbone(config)),
        ("trained", _counts(trained)),
        ("frozen", _counts(frozen)),
        ("precision", _precision(config)),
        ("ranks", f"{ranks}{_describe_copies(system.recommender.replicas.size)}"),
        ("batch", describe_batch(config, system.world.size)),
        ("steps", describe_steps(schedule)),
        ("rate", describe_rates(config.optimizer, system.recommender.words.scale)),
        ("validation", describe_validation(config, manifest, schedule.first_step)),
        ("start", origin),
    ]
    if config.trackers:
        rows.append(("trackers", ", ".join(config.trackers)))
    return rows


def _describe_copies(num_replicas: int) -> str:
    return f", {num_replicas} copies of the tables" if num_replicas > 1 else ""


def describe_data(manifest: Manifest) -> str:
    """Return e.g. `demo: 600 users, 400 items, 9,570 training interactions, 10,970 texts`."""
    interactions, texts = manifest.num_interactions.get("train", 0), sum(manifest.num_content.values())
    return (
        f"{manifest.name}: {manifest.num_users:,} users, {manifest.num_items:,} items,"
        f" {interactions:,} training interactions, {texts:,} texts"
    )


def parameter_counts(system: InferenceSystem) -> tuple[dict[str, int], dict[str, int]]:
    """Return the numbers of trained and of frozen parameters by part, summed over all ranks."""
    model, config = system.recommender, system.config
    in_engine, frozen = system.engine.num_parameters()
    embeddings = sum(table.partition.num_rows * table.local_rows.shape[1] for table in model.tables.values())
    bias = model.item_partition.num_rows if model.head.local_bias is not None else 0
    if model.input_projection is not None:
        embeddings += model.input_projection.numel()
    head = bias + sum(p.numel() for name, p in model.replicated_parameters() if name.startswith("head."))
    words = model.words.embedding.numel()
    if model.words.head is not None and model.words.head.data_ptr() != model.words.embedding.data_ptr():
        words += model.words.head.numel()
    name = "backbone" if config.adapter.kind == "full" else "adapters"
    return {name: in_engine, "embeddings": embeddings, "head": head}, {"backbone": frozen, "words": words}


def _counts(counts: dict[str, int]) -> str:
    parts = ", ".join(f"{part} {count:,}" for part, count in counts.items() if count)
    return f"{sum(counts.values()):,} parameters ({parts})"


def _backbone(config: RunConfig) -> str:
    decoder = backbone.load_config(backbone.local_folder(config.backbone, weights=False))
    depth = decoder.num_hidden_layers
    shape = f"{depth} layer{'s' if depth > 1 else ''} of width {decoder.hidden_size}"
    return f"{config.backbone}: {decoder.model_type}, {shape}, {decoder.vocab_size:,} words"


def _precision(config: RunConfig) -> str:
    quantized = "" if config.quantization == "none" else f", frozen weights in {config.quantization}"
    return _DTYPES[config.precision] + quantized


def describe_ranks(world: World) -> str:
    """Return e.g. `2 on 1 host, CPU`. Collective: gathers a hash of each rank's host name."""
    hosts = len({name for (name,) in gather_integers([zlib.crc32(platform.node().encode())], world)})
    return f"{world.size} on {hosts} host{'s' * (hosts > 1)}, {device_name(world)}"


def device_name(world: World) -> str:
    """Return the name of this rank's GPU, or `CPU`."""
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"


def describe_batch(config: RunConfig, num_ranks: int) -> str:
    """Return e.g. `64 users and 64 texts a step, 32 and 32 on each rank, in 2 micro-batches`."""
    batch = config.batch
    parts = [(batch.users, "users"), *([(batch.texts, "texts")] if batch.texts else [])]
    text = f"{' and '.join(f'{size:,} {name}' for size, name in parts)} a step"
    if num_ranks > 1:
        text += f", {' and '.join(f'{size / num_ranks:,.4g}' for size, _ in parts)} on each rank"
    if batch.gradient_accumulation_steps > 1:
        text += f", in {batch.gradient_accumulation_steps} micro-batches"
    return text


def describe_steps(schedule: Schedule) -> str:
    """Return e.g. `120 in 12 epochs of 10, from step 40`."""
    text = f"{schedule.total_steps:,} in {schedule.num_epochs:,} epochs of {schedule.steps_per_epoch:,}"
    return f"{text}, from step {schedule.first_step:,}" if schedule.first_step else text


def describe_rates(optimizer: OptimizerConfig, embedding_scale: float) -> str:
    """Describe the learning rates and their schedule.

    Args:
        embedding_scale: root mean square of the word embeddings, and of user and item embeddings at first.
    """
    decay = "" if optimizer.schedule == "constant" else f" to {optimizer.min_lr_ratio:g} of it"
    return (
        f"{optimizer.lr:g} (embeddings {optimizer.embeddings_lr:g}, {optimizer.embeddings_lr / embedding_scale:.2%} of"
        f" their scale), {optimizer.schedule}{decay} after {optimizer.warmup_steps:,} steps of warm-up"
    )


def describe_validation(config: RunConfig, manifest: Manifest, first_step: int) -> str:
    """Describe when the run is validated and by which metric, or why it is not.

    Args:
        first_step: completed steps; a resumed run keeps what its validations have chosen.
    """
    validation = config.validation
    if config.stage == "pretrain":
        return "none in pretraining; finetune validates"
    if validation.every_epochs == 0:
        missing = "" if first_step else _not_chosen(config, manifest)
        return f"none (validation.every_epochs=0); the last checkpoint is the result{missing}"
    every = "every epoch" if validation.every_epochs == 1 else f"every {validation.every_epochs} epochs"
    chosen, *others = validation.metrics
    also = f", also {', '.join(others)}" if others else ""
    return f"{every} on {manifest.num_held_out('valid'):,} interactions; best by {chosen}{also}"


def _not_chosen(config: RunConfig, manifest: Manifest) -> str:
    """Name the settings that only a validation chooses, which a run without one should be given."""
    missing, linear = [], config.linear
    unset = [f"linear.{name}" for name in asdict(LinearSettings()) if getattr(linear, name) is None]
    if linear.neighbors and unset and not manifest.num_held_out("valid"):
        missing.append(f"{', '.join(unset)} have their defaults")
    if linear.neighbors and linear.weight is None:
        missing.append("linear.weight is 0, so the linear memory will not be used")
    if manifest.has_cold_items and config.head.item_bias and config.head.new_item_offset is None:
        missing.append(f"head.new_item_offset is {DEFAULT_OFFSET:g}")
    if not missing:
        return ""
    return f". {' and '.join(missing)}: set what a validated run with these settings has chosen (its log)"
