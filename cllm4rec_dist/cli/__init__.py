"""The `cllm4rec` command: thin entry points over the package, a module for each group of commands.

Commands that compute run under any launcher (see `launch.py`). Exit status: 2 for wrong input, with one message; 1 for
a fault; 75 for a run that was stopped by a signal after saving a checkpoint.
"""

from __future__ import annotations

from importlib import import_module

from cllm4rec_dist.cli.frame import app, main

__all__ = ["app", "main"]

for _module in (
    "project",
    "corpus",
    "train",
    "status",
    "evaluate",
    "ablate",
    "recommend",
    "serve",
    "export",
    "audit",
    "settings",
):  # in the order of the help
    import_module(f"{__name__}.{_module}")
