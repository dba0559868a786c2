"""`cllm4rec run`: what is missing of a project's stages, one after another.

A stage is a function that the command line gives, the same that its own command calls. Here is decided which of them
run: what is done stays, what was interrupted goes on, what is out of date is made again, and a trained run is replaced
only if that is asked for; it is then kept beside the new one.
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
from cllm4rec_dist.config import BackboneConfig, RunConfig, load_config
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.errors import ConfigError
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
    with_digests,
    write_record,
)
from cllm4rec_dist.suggestions import did_you_mean_path

_OWN_FOLDER = {"build-backbone": "backbone", "pretrain": "pretrain_run", "finetune": "finetune_run"}
_PREFIXES = ("recipe", "backbone", "pretrain", "finetune")
_RUN_PREFIXES = ("pretrain", "finetune")
_OWN_SETTINGS = ("corpus", "backbone", "output", "init_from", "stage")
"""Of a run file: what the project decides."""

Tell = Callable[[str], None]


def require_project(folder: Path) -> Project:
    """The project in a folder.

    Raises:
        ConfigError: where there is none.
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
    """Overrides by the file that they are for: `recipe.KEY=...` and the like; others are for both run files.

    Raises:
        ConfigError: for a path or a stage, which the project decides.
    """
    found: dict[str, list[str]] = {prefix: [] for prefix in _PREFIXES}
    for override in overrides:
        key = override.partition("=")[0].strip()
        prefix, dot, rest = key.partition(".")
        of_run = rest if prefix in _RUN_PREFIXES else key
        if of_run in _OWN_SETTINGS:
            raise ConfigError(
                "override",
                override,
                f"sets {of_run}, which the project decides",
                "Leave it out; `cllm4rec pretrain` and `cllm4rec finetune` take any.",
            )
        if dot and prefix in _PREFIXES:
            found[prefix].append(override.removeprefix(f"{prefix}."))
        else:
            found["pretrain"].append(override)
            found["finetune"].append(override)
    return found


def load_settings(project: Project, overrides: Mapping[str, Sequence[str]], top: int) -> Settings:
    """The project's files with overrides, all of them checked before anything runs."""
    has_backbone = project.backbone_file.is_file()
    if overrides["backbone"] and not has_backbone:
        raise ConfigError(
            "override",
            overrides["backbone"][0],
            "is of the small decoder, and the project has a pretrained one",
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
    """Refuse now what a later stage would refuse."""
    problems = [*preflight.setting_problems(settings.pretrain), *preflight.setting_problems(settings.finetune)]
    every_epochs = settings.finetune.validation.every_epochs
    if settings.recipe.split.kind == "none" and every_epochs:
        problems.append(
            ConfigError(
                "finetune.yaml: validation.every_epochs",
                every_epochs,
                "asks for validation, and the recipe holds nothing out (split: {kind: none})",
                "Set validation.every_epochs=0, or give the recipe another split.",
            )
        )
    preflight.require_none(problems, "project")


def run_stages(
    project: Project,
    settings: Settings,
    commands: Mapping[str, Callable[[], object]],
    tell: Tell,
    *,
    redo: bool,
    command_line: str,
) -> None:
    """Run what is missing.

    Args:
        project: where.
        settings: of its files.
        commands: what each stage does, by its name.
        tell: says a line.
        redo: replace trained runs that are out of date.
        command_line: the call with its overrides, without `--redo`, for messages.

    Raises:
        ConfigError: where another process runs the project, or a trained run is out of date and `redo` is not set.
    """
    with _claim(project):
        stages = stages_of(project, settings)
        if not redo:
            _require_current(project, settings, stages, f"{command_line} --redo")
        width = max(len(stage.name) for stage in stages)
        for number, stage in enumerate(stages, start=1):
            head = f"[{number}/{len(stages)}] {stage.name:<{width}}"
            state = state_of(project, settings, stage)
            if state.status is Status.DONE:
                record = read_record(project, stage.name)
                tell(f"{head}  done before ({duration(record.seconds if record else 0)})")
                continue
            tell(f"{head}  {stage.what}{_why(state)}")
            if redo and state.status is Status.EXTENDED:
                tell(f"      --redo trains nothing again here, as this can go on: to start anew, rename {_run(state)}")
            _run_stage(project, settings, state, commands[stage.name], tell)


def _why(state: State) -> str:
    match state.status:
        case Status.UNFINISHED:
            return " (goes on where it stopped)"
        case Status.EXTENDED:
            return f" (goes on: {'; '.join(state.changes)})"
        case Status.STALE:
            return f" (again: {'; '.join(dict.fromkeys(state.changes))})"
        case _:
            return ""


def _run(state: State) -> str:
    return shlex.quote(str(state.stage.output.parent))


def _run_stage(project: Project, settings: Settings, state: State, command: Callable[[], object], tell: Tell) -> None:
    name = state.stage.name
    goes_on = state.status in (Status.UNFINISHED, Status.EXTENDED)
    if name in _OWN_FOLDER and not (goes_on and state.stage.trains):
        _set_aside(getattr(project, _OWN_FOLDER[name]), tell)
    if name == "prepare" and state.status is Status.STALE and project.has_runs:
        _set_aside(project.corpus, tell)  # a run that is kept is of no use without its corpus
    before = read_record(project, name) if goes_on else None
    record = Record(with_digests(inputs_of(project, settings, name)), 0.0 if before is None else before.seconds)
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
    """Refuse to replace what took long to train, before anything is touched.

    Args:
        redo: the command line that replaces it.
    """
    changes: list[str] = []
    for stage in stages:
        state = state_of(project, settings, stage)
        is_affected = bool(changes) or state.status is Status.STALE
        if stage.trains and is_affected and _has_trained(project, stage):
            why = "; ".join(dict.fromkeys(changes or state.changes))
            raise ConfigError(
                f"project {project.folder}",
                stage.name,
                f"was trained with other inputs ({why})",
                f"Take the change back, or train again with `{redo}`; the earlier run is then kept beside the new one"
                " with its corpus and backbone, and every command can still use it.",
            )
        if state.status in (Status.STALE, Status.EXTENDED):
            changes += state.changes


def _has_trained(project: Project, stage: Stage) -> bool:
    """True where a stage has something to lose; one that was refused at its start has not."""
    record = read_record(project, stage.name)
    return record is not None and (record.is_complete or newest_step(stage.output.parent) > 0)


@contextmanager
def _claim(project: Project) -> Iterator[None]:
    """Hold the project: two that run it would undo each other's stages."""
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


def _set_aside(folder: Path, tell: Tell) -> None:
    """Rename an earlier output, which is not lost."""
    if not folder.exists():
        return
    number = 1
    while (kept := folder.with_name(f"{folder.name}-earlier-{number}")).exists():
        number += 1
    folder.rename(kept)
    tell(f"      the earlier {folder.name} is now {kept}{_use_of(folder.name, shlex.quote(str(kept)))}")


def _use_of(name: str, kept: str) -> str:
    """What an output that was set aside is still good for."""
    match name:
        case "finetune":
            return f"; to use it: cllm4rec serve {kept}, or cllm4rec recommend {kept} FOLDER"
        case "corpus" | "backbone":
            return "; earlier runs find it there"
        case _:
            return ""


def duration(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 5 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
