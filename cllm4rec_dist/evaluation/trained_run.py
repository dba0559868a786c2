"""Loading a trained run: choose its checkpoint, locate its corpus and backbone, and load its weights.

A run is loaded in a single process (`load_local`), or on all ranks (`load_sharded`). Checkpoints record the paths of
corpus and backbone. If a run has been moved, other paths may be given, and fingerprints in the checkpoint verify them
(`checkpoint.require_same_fingerprints`). In a project these are first looked up in that project, so that a copied
project does not read the original's files.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from pydantic import ValidationError

from cllm4rec_dist.checkpointing import checkpoint
from cllm4rec_dist.checkpointing.find_run import corpus_in_project, find, folders_in_project
from cllm4rec_dist.checkpointing.format import Checkpoint, RunState
from cllm4rec_dist.checkpointing.run_folder import BEST, STATUS_FILE, STEP, RunRecord, is_locked
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.corpus.manifest import MANIFEST_NAME
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CLLM4RecError, ConfigError
from cllm4rec_dist.evaluation.cold_items import fill_cold_rows
from cllm4rec_dist.evaluation.results import Provenance
from cllm4rec_dist.filesystems import as_os_errors, locate
from cllm4rec_dist.model.backbone import fingerprint
from cllm4rec_dist.monitoring.banner import device_name, parameter_counts
from cllm4rec_dist.monitoring.next_steps import resume_command
from cllm4rec_dist.system import (
    InferenceSystem,
    System,
    assemble,
    assemble_for_inference,
    assemble_sharded_for_inference,
    without_missing_deepspeed_file,
)

logger = logging.getLogger(__name__)


SystemT = TypeVar("SystemT", bound=InferenceSystem)


def load(
    run: str,
    world: World,
    backbone: str | None = None,
    corpus: str | None = None,
    new_item_offset: float | None = None,
) -> tuple[InferenceSystem, Checkpoint]:
    """Load a run's best checkpoint (or the given checkpoint); return the system and the checkpoint. Collective.

    Tables are mapped into memory (`Checkpoint.rows`), which suits a command that ends. A single rank does not use
    DeepSpeed, unless the run's DeepSpeed file offloads parameters.

    Args:
        backbone, corpus: current paths, if they differ from those in the checkpoint.
        new_item_offset: offset of the item biases of new items, instead of the run's.

    Raises:
        CheckpointError: if no checkpoint is intact, or its backbone, corpus or tokenizer is missing or has changed.
        ConfigError: for an offset if the run's head has no item biases.
    """

    def build(config: RunConfig) -> InferenceSystem:
        if world.size > 1 or _offloads_parameters(config):
            if not dist.is_initialized():
                from cllm4rec_dist.distributed.engine import start_world  # imports DeepSpeed

                start_world()
            return assemble_sharded_for_inference(without_missing_deepspeed_file(config), world)
        return assemble_for_inference(config, world)

    return _load(run, world, build, backbone, corpus, new_item_offset, maps=True)


def load_sharded(
    run: str, world: World, backbone: str | None = None, corpus: str | None = None
) -> tuple[System, Checkpoint]:
    """Like `load`, with everything that training needs, including the content LLM. Collective."""
    return _load(run, world, lambda config: assemble(without_missing_deepspeed_file(config), world), backbone, corpus)


def load_local(
    run: str,
    device: torch.device,
    backbone: str | None = None,
    corpus: str | None = None,
    new_item_offset: float | None = None,
) -> tuple[InferenceSystem, Checkpoint]:
    """Like `load`, unsharded on one device in this process."""
    world = World(0, 1, 0, device)
    return _load(run, world, lambda config: assemble_for_inference(config, world), backbone, corpus, new_item_offset)


def _load(
    run: str,
    world: World,
    build: Callable[[RunConfig], SystemT],
    backbone: str | None,
    corpus: str | None,
    new_item_offset: float | None = None,
    *,
    maps: bool = False,
) -> tuple[SystemT, Checkpoint]:
    def read(opened: Checkpoint) -> checkpoint.CheckpointShard:
        return checkpoint.read(system, opened, moments=False, maps=maps)

    store, names = find(run)
    configured = checkpoint.load_first_valid(
        store, names, world, lambda opened: recorded_config(opened, backbone, corpus, new_item_offset)
    )
    if configured is not None:
        system = build(_with_one_copy_of_tables(configured[1]))
        checkpoint.require_same_fingerprints(configured[0], system.fingerprints)
        loaded = checkpoint.load_first_valid(store, names, world, read)
        if loaded is not None:
            checkpoint.restore_weights(system, loaded[1], shares_tables=True)
            fill_cold_rows(system)
            checkpoint.restore_linear_memory(system, *loaded)
            if world.is_main:
                log_choice(store, names, loaded[0])
                if new_item_offset is not None and not system.corpus.manifest.has_cold_items:
                    logger.info("the corpus has no new items: new_item_offset counts for those given by texts alone")
            return system, loaded[0]
    raise checkpoint.all_damaged(run, store, names)


def _offloads_parameters(config: RunConfig) -> bool:
    """True if the run's DeepSpeed file exists and offloads parameters."""
    if config.deepspeed is None or not Path(config.deepspeed).is_file():
        return False
    try:
        settings = json.loads(Path(config.deepspeed).read_text(encoding="utf-8"))
        return settings["zero_optimization"]["offload_param"]["device"] not in (None, "none")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def log_choice(store: Store, names: Sequence[str], used: Checkpoint) -> None:
    """Log which checkpoint is used and why, and warn of an unfinished run and of newer checkpoints without validation.

    Args:
        names: candidates from which `used` was chosen, as returned by `checkpoint.find`.
    """
    logger.info("reading %s: %s", used.path, _describe(used))
    newest = max((name for name in names if name.startswith(STEP)), default=None)
    newest_step = used.metadata.run.step if newest is None else int(newest.removeprefix(STEP))
    _log_if_unfinished(Path(store.url).parent, newest_step)
    if not used.name.startswith(BEST) or newest is None:
        return
    try:
        latest = Checkpoint.open(store, newest)
    except CLLM4RecError:
        return  # damaged, so it is not an alternative
    validated = _last_validation(latest.metadata.run)
    if validated is not None and latest.metadata.run.step > max(validated, used.metadata.run.step):
        logger.warning(
            "NEWER CHECKPOINT NOT VALIDATED: %s is at step %d, but the last validation was at step %d; to use it, give"
            " its path instead of the run's, or resume the run with validation",
            latest.path,
            latest.metadata.run.step,
            validated,
        )


