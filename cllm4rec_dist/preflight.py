"""Checks before a command computes anything: what can be known of a run is refused at once and all together.

A command calls this before torch, DeepSpeed or Ray are imported, which takes many seconds; `train` calls it again on
every rank, for callers without a command line. The facts are the configuration, the corpus' manifest and the local
file system. What only a loaded backbone or an opened checkpoint can tell is left to `system.py` and `train.py`.
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from cllm4rec_dist.checkpointing.run_folder import STEP, store_url
from cllm4rec_dist.checkpointing.store import Store
from cllm4rec_dist.config import METRIC_NAME, OptimizerConfig, RunConfig, TrackerName
from cllm4rec_dist.corpus.manifest import MANIFEST_NAME, Manifest, load_manifest
from cllm4rec_dist.errors import CheckpointError, CLLM4RecError, ConfigError, CorpusError, DataError
from cllm4rec_dist.filesystems import expand_path, is_url, locate
from cllm4rec_dist.suggestions import closest, closest_path, did_you_mean_path

_METRIC_CURE = "Write for example recall@20 or ndcg@100."
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_STORE_CURE = "Give a folder; for checkpoints in an object store set checkpoint.dir."


def resolve_paths(config: RunConfig) -> tuple[RunConfig, list[CLLM4RecError]]:
    """The configuration with `~` and variables in paths replaced and local paths absolute.

    Ray's workers run in a folder of their own, so paths are resolved once, by the command.

    Returns the configuration, and an error for each path that cannot be resolved, which then stays as it was.
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
    return config.model_copy(update={**paths, "checkpoint": checkpoint}), errors


