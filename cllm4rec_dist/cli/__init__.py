"""The `cllm4rec` command: thin entry points over the package, a module for each group of commands.

Every command that computes runs under any launcher (see `launch.py`). An error that input caused ends with its one
message and exit status 2, one that a fault caused with status 1; a run that was told to stop and has saved, with 75.
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
    "recommend",
    "serve",
    "export",
    "audit",
    "settings",
):  # in the order of the help
    import_module(f"{__name__}.{_module}")