def _log_if_unfinished(run: Path, newest_step: int) -> None:
    """Log whether the run in this folder, if there is one, is still training or stopped before its last step."""
    try:
        record = RunRecord.model_validate_json((run / STATUS_FILE).read_bytes())
    except (OSError, ValidationError):
        return
    if record.state == "done" or newest_step >= record.total_steps:
        return
    step, is_training = f"step {newest_step} of {record.total_steps}", is_locked(run)
    if is_training:
        logger.info("the run is still training: its newest checkpoint is of %s", step)
    elif is_training is False:  # not None, which is unknown
        command = resume_command(record.stage, run, record.num_ranks)
        logger.warning("the run has stopped before its end, with a checkpoint of %s; `%s` resumes it", step, command)


def _describe(used: Checkpoint) -> str:
    state = used.metadata.run
    if state.best is None:
        return f"step {state.step}, never validated"
    best = f"best {state.best_metric or 'validation result'}={state.best:.4f}"
    if state.best_step == state.step:
        return f"step {state.step}, {best}"
    return f"step {state.step}, not the best one ({best} at step {state.best_step})"


def _last_validation(state: RunState) -> int | None:
    """Step of the last validation; None if a checkpoint older than the field `validated_step` does not imply it."""
    if state.validated_step is not None:
        return state.validated_step
    return state.best_step if state.validations_since_best == 0 else None


