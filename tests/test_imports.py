"""The shape of the package: imports point downwards, deepspeed stays in one file, nothing is printed or unpickled."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

import cllm4rec_dist

PACKAGE = "cllm4rec_dist"
ROOT = Path(cllm4rec_dist.__file__).parent

ORDER = [
    "__main__",
    "cli",
    "serving",
    "project",
    "ablation",
    "launchers",
    "export",
    "planning",
    "train",
    "audit",
    "evaluation",
    "monitoring",
    "step",
    "preflight",
    "checkpointing",
    "system",
    "signals",
    "model",
    "corpus",
    "log",
    "distributed",
    "config",
    "suggestions",
    "filesystems",
    "errors",
]
"""Top to bottom: an import points to a later line, or stays inside of a package."""

PATHS = sorted(path for path in ROOT.rglob("*.py") if path != ROOT / "__init__.py")


@cache
def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def part_of(path: Path) -> str:
    """The line of ORDER that a file belongs to."""
    return path.relative_to(ROOT).with_suffix("").parts[0]


def imported(path: Path) -> Iterator[str]:
    """Full names of everything that a file imports, inside of functions and for typing too."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write the whole name instead of a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def called(path: Path) -> Iterator[tuple[str, ast.Call]]:
    """Calls of a file with the dotted name of what is called."""
    for node in ast.walk(parsed(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def test_every_part_has_its_place() -> None:
    assert len(ORDER) == len(set(ORDER))
    assert {part_of(path) for path in PATHS} == set(ORDER)


@pytest.mark.parametrize("path", PATHS, ids=named)
def test_imports_point_only_downwards(path: Path) -> None:
    own = part_of(path)
    for name in imported(path):
        if name.split(".")[0] != PACKAGE:
            continue
        other = name.split(".")[1]
        inside = other == own and (ROOT / own).is_dir()
        assert inside or ORDER.index(other) > ORDER.index(own), f"{own} must not import {name}"


def test_the_entry_points_import_the_command_line_alone() -> None:
    scripts = sorted((ROOT.parent / "launch").glob("*.py"))
    assert scripts
    for script in scripts:
        names = {name for name in imported(script) if name.split(".")[0] == PACKAGE}
        assert names == {f"{PACKAGE}.cli.main"}, script.name


def test_only_the_engine_imports_deepspeed() -> None:
    assert [named(p) for p in PATHS if any(n.split(".")[0] == "deepspeed" for n in imported(p))] == [
        "distributed/engine.py"
    ]


def test_the_library_prints_nothing() -> None:
    assert [named(path) for path in PATHS if any(name == "print" for name, _ in called(path))] == []


UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}


def test_nothing_is_unpickled() -> None:
    for path in PATHS:
        assert not any(name.split(".")[0] in UNPICKLERS for name in imported(path)), named(path)
        for name, call in called(path):
            options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            if name.endswith("torch.load"):
                assert options.get("weights_only", "True") == "True", f"{named(path)}:{call.lineno}"
            assert options.get("allow_pickle", "False") == "False", f"{named(path)}:{call.lineno}"
            assert name not in ("eval", "exec"), f"{named(path)}:{call.lineno}"
            if name == "yaml.load":
                pytest.fail(f"{named(path)}:{call.lineno}: use yaml.safe_load")
            assert options.get("trust_remote_code", "False") == "False", f"{named(path)}:{call.lineno}"
