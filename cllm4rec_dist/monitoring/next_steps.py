"""Commands to run after a stage, ready to paste into a shell."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

from cllm4rec_dist.checkpointing.run_folder import CONFIG_FILE
from cllm4rec_dist.config import RunConfig, load_config
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
        return [f"cllm4rec {command} {_short(run)}" for command in ("evaluate", "serve")[is_evaluated:]]
    finetune_config = _finetune_config(run, config_file)
    if finetune_config is None:
        config = config_file or run / CONFIG_FILE
        overrides = f"init_from={_short(run)} output={_short(run.with_name(f'{run.name}-finetune'))}"
        return [f"cllm4rec finetune -c {_short(config)} {overrides}"]
    override = "" if _starts_from(finetune_config, run) else f" init_from={_short(run)}"
    return [f"cllm4rec finetune -c {_short(finetune_config)}{override}"]


def resume_command(stage: str, run: Path, num_ranks: int = 1) -> str:
    """Return a command that resumes a run from the configuration in its folder."""
    workers = f" --workers {num_ranks}" if num_ranks > 1 else ""
    return f"cllm4rec {stage} -c {_short(run / CONFIG_FILE)}{workers}"


def _finetune_config(run: Path, config_file: Path | None) -> Path | None:
    """Find the configuration of the next stage: that of a project folder, or one named like the pretraining's."""
    candidates = [run.parents[1] / "finetune.yaml"] if run.parent.name == "runs" else []
    if config_file is not None and "pretrain" in config_file.name:
        candidates.insert(0, config_file.with_name(config_file.name.replace("pretrain", "finetune")))
    return next((path for path in candidates if path.is_file()), None)


def _starts_from(config_file: Path, run: Path) -> bool:
    try:
        config, _ = resolve_paths(load_config(RunConfig, config_file, ["stage=finetune"]))
    except CLLM4RecError:
        return False
    return config.init_from == str(run)


def _short(path: Path) -> str:
    """Quote a path for a shell, relative to the working folder if it is below it."""
    relative = os.path.relpath(path)
    return shlex.quote(str(path) if relative.startswith("..") else relative)
