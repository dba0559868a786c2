"""`cllm4rec run`: run the missing stages of a project.

Each stage is a function passed by the command line. This module decides which of them run: finished stages are skipped,
interrupted ones resume, and stages out of date run again. A trained run is replaced only with `--redo`, and the earlier
run is kept under another name.
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from cllm4rec_dist import preflight
from cllm4rec_dist.checkpointing.find_run import newest_step
from cllm4rec_dist.checkpointing.run_folder import earlier_folder
from cllm4rec_dist.config import BackboneConfig, RunConfig, load_config
from cllm4rec_dist.corpus.manifest import load_manifest
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.errors import ConfigError
from cllm4rec_dist.project.changed_inputs import with_digests
from cllm4rec_dist.project.layout import Project, is_project
from cllm4rec_dist.project.stages import (
    Record,
    Settings,
    Stage,
    State,
    Status,
    inputs_of,
    read_record,
    result_files,
    stages_of,
    state_of,
    write_record,
)
from cllm4rec_dist.suggestions import closest, did_you_mean_path

_OUTPUT_FOLDERS = {"build-backbone": "backbone", "pretrain": "pretrain_run", "finetune": "finetune_run"}
_PREFIXES = ("recipe", "backbone", "pretrain", "finetune")
_RUN_PREFIXES = ("pretrain", "finetune")
_PROJECT_SETTINGS = ("corpus", "backbone", "output", "init_from", "stage")
"""Settings of a run file that the project sets."""

Echo = Callable[[str], None]


def require_project(folder: Path) -> Project:
    """Return the project in a folder.

    Raises:
        ConfigError: if the folder is no project.
    """
    if is_project(folder):
        return Project(folder)
    what = "is no project: it has no recipe.yaml and finetune.yaml" if folder.exists() else "does not exist"
    raise ConfigError(
        "project",
        str(folder),
        what,
        f"Make one with `cllm4rec init {folder} --orders FILE`.{did_you_mean_path(str(folder))}",
    )


def split_overrides(overrides: Sequence[str]) -> dict[str, list[str]]:
    """Sort overrides by file: `recipe.KEY=...` and so on; those without prefix go to both run files.

    Raises:
        ConfigError: for a path or stage, which the project decides.
    """
    by_file: dict[str, list[str]] = {prefix: [] for prefix in _PREFIXES}
    for override in overrides:
        key = override.partition("=")[0].strip()
        prefix, dot, rest = key.partition(".")
        setting = rest if prefix in _RUN_PREFIXES else key
        if setting in _PROJECT_SETTINGS:
            raise ConfigError(
                "override",
                override,
                f"sets {setting}, which the project decides",
                "Leave it out; `cllm4rec pretrain` and `cllm4rec finetune` take any.",
            )
        _require_prefix(override, prefix if dot else "")
        if dot and prefix in _PREFIXES:
            by_file[prefix].append(override.removeprefix(f"{prefix}."))
        else:
            by_file["pretrain"].append(override)
            by_file["finetune"].append(override)
    return by_file


def _require_prefix(override: str, prefix: str) -> None:
    """Refuse a prefix that is neither a file of the project nor a section of a run."""
    sections = [*RunConfig.model_fields, *(old.partition(".")[0] for old in RunConfig.renamed_keys)]
    if not prefix or prefix in _PREFIXES or prefix in sections:
        return
    meant = closest(prefix, [*_PREFIXES, *sections])
    hint = "" if meant is None else f"Did you mean {override.replace(prefix, meant, 1)}? "
    raise ConfigError(
        "override",
        override,
        f"begins with {prefix}, which is neither a file of the project ({', '.join(_PREFIXES)}) nor a section of a run",
        f"{hint}`cllm4rec settings` explains every key of a run.",
    )


def load_settings(project: Project, overrides: Mapping[str, Sequence[str]], top: int) -> Settings:
    """Load and check the project's files with overrides, before any stage runs."""
    has_backbone = project.backbone_file.is_file()
    if overrides["backbone"] and not has_backbone:
        raise ConfigError(
            "override",
            overrides["backbone"][0],
            "is for the small decoder, and the project has a pretrained one",
            "Leave it out.",
        )
    settings = Settings(
        recipe=load_config(PrepareConfig, project.recipe_file, overrides["recipe"]),
        pretrain=load_config(RunConfig, project.pretrain_file, [*overrides["pretrain"], "stage=pretrain"]),
        finetune=load_config(RunConfig, project.finetune_file, [*overrides["finetune"], "stage=finetune"]),
        backbone=load_config(BackboneConfig, project.backbone_file, overrides["backbone"]) if has_backbone else None,
        top=top,
    )
    _require_consistent(settings)
    return settings