def provenance(system: InferenceSystem, used: Checkpoint) -> Provenance:
    """Return the provenance of an evaluation that ends now."""
    state = used.metadata.run
    trained, frozen = parameter_counts(system)
    return Provenance(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        checkpoint=used.name,
        step=state.step,
        stage=system.config.stage,
        best_metric=state.best_metric,
        best_value=state.best,
        best_step=state.best_step,
        num_trained=sum(trained.values()),
        num_frozen=sum(frozen.values()),
        device=device_name(system.world),
        num_ranks=system.world.size,
        num_training_ranks=used.metadata.world_size,
    )


def recorded_config(
    used: Checkpoint, backbone: str | None = None, corpus: str | None = None, new_item_offset: float | None = None
) -> RunConfig:
    """Return the configuration of a checkpoint, with the paths of today.

    The width of the embeddings and the offset of new items, which may be left out, are those that the run has chosen.
    Corpus and backbone have the given paths, else those in the run's project with matching fingerprints, else the
    recorded paths.

    Raises:
        ConfigError: if a recorded path no longer exists and there is no replacement, and for an offset of new items if
            the head has no item biases.
    """
    config = validate(RunConfig, used.metadata.config, f"{used.path}: configuration")
    if used.metadata.embedding_width is not None:  # the default may be another one in this version
        embeddings = config.embeddings.model_copy(update={"dim": used.metadata.embedding_width})
        config = config.model_copy(update={"embeddings": embeddings})
    if new_item_offset is not None and not config.head.item_bias:
        raise ConfigError(
            "new_item_offset",
            new_item_offset,
            "is added to item biases, which this run does not have",
            "Leave it out: its new items are ranked like known ones.",
        )
    offsets = new_item_offset, config.head.new_item_offset, used.metadata.run.new_item_offset
    offset = next((value for value in offsets if value is not None), None)
    config = config.model_copy(update={"head": config.head.model_copy(update={"new_item_offset": offset})})
    corpus = corpus or corpus_in_project(used.store, used.metadata.fingerprints.get("corpus"))
    return relocated(config, used.path, backbone or _backbone_in_project(used), corpus)


def _with_one_copy_of_tables(config: RunConfig) -> RunConfig:
    """Shard the tables over all ranks, however many there are: only training needs groups of ranks."""
    return config.model_copy(update={"embeddings": config.embeddings.model_copy(update={"shard_group": None})})


def _backbone_in_project(used: Checkpoint) -> str | None:
    """Path of the checkpoint's backbone in the project of its run; None if it is not there."""
    expected = used.metadata.fingerprints.get("backbone")
    folders = [folder for folder in folders_in_project(used.store, "backbone") if (folder / "config.json").is_file()]
    for folder in folders:
        try:
            if fingerprint(folder) == expected:
                return str(folder)
        except (CLLM4RecError, OSError):
            continue  # damaged, so it cannot match
    return None


def relocated(config: RunConfig, origin: str, backbone: str | None, corpus: str | None) -> RunConfig:
    """Return a configuration with replaced paths of corpus and backbone.

    Args:
        origin: source of the configuration, for error messages.
        backbone, corpus: current paths; None to keep those of the configuration.

    Raises:
        ConfigError: if a path of the configuration does not exist and no replacement is given.
    """
    if backbone is None and _looks_local(config.backbone) and not Path(config.backbone).is_dir():
        raise _missing(origin, "backbone", config.backbone)
    if corpus is None and not _has_corpus(config.corpus):
        raise _missing(origin, "corpus", config.corpus)
    return config.model_copy(update={"backbone": backbone or config.backbone, "corpus": corpus or config.corpus})


def _looks_local(backbone: str) -> bool:
    """True for a path. A hub id looks like a relative path with at most one slash."""
    return Path(backbone).is_absolute() or backbone.startswith((".", "~")) or backbone.count("/") > 1


def _has_corpus(url: str) -> bool:
    fs, root = locate("corpus", url, ConfigError)
    try:
        with as_os_errors():
            return bool(fs.exists(f"{root}/{MANIFEST_NAME}"))
    except OSError:
        return True  # the store does not answer: opening the corpus reports the error


def _missing(origin: str, kind: str, path: str) -> ConfigError:
    return ConfigError(f"{origin}: {kind}", path, f"holds no {kind}", f"If it has moved, give its path: --{kind} PATH.")
