"""The stages of a project, what each is made of, and whether what it has made is still that.

A stage writes a record when it begins and completes it when it has ended (`.stages/NAME.json`): its inputs as plain
values, with size, time and sha256 of raw files, fingerprints of what earlier stages have made, and all settings; of
what it has made for people, also size, time and sha256 of each file. A stage is done where its record is complete, its
output is there as it left it, and the inputs are what they were. Settings that a run may change when it goes on (its
epochs) make it go on; anything else makes it out of date.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

import fsspec

from cllm4rec_dist.checkpointing.find_run import find, newest_step
from cllm4rec_dist.checkpointing.run_folder import EVALUATION_FILE
from cllm4rec_dist.config import BackboneConfig, RunConfig, dotted_items
from cllm4rec_dist.config.resume_rules import may_change
from cllm4rec_dist.corpus.manifest import load_manifest
from cllm4rec_dist.corpus.recipe import PrepareConfig
from cllm4rec_dist.corpus.sources.files import find_files
from cllm4rec_dist.errors import CLLM4RecError
from cllm4rec_dist.filesystems import as_os_errors, is_url
from cllm4rec_dist.preflight import total_steps
from cllm4rec_dist.project.layout import Project

_PATH_KEYS = {
    "path",
    "interactions",
    "items",
    "users",
    "folder",
    "reviews",
    "metadata",
    "businesses",
    "games",
    "behaviors",
    "news",
    "sequences",
    "titles",
}
"""Keys of a recipe's source that name files."""
_PATHS = ("corpus", "backbone", "output", "init_from")
_TYPED_AS = {"build-backbone": "backbone.", "pretrain": "pretrain.", "finetune": "finetune.", "recommend": "--"}
"""How the command line names the settings of a stage."""
_MOST_CHANGES = 8


class Status(Enum):
    """How a stage is."""

    MISSING = "missing"
    UNFINISHED = "unfinished"
    EXTENDED = "extended"
    """Done for other settings, from which it may go on."""
    STALE = "stale"
    DONE = "done"


@dataclass(frozen=True)
class Record:
    """What a stage was made of.

    Attributes:
        inputs: plain values.
        seconds: that it took, over all times that it was begun.
        is_complete: it has ended.
        files: of its output, by path; None where they are not recorded.
    """

    inputs: dict[str, Any]
    seconds: float = 0.0
    is_complete: bool = False
    files: dict[str, Any] | None = None

    @property
    def digest(self) -> str:
        """Tells one making of the stage from another."""
        return _sha256(json.dumps([self.inputs, self.seconds], sort_keys=True).encode())


@dataclass(frozen=True)
class Stage:
    """One command of a project.

    Attributes:
        name: of the command.
        what: it does, for a line on the screen.
        output: a file that is there when it has ended.
        trains: its output took long, and is never replaced unless that is asked for.
        results: folder of what it makes for people, which other commands may write to.
    """

    name: str
    what: str
    output: Path
    trains: bool = False
    results: Path | None = None


@dataclass(frozen=True)
class Settings:
    """The files of a project, with overrides applied.

    Attributes:
        recipe, pretrain, finetune: read and validated.
        backbone: settings of the small decoder; None for a pretrained one.
        top: items of each list.
    """

    recipe: PrepareConfig
    pretrain: RunConfig
    finetune: RunConfig
    backbone: BackboneConfig | None
    top: int


@dataclass(frozen=True)
class State:
    """A stage as it is now.

    Attributes:
        status: how it is.
        changes: of its inputs, one clause each.
    """

    stage: Stage
    status: Status
    changes: tuple[str, ...] = field(default=())


def stages_of(project: Project, settings: Settings) -> list[Stage]:
    """All stages that the project has, in their order."""
    found = [
        Stage("prepare", "read the data, filter, split, write the corpus", project.corpus / "manifest.json"),
        Stage("pretrain", "users, items and texts learn each other", project.pretrain_run / "config.yaml", trains=True),
        Stage("finetune", "learn to recommend", project.finetune_run / "config.yaml", trains=True),
        Stage(
            "evaluate",
            "rank held-out items beside the baselines",
            project.evaluation / "report.html",
            results=project.evaluation,
        ),
        Stage("recommend", "lists for all customers", project.recommendations, results=project.recommendations),
    ]
    if settings.backbone is not None:
        found.insert(
            0,
            Stage("build-backbone", "a small decoder and a tokenizer of your texts", project.backbone / "config.json"),
        )
    if settings.recipe.split.kind == "none":
        found = [stage for stage in found if stage.name != "evaluate"]
    return found