def _require_consistent(settings: Settings) -> None:
    """Refuse settings that a later stage would refuse."""
    problems = [*preflight.setting_problems(settings.pretrain), *preflight.setting_problems(settings.finetune)]
    hidden_size = None if settings.backbone is None else settings.backbone.hidden_size
    problems += preflight.stage_width_problems(settings.pretrain, settings.finetune, hidden_size)
    every_epochs = settings.finetune.validation.every_epochs
    if settings.recipe.split.kind == "none" and every_epochs:
        problems.append(
            ConfigError(
                "finetune.yaml: validation.every_epochs",
                every_epochs,
                "requires validation, but the recipe holds nothing out (split: {kind: none})",
                "Set validation.every_epochs=0, or give the recipe another split.",
            )
        )
    preflight.require_none(problems, "project")


def run_stages(
    project: Project,
    settings: Settings,
    commands: Mapping[str, Callable[[], object]],
    echo: Echo,
    *,
    redo: bool,
    command_line: str,
) -> None:
    """Run the missing stages.

    Args:
        project: project to run.
        settings: its settings, with overrides.
        commands: function of each stage, by name.
        echo: prints a line.
        redo: replace trained runs that are out of date.
        command_line: the `run` command with its overrides, without `--redo`, for messages.

    Raises:
        ConfigError: if another process runs the project, or a trained run is out of date and `redo` is False.
    """
    with _claim(project):
        stages = stages_of(project, settings)
        if not redo:
            _require_current(project, settings, stages, f"{command_line} --redo")
        width = max(len(stage.name) for stage in stages)
        for index, stage in enumerate(stages, start=1):
            head = f"[{index}/{len(stages)}] {stage.name:<{width}}"
            state = state_of(project, settings, stage)
            if state.status is Status.DONE:
                record = read_record(project, stage.name)
                echo(f"{head}  done before ({duration(record.seconds if record else 0)})")
                continue
            if stage.trains:
                _require_held_out(project, settings)
            echo(f"{head}  {stage.what}{_why(state)}")
            if redo and state.status is Status.EXTENDED:
                echo(f"      --redo trains nothing again, as this run can resume: to start anew, rename {_run(state)}")
            _run_stage(project, settings, state, commands[stage.name], echo)


def _require_held_out(project: Project, settings: Settings) -> None:
    """Refuse a corpus that holds nothing out before a stage trains, since later ones need it."""
    manifest, _ = load_manifest(str(project.corpus))
    splits = ("valid", "test") if settings.finetune.validation.every_epochs else ("test",)
    if settings.recipe.split.kind != "none" and not all(map(manifest.num_held_out, splits)):
        raise ConfigError(
            "project",
            str(project.folder),
            f"has nothing to validate and test with: its split ({settings.recipe.split.kind}) holds no items out of"
            f" {manifest.num_users:,} customers, for example because they have too few",
            "Use more orders, or train on everything: write split: {kind: none} into its recipe.yaml, and every_epochs:"
            " 0 into validation of its finetune.yaml.",
        )


def _why(state: State) -> str:
    match state.status:
        case Status.UNFINISHED:
            return " (resumes)"
        case Status.EXTENDED:
            return f" (resumes: {'; '.join(state.changes)})"
        case Status.STALE:
            return f" (again: {'; '.join(dict.fromkeys(state.changes))})"
        case _:
            return ""


