"""Checks of a whole run and of its parts: settings, files and corpus."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from cllm4rec_dist.checkpointing.run_folder import STEP, store_url
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.config import (
    BACKBONE_VECTORS,
    METRIC_NAME,
    EmbeddingsConfig,
    OptimizerConfig,
    RunConfig,
    TrackerName,
)
from cllm4rec_dist.corpus.manifest import Manifest, load_manifest
from cllm4rec_dist.errors import CheckpointError, CLLM4RecError, ConfigError, CorpusError, DataError
from cllm4rec_dist.filesystems import expand_path, is_url, locate
from cllm4rec_dist.preflight.paths import backbone_problems, folder_problems
from cllm4rec_dist.preflight.widths import width_problems
from cllm4rec_dist.suggestions import closest, did_you_mean_path

_METRIC_CURE = "Write for example recall@20 or ndcg@100."
_QUICKLY_READ_BYTES = 64 << 20
_STORE_CURE = "Give a folder; for checkpoints in an object store set checkpoint.dir."


def resolve_paths(config: RunConfig) -> tuple[RunConfig, list[CLLM4RecError]]:
    """Replace `~` and variables in the paths of a configuration and make local paths absolute.

    Ray's workers run in another folder, so paths are resolved once, by the command.

    Returns:
        The configuration, and an error for each path that cannot be resolved and is left unchanged.
    """
    errors: list[CLLM4RecError] = []

    def resolve(field: str, path: str | None) -> str | None:
        if path is None:
            return None
        try:
            expanded = expand_path(path)
        except ValueError as error:
            errors.append(ConfigError(field, path, f"cannot be resolved: {error}", "Write $$ for a dollar sign."))
            return path
        local = not is_url(expanded) and (field != "backbone" or Path(expanded).is_dir())
        return str(Path(expanded).absolute()) if local else expanded

    fields = ("corpus", "backbone", "output", "init_from", "deepspeed")
    paths = {field: resolve(field, getattr(config, field)) for field in fields}
    if config.resume not in ("auto", "none"):
        paths["resume"] = resolve("resume", config.resume)
    folder = resolve("checkpoint.dir", config.checkpoint.dir)
    checkpoint = config.checkpoint.model_copy(update={"dir": folder})
    embeddings = config.embeddings
    if embeddings.item_vectors != BACKBONE_VECTORS:
        vectors = resolve("embeddings.item_vectors", embeddings.item_vectors)
        embeddings = embeddings.model_copy(update={"item_vectors": vectors})
    return config.model_copy(update={**paths, "checkpoint": checkpoint, "embeddings": embeddings}), errors


def require_ready(
    config: RunConfig,
    path_errors: Sequence[CLLM4RecError] = (),
    *,
    sees_files: bool = True,
    writes_output: bool = True,
) -> None:
    """Refuse a run that is bound to fail, with one error for all problems.

    Args:
        config: configuration with resolved paths.
        path_errors: errors of `resolve_paths`.
        sees_files: True if this process can access the ranks' file systems; else only settings are checked.
        writes_output: True if this process is on the host that writes the run's folder.

    Raises:
        CLLM4RecError: the only problem, or a ConfigError that lists all problems.
    """
    unresolved = {error.field for error in path_errors}
    problems = [*path_errors, *setting_problems(config)]
    if is_url(config.output):
        problems += folder_problems("output", config.output, _STORE_CURE)
    elif sees_files and writes_output and "output" not in unresolved:
        problems += folder_problems("output", config.output)
    if sees_files:
        problems += tracker_problems(config.trackers)
        problems += source_problems(config, unresolved)
        if "corpus" not in unresolved:
            try:
                manifest, _ = load_manifest(config.corpus)
                problems += corpus_problems(config, manifest)
                problems += past_end_problems(config, manifest) if not problems else []
            except CLLM4RecError as error:
                problems.append(error)
    require_none(problems, "run")


def resolve_resume(config: RunConfig, environ: Mapping[str, str]) -> RunConfig:
    """Return the configuration with `resume` for the ranks. A command calls this once, before the ranks start.

    `none` becomes `auto` if the run has no checkpoint yet, so that restarts of this run resume.

    Raises:
        CheckpointError: for `none` if the run has a checkpoint.
    """
    if config.resume == "none":
        names = Store(store_url(config)).names(STEP)
        restarted = any(int(environ.get(name, "0")) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
        if names and not restarted:
            raise CheckpointError(
                "resume",
                "none",
                f"would start from scratch, but the run has {names[-1]}",
                "Choose another output, or delete the run.",
            )
        return config.model_copy(update={"resume": "auto"})
    if config.resume != "auto" and "://" not in config.resume:
        return config.model_copy(update={"resume": str(Path(config.resume).absolute())})
    return config


def require_none(problems: Sequence[CLLM4RecError], subject: str) -> None:
    """Raise a single problem unchanged, or several as a ConfigError with a line for each."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        fields = list(dict.fromkeys(problem.field for problem in problems))
        raise ConfigError(subject, fields, "cannot be used", f"Fix each:{lines}")


