"""Commands to run after a stage, ready to paste into a shell."""

from __future__ import annotations

import os
import shlex
from itertools import count
from pathlib import Path
from typing import Any

from cllm4rec_dist.checkpointing.run_folder import CONFIG_FILE, read_config
from cllm4rec_dist.config import RunConfig, load_config
from cllm4rec_dist.corpus.manifest import load_manifest
from cllm4rec_dist.errors import CLLM4RecError
from cllm4rec_dist.preflight import resolve_paths


def next_commands(stage: str, run: Path, config_file: Path | None = None, *, is_evaluated: bool = False) -> list[str]:
    """Return the commands to run after a stage is done.

    Args:
        run: folder of the run, absolute.
        config_file: configuration file of the run; None if unknown.
        is_evaluated: True if the run has been evaluated since its last step.
    """
    if stage == "finetune":
        commands = ("serve",) if is_evaluated or not _holds_out(run) else ("evaluate", "serve")
        return [f"cllm4rec {command} {_short(run)}" for command in commands]
    finetune_config = _finetune_config(run, config_file)
    if finetune_config is None:
        config = config_file or run / CONFIG_FILE
        overrides = f"init_from={_short(run)} output={_short(_unused(run.with_name(f'{run.name}-finetune')))}"
        return [f"cllm4rec finetune -c {_short(config)} {overrides}"]
    return [" ".join([f"cllm4rec finetune -c {_short(finetune_config)}", *_overrides(finetune_config, run)])]


def resume_command(stage: str, run: Path, num_ranks: int = 1) -> str:
    """Return a command that resumes a run from the configuration in its folder, which may be a copy."""
    workers = f" --workers {num_ranks}" if num_ranks > 1 else ""
    output = _read_config(run).get("output", str(run))
    moved = "" if Path(output).absolute() == run.absolute() else f" output={_short(run)}"
    return f"cllm4rec {stage} -c {_short(run / CONFIG_FILE)}{workers}{moved}"


def _finetune_config(run: Path, config_file: Path | None) -> Path | None:
    """Find the configuration of the next stage: that of a project folder, or one named like the pretraining's."""
    candidates = [run.parents[1] / "finetune.yaml"] if run.parent.name == "runs" else []
    if config_file is not None and "pretrain" in config_file.name:
        candidates.insert(0, config_file.with_name(config_file.name.replace("pretrain", "finetune")))
    return next((path for path in candidates if path.is_file()), None)


def _overrides(config_file: Path, run: Path) -> list[str]:
    """Settings of a finetuning that starts from a run whose own settings may not be those of `config_file`.

    From another run than the file names it gets another output, where it would resume what the file has trained.
    """
    try:
        config, _ = resolve_paths(load_config(RunConfig, config_file, ["stage=finetune"]))
    except CLLM4RecError:
        return [f"init_from={_short(run)}"]
    pretrained = _read_config(run)
    values = {field: pretrained.get(field, getattr(config, field)) for field in ("corpus", "backbone")}
    if config.init_from != str(run):
        values = {"init_from": str(run), "output": str(_unused(_finetuned(run))), **values}
    changed = [f"{field}={_short(value)}" for field, value in values.items() if value != getattr(config, field)]
    return [*changed, *(["--allow-leak"] if pretrained.get("allow_leak") else [])]


def _holds_out(run: Path) -> bool:
    """True if the corpus of a run has items to evaluate on, or cannot be read."""
    try:
        manifest, _ = load_manifest(str(_read_config(run).get("corpus")))
    except CLLM4RecError:
        return True
    return manifest.num_held_out("test") > 0


def _finetuned(run: Path) -> Path:
    """Return a folder for the finetuning of a pretraining."""
    name = run.name.replace("pretrain", "finetune")
    return run.with_name(name if name != run.name else f"{run.name}-finetune")


def _unused(folder: Path) -> Path:
    """Return the folder, or one beside it with a number, that does not exist."""
    numbered = (folder.with_name(f"{folder.name}-{number}") for number in count(2))
    return folder if not folder.exists() else next(path for path in numbered if not path.exists())


def _read_config(run: Path) -> dict[str, Any]:
    try:
        return read_config(run)
    except CLLM4RecError:
        return {}


def _short(path: str | Path) -> str:
    """Quote a path for a shell, relative to the working folder if it is below it; quote a URL or a hub id as it is."""
    if not os.path.isabs(path):
        return shlex.quote(str(path))
    relative = os.path.relpath(path)
    return shlex.quote(str(path) if relative.startswith("..") else relative)
