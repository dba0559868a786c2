"""Stages of a project: inputs, outputs and status.

A stage writes a record when it starts and completes it when it ends (`.stages/NAME.json`): its inputs as plain values,
with size, time and sha256 of raw files, digests of the outputs of earlier stages, and all settings; and size, time and
sha256 of each result file. A stage is done if its record is complete and neither its output nor its inputs have
changed. A change of settings that a resumed run may change (its epochs) resumes it; any other change makes the stage
stale.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import fsspec

from cllm4rec_dist.checkpointing.find_run import find, newest_step
from cllm4rec_dist.checkpointing.run_folder import EVALUATION_FILE
from cllm4rec_dist.config import BackboneConfig, RunConfig
from cllm4rec_dist.config.resume_rules import may_change
from cllm4rec_dist.corpus.manifest import INIT_CACHE, load_manifest
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.corpus.sources.check import PATH_FIELDS
from cllm4rec_dist.corpus.sources.files import find_files
from cllm4rec_dist.errors import CLLM4RecError
from cllm4rec_dist.filesystems import as_os_errors, is_url
from cllm4rec_dist.preflight import total_steps
from cllm4rec_dist.project.changed_inputs import (
    MAX_CHANGES,
    PATHS,
    changed_keys,
    changes_of,
    file_differs,
    file_digest,
    sha256_of,
    with_defaults,
)
from cllm4rec_dist.project.layout import Project

_PATH_KEYS = {"path", *PATH_FIELDS}
"""Keys of a recipe's source that name files."""


class Status(Enum):
    """Status of a stage."""

    MISSING = "missing"
    UNFINISHED = "unfinished"
    EXTENDED = "extended"
    """Done with other settings, from which it can resume."""
    STALE = "stale"
    DONE = "done"


@dataclass(frozen=True)
class Record:
    """Record of a stage.

    Attributes:
        inputs: inputs as plain values.
        seconds: total run time, over all starts.
        is_complete: True if the stage has ended.
        files: result files by path; None if not recorded.
    """

    inputs: dict[str, Any]
    seconds: float = 0.0
    is_complete: bool = False
    files: dict[str, Any] | None = None

    @property
    def digest(self) -> str:
        """Digest that identifies this run of the stage."""
        return sha256_of(json.dumps([self.inputs, self.seconds], sort_keys=True).encode())


@dataclass(frozen=True)
class Stage:
    """One command of a project.

    Attributes:
        name: name of the command.
        what: short description, for printing.
        output: file or folder that exists when the stage has ended.
        trains: True if the stage trains; its output is replaced only with `--redo`.
        results: folder of results for users, which other commands may change.
    """

    name: str
    what: str
    output: Path
    trains: bool = False
    results: Path | None = None


@dataclass(frozen=True)
class Settings:
    """Settings of a project, with overrides applied.

    Attributes:
        recipe, pretrain, finetune: validated settings.
        backbone: settings of the small decoder; None for a pretrained one.
        top: number of items in each list.
    """

    recipe: PrepareConfig
    pretrain: RunConfig
    finetune: RunConfig
    backbone: BackboneConfig | None
    top: int


@dataclass(frozen=True)
class State:
    """Current state of a stage.

    Attributes:
        status: status of the stage.
        changes: changes of its inputs, one clause each.
    """

    stage: Stage
    status: Status
    changes: tuple[str, ...] = field(default=())


def stages_of(project: Project, settings: Settings) -> list[Stage]:
    """Return the stages of a project in order."""
    stages = [
        Stage("prepare", "read the data, filter, split, write the corpus", project.corpus / "manifest.json"),
        Stage("pretrain", "users, items and texts learn each other", project.pretrain_run / "config.yaml", trains=True),
        Stage("finetune", "learn to recommend", project.finetune_run / "config.yaml", trains=True),
        Stage(
            "evaluate",
            "rank held-out items, compare with the baselines",
            project.evaluation / "report.html",
            results=project.evaluation,
        ),
        Stage("recommend", "lists for all customers", project.recommendations, results=project.recommendations),
    ]
    if settings.backbone is not None:
        stages.insert(
            0,
            Stage("build-backbone", "a small decoder and a tokenizer of your texts", project.backbone / "config.json"),
        )
    if settings.recipe.split.kind == "none":
        stages = [stage for stage in stages if stage.name != "evaluate"]
    return stages


def state_of(project: Project, settings: Settings, stage: Stage) -> State:
    """Return the state of a stage, by comparing its record with its current inputs."""
    record = read_record(project, stage.name)
    if record is None or (record.is_complete and not stage.output.exists()):
        return State(stage, Status.MISSING)
    now = inputs_of(project, settings, stage.name)
    before = with_defaults(stage.name, record.inputs)
    changes = (*changes_of(stage.name, before, now), *_changed_results(stage, record))
    if not changes:
        return State(stage, Status.DONE if record.is_complete else Status.UNFINISHED)
    changed = changed_keys(before, now)
    if not stage.trains or not all(key.startswith("settings.") and may_change(key[9:]) for key in changed):
        return State(stage, Status.STALE, changes)
    past_end = tuple(_steps_past_end(project, settings, stage))
    return State(stage, Status.STALE if past_end else Status.EXTENDED, changes + past_end)


def _steps_past_end(project: Project, settings: Settings, stage: Stage) -> Iterator[str]:
    """Yield a clause if a run was trained further than its settings say: it cannot resume to an earlier end."""
    config = settings.pretrain if stage.name == "pretrain" else settings.finetune
    try:
        manifest, _ = load_manifest(str(project.corpus))
    except CLLM4RecError:
        return  # the stage reports the error
    step, last = newest_step(stage.output.parent), total_steps(config, manifest)
    if step > last:
        yield f"{step:,} steps are trained already, and it now ends after {last:,}"