def require_ready(
    config: RunConfig,
    found: Sequence[CLLM4RecError] = (),
    *,
    sees_files: bool = True,
    writes_output: bool = True,
) -> None:
    """Refuse a run that cannot end well, with everything that is wrong with it in one error.

    Args:
        config: with resolved paths.
        found: what is known to be wrong already.
        sees_files: whether this process has the file systems of the ranks; else only the settings are checked.
        writes_output: whether this process is on the host that writes the run's folder.

    Raises:
        CLLM4RecError: the one problem, or a ConfigError that lists them all.
    """
    unresolved = {error.field for error in found}
    problems = [*found, *setting_problems(config)]
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
    """The configuration with `resume` as the ranks are to read it. Called once by a command, before its ranks start.

    `none` becomes `auto` where the run has no checkpoint yet, so that the restarts of this very run go on.

    Raises:
        CheckpointError: for `none` where there is a checkpoint to lose.
    """
    if config.resume == "none":
        names = Store(store_url(config)).names(STEP)
        restarted = any(int(environ.get(name, "0")) for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"))
        if names and not restarted:
            raise CheckpointError(
                "resume",
                "none",
                f"would start anew where the run has {names[-1]}",
                "Choose another output, or remove the run.",
            )
        return config.model_copy(update={"resume": "auto"})
    if config.resume != "auto" and "://" not in config.resume:
        return config.model_copy(update={"resume": str(Path(config.resume).absolute())})
    return config


def require_none(problems: Sequence[CLLM4RecError], subject: str) -> None:
    """Raise the one problem as it is, or several as one ConfigError with a line each."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        fields = list(dict.fromkeys(problem.field for problem in problems))
        raise ConfigError(subject, fields, "cannot be used", f"Mend each:{lines}")


def metric_problems(field: str, names: Sequence[str], instead: str = "") -> list[CLLM4RecError]:
    """An error for each name that is no metric, or one for an empty list.

    Args:
        instead: what else could be done about an empty list.
    """
    if not names:
        return [ConfigError(field, list(names), "must name at least one metric", f"{_METRIC_CURE}{instead}")]
    wrong = [name for name in names if not METRIC_NAME.fullmatch(name)]
    return [
        ConfigError(field, name, "must be recall@K or ndcg@K with K >= 1", f"{_METRIC_CURE}{_meant_metric(name)}")
        for name in wrong
    ]


def _meant_metric(name: str) -> str:
    """The metric that a misspelt name is nearest to, for the end of a cure."""
    kind, _, cutoff = name.partition("@")
    found = closest(kind.strip(), ("recall", "ndcg"))
    meant = f"{found}@{cutoff if METRIC_NAME.fullmatch(f'{found}@{cutoff}') else 20}"
    return "" if found is None else f" Did you mean {meant!r}?"


def setting_problems(config: RunConfig) -> list[CLLM4RecError]:
    """What the configuration alone shows. (Not in its validators: an old checkpoint's must load for evaluation.)"""
    problems: list[CLLM4RecError] = []
    if _validates(config):
        no_validation = " Or set validation.every_epochs=0."
        problems += metric_problems("validation.metrics", config.validation.metrics, no_validation)
    betas = config.optimizer.betas
    if not all(0 <= beta < 1 for beta in betas):
        problems.append(
            ConfigError("optimizer.betas", betas, "must each be at least 0 and below 1", "The default is [0.9, 0.999].")
        )
    return problems


def source_problems(config: RunConfig, unresolved: Iterable[str] = ()) -> Iterator[CLLM4RecError]:
    """Files and folders that the run names and that are not there, or on no file system that can be used."""
    given = {"deepspeed": config.deepspeed, "resume": config.resume, "init_from": config.init_from}
    if config.resume in ("auto", "none"):
        del given["resume"]
    for field in given.keys() - set(unresolved):
        path = given[field]
        if path is None or is_url(path) or Path(path).exists():
            continue
        if field != "init_from" or not _has_checkpoints(config):  # of which a run goes on instead
            yield ConfigError(field, path, "does not exist", f"Mend the path.{did_you_mean_path(path)}")
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


def backbone_problems(field: str, name: str, option: str | None = None) -> list[CLLM4RecError]:
    """Why a backbone cannot be had, as far as it can be seen without asking a hub.

    Args:
        option: by which a command can be given another path.
    """
    folder = Path(name)
    if folder.is_dir():
        if (folder / "config.json").is_file():
            return []
        what = "is a corpus" if (folder / MANIFEST_NAME).is_file() else "has no config.json"
        return [ConfigError(field, name, f"{what}, so it is no backbone", "Give a folder with config.json.")]
    if folder.exists():
        return [ConfigError(field, name, "is a file", "Give a folder with config.json, or a hub id.")]
    if _is_hub_id(name):
        return []
    moved = f" If it has moved, say where: {option} PATH." if option else ""
    cure = f"Give a folder with config.json, or a hub id (owner/name).{did_you_mean_path(name)}{moved}"
    return [ConfigError(field, name, "does not exist", cure)]


def tokenizer_problems(name: str, recipe: Path) -> list[CLLM4RecError]:
    """Why texts cannot be read with the tokenizer of a backbone. Asks no hub.

    Args:
        recipe: that the corpus is built by, for the cure.
    """
    folder = Path(name)
    if folder.is_dir():
        if any((folder / file).is_file() for file in _TOKENIZER_FILES):
            return []
        cure = "Give a backbone folder with tokenizer.json."
        return [ConfigError("--tokenizer", name, "holds no tokenizer", cure)]
    if not folder.exists() and _is_cached(name):
        return []
    what = "is a file" if folder.exists() else "does not exist"
    cure = f"Build one: `cllm4rec build-backbone {recipe} {name}`. A backbone of a hub must have been fetched."
    return [ConfigError("--tokenizer", name, what, f"{cure}{did_you_mean_path(name)}")]


def _is_hub_id(name: str) -> bool:
    """False for what can only be meant as a local path: also where its first folder is here, or one spelt alike."""
    if is_url(name) or name.startswith((".", "/", "~")) or "\\" in name or name.endswith("/") or name.count("/") > 1:
        return False
    if _is_cached(name):
        return True
    owner, slash, _ = name.partition("/")
    return not Path(owner).is_dir() if slash else closest_path(name) is None


def _is_cached(name: str) -> bool:
    """True if the cache of the hub has a model of this id."""
    home = os.environ.get("HF_HOME") or os.path.join(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "huggingface")
    cache = os.environ.get("HF_HUB_CACHE") or os.path.join(home, "hub")
    return (Path(cache).expanduser() / f"models--{name.replace('/', '--')}").is_dir()


def folder_problems(field: str, path: str, cure: str = "Give a folder.") -> list[CLLM4RecError]:
    """Why nothing can be written to a local folder, which need not exist yet. Leaves nothing behind.

    Args:
        cure: for a URL.
    """
    if is_url(path):
        return [ConfigError(field, path, "is a URL, but must be a local folder", cure)]
    folder = Path(path).absolute()
    existing = next(parent for parent in (folder, *folder.parents) if os.path.lexists(parent))
    if not existing.is_dir():
        what = "a file" if existing.is_file() else "a link to nothing" if existing.is_symlink() else "no folder"
        return [ConfigError(field, path, f"cannot be a folder: {existing} is {what}", "Choose another path.")]
    try:
        with tempfile.TemporaryFile(dir=existing) as file:
            file.write(b"\0")
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error})"
        return [ConfigError(field, path, reason, f"Choose another path, or make {existing} writable.")]
    return []