def state_of(project: Project, settings: Settings, stage: Stage) -> State:
    """Whether a stage is done, by its record and its inputs as they are now."""
    record = read_record(project, stage.name)
    if record is None or (record.is_complete and not stage.output.exists()):
        return State(stage, Status.MISSING)
    now = inputs_of(project, settings, stage.name)
    changes = (*_changes(stage.name, record.inputs, now), *_changed_results(stage, record))
    if not changes:
        return State(stage, Status.DONE if record.is_complete else Status.UNFINISHED)
    changed = _changed_keys(record.inputs, now)
    if not stage.trains or not all(key.startswith("settings.") and may_change(key[9:]) for key in changed):
        return State(stage, Status.STALE, changes)
    past_end = tuple(_steps_past_end(project, settings, stage))
    return State(stage, Status.STALE if past_end else Status.EXTENDED, changes + past_end)


def _steps_past_end(project: Project, settings: Settings, stage: Stage) -> Iterator[str]:
    """That a run has been trained further than its settings now say, in words: it cannot go on to an earlier end."""
    config = settings.pretrain if stage.name == "pretrain" else settings.finetune
    try:
        manifest, _ = load_manifest(str(project.corpus))
    except CLLM4RecError:
        return  # the stage says what is wrong with it
    step, last = newest_step(stage.output.parent), total_steps(config, manifest)
    if step > last:
        yield f"{step:,} steps are trained already, and it now ends after {last:,}"


def inputs_of(project: Project, settings: Settings, name: str) -> dict[str, Any]:
    """What a stage is made of, as plain values."""
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
            values = {key: value for key, value in config.model_dump(mode="json").items() if key not in _PATHS}
            start = {} if name == "pretrain" else _trained(project, "pretrain")
            return {
                "settings": values,
                "corpus": _digest(project.corpus / "manifest.json"),
                "backbone": backbone,
            } | start
        case "evaluate":
            return _trained(project, "finetune")
        case _:
            return _trained(project, "finetune") | {"settings": {"top": settings.top}}


def _backbone_inputs(project: Project, settings: Settings) -> Any:
    """Fingerprints of the backbone's files; its name where it is on a hub."""
    folder = Path(settings.pretrain.backbone) if settings.backbone is None else project.backbone
    names = ("config.json", "tokenizer.json")
    return {name: _digest(folder / name) for name in names} if folder.is_dir() else settings.pretrain.backbone


def _trained(project: Project, name: str) -> dict[str, Any]:
    """What a training stage has made: its record, and the checkpoint that is used of it, which may be a later one."""
    record = read_record(project, name)
    run = project.pretrain_run if name == "pretrain" else project.finetune_run
    made = None if record is None else record.digest
    return {"pretraining" if name == "pretrain" else "finetuning": made, "checkpoint": _checkpoint(run)}


def _checkpoint(run: Path) -> dict[str, str] | None:
    """Name and content of the checkpoint that other commands use of a run; None where there is none."""
    try:
        store, names = find(str(run))
        return {"name": names[0], "content": _sha256(store.marker(names[0]).model_dump_json().encode())}
    except CLLM4RecError:
        return None


