"""Using a trained run: which of its checkpoints is read, where its corpus and backbone are now, and loading it.

A run is loaded in this process alone where that will do (`load_local`), else on all ranks (`load_sharded`). Checkpoints
record the paths of their corpus and backbone; when a run has moved to another machine, other paths may be given, and
the fingerprints in the checkpoint decide whether they are the right ones (`require_same_fingerprints`). A run of a
project finds them in that project first, so that a copy of a project does not read what the original has become.
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

from cllm4rec_dist.checkpointing import checkpoint
from cllm4rec_dist.checkpointing.find_run import corpus_in_project, find, folders_in_project
from cllm4rec_dist.checkpointing.format import Checkpoint, RunState
from cllm4rec_dist.checkpointing.run_folder import BEST, STEP
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.config import RunConfig, validate
from cllm4rec_dist.corpus.manifest import MANIFEST_NAME
from cllm4rec_dist.distributed.topology import World
from cllm4rec_dist.errors import CLLM4RecError, ConfigError
from cllm4rec_dist.evaluation.results import Provenance
from cllm4rec_dist.filesystems import as_os_errors, locate
from cllm4rec_dist.model.backbone import fingerprint
from cllm4rec_dist.monitoring.banner import device_name, parameter_counts
from cllm4rec_dist.system import (
    InferenceSystem,
    System,
    assemble,
    assemble_for_inference,
    without_missing_deepspeed_file,
)

logger = logging.getLogger(__name__)


SystemT = TypeVar("SystemT", bound=InferenceSystem)


def load(
    run: str, world: World, backbone: str | None = None, corpus: str | None = None
) -> tuple[InferenceSystem, Checkpoint]:
    """The system of a run's best checkpoint (or of the checkpoint given), and that checkpoint. Collective.

    One rank alone goes without DeepSpeed, unless the run's DeepSpeed file offloads what its device cannot hold.

    Args:
        backbone, corpus: where they are now, if not where the checkpoint says.

    Raises:
        CheckpointError: where none is whole, or its backbone, corpus or tokenizer has changed or is gone.
    """

    def build(config: RunConfig) -> InferenceSystem:
        if world.size > 1 or _offloads_parameters(config):
            if not dist.is_initialized():
                from cllm4rec_dist.distributed.engine import start_world  # imports DeepSpeed

                start_world()
            return assemble(without_missing_deepspeed_file(config), world)
        return assemble_for_inference(config, world)

    return _load(run, world, build, backbone, corpus)


def load_sharded(
    run: str, world: World, backbone: str | None = None, corpus: str | None = None
) -> tuple[System, Checkpoint]:
    """As `load`, with all that training needs, content LLM included, on any number of ranks. Collective."""
    return _load(run, world, lambda config: assemble(without_missing_deepspeed_file(config), world), backbone, corpus)


def load_local(
    run: str, device: torch.device, backbone: str | None = None, corpus: str | None = None
) -> tuple[InferenceSystem, Checkpoint]:
    """As `load`, in this process alone and whole on one device."""
    world = World(0, 1, 0, device)
    return _load(run, world, lambda config: assemble_for_inference(config, world), backbone, corpus)


def _load(
    run: str, world: World, build: Callable[[RunConfig], SystemT], backbone: str | None, corpus: str | None
) -> tuple[SystemT, Checkpoint]:
    store, names = find(run)
    opened = checkpoint.load_first_valid(store, names, world, lambda found: recorded_config(found, backbone, corpus))
    if opened is not None:
        system = build(opened[1])
        checkpoint.require_same_fingerprints(opened[0], system.fingerprints)
        found = checkpoint.load_first_valid(store, names, world, lambda c: checkpoint.read(system, c, moments=False))
        if found is not None:
            checkpoint.restore_weights(system, found[1])
            if world.is_main:
                log_choice(store, names, found[0])
            return system, found[0]
    raise checkpoint.all_damaged(run, store, names)


def _offloads_parameters(config: RunConfig) -> bool:
    """True where the run's DeepSpeed file is at hand and keeps parameters off the device."""
    if config.deepspeed is None or not Path(config.deepspeed).is_file():
        return False
    try:
        settings = json.loads(Path(config.deepspeed).read_text(encoding="utf-8"))
        return settings["zero_optimization"]["offload_param"]["device"] not in (None, "none")
    except (OSError, ValueError, KeyError, TypeError):
        return False