def _run(state: State) -> str:
    return shlex.quote(str(state.stage.output.parent))


def _run_stage(project: Project, settings: Settings, state: State, command: Callable[[], object], echo: Echo) -> None:
    name = state.stage.name
    resumes = state.status in (Status.UNFINISHED, Status.EXTENDED)
    if name in _OUTPUT_FOLDERS and not (resumes and state.stage.trains):
        _keep_earlier(getattr(project, _OUTPUT_FOLDERS[name]), echo)
    if name == "prepare" and state.status is Status.STALE and project.has_runs:
        _keep_earlier(project.corpus, echo)  # an earlier run needs its corpus
    previous = read_record(project, name) if resumes else None
    record = Record(with_digests(inputs_of(project, settings, name)), 0.0 if previous is None else previous.seconds)
    write_record(project, name, record)
    started = time.monotonic()
    try:
        command()
    finally:
        record = Record(record.inputs, record.seconds + time.monotonic() - started)
        write_record(project, name, record)
    files = result_files(state.stage)
    write_record(project, name, Record(record.inputs, record.seconds, is_complete=True, files=files))


def _require_current(project: Project, settings: Settings, stages: Sequence[Stage], redo: str) -> None:
    """Refuse to replace a trained run, before any stage runs.

    Args:
        redo: command line that replaces it.
    """
    changes: list[str] = []
    for stage in stages:
        state = state_of(project, settings, stage)
        if stage.trains and read_record(project, stage.name) is None and newest_step(stage.output.parent) > 0:
            raise ConfigError(
                f"project {project.folder}",
                stage.name,
                f"was trained, but {project.record(stage.name)}, which says with what, is missing or unreadable",
                f"Restore it, or train again with `{redo}`; the earlier run is then kept under another name.",
            )
        is_affected = bool(changes) or state.status is Status.STALE
        if stage.trains and is_affected and _has_trained(project, stage):
            why = "; ".join(dict.fromkeys(changes or state.changes))
            raise ConfigError(
                f"project {project.folder}",
                stage.name,
                f"was trained with other inputs ({why})",
                f"Undo the change, or train again with `{redo}`; the earlier run is then kept under another name with"
                " its corpus and backbone, and every command can still use it.",
            )
        if state.status in (Status.STALE, Status.EXTENDED):
            changes += state.changes


def _has_trained(project: Project, stage: Stage) -> bool:
    """True if a stage has trained any step; False if it failed at its start."""
    record = read_record(project, stage.name)
    return record is not None and (record.is_complete or newest_step(stage.output.parent) > 0)


@contextmanager
def _claim(project: Project) -> Iterator[None]:
    """Lock the project, as two processes would overwrite each other's stages."""
    folder = project.record("x").parent
    try:
        folder.mkdir(exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            "project", str(project.folder), "is being run by another process", "Wait for its end, or stop it."
        ) from None
    except OSError as error:
        raise ConfigError(
            "project", str(project.folder), f"cannot be written ({error.strerror or error})", "Make it writable."
        ) from error
    try:
        yield
    finally:
        lock.release()


def _keep_earlier(folder: Path, echo: Echo) -> None:
    """Rename an earlier output, to keep it."""
    if not folder.exists():
        return
    kept = folder.rename(earlier_folder(folder))
    echo(f"      the earlier {folder.name} is now {kept}{_use_of(folder.name, shlex.quote(str(kept)))}")


def _use_of(name: str, kept: str) -> str:
    """Return how to use an earlier output, as the end of a message."""
    match name:
        case "finetune":
            return f"; to use it: cllm4rec serve {kept}, or cllm4rec recommend {kept} FOLDER"
        case "corpus" | "backbone":
            return "; earlier runs use it"
        case _:
            return ""


def duration(seconds: float) -> str:
    """Format seconds as 12 s, 3 min 20 s or 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