def _raw_files(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Size, time and content of each raw file; only the first two are looked at where they are the same."""
    found = {}
    for path in sorted(set(_paths_in(recipe["source"]))):
        try:
            files = find_files([path])
        except CLLM4RecError:
            continue  # the stage says what is wrong with it
        for file in files:
            found[file.path] = _file_facts(file.path)
    return found


def _paths_in(tree: Mapping[str, Any]) -> Iterator[str]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _paths_in(value)
        elif key in _PATH_KEYS and isinstance(value, str | list):
            yield from [value] if isinstance(value, str) else (each for each in value if isinstance(each, str))


def _file_facts(path: str) -> dict[str, Any]:
    if not is_url(path):
        found = Path(path).stat()
        return {"bytes": found.st_size, "time": found.st_mtime_ns}
    fs, place = fsspec.core.url_to_fs(path)
    with as_os_errors():
        return {"bytes": fs.info(place)["size"], "key": fs.ukey(place)}


def result_files(stage: Stage) -> dict[str, Any] | None:
    """Size, time and sha256 of each file that a stage has made for people; None where it makes none."""
    if stage.results is None:
        return None
    return {path: _file_facts(str(file)) | {"sha256": _digest(file)} for path, file in _files_in(stage.results)}


def _files_in(folder: Path) -> Iterator[tuple[str, Path]]:
    return ((str(file.relative_to(folder)), file) for file in sorted(folder.rglob("*")) if file.is_file())


def _changed_results(stage: Stage, record: Record) -> Iterator[str]:
    """What another command has done to the results of a stage that has ended, in words."""
    if stage.name == "evaluate":
        yield from _other_evaluation(stage.output.with_name(EVALUATION_FILE))
    if stage.results is None or record.files is None:
        return
    found = dict(_files_in(stage.results))
    whats = {path: _what_became_of(record.files.get(path), found.get(path)) for path in sorted(record.files | found)}
    changed = [f"{stage.results.name}/{path} {what}" for path, what in whats.items() if what]
    yield from changed[:_MOST_CHANGES]
    if len(changed) > _MOST_CHANGES:
        yield f"and {len(changed) - _MOST_CHANGES} more files"


def _other_evaluation(path: Path) -> Iterator[str]:
    """Why an evaluation is not that of the project, in words."""
    try:
        found = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return
    if found.get("split", "test") != "test":
        yield f"the evaluation is of the split {found['split']!r}"
    if found.get("without_rows"):
        yield "the evaluation is without the users' rows"


def _what_became_of(before: Mapping[str, Any] | None, file: Path | None) -> str | None:
    """What another command has done to a file; None for nothing."""
    if file is None:
        return "is gone"
    if before is None:
        return "is new"
    return "is another one" if _differs(str(file), before, _file_facts(str(file))) else None


def with_digests(inputs: dict[str, Any]) -> dict[str, Any]:
    """Inputs for a record: with the sha256 of local raw files, so that a copy with a new time is known."""
    files = {
        path: facts if is_url(path) else facts | {"sha256": _digest(Path(path))}
        for path, facts in inputs.get("raw files", {}).items()
    }
    return inputs | {"raw files": files} if files else inputs


def _changes(name: str, before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    """What differs of a stage, in words; a raw file of another time but the same content does not."""
    keys = _changed_keys(before, now)
    was, is_now = dict(dotted_items(_without_files(before))), dict(dotted_items(_without_files(now)))
    for key in keys[:_MOST_CHANGES]:
        if key.startswith("raw files "):
            yield f"{key.removeprefix('raw files ')} has changed"
        elif key in ("corpus", "pretraining", "finetuning") or key.startswith(("backbone", "checkpoint")):
            yield f"the {key.partition('.')[0]} is another one"
        else:
            typed = f"{_TYPED_AS[name]}{key.removeprefix('settings.')}" if key.startswith("settings.") else key
            yield f"{typed}: {was.get(key)!r} is now {is_now.get(key)!r}"
    if len(keys) > _MOST_CHANGES:
        yield f"and {len(keys) - _MOST_CHANGES} more"


def _changed_keys(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    was, is_now = dict(dotted_items(_without_files(before))), dict(dotted_items(_without_files(now)))
    # Every setting is in a record, so one that is not there is of a later version, and has its default.
    keys = [key for key, value in was.items() if is_now.get(key, _ABSENT) != value]
    files_before, files_now = before.get("raw files", {}), now.get("raw files", {})
    changed = [path for path in files_before | files_now if _differs(path, files_before.get(path), files_now.get(path))]
    return keys + [f"raw files {path}" for path in changed]


_ABSENT = object()


def _without_files(inputs: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in inputs.items() if key != "raw files"}


def _differs(path: str, before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> bool:
    if before is None or now is None:
        return True
    if all(before.get(key) == value for key, value in now.items()):
        return False
    same_size = before.get("bytes") == now.get("bytes") and "sha256" in before
    return not (same_size and before["sha256"] == _digest(Path(path)))


def _digest(path: Path) -> str | None:
    """sha256 of a file; None where there is none."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return None


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def read_record(project: Project, name: str) -> Record | None:
    """The record of a stage; None where there is none, or none that can be read."""
    try:
        found = json.loads(project.record(name).read_text(encoding="utf-8"))
        files = found.get("files")
        return Record(
            dict(found["inputs"]),
            float(found["seconds"]),
            bool(found["is_complete"]),
            None if files is None else dict(files),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_record(project: Project, name: str, record: Record) -> None:
    """Replace the record of a stage, as a whole."""
    path = project.record(name)
    path.parent.mkdir(exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(vars(record), indent=1), encoding="utf-8")
    part.replace(path)