def log_choice(store: Store, names: Sequence[str], used: Checkpoint) -> None:
    """Log which checkpoint is read and what it was chosen by, and warn of newer weights that nobody has validated.

    Args:
        names: checkpoints among which `used` was chosen, as `find` gives them.
    """
    logger.info("reading %s: %s", used.path, _describe(used))
    newest = max((name for name in names if name.startswith(STEP)), default=None)
    if not used.name.startswith(BEST) or newest is None:
        return
    try:
        latest = Checkpoint.open(store, newest)
    except CLLM4RecError:
        return  # damaged: nothing that could have been read instead
    validated = _last_validation(latest.metadata.run)
    if validated is not None and latest.metadata.run.step > max(validated, used.metadata.run.step):
        logger.warning(
            "NEWER CHECKPOINT NOT VALIDATED: %s went on to step %d, the last validation was at step %d; to use it, give"
            " its path instead of the run's, or let the run go on with validation",
            latest.path,
            latest.metadata.run.step,
            validated,
        )


def _describe(used: Checkpoint) -> str:
    state = used.metadata.run
    if state.best is None:
        return f"step {state.step}, never validated"
    best = f"best {state.best_metric or 'validation result'}={state.best:.4f}"
    if state.best_step == state.step:
        return f"step {state.step}, {best}"
    return f"step {state.step}, not the best one ({best} at step {state.best_step})"


def _last_validation(state: RunState) -> int | None:
    """The step of the last validation; None where a checkpoint from before `validated_step` does not tell."""
    if state.validated_step is not None:
        return state.validated_step
    return state.best_step if state.validations_since_best == 0 else None


def provenance(system: InferenceSystem, used: Checkpoint) -> Provenance:
    """What an evaluation that ends now says of its model."""
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


def recorded_config(used: Checkpoint, backbone: str | None = None, corpus: str | None = None) -> RunConfig:
    """The configuration of a checkpoint, with the paths of corpus and backbone as they are now.

    These are the ones given, else those in the run's project that have the checkpoint's fingerprints, else the recorded
    ones.

    Raises:
        ConfigError: where a recorded path is no longer there and no other one is given or found.
    """
    config = validate(RunConfig, used.metadata.config, f"{used.path}: configuration")
    corpus = corpus or corpus_in_project(used.store, used.metadata.fingerprints.get("corpus"))
    return relocated(config, used.path, backbone or _backbone_in_project(used), corpus)


def _backbone_in_project(used: Checkpoint) -> str | None:
    """The backbone of a checkpoint in the project that its run is of; None where there is none."""
    wanted = used.metadata.fingerprints.get("backbone")
    folders = [folder for folder in folders_in_project(used.store, "backbone") if (folder / "config.json").is_file()]
    for folder in folders:
        try:
            if fingerprint(folder) == wanted:
                return str(folder)
        except (CLLM4RecError, OSError):
            continue  # damaged, so it is not the one
    return None


def relocated(config: RunConfig, origin: str, backbone: str | None, corpus: str | None) -> RunConfig:
    """A configuration with other paths of corpus and backbone, where they have moved.

    Args:
        origin: where the configuration is from, for errors.
        backbone, corpus: the paths as they are now; None for those of the configuration.

    Raises:
        ConfigError: where a path of the configuration is not there and no other one is given.
    """
    if backbone is None and _looks_local(config.backbone) and not Path(config.backbone).is_dir():
        raise _missing(origin, "backbone", config.backbone)
    if corpus is None and not _has_corpus(config.corpus):
        raise _missing(origin, "corpus", config.corpus)
    return config.model_copy(update={"backbone": backbone or config.backbone, "corpus": corpus or config.corpus})


def _looks_local(backbone: str) -> bool:
    """Whether it is a path and no hub id, which has the form of a relative path with at most one slash."""
    return Path(backbone).is_absolute() or backbone.startswith((".", "~")) or backbone.count("/") > 1


def _has_corpus(url: str) -> bool:
    fs, root = locate("corpus", url, ConfigError)
    try:
        with as_os_errors():
            return bool(fs.exists(f"{root}/{MANIFEST_NAME}"))
    except OSError:
        return True  # a store that does not answer: opening the corpus says what is wrong


def _missing(origin: str, kind: str, path: str) -> ConfigError:
    return ConfigError(f"{origin}: {kind}", path, f"holds no {kind}", f"If it has moved, say where: --{kind} PATH.")