def corpus_problems(config: RunConfig, manifest: Manifest) -> list[CLLM4RecError]:
    """Where the corpus does not allow what the run wants of it."""
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
                f"asks for validation, but the corpus {config.corpus} {why}",
                f"Set validation.every_epochs=0, or build the corpus again with {split}.",
            )
        )
    warmup, steps = config.optimizer.warmup_steps, num_steps(config, manifest)
    # The default is no choice of anybody's, also where a run has written it into its own configuration.
    if warmup > steps and warmup != OptimizerConfig.model_fields["warmup_steps"].default:
        problems.append(
            ConfigError(
                "optimizer.warmup_steps",
                warmup,
                f"outlasts the run's {steps} steps ({config.epochs} epochs of {steps // config.epochs}): the learning"
                " rate would never reach its peak",
                f"Set optimizer.warmup_steps={max(1, steps // 10)} or another number up to {steps}, or raise epochs.",
            )
        )
    return problems


def warmup_warning(config: RunConfig, manifest: Manifest) -> str | None:
    """What to say of a run that ends within its warm-up without being refused: by max_steps, or by the default."""
    warmup = config.optimizer.warmup_steps
    steps = min(num_steps(config, manifest), config.max_steps or warmup)
    if warmup <= steps:
        return None
    return (
        f"the run ends within its warm-up: after {steps} of optimizer.warmup_steps={warmup} steps the learning rate has"
        f" reached {steps / warmup:.0%} of its peak"
    )


def num_steps(config: RunConfig, manifest: Manifest) -> int:
    """Optimizer steps of all epochs, whatever max_steps says."""
    return config.epochs * -(-manifest.num_users // config.batch.users)


def total_steps(config: RunConfig, manifest: Manifest) -> int:
    """Optimizer steps after which the run ends."""
    steps = num_steps(config, manifest)
    return steps if config.max_steps is None else min(steps, config.max_steps)


def past_end_problems(config: RunConfig, manifest: Manifest) -> list[CLLM4RecError]:
    """That the run goes on from a checkpoint behind its end: it would record epochs that are not those it was trained.

    Raises:
        CheckpointError: where the store of its checkpoints cannot be read.
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
            f"ends the run after {last:,} steps, and {step:,} of it are trained already ({config.output})",
            f"Set {field}={least} or more, or choose another output to train anew.",
        )
    ]


def require_held_out(manifest: Manifest, split: str, *, with_baselines: bool) -> None:
    """Refuse an evaluation for which the corpus holds out no items, before anything is ranked.

    Raises:
        DataError: for a split without items, or baselines that nothing can choose among.
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
