"""The names that tests cover, and a search for private names in a source file."""

from __future__ import annotations

import ast
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import cllm4rec_dist

ROOT = Path(cllm4rec_dist.__file__).parent

TestT = TypeVar("TestT", bound=Callable[..., None])

LISTED: set[tuple[str, str]] = set()
"""File of the package and name in a library that a test covers."""


def relies_on(file: str, *names: str) -> Callable[[TestT], TestT]:
    """List names that a file of the package uses and the test below checks."""
    LISTED.update((file, name) for name in names)
    return lambda test: test


PYTHON_OWN = {
    name
    for kind in (object, type, BaseException, int, str, list, dict, types.FunctionType, types.ModuleType)
    for name in dir(kind)
}
DOCUMENTED = {"_exit", "_replace", "_Environ"}
"""Underscored names of the standard library that are documented, or are in its type stubs alone."""


def is_private(name: str) -> bool:
    return name.startswith("_") and name not in PYTHON_OWN | DOCUMENTED


def members_of(tree: ast.Module) -> set[str]:
    """Names that the classes of a file define themselves."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for part in ast.walk(node):
                if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                    found.add(part.name)
                elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store) and is_self(part.value):
                    found.add(part.attr)
            for statement in node.body:
                targets = [statement.target] if isinstance(statement, ast.AnnAssign) else []
                targets = statement.targets if isinstance(statement, ast.Assign) else targets
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return found


def is_self(node: ast.AST) -> bool:
    return isinstance(node, ast.Name) and node.id in ("self", "cls")


def root_of(node: ast.AST) -> str:
    while isinstance(node, ast.Attribute | ast.Call | ast.Subscript):
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def private_names(tree: ast.Module) -> Iterator[str]:
    """Names of other libraries in a file that are private, set by DeepSpeed on parameters, or overwritten."""
    members = members_of(tree)
    libraries, ours = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = (node.module or "") if isinstance(node, ast.ImportFrom) else node.names[0].name
            names = {alias.asname or alias.name.split(".")[0] for alias in node.names}
            (ours if module.split(".")[0] in ("cllm4rec_dist", "__future__") else libraries).update(names)
            if module.split(".")[0] not in ("cllm4rec_dist", "__future__"):
                parts = {*module.split("."), *(alias.name for alias in node.names)}
                yield from filter(is_private, parts)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_own = root_of(node) in ours or (node.attr in members and node.attr.startswith("_"))
            overwrites = isinstance(node.ctx, ast.Store) and (node.attr == "forward" or root_of(node) in libraries)
            if (is_private(node.attr) and not is_own) or node.attr.startswith("ds_") or overwrites:
                yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            name = node.args[1]
            if isinstance(name, ast.Constant) and is_private(str(name.value)):
                yield str(name.value)