def metric_problems(field: str, names: Sequence[str], instead: str = "") -> list[CLLM4RecError]:
    """Return an error for each name that is no metric, or one for an empty list.

    Args:
        instead: another cure for an empty list.
    """
    if not names:
        return [ConfigError(field, list(names), "must name at least one metric", f"{_METRIC_CURE}{instead}")]
    wrong = [name for name in names if not METRIC_NAME.fullmatch(name)]
    return [
        ConfigError(field, name, "must be recall@K or ndcg@K with K >= 1", f"{_METRIC_CURE}{_suggest_metric(name)}")
        for name in wrong
    ]


def _suggest_metric(name: str) -> str:
    """Return a sentence with the metric closest to a misspelt name, for the end of a cure."""
    kind, _, cutoff = name.partition("@")
    metric = closest(kind.strip(), ("recall", "ndcg"))
    suggestion = f"{metric}@{cutoff if METRIC_NAME.fullmatch(f'{metric}@{cutoff}') else 20}"
    return "" if metric is None else f" Did you mean {suggestion!r}?"


def setting_problems(config: RunConfig) -> list[CLLM4RecError]:
    """Return the problems of the settings alone. They are no validators because old checkpoints must still load."""
    problems: list[CLLM4RecError] = []
    if _validates(config):
        no_validation = " Or set validation.every_epochs=0."
        problems += metric_problems("validation.metrics", config.validation.metrics, no_validation)
    dim = config.embeddings.dim
    if config.optimizer.embeddings_state == "int8" and dim is not None and dim % 64:
        cure = "Set embeddings.dim to a multiple of 64, or use fp32 or cpu."
        problems.append(ConfigError("optimizer.embeddings_state", "int8", f"cannot pack rows of width {dim}", cure))
    if config.checkpoint.full_every > 1 and not config.optimizer.sparse_embedding_updates:
        problems.append(
            ConfigError(
                "checkpoint.full_every",
                config.checkpoint.full_every,
                "saves nothing with optimizer.sparse_embedding_updates=false, where each step changes every row",
                "Set it to 1, or optimizer.sparse_embedding_updates=true.",
            )
        )
    betas = config.optimizer.betas
    if not all(0 <= beta < 1 for beta in betas):
        problems.append(
            ConfigError("optimizer.betas", betas, "must each be at least 0 and below 1", "The default is [0.9, 0.999].")
        )
    return problems


