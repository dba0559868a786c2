"""Description of a loaded run: checkpoint, sizes and validation metric."""

from __future__ import annotations

from dataclasses import dataclass

from cllm4rec_dist.checkpointing.format import Checkpoint
from cllm4rec_dist.system import InferenceSystem


@dataclass(frozen=True)
class RunInfo:
    """Description of a loaded run.

    Attributes:
        run: as given to `Recommender.load`.
        checkpoint: name of the checkpoint, such as best-00000010.
        step: completed optimizer steps.
        date: time at which the checkpoint was written, ISO 8601 in UTC, in seconds; "" if the store does not record it.
        stage: pretrain or finetune.
        best_metric: validation metric that selects checkpoints; None if the run never validated.
        best_value: its value for this checkpoint; None if this is not the best one.
        corpus: name of the corpus.
        num_users, num_items: rows of the run.
        backbone: path or hub id.
        num_parameters: backbone, adapters, word embeddings, tables and head together.
        num_trained: trainable parameters among these.
        has_categories: True if the corpus has item categories.
    """

    run: str
    checkpoint: str
    step: int
    date: str
    stage: str
    best_metric: str | None
    best_value: float | None
    corpus: str
    num_users: int
    num_items: int
    backbone: str
    num_parameters: int
    num_trained: int
    has_categories: bool


def describe_run(run: str, system: InferenceSystem, checkpoint: Checkpoint) -> RunInfo:
    """Describe the run whose checkpoint has been loaded into `system`; `run` is its path."""
    config, state, model = system.config, checkpoint.metadata.run, system.recommender
    written = checkpoint.store.modified(checkpoint.name)
    tables = [parameter for parameter in model.parameters() if parameter.requires_grad]
    in_tables = sum(parameter.numel() for parameter in tables)
    adapters = sum(partition.num_rows for partition in system.engine.partitions().values())
    return RunInfo(
        run=run,
        checkpoint=checkpoint.name,
        step=state.step,
        date="" if written is None else written.isoformat(timespec="seconds"),
        stage=config.stage,
        best_metric=state.best_metric,
        best_value=state.best if state.best_step == state.step else None,
        corpus=system.corpus.manifest.name,
        num_users=system.corpus.num_users,
        num_items=system.corpus.num_items,
        backbone=config.backbone,
        num_parameters=sum(system.engine.num_parameters()) + model.words.embedding.numel() + in_tables,
        num_trained=adapters + in_tables,
        has_categories="category" in system.corpus.items().column_names,
    )