def inputs_of(project: Project, settings: Settings, name: str) -> dict[str, Any]:
    """Return the inputs of a stage as plain values."""
    recipe = settings.recipe.model_dump(mode="json")
    backbone = _backbone_inputs(project, settings)
    match name:
        case "build-backbone":
            assert settings.backbone is not None
            chosen = settings.backbone.model_dump(mode="json")
            return {"settings": chosen, "recipe": {"source": recipe["source"]}, "raw files": _raw_files(recipe)}
        case "prepare":
            return {"recipe": recipe, "raw files": _raw_files(recipe), "backbone": backbone}
        case "pretrain" | "finetune":
            config = settings.pretrain if name == "pretrain" else settings.finetune
            values = {key: value for key, value in config.model_dump(mode="json").items() if key not in PATHS}
            start = {} if name == "pretrain" else _trained(project, "pretrain")
            return {
                "settings": values,
                "corpus": file_digest(project.corpus / "manifest.json"),
                "backbone": backbone,
            } | start
        case "evaluate":
            return _trained(project, "finetune")
        case _:
            return _trained(project, "finetune") | {"settings": {"top": settings.top}}


def _backbone_inputs(project: Project, settings: Settings) -> Any:
    """Return digests of the backbone's files, or its hub id."""
    folder = Path(settings.pretrain.backbone) if settings.backbone is None else project.backbone
    names = ("config.json", "tokenizer.json")
    return {name: file_digest(folder / name) for name in names} if folder.is_dir() else settings.pretrain.backbone


def _trained(project: Project, name: str) -> dict[str, Any]:
    """Return the digest of a training stage and the checkpoint that later stages read, which may be newer."""
    record = read_record(project, name)
    run = project.pretrain_run if name == "pretrain" else project.finetune_run
    digest = None if record is None else record.digest
    return {"pretraining" if name == "pretrain" else "finetuning": digest, "checkpoint": _checkpoint(run)}


def _checkpoint(run: Path) -> dict[str, str] | None:
    """Return name and content digest of the checkpoint that other commands read of a run; None without one."""
    try:
        store, names = find(str(run))
        return {"name": names[0], "content": sha256_of(store.marker(names[0]).model_dump_json().encode())}
    except CLLM4RecError:
        return None


def _raw_files(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Return size and time of each raw file; contents are compared only if these differ."""
    stats = {}
    for path in sorted(set(_paths_in(recipe["source"]))):
        try:
            files = find_files([path])
        except CLLM4RecError:
            continue  # the stage reports the error
        for file in files:
            stats[file.path] = _file_stat(file.path)
    return stats


def _paths_in(tree: Mapping[str, Any]) -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _paths_in(value)
        elif key in _PATH_KEYS and isinstance(value, str | list):
            yield from [value] if isinstance(value, str) else (each for each in value if isinstance(each, str))


def _file_stat(path: str) -> dict[str, Any]:
    if not is_url(path):
        stat = Path(path).stat()
        return {"bytes": stat.st_size, "time": stat.st_mtime_ns}
    fs, path = fsspec.core.url_to_fs(path)
    with as_os_errors():
        return {"bytes": fs.info(path)["size"], "key": fs.ukey(path)}


def result_files(stage: Stage) -> dict[str, Any] | None:
    """Return size, time and sha256 of each result file; None for a stage without results."""
    if stage.results is None:
        return None
    return {path: _file_stat(str(file)) | {"sha256": file_digest(file)} for path, file in _files_in(stage.results)}


def _files_in(folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the files of a folder, without those that runs keep in a corpus."""
    files = ((file.relative_to(folder), file) for file in sorted(folder.rglob("*")) if file.is_file())
    return ((str(path), file) for path, file in files if path.parts[0] != INIT_CACHE)


def _changed_results(stage: Stage, record: Record) -> Iterator[str]:
    """Yield the changes by other commands to the results of a stage, one clause each."""
    if stage.name == "evaluate":
        yield from _other_evaluation(stage.output.with_name(EVALUATION_FILE))
    if stage.results is None or record.files is None:
        return
    now = dict(_files_in(stage.results))
    changes = {path: _file_change(record.files.get(path), now.get(path)) for path in sorted(record.files | now)}
    changed = [f"{stage.results.name}/{path} {change}" for path, change in changes.items() if change]
    yield from changed[:MAX_CHANGES]
    if len(changed) > MAX_CHANGES:
        yield f"and {len(changed) - MAX_CHANGES} more files"


def _other_evaluation(path: Path) -> Iterator[str]:
    """Yield how an evaluation differs from that of the project, one clause each."""
    try:
        evaluation = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return
    if evaluation.get("split", "test") != "test":
        yield f"the evaluation is of the split {evaluation['split']!r}"
    if evaluation.get("without_rows"):
        yield "the evaluation is without the users' rows"


def _file_change(before: Mapping[str, Any] | None, file: Path | None) -> str | None:
    """Describe the change of a file since its record; None for no change."""
    if file is None:
        return "is gone"
    if before is None:
        return "is new"
    return "has changed" if file_differs(str(file), before, _file_stat(str(file))) else None


def read_record(project: Project, name: str) -> Record | None:
    """Read the record of a stage; None if it is missing or unreadable."""
    try:
        content = json.loads(project.record(name).read_text(encoding="utf-8"))
        files = content.get("files")
        return Record(
            dict(content["inputs"]),
            float(content["seconds"]),
            bool(content["is_complete"]),
            None if files is None else dict(files),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(project: Project, name: str, record: Record) -> None:
    """Replace the record of a stage atomically."""
    path = project.record(name)
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(vars(record), indent=1), encoding="utf-8")
    part.replace(path)