def source_problems(config: RunConfig, unresolved: Iterable[str] = ()) -> Iterator[CLLM4RecError]:
    """Yield an error for each file or folder of the run that does not exist, cannot be used, or has another width."""
    given = {"deepspeed": config.deepspeed, "resume": config.resume, "init_from": config.init_from}
    if config.resume in ("auto", "none"):
        del given["resume"]
    for field in given.keys() - set(unresolved):
        path = given[field]
        if path is None or is_url(path) or Path(path).exists():
            continue
        if field != "init_from" or not _has_checkpoints(config):  # a run with checkpoints does not read init_from
            yield ConfigError(field, path, "does not exist", f"Fix the path.{did_you_mean_path(path)}")
    if "backbone" not in unresolved:
        yield from backbone_problems("backbone", config.backbone)
    if config.checkpoint.dir is not None and "checkpoint.dir" not in unresolved:
        try:
            locate("checkpoint.dir", config.checkpoint.dir, CheckpointError)
        except CheckpointError as error:
            yield error
            return
        if not is_url(config.checkpoint.dir):
            yield from folder_problems("checkpoint.dir", config.checkpoint.dir)
    reads_vectors = config.embeddings.item_vectors is not None and "embeddings.item_vectors" not in unresolved
    reads_init_from = config.init_from is not None and "init_from" not in unresolved
    if (reads_vectors or reads_init_from) and _has_checkpoints(config):  # which does not read them
        reads_vectors = reads_init_from = False
    if reads_vectors:
        yield from item_vectors_problems(config.embeddings)
    if "backbone" not in unresolved:
        yield from width_problems(config, reads_init_from=reads_init_from)


def item_vectors_problems(config: EmbeddingsConfig) -> Iterator[CLLM4RecError]:
    """Yield an error for item vectors that cannot be used. Vectors themselves are read from small local files only."""
    path, field = config.item_vectors, "embeddings.item_vectors"
    if path is None:
        return
    if config.init == "prior":
        yield ConfigError(field, path, "has no effect with embeddings.init=prior", "Set embeddings.init=spectral.")
    if path == BACKBONE_VECTORS or is_url(path):
        return
    if not Path(path).is_file():
        what = "is a folder" if Path(path).is_dir() else "does not exist"
        yield ConfigError(field, path, what, f"Give a Parquet file.{did_you_mean_path(path)}")
        return
    from cllm4rec_dist.corpus import item_vectors  # imports pyarrow; most runs have no vectors

    try:
        if Path(path).stat().st_size > _QUICKLY_READ_BYTES:
            item_vectors.require_columns(path)
        else:
            item_vectors.require_valid(path)
    except DataError as error:
        yield error


def corpus_problems(config: RunConfig, manifest: Manifest) -> list[CLLM4RecError]:
    """Return the problems of a run with its corpus."""
    problems: list[CLLM4RecError] = []
    if manifest.num_items < 2:
        problems.append(
            CorpusError(
                f"{config.corpus}: items",
                manifest.num_items,
                "must be at least 2, or there is nothing to rank",
                "Check the recipe: its filters may leave too little.",
            )
        )
    if _validates(config) and not manifest.num_held_out("valid"):
        why, split = "holds out no validation items", "split.valid (or split.num_valid)"
        if manifest.preparation.split.kind == "none":
            why, split = "was built to train on everything (split: {kind: none})", "a split that holds items out"
        problems.append(
            ConfigError(
                "validation.every_epochs",
                config.validation.every_epochs,
                f"enables validation, but the corpus {config.corpus} {why}",
                f"Set validation.every_epochs=0, or build the corpus again with {split}.",
            )
        )
    warmup, steps = config.optimizer.warmup_steps, num_steps(config, manifest)
    # Nobody chose the default, even if it is in the resolved configuration of a run.
    if warmup > steps and warmup != OptimizerConfig.model_fields["warmup_steps"].default:
        problems.append(
            ConfigError(
                "optimizer.warmup_steps",
                warmup,
                f"exceeds the run's {steps} steps ({config.epochs} epochs of {steps // config.epochs}): the learning"
                " rate would never reach its peak",
                f"Set optimizer.warmup_steps={max(1, steps // 10)} or another number up to {steps}, or raise epochs.",
            )
        )
    return problems


def warmup_warning(config: RunConfig, manifest: Manifest) -> str | None:
    """Return a warning for a run that ends during its warm-up because of max_steps or the default, else None."""
    warmup = config.optimizer.warmup_steps
    steps = min(num_steps(config, manifest), config.max_steps or warmup)
    if warmup <= steps:
        return None
    return (
        f"the run ends during its warm-up: after {steps} of optimizer.warmup_steps={warmup} steps the learning rate has"
        f" reached {steps / warmup:.0%} of its peak"
    )


def num_steps(config: RunConfig, manifest: Manifest) -> int:
    """Return the optimizer steps of all epochs, ignoring max_steps."""
    return config.epochs * -(-manifest.num_users // config.batch.users)


def total_steps(config: RunConfig, manifest: Manifest) -> int:
    """Return the optimizer steps of the run."""
    steps = num_steps(config, manifest)
    return steps if config.max_steps is None else min(steps, config.max_steps)


def past_end_problems(config: RunConfig, manifest: Manifest) -> list[CLLM4RecError]:
    """Return an error if the run has a checkpoint after its last step: it would record fewer epochs than were trained.

    Raises:
        CheckpointError: if the run's checkpoints cannot be listed.
    """
    names, last = Store(store_url(config)).names(STEP), total_steps(config, manifest)
    step = int(names[-1].removeprefix(STEP)) if names else 0
    if step <= last:
        return []
    steps_per_epoch = num_steps(config, manifest) // config.epochs
    of_epochs = last == num_steps(config, manifest)
    field, value, least = (
        ("epochs", config.epochs, -(-step // steps_per_epoch)) if of_epochs else ("max_steps", config.max_steps, step)
    )
    return [
        ConfigError(
            field,
            value,
            f"ends the run after {last:,} steps, but {step:,} steps are already trained ({config.output})",
            f"Set {field}={least} or more, or choose another output to train from scratch.",
        )
    ]


def require_held_out(manifest: Manifest, split: str, *, with_baselines: bool) -> None:
    """Refuse an evaluation without held-out items before it starts.

    Raises:
        DataError: if the split has no items, or if baselines cannot be tuned because validation has none.
    """
    rebuild = "build the corpus again with a split that holds items out"
    if not manifest.num_held_out(split):
        others = [name for name in ("test", "valid") if manifest.num_held_out(name)]
        cure = f"Give --split {others[0]}, or {rebuild}." if others else f"{rebuild.capitalize()}."
        everything = manifest.preparation.split.kind == "none"
        why = ", which was built to train on everything (split: {kind: none})" if everything else ""
        raise DataError("--split", split, f"has no held-out items in this corpus{why}", cure)
    if with_baselines and not manifest.num_held_out("valid"):
        raise DataError(
            "validation items",
            0,
            "but baselines choose their settings by validation",
            f"Give --no-baselines, or {rebuild} for validation.",
        )


def _validates(config: RunConfig) -> bool:
    return config.stage == "finetune" and config.validation.every_epochs > 0


def _has_checkpoints(config: RunConfig) -> bool:
    return bool(Store(store_url(config)).names(STEP))


def tracker_problems(names: Sequence[TrackerName]) -> list[CLLM4RecError]:
    """Return an error for each tracker whose library is not installed. Imports none of them."""
    modules: dict[TrackerName, tuple[str, ...]] = {
        "tensorboard": ("tensorboard",),
        "wandb": ("wandb",),
        "mlflow": ("mlflow",),
    }
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if not uri or uri.startswith("sqlite:"):
        modules["mlflow"] = ("mlflow", "sqlalchemy", "alembic")
    return [
        ConfigError(
            "trackers",
            name,
            f"needs {', '.join(missing)}, which {'is' if len(missing) == 1 else 'are'} not installed",
            f"pip install 'cllm4rec_dist[{name}]', or leave {name} out of trackers.",
        )
        for name in dict.fromkeys(names)
        if (missing := [module for module in modules[name] if importlib.util.find_spec(module) is None])
    ]
